"""Codes on disk: a folder of safetensors shards and a manifest, made by any number of processes, read memory-mapped.

A shard holds `codes` [m, S, N], uint16 where the vocabulary permits, and `labels` [m] int32. The shards of a folder follow from its run
alone, not from who makes which. Processes that are given the same work share it: each takes a shard that nobody works on. What a killed
process left half-made is taken by another one, or by the next call, which finds the finished shards and ends with the same bytes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from sitlib.data.order import EpochOrder
from sitlib.files import atomic_write, write_tensors
from sitlib.paths import ROOT, resolve
from sitlib.strict import digest
from sitlib.train.checkpoint import StateError, lock_file

SHARD_BYTES = 2**27  # of codes, at most (but at least one batch)
MANIFEST = "manifest.json"
ALIVE = ".alive"  # of files that a process locks as long as it makes shards


class CodeMaps:
    """Codes of one split: as a tensor [M, S, N] that is read from disk where it is indexed, as int64.

    Attributes:
        shape: [M, S, N].
        labels: int64 [M].
        order: of the code maps in every epoch.
    """

    def __init__(self, files: list[Path]):
        self._files = files
        self._parts = [_mapped(file, "codes") for file in files]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self.labels = torch.cat(
            [torch.from_numpy(_mapped(file, "labels").astype(np.int64)) for file in files]
        )
        self.shape = torch.Size([int(self._starts[-1]), *self._parts[0].shape[1:]])
        self.order = EpochOrder(np.diff(self._starts))
        self._rows = np.arange(
            len(self)
        )  # made once: there are millions, and every batch asks for some

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | np.ndarray | slice) -> Tensor:
        """Codes [m, S, N] int64 of some rows."""
        rows = self._rows[rows.numpy() if isinstance(rows, Tensor) else rows]
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        found = np.empty((len(rows), *self.shape[1:]), np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            found[chosen] = self._parts[shard][rows[chosen] - self._starts[shard]]
        return torch.from_numpy(found)


def _mapped(file: Path, name: str) -> np.ndarray:
    with safe_open(file, framework="pt") as content:
        return content.get_tensor(name).numpy()  # its pages are read when they are touched


@dataclass(frozen=True)
class Job:
    """A shard: some batches of one split."""

    split: str
    number: int
    batches: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.safetensors"


def jobs(batches: dict[str, int], batch_bytes: int) -> list[Job]:
    """The shards of a folder.

    Args:
        batches: of every split.
        batch_bytes: of the codes of one.
    """
    per_shard = max(1, SHARD_BYTES // batch_bytes)
    return [
        Job(split, number, range(first, min(first + per_shard, count)))
        for split, count in batches.items()
        for number, first in enumerate(range(0, count, per_shard))
    ]


def make_shards(
    output: str | Path,
    identity: str,
    wanted: list[Job],
    make: Callable[[Job], tuple[Tensor, Tensor]],
    about: dict[str, Any],
    num_codes: int,
) -> None:
    """Makes the shards that are not there yet, and then the folder `output` in place of what it was.

    Args:
        output: the folder, which has a manifest only when it is complete.
        identity: of everything that determines the shards. Unfinished ones are kept beside `output` under this name.
        make: codes [m, S, N] and labels [m] of a shard; called for some of the shards where other processes make others.
        about: plain values for the manifest.
        num_codes: codes are below it.

    Raises:
        StateError: a living process makes codes of another identity in the same place, or has put them there.
        DiskError: a shard could not be written, for instance to a full disk. The finished ones stay.
    """
    output = resolve(output)
    # Not in the manifest: equal codes should be equal files, whatever the code and the images from which they were made.
    finished = output.with_name(f".{output.name}.finished")
    work = output.with_name(f".{output.name}.{identity}")
    shards = work / "shards"
    place = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    gate = FileLock(lock_file(resolve(".ckpt") / f"codes-{output.name}-{digest(str(place))}"))
    with ExitStack() as life:
        with gate:  # while others neither come nor finish
            if (output / MANIFEST).exists() and _text(finished) == identity:
                shutil.rmtree(
                    work, ignore_errors=True
                )  # locks of a process that was killed at its end
                return
            for other in output.parent.glob(f".{output.name}.*"):
                if other != work and _is_alive(other):
                    raise StateError(
                        f"{output} is being made by another run, with other settings, images or code (in {other.name}): wait until it has "
                        "finished, or stop it."
                    )
            shards.mkdir(parents=True, exist_ok=True)
            life.enter_context(FileLock(work / f"{uuid4().hex}{ALIVE}"))
        for job in _claimed(wanted, work, shards):
            codes, labels = make(job)
            dtype = torch.uint16 if num_codes <= 2**16 else torch.int32
            # A name of its own: without locks between machines two may make the same shard.
            whole = work / f"{uuid4().hex}-{job.name}"
            write_tensors(whole, {"codes": codes.to(dtype), "labels": labels.to(torch.int32)}, {})
            if shards.exists():
                os.replace(whole, shards / job.name)
            else:  # published meanwhile by one that did not see our lock
                whole.unlink()
        with gate:
            if all((shards / job.name).exists() for job in wanted):
                manifest = {**about, "shards": [job.name for job in wanted]}
                _publish(shards, output, manifest, finished, identity)
            life.close()
            if not shards.exists():  # published, by this process or another: the last one clears up
                # Also what earlier runs have left, which this one replaces.
                for left in output.parent.glob(f".{output.name}.*"):
                    if not _is_alive(left):
                        shutil.rmtree(left, ignore_errors=True)
    if _text(finished) != identity:
        raise StateError(
            f"{output} was made by another run meanwhile: give the same command again."
        )


def _publish(
    shards: Path, output: Path, manifest: dict[str, Any], finished: Path, identity: str
) -> None:
    """Puts all shards in the place of `output`; killed at any line, the next call does it again."""
    with atomic_write(shards / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=1))
    finished.unlink(missing_ok=True)  # from here on `output` is nobody's
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)  # codes of earlier versions were one file
    with atomic_write(finished) as file:
        file.write_text(identity)
    os.replace(shards, output)


def _is_alive(work: Path) -> bool:
    """Whether a process makes shards there: every one holds a lock of its own from its beginning to its end."""
    for file in work.glob(f"*{ALIVE}"):
        try:
            with FileLock(file, timeout=0):
                continue
        except Timeout:
            return True
    return False


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _claimed(wanted: list[Job], work: Path, shards: Path) -> Iterator[Job]:
    """Shards that are not there, each while nobody else works on it; ends when all are there or the folder is finished."""
    wait = 0.0  # first what nobody has taken, then what others have and may not finish
    while left := [job for job in wanted if shards.exists() and not (shards / job.name).exists()]:
        for job in left:
            try:
                with FileLock(work / f"{job.name}.lock", timeout=wait):
                    if shards.exists() and not (shards / job.name).exists():
                        yield job
            except (Timeout, FileNotFoundError):
                continue
        wait = 1.0


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a complete folder says of itself; empty where there is none."""
    file = resolve(folder) / MANIFEST
    return json.loads(file.read_text()) if file.exists() else {}


def read_maps(folder: str | Path, split: str) -> CodeMaps:
    """One split of a complete folder.

    Raises:
        FileNotFoundError: a shard of the manifest is missing.
    """
    folder = resolve(folder)
    files = [
        folder / name for name in read_manifest(folder)["shards"] if name.startswith(f"{split}-")
    ]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(
            f"{folder} lacks the codes {', '.join(missing)}: extract them again."
        )
    return CodeMaps(files)
