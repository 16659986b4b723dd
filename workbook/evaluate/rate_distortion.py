"""Bits against quality: tokenizers beside JPEG and JPEG 2000 on the same held-out views.

A code takes log2 K bits. Of a file only coded data count, without headers and tables, which favors
the files: at this size headers would take more than everything else.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sitlib.metrics import bits_per_pixel, evaluate_reconstructions
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.evaluate import decode, reconstruct
from workbook.profile import Profile
from workbook.tokenizers import held_out_set, trained_tokenizer

VIEWS = 500  # at most: all of them are in memory, in several forms
JPEG_QUALITIES = (1, 5, 10, 20, 35, 50, 70)
JPEG2000_RATES = (100, 40, 28, 20, 12, 6)  # times fewer bytes than the pixels have
File = tuple[bytes, int]  # its content, and how many bytes of it are coded data


def rate_distortion(profile: Profile, tokenizers: list[str], seed: int) -> dict[str, Any]:
    """PSNR and LPIPS-Alex at the bits of tokenizers and files, on the first evaluation set.

    Returns:
        `curves`: name -> points with `setting`, `bits_per_pixel`, `psnr` (dB), `lpips_alex`,
        `intervals`, for files also `bits_per_pixel_of_file`; `matched`: tokenizer -> kind of file
        -> point of files, each the largest with at most as many bits as the codes; `protocol`.
    """
    images, keys = held_out_set(profile, count=VIEWS)
    full, num_pixels = images.shape[-1], images[0, 0].numel()

    def point(setting: str, bits: float, decoded: Tensor, **more: float) -> dict[str, Any]:
        if decoded.shape[-1] != full:
            decoded = F.interpolate(decoded, (full, full), mode="bicubic").clamp(0, 1)
        names = ["psnr", "lpips_alex"]
        scores = evaluate_reconstructions(images, decoded, keys, metrics=names)
        about = {"setting": setting, "bits_per_pixel": bits, **more}
        return about | {name: scores[name] for name in (*names, "intervals")}

    def files(
        setting: str, encode: Callable[[Image.Image], File], factor: int = 1
    ) -> dict[str, Any]:
        coded, decoded, whole = through_files(F.avg_pool2d(images, factor), encode)
        pixels = factor**2  # of the image, for one of the file
        return point(setting, coded / pixels, decoded, bits_per_pixel_of_file=whole / pixels)

    curves: dict[str, Any] = {}
    matched: dict[str, Any] = {}
    for name in tokenizers:
        tokenizer = trained_tokenizer(profile, name, seed).model.to(best_device())
        curves[name] = [point(f"{k} scales", bits, x) for k, bits, x in prefixes(tokenizer, images)]
        budget = curves[name][-1]["bits_per_pixel"] * num_pixels
        # Settings go from few bits to many.
        jpeg = largest_within(budget, encode_jpeg, range(1, 96))
        jpeg2000 = largest_within(budget, encode_jpeg2000, range(200, 1, -1))
        encoders = {"jpeg": jpeg, "jpeg2000": jpeg2000}
        matched[name] = {kind: files("as many bits", encode) for kind, encode in encoders.items()}
    curves["jpeg"] = [files(str(q), partial(encode_jpeg, q)) for q in JPEG_QUALITIES]
    curves["jpeg2000"] = [files(str(r), partial(encode_jpeg2000, r)) for r in JPEG2000_RATES]
    curves["jpeg_half"] = [files(str(q), partial(encode_jpeg, q), 2) for q in JPEG_QUALITIES]
    qualities, rates = (", ".join(map(str, x)) for x in (JPEG_QUALITIES, JPEG2000_RATES))
    protocol = {
        "images": len(images),
        "photographs": len(set(keys)),
        "size": list(images.shape[2:]),
        "bits": "codes: log2 of the codebook's size; files: coded data, without headers, tables",
        "smaller_images": "enlarged to the full size (bicubic, clamped)",
        "jpeg": f"Pillow, optimized tables, colors at half the size (4:2:0), quality {qualities}",
        "jpeg2000": f"Pillow, irreversible, asked for 1 : {rates}",
    }
    return {"curves": curves, "matched": matched, "protocol": protocol}


def prefixes(tokenizer: SpectralTokenizer, images: Tensor) -> Iterator[tuple[int, float, Tensor]]:
    """Numbers of scales that can be decoded alone, their bits per pixel, and the decoded images."""
    codes, reconstructions = reconstruct(tokenizer, images)
    num_scales, config = codes.shape[1], tokenizer.config
    for k in range(num_scales if config.decoder_attention == "full" else 1, num_scales + 1):
        bits = bits_per_pixel(codes[0, :k].numel(), config.num_codes, config.size)
        yield k, bits, reconstructions if k == num_scales else decode(tokenizer, codes, k)


def largest_within(
    bits: float, encode: Callable[[int, Image.Image], File], settings: Sequence[int]
) -> Callable[[Image.Image], File]:
    """Encoder to the file with the most coded data within `bits`, else to the smallest one.

    Args:
        settings: of `encode`, from few bits to many.
    """

    def largest(image: Image.Image) -> File:
        count = bisect_right(settings, bits, key=lambda setting: 8 * encode(setting, image)[1])
        return encode(settings[max(0, count - 1)], image)

    return largest


def encode_jpeg(quality: int, image: Image.Image) -> File:
    """A JPEG file."""
    data = _saved(image, format="JPEG", quality=quality, optimize=True)
    start = data.index(b"\xff\xda")  # start of scan: a header of its own, then the coded data
    start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data, len(data) - 2 - start  # the last two bytes end the image


def encode_jpeg2000(rate: int, image: Image.Image) -> File:
    """A JPEG 2000 codestream of 1 / rate of the bytes that the pixels have."""
    rates = {"quality_mode": "rates", "quality_layers": [rate]}
    data = _saved(image, format="JPEG2000", irreversible=True, no_jp2=True, **rates)
    return data, len(data) - 2 - (data.index(b"\xff\x93") + 2)  # from start of data to end


def _saved(image: Image.Image, **settings: Any) -> bytes:
    image.save(file := io.BytesIO(), **settings)
    return file.getvalue()


def through_files(
    images: Tensor, encode: Callable[[Image.Image], File]
) -> tuple[float, Tensor, float]:
    """Bits per pixel of coded data, images [V, 3, H, W] read back, bits of whole files."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    encoded = [encode(Image.fromarray(image)) for image in pixels]
    opened = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in encoded]
    decoded = torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2).float() / 255
    bits = 8 / images[:, 0].numel()
    return bits * sum(n for _, n in encoded), decoded, bits * sum(len(data) for data, _ in encoded)
