"""Codes of a tokenizer on disk: a folder of safetensors shards and a manifest, memory-mapped.

A shard holds `codes` [m, S, N] (uint16 where the vocabulary permits) and `labels` [m] int32.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sitlib.data.images import DataError
from sitlib.data.loader import EpochOrder
from sitlib.files import read_json, write_json, write_tensors


class TokenShards:
    """Codes of one split in a folder of `make_shards`: a tensor [M, S, N], read where it is
    indexed.

    Attributes: `labels`, int64 [M]; `order`, the `EpochOrder` of the rows.
    """

    def __init__(self, folder: Path, split: str):
        names = [name for name in read_manifest(folder)["shards"] if name.startswith(f"{split}-")]
        files = [folder / name for name in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise FileNotFoundError(f"{folder} lacks the codes {missing}: extract them again.")
        self._shards = [_memory_map(file, "codes") for file in files]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        labels = [_memory_map(file, "labels").astype(np.int64) for file in files]
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.shape = torch.Size([int(self._starts[-1]), *self._shards[0].shape[1:]])
        self.order = EpochOrder(np.diff(self._starts))
        # Made once: there are millions, and every batch asks for some.
        self._rows = np.arange(len(self))

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

    Shard i belongs to rank i mod world_size, and existing ones are skipped. They lie in a hidden
    folder beside `folder`, whose place it takes when it is complete. Returns when it has.

    Args:
        num_batches: of every split; `per_shard` of them make a shard.
        make: codes [m, S, N] below `num_codes` and labels [m] of some batches of a split.
        run: plain values that determine the codes, for the manifest.

    Raises DataError if unfinished shards of another run are there.
    """
    shards = {
        f"{split}-{first // per_shard:05d}.safetensors": (split, range(count)[first:][:per_shard])
        for split, count in num_batches.items()
        for first in range(0, count, per_shard)
    }
    manifest = {**run, "shards": list(shards)}
    if read_manifest(folder) == manifest:
        return
    work = folder.with_name(f".{folder.name}.unfinished")
    if read_manifest(work) not in ({}, manifest):
        raise DataError(f"{work} holds unfinished codes of another run: finish or remove it.")
    if rank == 0:
        write_json(work / "manifest.json", manifest)
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
