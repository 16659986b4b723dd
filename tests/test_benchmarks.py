"""The benchmark of sampling runs beside its peers; the check of a GPU runs, scaled down, on a CPU."""

import json
import os
import re
import subprocess
import sys

import pytest
from tiny import script

from workbook.paths import ROOT

SIZES = {"layers": 2, "width": 16, "heads": 2, "codes": 32, "tokens": 8, "batch": 3, "rounds": 1}


def test_ratios_to_peers_and_to_the_limit_are_printed(capsys, monkeypatch):
    sampling = script("benchmarks/sampling.py")
    pytest.importorskip("transformers")
    sampling.main([f"--{name}={value}" for name, value in SIZES.items()])
    printed = capsys.readouterr().out
    peers = ("GPT-2 generate, static", "GPT-2 generate, default")
    for name in ("sitlib", "a scale in 8 passes", *peers, "sitlib, no cache"):
        assert re.search(rf"{name} .* [\d.]+ x sitlib's time, [\d.]+ x the limit's", printed)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[peers\]'"):
        sampling.main([])


@pytest.mark.slow
def test_every_part_of_the_gpu_check_runs_and_writes_what_it_found(tmp_path):
    environment = {**os.environ, "SCALE": "tiny", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "scripts/gpu_check.sh")]
    subprocess.run(script, env=environment, capture_output=True, timeout=900)
    ended = dict(line.split(": ") for line in (tmp_path / "summary.txt").read_text().splitlines())
    assert [*ended] == ["machine", "tests", "precision", "steps", "sampling", "train"]
    logs = {name: (tmp_path / f"{name}.log").read_text()[-2000:] for name in ended}
    for name, sentence in ended.items():
        # The peers of sampling are an extra, which need not be installed.
        if name != "sampling" or "pip install" not in logs[name]:
            assert sentence.startswith("exit code 0"), logs[name]
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [row["model"] for row in rows] == ["sit4", "ar_sit4"]
    assert all(row["seconds"] > 0 and row["described_gib"] > 0 for row in rows)
    assert (tmp_path / "sit5_sc.csv").exists() and (tmp_path / "model.safetensors").exists()
