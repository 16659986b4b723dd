"""Results as files: metrics in JSON, training curves in CSV, both small and readable in a diff.

What cannot be written, for instance to a full disk, is a DiskError.
"""

import csv
import json
from pathlib import Path
from typing import Any

from sitlib.disk import whole_file
from sitlib.paths import resolve

Row = dict[str, float]


def write_metrics(path: str | Path, values: dict[str, Any]) -> None:
    """Writes metrics as JSON, six significant digits."""
    with whole_file(resolve(path)) as file:
        file.write_text(json.dumps(_rounded(values), indent=2) + "\n")


def read_metrics(path: str | Path) -> dict[str, Any]:
    """Metrics that `write_metrics` wrote."""
    return json.loads(resolve(path).read_text())


def write_curve(path: str | Path, rows: list[Row]) -> None:
    """Writes a training curve as CSV, six significant digits; a value that a row lacks is "nan"."""
    with whole_file(resolve(path)) as partial, partial.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def read_curve(path: str | Path) -> dict[str, list[float]]:
    """A training curve as columns."""
    with resolve(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
