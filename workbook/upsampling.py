"""Measuring upsampling: details drawn for small images, beside ways to enlarge them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sitlib.metrics import (
    bootstrap_interval,
    generation_metrics,
    lite0_features,
    lpips_per_image,
    paired_interval,
    psnr_per_image,
    reconstruction_values,
)
from sitlib.metrics.networks import Lite0, load_lite0
from sitlib.model.config import SamplingConfig
from sitlib.model.precision import best_device
from sitlib.sample.applications import upsample
from sitlib.sample.generate import Prompts
from workbook.application_tasks import Task
from workbook.evaluate import reconstruct
from workbook.profile import Profile

SHARES = (8, 4, 2)  # of the full side, that inputs of upsampling have


def enlarged(images: Tensor, size: int, way: str) -> Tensor:
    """Images [B, 3, h, h] in [0, 1] enlarged to `size` px, clamped: "bicubic" by torch, "lanczos" by Pillow (in float)."""
    if way == "bicubic":
        return F.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)
    if way != "lanczos":
        raise ValueError(f"there is no way to enlarge {way!r}: choose 'bicubic' or 'lanczos'.")

    def channel(values: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.LANCZOS))

    found = np.stack([channel(values) for values in images.flatten(0, 1).numpy()])
    return torch.from_numpy(found).unflatten(0, images.shape[:2]).clamp(0, 1)


def upsampling(profile: Profile, tasks: list[Task]) -> dict[str, Any]:
    """Held-out images at 1/8, 1/4 and 1/2 of the size, enlarged in several ways.

    Returns:
        variant -> share as text -> `_ways`; and `several`: of repeated samples at 1/8.
    """
    lite0, found = load_lite0().to(best_device()), {}
    for task in tasks:
        originals = lite0_features(task.images, lite0, title=f"{task.variant}, originals")
        found[task.variant] = {
            str(share): _ways(task, share, originals, lite0, profile) for share in SHARES
        } | {"several": _several(task, profile)}
    return found


def _ways(
    task: Task, share: int, originals: Tensor, lite0: Lite0, profile: Profile
) -> dict[str, Any]:
    """Scores of every way of upsampling from 1 / share of the size.

    Ways are "bicubic", "lanczos", "untold" (the model is told nothing, so without guidance), at the largest factor "told, no guidance",
    "told, temperature T" with the guidance of the sampler, and "reconstruction": the original through the tokenizer, which bounds them.

    Returns:
        way -> `lpips_alex`, `psnr` (dB) to the original, their `intervals`, `lpips_ratio` to bicubic and to untold (`untold_ratio`, of what
        is told) with intervals, `fd_lite0` and `kid` to the originals, `consistency`: PSNR, dB, of the result averaged down to the input.
    """
    settings, full = profile.applications, task.images.shape[-1]
    small = F.avg_pool2d(task.images, share)

    def drawn(told: Prompts | None, sampling: SamplingConfig) -> Tensor:
        return upsample(task.model, task.tokenizer, small, told, sampling).images

    ways = {way: enlarged(small, full, way) for way in ("bicubic", "lanczos")}
    ways["untold"] = drawn(None, replace(task.sampling, temperature=1.0))
    is_largest = share == SHARES[0]
    if task.prompts is not None:
        if is_largest:
            unguided = replace(task.sampling, temperature=1.0, guidance=1.0)
            ways["told, no guidance"] = drawn(task.prompts, unguided)
        for temperature in sorted({*settings.temperatures, 1.0}) if is_largest else (1.0,):
            sampling = replace(task.sampling, temperature=temperature)
            ways[f"told, temperature {temperature:g}"] = drawn(task.prompts, sampling)
    ways["reconstruction"] = reconstruct(task.tokenizer, task.images)[1]
    scores, lpips = {}, {}
    for way, images in ways.items():
        title = f"{task.variant}, 1/{share}, {way}"
        values = reconstruction_values(
            task.images, images, metrics=["psnr", "lpips_alex"], title=title
        )
        lpips[way] = values["lpips_alex"]
        scores[way] = {
            **{name: float(values[name].mean()) for name in ("psnr", "lpips_alex")},
            "intervals": {
                name: list(bootstrap_interval(values[name], task.keys))
                for name in ("psnr", "lpips_alex")
            },
            **_ratio("lpips_ratio", lpips[way], lpips["bicubic"], task),
            **(
                _ratio("untold_ratio", lpips[way], lpips["untold"], task)
                if way.startswith("told")
                else {}
            ),
            **_distances(images, originals, lite0, profile, title),
            "consistency": float(psnr_per_image(F.avg_pool2d(images, share), small).mean()),
        }
    return scores


def _ratio(name: str, values: Tensor, others: Tensor, task: Task) -> dict[str, Any]:
    interval = paired_interval(values, others, task.keys, kind="ratio")
    return {name: float(values.mean() / others.mean()), f"{name}_interval": list(interval)}


def _distances(
    images: Tensor, originals: Tensor, lite0: Lite0, profile: Profile, title: str
) -> dict[str, float]:
    settings = profile.applications
    found = generation_metrics(
        images,
        originals,
        lite0=lite0,
        kid_subset_size=settings.kid_subset_size,
        seed=settings.seed,
        title=title,
    )
    return {name: found[name] for name in ("fd_lite0", "kid")}


def _several(task: Task, profile: Profile) -> dict[str, float]:
    """Several samples from one input at 1/8: how far apart they are, and what choosing the best would give, in LPIPS-Alex."""
    settings, share = profile.applications, SHARES[0]
    images = task.images[: settings.repeated]
    assert task.prompts is not None
    told = task.prompts[: settings.repeated]
    small = F.avg_pool2d(images, share)
    seeds = range(settings.seed, settings.seed + settings.samples)
    drawn = [
        upsample(task.model, task.tokenizer, small, told, replace(task.sampling, seed=seed)).images
        for seed in seeds
    ]
    to_original = torch.stack([lpips_per_image(found, images) for found in drawn])
    between = [lpips_per_image(a, b).mean() for i, a in enumerate(drawn) for b in drawn[:i]]
    return {
        "images": len(images),
        "samples": len(drawn),
        "between_samples": float(torch.stack(between).mean()),
        "mean": float(to_original.mean()),
        "best": float(to_original.min(dim=0).values.mean()),
    }


def foreign_upsampling(profile: Profile, task: Task) -> dict[str, Any]:
    """The extra photographs from 1/8 of the size: bicubic, Lanczos, and the class-conditional model that is told nothing."""
    lite0 = load_lite0().to(best_device())
    originals = lite0_features(task.images, lite0, title="extra, originals")
    subset = min(profile.applications.kid_subset_size, len(task.images) // 2)
    chosen = replace(profile, applications=replace(profile.applications, kid_subset_size=subset))
    ways = _ways(task, SHARES[0], originals, lite0, chosen)
    return {"images": len(task.images), "photographs": len(set(task.keys)), "ways": ways}
