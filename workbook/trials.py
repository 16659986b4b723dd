"""Trials of a tokenizer's recipe, on photographs split off the training set: `python -m workbook.trials`.

A list of trials (`profiles/trials/tokenizer.yaml`) names settings of a profile and what to change in them. Each is trained on most of
the training photographs and judged on the others, so that the held-out ones stay untouched by the choice of a recipe. Results are collected
in one CSV file that a notebook shows; a trial whose result is there already is not run again.
"""

import argparse
import csv
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from tqdm import tqdm

from sitlib.data import held_out_views, open_images
from sitlib.metrics import codebook_statistics, evaluate_reconstructions
from sitlib.metrics.weights import fetch_weights
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import digest, from_dict, to_dict
from sitlib.train.checkpoint import remove_states
from sitlib.train.tokenizer import train_tokenizer
from workbook.errors import command
from workbook.evaluate import reconstruct
from workbook.evaluate.tokenizer import error_by_scale
from workbook.paths import resolve
from workbook.profile import Profile, changed, load_profile
from workbook.train_or_load import TokenizerRun

VALIDATION_SHARE = 0.2  # of the training photographs
VALIDATION_VIEWS = 400
SEED = 0
TRIALS = "profiles/trials/tokenizer.yaml"
RESULTS = "profiles/trials/tokenizer.csv"


@dataclass(frozen=True)
class Trial:
    """One change of a recipe.

    Attributes:
        question: what it belongs to, the same for all trials that are compared with each other.
        variant: tokenizer variant of the profile.
        changes: dotted key of the profile -> value, such as "tokenizer.optimizer.learning_rate".
    """

    question: str
    variant: str
    changes: dict[str, Any]

    def profile(self, values: dict[str, Any]) -> Profile:
        """The profile in `values` with the changes made.

        Raises:
            ConfigError: a key that the profile does not have, or a value that it refuses.
        """
        return from_dict(Profile, changed(values, self.changes), where=f"trial of {self.variant}")

    @property
    def change(self) -> str:
        """The changes as a reader should see them."""
        return (
            ", ".join(f"{key.split('.')[-1]} {value}" for key, value in self.changes.items())
            or "as it is"
        )


@dataclass(frozen=True)
class TrialList:
    """Content of a file of trials: `common` changes come before those of each trial, and do not count as one."""

    common: dict[str, Any]
    trials: list[Trial]


def run_trial(trial: Trial, values: dict[str, Any], seed: int = SEED) -> dict[str, Any]:
    """Trains and judges one trial; its row of the results.

    Args:
        values: content of the profile's file.
    """
    fetch_weights()
    profile = trial.profile(values)
    run = TokenizerRun.of(profile, trial.variant, seed)
    images, validation = open_images(resolve(run.data.source), "train").split_off(VALIDATION_SHARE)
    checkpoints = resolve(f".ckpt/trial-{digest(run)}")
    title = f"{trial.variant}, {trial.change}"
    tokenizer, curve = train_tokenizer(
        run.model, run.training, run.data, images, seed=seed, folder=checkpoints, title=title
    )
    views = held_out_views(validation, VALIDATION_VIEWS, run.data.size, seed, kind="crops")[0]
    tokenizer = tokenizer.cpu().eval()
    codes, reconstructions = reconstruct(tokenizer, views)
    scores = evaluate_reconstructions(views, reconstructions, metrics=["psnr", "lpips_alex"])
    books = codebook_statistics(codes, run.model.num_codes, num_codebooks=len(tokenizer.codebooks))[
        "codebooks"
    ]
    remove_states(checkpoints)
    return {
        "question": trial.question,
        "variant": trial.variant,
        "change": trial.change,
        "psnr": round(scores["psnr"], 3),
        "lpips_alex": round(scores["lpips_alex"], 4),
        "lpips_eighth": _at_an_eighth(tokenizer, views),
        "usage": round(min(book["usage"] for book in books.values()), 1),
        "perplexity": round(min(book["perplexity"] for book in books.values()), 1),
        "error_by_scale": " ".join(
            f"{error:.5f}" for error in error_by_scale(views, reconstructions)
        ),
        "seconds": curve[-1]["seconds"],
        "seed": seed,
        "run": digest(run),
    }


def _at_an_eighth(tokenizer: SpectralTokenizer, views: Tensor) -> float | str:
    """LPIPS-Alex of views at 1/8 of the size, "" for a tokenizer that does not take them."""
    small = F.avg_pool2d(views, 8)
    if small.shape[-1] not in tokenizer.sizes or tokenizer.config.decoder_attention == "full":
        return ""
    found = reconstruct(tokenizer, small)[1]
    return round(evaluate_reconstructions(small, found, metrics=["lpips_alex"])["lpips_alex"], 4)


def read_trials(path: str | Path = RESULTS) -> list[dict[str, str]]:
    """Rows of the results, none where there is no such file."""
    path = resolve(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def listed_results(
    profile: str = "quick", trials: str | Path = TRIALS, results: str | Path = RESULTS
) -> tuple[list[dict[str, str]], int]:
    """Results of the listed trials in the order of the list, and how many rows are of other trials or of a profile that has changed."""
    rows = {row["run"]: row for row in read_trials(results)}
    found = [rows[run] for run in _runs(profile, trials) if run in rows]
    return found, len(rows) - len(found)


def _runs(profile: str, trials: str | Path) -> dict[str, tuple[Trial, dict[str, Any]]]:
    """Digest of each listed trial -> the trial, and the plain values of the profile that it changes."""
    path = resolve(trials)
    listed = from_dict(TrialList, yaml.safe_load(path.read_text()), where=path.name)
    values = changed(to_dict(load_profile(profile)), listed.common)
    return {
        digest(TokenizerRun.of(t.profile(values), t.variant, SEED)): (t, values)
        for t in listed.trials
    }


def _one_thread() -> None:
    torch.set_num_threads(
        1
    )  # several small trainings side by side are faster than one on all cores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.trials", description=__doc__)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--trials", default=TRIALS, help="list of trials")
    parser.add_argument("--output", default=RESULTS, help="CSV file to which results are added")
    parser.add_argument(
        "--workers", type=int, default=2, help="trials side by side, one thread each"
    )
    arguments = parser.parse_args()
    done = {row["run"] for row in read_trials(arguments.output)}
    runs = _runs(arguments.profile, arguments.trials)
    waiting = [trial for run, trial in runs.items() if run not in done]
    output = resolve(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.workers, initializer=_one_thread) as pool:
        jobs = [pool.submit(run_trial, trial, values) for trial, values in waiting]
        for job in tqdm(as_completed(jobs), "trials", total=len(jobs), unit="trial", ncols=110):
            try:
                row, is_new = job.result(), not output.exists()
            except FloatingPointError as error:  # of one trial: the results of the others are kept
                print(error)
                continue
            with output.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    command(main)
