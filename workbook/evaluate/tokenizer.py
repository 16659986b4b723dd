"""Evaluation of a tokenizer on held-out images, at every size that it takes.

All tokenizers are judged on the same views of every set in the profile's
`tokenizer.evaluation.sets`. Smaller images are the views averaged over squares of pixels, as the
Haar transform does it.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sitlib import metrics
from sitlib.files import atomic_write
from sitlib.metrics import networks
from sitlib.metrics.networks import Lite0
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2, orthonormal_gains
from sitlib.strict import digest
from sitlib.train.config import DataConfig
from workbook import evaluate
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.sections import EvaluationSet
from workbook.tokenizers import held_out_set, trained_tokenizer
from workbook.train_or_load import TokenizerRun

ERROR_LEVELS = 3  # scales of the error budget: those of SIT-4, for every model
SMALLEST_SIZE = 4  # px; for the tokenizer without scales: the coarsest scale of SIT-5
FEATURES = "build/features"  # of originals, which are the same for every tokenizer
BY_PHOTOGRAPH = ("photographs", "counts", "by_photograph")
VIEWS = {
    "crops": "random crops of {} held-out photographs",
    "wide": "wide views of {} held-out images",
}


def evaluate_tokenizer(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """Train or load a tokenizer of the profile and measure it.

    Returns:
        `run`, and what `measure_tokenizer` returns.
    """
    metrics.fetch_weights()
    tokenizer = trained_tokenizer(profile, variant, seed).model.to(best_device())
    scores = measure_tokenizer(tokenizer, profile, profile.tokenizer_data(variant))
    return {"run": _run(profile, variant, seed), **scores}


def tokenizer_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, else scores that are measured now."""
    path = f"metrics/tokenizer/{variant}-seed{seed}.json"
    stored = evaluate.stored_scores(path, _run(profile, variant, seed))
    return stored or evaluate_tokenizer(profile, variant, seed)


def _run(profile: Profile, variant: str, seed: int) -> str:
    settings = profile.tokenizer.evaluation
    # A digest knows no order, and the first set has a role of its own.
    return digest(TokenizerRun.of(profile, variant, seed), settings, list(settings.sets))


def evaluated_sizes(tokenizer: SpectralTokenizer) -> list[int]:
    """Sides in px at which a tokenizer is judged, the full size first.

    Smaller ones need a scale-causal encoder and decoder. The baseline without scales is judged at
    all halves down to 4 px, through enlarged images: see `reconstruct`.
    """
    sizes, config = tokenizer.sizes[::-1], tokenizer.config
    if config.levels == 0:
        halves = (sizes[0] >> k for k in range(sizes[0].bit_length()))
        return [size for size in halves if size >= SMALLEST_SIZE and sizes[0] % size == 0]
    return sizes if config.decoder_attention == "scale_causal" else sizes[:1]


def error_by_scale(images: Tensor, reconstructions: Tensor) -> list[float]:
    """Mean squared error in [-1, 1] of each scale of a Haar transform, coarsest first.

    The gains make the transform orthonormal, so that the sum is the whole error.
    """
    difference = 2 * (images - reconstructions)  # of [0, 1] to [-1, 1]
    scales = zip(
        orthonormal_gains(ERROR_LEVELS), dwt2(difference, "haar", ERROR_LEVELS), strict=True
    )
    return [float((gain * x).square().sum() / images.numel()) for gain, x in scales]


def measure_tokenizer(
    tokenizer: SpectralTokenizer, profile: Profile, data: DataConfig | None = None
) -> dict[str, Any]:
    """Reconstruction metrics and distances on every evaluation set and size, and codebook use.

    Args:
        data: what it was trained on. Default: the profile's `data`. A tokenizer of other images is
            judged at its full size only, and "the first set" is that of its own images.

    Returns:
        `sets`: name -> side in px as text -> what `summarize_reconstructions` returns (LPIPS-VGG at
        full size only); distances to the originals; `lite0_score`, `lite0_score_originals`;
        `bits_per_pixel`; with `evaluation.inception` at full size also FID and Inception scores;
        `protocol`. At the top level the same of the first set at full size, without values by
        photograph, and of this set `error_by_scale`, what `codebook_statistics` returns, and
        `usage` of the codebook that uses the smallest share (%); `parameters`.
    """
    settings, config = profile.tokenizer.evaluation, tokenizer.config
    # Fails here, before anything is measured, where it cannot be had.
    inception = metrics.InceptionMetrics() if settings.inception else None
    lite0 = metrics.load_lite0().to(best_device())
    sizes, first_set = evaluated_sizes(tokenizer), next(iter(settings.sets))
    if data is not None and data.source != profile.data.source:
        sizes = sizes[:1]
        own = [name for name, views in settings.sets.items() if views.source == data.source]
        first_set = (own or [first_set])[0]
    sets: dict[str, dict[str, Any]] = {}
    first: dict[str, Any] = {}
    for name, image_set in settings.sets.items():
        keys: list[str] = []
        parts: dict[int, list[dict[str, Tensor]]] = {size: [] for size in sizes}
        for start in range(0, image_set.views, evaluate.PART):
            views, keys_of_part = held_out_set(profile, name, config.size, evaluate.PART, start)
            keys += keys_of_part
            for size in sizes:
                images = F.avg_pool2d(views, config.size // size)
                codes, reconstructions = evaluate.reconstruct(tokenizer, images)
                title = f"{name}, {size} px, from view {start + 1}"
                measured = _measure(images, reconstructions, lite0, size == sizes[0], title)
                parts[size].append(measured | {"codes": codes})
                if inception is not None and size == sizes[0]:
                    inception.add(reconstructions, real=False, title=title)
                    inception.add(images, real=True, title=title)
        sets[name] = {}
        for size in sizes:
            measured = {
                key: torch.cat([part[key] for part in parts[size]]) for key in parts[size][0]
            }
            scores = _summarize(measured, keys, size, lite0, image_set, settings.seed)
            num_tokens = measured["codes"][0].numel()
            scores["bits_per_pixel"] = metrics.bits_per_pixel(num_tokens, config.num_codes, size)
            if size not in tokenizer.sizes:
                scores["protocol"]["size_change"] = (
                    f"enlarged to {config.size} px (bicubic, clamped), reconstructed, averaged down"
                )
            if inception is not None and size == sizes[0]:
                scores |= inception.compute(seed=settings.seed)
                inception.reset()
            sets[name][str(size)] = scores
            if name == first_set and size == sizes[0]:
                books = min(config.num_codebooks, config.num_scales)
                first = {key: scores[key] for key in scores if key not in BY_PHOTOGRAPH}
                first["error_by_scale"] = measured["errors"].mean(dim=0).tolist()
                first |= metrics.codebook_statistics(
                    measured["codes"], config.num_codes, num_codebooks=books
                )
                first["usage"] = min(book["usage"] for book in first["codebooks"].values())
    return {**first, "parameters": sum(p.numel() for p in tokenizer.parameters()), "sets": sets}


def _measure(
    images: Tensor, reconstructions: Tensor, lite0: Lite0, full_size: bool, title: str
) -> dict[str, Tensor]:
    """Values [V, ...] of every image: metrics, features, and those of originals, error by scale."""
    names = list(metrics.METRICS) if full_size else metrics.fast_metrics()
    values = metrics.reconstruction_values(images, reconstructions, metrics=names, title=title)
    values["features"] = metrics.lite0_features(reconstructions, lite0, title=title)
    values["originals"] = original_features(images, lite0, title=f"{title}, originals")
    if images.shape[-1] % 2**ERROR_LEVELS == 0:
        pairs = zip(images.split(1), reconstructions.split(1), strict=True)
        values["errors"] = torch.tensor([error_by_scale(*pair) for pair in pairs]).double()
    return values


def _summarize(
    measured: dict[str, Tensor],
    keys: list[str],
    size: int,
    lite0: Lite0,
    image_set: EvaluationSet,
    seed: int,
) -> dict[str, Any]:
    """Scores of an evaluation set at a size in px, from `_measure`."""
    features, originals = measured["features"], measured["originals"]
    values = {metric: measured[metric] for metric in metrics.METRICS if metric in measured}
    scores = metrics.summarize_reconstructions(values, keys, (size, size))
    subset = min(100, max(2, len(keys) // 2))  # of KID; larger subsets would be nearly the same
    distances = metrics.generation_metrics(features, originals, kid_subset_size=subset, seed=seed)
    protocol = {
        **scores["protocol"],
        **distances["protocol"],
        "views": VIEWS[image_set.kind].format(len(scores["photographs"])),
        "source": image_set.source,
        "seed": seed,
    }
    del protocol["samples"], protocol["reference_images"]  # both are `images`
    return {
        **scores,
        **distances,
        "lite0_score": metrics.classifier_score(lite0.logits(features)),
        "lite0_score_originals": metrics.classifier_score(lite0.logits(originals)),
        "protocol": protocol,
    }


def original_features(images: Tensor, lite0: Lite0, *, title: str = "") -> Tensor:
    """Lite0 features of originals, kept in `build/features` for the other tokenizers.

    The file is named by the pixels and the code of the network.
    """
    code = Path(networks.__file__).read_bytes()
    name = hashlib.sha256(code + images.numpy().tobytes() + str(images.shape).encode()).hexdigest()
    path = resolve(f"{FEATURES}/{name}.safetensors")
    with suppress(OSError, SafetensorError):  # missing or damaged: made again
        return load_file(path)["features"]
    features = metrics.lite0_features(images, lite0, title=title)
    with suppress(OSError), atomic_write(path, shared=True) as file:
        save_file({"features": features}, file)
    return features
