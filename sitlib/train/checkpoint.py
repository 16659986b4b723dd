"""Resumable states of a training run: whole or not there, one run at a time, and a full disk costs nothing.

A state is written beside, made durable, then renamed; older ones are removed after that. So whatever is killed, and when, the newest
`step-*` folder is complete.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from accelerate import Accelerator
from safetensors import SafetensorError

from sitlib.files import Row, cannot_write, fsync
from sitlib.train.distributed import agreed, process_index, wait_for_all


class StateError(OSError):
    """A state that could not be written, or one that cannot be gone on from; the message says what to do."""


@contextmanager
def locked(path: Path, what: str = "This very run is being trained") -> Iterator[None]:
    """Holds `path` for this run. The lock is the operating system's: it ends with the process, however that ends. (Where a file system has
    no locks, it is a file that stays if the machine of the process does not remove it.)

    Args:
        path: a folder of states, or a name beside them for something else that one run at a time may have.
        what: begins the sentence for those who are refused.

    Raises:
        StateError: a process that is alive holds it.
    """
    if process_index() > 0:  # the first process holds it for all
        yield
        return
    file = lock_file(path)
    lock, holder = filelock.FileLock(file), file.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise StateError(
            f"{what} by {who}: wait until it has finished, or stop it. (If it ended with its machine, remove {file}.)"
        ) from None
    try:
        holder.write_text(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def lock_file(path: Path) -> Path:
    """What is locked for `path`: a file in a folder `locks` beside it.

    It stays. If it went with the states, or when it is free, one process could hold the file that is gone and another a new one.
    """
    folder = path.parent / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{path.name}.lock"


class States:
    """The states of a run in its folder.

    Args:
        folder: where they are.
        accelerator: has what is saved: models, optimizers, schedulers, moving averages, random state.
        strategy: how the models are put on processes. A state of sharded models can be read by such only.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, strategy: str):
        self.folder, self.accelerator = folder, accelerator
        self.kind = "sharded" if strategy == "fsdp" else "whole"
        if self.kind == "whole":  # the names of weights do not tell how many processes there were

            def without_wrapper(models: list, weights: list, _: str) -> None:
                weights[:] = [
                    {name.removeprefix("module."): value for name, value in state.items()}
                    if accelerator.unwrap_model(model) is not model
                    else state
                    for model, state in zip(models, weights, strict=True)
                ]

            def unwrap(models: list, _: str) -> None:
                models[:] = [accelerator.unwrap_model(model) for model in models]

            accelerator.register_save_state_pre_hook(without_wrapper)
            accelerator.register_load_state_pre_hook(unwrap)

    def load(self) -> tuple[int, list[Row]]:
        """Restores the newest state; (its step, its curve), or (0, []) where there is none.

        Raises:
            StateError: it was written by a run whose models were sharded and these are not, or the other way round; or not all processes
                see it.
        """
        states = self._found()
        newest = agreed(states[-1].name if states else None)
        if newest is None:
            return 0, []
        state = self.folder / newest
        if not (state / "progress.json").is_file():
            raise StateError(
                f"The first process goes on from {state}, which is not there for process {process_index()}: all machines have to share "
                "the project's folder, .ckpt included."
            )
        progress = json.loads((state / "progress.json").read_text())
        if progress["kind"] != self.kind:
            strategy = "fsdp" if progress["kind"] == "sharded" else "single or ddp"
            raise StateError(
                f"The state of step {progress['step']} in {self.folder} is of {progress['kind']} models, and engine.strategy asks "
                f"for {self.kind} ones: set it to {strategy}, or remove the folder to begin again."
            )
        scaler = self.accelerator.scaler
        if not (
            state / "scaler.pt"
        ).is_file():  # of a device that needs none; this one may begin anew
            self.accelerator.scaler = None
        self.accelerator.load_state(str(state))
        self.accelerator.scaler = scaler
        return progress["step"], progress["rows"]

    def save(self, step: int, rows: list[Row]) -> None:
        """Writes the state after `step` steps, and removes older ones.

        Raises:
            StateError: it could not be written, for instance to a full disk. The last good one is still there.
        """
        partial, final = self.folder / "partial", self.folder / f"step-{step:08d}"
        try:
            if process_index() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            wait_for_all()
            self.accelerator.save_state(str(partial))
            wait_for_all()
            if process_index() == 0:
                progress = {"step": step, "kind": self.kind, "rows": rows}
                (partial / "progress.json").write_text(json.dumps(progress))
                for path in [*partial.rglob("*"), partial]:
                    fsync(path)
        # Writers of tensors report a full disk in ways of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            remedy = "There is no earlier one: make room, then give the same command again."
            if (
                good := self._found()
            ):  # writers do not always say that a disk is full, so say what one takes
                size = sum(file.stat().st_size for file in good[-1].rglob("*")) / 2**30
                remedy = (
                    f"That of {good[-1].name.replace('-', ' ')} is intact and takes {size:.1f} GiB: make room for as much, then give the "
                    "same command again, and training goes on from it."
                )
            raise StateError(
                f"{cannot_write(f'The state of step {step}', self.folder, error)} {remedy}"
            ) from error
        if process_index() == 0:
            older = self._found()
            os.replace(partial, final)
            fsync(self.folder)
            for state in older:
                shutil.rmtree(state)
        wait_for_all()

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
