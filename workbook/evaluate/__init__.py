"""Evaluation of tokenizers, class- and text-conditional generators of a profile."""

from typing import Any

from sitlib.files import read_json
from workbook.paths import resolve


def stored_scores(path: str, run: str) -> dict[str, Any] | None:
    """Scores in a file of the pipeline, None unless they are of this run."""
    scores = read_json(resolve(path)) if resolve(path).exists() else {}
    return scores if scores.get("run") == run else None
