"""Resumable states of a training run: complete or not there, one run at a time in a folder.

A state is written beside the others, made durable, then renamed; older ones are removed after
that. So whatever is killed, and when, the newest `step-*` folder is complete.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from accelerate import Accelerator
from safetensors import SafetensorError

from sitlib.files import Row, cannot_write, fsync, read_json, write_json
from sitlib.train.distributed import barrier, broadcast_object, rank


class StateError(OSError):
    """A state that cannot be written, or one that cannot be resumed; the message says what to do."""


@contextmanager
def locked(path: Path, what: str = "This very run is being trained") -> Iterator[None]:
    """Hold `path` for this process, by a lock of the operating system that ends with the process.

    Args:
        path: a folder of states, or any name beside them. The lock file stays in a folder `locks`
            beside it: if it were removed, two processes could hold two files of one name.
        what: begins the sentence for those who are refused.

    Raises:
        StateError: another process holds it.
    """
    if rank() > 0:  # rank 0 holds it for all
        yield
        return
    file = lock_file(path)
    lock, holder = filelock.FileLock(file), file.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise StateError(
            f"{what} by {who}: wait until it has finished, or stop it. (If it ended with its "
            f"machine, remove {file}.)"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def lock_file(path: Path) -> Path:
    """The file that `locked` locks for `path`."""
    folder = path.parent / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{path.name}.lock"


def remove_states(folder: str | Path) -> None:
    """Remove the states of a run whose result is safe."""
    shutil.rmtree(folder, ignore_errors=True)


class States:
    """The states of one run in its folder.

    Args:
        folder: holds `run.json` and the newest `step-*`.
        accelerator: has what is saved: models, optimizers, schedules, averages, random states.
        run: plain values that determine the run; a state of other values is refused.
        sharded: models are sharded (FSDP): their states can be read by such runs only.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, run: dict[str, Any], sharded: bool = False
    ):
        self.folder, self.accelerator, self.run = folder, accelerator, json.loads(json.dumps(run))
        self.kind = "sharded" if sharded else "whole"
        if not sharded:  # names of weights do not tell how many processes there were

            def unwrap_weights(models: list, weights: list, _: str) -> None:
                for number, model in enumerate(models):
                    if accelerator.unwrap_model(model) is not model:
                        state = weights[number].items()
                        weights[number] = {k.removeprefix("module."): v for k, v in state}

            def unwrap_models(models: list, _: str) -> None:
                models[:] = [accelerator.unwrap_model(model) for model in models]

            accelerator.register_save_state_pre_hook(unwrap_weights)
            accelerator.register_load_state_pre_hook(unwrap_models)

    def load(self) -> tuple[int, list[Row]]:
        """Restore the newest state; (its step, its curve), or (0, []) where there is none.

        Raises:
            StateError: it is of another run, of sharded models where these are whole (or the
                other way round), or not all processes see it.
        """
        newest = broadcast_object(self._newest())
        if newest is None:
            if rank() == 0:
                write_json(self.folder / "run.json", self.run, digits=17)
            return 0, []
        state = self.folder / newest.name
        if not (state / "progress.json").is_file():
            raise StateError(
                f"Rank 0 resumes from {state}, which is not there for rank {rank()}: all machines "
                "have to share the project's folder, .ckpt included."
            )
        progress, run_file = read_json(state / "progress.json"), self.folder / "run.json"
        if run_file.exists() and (other := read_json(run_file)) != self.run:
            raise StateError(
                f"{self.folder} holds step {progress['step']} of another run "
                f"({'; '.join(_differences(other, self.run))}): remove it to begin anew, or give "
                "another folder."
            )
        if progress["kind"] != self.kind:
            strategy = "fsdp" if progress["kind"] == "sharded" else "single or ddp"
            raise StateError(
                f"The state of step {progress['step']} in {self.folder} is of {progress['kind']} "
                f"models, and engine.strategy asks for {self.kind} ones: set it to {strategy}, or "
                "remove the folder to begin anew."
            )
        scaler = self.accelerator.scaler
        if not (state / "scaler.pt").is_file():  # of a device without one; here it begins anew
            self.accelerator.scaler = None
        self.accelerator.load_state(str(state))
        self.accelerator.scaler = scaler
        return progress["step"], progress["rows"]

    def save(self, step: int, rows: list[Row]) -> None:
        """Write the state after `step` steps, then remove older ones.

        Raises:
            StateError: it could not be written, for instance to a full disk. The last good one is
                still there.
        """
        partial, final = self.folder / "partial", self.folder / f"step-{step:08d}"
        try:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            barrier()
            self.accelerator.save_state(str(partial))
            barrier()
            if rank() == 0:
                progress = {"step": step, "kind": self.kind, "rows": rows}
                (partial / "progress.json").write_text(json.dumps(progress))
                for path in [*partial.rglob("*"), partial]:
                    fsync(path)
        # Writers of tensors report a full disk in ways of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            remedy = "There is no earlier one: make room, then give the same command again."
            if (good := self._newest()) is not None:
                size = sum(file.stat().st_size for file in good.rglob("*")) / 2**30
                remedy = (
                    f"That of {good.name.replace('-', ' ')} is intact and takes {size:.1f} GiB: "
                    "make room for as much, then give the same command again."
                )
            sentence = cannot_write(f"The state of step {step}", self.folder, error)
            raise StateError(f"{sentence} {remedy}") from error
        if rank() == 0:
            older = list(self.folder.glob("step-*"))
            os.replace(partial, final)
            fsync(self.folder)
            for state in older:
                shutil.rmtree(state)
        barrier()

    def _newest(self) -> Path | None:
        return max(self.folder.glob("step-*"), default=None)


def _differences(theirs: Any, ours: Any, key: str = "") -> list[str]:
    """Dotted keys at which two runs differ, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = dict.fromkeys([*theirs, *ours])
        return [
            text
            for name in keys
            for text in _differences(theirs.get(name), ours.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if theirs == ours else [f"{key} {theirs!r}, not {ours!r}"]
