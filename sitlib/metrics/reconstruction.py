"""PSNR, SSIM and LPIPS of reconstructions. A new metric is one entry in METRICS."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from tqdm import tqdm

from sitlib.metrics.networks import cached_lpips
from sitlib.metrics.statistics import LEVEL, RESAMPLES, bootstrap_interval, group_means
from sitlib.strict import require

SSIM_WINDOW = 11  # px
LPIPS_SIZE = 64  # px; smaller images are enlarged to it


def check_images(*batches: Tensor, smallest: int = 1) -> None:
    """Raise `ValueError` unless these are RGB batches of one shape, `smallest` px, in [0, 1]."""
    shape = list(batches[0].shape)
    for images in batches:
        what = f"not {images.dtype} {list(images.shape)}."
        require(list(images.shape) == shape, f"The images differ in shape: {shape}, {what}")
        is_rgb = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
        require(is_rgb, f"images must be floating-point RGB [B, 3, H, W], {what}")
        is_large = len(images) > 0 and min(images.shape[2:]) >= smallest
        require(is_large, f"images need at least {smallest} px a side here, {what}")
        low, high = (float(x) for x in images.aminmax())  # NaN where there is one
        # An unclamped decoder overshoots by less than 0.5; images in [-1, 1] or [0, 255] do not.
        in_range = -0.5 <= low <= high <= 1.5
        require(in_range, f"images must lie in [0, 1], these span {low:.3g} ... {high:.3g}.")


def in_batches(
    function: Callable[..., Tensor], *inputs: Tensor, size: int, title: str = ""
) -> Tensor:
    """Concatenate, on the CPU, what `function` returns for batches of `size` rows of the inputs."""
    starts = range(0, len(inputs[0]), size)
    bar = tqdm(starts, title, unit="batch", mininterval=5.0, ncols=110, disable=not title)
    return torch.cat([function(*(x[i : i + size] for x in inputs)).cpu() for i in bar])


# -- metrics of images and references [B, 3, H, W], both clamped to [0, 1] ---------------------


def psnr_per_image(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB, peak 1; infinite for equal images."""
    check_images(images, references)
    return peak_signal_noise_ratio(
        images.clamp(0, 1), references.clamp(0, 1), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )


def ssim_per_image(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity [B], at most 1 (Wang et al. 2004); Gaussian window of 11x11 px.

    Images are mirrored at borders: only the windows inside would differ by some .02 at 16 px.
    """
    check_images(images, references, smallest=SSIM_WINDOW)
    similarity = structural_similarity_index_measure(
        images.clamp(0, 1), references.clamp(0, 1), sigma=1.5, data_range=1.0, reduction="none"
    )
    return cast(Tensor, similarity).reshape(len(images))


@torch.inference_mode()
def lpips_per_image(images: Tensor, references: Tensor, net: str = "alex") -> Tensor:
    """LPIPS [B] (arXiv 1801.03924), at least 0, on the CPU, by the trunk "alex" or "vgg"."""
    check_images(images, references)
    network = cached_lpips(net)
    device = next(network.parameters()).device
    pair = [x.to(device).clamp(0, 1) for x in (images, references)]
    if (scale := LPIPS_SIZE / min(images.shape[2:])) > 1:
        shape = [round(side * scale) for side in images.shape[2:]]
        pair = [F.interpolate(x, shape, mode="bicubic").clamp(0, 1) for x in pair]
    return network(*pair).cpu()


def border_differences(images: Tensor, side: int) -> Tensor:
    """Mean |difference| of neighboring pixels of [B, 3, H, W]: across borders, inside -> [B, 2].

    Borders are those of squares of `side` px, as tokens cover. The quotient of the two means over
    many photographs is about 1; where tokens can be seen, it is larger.
    """
    check_images(images, smallest=side + 1)
    require(side > 1, "squares of 1 px have borders only: there is nothing to compare them with.")
    sums = []
    for dim in (2, 3):
        steps = images.diff(dim=dim).abs().mean(dim=(1, 5 - dim))  # [B, H - 1]
        is_border = torch.arange(1, images.shape[dim], device=images.device) % side == 0
        sums.append(torch.stack([steps[:, is_border].mean(1), steps[:, ~is_border].mean(1)], dim=1))
    return (sums[0] + sums[1]) / 2


@dataclass(frozen=True)
class Metric:
    """A metric of images: the function, and all that evaluations, tables and figures know of it."""

    function: Callable[..., Any]  # of images and references [B, 3, H, W], returns [B]
    title: str
    digits: int  # after the point
    higher_is_better: bool
    protocol: str = ""  # settings that a reader needs to compare numbers
    min_size: int = 1  # px
    full_size_only: bool = False  # takes long: evaluations measure it at the full size only
    factor: float = 1  # of shown values
    needs: str = ""  # an option of `generation_metrics` without which it is not measured


SSIM = f"RGB, clamped, Gaussian window of {SSIM_WINDOW} px, deviation 1.5, mirrored"
LPIPS = (
    f"version 0.1 heads, clamped; images below {LPIPS_SIZE} px are both enlarged to it (bicubic)"
)
ALEX, VGG = (partial(lpips_per_image, net=net) for net in ("alex", "vgg"))
METRICS = {
    "psnr": Metric(psnr_per_image, "PSNR, dB", 2, True, "RGB, clamped, peak 1; of each image"),
    "ssim": Metric(ssim_per_image, "SSIM", 3, True, protocol=SSIM, min_size=SSIM_WINDOW),
    "lpips_alex": Metric(ALEX, "LPIPS-Alex", 3, False, protocol=LPIPS),
    "lpips_vgg": Metric(VGG, "LPIPS-VGG", 3, False, protocol=LPIPS, full_size_only=True),
}


def fast_metrics() -> list[str]:
    """Names of the metrics that are measured at every size."""
    return [name for name, metric in METRICS.items() if not metric.full_size_only]


# -- evaluation --------------------------------------------------------------------------------


def reconstruction_values(
    images: Tensor,
    reconstructions: Tensor,
    *,
    metrics: Iterable[str] | None = None,
    title: str = "",
) -> dict[str, Tensor]:
    """Values [B], float64, of metrics (default: all) that take images [B, 3, H, W] of this size."""
    check_images(reconstructions, images)
    values = {}
    for name in METRICS if metrics is None else metrics:
        metric, bar = METRICS[name], f"{title}: {METRICS[name].title}" if title else ""
        if min(images.shape[2:]) >= metric.min_size:
            pair = reconstructions, images
            values[name] = in_batches(metric.function, *pair, size=16, title=bar).double()
    return values


def evaluate_reconstructions(
    images: Tensor,
    reconstructions: Tensor,
    groups: Sequence[Hashable] | None = None,
    *,
    metrics: Iterable[str] | None = None,
) -> dict:
    """`summarize_reconstructions` of `reconstruction_values`; by default each image is a group."""
    values = reconstruction_values(images, reconstructions, metrics=metrics)
    groups = range(len(images)) if groups is None else groups
    return summarize_reconstructions(values, groups, images.shape[2:])


def summarize_reconstructions(
    values: Mapping[str, Tensor], groups: Sequence[Hashable], size: Sequence[int]
) -> dict:
    """Means and intervals of `reconstruction_values` [B], which may have been gathered in parts.

    `groups` names the photograph that each image is a view of, `size` is height and width in px. A
    mean is None where images are too small for it; only finite metrics have intervals.
    `by_photograph` has means over views, for `paired_interval`.
    """
    photographs, _, counts = group_means(torch.zeros(len(groups)), groups)
    return {
        **{name: None for name, metric in METRICS.items() if min(size) < metric.min_size},
        **{name: value.mean().item() for name, value in values.items()},
        "intervals": {
            name: list(bootstrap_interval(value, groups))
            for name, value in values.items()
            if len(photographs) > 1 and value.isfinite().all()
        },
        "photographs": photographs,
        "counts": counts.tolist(),
        "by_photograph": {
            name: [float(f"{mean:.4g}") for mean in group_means(value, groups)[1]]
            for name, value in values.items()
        },
        "protocol": {
            "images": len(groups),
            "size": list(size),
            **{name: METRICS[name].protocol for name in values},
            "intervals": f"{100 * LEVEL:.0f} % percentile bootstrap over {len(photographs)} "
            f"photographs, {RESAMPLES} resamples",
        },
    }
