"""Bits against quality: tokenizers beside JPEG and JPEG 2000 on the same held-out views.

A code takes log2 K bits. Of a file only its coded data count, not headers and tables, which would take more than everything else at this
size: that favours the files. A scale-causal tokenizer gives a point for every number of scales, all of them prefixes of one code.
"""

import io
from collections.abc import Callable, Sequence
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
from workbook.profile import Profile
from workbook.tokenizer_evaluation import reconstructed
from workbook.tokenizers import held_out_set, trained_tokenizer

JPEG_QUALITIES = (1, 5, 10, 20, 35, 50, 70)
JPEG2000_RATES = (
    100,
    40,
    28,
    20,
    12,
    6,
)  # how many times fewer bytes than the pixels have are asked for
VIEWS = 500  # at most: all of them are in memory, in several forms
QUALITIES, RATES = (
    range(1, 96),
    range(200, 1, -1),
)  # from few bits to many, of files as large as a code


def rate_distortion(profile: Profile, tokenizers: list[str], seed: int) -> dict[str, Any]:
    """PSNR and LPIPS-Alex at the bits that tokenizers and files take, on the first views of the first evaluation set at full size.

    Returns:
        `curves`: name -> points with `setting`, `bits_per_pixel`, `psnr` (dB), `lpips_alex`, `intervals`, and for files also
        `bits_per_pixel_of_file`; `matched`: tokenizer -> kind of file -> a point of files each of which is the largest that takes no more
        bits than the tokenizer's codes, or the smallest that can be made; `protocol`.
    """
    images, keys = held_out_set(profile, count=VIEWS)
    curves: dict[str, list[dict[str, Any]]] = {}

    def point(
        setting: str, bits: float, found: Tensor, whole: float | None = None
    ) -> dict[str, Any]:
        scores = evaluate_reconstructions(images, found, keys, metrics=["psnr", "lpips_alex"])
        of_file = {} if whole is None else {"bits_per_pixel_of_file": whole}
        names = ("psnr", "lpips_alex", "intervals")
        return {
            "setting": setting,
            "bits_per_pixel": bits,
            **of_file,
            **{name: scores[name] for name in names},
        }

    for name in tokenizers:
        tokenizer = trained_tokenizer(profile, name, seed).model.to(best_device())
        codes, whole = reconstructed(tokenizer, images)
        curves[name] = [
            point(f"{scales} scales", _bits(tokenizer, codes[:, :scales]), found)
            for scales, found in _by_scales(tokenizer, codes, whole)
        ]
    kinds = {"jpeg": (encode_jpeg, JPEG_QUALITIES), "jpeg2000": (encode_jpeg2000, JPEG2000_RATES)}
    for name, (encode, settings) in kinds.items():
        curves[name] = []
        for setting in settings:
            found, coded, whole = through_files(images, partial(encode, setting))
            curves[name].append(point(str(setting), coded, found, whole))
    curves["jpeg_half"] = []
    full, small = images.shape[-1], F.avg_pool2d(images, 2)
    for quality in JPEG_QUALITIES:
        found, coded, whole = through_files(small, partial(encode_jpeg, quality))
        curves["jpeg_half"].append(
            point(str(quality), coded / 4, _enlarged(found, full), whole / 4)
        )
    matched: dict[str, dict[str, Any]] = {}
    for name in tokenizers:
        bits = curves[name][-1]["bits_per_pixel"] * images[0, 0].numel()
        matched[name] = {}
        for kind, encode, settings in (
            ("jpeg", encode_jpeg, QUALITIES),
            ("jpeg2000", encode_jpeg2000, RATES),
        ):
            found, coded, whole = through_files(
                images, partial(largest_within, bits, encode, settings)
            )
            matched[name][kind] = point("as many bits", coded, found, whole)
    return {
        "curves": curves,
        "matched": matched,
        "protocol": {
            "images": len(images),
            "photographs": len(set(keys)),
            "size": list(images.shape[2:]),
            "bits": "codes: log2 of the codebook's size; files: coded data only, without headers and tables",
            "smaller_images": "enlarged to the full size (bicubic, clamped)",
            "jpeg": "Pillow, optimized tables, colours at half the size (4:2:0), quality "
            + ", ".join(map(str, JPEG_QUALITIES)),
            "jpeg2000": "Pillow, irreversible, asked for 1 : "
            + ", ".join(map(str, JPEG2000_RATES)),
        },
    }


def largest_within(
    bits: float,
    encode: Callable[[int, Image.Image], tuple[bytes, int]],
    settings: Sequence[int],
    image: Image.Image,
) -> tuple[bytes, int]:
    """The file whose coded data are the most within `bits`, by halving `settings` (few bits first); the first if all have more."""
    low, high = 0, len(settings) - 1
    best = encode(settings[0], image)
    while low <= high:
        middle = (low + high) // 2
        made = encode(settings[middle], image)
        if 8 * made[1] <= bits:
            best, low = made, middle + 1
        else:
            high = middle - 1
    return best


def _bits(tokenizer: SpectralTokenizer, codes: Tensor) -> float:
    return bits_per_pixel(codes[0].numel(), tokenizer.config.num_codes, tokenizer.config.size)


def _by_scales(
    tokenizer: SpectralTokenizer, codes: Tensor, whole: Tensor
) -> list[tuple[int, Tensor]]:
    """Numbers of scales that can be decoded alone, and the images at full size; `whole` has all scales."""
    scales, full = codes.shape[1], whole.shape[-1]
    if tokenizer.config.decoder_attention == "full":
        return [(scales, whole)]
    parts = []
    for k in range(1, scales):
        small = torch.cat([tokenizer.decode(batch, k).cpu() for batch in codes.split(64)])
        parts.append((k, _enlarged(small, full)))
    return [*parts, (scales, whole)]


def _enlarged(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)


def encode_jpeg(quality: int, image: Image.Image) -> tuple[bytes, int]:
    """A JPEG file, and how many of its bytes are coded data."""
    data = _saved(image, format="JPEG", quality=quality, optimize=True)
    start = data.index(b"\xff\xda")  # start of scan: a header of its own, then the coded data
    start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data, len(data) - 2 - start  # the last two bytes say that the image ends


def encode_jpeg2000(rate: int, image: Image.Image) -> tuple[bytes, int]:
    """A JPEG 2000 codestream, and how many of its bytes are coded data."""
    data = _saved(
        image,
        format="JPEG2000",
        quality_mode="rates",
        quality_layers=[rate],
        irreversible=True,
        no_jp2=True,
    )
    return data, len(data) - 2 - (
        data.index(b"\xff\x93") + 2
    )  # between "start of data" and "end of codestream"


def _saved(image: Image.Image, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


def through_files(
    images: Tensor, encode: Callable[[Image.Image], tuple[bytes, int]]
) -> tuple[Tensor, float, float]:
    """Images [V, 3, H, W] in [0, 1] written to files and read again; mean bits per pixel of coded data and of whole files."""
    found, coded, whole = [], 0, 0
    for pixels in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        data, payload = encode(Image.fromarray(pixels))
        found.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        coded, whole = coded + payload, whole + len(data)
    stacked = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255
    pixels = images.shape[2] * images.shape[3] * len(images)
    return stacked, 8 * coded / pixels, 8 * whole / pixels
