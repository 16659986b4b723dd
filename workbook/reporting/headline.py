"""The headline: every run's metrics gathered into one file, with what they were measured on.

    python -m workbook.reporting.headline --output metrics/headline.json

Reads `metrics/tokenizer/<variant>-seed<k>.json`, `metrics/generation/<variant>-seed<k>.json`, `metrics/text/<variant>-seed<k>.json` and
`metrics/seconds/*.json`. A value is `{"mean", "std", "seeds"}`: mean and sample standard deviation (null for
one seed) over the seeds of a variant.
"""

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from workbook.paths import ROOT, resolve
from workbook.profile import load_profile
from workbook.reporting.machine import machine

TOKENIZER_METRICS = (
    "psnr",
    "ssim",
    "lpips_alex",
    "lpips_vgg",
    "fd_lite0",
    "kid",
    "lite0_score",
    "usage",
    "bits_per_pixel",
)
GENERATION_METRICS = ("fd_lite0", "kid", "precision", "recall", "nats_per_token")
TEXT_METRICS = ("r_precision_seen", "r_precision_held_out", *GENERATION_METRICS)
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pywavelets",
    "lpips",
    "torchmetrics",
    "accelerate",
    "dvc",
)
RUN_FILE = re.compile(r"(?P<variant>.+)-seed(?P<seed>\d+)\.json")


class HeadlineError(RuntimeError):
    """Metrics that cannot be gathered; the message says which file and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Content of a metrics file. Raises HeadlineError if it is not a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HeadlineError(
            f"{path} is not JSON ({error}); delete it and run dvc repro."
        ) from error
    if not isinstance(values, dict):
        raise HeadlineError(f"{path} holds no JSON object; delete it and run dvc repro.")
    return values


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation over seeds; None if a value is not finite, std also for one seed."""
    finite = all(math.isfinite(value) for value in values)
    return {
        "mean": _rounded(statistics.fmean(values)) if finite else None,
        "std": _rounded(statistics.stdev(values)) if finite and len(values) > 1 else None,
        "seeds": len(values),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def runs_of(
    folder: Path, listed: Sequence[tuple[str, int]] | None
) -> dict[str, list[dict[str, Any]]]:
    """Variant -> metrics of its seeds, in the order of `listed`; of others that are left out a line tells."""
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant, _ in listed or ()}
    for path in sorted(folder.glob("*.json")):
        match = RUN_FILE.fullmatch(path.name)
        if match is None:
            continue
        if listed is not None and (match["variant"], int(match["seed"])) not in listed:
            print(
                f"Left out of the headline: {folder.name}/{path.name}, which params.yaml no longer lists."
            )
            continue
        runs.setdefault(match["variant"], []).append(read_json(path))
    return {variant: records for variant, records in runs.items() if records}


def summary(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Variant -> metric -> `spread` over the runs that have it; a metric that no run has is absent."""
    table = {}
    for variant, records in runs.items():
        found = {name: [record[name] for record in records if name in record] for name in metrics}
        # null in a metrics file stands for a value that was not finite
        table[variant] = {
            name: spread([math.nan if value is None else value for value in values])
            for name, values in found.items()
            if values
        }
    return table


def protocol(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """How the runs were judged: an entry that all share as it is, one that differs as `{variant: value}`."""
    found: dict[str, dict[str, Any]] = {}
    for variant, records in runs.items():
        for key, value in records[0].get("protocol", {}).items():
            found.setdefault(key, {})[variant] = value
    merged = {}
    for key, values in found.items():
        first = next(iter(values.values()))
        same = len(values) == len(runs) and all(value == first for value in values.values())
        merged[key] = first if same else values
    return merged


def versions() -> dict[str, str]:
    """Python and the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def revision(root: Path = ROOT) -> str:
    """Commit that was run, with "-dirty" where tracked sources differ from it; "unknown" without git.

    What the pipeline itself writes (metrics, reports, dvc.lock) does not count as a difference.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        written = [
            f":(exclude){name}" for name in ("metrics", "reports", "dvc.lock", "ablations/dvc.lock")
        ]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _listed(
    names: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[tuple[str, int]] | None:
    return (
        None
        if names is None or seeds is None
        else [(name, seed) for name in names for seed in seeds]
    )


def tokenizer_runs(parameters: Mapping[str, Any]) -> list[tuple[str, int]] | None:
    """Variant and seed of every tokenizer that params.yaml lists, second decoders after the others; None if it lists none."""
    runs = _listed(parameters.get("tokenizers"), parameters.get("seeds"))
    if runs is None:
        return None
    bases = parameters.get("second_decoders", [])
    missing = [
        f"{name}, seed {seed}"
        for name, seed in _listed(bases, parameters.get("second_decoder_seeds", [])) or []
        if (name, seed) not in runs
    ]
    if missing:
        raise HeadlineError(
            f"second_decoders in params.yaml needs {', '.join(missing)}: add it to tokenizers and seeds."
        )
    second = [f"{name}_second" for name in bases]
    return runs + (_listed(second, parameters.get("second_decoder_seeds", [])) or [])


def _is_listed(stage: str, runs: Sequence[str]) -> bool:
    """Whether a stage is one of no run of a variant and seed, or of one that params.yaml lists (or if it lists none)."""
    _, _, run = stage.partition("@")
    return not runs or run in runs or not re.search(r"-\d+$", run)


def _machines(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those that stages ran on, the one with most seconds first; this one if none says."""
    seconds: dict[str, float] = {}
    for record in records:
        if "machine" in record:
            key = json.dumps(record["machine"], sort_keys=True)
            seconds[key] = seconds.get(key, 0.0) + record["seconds"]
    return [json.loads(key) for key in sorted(seconds, key=lambda key: -seconds[key])] or [
        machine()
    ]


def gather(root: Path = ROOT) -> dict[str, Any]:
    """The headline of the project at `root`. Raises HeadlineError if there is nothing to gather."""
    metrics = root / "metrics"
    parameters = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    trained = tokenizer_runs(parameters)
    tokenizers = runs_of(metrics / "tokenizer", trained)
    sampled = _generator_runs(parameters, "generators", "generator_seeds")
    again = _generator_runs(parameters, "second_generators", "generator_seeds", "_second")
    if sampled is not None:
        sampled += (
            _generator_runs(parameters, "improved_generators", "generator_seeds", "_improved") or []
        )
    generation = runs_of(
        metrics / "generation", None if sampled is None else sampled + (again or [])
    )
    written = _generator_runs(parameters, "text_generators", "text_seeds")
    text = runs_of(metrics / "text", written)
    if not tokenizers and not generation and not text:
        raise HeadlineError(f"No metrics in {metrics}: run dvc repro.")
    photographs, captioned = _by_images(tokenizers)
    runs = [
        f"{name}-{seed}"
        for name, seed in [*(trained or []), *(sampled or []), *(again or []), *(written or [])]
    ]
    seconds = [read_json(path) for path in sorted((metrics / "seconds").glob("*.json"))]
    return {
        "profile": parameters["profile"],
        "revision": revision(root),
        "hardware": _machines([r for r in seconds if _is_listed(r["stage"], runs)]),
        "precision": load_profile(parameters["profile"]).engine.precision,
        "versions": versions(),
        "seconds": {r["stage"]: r["seconds"] for r in seconds if _is_listed(r["stage"], runs)},
        "tokenizer": summary(photographs, TOKENIZER_METRICS),
        "text_tokenizer": summary(captioned, TOKENIZER_METRICS),
        "generation": {
            "class": summary(generation, GENERATION_METRICS),
            "text": summary(text, TEXT_METRICS),
        },
        "protocol": {
            "tokenizer": protocol(photographs),
            "text_tokenizer": protocol(captioned),
            "generation": protocol(generation),
            "text": protocol(text),
        },
    }


def _generator_runs(
    parameters: Mapping[str, Any], names: str, seeds: str, suffix: str = ""
) -> list[tuple[str, int]] | None:
    """Variant and seed of the autoregressive models in a list of params.yaml; None if it has no such list."""
    listed = parameters.get(names)
    found = None if listed is None else [f"ar_{name}{suffix}" for name in listed]
    return _listed(found, parameters.get(seeds))


def _by_images(runs: Mapping[str, list[dict[str, Any]]]) -> tuple[dict, dict]:
    """Tokenizers judged on the images of the first one, and those judged on others."""
    source = {name: records[0].get("protocol", {}).get("source") for name, records in runs.items()}
    first = next(iter(source.values()), None)
    same = {name: records for name, records in runs.items() if source[name] == first}
    return same, {name: records for name, records in runs.items() if name not in same}


def main(arguments: Sequence[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m workbook.reporting.headline", description=about)
    parser.add_argument("--output", required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        headline = gather()
    except HeadlineError as error:
        print(error, file=sys.stderr)
        return 1
    output = resolve(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(headline, indent=2, ensure_ascii=False, allow_nan=False)
    output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
