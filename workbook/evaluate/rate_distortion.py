"""Bits against quality: tokenizers beside JPEG and JPEG 2000 on the same held-out views.

A code takes log2 K bits. Of a file only coded data count, not headers and tables, which at this size
would take more than everything else: that favors the files. A scale-causal tokenizer gives a point for
every number of scales, all of them prefixes of one code.
"""

import io
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
Encoder = Callable[[Image.Image], tuple[bytes, int]]  # image -> file, bytes of coded data in it


def rate_distortion(profile: Profile, tokenizers: list[str], seed: int) -> dict[str, Any]:
    """PSNR and LPIPS-Alex at the bits of tokenizers and files, on the first evaluation set.

    Returns:
        `curves`: name -> points with `setting`, `bits_per_pixel`, `psnr` (dB), `lpips_alex`,
        `intervals`, for files also `bits_per_pixel_of_file`; `matched`: tokenizer -> kind of file ->
        point of files, each the largest with at most as many bits as the codes; `protocol`.
    """
    images, keys = held_out_set(profile, count=VIEWS)
    size, num_pixels = images.shape[-1], images[0, 0].numel()

    def point(
        setting: str, bits: float, decoded: Tensor, file_bits: float | None = None
    ) -> dict[str, Any]:
        names = ["psnr", "lpips_alex"]
        scores = evaluate_reconstructions(images, _enlarged(decoded, size), keys, metrics=names)
        point = {"setting": setting, "bits_per_pixel": bits}
        if file_bits is not None:
            point["bits_per_pixel_of_file"] = file_bits
        return point | {name: scores[name] for name in (*names, "intervals")}

    curves: dict[str, list[dict[str, Any]]] = {}
    matched: dict[str, dict[str, Any]] = {}
    # From few bits to many.
    encoders = {
        "jpeg": (encode_jpeg, range(1, 96)),
        "jpeg2000": (encode_jpeg2000, range(200, 1, -1)),
    }
    for name in tokenizers:
        tokenizer = trained_tokenizer(profile, name, seed).model.to(best_device())
        curves[name] = [
            point(f"{scales} scales", bits, decoded)
            for scales, bits, decoded in prefixes(tokenizer, images)
        ]
        budget = curves[name][-1]["bits_per_pixel"] * num_pixels
        matched[name] = {
            kind: point("as many bits", *through_files(images, largest_within(budget, *encoder)))
            for kind, encoder in encoders.items()
        }
    curves["jpeg"] = [
        point(str(quality), *through_files(images, partial(encode_jpeg, quality)))
        for quality in JPEG_QUALITIES
    ]
    curves["jpeg2000"] = [
        point(str(rate), *through_files(images, partial(encode_jpeg2000, rate)))
        for rate in JPEG2000_RATES
    ]
    curves["jpeg_half"] = []
    for quality in JPEG_QUALITIES:
        half = F.avg_pool2d(images, 2)
        bits, decoded, file_bits = through_files(half, partial(encode_jpeg, quality))
        curves["jpeg_half"].append(point(str(quality), bits / 4, decoded, file_bits / 4))
    qualities, rates = (", ".join(map(str, x)) for x in (JPEG_QUALITIES, JPEG2000_RATES))
    protocol = {
        "images": len(images),
        "photographs": len(set(keys)),
        "size": list(images.shape[2:]),
        "bits": "codes: log2 of the codebook's size; files: coded data only, without headers, tables",
        "smaller_images": "enlarged to the full size (bicubic, clamped)",
        "jpeg": f"Pillow, optimized tables, colors at half the size (4:2:0), quality {qualities}",
        "jpeg2000": f"Pillow, irreversible, asked for 1 : {rates}",
    }
    return {"curves": curves, "matched": matched, "protocol": protocol}


def prefixes(tokenizer: SpectralTokenizer, images: Tensor) -> Iterator[tuple[int, float, Tensor]]:
    """Number of scales that can be decoded alone, their bits per pixel, and the decoded images."""
    codes, reconstructions = reconstruct(tokenizer, images)
    num_scales, config = codes.shape[1], tokenizer.config
    first = num_scales if config.decoder_attention == "full" else 1
    for scales in range(first, num_scales + 1):
        bits = bits_per_pixel(codes[0, :scales].numel(), config.num_codes, config.size)
        whole = scales == num_scales
        yield scales, bits, reconstructions if whole else decode(tokenizer, codes, scales)


def _enlarged(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)


def largest_within(
    bits: float, encode: Callable[[int, Image.Image], tuple[bytes, int]], settings: Sequence[int]
) -> Encoder:
    """Encoder to the file with the most coded data within `bits`, by halving `settings`.

    They go from few bits to many; the first is taken if all have more.
    """

    def largest(image: Image.Image) -> tuple[bytes, int]:
        low, high, best = 0, len(settings) - 1, encode(settings[0], image)
        while low <= high:
            middle = (low + high) // 2
            file = encode(settings[middle], image)
            if 8 * file[1] <= bits:
                best, low = file, middle + 1
            else:
                high = middle - 1
        return best

    return largest


def encode_jpeg(quality: int, image: Image.Image) -> tuple[bytes, int]:
    """A JPEG file, and the number of its bytes that are coded data."""
    data = _saved(image, format="JPEG", quality=quality, optimize=True)
    start = data.index(b"\xff\xda")  # start of scan: a header of its own, then the coded data
    start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data, len(data) - 2 - start  # the last two bytes end the image


def encode_jpeg2000(rate: int, image: Image.Image) -> tuple[bytes, int]:
    """A JPEG 2000 codestream, and the number of its bytes that are coded data."""
    rates = {"quality_mode": "rates", "quality_layers": [rate]}
    data = _saved(image, format="JPEG2000", irreversible=True, no_jp2=True, **rates)
    start = data.index(b"\xff\x93") + 2  # start of data
    return data, len(data) - 2 - start


def _saved(image: Image.Image, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


def through_files(images: Tensor, encode: Encoder) -> tuple[float, Tensor, float]:
    """Bits per pixel of coded data, images [V, 3, H, W] read back, bits per pixel of whole files."""
    decoded, coded, whole = [], 0, 0
    for pixels in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        data, coded_bytes = encode(Image.fromarray(pixels))
        decoded.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        coded, whole = coded + coded_bytes, whole + len(data)
    stacked = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255
    num_pixels = images[:, 0].numel()
    return 8 * coded / num_pixels, stacked, 8 * whole / num_pixels
