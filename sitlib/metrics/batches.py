"""Checks of image batches [B, 3, H, W] in [0, 1], and functions applied batch by batch."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

# An unclamped decoder overshoots by less than this; images in [-1, 1] or [0, 255] do not.
RANGE_TOLERANCE = 0.5


def in_batches(
    function: Callable[..., Tensor], *inputs: Tensor, size: int, title: str = ""
) -> Tensor:
    """Concatenate, on the CPU, what `function` returns for batches of `size` rows of the inputs.

    Args:
        title: of a progress bar; without it none is shown.
    """
    starts = range(0, len(inputs[0]), size)
    bar = tqdm(starts, title, unit="batch", mininterval=5.0, ncols=110, disable=not title)
    return torch.cat([function(*(x[i : i + size] for x in inputs)).cpu() for i in bar])


def check_images(images: Tensor, name: str = "images", *, smallest: int = 1) -> None:
    """Raise `ValueError` unless `images` are finite RGB [B, 3, H, W] in about [0, 1].

    Args:
        smallest: side in px that they need.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point RGB [B, 3, H, W], "
            f"not {images.dtype} {list(images.shape)}."
        )
    if images.numel() == 0:
        raise ValueError(f"{name} is empty: {list(images.shape)}.")
    if min(images.shape[2:]) < smallest:
        raise ValueError(
            f"{name} must have at least {smallest} px a side here, not {list(images.shape[2:])}."
        )
    if not images.isfinite().all():
        count = (~images.isfinite()).flatten(1).any(dim=1).sum().item()
        raise ValueError(f"{count} of {len(images)} {name} contain NaN or infinite values.")
    low, high = images.min().item(), images.max().item()
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{name} must lie in [0, 1], not {low:.3g} to {high:.3g}: rescale them first."
        )


def check_pair(images: Tensor, references: Tensor, *, smallest: int = 1) -> None:
    """Raise `ValueError` unless both are images (`check_images`) of one shape."""
    if images.shape != references.shape:
        raise ValueError(
            "images and references differ in shape: "
            f"{list(images.shape)} and {list(references.shape)}."
        )
    check_images(images, "images", smallest=smallest)
    check_images(references, "references", smallest=smallest)
