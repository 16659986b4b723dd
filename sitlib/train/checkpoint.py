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
    """A state that cannot be written, or not be resumed; the message says what to do."""


@contextmanager
def locked(path: Path, what: str = "This very run is being trained") -> Iterator[None]:
    """Hold `path`, a folder of states or any name beside them, for this process.

    The lock is the operating system's and ends with the process. Its file stays in a folder `locks`
    beside `path`: if it were removed, two processes could hold two files of one name. Whoever is
    refused gets a StateError that begins with `what`.
    """
    if rank() > 0:  # rank 0 holds it for all
        yield
        return
    file = path.parent / "locks" / f"{path.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    holder = file.with_suffix(".holder")
    try:
        with filelock.FileLock(file, timeout=0):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except filelock.Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        remedy = "wait until it has finished, or stop it. (If it ended with its machine, remove"
        raise StateError(f"{what} by {who}: {remedy} {file}.)") from None


class States:
    """The states of one run in its folder: `run.json`, and the newest one in `step-*`.

    The accelerator has what is saved; a state of other plain values `run` is refused.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, run: dict[str, Any]):
        self.folder, self.accelerator, self.run = folder, accelerator, json.loads(json.dumps(run))

        # Names of weights do not tell how many processes there were.
        def without_wrapper(models: list, weights: list, _: str) -> None:
            for state in weights:
                consume_prefix_in_state_dict_if_present(state, "module.")

        def unwrap(models: list, _: str) -> None:
            models[:] = [accelerator.unwrap_model(model) for model in models]

        accelerator.register_save_state_pre_hook(without_wrapper)
        accelerator.register_load_state_pre_hook(unwrap)

    def load(self) -> tuple[int, list[Row]]:
        """Restore the newest state; (its step, its curve), or (0, []) where there is none."""
        state = broadcast_object(max(self.folder.glob("step-*"), default=None))
        about = self.folder / "run.json"
        if state is None:
            if rank() == 0:
                write_json(about, self.run, digits=17)
            return 0, []
        progress, ours = read_json(state / "progress.json"), _flat(self.run)
        theirs = _flat(read_json(about)) if about.exists() else ours
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        differences = [f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}" for key in keys]
        if differences:
            other = f"step {progress['step']} of another run ({'; '.join(differences)})"
            remedy = "remove it to begin anew, or give another folder."
            raise StateError(f"{self.folder} holds {other}: {remedy}")
        scaler = self.accelerator.scaler
        if not (state / "scaler.pt").is_file():  # of a device without one; here it begins anew
            self.accelerator.scaler = None
        self.accelerator.load_state(str(state))
        self.accelerator.scaler = scaler
        return progress["step"], progress["rows"]

    def save(self, step: int, rows: list[Row]) -> None:
        """Write the state after `step` steps, then remove older ones; StateError on a full disk."""
        partial, older = self.folder / "partial", sorted(self.folder.glob("step-*"))
        try:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            barrier()
            self.accelerator.save_state(str(partial))
            barrier()
            if rank() == 0:
                progress = json.dumps({"step": step, "rows": rows})
                (partial / "progress.json").write_text(progress)
                for path in [*partial.rglob("*"), partial]:
                    fsync(path)
        # Writers of tensors report a full disk in ways of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            good = f"{older[-1].name.replace('-', ' ')} is intact" if older else "there is none yet"
            sentence = cannot_write(f"The state of step {step}", self.folder, error)
            remedy = "Make room, then give the same command again"
            raise StateError(f"{sentence} {remedy}: {good}.") from error
        if rank() == 0:
            os.replace(partial, self.folder / f"step-{step:08d}")
            fsync(self.folder)
            for state in older:
                shutil.rmtree(state)
        barrier()


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted keys."""
    if not isinstance(values, dict):
        return {key: values}
    items = [_flat(value, f"{key}.{name}".lstrip(".")) for name, value in values.items()]
    return {dotted: value for item in items for dotted, value in item.items()}
