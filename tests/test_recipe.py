"""Tables beside the paper, and the examples of README and docs."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sitlib.files import save_model
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.site.compare import change, with_interval

# -- beside the paper ------------------------------------------------------------------------------------------------------------------


def scores(psnr, lpips, sizes=(64,), noise=0.0):
    rng = np.random.default_rng(0)
    names, counts = [f"photo{i}" for i in range(20)], [3] * 20
    hard = rng.normal(0, 3, 20)  # photographs differ far more than models do
    sets = {}
    for size in sizes:
        values = {"psnr": (psnr + hard + noise * rng.normal(size=20)).tolist()}
        values["lpips_alex"] = [lpips * size / 64] * 20
        means = {metric: float(np.mean(v)) for metric, v in values.items()}
        about = {"photographs": names, "counts": counts, "by_photograph": values}
        sets[str(size)] = {**means, "fd_lite0": 10.0, **about}
    return {"sets": {"landscapes": sets}}


def test_models_are_compared_on_the_same_photographs():
    ours, baseline = [scores(25.3, 0.18, noise=0.1)], [scores(25.0, 0.20)]
    value, low, high = change(ours, baseline, "psnr", "difference", "landscapes", 64)
    assert low < value < high and abs(value - 0.3) < 0.1
    assert high - low < 0.2  # paired: not the 3 dB between photographs
    ratios = change(ours, baseline, "lpips_alex", "ratio", "landscapes", 64)
    assert ratios == pytest.approx((0.9, 0.9, 0.9))
    assert with_interval(0.3, 0.1, 0.5, sign="+") == "+0.30 [+0.10, +0.50]"


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
        condition = (["city", "mountain"], None)
        if shape.text:
            condition = ([], TextTokenizer.train(["an emoji of a red apple"], 300, 48).to_json())
        config = CodeModelConfig(shape, *sizes, *condition)
        save_model(folder / path, AutoregressiveModel(config))


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The examples of Python in README and docs, in a folder that holds what they need."""
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/python.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for example in found:
        saved(example, tmp_path)
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
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
    assert torch.equal(drawing["finished"], drawing["codes"])  # the same seed goes on alike
    assert applying["shown"].images.shape == (8, 3, 8, 8)
    assert all(applying[name].shape == (1, 3, 64, 64) for name in ("apple", "large", "green"))
