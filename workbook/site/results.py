"""`metrics/results.json`: the numbers that the front page, the notebooks and README tell.

Every run's metrics are gathered into one file, with what they were measured on. A value is
`{"mean", "std", "seeds"}` over the seeds of a variant; std is null for one seed.
"""

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from sitlib.metrics import GENERATION_METRICS, METRICS
from workbook.figures.tables import format_value, spread
from workbook.machine import lock_hash, machine
from workbook.params import seeds_by_variant
from workbook.profile import load_profile
from workbook.site.compare import BASELINE, Scores, headline

TOKENIZER_METRICS = (*METRICS, *GENERATION_METRICS, "lite0_score", "usage", "bits_per_pixel")
GENERATOR_METRICS = (
    "r_precision_seen",
    "r_precision_held_out",
    *GENERATION_METRICS,
    "nats_per_token",
)
PACKAGES = ("torch", "torchvision", "numpy", "pywavelets", "lpips", "torchmetrics", "dvc")
RUN_FILE = re.compile(r"(?P<variant>.+)-seed(?P<seed>\d+)")
MARKS = ("<!-- results -->", "<!-- end of results -->")


class ResultsError(ValueError):
    """Metrics that cannot be gathered; the message says which file and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Content of a metrics file. Raises ResultsError if it is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error}): delete it, run dvc repro.") from None
    if not isinstance(values, dict):
        raise ResultsError(f"{path} holds no JSON object: delete it, run dvc repro.")
    return values


def runs_of(folder: Path, variants: Sequence[str]) -> dict[str, list[Scores]]:
    """Variant -> metrics of its seeds, in the order of `variants`; other files are left out."""
    runs: dict[str, list[Scores]] = {variant: [] for variant in variants}
    for path in sorted(folder.glob("*-seed*.json")):
        match = RUN_FILE.fullmatch(path.stem)
        if match and match["variant"] in runs:
            runs[match["variant"]].append(read_json(path))
    return {variant: seeds for variant, seeds in runs.items() if seeds}


def listed_variants(parameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """Kind of metrics -> variants that params.yaml lists: tokenizer, generation, text."""
    generators = {**parameters["generators"], **parameters["decoded_again"]}
    return {
        "tokenizer": list(seeds_by_variant(parameters["tokenizers"])),
        "generation": list(seeds_by_variant(generators)),
        "text": list(seeds_by_variant(parameters["text_generators"])),
    }


def summary(
    runs: Mapping[str, Sequence[Scores]], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Variant -> metric -> mean and deviation over the runs that have it."""
    return {
        variant: {
            metric: spread([seed[metric] for seed in seeds if metric in seed])
            for metric in metrics
            if any(metric in seed for seed in seeds)
        }
        for variant, seeds in runs.items()
    }


def protocol(runs: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Protocol of runs: shared entries as they are, others as {variant: value}."""
    by_key: dict[str, dict[str, Any]] = {}
    for variant, seeds in runs.items():
        for key, value in seeds[0].get("protocol", {}).items():
            by_key.setdefault(key, {})[variant] = value
    merged = {}
    for key, values in by_key.items():
        first, *others = values.values()
        is_shared = len(values) == len(runs) and all(value == first for value in others)
        merged[key] = first if is_shared else values
    return merged


def versions() -> dict[str, str]:
    """Python and the packages that the numbers depend on."""
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers


def revision(root: Path) -> str:
    """Commit that was run, "-dirty" where tracked sources differ, "unknown" without git.

    Files that the pipeline writes (metrics, reports, locks) do not count.
    """
    outputs = ("metrics", "reports", "dvc.lock", "ablations/dvc.lock")
    excluded = [f":(exclude){name}" for name in outputs]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _machines(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Machines that stages ran on, the busiest first; this one if no stage says."""
    seconds: dict[str, float] = {}
    for record in records:
        if "machine" in record:
            key = json.dumps(record["machine"], sort_keys=True)
            seconds[key] = seconds.get(key, 0.0) + record["seconds"]
    busiest = sorted(seconds, key=lambda key: -seconds[key])
    return [json.loads(key) for key in busiest] or [machine()]


def gather(root: Path) -> dict[str, Any]:
    """The content of results.json. Raises ResultsError if there is nothing to gather."""
    metrics = root / "metrics"
    parameters = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    listed = listed_variants(parameters)
    runs = {kind: runs_of(metrics / kind, variants) for kind, variants in listed.items()}
    if not any(runs.values()):
        raise ResultsError(f"No metrics in {metrics}: run dvc repro.")

    # Tokenizers that are judged on the baseline's images, and those of captioned images.
    sources = {name: seeds[0]["protocol"]["source"] for name, seeds in runs["tokenizer"].items()}
    first = sources.get(BASELINE, next(iter(sources.values()), None))
    groups = {
        "tokenizers": {n: s for n, s in runs["tokenizer"].items() if sources[n] == first},
        "captioned_tokenizers": {n: s for n, s in runs["tokenizer"].items() if sources[n] != first},
        "generators": runs["generation"],
        "text_generators": runs["text"],
    }
    seconds = [read_json(path) for path in sorted((metrics / "seconds").glob("*.json"))]
    throughput = metrics / "throughput.json"
    return {
        "run": {
            "profile": parameters["profile"],
            "revision": revision(root),
            "hardware": _machines(seconds),
            "precision": load_profile(parameters["profile"]).engine.precision,
            "lock": lock_hash(),
            "versions": versions(),
            "seconds": {record["stage"]: record["seconds"] for record in seconds},
        },
        "headline": headline(
            groups["tokenizers"],
            {**runs["generation"], **runs["text"]},
            read_json(throughput) if throughput.exists() else None,
        ),
        **{
            name: summary(group, TOKENIZER_METRICS if "tokenizers" in name else GENERATOR_METRICS)
            for name, group in groups.items()
        },
        "protocol": {name: protocol(group) for name, group in groups.items()},
    }


def readme_table(results: Mapping[str, Any]) -> str:
    """The headline as a Markdown table."""
    rows = [
        f"| {row['model']} | {row['measure']} | {format_value(row['paper'])} | {row['ours']} |"
        for row in results["headline"]
    ]
    return "\n".join(["| model | measure | the paper | here |", "|---|---|---|---|", *rows])


def with_results(text: str, results: Mapping[str, Any]) -> str:
    """README's text with the table between the two marks replaced."""
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{readme_table(results)}\n{MARKS[1]}{after}"


def write_results(root: Path) -> None:
    """Write metrics/results.json, and its table into README.md."""
    results = gather(root)
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (root / "metrics/results.json").write_text(text, encoding="utf-8")
    readme = root / "README.md"
    readme.write_text(with_results(readme.read_text("utf-8"), results), encoding="utf-8")
