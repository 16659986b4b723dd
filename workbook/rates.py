"""Files of photographs: bits, headers included, beside quality; `.sit` and the usual formats."""

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.interpolate import PchipInterpolator
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from tqdm import tqdm

from sitlib import codec
from sitlib.data import held_out_views, open_images
from sitlib.metrics import fetch_weights, lpips_per_image, psnr_per_image
from sitlib.model.tiling import decode_codes, encode_image
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.paths import resolve
from workbook.profile import Profile

with suppress(ImportError):  # of the extra `lab`
    import pillow_jxl  # noqa: F401 - teaches Pillow the format

TOKENIZER = "photos-256"
SETS = ("landscapes", "things", "extra")  # folders in data/
COUNT = 10  # held-out photographs of each, at most
# Options of Pillow, from few bytes to many.
FORMATS: dict[str, list[dict[str, Any]]] = {
    "JPEG": [{"quality": q, "optimize": True} for q in (1, 4, 8, 15, 30, 55, 85)],
    "JPEG 2000": [
        {"quality_mode": "rates", "quality_layers": [x], "irreversible": True, "no_jp2": True}
        for x in (200, 120, 80, 50, 30, 18, 10)
    ],
    "WebP": [{"quality": q, "method": 6} for q in (0, 8, 20, 40, 60, 80, 92)],
    "AVIF": [{"quality": q} for q in (5, 15, 25, 40, 55, 70, 85)],
    "JPEG XL": [{"quality": q, "effort": 7} for q in (1, 10, 25, 45, 65, 82, 93)],
}
# Px to which a photograph is resized for a .sit file: one tile of every size, and four.
SIDES = (32, 64, 128, 256, 496)
SIDE_BYTES = 4  # that would say what it was resized from
# Measure -> is more of it better.
MEASURES = {"lpips_vgg": False, "lpips_alex": False, "psnr": True, "ms_ssim": True}


def rates(_: Profile) -> dict[str, Any]:
    """Means over held-out photographs, of every format and setting."""
    fetch_weights()
    tokenizer = SpectralTokenizer.from_pretrained(TOKENIZER)
    size, images = tokenizer.sizes[-1], []
    for name in SETS:
        source = open_images(resolve(f"data/{name}"), "test")
        count = min(COUNT, len(source))
        images.append(held_out_views(source, count, size, 0, kind="center")[0])
    photographs = torch.cat(images)
    curves = {
        name: [measured(photographs, str(options), through_format, name, options) for options in of]
        for name, of in FORMATS.items()
    }
    curves[".sit"] = [
        measured(photographs, f"{side} px", through_codes, tokenizer, side) for side in SIDES
    ]
    plain = tokenizer.config.bits() / size**2
    protocol = {"photographs": len(photographs), "size": size, "views": "center", "sets": SETS}
    return {"curves": curves, "bits_of_codes": plain, "tokenizer": TOKENIZER, "protocol": protocol}


def measured(photographs: Tensor, setting: str, through: Any, *how: Any) -> dict[str, Any]:
    """A point of a curve: means over photographs [B, 3, H, W] of bits per pixel and `MEASURES`."""
    sizes, decoded, seconds = [], [], np.zeros(2)  # of encoding, of decoding
    for image in tqdm(photographs, f"{how[0] if isinstance(how[0], str) else '.sit'}, {setting}"):
        size, again, taken = through(image, *how)
        sizes.append(size)
        decoded.append(again)
        seconds += taken
    made = torch.stack(decoded)
    values = {
        "lpips_vgg": lpips_per_image(made, photographs, "vgg"),
        "lpips_alex": lpips_per_image(made, photographs),
        "psnr": psnr_per_image(made, photographs),
        "ms_ssim": multiscale_structural_similarity_index_measure(
            made, photographs, data_range=1.0, reduction="none"
        ),
    }
    point = {"setting": setting, "bits_per_pixel": 8 * np.mean(sizes) / photographs[0, 0].numel()}
    point |= {name: float(value.mean()) for name, value in values.items()}
    encoding, decoding = (seconds / len(photographs)).tolist()
    return point | {"seconds_to_encode": encoding, "seconds_to_decode": decoding}


def through_format(
    image: Tensor, name: str, options: Mapping[str, Any]
) -> tuple[int, Tensor, list[float]]:
    """Bytes of a file of an image [3, H, W], what it holds, seconds to write and to read it."""
    pixels = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    start = time.perf_counter()
    pixels.save(
        file := io.BytesIO(), "JXL" if name == "JPEG XL" else name.replace(" ", ""), **options
    )
    written = time.perf_counter()
    decoded = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
    seconds = [written - start, time.perf_counter() - written]
    return len(file.getvalue()), decoded.permute(2, 0, 1) / 255, seconds


def through_codes(
    image: Tensor, tokenizer: SpectralTokenizer, side: int
) -> tuple[int, Tensor, list[float]]:
    """The same of a .sit file of the image resized to a square of `side` px, and back."""
    start, size = time.perf_counter(), image.shape[1:]

    def resized(x: Tensor, size: Sequence[int]) -> Tensor:
        is_same = tuple(x.shape[2:]) == tuple(size)
        return x if is_same else F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)

    file = codec.compress(tokenizer, encode_image(tokenizer, resized(image[None], (side, side))))
    written = time.perf_counter()
    small = decode_codes(tokenizer, codec.decompress(tokenizer, file)[0])
    decoded = resized(small, size)[0]
    more = SIDE_BYTES * (side != size[0])
    return len(file) + more, decoded, [written - start, time.perf_counter() - written]


def bd_rate(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], measure: str
) -> float | None:
    """Mean difference in bits (%) at equal quality, below 0 if ours need fewer; None: none is equal.

    Bjøntegaard's (VCEG-M33) over the qualities that both reach, with monotone cubic interpolation
    of the logarithm of bits. Points that fewer bits of the same format surpass are left out.
    """
    sign = 1 if MEASURES[measure] else -1
    curves = []
    for points in (ours, theirs):
        pairs = sorted((point["bits_per_pixel"], sign * point[measure]) for point in points)
        bits, quality = np.array(pairs).T
        is_best = quality > np.r_[-np.inf, np.maximum.accumulate(quality)[:-1]]
        curves.append(PchipInterpolator(quality[is_best], np.log(bits[is_best])))
    low, high = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if low >= high:
        return None
    first, second = (float(curve.integrate(low, high)) / (high - low) for curve in curves)
    return 100 * float(np.expm1(first - second))
