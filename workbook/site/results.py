"""`metrics/results.json`: the numbers that the front page and README tell.

Every run's metrics are gathered into one file, with what they were measured on. A value is
`{"mean", "std", "seeds"}` over the seeds of a variant; std is null for one seed.
"""

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from sitlib.metrics import GENERATION_METRICS, METRICS
from workbook.effects import (
    Claim,
    Rows,
    contrast,
    finished_seeds,
    interval,
    load_claims,
    mean,
    read_results,
    verdicts,
)
from workbook.figures.tables import spread
from workbook.machine import lock_hash, machine
from workbook.names import label
from workbook.params import read_yaml, seeds_by_variant
from workbook.paths import resolve
from workbook.profile import load_profile
from workbook.site.compare import BASELINE, RECONSTRUCTION, Runs, headline, with_interval

TOKENIZER_METRICS = (*METRICS, *GENERATION_METRICS, "lite0_score", "usage", "bits_per_pixel")
MEASURES = ("lpips_vgg", "lpips_alex", "psnr", "fd_lite0")  # by which claims are judged
EQUAL_BITS = "vit_vqgan_bits"  # row of the study
OF_PAPER = {"sit5_sc": "sit5_sc_paper"}  # variant that is ours -> row of the study as in the paper
NATS = ("nats_per_token", "nats_per_image")
GENERATOR_METRICS = ("r_precision_seen", "r_precision_held_out", *GENERATION_METRICS, *NATS)
PACKAGES = ("torch", "torchvision", "numpy", "pywavelets", "lpips", "torchmetrics", "dvc")
# Rows that are trained for longer and shorter, too.
LENGTHS = {BASELINE: "ViT-VQGAN", "sit4": "SIT-4 of the paper", "sit4_ours": "SIT-4, ours"}
LENGTHS |= {"sit4_ours_lifted": "SIT-4, ours, with bilinear prediction"}
COSTS = ("bits", "parameters", "flops_per_image")


def read_json(path: Path) -> dict[str, Any]:
    """Content of a metrics file. Raises ValueError with its name if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it, run dvc repro.") from None


def runs_of(folder: Path, listed: dict[str, Any]) -> dict[str, list[dict]]:
    """Variant -> metrics of its seeds, of the runs of params.yaml that have been judged."""
    runs = {
        variant: [folder / f"{variant}-seed{seed}.json" for seed in seeds]
        for variant, seeds in seeds_by_variant(listed).items()
    }
    found = {v: [read_json(path) for path in paths if path.exists()] for v, paths in runs.items()}
    return {variant: scores for variant, scores in found.items() if scores}


def summary(runs: Runs, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Variant -> metric -> mean and deviation over the runs that have it."""
    return {
        variant: {
            metric: spread([seed[metric] for seed in seeds if metric in seed])
            for metric in metrics
            if any(metric in seed for seed in seeds)
        }
        for variant, seeds in runs.items()
    }


def protocol(runs: Runs) -> dict[str, Any]:
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


def revision(root: Path) -> str:
    """Commit that was run, "-dirty" where tracked sources differ, "unknown" without git.

    Files that the pipeline writes (metrics, reports, locks) do not count.
    """
    outputs = ("metrics", "reports", "README.md", "dvc.lock", "study/dvc.lock")
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


def machines(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Machines that stages ran on, the busiest first; this one if no stage says."""
    seconds = Counter()
    for record in records:
        if "machine" in record:
            seconds[json.dumps(record["machine"], sort_keys=True)] += record["seconds"]
    return [json.loads(key) for key, _ in seconds.most_common()] or [machine()]


def gather(root: Path) -> dict[str, Any]:
    """The content of results.json. Raises ValueError if there is nothing to gather."""
    metrics = root / "metrics"
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    tokenizers = runs_of(metrics / "tokenizer", params["tokenizers"])
    generators = runs_of(metrics / "generation", params["generators"] | params["decoded_again"])
    text_generators = runs_of(metrics / "text", params["text_generators"])
    if not (tokenizers or generators or text_generators):
        raise ValueError(f"No metrics in {metrics}: run dvc repro.")

    # Tokenizers that are judged on the baseline's images, and those of captioned images.
    sources = {name: seeds[0]["protocol"]["source"] for name, seeds in tokenizers.items()}
    first = sources.get(BASELINE, next(iter(sources.values()), None))
    groups = {
        "tokenizers": {n: s for n, s in tokenizers.items() if sources[n] == first},
        "captioned_tokenizers": {n: s for n, s in tokenizers.items() if sources[n] != first},
        "generators": generators,
        "text_generators": text_generators,
    }
    records = [read_json(path) for path in sorted((metrics / "seconds").glob("*.json"))]
    throughput = metrics / "throughput.json"
    speed = read_json(throughput) if throughput.exists() else {}
    retrained = metrics / "study/retrained.json"  # the models of a profile, trained once more
    again = read_json(retrained) if retrained.exists() else {}
    again = again if again.get("profile") == params["profile"] else {}
    return {
        "run": {
            "profile": params["profile"],
            "revision": revision(root),
            "hardware": machines(records),
            "precision": load_profile(params["profile"]).engine.precision,
            "lock": lock_hash(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
            "seconds": {record["stage"]: record["seconds"] for record in records},
        },
        **study(root),
        "headline": headline(
            generators | text_generators,
            speed.get("rows", []),
            again.get("generators", {}),
        ),
        **{
            name: summary(group, TOKENIZER_METRICS if "tokenizers" in name else GENERATOR_METRICS)
            for name, group in groups.items()
        },
        "protocol": {name: protocol(group) for name, group in groups.items()}
        | {"throughput": speed.get("geometries", {}).get("paper", {}), "trained again": again},
    }


def study(root: Path) -> dict[str, Any]:
    """`reconstruction`, the headline's rows as cells; `trials`, trainings by which settings of a
    model were chosen; `by_optimizer`, a ratio of two of them; `claims`, their verdicts; `lengths`
    of training and `orders` of writing, as below.
    """
    listed = read_yaml(resolve("study/params.yaml"))["rows"]
    folder = root / "metrics/study"
    found = read_results(folder / "rows")
    rows = {name: found[name] for name in listed if name in found and finished_seeds(found[name])}
    paper, table = {OF_PAPER.get(r.variant, r.variant): r.lpips for r in RECONSTRUCTION[:4]}, []
    # ViT-VQGAN, and the same with as many bits as five scales have.
    baselines = {round(rows[n]["bits"]): rows[n] for n in (BASELINE, EQUAL_BITS) if n in rows}
    for name, row in rows.items():
        if row["group"] != "headline" or BASELINE not in rows:
            continue
        vgg, psnr = (contrast(rows, {name: 1.0}, key) for key in ("lpips_vgg", "psnr"))
        ratio = vgg.value / interval(rows[BASELINE], "lpips_vgg").value
        equal = baselines.get(round(row["bits"]))
        table.append(
            {
                "model": row["title"],
                "seeds": vgg.seeds,
                "tokens": row["tokens"],
                "bits": round(row["bits"]),
                "entropy-coded": round(mean(row, "coded_bits")),
                "parameters, M": f"{row['parameters'] / 1e6:.1f}",
                "MFLOP": round(row["flops_per_image"] / 1e6),
                "LPIPS-VGG ↓": with_interval(*vgg[:3], 3),
                "LPIPS-Alex ↓": f"{interval(row, 'lpips_alex').value:.3f}",
                "PSNR, dB ↑": with_interval(*psnr[:3]),
                "SSIM ↑": f"{interval(row, 'ssim').value:.3f}",
                "FD-Lite0 ↓": f"{mean(row, 'fd_lite0'):.0f}",
                "LPIPS-VGG, x first row": f"{ratio:.2f}",
                "in the paper": f"{paper[name] / paper[BASELINE]:.2f}" if name in paper else "",
                "x at equal bits": f"{vgg.value / interval(equal, 'lpips_vgg').value:.2f}"
                if equal
                else "",
            }
        )
    trials = Counter(
        m for trial in read_results(folder / "trials").values() for m in trial["models"]
    )
    for row in rows.values():
        if row["group"] in ("choice", "recipe"):
            trials[row["of"]] += len(row["seeds"])
    named = {label(variant): count for variant, count in trials.items()}
    by_optimizer = {}  # of trials: LPIPS-VGG of the paper's SIT-4 over that of ViT-VQGAN
    for title, name in {"Muon": "as_chosen", "AdamW": "adamw"}.items():
        if of := read_results(folder / "trials").get(name):
            first, second = (of["models"][model] for model in ("sit4", BASELINE))
            ratio = mean(first, "lpips_vgg") / mean(second, "lpips_vgg")
            by_optimizer[title] = {"ratio": ratio, "steps": first["steps"]}
    measured, claims = "", judged(rows, load_claims())
    if BASELINE in rows:
        of = rows[BASELINE]
        measured = (
            f"{len(of['seeds'])} seeds, {of['steps']:,} steps, {of['protocol']['images']} crops of {len(of['photographs'])} "
            f"held-out photographs, {of['protocol']['size'][0]} px, float32"
        )
    return {
        "measured": measured,
        "reconstruction": table,
        "trials": named,
        "by_optimizer": by_optimizer,
        "claims": claims,
        "otherwise": otherwise(rows, claims),
        "lengths": lengths(rows),
        "orders": orders(folder / "generators"),
    }


def otherwise(rows: Rows, told: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict]]:
    """Measure -> verdicts on claims that this measure, in place of each claim's own, turns, by
    Holm over all claims in all of `MEASURES`.
    """
    found = {key: {} for key in MEASURES[1:]}
    for (name, key), other in judged(rows, in_every_measure(load_claims())).items():
        if key in found and other["verdict"] != told[name]["verdict"]:
            found[key][name] = {k: other[k] for k in ("verdict", "holm")}
    return found


def in_every_measure(claims: Mapping[str, Claim]) -> dict[tuple[str, str], Claim]:
    """(Claim, measure) -> the claim in each of `MEASURES`."""
    return {(n, key): replace(of, measure=key) for n, of in claims.items() for key in MEASURES}


def judged(rows: Rows, claims: Mapping[Any, Claim]) -> dict[Any, dict[str, Any]]:
    """`verdicts` with costs."""
    return {name: with_costs(claim, rows) for name, claim in verdicts(rows, claims).items()}


def with_costs(claim: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """A verdict with the contrast in other measures, `also`, and what the first row has, times the
    second, `costs`: bits, parameters, operations."""
    if not claim["seeds"]:
        return claim | {"costs": []}
    second, first = sorted(claim["rows"], key=claim["rows"].get)
    costs = [rows[first][key] / rows[second][key] for key in COSTS]
    also = {key: contrast(rows, claim["rows"], key)[:3] for key in ("lpips_alex", "psnr")}
    return claim | {"also": also, "costs": costs}


def by_steps(rows: Rows) -> dict[str, dict[int, dict[str, Any]]]:
    """Model of `LENGTHS` -> number of steps -> scores of seed 0 after so many."""
    return {
        model: {
            row["steps"]: row["seeds"]["0"]
            for name, row in sorted(rows.items(), key=lambda item: item[1]["steps"])
            if name == model or (row["group"] == "steps" and name.rpartition("_")[0] == model)
            if "lpips_vgg" in row["seeds"].get("0", {})
        }
        for model in LENGTHS
    }


def lengths(rows: Rows) -> list[dict[str, str]]:
    """Rows of models: LPIPS-VGG, then FD-Lite0, over that of ViT-VQGAN after as many steps, of two
    at least.
    """
    scores, table = by_steps(rows), []
    base = scores.pop(BASELINE)
    for key, title in {"lpips_vgg": "LPIPS-VGG", "fd_lite0": "FD-Lite0"}.items():
        for model, of in scores.items():
            ratios = {
                f"{n:,} steps": f"{x[key] / base[n][key]:.2f}" for n, x in of.items() if n in base
            }
            if len(ratios) > 1:
                table.append({"model": LENGTHS[model], "measure": title, **ratios})
    return table


# First word of a generator of the study -> the images, and how it knows their codes.
ORDERED = {"own": "photographs, embeddings of each code's own"}


def orders(folder: Path) -> list[dict[str, Any]]:
    """Rows of images and order of writing: means over seeds."""
    rows, found = [], read_results(folder)
    for name in read_yaml(resolve("study/params.yaml"))["generators"]:
        images, _, order = name.partition("_")
        if name in found and any(key.endswith(".order") for key in found[name]["changes"]):
            seeds = list(found[name]["seeds"].values())
            row = {"images": ORDERED.get(images, images), "order": order.replace("_", " ")}
            row["samples"] = seeds[0]["protocol"]["samples"]
            row |= {
                "nats per image ↓": [seed["nats_per_image"] for seed in seeds],
                "FD-Lite0 to reconstructions ↓": [
                    seed["to_reconstructions"]["fd_lite0"] for seed in seeds
                ],
                "finished from half of the codes, dB ↑": [
                    seed["half_written"]["psnr"] for seed in seeds
                ],
            }
            rows.append(
                {k: round(fmean(v), 1) if isinstance(v, list) else v for k, v in row.items()}
            )
    return rows
