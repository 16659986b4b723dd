"""Files that are whole or not there, and a full disk said in a sentence."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class DiskError(OSError):
    """A file that could not be written; the message says what to do."""


@contextmanager
def whole_file(path: Path, make_folder: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to, which is renamed to it once it is on the disk. What was left unfinished is removed.

    Raises:
        DiskError: it could not be written, for instance to a full disk. A file that was there before still is.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        make_durable(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        remedy = "Make room" if is_full(error) else "Mend that"
        raise DiskError(
            f"{unwritten(path.name, path.parent, error)} {remedy}, then give the same command again: it goes on from what is finished."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def unwritten(what: str, folder: Path, error: BaseException) -> str:
    """A sentence: what could not be written where, why, and how much room is left."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**30
    return f"{what} could not be written to {folder} ({_reason(error)}; {free:.1f} GiB are free there)."


def is_full(error: BaseException) -> bool:
    """Whether an error is about a disk, a quota or a file that can hold no more."""
    numbers, words = (
        {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
        ("No space left", "quota exceeded", "File too large"),
    )
    return getattr(error, "errno", None) in numbers or any(text in str(error) for text in words)


def make_durable(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a rename cannot overtake what it is about."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The system's own words where an error was raised because of them."""
    while error.__context__ is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__context__
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
