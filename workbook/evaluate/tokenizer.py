"""Evaluation of a tokenizer on held-out images, at every size that it takes, and beside JPEG.

All tokenizers are judged on the same views of every set in the profile's
`tokenizer.evaluation.sets`. Smaller images are the views averaged over squares of pixels, as the
Haar transform does it.
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

from sitlib import evaluate, metrics
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.strict import digest
from workbook.evaluate import stored_scores
from workbook.profile import Profile
from workbook.runs import TokenizerRun
from workbook.tokenizers import held_out_set, trained_tokenizer

SMALLEST_SIZE = 4  # px; for the tokenizer without scales: the coarsest scale of SIT-5
VIEWS = {
    "crops": "random crops of {} held-out photographs",
    "wide": "wide views of {} held-out images",
}


def evaluate_tokenizer(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> dict[str, Any]:
    """Train or load a tokenizer of the profile and measure it on every evaluation set and size.

    But for the `pipeline` itself, its scores of this very run do. A tokenizer of other images than
    the profile's is judged at its full size only, and "the first set" is that of its own images.
    The scores of this set at full size stand at the top level, too, with `usage` of the codebook
    that uses the smallest share (%).
    """
    settings, source = profile.tokenizer.evaluation, profile.tokenizer_data(variant).folder
    # A digest knows no order, and the first set has a role of its own.
    run = digest(TokenizerRun.of(profile, variant, seed), settings, list(settings.sets))
    path = f"metrics/tokenizer/{variant}-seed{seed}.json"
    if not pipeline and (stored := stored_scores(path, run)):
        return stored
    metrics.fetch_weights()
    tokenizer = trained_tokenizer(profile, variant, seed).model.to(best_device())
    config, sizes, (first_set, *_) = tokenizer.config, evaluated_sizes(tokenizer), settings.sets
    if source != profile.data.folder:
        sizes = sizes[:1]
        own = (name for name, image_set in settings.sets.items() if image_set.source == source)
        first_set = next(own, first_set)
    inception = metrics.InceptionMetrics() if settings.inception else None
    first: dict[str, Any] = {}
    sets: dict[str, dict[str, Any]] = {}
    for name, image_set in settings.sets.items():
        sets[name] = {}
        for size in sizes:
            parts = (
                held_out_set(profile, name, config.size, evaluate.PART, start)
                for start in range(0, image_set.views, evaluate.PART)
            )
            options = {"inception": inception, "title": f"{name}, {size} px"}
            scores, values = evaluate.reconstruction_scores(
                tokenizer, parts, size, seed=settings.seed, **options
            )
            sets[name][str(size)] = scores
            scores["protocol"] |= {
                "views": VIEWS[image_set.kind].format(len(scores["photographs"])),
                "source": image_set.source,
                "seed": settings.seed,
            }
            if name == first_set and size == sizes[0]:
                by_photograph = ("photographs", "counts", "by_photograph")
                first = {key: scores[key] for key in scores if key not in by_photograph}
                first["error_by_scale"] = values["errors"].mean(dim=0).tolist()
                counts = metrics.code_counts(values["codes"], max(config.codebook_sizes))
                first |= metrics.codebook_statistics(counts, len(values["codes"]), config)
                first["usage"] = min(book["usage"] for book in first["codebooks"].values())
    parameters = sum(p.numel() for p in tokenizer.parameters())
    return {"run": run, **first, "parameters": parameters, "sets": sets}


def evaluated_sizes(tokenizer: SpectralTokenizer) -> list[int]:
    """Sides in px at which a tokenizer is judged, the full size first.

    Smaller ones need a scale-causal encoder and decoder. The baseline without scales is judged at
    all halves down to 4 px, through enlarged images: see `reconstruct`.
    """
    full, config = tokenizer.sizes[-1], tokenizer.config
    if config.levels == 0:
        halves = (full >> k for k in range(full.bit_length()))
        return [size for size in halves if size >= SMALLEST_SIZE and full % size == 0]
    return tokenizer.sizes[::-1] if config.decoder_attention == "scale_causal" else [full]


# -- bits beside quality -----------------------------------------------------------------------
#
# A code takes log2 K bits. Of a file only coded data count, without headers and tables, which
# favors the files: at this size headers would take more than everything else.

RATE_VIEWS = 500  # at most: all of them are in memory, in several forms
File = tuple[bytes, int]  # its content, and how many bytes of it are coded data


def encode_jpeg(quality: int, image: Image.Image) -> File:
    """A JPEG file."""
    image.save(file := io.BytesIO(), format="JPEG", quality=quality, optimize=True)
    data = file.getvalue()
    start = data.index(b"\xff\xda")  # start of scan: a header of its own, then the coded data
    start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data, len(data) - 2 - start  # the last two bytes end the image


def encode_jpeg2000(rate: int, image: Image.Image) -> File:
    """A JPEG 2000 codestream of 1 / rate of the bytes that the pixels have."""
    rates = {"quality_mode": "rates", "quality_layers": [rate]}
    image.save(file := io.BytesIO(), "JPEG2000", irreversible=True, no_jp2=True, **rates)
    data = file.getvalue()
    return data, len(data) - 2 - (data.index(b"\xff\x93") + 2)  # from start of data to end


JPEG_QUALITIES = (1, 5, 10, 20, 35, 50, 70)
JPEG2000_RATES = (100, 40, 28, 20, 12, 6)  # times fewer bytes than the pixels have
# Curve -> encoder, its settings, how many times smaller images are made first.
CURVES = {
    "jpeg": (encode_jpeg, JPEG_QUALITIES, 1),
    "jpeg2000": (encode_jpeg2000, JPEG2000_RATES, 1),
    "jpeg_half": (encode_jpeg, JPEG_QUALITIES, 2),
}
# Kind of file -> encoder, all of its settings, from few bits to many.
MATCHED = {"jpeg": (encode_jpeg, range(1, 96)), "jpeg2000": (encode_jpeg2000, range(200, 1, -1))}


def rate_distortion(profile: Profile, tokenizers: list[str], seed: int) -> dict[str, Any]:
    """PSNR and LPIPS-Alex at the bits of tokenizers and files, on the first evaluation set.

    `matched` are files that are each the largest with at most as many bits as the codes.
    """
    images, keys = held_out_set(profile, count=RATE_VIEWS)
    full = images.shape[-1]

    def point(setting: str, bits: float, decoded: Tensor, **more: float) -> dict[str, Any]:
        if decoded.shape[-1] != full:
            decoded = F.interpolate(decoded, (full, full), mode="bicubic").clamp(0, 1)
        names = ["psnr", "lpips_alex"]
        scores = metrics.evaluate_reconstructions(images, decoded, keys, metrics=names)
        about = {"setting": setting, "bits_per_pixel": bits, **more}
        return about | {name: scores[name] for name in (*names, "intervals")}

    def files(setting: str, encode: Callable[..., File], factor: int = 1) -> dict[str, Any]:
        coded, decoded, whole = through_files(F.avg_pool2d(images, factor), encode)
        pixels = factor**2  # of the image, for one of the file
        return point(setting, coded / pixels, decoded, bits_per_pixel_of_file=whole / pixels)

    curves: dict[str, Any] = {}
    matched: dict[str, Any] = {}
    for name in tokenizers:
        tokenizer = trained_tokenizer(profile, name, seed).model.to(best_device())
        curves[name] = [
            point(f"{k} scale{'s' * (k > 1)}", bits, x)
            for k, bits, x in prefixes(tokenizer, images)
        ]
        budget = curves[name][-1]["bits_per_pixel"] * images[0, 0].numel()
        matched[name] = {
            kind: files("as many bits", partial(largest_within, budget, encode, settings))
            for kind, (encode, settings) in MATCHED.items()
        }
    for name, (encode, settings, factor) in CURVES.items():
        curves[name] = [files(str(x), partial(encode, x), factor) for x in settings]
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
    codes, reconstructions = evaluate.reconstruct(tokenizer, images)
    num_scales, config = codes.shape[1], tokenizer.config
    for k in range(num_scales if config.decoder_attention == "full" else 1, num_scales + 1):
        bits = config.bits(k) / config.size**2
        yield k, bits, reconstructions if k == num_scales else evaluate.decode(tokenizer, codes, k)


def largest_within(
    bits: float, encode: Callable[..., File], settings: Sequence[int], image: Image.Image
) -> File:
    """The file with the most coded data within `bits`, else the smallest one."""
    count = bisect_right(settings, bits, key=lambda setting: 8 * encode(setting, image)[1])
    return encode(settings[max(0, count - 1)], image)


def through_files(images: Tensor, encode: Callable[..., File]) -> tuple[float, Tensor, float]:
    """Bits per pixel of coded data, images [V, 3, H, W] read back, bits of whole files."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    encoded = [encode(Image.fromarray(image)) for image in pixels]
    opened = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in encoded]
    decoded = torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2).float() / 255
    bits = 8 / images[:, 0].numel()
    return bits * sum(n for _, n in encoded), decoded, bits * sum(len(data) for data, _ in encoded)
