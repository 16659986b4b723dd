"""Functions applied batch by batch, and checks of image batches [B, 3, H, W] in [0, 1]."""

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

    A progress bar is shown if it has a title.
    """
    starts = range(0, len(inputs[0]), size)
    bar = tqdm(starts, title, unit="batch", mininterval=5.0, ncols=110, disable=not title)
    return torch.cat([function(*(x[i : i + size] for x in inputs)).cpu() for i in bar])


def check_images(*batches: Tensor, smallest: int = 1) -> None:
    """Raise `ValueError` unless these are finite RGB batches of one shape, in about [0, 1].

    Args:
        smallest: side in px that they need.
    """
    shapes = [list(images.shape) for images in batches]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"The images differ in shape: {shapes[0]} and {shapes[1]}.")
    for images in batches:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating-point RGB [B, 3, H, W], not {images.dtype} {shapes[0]}."
            )
        if not len(images) or min(images.shape[2:]) < smallest:
            raise ValueError(f"images need at least {smallest} px a side here, not {shapes[0]}.")
        if not images.isfinite().all():
            count = (~images.isfinite()).flatten(1).any(dim=1).sum()
            raise ValueError(f"{count} of {len(images)} images contain NaN or infinite values.")
        low, high = images.min().item(), images.max().item()
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(
                f"images must lie in [0, 1], not {low:.3g} to {high:.3g}: rescale them first."
            )
