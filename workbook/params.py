"""`params.yaml`: what the pipeline runs."""

from typing import Any

from workbook.paths import ROOT
from workbook.profile import read_yaml


def pipeline_params() -> dict[str, Any]:
    """Content of `params.yaml`: the profile, the folders of images and the runs of every stage.

    Raises:
        ValueError: it cannot be read, or names no profile.
    """
    params = read_yaml(ROOT / "params.yaml")
    if not isinstance(params.get("profile"), str):
        raise ValueError("params.yaml needs a line such as `profile: quick`.")
    return params


def split_run(run: str) -> tuple[str, int]:
    """Variant and seed of a run: "sit4-seed0" -> ("sit4", 0).

    Raises:
        ValueError: it is not named so.
    """
    variant, _, seed = run.rpartition("-seed")
    if not variant or not seed.isdigit():
        raise ValueError(f"{run!r} is no run: write <variant>-seed<number>, such as sit4-seed0.")
    return variant, int(seed)


def seeds_by_variant(runs: list[str] | dict[str, Any]) -> dict[str, list[int]]:
    """Variant -> its seeds, of a list of runs such as `tokenizers` in params.yaml."""
    seeds: dict[str, list[int]] = {}
    for variant, seed in map(split_run, runs):
        seeds.setdefault(variant, []).append(seed)
    return seeds
