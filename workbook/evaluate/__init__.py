"""Evaluation of sets of images, shared by tokenizers, class- and text-conditional generators.

Images are [V, 3, H, W] in [0, 1], codes [V, S, N], features those of EfficientNet-Lite0, [V, 1280].
Results are dictionaries for JSON.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.files import read_json
from sitlib.metrics import (
    GENERATION_METRICS,
    InceptionMetrics,
    generation_metrics,
    in_batches,
    lite0_features,
)
from sitlib.metrics.networks import Lite0
from sitlib.model.generator import AutoregressiveModel
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
            lite0_features(images, self.lite0, title=title) if images.ndim == 4 else images,
            self.references,
            kid_subset_size=self.kid_subset_size,
            neighbors=self.neighbors,
            seed=self.seed,
        )

    def of_parts(self, parts: Iterable[Tensor], title: str = "") -> dict[str, Any]:
        """The same of a set of images that comes in parts."""
        return self(torch.cat([lite0_features(x, self.lite0, title=title) for x in parts]))


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
    for parts, real, title in ((images, False, "samples"), (originals, True, "originals")):
        for part in parts:
            inception.add(part, real=real, title=title)
    return inception.compute(seed=seed)


def held_out_nats(model: AutoregressiveModel, codes: Tensor, conditions: Tensor) -> dict[str, Any]:
    """Nats per token of held-out codes given their conditions: the mean, and that of each scale."""
    device = next(model.parameters()).device
    batches = zip(codes.to(device).split(BATCH), conditions.to(device).split(BATCH), strict=True)
    with torch.no_grad():
        total = sum(model.nats_per_token(*batch) * len(batch[0]) for batch in batches)
    by_scale = cast(Tensor, total) / len(codes)
    return {"nats_per_token": float(by_scale.mean()), "nats_by_scale": by_scale.tolist()}


def stored_scores(path: str | Path, run: str) -> dict[str, Any] | None:
    """Scores in a file of the pipeline, None unless they are of this run."""
    file = resolve(path)
    scores = read_json(file) if file.exists() else {}
    return scores if scores.get("run") == run else None
