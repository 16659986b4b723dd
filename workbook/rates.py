"""Files of photographs: bits, headers included, beside quality; `.sit` and the usual formats."""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from tqdm import tqdm

from sitlib import codec
from sitlib.data import held_out_positions, held_out_views, open_images
from sitlib.metrics import fetch_weights, lpips_per_image, psnr_per_image
from sitlib.model.tiling import decode_codes, encode_image
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.paths import resolve
from workbook.profile import Profile

with suppress(ImportError):  # of the extra `lab`
    import pillow_jxl  # noqa: F401 - teaches Pillow the format

# An image [3, H, W] -> bytes of its file, what it holds, seconds to write and to read it.
Through = Callable[[Tensor], tuple[int, Tensor, list[float]]]
TOKENIZER = "photos-256"
SETS = ("landscapes", "things", "extra")  # folders in data/
LARGE, LARGE_SIDE = 8, 1000  # photographs in their own size, of so many px on the longer side
# Pillow's names and options, from few bytes to many.
FORMATS: dict[str, list[dict[str, Any]]] = {
    "JPEG": [{"quality": q, "optimize": True} for q in (1, 4, 8, 15, 30, 55, 85)],
    "JPEG2000": [
        {"quality_mode": "rates", "quality_layers": [x], "irreversible": True, "no_jp2": True}
        for x in (200, 120, 80, 50, 30, 18, 10)
    ],
    "WEBP": [{"quality": q, "method": 6} for q in (0, 8, 20, 40, 60, 80, 92)],
    "AVIF": [{"quality": q} for q in (5, 15, 25, 40, 55, 70, 85)],
    "JXL": [{"quality": q, "effort": 7} for q in (1, 10, 25, 45, 65, 82, 93)],
}
TITLES = {"JPEG2000": "JPEG 2000", "JXL": "JPEG XL", "WEBP": "WebP", "sit": ".sit"}
# A photograph may be resized before a file is written of it, and back after: .sit files to squares of
# so many px, others to half the side, with these of their options.
SIDES, HALVED = (32, 64, 128, 256), slice(2, 6)
SIDE_BYTES = 4  # that would say what it was resized from
RESAMPLES = 200
# Measure -> is more of it better.
MEASURES = {"lpips_vgg": False, "lpips_alex": False, "psnr": True, "ms_ssim": True}


def rates(_: Profile, format: str) -> dict[str, Any]:
    """A format with every setting: on all held-out photographs at the size of the tokenizer
    (`curve`), and on some large ones in their own size (`large`).
    """
    fetch_weights()
    tokenizer = SpectralTokenizer.from_pretrained(TOKENIZER)
    size, photographs, large = tokenizer.sizes[-1], [], []
    for name in SETS:
        source = open_images(resolve(f"data/{name}"), "test")
        photographs += held_out_views(source, len(source), size, 0, kind="center")[0]
        whole = (source[i].image / 255 for i in held_out_positions(source, len(source), 0))
        large += [image for image in whole if max(image.shape) >= LARGE_SIDE]
    large = large[:LARGE]
    if format == "sit":
        through = partial(through_codes, tokenizer=tokenizer)
        curve = [measured(photographs, format, f"{x} px", through, x) for x in SIDES]
        of_large = [measured(large, format, "own size", through)]
    else:
        files = {str(x): partial(through_format, name=format, options=x) for x in FORMATS[format]}
        curve = [measured(photographs, format, *file) for file in files.items()]
        for setting, through in [*files.items()][HALVED]:
            point = measured(photographs, format, f"{setting}, halved", through, size // 2)
            curve.append(point)
        of_large = [measured(large, format, *file) for file in [*files.items()][:5]]
    return {
        "title": TITLES.get(format, format),
        "curve": curve,
        "large": of_large,
        "bits_of_codes": tokenizer.config.bits() / size**2,
        "tokenizer": TOKENIZER,
        "protocol": {
            "photographs": len(photographs),
            "size": size,
            "views": "center",
            "sets": SETS,
            "large": [list(image.shape[:0:-1]) for image in large],
        },
    }


def measured(
    photographs: Sequence[Tensor], name: str, setting: str, through: Through, side: int = 0
) -> dict[str, Any]:
    """A point of a curve: bits per pixel and `MEASURES` of photographs [3, H, W], their means and
    `each`; with `side`, of files of the photographs resized to squares of so many px.
    """
    each, seconds = [], np.zeros(2)  # of encoding, of decoding
    for image in tqdm(photographs, f"{name}, {setting}"):
        given = resized(image, (side, side)) if side else image
        size, decoded, taken = through(given)
        size += SIDE_BYTES * (given.shape != image.shape)
        pair = resized(decoded, image.shape[1:])[None], image[None]
        values = {
            "bits_per_pixel": 8 * size / image[0].numel(),
            "lpips_vgg": lpips_per_image(*pair, "vgg"),
            "lpips_alex": lpips_per_image(*pair),
            "psnr": psnr_per_image(*pair),
            "ms_ssim": multiscale_structural_similarity_index_measure(*pair, data_range=1.0),
        }
        each.append({key: float(f"{float(value):.4g}") for key, value in values.items()})
        seconds += taken
    by_key = {key: [values[key] for values in each] for key in each[0]}
    encoding, decoding = (seconds / len(photographs)).tolist()
    return {
        "setting": setting,
        **{key: float(np.mean(values)) for key, values in by_key.items()},
        "seconds_to_encode": encoding,
        "seconds_to_decode": decoding,
        "each": by_key,
    }


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image [3, H, W] in [0, 1] at another size (bicubic, with antialiasing)."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def through_format(
    image: Tensor, name: str, options: Mapping[str, Any]
) -> tuple[int, Tensor, list[float]]:
    """Bytes of a file of an image [3, H, W], what it holds, seconds to write and to read it."""
    pixels = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    start = time.perf_counter()
    pixels.save(file := io.BytesIO(), name, **options)
    written = time.perf_counter()
    decoded = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
    seconds = [written - start, time.perf_counter() - written]
    return len(file.getvalue()), decoded.permute(2, 0, 1) / 255, seconds


def through_codes(image: Tensor, tokenizer: SpectralTokenizer) -> tuple[int, Tensor, list[float]]:
    """The same of a .sit file."""
    start = time.perf_counter()
    file = codec.compress(tokenizer, encode_image(tokenizer, image[None]))
    written = time.perf_counter()
    decoded = decode_codes(tokenizer, codec.decompress(tokenizer, file)[0])[0]
    return len(file), decoded, [written - start, time.perf_counter() - written]


def best(points: Sequence[Mapping[str, Any]], measure: str) -> list[Mapping[str, Any]]:
    """Points by bits, without those that no more bits of the same format surpass."""
    sign, found = 1 if MEASURES[measure] else -1, []
    for point in sorted(points, key=lambda point: point["bits_per_pixel"]):
        if not found or sign * (point[measure] - found[-1][measure]) > 0:
            found.append(point)
    return found


def bd_rate(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], measure: str
) -> float | None:
    """Mean difference in bits (%) at equal quality, below 0 if ours need fewer; None: none is equal.

    Bjøntegaard's (VCEG-M33) over the qualities that both reach, with straight lines between the
    logarithms of bits of the `best` points.
    """
    sign = 1 if MEASURES[measure] else -1
    lines = []
    for points in (best(ours, measure), best(theirs, measure)):
        pairs = [(np.log(point["bits_per_pixel"]), sign * point[measure]) for point in points]
        lines.append(np.array(pairs).T)
    low, high = max(line[1, 0] for line in lines), min(line[1, -1] for line in lines)
    if low >= high:
        return None
    x = np.unique(np.r_[low, high, *(line[1] for line in lines)].clip(low, high))
    first, second = (np.trapezoid(np.interp(x, *line[::-1]), x) / (high - low) for line in lines)
    return 100 * float(np.expm1(first - second))


def at_bits(points: Sequence[Mapping[str, Any]], bits: float, measure: str) -> float | None:
    """What the `best` points reach at so many bits per pixel, on straight lines between them over
    the logarithm of bits; None outside.
    """
    points = best(points, measure)
    x = [np.log(point["bits_per_pixel"]) for point in points]
    if not x[0] <= np.log(bits) <= x[-1]:
        return None
    return float(np.interp(np.log(bits), x, [point[measure] for point in points]))


def bootstrapped(
    statistic: Callable[..., float | None], *curves: Sequence[Mapping[str, Any]]
) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of curves over photographs, the same for all curves.

    Raises ValueError for a statistic that no drawing has.
    """
    count, rng, found = len(curves[0][0]["each"]["bits_per_pixel"]), np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(count, size=count)
        means = (
            [{k: float(np.mean(np.take(x, drawn))) for k, x in p["each"].items()} for p in points]
            for points in curves
        )
        found.append(statistic(*means))
    known = [value for value in found if value is not None]
    if not known:
        raise ValueError("the curves have no quality or bits in common.")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
