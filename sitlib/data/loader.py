"""Batches of training, made ahead of their step: views of images, or codes from shards on disk.

Views are pure functions of (seed, step, index): a killed run goes on with the very views that it
would have seen, and nothing is stored for it. Of R processes, rank r makes its part of batch t as
`training_views(source, R * t + r, B / R, ...)`.
"""

import json
import math
import os
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from sitlib.data.decode import DataError
from sitlib.data.images import EpochOrder, ImageSource, random_generator
from sitlib.files import read_json, write_json, write_tensors

Value = TypeVar("Value")
# float32 [B, 3, size, size] in [0, 1]; labels, int64 [B] (-1: no class); keys of the images
Views = tuple[Tensor, Tensor, list[str]]
RESIZING = "bicubic, antialiased (Pillow, reducing_gap=1.5)"  # of views, in manifests
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
    recolor: float = 0.0,
) -> Views:
    """Views of one training step; images come in epochs without repetition (`EpochOrder`).

    `size` is the side of a view in px; smaller images are enlarged, with a warning. "crops" are
    squares anywhere in the image, their sides log-uniform between max(size, min_crop * short side)
    and the short side; "wide" ones have 0.9 to 1.0 of the short side, which nearly always shows
    what the class label is about; "center" is the largest in the middle. `flip` mirrors every second view on average, `recolor` gives a
    share of them other colors.
    """
    items = range(step * batch_size, (step + 1) * batch_size)
    # (epoch, place in its permutation) of every item
    places = [divmod(item, len(source)) for item in items]
    positions = [int(source.order.permutation(seed, _ORDER, e)[place]) for e, place in places]
    return _views(source, positions, items, (seed, _VIEW), size, kind, min_crop, flip, recolor)


def held_out_views(
    source: ImageSource,
    count: int,
    size: int,
    seed: int,
    *,
    kind: str = "crops",
    min_crop: float = 0.25,
    first: int = 0,
) -> Views:
    """A fixed set of evaluation views, never flipped; a shorter one begins a longer one."""
    positions, items = held_out_positions(source, count, seed, first), range(first, first + count)
    return _views(source, positions, items, (seed, _HELD_OUT_VIEW), size, kind, min_crop, False)


def held_out_positions(source: ImageSource, count: int, seed: int, first: int = 0) -> list[int]:
    """Positions in `source` of the images of `held_out_views`, where all of them are readable."""
    order = source.order.permutation(seed, _HELD_OUT_ORDER, 0)
    return [int(order[item % len(source)]) for item in range(first, first + count)]


def _views(
    source: ImageSource,
    positions: list[int],
    items: range,
    stream: tuple[int, int],
    size: int,
    kind: str,
    min_crop: float,
    flip: bool,
    recolor: float = 0.0,
) -> Views:
    """Views of the images at some positions; item i takes its random numbers from (*stream, i)."""
    # Of the short side.
    smallest_side = {"crops": min_crop, "wide": 0.9, "center": 1.0}.get(kind, 0)
    if not (0 < smallest_side <= 1 and size >= 1 and items):
        wanted = f"{len(items)} views of {size} px, kind {kind!r}, min_crop {min_crop}"
        raise ValueError(f"{wanted}: kind is 'crops', 'wide', 'center'; min_crop in (0, 1].")
    views, labels, keys = [], [], []
    for item, asked in zip(items, positions, strict=True):
        position, image = source.picture(asked)  # another one if it cannot be read
        # As many draws for every image and kind: no setting shifts the others' randomness.
        draws = random_generator(*stream, item).random(9)
        u_side, u_left, u_top, u_flip, u_recolor = draws[:5]
        if kind == "center":
            u_left = u_top = 0.5
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
        view = view[:, ::-1] if flip and u_flip < 0.5 else view
        views.append(recolored(view, draws[5:]) if u_recolor < recolor else view)
        labels.append(int(source.labels[position]))
        keys.append(source.samples[position].key)
    # In NumPy, because torch would wake its thread pool from the thread that prefetches.
    batch = np.stack(views).transpose(0, 3, 1, 2).astype(np.float32)
    batch = np.ascontiguousarray(batch) / np.float32(255)
    return torch.from_numpy(batch), torch.tensor(labels, dtype=torch.int64), keys


YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def recolored(pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3] of 0 to 255 with another hue, saturation, contrast and brightness.

    The four draws from [0, 1): hue all around the circle, half to twice the saturation, 0.7 to 1.4
    of the contrast, up to a tenth lighter or darker. Grey stays grey.
    """
    angle, saturation, contrast = (
        2 * math.pi * draws[0],
        4 ** (draws[1] - 0.5),
        2 ** (draws[2] - 0.5),
    )
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    change = np.eye(3)
    change[1:, 1:] = saturation * turn
    matrix = contrast * np.linalg.solve(YIQ, change @ YIQ)
    recolored = (pixels - 127.5) @ matrix.T + 127.5 + 51 * (draws[3] - 0.5)
    return recolored.clip(0, 255)


def prefetch(
    make: Callable[[int], Value], first: int, last: int, workers: int = 0
) -> Iterator[tuple[int, Value]]:
    """Yield (step, make(step)) for first <= step < last, in order, computed some steps ahead.

    Exceptions of `make`, a pure function, are raised here, at their step. `workers` processes take
    whole steps in turn; with 0, and where none can be forked (Windows), it is a thread. Tensors
    come back through shared memory (/dev/shm), which needs room for 2 * workers batches.
    """
    pool, call, depth = ThreadPoolExecutor(1, "prefetch"), make, 2
    if workers and "fork" in get_all_start_methods():
        import resource  # not on Windows

        # Every tensor on its way from a worker is an open file, thousands in all: raise the limit.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = hard if 0 <= hard < 2**16 else 2**16  # a negative number: unlimited
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        # A forked process has `make` and what it refers to; they need not be picklable.
        pool = ProcessPoolExecutor(workers, get_context("fork"), _makes.append, (make,))
        call, depth = _in_worker, 2 * workers
    try:
        ahead = deque(pool.submit(call, step) for step in range(first, min(first + depth, last)))
        for step in range(first, last):
            value = ahead.popleft().result()
            if step + depth < last:
                ahead.append(pool.submit(call, step + depth))
            yield step, value
    finally:  # also where the consumer leaves the loop
        pool.shutdown(cancel_futures=True)


_makes: list[Callable[[int], Any]] = []  # in a worker: what it was started for


def _in_worker(step: int) -> Any:
    torch.set_num_threads(1)  # the threads of the parent were not forked
    return _makes[-1](step)


# -- codes on disk -----------------------------------------------------------------------------


class TokenShards:
    """Codes [M, S, N] of one split in a folder of `make_shards`, read where indexed; labels [M]."""

    def __init__(self, folder: Path, split: str):
        names = [name for name in read_manifest(folder)["shards"] if name.startswith(f"{split}-")]
        files = [folder / name for name in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise FileNotFoundError(f"{folder} lacks the codes {missing}: extract them again.")
        self._shards = [_memory_map(file, "codes") for file in files]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        labels = [_memory_map(file, "labels").astype(np.int64) for file in files]
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.shape = torch.Size([int(self._starts[-1]), *self._shards[0].shape[1:]])
        self.order = EpochOrder(np.diff(self._starts))
        self._rows = np.arange(len(self))  # made once: there are millions

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | np.ndarray | slice) -> Tensor:
        """Codes of some rows, int64 [m, S, N]."""
        rows = self._rows[rows.numpy() if isinstance(rows, Tensor) else rows]
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        codes = np.empty((len(rows), *self.shape[1:]), np.int64)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            codes[here] = self._shards[shard][rows[here] - self._starts[shard]]
        return torch.from_numpy(codes)


def _memory_map(file: Path, name: str) -> np.ndarray:
    with safe_open(file, framework="pt") as content:
        return content.get_tensor(name).numpy()  # its pages are read when they are touched


def make_shards(
    folder: Path,
    num_batches: dict[str, int],
    per_shard: int,
    make: Callable[[str, range], tuple[Tensor, Tensor]],
    run: dict[str, Any],
    num_codes: int,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Make a folder of shards; a killed call is continued by the next, to the same bytes.

    A shard holds `codes` [m, S, N] (uint16 where `num_codes` permits) and `labels` [m] int32, which
    `make` gives for `per_shard` of the batches of a split. Shard i belongs to rank i mod
    world_size. They lie in a hidden folder beside `folder` until all are there. `run`, plain values
    that determine the codes, is in the manifest: unfinished shards of another run are refused.
    """
    shards = {
        f"{split}-{first // per_shard:05d}.safetensors": (split, range(count)[first:][:per_shard])
        for split, count in num_batches.items()
        for first in range(0, count, per_shard)
    }
    manifest = json.loads(json.dumps({**run, "shards": list(shards)}))  # tuples are lists there
    if read_manifest(folder) == manifest:
        return
    work = folder.with_name(f".{folder.name}.unfinished")
    if read_manifest(work) not in ({}, manifest):
        raise DataError(f"{work} holds unfinished codes of another run: finish or remove it.")
    if rank == 0:
        write_json(work / "manifest.json", manifest, digits=17)
    dtype = torch.uint16 if num_codes <= 2**16 else torch.int32
    for name in list(shards)[rank::world_size]:
        if not (work / name).exists():
            codes, labels = make(*shards[name])
            tensors = {"codes": codes.to(dtype), "labels": labels.to(torch.int32)}
            write_tensors(work / name, tensors, {})
    if rank == 0:
        while not all((work / name).exists() for name in shards):
            time.sleep(0.2)  # for the other ranks
        if folder.is_dir():  # of another run; killed here, the next call finds all shards
            shutil.rmtree(folder)
        os.replace(work, folder)
    while read_manifest(folder) != manifest:
        time.sleep(0.2)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a folder of codes; empty where there is none."""
    file = folder / "manifest.json"
    return read_json(file) if file.exists() else {}
