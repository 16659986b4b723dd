"""Square views of photographs: multi-scale crops for the tokenizer, wide views where a class label is used.

Everything is a pure function of a seed and a counter, so that a run that was killed continues with the very
views it would have seen: nothing about the position in the data has to be stored. Nor has anything to be shared out: of R
processes, number r makes its part of batch t as `training_views(source, R * t + r, B / R, ...)`.
"""

import math
from typing import Literal

import numpy as np
import torch
from PIL import Image

from sitlib.data.order import random_generator
from sitlib.data.sources import ImageSource

Kind = Literal["crops", "wide"]
WIDE_FROM = 0.9  # smallest side of a wide view, as a fraction of the image's short side
# Streams of random numbers, so that two uses of one seed never share draws.
_ORDER, _VIEW, _HELD_OUT_ORDER, _HELD_OUT_VIEW = range(4)


def training_views(
    source: ImageSource,
    step: int,
    batch_size: int,
    size: int,
    seed: int,
    *,
    kind: Kind = "crops",
    min_crop: float = 0.25,
    flip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Views of one training step, a pure function of the arguments.

    The images come in epochs without repetition: item step * batch_size + j of a run is an element of the
    epoch's permutation (`sitlib.data.order`).

    Args:
        step: counts from 0.
        size: side of a view, px.
        kind: "crops" - a square with a log-uniform side between max(size, min_crop * short side) and the
            short side of the image, anywhere in it; "wide" - a square of 0.9 to 1.0 of the short side,
            anywhere in it, which nearly always shows what the class label is about.
        min_crop: smallest side of a crop, as a fraction of the short side.
        flip: mirror every second view on average.

    Returns:
        float32 [B, 3, size, size] in [0, 1], labels int64 [B] (-1 where an image has no class), keys of the
        images. An image smaller than `size` is enlarged, with one warning per source.
    """
    _check(kind, min_crop, seed=seed, step=step)
    views, labels, keys = [], [], []
    for item in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(item, len(source))
        rng = random_generator(seed, _VIEW, item)
        position, image = source.picture(int(source.order.permutation(seed, _ORDER, epoch)[place]))
        views.append(_view(source, image, size, rng, kind, min_crop, flip))
        labels.append(int(source.labels[position]))
        keys.append(source.key(position))
    return _batch(views), torch.tensor(labels, dtype=torch.int64), keys


def held_out_views(
    source: ImageSource,
    count: int,
    size: int,
    seed: int,
    *,
    kind: Kind = "crops",
    min_crop: float = 0.25,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """A fixed set of `count` evaluation views, never flipped, that takes the images in turn.

    Each image is used count // len(source) times, some once more. A shorter set begins a longer one, and `first` is the number of views
    to leave out at the beginning, so that a large set can be made in parts.

    Returns:
        float32 [count, 3, size, size] in [0, 1], labels int64 [count] (-1: none), keys of the images.
    """
    _check(kind, min_crop, seed=seed, count=count, first=first)
    views, labels, keys = [], [], []
    for item, wanted in enumerate(held_out_positions(source, count, seed, first), first):
        position, image = source.picture(wanted)
        rng = random_generator(seed, _HELD_OUT_VIEW, item)
        views.append(_view(source, image, size, rng, kind, min_crop, flip=False))
        labels.append(int(source.labels[position]))
        keys.append(source.key(position))
    return _batch(views), torch.tensor(labels, dtype=torch.int64), keys


def held_out_positions(source: ImageSource, count: int, seed: int, first: int = 0) -> list[int]:
    """Of which image of `source` each of the `held_out_views` is, without looking at them (an image that cannot be read is replaced)."""
    order = source.order.permutation(seed, _HELD_OUT_ORDER, 0)
    return [int(order[item % len(source)]) for item in range(first, first + count)]


def _check(kind: str, min_crop: float, **counters: int) -> None:
    if kind not in ("crops", "wide"):
        raise ValueError(f"There is no kind of view {kind!r}: choose 'crops' or 'wide'.")
    if not 0 < min_crop <= 1:
        raise ValueError(f"min_crop is a fraction of the short side in (0, 1], not {min_crop}.")
    for name, value in counters.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must not be negative.")


def _view(
    source: ImageSource,
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    kind: Kind,
    min_crop: float,
    flip: bool,
) -> np.ndarray:
    """One view, uint8 [size, size, 3]. Takes the same number of draws from `rng` for every image and kind."""
    u_side, u_left, u_top, u_flip = rng.random(4)
    short = min(image.size)
    smallest = min(max(size, (WIDE_FROM if kind == "wide" else min_crop) * short), short)
    side = min(
        short, round(math.exp(math.log(smallest) + u_side * (math.log(short) - math.log(smallest))))
    )
    if side < size:
        source.tell_upsampling(image, size)
    left, top = (
        int(u * (length - side + 1)) for u, length in ((u_left, image.width), (u_top, image.height))
    )
    box = (left, top, left + side, top + side)
    # Antialiased; squares of at least 3 * size are first averaged by a whole factor, which halves the time.
    view = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=1.5))
    return view[:, ::-1] if flip and u_flip < 0.5 else view


def _batch(views: list[np.ndarray]) -> torch.Tensor:
    # In NumPy, because torch would wake its thread pool from the thread that prefetches.
    stacked = np.stack(views).transpose(0, 3, 1, 2).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(stacked) / np.float32(255))
