"""Judging tokenizers and generators on images that training never saw, and saying how it was done.

Images are [V, 3, H, W] in [0, 1], codes [V, S, N], features those of EfficientNet-Lite0, [V, 1280].
Results are dictionaries for JSON. `sit evaluate` and the workbook's tables are of this code.
"""

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib import metrics
from sitlib.data import ImageSource, held_out_views
from sitlib.metrics import in_batches, lite0_features
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2, orthonormal_gains
from sitlib.strict import require

PART = 512  # images in memory at a time
BATCH = 64  # images or code maps that a model takes at a time
ERROR_LEVELS = 3  # scales of the error budget: those of SIT-4, for every model
Views = tuple[Tensor, Sequence[Hashable]]  # images, and what they are views of


def encode(tokenizer: SpectralTokenizer, images: Tensor) -> Tensor:
    """Codes of images, on the CPU."""
    return in_batches(tokenizer.encode, images, size=BATCH)


def decode(tokenizer: SpectralTokenizer, codes: Tensor, scales: int | None = None) -> Tensor:
    """Images of codes, on the CPU; with `scales` those of the first so many scales."""
    return in_batches(lambda batch: tokenizer.decode(batch, scales), codes, size=BATCH)


def reconstruct(tokenizer: SpectralTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions of images [V, 3, H, H].

    A tokenizer that does not take H px gets images as the paper gives them to its baseline:
    enlarged to its full size (bicubic, clamped), and its reconstruction averaged down again.
    """
    size, full = images.shape[-1], tokenizer.sizes[-1]
    if size not in tokenizer.sizes:
        large = F.interpolate(images, (full, full), mode="bicubic").clamp(0, 1)
        codes, reconstructions = reconstruct(tokenizer, large)
        return codes, F.avg_pool2d(reconstructions, full // size)
    codes = encode(tokenizer, images)
    return codes, decode(tokenizer, codes)


def features_of(parts: Iterable[Tensor], title: str = "", **options: Any) -> Tensor:
    """Features of images that come in parts, on the CPU; options of `lite0_features`."""
    return torch.cat([lite0_features(images, title=title, **options) for images in parts])


def features_of_codes(
    tokenizer: SpectralTokenizer, codes: Tensor, title: str = "", **options: Any
) -> Tensor:
    """Features [M, 1280] of the images of codes [M, S, N]; options of `lite0_features`."""
    return features_of((decode(tokenizer, part) for part in codes.split(PART)), title, **options)


# -- tokenizers --------------------------------------------------------------------------------


def reconstruction_scores(
    tokenizer: SpectralTokenizer,
    parts: Iterable[Views],
    size: int | None = None,
    *,
    seed: int = 0,
    inception: metrics.InceptionMetrics | None = None,
    title: str = "",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores of reconstructions of views of the full size, averaged down to `size` px (default: as
    they are); and values [V, ...] of every view: `codes`, at the full size `errors` by scale.

    At the full size there are all metrics, and `border` beside `border_originals`: differences of
    pixels across borders of tokens over those inside. `seed` draws the subsets of KID.
    """
    config, full = tokenizer.config, tokenizer.sizes[-1]
    size = full if size is None else size
    require(full % size == 0, f"size must divide {full} px, the tokenizer's: it is {size}.")
    keys: list[Hashable] = []
    gathered: list[dict[str, Tensor]] = []
    for views, of_part in parts:
        keys += of_part
        images = F.avg_pool2d(views, full // size)
        codes, reconstructions = reconstruct(tokenizer, images)
        names = list(metrics.METRICS) if size == full else metrics.fast_metrics()
        values = metrics.reconstruction_values(images, reconstructions, metrics=names, title=title)
        values["codes"] = codes
        for name, x in {"features": reconstructions, "originals": images}.items():
            values[name] = lite0_features(x, title=f"{title}, {name}" if title else "")
        if size == full:
            values["errors"] = error_by_scale(images, reconstructions)
            for name, x in {"border": reconstructions, "border_originals": images}.items():
                values[name] = metrics.border_differences(x, full // config.grid_size)
        if inception is not None:
            inception.add(reconstructions, real=False, title=title)
            inception.add(images, real=True, title=title)
        gathered.append(values)
    values = {key: torch.cat([part[key] for part in gathered]) for key in gathered[0]}
    by_metric = {metric: values[metric] for metric in metrics.METRICS if metric in values}
    scores = metrics.summarize_reconstructions(by_metric, keys, (size, size))
    scores |= {
        name: float(across / inside)
        for name in ("border", "border_originals")
        if name in values
        for across, inside in [values[name].mean(0)]
    }
    features, originals = values["features"], values["originals"]
    subset = min(100, max(2, len(keys) // 2))  # of KID; larger subsets would be nearly the same
    distances = metrics.generation_metrics(features, originals, kid_subset_size=subset, seed=seed)
    protocol = scores["protocol"] | distances["protocol"]
    del protocol["samples"], protocol["reference_images"]  # both are `images`
    if size not in tokenizer.sizes:
        way = "(bicubic, clamped), reconstructed, averaged down"
        protocol["size_change"] = f"enlarged to {full} px {way}"
    scores |= distances | {
        "lite0_score": metrics.lite0_score(features),
        "lite0_score_originals": metrics.lite0_score(originals),
        "bits_per_pixel": config.bits(values["codes"].shape[1]) / size**2,
        "protocol": protocol,
    }
    return scores | (inception.compute(seed=seed) if inception is not None else {}), values


def error_by_scale(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error [V, 4] in [-1, 1] of each scale of an orthonormal Haar transform.

    The coarsest comes first, and the sum is the whole error. Empty [V, 0] where 8 does not divide
    the side of the images.
    """
    if images.shape[-1] % 2**ERROR_LEVELS:
        return images.new_zeros(len(images), 0).double()
    scales = dwt2(2 * (images - reconstructions), "haar", ERROR_LEVELS)  # of [0, 1] to [-1, 1]
    pairs = zip(scales, orthonormal_gains(ERROR_LEVELS), strict=True)
    sums = [(x * gain).square().flatten(1).sum(1) for x, gain in pairs]
    return torch.stack(sums, dim=1).double() / images[0].numel()


# -- generators --------------------------------------------------------------------------------


def held_out_nats(model: AutoregressiveModel, codes: Tensor, conditions: Tensor) -> dict[str, Any]:
    """Nats of held-out codes given their conditions: of a token (also by scale), and an image."""
    device = next(model.parameters()).device
    batches = zip(codes.to(device).split(BATCH), conditions.to(device).split(BATCH), strict=True)
    with torch.no_grad():
        total = sum(model.nats_per_token(*batch) * len(batch[0]) for batch in batches)
    by_scale = cast(Tensor, total) / len(codes)
    nats = {"nats_per_token": float(by_scale.mean()), "nats_by_scale": by_scale.tolist()}
    return nats | {"nats_per_image": nats["nats_per_token"] * codes[0].numel()}


def sample_scores(features: Tensor, real: Tensor, again: Tensor, **options: Any) -> dict[str, Any]:
    """Distances of samples to `real` images, and to these after the tokenizer, `again`.

    Both are features; options are those of `generation_metrics`. `to_reconstructions` is what the
    generator adds. `reconstruction` has the distances of these to the real images, which a model
    would have that knew the right codes (not a bound: without details an image can be nearer).
    """
    return {
        **metrics.generation_metrics(features, real, **options),
        "to_reconstructions": metrics.generation_metrics(features, again, **options),
        "reconstruction": metrics.generation_metrics(again, real, **options),
    }


# -- manifests ---------------------------------------------------------------------------------


def view_parts(source: ImageSource, count: int, size: int, seed: int, kind: str) -> Iterator[Views]:
    """Held-out views and the keys of their photographs, `PART` at a time; for `kind` and `seed` see
    `held_out_views`."""
    for start in range(0, count, PART):
        some = min(PART, count - start)
        views, _, keys = held_out_views(source, some, size, seed, kind=kind, first=start)
        yield views, keys


def hashed(parts: Iterable[Views], digest: "hashlib._Hash") -> Iterator[Views]:
    """The same parts, whose pixels go into the digest on their way: it names what was judged."""
    for views, keys in parts:
        digest.update((views * 255).round().byte().numpy().tobytes())
        yield views, keys


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {name: version(name) for name in ("sitlib", "torch", "torchvision", "pillow")}
