"""The benchmark of sampling counts what it says; the check of a GPU runs, scaled down, on a CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from workbook.describe import flops
from workbook.paths import ROOT

SIZES = {"layers": 2, "width": 16, "heads": 2, "codes": 32, "tokens": 8, "batch": 3, "rounds": 1}


@pytest.fixture(scope="module")
def sampling():
    """benchmarks/sampling.py as a module."""
    spec = importlib.util.spec_from_file_location("sampling", ROOT / "benchmarks/sampling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_the_loop_without_a_cache_computes_what_the_one_with_a_cache_does(sampling):
    model = sampling.our_model(Namespace(**SIZES))
    for head in model.heads:  # which start at zero
        torch.nn.init.normal_(head.weight)
    codes, labels = torch.randint(SIZES["codes"], (3, 8)), torch.zeros(3, dtype=torch.int64)
    state, logits = model.prefill(labels)
    for position in range(8):
        torch.testing.assert_close(sampling.next_logits(model, codes[:, :position], labels), logits)
        if position < 7:
            logits = model.decode_one_token(state, codes[:, position])


@torch.no_grad()
def test_the_limit_counts_every_product_of_a_step_and_every_byte_of_the_cache(sampling):
    options, labels = Namespace(**SIZES), torch.zeros(3, dtype=torch.int64)
    model = sampling.our_model(options)
    modules = [*model.transformer.modules(), *model.heads]
    linear = [m.weight.numel() for m in modules if isinstance(m, torch.nn.Linear)]
    assert flops(sampling.products_of_step(options)) == 2 * options.batch * sum(linear)
    cache = model.prefill(labels, options.tokens)[0].cache
    one_position = 4 * sum(layer.numel() for layer in cache.layers) / cache.capacity
    assert sampling.cache_bytes(options) == one_position * sum(range(1, options.tokens + 1))


def test_ratios_to_peers_and_to_the_limit_are_printed(sampling, capsys, monkeypatch):
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
