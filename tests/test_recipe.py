"""Trials of a recipe, tables beside the paper, and the examples of README and docs."""

import csv
import math
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sitlib.data import DataError, open_images
from sitlib.files import save_model
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import ConfigError, from_dict, to_dict
from workbook import trials
from workbook.figures.ablations import trial_rows, trials_plane
from workbook.paths import ROOT
from workbook.profile import changed, load_profile
from workbook.site.compare import change, paper_table, with_interval
from workbook.trials import Trial, TrialList, read_trials, run_trial

VALUES = to_dict(load_profile("smoke"))

# -- trials ----------------------------------------------------------------------------------------------------------------------------


def test_every_trial_of_the_list_is_one_the_quick_profile_accepts():
    values = to_dict(load_profile("quick"))
    listed = from_dict(
        TrialList, yaml.safe_load((ROOT / "profiles/trials/tokenizer.yaml").read_text())
    )
    profiles = [trial.profile(changed(values, listed.common)) for trial in listed.trials]
    assert len(profiles) == len({str(trial) for trial in listed.trials})
    for trial, profile in zip(listed.trials, profiles, strict=True):
        for key, value in (listed.common | trial.changes).items():
            found = profile
            for part in key.split("."):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            assert found == value


def test_a_trial_refuses_a_key_that_the_profile_does_not_have():
    with pytest.raises(
        ConfigError, match="tokenizer.optimizer.speed, which the profile does not have"
    ):
        Trial("Speed", "sit4", {"tokenizer.optimizer.speed": 2}).profile(VALUES)


def test_validation_photographs_are_split_off_for_good():
    source = open_images("data/landscapes", "train")
    most, some = source.split_off(0.2)
    assert not set(most.keys) & set(some.keys) and sorted(most.keys + some.keys) == sorted(
        source.keys
    )
    assert 0.1 < len(some) / len(source) < 0.3
    assert open_images("data/landscapes", "train").split_off(0.2)[1].keys == some.keys
    assert set(source.split_off(0.1)[1].keys) <= set(some.keys)
    with pytest.raises(DataError, match="cannot be split off"):
        source.split_off(0.0)


def test_a_trial_is_trained_judged_and_shown(tmp_path, monkeypatch, weights_folder):
    monkeypatch.setattr(trials, "fetch_weights", lambda: None)
    real = trials.resolve
    monkeypatch.setattr(
        trials, "resolve", lambda path: tmp_path / path if ".ckpt" in str(path) else real(path)
    )
    monkeypatch.setattr(trials, "VALIDATION_VIEWS", 40)
    changes = {
        "tokenizer.loss.lpips": 0.0,
        "tokenizer.optimizer.steps": 5,
        "tokenizer.optimizer.warmup_steps": 1,
    }
    row = run_trial(Trial("Steps", "sit4", changes), VALUES)
    assert 3 < row["psnr"] < 40 and row["change"] == "lpips 0.0, steps 5, warmup_steps 1"
    errors = [float(error) for error in row["error_by_scale"].split()]
    assert len(errors) == 4 and not list((tmp_path / ".ckpt").glob("trial-*"))
    path = tmp_path / "trials.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(
            [
                row | {"change": "as it is", "psnr": 20.0, "lpips_alex": 0.5},
                row | {"psnr": 21.5, "lpips_alex": 0.4},
            ]
        )
    shown = trial_rows(read_trials(path))
    assert [row["change, dB"] for row in shown] == [None, 1.5] and shown[1][
        "ratio"
    ] == pytest.approx(0.8)
    assert trials_plane(read_trials(path)).axes
    assert read_trials(tmp_path / "none.csv") == []


def test_results_of_a_profile_that_has_changed_are_left_out(tmp_path):
    listed = from_dict(TrialList, yaml.safe_load((ROOT / trials.TRIALS).read_text()))
    current = list(trials._runs("quick", trials.TRIALS))
    path = tmp_path / "trials.csv"
    path.write_text(
        "question,change,run\n" + f"b,x,{current[1]}\n" + "old,x,0123\n" + f"a,x,{current[0]}\n"
    )
    found, others = trials.listed_results("quick", results=path)
    assert (
        [row["question"] for row in found] == ["a", "b"]
        and others == 1
        and len(current) == len(listed.trials)
    )


# -- beside the paper ------------------------------------------------------------------------------------------------------------------


def scores(psnr, lpips, sizes=(64,), noise=0.0):
    rng = np.random.default_rng(0)
    names, counts = [f"photo{i}" for i in range(20)], [3] * 20
    hard = rng.normal(0, 3, 20)  # photographs differ far more than models do
    sets = {}
    for size in sizes:
        values = {
            "psnr": (psnr + hard + noise * rng.normal(size=20)).tolist(),
            "lpips_alex": [lpips * size / 64] * 20,
        }
        means = {metric: float(np.mean(v)) for metric, v in values.items()}
        sets[str(size)] = {
            **means,
            "fd_lite0": 10.0,
            "photographs": names,
            "counts": counts,
            "by_photograph": values,
        }
    return {"sets": {"landscapes": sets}}


def test_models_are_compared_on_the_same_photographs():
    ours, baseline = [scores(25.3, 0.18, noise=0.1)], [scores(25.0, 0.20)]
    value, low, high = change(ours, baseline, "psnr", "difference", "landscapes", 64)
    assert (
        low < value < high and abs(value - 0.3) < 0.1 and high - low < 0.2
    )  # paired: not the 3 dB between photographs
    assert change(ours, baseline, "lpips_alex", "ratio", "landscapes", 64) == pytest.approx(
        (0.9, 0.9, 0.9)
    )
    assert with_interval(0.3, 0.1, 0.5, sign="+") == "+0.30 [+0.10, +0.50]"


def test_the_papers_rows_stand_beside_ours():
    found = {
        "vit_vqgan": [scores(25.0, 0.2, (64, 32, 16, 8, 4))],
        "sit4": [scores(25.3, 0.17)],
        "sit5_sc": [scores(25.2, 0.18, (64, 32, 16, 8, 4))],
    }
    rows = {(row["model"], row["px"]): row for row in paper_table(found, "landscapes", 64)}
    assert set(rows) == {
        ("ViT-VQGAN", 64),
        ("SIT-4", 64),
        *(("SIT-SC-5", size) for size in (64, 32, 16, 8, 4)),
        ("ViT-VQGAN", 4),
    }
    eighth, ratios = rows["SIT-SC-5", 8], ("paper LPIPS / ViT-VQGAN's", "LPIPS / ViT-VQGAN's")
    assert eighth["paper, px"] == 32 and eighth["paper PSNR"] == 36.8
    assert [rows["SIT-4", 64][key] for key in ratios] == ["x 0.88", "x 0.85 [0.85, 0.85]"]
    assert [eighth[key].split(" [")[0] for key in ratios] == ["x 0.18", "x 0.11"]


# -- examples -------------------------------------------------------------------------------------------------------------------------


def saved(example, folder):
    """Untrained models where an example looks for trained ones."""
    profile = load_profile("smoke")
    for path in re.findall(r'load_model\(\s*"(.*?)"', example):
        _, kind, name, _ = path.split("/")
        variant = name.split("-seed")[0]
        if kind == "tokenizer":
            save_model(folder / path, SpectralTokenizer(profile.tokenizer_variant(variant)))
            continue
        shape = profile.autoregressive_variant(variant)
        codes = profile.tokenizer_variant(shape.tokenizer)
        sizes = (codes.num_scales, codes.tokens_per_scale, codes.num_codes, codes.num_codebooks)
        texts = (
            TextTokenizer.train(["an emoji of a red apple"], 300, 48).to_json()
            if shape.text
            else None
        )
        classes = [] if texts else ["city", "mountain"]
        config = CodeModelConfig(shape, *sizes, classes, texts)
        save_model(folder / path, AutoregressiveModel(config))


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The examples of Python in README and docs, in a folder that holds what they need."""
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/python.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for example in found:
        saved(example, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)).save(
        "photo.jpg"
    )
    return found


def test_the_examples_of_readme_and_docs_run_as_they_stand(examples):
    reading, enlarging, drawing, applying = {}, {}, {}, {}
    for example, names in zip(examples, (reading, enlarging, drawing, applying), strict=True):
        exec(compile(example, "an example", "exec"), names)
    assert reading["codes"].shape == (1, 5, 16) and reading["codes"].dtype == torch.int64
    assert reading["image"].shape == (1, 3, 64, 64) and reading["preview"].shape == (1, 3, 16, 16)
    assert enlarging["whole"].shape == (1, 3, 90, 150)
    assert not math.isnan(float(enlarging["whole"].sum()))
    assert drawing["codes"].shape == (4, 5, 16) and drawing["images"].shape == (4, 3, 64, 64)
    assert drawing["previews"].shape == (4, 3, 8, 8)
    assert torch.equal(
        drawing["finished"], drawing["codes"]
    )  # the same seed goes on in the same way
    assert applying["shown"].images.shape == (8, 3, 8, 8)
    assert all(applying[name].shape == (1, 3, 64, 64) for name in ("apple", "large", "green"))
