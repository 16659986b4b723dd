"""Evaluation of sets of images, shared by tokenizers, class- and text-conditional generators.

Images are [V, 3, H, W] in [0, 1], codes [V, S, N], features those of EfficientNet-Lite0, [V, 1280].
Results are dictionaries for JSON.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.files import read_json
from sitlib.metrics import in_batches, lite0_features
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.paths import resolve

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


def features_of(parts: Iterable[Tensor], title: str = "", **options: Any) -> Tensor:
    """Features of images that come in parts, on the CPU; options of `lite0_features`."""
    return torch.cat([lite0_features(images, title=title, **options) for images in parts])


def held_out_nats(model: AutoregressiveModel, codes: Tensor, conditions: Tensor) -> dict[str, Any]:
    """Nats of held-out codes given their conditions: of a token (also by scale), and an image."""
    device = next(model.parameters()).device
    batches = zip(codes.to(device).split(BATCH), conditions.to(device).split(BATCH), strict=True)
    with torch.no_grad():
        total = sum(model.nats_per_token(*batch) * len(batch[0]) for batch in batches)
    by_scale = cast(Tensor, total) / len(codes)
    nats = {"nats_per_token": float(by_scale.mean()), "nats_by_scale": by_scale.tolist()}
    return nats | {"nats_per_image": nats["nats_per_token"] * codes[0].numel()}


def stored_scores(path: str, run: str) -> dict[str, Any] | None:
    """Scores in a file of the pipeline, None unless they are of this run."""
    scores = read_json(resolve(path)) if resolve(path).exists() else {}
    return scores if scores.get("run") == run else None
