"""The examples of README and docs."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from workbook.paths import ROOT


@pytest.fixture
def examples(trained, tmp_path, monkeypatch):
    """The examples of Python in README and docs, in a folder that holds what they need."""
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/python.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "models").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (270, 300, 3), dtype=np.uint8)
    Path("docs").mkdir()
    Image.fromarray(pixels).save("docs/photo.jpg")
    return found


def test_the_examples_of_readme_and_docs_run_as_they_stand(examples):
    reading, enlarging, drawing, applying = {}, {}, {}, {}
    for example, names in zip(examples, (reading, enlarging, drawing, applying), strict=True):
        exec(compile(example, "an example", "exec"), names)
    assert reading["codes"].shape == (1, 5, 256) and reading["codes"].dtype == torch.int64
    assert reading["image"].shape == (1, 3, 256, 256)
    assert reading["preview"].shape == (1, 3, 64, 64)
    assert enlarging["whole"].shape == (1, 3, 270, 300)
    assert not math.isnan(float(enlarging["whole"].sum())) and not enlarging["is_whole"]
    assert enlarging["preview"].shape[3] in (19, 38, 75, 150)
    assert drawing["codes"].shape == (2, 5, 256) and drawing["images"].shape == (2, 3, 256, 256)
    assert drawing["previews"].shape == (2, 3, 32, 32)
    assert torch.equal(drawing["finished"], drawing["codes"])  # the same seed goes on alike
    assert applying["shown"].images.shape == (8, 3, 8, 8)
    assert all(applying[name].shape == (1, 3, 128, 128) for name in ("apple", "large", "green"))
