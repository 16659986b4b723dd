"""Square views of images as pure functions of (seed, step, index); degraded copies of them.

A killed run goes on with the very views that it would have seen, and nothing is stored for it. Of
R processes, rank r makes its part of batch t as `training_views(source, R * t + r, B / R, ...)`.
"""

import math
import warnings
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sitlib.data.decode import rgb_to_tensor
from sitlib.data.images import ImageSource
from sitlib.data.loader import random_generator

WIDE_MIN_SIDE = 0.9  # of a wide view, as a fraction of the image's short side
# Streams of random numbers, so that two uses of one seed never share draws.
_ORDER, _VIEW, _HELD_OUT_ORDER, _HELD_OUT_VIEW = range(4)


def training_views(
    source: ImageSource,
    step: int,
    batch_size: int,
    size: int,
    seed: int,
    *,
    kind: str = "crops",
    min_crop: float = 0.25,
    flip: bool = True,
) -> tuple[Tensor, Tensor, list[str]]:
    """Views of one training step; images come in epochs without repetition (`EpochOrder`).

    Args:
        size: side of a view, px; smaller images are enlarged, with a warning.
        kind: "crops": a square anywhere in the image, its side log-uniform between
            max(size, min_crop * short side) and the short side; "wide": a side of 0.9 to 1.0 of
            the short side, which nearly always shows what the class label is about.
        flip: mirror every second view on average.

    Returns:
        float32 [B, 3, size, size] in [0, 1], labels int64 [B] (-1: no class), keys of the images.
    """
    items = range(step * batch_size, (step + 1) * batch_size)
    # (epoch, place in its permutation) of every item
    places = [divmod(item, len(source)) for item in items]
    positions = [int(source.order.permutation(seed, _ORDER, e)[place]) for e, place in places]
    return _views(source, positions, items, (seed, _VIEW), size, kind, min_crop, flip)


def held_out_views(
    source: ImageSource,
    count: int,
    size: int,
    seed: int,
    *,
    kind: str = "crops",
    min_crop: float = 0.25,
    first: int = 0,
) -> tuple[Tensor, Tensor, list[str]]:
    """A fixed set of `count` evaluation views, never flipped, that takes the images in turn.

    Each image is used count // len(source) times, some once more. A shorter set begins a longer
    one; the first `first` views are left out, so that a set can be made in parts. Arguments and
    values as for `training_views`.
    """
    positions = held_out_positions(source, count, seed, first)
    items = range(first, first + count)
    return _views(source, positions, items, (seed, _HELD_OUT_VIEW), size, kind, min_crop, False)


def held_out_positions(source: ImageSource, count: int, seed: int, first: int = 0) -> list[int]:
    """Positions in `source` of the images of `held_out_views`, where all of them are readable."""
    order = source.order.permutation(seed, _HELD_OUT_ORDER, 0)
    return [int(order[item % len(source)]) for item in range(first, first + count)]


def degrade(images: Tensor, seed: int) -> Tensor:
    """Make images [B, 3, H, W] in [0, 1] worse, each as follows from the seed and its index.

    An image is shrunk and enlarged again (smoothly or in squares), compressed as a poor JPEG, both,
    or neither; half of them, and all of "neither", get noise.
    """
    worse = []
    for index, image in enumerate(images):
        rng = np.random.default_rng([seed, index])
        kind = rng.integers(4)  # 0: shrunk, 1: compressed, 2: both, 3: neither
        if kind in (0, 2):
            shape = image.shape[1:]
            small = [max(1, round(side * rng.uniform(0.2, 0.6))) for side in shape]
            mode = "bicubic" if rng.random() < 0.5 else "nearest"
            small = F.interpolate(image[None], small, mode="area")
            image = F.interpolate(small, shape, mode=mode)[0]
        if kind in (1, 2):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            file = BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(2, 20)))
            image = rgb_to_tensor(Image.open(file).convert("RGB")) / 255
        if kind == 3 or rng.random() < 0.5:
            noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
            image = image + noise * rng.uniform(0.02, 0.12)
        worse.append(image.clamp(0, 1))
    return torch.stack(worse)


def _views(
    source: ImageSource,
    positions: list[int],
    items: range,
    stream: tuple[int, int],
    size: int,
    kind: str,
    min_crop: float,
    flip: bool,
) -> tuple[Tensor, Tensor, list[str]]:
    """Views of the images at some positions; item i takes its random numbers from (*stream, i)."""
    if kind not in ("crops", "wide") or not 0 < min_crop <= 1:
        raise ValueError(f"kind is 'crops' or 'wide', min_crop in (0, 1]; not {kind}, {min_crop}.")
    if size < 1 or not items:
        raise ValueError(
            f"{len(items)} views of {size} px: at least one of at least 1 px is needed."
        )
    smallest_side = WIDE_MIN_SIDE if kind == "wide" else min_crop  # of the short side
    views, labels, keys = [], [], []
    for item, asked in zip(items, positions, strict=True):
        position, image = source.picture(asked)  # another one if it cannot be read
        # Four draws for every image and kind, so that no setting shifts the others' randomness.
        u_side, u_left, u_top, u_flip = random_generator(*stream, item).random(4)
        short = min(image.size)
        smallest = min(max(size, smallest_side * short), short)
        log_side = math.log(smallest) + u_side * (math.log(short) - math.log(smallest))
        side = min(short, round(math.exp(log_side)))
        if side < size:  # Python shows equal warnings once
            message = f"{source.where} has images smaller than {size}x{size}; they are enlarged"
            warnings.warn(message, stacklevel=3)
        left = int(u_left * (image.width - side + 1))
        top = int(u_top * (image.height - side + 1))
        box = (left, top, left + side, top + side)
        # Antialiased; large squares are first averaged by a whole factor, which halves the time.
        view = image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=1.5)
        view = np.asarray(view)  # uint8 [size, size, 3]
        views.append(view[:, ::-1] if flip and u_flip < 0.5 else view)
        labels.append(int(source.labels[position]))
        keys.append(source.samples[position].key)
    # In NumPy, because torch would wake its thread pool from the thread that prefetches.
    batch = np.stack(views).transpose(0, 3, 1, 2).astype(np.float32)
    batch = np.ascontiguousarray(batch) / np.float32(255)
    return torch.from_numpy(batch), torch.tensor(labels, dtype=torch.int64), keys
