"""How near reconstructions are to their originals: PSNR, SSIM and LPIPS, for each image and on average.

Images are RGB in [0, 1], `[B, 3, H, W]`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from sitlib.metrics.batches import batch_starts
from sitlib.metrics.checks import check_count, check_pair
from sitlib.metrics.intervals import LEVEL, RESAMPLES, bootstrap_interval, group_means
from sitlib.metrics.perceptual import PerceptualDistance, load_lpips
from sitlib.model.precision import best_device

SSIM_WINDOW = 11  # px; a smaller image has no SSIM
LPIPS_SIZE = 64  # px; smaller images are enlarged to it


def psnr_per_image(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `[B]` in dB, peak 1, over channels and pixels; infinite for equal images.

    Args:
        images: `[B, 3, H, W]`, RGB; clamped to [0, 1].
        references: the same shape, in [0, 1].

    Raises `ValueError` if shapes differ, a value is not finite, or lies far outside [0, 1].
    """
    check_pair(images, references)
    return peak_signal_noise_ratio(
        images.clamp(0, 1), references.clamp(0, 1), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )


def ssim_per_image(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity `[B]`, at most 1 (Wang et al. 2004), by torchmetrics: Gaussian window of 11x11 px with deviation 1.5 px.

    The image is mirrored at its borders, so that every pixel counts; averaging only windows inside it differs by some .02 at 16 px.

    Arguments and errors as for `psnr_per_image`; and `ValueError` for images into which the window does not fit.
    """
    check_pair(images, references)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} px a side, the size of its window, not {list(images.shape[2:])}."
        )
    similarity = structural_similarity_index_measure(
        images.clamp(0, 1), references.clamp(0, 1), sigma=1.5, data_range=1.0, reduction="none"
    )
    return cast(Tensor, similarity).reshape(len(images))


@torch.inference_mode()
def lpips_per_image(images: Tensor, references: Tensor, network: PerceptualDistance) -> Tensor:
    """LPIPS `[B]`, on the CPU, at least 0; images with a side below 64 px are both enlarged first (bicubic, clamped).

    Arguments and errors as for `psnr_per_image`.
    """
    check_pair(images, references)
    device = next(network.parameters()).device
    pair = [_at_least(x.to(device).clamp(0, 1), LPIPS_SIZE) for x in (images, references)]
    return network(*pair).cpu()


def _at_least(images: Tensor, size: int) -> Tensor:
    shorter = min(images.shape[2:])
    if shorter >= size:
        return images
    shape = [round(side * size / shorter) for side in images.shape[2:]]
    return F.interpolate(images, shape, mode="bicubic").clamp(0, 1)


# Metrics that need no network: name -> (function of images and references [B, 3, H, W] -> [B], smallest side in px that it takes).
PER_IMAGE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "psnr": (psnr_per_image, 1),
    "ssim": (ssim_per_image, SSIM_WINDOW),
}


def reconstruction_values(
    images: Tensor,
    reconstructions: Tensor,
    *,
    lpips_nets: Sequence[str] = ("alex", "vgg"),
    ssim: bool = True,
    folder="weights",
    batch_size: int = 16,
    progress: bool | str = False,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Every metric of PER_IMAGE that takes images of this size, SSIM only if asked for, and `lpips_<net>`; of each image, float64 `[B]`.

    Arguments and errors as for `evaluate_reconstructions`.
    """
    check_pair(reconstructions, images)
    device = torch.device(device) if device else best_device()
    networks = {f"lpips_{net}": load_lpips(net, folder).to(device) for net in lpips_nets}
    smallest = min(images.shape[2:])
    wanted = {
        name: metric
        for name, (metric, side) in PER_IMAGE.items()
        if smallest >= side and (ssim or name != "ssim")
    }
    batches: list[dict[str, Tensor]] = []
    title = ", ".join([*map(str.upper, wanted), "LPIPS"])
    for i in batch_starts(len(images), batch_size, title, progress):
        pair = reconstructions[i : i + batch_size], images[i : i + batch_size]
        batch = {name: metric(*pair).cpu() for name, metric in wanted.items()}
        batches.append(
            batch | {name: lpips_per_image(*pair, net) for name, net in networks.items()}
        )
    return {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}


def evaluate_reconstructions(
    images: Tensor,
    reconstructions: Tensor,
    groups: Sequence[Hashable] | None = None,
    *,
    lpips_nets: Sequence[str] = ("alex", "vgg"),
    ssim: bool = True,
    folder="weights",
    batch_size: int = 16,
    progress: bool | str = False,
    device: torch.device | str | None = None,
) -> dict:
    """PSNR, SSIM and LPIPS of `reconstructions` against `images`: means over the images of the per-image values.

    Args:
        images: originals `[B, 3, H, W]` in [0, 1], B at least 2.
        reconstructions: the same shape; clamped to [0, 1] before anything is measured.
        groups: the photograph that each image is a view of, B names; default: each image is a photograph.
        lpips_nets: trunks of LPIPS, of "alex" and "vgg".
        ssim: whether it is wanted; on a CPU it takes two thirds of the time of LPIPS-Alex.
        folder: of the LPIPS weights.
        progress: show a progress bar; a text stands before its title.
        device: where LPIPS runs; default: the accelerator if there is one.

    Returns
        `psnr` (dB), `ssim` (None below 11 px and where it is not wanted), `lpips_<net>` for each net;
        `intervals`: of each of these `[low, high]`, 95 % by `bootstrap_interval` (none for a metric with infinite values, or for views
        of a single photograph);
        `photographs`, `counts`: names and numbers of views; `by_photograph`: their mean of each metric, four significant digits, from
        which `paired_interval` compares two models;
        `protocol`.
    Raises `ValueError` for inputs as in `psnr_per_image`, and for fewer than two images.
    """
    check_pair(reconstructions, images)
    check_count("evaluate_reconstructions", images)
    values = reconstruction_values(
        images,
        reconstructions,
        lpips_nets=lpips_nets,
        ssim=ssim,
        folder=folder,
        batch_size=batch_size,
        progress=progress,
        device=device,
    )
    groups = range(len(images)) if groups is None else groups
    return reconstruction_scores(values, groups, images.shape[2:], lpips_nets=lpips_nets, ssim=ssim)


def reconstruction_scores(
    values: Mapping[str, Tensor],
    groups: Sequence[Hashable],
    size: Sequence[int],
    *,
    lpips_nets: Sequence[str] = ("alex", "vgg"),
    ssim: bool = True,
) -> dict:
    """What `evaluate_reconstructions` returns, from `reconstruction_values` [B], which may have been gathered in parts.

    Args:
        size: height and width of the images, px.
        groups, lpips_nets, ssim: as for `evaluate_reconstructions`.
    """
    means = {name: value.mean().item() for name, value in values.items()}
    photographs, _, counts = group_means(values["psnr"], groups)
    several = len(photographs) > 1
    return {
        **means,
        "ssim": means.get("ssim"),
        "intervals": {
            name: list(bootstrap_interval(value, groups))
            for name, value in values.items()
            if several and value.isfinite().all()
        },
        "photographs": photographs,
        "counts": counts.tolist(),
        "by_photograph": {
            name: [float(f"{mean:.4g}") for mean in group_means(value, groups)[1]]
            for name, value in values.items()
        },
        "protocol": _protocol(len(groups), list(size), lpips_nets, ssim, len(photographs)),
    }


def _protocol(
    images: int, size: list[int], lpips_nets: Sequence[str], ssim: bool, photographs: int
) -> dict:
    small = min(size) < LPIPS_SIZE
    about_ssim = (
        f"RGB in [0, 1], Gaussian window of {SSIM_WINDOW}x{SSIM_WINDOW} px, deviation 1.5 px, borders mirrored; mean over images"
        if min(size) >= SSIM_WINDOW
        else f"none: smaller than its window of {SSIM_WINDOW}x{SSIM_WINDOW} px"
    )
    return {
        "images": images,
        "size": size,
        "psnr": "RGB in [0, 1], clamped; mean over images of the PSNR of each",
        **({"ssim": about_ssim} if ssim else {}),
        "lpips": "version 0.1 heads, RGB clamped to [0, 1], "
        + (f"both enlarged to {LPIPS_SIZE} px (bicubic, clamped)" if small else "at the size given")
        + "; mean over images",
        "lpips_nets": list(lpips_nets),
        "intervals": f"{100 * LEVEL:.0f} % percentile bootstrap over {photographs} photographs, {RESAMPLES} resamples",
    }
