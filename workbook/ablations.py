"""Ablations: one row is a tokenizer in which something is changed, trained and judged with several seeds.

`python -m workbook.ablations --row NAME --output FILE` makes one row; the stages of ablations/dvc.yaml call it. What a row is
stands in ablations/params.yaml: a tokenizer in the words of a profile's `tokenizer.variants`. Every row sees the same images in the same
order, seed by seed, for the same number of steps.
"""

import argparse
import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.files import write_json
from sitlib.metrics import codebook_statistics, evaluate_reconstructions, fast_metrics
from sitlib.metrics.weights import fetch_weights
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import digest
from workbook.codes import load_codes
from workbook.effects import finished_seeds, mean
from workbook.errors import command
from workbook.estimates import flops
from workbook.evaluate import decode, encode, held_out_nats
from workbook.evaluate.generation import distances_to_held_out, draw_samples
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.rows import Ablations, load_ablations
from workbook.tokenizers import held_out_set, trained_tokenizer
from workbook.train_or_load import AutoregressiveRun, TokenizerRun

SPIKE = (
    5.0  # a gradient norm of so many times the median of the 50 steps before it is called a spike
)
WINDOW = 50
RESULTS = ("metrics/ablations", "metrics/ladder", "metrics/efficiency", "metrics/text_trials")


def run_row(ablations: Ablations, name: str, generates: bool = True) -> dict[str, Any]:
    """Trains and judges a row with every seed; what its file holds.

    Returns:
        `group`, `tokenizer`, `parameters`, `flops_per_image` (encode and decode), `steps`, `run`; `seeds`: seed, as text -> `psnr` (dB),
        `lpips_alex`, both also `by_photograph`; `usage` (%), `gradient_norm`, `seconds`, and for a scale-causal decoder `first_scales`
        (PSNR of the image of the first k scales, against the averaged image); or `failed` where training did not end well;
        `generation` if the row asks for it and `generates`; `protocol`.
    """
    profile, row = ablations.profile_of(name), ablations.rows[name]
    fetch_weights()
    views, keys = held_out_set(profile, size=profile.tokenizer_variant(name).size)
    seeds: dict[str, dict[str, Any]] = {}
    for seed in ablations.seeds:
        try:
            found = trained_tokenizer(profile, name, seed)
        except FloatingPointError as error:
            seeds[str(seed)] = {"failed": str(error)}
            continue
        seeds[str(seed)] = _judged(found.model, views, keys) | {
            "gradient_norm": gradient_statistics(found.curve["gradient_norm"]),
            "seconds": found.curve["seconds"][-1],
        }
    scores = next((scores for scores in seeds.values() if "failed" not in scores), {})
    result = {
        "group": row.group,
        "tokenizer": row.tokenizer,
        "run": digest(*(TokenizerRun.of(profile, name, seed) for seed in ablations.seeds)),
        "steps": profile.tokenizer_training(name).optimizer.steps,
        **cost(SpectralTokenizer(profile.tokenizer_variant(name)).eval()),
        "photographs": scores.pop("photographs", []),
        "protocol": scores.pop("protocol", {}),
        "seeds": {
            seed: {k: v for k, v in s.items() if k not in ("photographs", "protocol")}
            for seed, s in seeds.items()
        },
    }
    if row.generate and generates:
        result["generation"] = generation(profile, f"ar_{name}")
    return result


def cost(tokenizer: SpectralTokenizer) -> dict[str, int]:
    """`parameters`, and `flops_per_image`: operations of encoding and decoding one image in products, convolutions and attention."""
    size = tokenizer.config.size
    with torch.no_grad():
        operations = flops(lambda: tokenizer(torch.rand(1, 3, size, size)))
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    return {"parameters": parameters, "flops_per_image": operations}


def gradient_statistics(norms: list[float]) -> dict[str, float]:
    """Of the gradient norms of a training, before clipping: `median`, `largest` after the first WINDOW rows, as a multiple of the median
    of the rows before it, and `spikes`: how many rows have more than SPIKE times that median."""
    ratios = [norms[i] / median(norms[i - WINDOW : i]) for i in range(WINDOW, len(norms))]
    return {
        "median": median(norms),
        "largest": max(ratios, default=float("nan")),
        "spikes": sum(ratio > SPIKE for ratio in ratios),
    }


def generation(profile: Profile, variant: str) -> dict[str, Any]:
    """What a model over the codes of the row's first tokenizer learns and draws: held-out nats, and distances of its samples."""
    run = AutoregressiveRun.of(profile, variant, 0)
    codes, model = load_codes(profile, variant), trained_generator(profile, variant, 0).model
    tokenizer = trained_tokenizer(profile, run.model.tokenizer, run.codes.tokenizer.seed).model
    settings = profile.autoregressive.evaluation
    sampled, _ = draw_samples(model, profile, settings.samples, profile.autoregressive.sampling)
    scores = distances_to_held_out(decode(tokenizer, sampled), profile, variant)
    nats = held_out_nats(model, codes.held_out, codes.held_out_labels)
    tokens = codes.held_out.shape[1] * codes.held_out.shape[2]
    return {**scores, **nats, "nats_per_image": nats["nats_per_token"] * tokens, "tokens": tokens}


def _judged(tokenizer: SpectralTokenizer, views: Tensor, keys: list[str]) -> dict[str, Any]:
    """Scores of one trained tokenizer on held-out views."""
    codes = encode(tokenizer, views)
    decoded = decode(tokenizer, codes)
    scores = evaluate_reconstructions(views, decoded, keys, metrics=fast_metrics())
    config = tokenizer.config
    books = codebook_statistics(codes, config.num_codes, num_codebooks=len(tokenizer.codebooks))[
        "codebooks"
    ]
    kept = fast_metrics()
    result = {
        **{metric: scores[metric] for metric in kept},
        "by_photograph": {metric: scores["by_photograph"][metric] for metric in kept},
        "photographs": scores["photographs"],
        "protocol": scores["protocol"],
        "usage": min(book["usage"] for book in books.values()),
    }
    if (
        config.decoder_attention == "scale_causal"
        and config.levels > 0
        and config.transform != "raster"
    ):
        result["first_scales"] = first_scales(tokenizer, views, codes)
    return result


def first_scales(tokenizer: SpectralTokenizer, views: Tensor, codes: Tensor) -> list[float]:
    """PSNR, dB, of what the first k = 1 ... S scales of `codes` give, against the views averaged to its size."""
    found = []
    for k in range(1, codes.shape[1] + 1):
        images = decode(tokenizer, codes, k)
        averaged = F.avg_pool2d(views, views.shape[-1] // images.shape[-1])
        error = (images - averaged).square().mean(dim=(1, 2, 3))
        found.append(float((-10 * error.clamp_min(1e-10).log10()).mean()))
    return found


def forget(ablations: Ablations, name: str) -> None:
    """Removes the models of a row: its file is what is kept."""
    for kind, stem in (("tokenizer", name), ("autoregressive", f"ar_{name}"), ("codes", name)):
        for folder in resolve(f"scratch/{kind}").glob(f"{stem}-seed*"):
            shutil.rmtree(folder, ignore_errors=True)


def write_table(path: str | Path) -> None:
    """Writes one line for each result of the grid, with a digest of its file.

    The pipeline's notebooks depend on this file and not on the results themselves, whose stages `dvc repro` would run otherwise.
    """
    path = resolve(path)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["result", "psnr", "lpips_alex", "fd_lite0", "file"])
        for result in sorted(path for folder in RESULTS for path in resolve(folder).glob("*.json")):
            values = json.loads(result.read_text())
            row = finished_seeds(values) if "seeds" in values else []
            means = [
                f"{mean(values, metric):.4f}" if row else "" for metric in ("psnr", "lpips_alex")
            ]
            distance = values.get("fd_lite0", values.get("generation", {}).get("fd_lite0", ""))
            content = hashlib.sha256(result.read_bytes()).hexdigest()[:16]
            writer.writerow([f"{result.parent.name}/{result.stem}", *means, distance, content])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.ablations", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--row", help="name in ablations/params.yaml")
    what.add_argument("--table", action="store_true", help="write the table of all results instead")
    parser.add_argument(
        "--reconstruction-only", action="store_true", help="no model over the row's codes"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than those of the file")
    parser.add_argument("--output", required=True, help="JSON file to write; CSV for the table")
    arguments = parser.parse_args()
    if arguments.table:
        write_table(arguments.output)
        return
    ablations = load_ablations()
    if arguments.seeds:
        ablations = replace(ablations, seeds=arguments.seeds)
    write_json(
        resolve(arguments.output),
        run_row(ablations, arguments.row, not arguments.reconstruction_only),
    )
    forget(ablations, arguments.row)


if __name__ == "__main__":
    command(main)
