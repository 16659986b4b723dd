"""Evaluation of sets of images, shared by tokenizers, class- and text-conditional generators.

Images are [V, 3, H, W] in [0, 1], codes [V, S, N], features those of EfficientNet-Lite0, [V, 1280].
Results are dictionaries for JSON.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sitlib.files import read_json, read_metadata, write_tensors
from sitlib.metrics import (
    GENERATION_METRICS,
    InceptionMetrics,
    generation_metrics,
    in_batches,
    lite0_features,
)
from sitlib.metrics.networks import Lite0
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.paths import resolve
from workbook.profile import Profile

PART = 512  # images in memory at a time
BATCH = 64  # images or code maps that a model takes at a time


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


def features_of_codes(
    tokenizer: SpectralTokenizer, codes: Tensor, lite0: Lite0, title: str = "samples"
) -> Tensor:
    """Lite0 features of the images of codes, `PART` images at a time."""
    parts = (decode(tokenizer, part) for part in codes.split(PART))
    return torch.cat([lite0_features(images, lite0, title=title) for images in parts])


@dataclass
class Distances:
    """Measure sets of images, or their features, against one set of real images."""

    references: Tensor  # features
    lite0: Lite0
    kid_subset_size: int
    seed: int
    neighbors: int | None = None

    def __call__(self, images: Tensor, title: str = "") -> dict[str, Any]:
        """Every metric of `GENERATION_METRICS`, and their `protocol`."""
        return generation_metrics(
            images,
            self.references,
            lite0=self.lite0,
            kid_subset_size=self.kid_subset_size,
            neighbors=self.neighbors,
            seed=self.seed,
            title=title,
        )


def distances_only(scores: dict[str, Any]) -> dict[str, float]:
    """The distances among scores, without what belongs to them."""
    return {name: scores[name] for name in GENERATION_METRICS if name in scores}


def inception_scores(
    profile: Profile, images: Iterable[Tensor], originals: Iterable[Tensor], seed: int
) -> dict[str, float]:
    """FID and Inception scores of images against originals, both in parts.

    Nothing unless the profile asks for them (`tokenizer.evaluation.inception`).
    """
    if not profile.tokenizer.evaluation.inception:
        return {}
    inception = InceptionMetrics()
    for part in images:
        inception.add(part, real=False, title="samples")
    for part in originals:
        inception.add(part, real=True, title="originals")
    return inception.compute(seed=seed)


def held_out_nats(model: AutoregressiveModel, codes: Tensor, conditions: Tensor) -> dict[str, Any]:
    """Nats per token of held-out codes given their conditions: the mean, and that of each scale."""
    device = next(model.parameters()).device
    batches = zip(codes.to(device).split(BATCH), conditions.to(device).split(BATCH), strict=True)
    with torch.no_grad():
        total = sum(model.nats_per_token(*batch) * len(batch[0]) for batch in batches)
    by_scale = cast(Tensor, total) / len(codes)
    return {"nats_per_token": float(by_scale.mean()), "nats_by_scale": by_scale.tolist()}


def sweeps(
    sampling: SamplingConfig, settings: Any, scores: Callable[[SamplingConfig], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """Scores of samples that are drawn with another guidance, and with another top-p.

    Args:
        settings: evaluation settings with the values `guidance_sweep` and `top_p_sweep`.
    """

    def rows(name: str, values: list[float]) -> list[dict[str, float]]:
        changed = [{name: value} for value in values]
        return [{**row, **scores(replace(sampling, **cast(Any, row)))} for row in changed]

    return {
        f"{name}_sweep": rows(name, getattr(settings, f"{name}_sweep"))
        for name in ("guidance", "top_p")
    }


def sampling_protocol(sampling: SamplingConfig) -> dict[str, Any]:
    """Settings of the sampler, for a protocol."""
    names = ("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_growth", "seed")
    return {name: getattr(sampling, name) for name in names}


# -- results of the pipeline -------------------------------------------------------------------


def stored_scores(path: str | Path, run: str) -> dict[str, Any] | None:
    """Scores in a file of the pipeline, None unless they are of this run."""
    file = resolve(path)
    scores = read_json(file) if file.exists() else {}
    return scores if scores.get("run") == run else None


def samples_of(
    name: str, run: str, draw: Callable[[], dict[str, Tensor]], save: bool = False
) -> dict[str, Tensor]:
    """Tensors in `samples/<name>.safetensors` of this run; else drawn, and kept if `save`."""
    path = resolve(f"samples/{name}.safetensors")
    if read_metadata(path).get("run") == run:
        return load_file(path)
    samples = draw()
    if save:
        write_tensors(path, samples, {"run": run})
    return samples
