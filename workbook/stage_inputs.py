"""Inputs of a stage, as dvc.yaml lists them, and changes of them while the stage ran.

DVC looks at the dependencies of a stage when it ends, so what is edited during a long training
would be taken for what was trained (https://github.com/iterative/dvc/issues/11058).
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from workbook.code_hashes import digest
from workbook.paths import ROOT
from workbook.stages import stage_hashes

FILES = ("dvc.yaml", "ablations/dvc.yaml")
SMALL = 2**24  # bytes of a file that is hashed; of a larger one size and time are looked at
EXPRESSION = re.compile(r"\$\{([\w.]+)\}")


def described(stage: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a stage in dvc.yaml with every `${...}` filled in; {} where none is listed.

    Args:
        keys: those of the command line. The first is the key of `foreach`.
    """
    context = read_yaml("params.yaml")
    for file in FILES:
        entry = read_yaml(file)["stages"].get(stage)
        if entry is None:
            continue
        context |= read_yaml(Path(file).with_name("params.yaml"))
        if "foreach" in entry:
            key = str(next(iter(keys.values()), ""))
            items = context[entry["foreach"].strip("${}")]
            if key not in items:
                return {}
            context |= {"key": key, "item": items[key] if isinstance(items, dict) else key}
            entry = entry["do"]
        return _filled(entry, context)
    return {}


def read_yaml(file: str | Path) -> Any:
    """Content of a YAML file of the project; {} if there is none."""
    path = ROOT / file
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def value_at(values: Any, path: str) -> Any:
    """The value at a dotted path in nested dictionaries, None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _filled(entry: Any, context: Mapping[str, Any]) -> Any:
    if isinstance(entry, dict):
        pairs = ((_filled(key, context), value) for key, value in entry.items())
        return {key: _filled(value, context) for key, value in pairs}
    if isinstance(entry, list):
        return [_filled(item, context) for item in entry]
    if isinstance(entry, str):
        return EXPRESSION.sub(lambda match: str(value_at(context, match[1])), entry)
    return entry


def inputs(stage: str, keys: Mapping[str, Any]) -> dict[str, str]:
    """Name -> hash of everything that a stage depends on: code, files and parameters."""
    entry = described(stage, keys)
    hashes = {f"the code in {file}": code for file, code in stage_hashes(stage).items()}
    for dependency in entry.get("deps", []):
        if not dependency.startswith("build/code/"):
            hashes |= {name: _file_hash(ROOT / name) for name in _files(dependency)}
    for item in entry.get("params", []):
        sections = item if isinstance(item, dict) else {"params.yaml": [item]}
        for file, names in sections.items():
            values = read_yaml(file)
            hashes |= {f"{name} in {file}": digest(repr(value_at(values, name))) for name in names}
    return hashes


def _files(dependency: str) -> Iterator[str]:
    """Files of a dependency, a file or a folder, relative to the root."""
    path = ROOT / dependency
    if not path.is_dir():
        yield from [dependency] if path.exists() else []
        return
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        yield from (os.path.relpath(os.path.join(folder, name), ROOT) for name in names)


def _file_hash(path: Path) -> str:
    status = path.stat()
    if status.st_size > SMALL:
        return f"{status.st_size} {status.st_mtime_ns}"
    return digest(path.read_bytes())


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """A sentence if inputs are not what they were, or None."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    # Weights that were not there are fetched by the stage itself.
    names = sorted(name for name in names if name in before or not name.startswith("weights/"))
    if not names:
        return None
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def stale_code(stage: str) -> str | None:
    """A sentence if DVC was told of other code than this stage runs now, or None."""
    path = ROOT / f"build/code/{stage}.json"
    if "DVC_STAGE" not in os.environ or not path.exists():
        return None
    return changed(json.loads(path.read_text()), stage_hashes(stage))
