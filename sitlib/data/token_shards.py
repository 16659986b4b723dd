"""Codes of a tokenizer on disk: a folder of safetensors shards and a manifest, memory-mapped.

A shard holds `codes` [m, S, N] (uint16 where the vocabulary permits) and `labels` [m] int32.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sitlib.data.index import DataError
from sitlib.data.loader import EpochOrder
from sitlib.files import read_json, write_json, write_tensors

SHARD_BYTES = 2**27  # of codes, at most (but at least one batch)
MANIFEST = "manifest.json"


class TokenShards:
    """Codes of one split as a tensor [M, S, N] that is read from disk where it is indexed.

    Attributes:
        labels: int64 [M].
        order: `EpochOrder` of the rows.
    """

    def __init__(self, files: list[Path]):
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


@dataclass(frozen=True)
class Shard:
    """Some batches of one split."""

    split: str
    number: int
    batches: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.safetensors"


def plan_shards(batches: dict[str, int], batch_bytes: int) -> list[Shard]:
    """Shards of a folder, by the number of batches of every split and the bytes of one batch."""
    per_shard = max(1, SHARD_BYTES // batch_bytes)
    return [
        Shard(split, number, range(first, min(first + per_shard, count)))
        for split, count in batches.items()
        for number, first in enumerate(range(0, count, per_shard))
    ]


def make_shards(
    folder: Path,
    shards: list[Shard],
    make: Callable[[Shard], tuple[Tensor, Tensor]],
    run: dict[str, Any],
    num_codes: int,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Make the shards of a folder; a killed call is continued by the next, to the same bytes.

    Shard i belongs to rank i mod world_size, and existing ones are skipped. They lie in a hidden
    folder beside `folder`, whose place it takes when it is complete. Returns when it has.

    Args:
        make: codes [m, S, N] below `num_codes` and labels [m] of a shard.
        run: plain values that determine the codes, for the manifest.

    Raises:
        DataError: unfinished shards of another run are there.
        DiskError: a shard could not be written. The finished ones stay.
    """
    manifest = {**run, "shards": [shard.name for shard in shards]}
    if read_manifest(folder) == manifest:
        return
    work = folder.with_name(f".{folder.name}.unfinished")
    run_file = work / "run.json"
    if run_file.exists() and read_json(run_file) != manifest:
        raise DataError(
            f"{work} holds unfinished codes of another run (other settings, images or tokenizer): "
            "wait until it has finished, or remove that folder."
        )
    if rank == 0:
        write_json(run_file, manifest)
    dtype = torch.uint16 if num_codes <= 2**16 else torch.int32
    for shard in shards[rank::world_size]:
        if not (work / shard.name).exists():
            codes, labels = make(shard)
            tensors = {"codes": codes.to(dtype), "labels": labels.to(torch.int32)}
            write_tensors(work / shard.name, tensors, {})
    if rank != 0:
        while read_manifest(folder) != manifest:
            time.sleep(0.2)
        return
    while not all((work / shard.name).exists() for shard in shards):
        time.sleep(0.2)  # for the other ranks
    # Killed at any line below, the next call finds all shards and does it again.
    if folder.is_dir():
        shutil.rmtree(folder)
    write_json(work / MANIFEST, manifest)
    run_file.unlink()
    os.replace(work, folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a complete folder; empty where there is none."""
    file = folder / MANIFEST
    return read_json(file) if file.exists() else {}


def read_shards(folder: Path, split: str) -> TokenShards:
    """One split of a complete folder.

    Raises:
        FileNotFoundError: a shard of the manifest is missing.
    """
    names = [name for name in read_manifest(folder)["shards"] if name.startswith(f"{split}-")]
    if missing := [name for name in names if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"{folder} lacks the codes {', '.join(missing)}: extract them again."
        )
    return TokenShards([folder / name for name in names])
