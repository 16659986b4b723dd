"""Inputs of a stage, as dvc.yaml lists them, and changes of them while the stage ran.

DVC looks at the dependencies of a stage when it ends, so what is edited during a long training
would be taken for what was trained (https://github.com/iterative/dvc/issues/11058).
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from workbook.code_hashes import digest
from workbook.paths import ROOT
from workbook.stages import stage_hashes

SMALL = 2**24  # bytes of a file that is hashed; of a larger one size and time are looked at
EXPRESSION = re.compile(r"\$\{([\w.]+)\}")


def stage_entry(stage: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a stage in dvc.yaml with every `${...}` filled in; {} where none is listed.

    Args:
        keys: those of the command line. The first is the key of `foreach`.
    """
    values = _yaml("params.yaml")
    for file in ("dvc.yaml", "ablations/dvc.yaml"):
        if (entry := _yaml(file)["stages"].get(stage)) is None:
            continue
        values |= _yaml(Path(file).with_name("params.yaml"))
        if "foreach" in entry:
            key = str(next(iter(keys.values()), ""))
            items = values[entry["foreach"].strip("${}")]
            if key not in items:
                return {}
            values |= {"key": key, "item": items[key] if isinstance(items, dict) else key}
            entry = entry["do"]
        return _filled(entry, values)
    return {}


def _filled(entry: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`entry` with every `${...}` replaced by the value of that dotted name."""

    def value(match: re.Match) -> str:
        return json.dumps(str(_value_at(values, match[1])))[1:-1]

    return json.loads(EXPRESSION.sub(value, json.dumps(entry)))


def _yaml(file: str | Path) -> Any:
    path = ROOT / file
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def _value_at(values: Any, path: str) -> Any:
    """The value at a dotted path in nested dictionaries, None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def inputs(stage: str, keys: Mapping[str, Any]) -> dict[str, str]:
    """Name -> hash of everything that a stage depends on: code, files and parameters."""
    entry = stage_entry(stage, keys)
    hashes = {f"the code in {file}": code for file, code in stage_hashes(stage).items()}
    for dependency in entry.get("deps", []):
        if not dependency.startswith("build/code/"):
            hashes |= _file_hashes(ROOT / dependency)
    for item in entry.get("params", []):
        for file, names in (item if isinstance(item, dict) else {"params.yaml": [item]}).items():
            values = _yaml(file)
            hashes |= {f"{name} in {file}": digest(repr(_value_at(values, name))) for name in names}
    return hashes


def _file_hashes(path: Path) -> dict[str, str]:
    """Name, relative to the root -> hash of a file, or of every file in a folder."""
    hashes = {}
    for file in [path] if path.is_file() else path.rglob("*"):
        hidden = any(p.startswith((".", "__pycache__")) for p in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            status = file.stat()
            stamp = f"{status.st_size} {status.st_mtime_ns}"
            is_large = status.st_size > SMALL
            hashes[os.path.relpath(file, ROOT)] = stamp if is_large else digest(file.read_bytes())
    return hashes


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """Names of inputs that are not what they were, or None."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    # Weights that were not there are fetched by the stage itself.
    names = sorted(name for name in names if name in before or not name.startswith("weights/"))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else None


def stale_code(stage: str) -> str | None:
    """Names of what DVC was told of, and this stage would run as other code, or None."""
    path = ROOT / f"build/code/{stage}.json"
    if "DVC_STAGE" not in os.environ or not path.exists():
        return None
    return changed(json.loads(path.read_text()), stage_hashes(stage))
