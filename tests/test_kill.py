"""Kill anything, lose nothing: real trainings and the extraction of codes, with SIGKILL at random moments again and again."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbook.paths import ROOT


def results(folder: Path) -> dict[str, object]:
    """Content of every file but locks; of a curve without the seconds."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return {str(file.relative_to(folder)): content(file) for file in files}


def content(file: Path) -> object:
    if file.suffix != ".csv":
        return file.read_bytes()
    with file.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row.pop("seconds")]


@pytest.mark.parametrize("what", ["tokenizer", "generator", "codes"])
def test_what_is_killed_at_random_moments_ends_with_the_same_bits(tmp_path, what):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/killed.py"), what, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = (results(tmp_path / name) for name in ("whole", "killed"))
    assert whole and whole.keys() == killed.keys()  # the states are gone, too
    for name, value in whole.items():
        assert value == killed[name], name
    if what == "tokenizer":  # everything that has a state was at work
        rows = whole["metrics/curves/tokenizer/sit-seed0.csv"]
        assert sum(float(row["restarted"]) for row in rows) > 0
        assert all(
            math.isfinite(float(rows[-1][name])) for name in ("adversarial", "gradient_penalty")
        )
    if what == "codes":
        assert sum(name.startswith("codes/train-") for name in whole) == 40
