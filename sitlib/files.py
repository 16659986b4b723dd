"""Files that are complete or not there: models in safetensors, results in JSON, curves in CSV.

Relative paths mean the current folder. A file that cannot be written is a `DiskError`.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from sitlib.strict import ConfigError, from_dict, to_dict

Row = dict[str, float]  # of a training curve
Model = TypeVar("Model", bound=nn.Module)
OTHERS = {  # what is found where a checkpoint should be, by its first bytes
    b"PK": "a .pt file of torch.save, or a zip",
    b"\x80": "a pickle, or an old .pt file of torch.save",
    b"version https://git-lfs": "a pointer of Git LFS: git lfs pull fetches the file",
    b"<": "a web page",
    b"\xff\xd8": "a JPEG",
}


class DiskError(OSError):
    """A file that could not be written; the message says what to do."""


@contextmanager
def atomic_write(path: str | Path, shared: bool = False) -> Iterator[Path]:
    """Yield a path in a hidden folder beside `path`; rename it to `path` once it is on the disk.

    Folders are made, and what a killed process left is removed; not where the file is `shared`, as
    a cache is: then several processes may write it at a time, each in a temporary folder of its
    own. Raises DiskError if it cannot be written; a file that was there before still is.
    """
    path = Path(path)
    name = path.name
    if len(os.fsencode(name)) > 230:  # of 255: names that are legal themselves
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    work = path.with_name(f".{name}{f'.{uuid4().hex[:8]}' if shared else ''}.partial")
    partial = work / path.name  # a folder, because safetensors puts a temporary file beside it
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield partial
        os.umask(mask := os.umask(0o022))  # it can only be read by setting it
        partial.chmod(0o666 & ~mask)  # writers of tensors give 0600
        fsync(partial)
        os.replace(partial, path)
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:
        sentence = cannot_write(path.name, path.parent, error)
        remedy = "Make room or mend that, then give the same command again."
        raise DiskError(f"{sentence} {remedy}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename cannot overtake its content."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(name: str, folder: Path, error: BaseException) -> str:
    """Sentence: what could not be written where, why, and how much room is left."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    while error.__context__ is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__context__  # the system's own words, where there are some
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return f"{name} could not be written to {folder} ({reason}; {free:.1f} GiB are free there)."


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any], shared: bool = False
) -> None:
    """Write tensors to a safetensors file, with plain values as metadata; `shared`: atomic_write."""
    about = {"about": json.dumps(metadata, sort_keys=True)}  # safetensors keeps no order of keys
    with atomic_write(path, shared) as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, about)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Metadata of a file of `write_tensors`; empty where there is no file, or none in it."""
    if not (path := Path(path)).exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, OSError) as error:
        start = b""
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(64)
        what = next((what for magic, what in OTHERS.items() if start.startswith(magic)), error)
        raise ValueError(f"{path} is not a whole safetensors file ({what}).") from None
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{path} has other metadata than sitlib writes.")
    return about


def save_model(path: str | Path, model: nn.Module, **metadata: Any) -> None:
    """Write the weights of `model`, its class, its `config` and further plain values."""
    about = {"class": type(model).__name__, "config": to_dict(model.config), **metadata}
    write_tensors(path, model.state_dict(), about)


def load_model(path: str | Path, cls: type[Model]) -> Model:
    """Read a model that `save_model` wrote, in evaluation mode.

    Its class `cls` takes one argument, `config`, with a dataclass as type. Raises FileNotFoundError
    if there is no file; ValueError if it is damaged, of another class or of another version.
    """
    if not (path := Path(path)).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}: train it first (make repro).")
    metadata = read_metadata(path)
    if (name := metadata.get("class", "no class at all")) != cls.__name__:
        raise ValueError(f"{path} names {name} in its metadata, not {cls.__name__}.")
    weights, config_type = load_file(path), get_type_hints(cls.__init__)["config"]
    for wrapper in ("_orig_mod.", "module.", "model."):  # of torch.compile, DDP, Lightning
        consume_prefix_in_state_dict_if_present(weights, wrapper)
    try:
        model = cls(from_dict(config_type, metadata["config"], "config"))
    except (ConfigError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is of another version of sitlib: {reason}") from None
    if wrong := misfits(weights, model.state_dict()):
        raise ValueError(f"{path} is of another version of sitlib: {wrong}.")
    model.load_state_dict(weights)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError(f"{path} has weights that are not finite: its training failed.")
    return model.eval()


def misfits(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Which weights are missing, unexpected or of another shape, some by name; "" if all fit."""
    shapes = {name: f"{name} {list(weights[name].shape)}" for name in expected if name in weights}
    found = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "wrongly shaped": [
            f"{text} instead of {list(expected[name].shape)}"
            for name, text in shapes.items()
            if weights[name].shape != expected[name].shape
        ],
    }
    more = {what: f" and {len(names) - 3} more" * (len(names) > 3) for what, names in found.items()}
    named = (f"{what} {', '.join(names[:3])}{more[what]}" for what, names in found.items() if names)
    return "; ".join(named)


def write_json(path: str | Path, values: Any, digits: int = 6) -> None:
    """Write plain values as indented JSON, floats with so many significant digits, NaN and infinity as
    null.
    """
    rounded = json.loads(
        json.dumps(values),
        parse_float=lambda text: float(f"{float(text):.{digits}g}"),
        parse_constant=lambda _: None,
    )
    with atomic_write(path) as file:
        file.write_text(json.dumps(rounded, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Plain values of a JSON file."""
    return json.loads(Path(path).read_text())


def write_csv(path: str | Path, rows: list[Row]) -> None:
    """Write a training curve, six significant digits; a value that a row lacks is "nan"."""
    with atomic_write(path) as partial, partial.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def read_csv(path: str | Path) -> dict[str, list[float]]:
    """A training curve as columns."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}
