"""The recipes of CONTRIBUTING.md, followed."""

import re

import pytest
import torch
import tree
import yaml

from sitlib.metrics import METRICS, Metric, evaluate_reconstructions
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import from_dict, to_dict
from workbook.paths import ROOT
from workbook.profile import Profile, load_profile
from workbook.study import Grid

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SNIPPETS = [
    yaml.safe_load(snippet) for snippet in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
]


def smoke(variant: dict) -> SpectralTokenizer:
    values = to_dict(load_profile("smoke"))
    values["tokenizer"]["variants"]["new"] = variant
    return SpectralTokenizer(from_dict(Profile, values).tokenizer_variant("new")).eval()


def test_a_variant_is_a_line_and_runs():
    (name, variant), *_ = SNIPPETS[0].items()
    assert name == "sit4_sc"
    tokenizer = smoke(variant)
    assert tokenizer.reconstruct(torch.rand(2, 3, 64, 64)).shape == (2, 3, 64, 64)
    assert tokenizer.sizes == [8, 16, 32, 64]  # as scale-causal attention promises


def test_an_ablation_is_a_line():
    (name, row), *_ = SNIPPETS[1].items()
    values = yaml.safe_load((ROOT / "study/params.yaml").read_text())
    values["rows"][name] = row
    found = from_dict(Grid, values).row_profile(name).tokenizer_variant(f"row_{name}")
    assert found.wavelet == "sym4" and not found.scale_mixing


def test_a_metric_is_a_function_and_an_entry(monkeypatch):
    def error(images, references):
        return (images - references).abs().mean(dim=(1, 2, 3))

    monkeypatch.setitem(METRICS, "mean_error", Metric(error, "mean error", 3, False))
    images = torch.full((6, 3, 16, 16), 0.5)
    off = images + torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])[:, None, None, None]
    scores = evaluate_reconstructions(images, off, list("aabbcc"), metrics=["mean_error"])
    assert scores["mean_error"] == pytest.approx(0.2)
    assert scores["by_photograph"]["mean_error"] == pytest.approx([0.1, 0.2, 0.3])
    low, high = scores["intervals"]["mean_error"]
    assert 0.099 < low < 0.2 < high < 0.301


def test_a_notebook_recipe_names_what_there_is():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "sampling_speed" in stages and "report" in stages
    for path in re.findall(r"`(sitlib/[\w/]+\.py|tests/[\w/]+\.py|[\w/]+\.yaml)`", TEXT):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_the_tree_in_readme_is_that_of_the_files():
    readme = (ROOT / "README.md").read_text()
    assert tree.with_tree(readme) == readme, "run python scripts/tree.py --write"
