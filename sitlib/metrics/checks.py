"""What metrics refuse, and in which words."""

from torch import Tensor

# An unclamped decoder overshoots by less than this; [-1, 1] or [0, 255] images do not stay within it.
RANGE_TOLERANCE = 0.5


def check_images(name: str, images: Tensor) -> None:
    """`ValueError` unless `images` are finite RGB `[B, 3, H, W]` in [0, 1], but for a decoder's overshoot."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point RGB [B, 3, H, W], not {images.dtype} {list(images.shape)}."
        )
    if images.numel() == 0:
        raise ValueError(f"{name} is empty: {list(images.shape)}.")
    if not images.isfinite().all():
        count = (~images.isfinite()).flatten(1).any(dim=1).sum().item()
        raise ValueError(
            f"{count} of {len(images)} {name} contain NaN or infinite values: look at what made them."
        )
    lowest, highest = images.min().item(), images.max().item()
    if lowest < -RANGE_TOLERANCE or highest > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{name} must lie in [0, 1]; found {lowest:.3g} to {highest:.3g}. Rescale them first."
        )


def check_pair(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(
            f"images and references differ in shape: {list(images.shape)} and {list(references.shape)}."
        )
    check_images("images", images)
    check_images("references", references)


def check_count(function: str, images: Tensor) -> None:
    if len(images) < 2:
        raise ValueError(f"{function} needs at least 2 images, not {len(images)}.")


def check_features(features: Tensor, references: Tensor) -> None:
    if features.ndim != 2 or references.ndim != 2 or features.shape[1] != references.shape[1]:
        raise ValueError(
            f"features must be [M, D] and [N, D] with one D, "
            f"not {list(features.shape)} and {list(references.shape)}."
        )
    if min(len(features), len(references)) < 2:
        raise ValueError(
            f"A distance needs at least 2 images a set; there are {len(features)} and {len(references)}."
        )
    if not (features.isfinite().all() and references.isfinite().all()):
        raise ValueError(
            "features contain NaN or infinite values; look at the images that they come from."
        )
