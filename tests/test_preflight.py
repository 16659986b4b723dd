"""What is looked for before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sitlib.data import DataError
from sitlib.strict import ConfigError
from workbook.params import pipeline_params
from workbook.preflight import check_images
from workbook.profile import load_profile

SMOKE = load_profile("smoke")
FEW = {"tokenizers": ["sit4-seed0"], "generators": ["ar_sit4-seed0"]}  # of the pipeline's lists


def with_images(source: str | Path):
    """The smoke profile, whose tokenizers and class-conditional models learn from other images."""
    return replace(SMOKE, data=replace(SMOKE.data, source=str(source)))


def write_images(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(file)


def test_it_says_what_there_is(capsys):
    check_images(SMOKE, pipeline_params())
    said = capsys.readouterr().out.splitlines()
    assert "data/landscapes: 231 images to train tokenizers on." in said
    assert "data/landscapes: 10 classes, of 193 images for training and 35 held out." in said
    assert any("captions of 2,987 images" in line for line in said)


def test_images_without_classes_are_found_before_a_tokenizer_is_trained_for_them(tmp_path):
    write_images(tmp_path / "train/red/0.png", tmp_path / "val/0.png")
    with pytest.raises(DataError, match="None of the 1 images of the split 'test' .* has a class"):
        check_images(with_images(tmp_path), FEW)
    check_images(with_images(tmp_path), {**FEW, "generators": {}})  # tokenizers do not need them
    with pytest.raises(DataError, match="There are no images"):
        check_images(with_images(tmp_path / "nowhere"), FEW)


def test_captions_and_variants_that_are_not_there_are_found(tmp_path):
    text = SMOKE.text
    captions = replace(text.captions, source="data/emoji/captions_{split}.json")
    with pytest.raises(DataError, match="There are no captions: no file .*captions_train.json"):
        check_images(replace(SMOKE, text=replace(text, captions=captions)), FEW)
    asked = replace(text.evaluation, prompts=10_000)
    with pytest.raises(DataError, match=r"text\.evaluation\.prompts is 10000, but .* has only"):
        check_images(replace(SMOKE, text=replace(text, evaluation=asked)), FEW)
    few = replace(SMOKE.applications, images=100, repeated=10)
    asked = replace(text.evaluation, prompts=100, candidates=100)
    with pytest.raises(DataError, match=r"raise applications.images: .*, too few for .* = 100"):
        many = replace(text, evaluation=asked)
        check_images(replace(SMOKE, text=many, applications=few), FEW)
    with pytest.raises(ConfigError, match="sit44"):
        check_images(SMOKE, {**FEW, "tokenizers": ["sit44-seed0"]})
