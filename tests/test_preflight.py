"""What is looked for before anything is trained."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torchmetrics.image.fid
from PIL import Image

from sitlib.data import DataError
from sitlib.metrics import InceptionError
from sitlib.strict import ConfigError
from workbook.preflight import check_images, main
from workbook.profile import load_profile
from workbook.runs import pipeline_parameters

SMOKE = load_profile("smoke")


def with_images(source: str | Path):
    """The smoke profile, whose tokenizers and class-conditional models learn from other images."""
    return replace(SMOKE, data=replace(SMOKE.data, source=str(source)))


def write_images(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(file)


def test_it_says_what_there_is(capsys):
    check_images(SMOKE, pipeline_parameters())
    said = capsys.readouterr().out.splitlines()
    assert "data/landscapes: 231 images to train tokenizers on." in said
    assert "data/landscapes: 10 classes, of 193 images for training and 35 held out." in said
    assert any("captions of 3,034 images" in line for line in said)


def test_images_without_classes_are_found_before_a_tokenizer_is_trained_for_them(tmp_path):
    write_images(tmp_path / "train/red/0.png", tmp_path / "val/0.png")
    lists = pipeline_parameters()
    with pytest.raises(DataError, match="None of the 1 images of the split 'test' .* has a class"):
        check_images(with_images(tmp_path), lists)
    check_images(with_images(tmp_path), {**lists, "generators": []})  # tokenizers do not need them
    with pytest.raises(DataError, match="no data source"):
        check_images(with_images(tmp_path / "nowhere"), lists)


def test_captions_and_variants_that_are_not_there_are_found(tmp_path):
    lists = pipeline_parameters()
    text = SMOKE.text
    captions = replace(text.captions, source="data/emoji/captions_{split}.json")
    with pytest.raises(DataError, match="no captions: there is no file .*captions_train.json"):
        check_images(replace(SMOKE, text=replace(text, captions=captions)), lists)
    asked = replace(text.evaluation, prompts=10_000)
    with pytest.raises(DataError, match=r"text\.evaluation\.prompts is 10000, but .* has only"):
        check_images(replace(SMOKE, text=replace(text, evaluation=asked)), lists)
    with pytest.raises(ConfigError, match="sit44"):
        check_images(SMOKE, {**lists, "tokenizers": ["sit44"]})


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_number_of_nodes_is_all_that_a_job_asks_first(nodes, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", nodes)
    monkeypatch.setattr(sys, "argv", ["preflight", "--profile", "paper", "--nodes"])
    if nodes == "1":
        main()
    else:
        with pytest.raises(
            ValueError, match=r"has 2 node\(s\), and engine\.machines of the profile is 1"
        ):
            main()
    assert capsys.readouterr().out == ""


def test_a_missing_inception_network_is_found_out_first(monkeypatch, capsys):
    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    for profile in ("paper", "smoke"):  # which asks for none
        monkeypatch.setattr(sys, "argv", ["preflight", "--profile", profile])
        with (
            pytest.raises(InceptionError, match="pip install")
            if profile == "paper"
            else nullcontext()
        ):
            main()
    assert "held-out images" in capsys.readouterr().out
