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
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from sitlib.files import Row, cannot_write, fsync, read_json, write_json
from sitlib.train.distributed import barrier, broadcast_object, rank


class StateError(OSError):
    """A state that cannot be written, or one that cannot be resumed; the message says what to do."""


@contextmanager
def locked(path: Path, what: str = "This very run is being trained") -> Iterator[None]:
    """Hold `path`, a folder of states or any name beside them, for this process.

    The lock is the operating system's and ends with the process. Its file stays in a folder `locks`
    beside `path`: if it were removed, two processes could hold two files of one name.

    Args:
        what: begins the sentence for those who are refused.

    Raises:
        StateError: another process holds it.
    """
    if rank() > 0:  # rank 0 holds it for all
        yield
        return
    file = path.parent / "locks" / f"{path.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
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
        self.strategy = "fsdp" if sharded else "single or ddp"
        if sharded:
            return

        # Names of weights do not tell how many processes there were.
        def without_wrapper(models: list, weights: list, _: str) -> None:
            for state in weights:
                consume_prefix_in_state_dict_if_present(state, "module.")

        def unwrap(models: list, _: str) -> None:
            models[:] = [accelerator.unwrap_model(model) for model in models]

        accelerator.register_save_state_pre_hook(without_wrapper)
        accelerator.register_load_state_pre_hook(unwrap)

    def load(self) -> tuple[int, list[Row]]:
        """Restore the newest state; (its step, its curve), or (0, []) where there is none.

        Raises:
            StateError: it is of another run, of sharded models where these are whole (or the
                other way round), or not all processes see it.
        """
        newest, about = broadcast_object(self._newest()), self.folder / "run.json"
        if newest is None:
            if rank() == 0:
                write_json(about, self.run, digits=17)
            return 0, []
        state = self.folder / newest.name
        if not (state / "progress.json").is_file():
            raise StateError(
                f"Rank 0 resumes from {state}, which is not there for rank {rank()}: all machines "
                "have to share the project's folder, .ckpt included."
            )
        progress = read_json(state / "progress.json")
        theirs, ours = _flat(read_json(about)) if about.exists() else {}, _flat(self.run)
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if theirs and keys:
            differences = (f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}" for key in keys)
            raise StateError(
                f"{self.folder} holds step {progress['step']} of another run "
                f"({'; '.join(differences)}): remove it to begin anew, or give another folder."
            )
        if progress["strategy"] != self.strategy:
            raise StateError(
                f"{self.folder} holds a state of engine.strategy {progress['strategy']}: set that, "
                "or remove the folder to begin anew."
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
                progress = {"step": step, "strategy": self.strategy, "rows": rows}
                (partial / "progress.json").write_text(json.dumps(progress))
                for path in [*partial.rglob("*"), partial]:
                    fsync(path)
        # Writers of tensors report a full disk in ways of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            good = self._newest()
            intact = (
                f"{good.name.replace('-', ' ')} is intact" if good else "there is no earlier one"
            )
            sentence = cannot_write(f"The state of step {step}", self.folder, error)
            raise StateError(
                f"{sentence} Make room, then give the same command again: {intact}."
            ) from error
        if rank() == 0:
            older = list(self.folder.glob("step-*"))
            os.replace(partial, final)
            fsync(self.folder)
            for state in older:
                shutil.rmtree(state)
        barrier()

    def _newest(self) -> Path | None:
        return max(self.folder.glob("step-*"), default=None)


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted keys."""
    if not isinstance(values, dict):
        return {key: values}
    items = [_flat(value, f"{key}.{name}".lstrip(".")) for name, value in values.items()]
    return {dotted: value for item in items for dotted, value in item.items()}
