"""Text-conditional models trained for longer, or otherwise: `python -m workbook.text_trials --trial NAME --output FILE`.

How often samples are recognised by their captions is a question of how often a model has seen a name. A trial stands in
ablations/params.yaml under `text`; it is judged like the pipeline's models, with the same prompts and the same dual encoder.
"""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np

from sitlib.files import write_json
from sitlib.metrics.weights import fetch_weights
from sitlib.model.precision import best_device
from sitlib.strict import require_known
from workbook.codes import captioned
from workbook.errors import command
from workbook.evaluate.text import (
    KINDS,
    draw_text_samples,
    measure_text_generator,
    prompts,
    real_text_features,
)
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.rows import load_ablations


def run_trial(profile: Profile, usual: Profile, variant: str, seed: int = 0) -> dict[str, Any]:
    """Trains a text-conditional model of `profile` and judges it by the prompts and the dual encoder of `usual`.

    Returns:
        `variant`, `steps`, `seed`; `draws_per_name`: how often training has drawn an image of each name, on average; `seconds` of training;
        `prompts`: what each kind of prompts is; and what `evaluate_text_generator` returns, without a sweep.
    """
    fetch_weights()
    without_sweep = replace(usual.text.evaluation, top_p_sweep=[], guidance_sweep=[])
    usual = replace(usual, text=replace(usual.text, evaluation=without_sweep))
    trained, optimizer = (
        trained_generator(profile, variant, seed),
        profile.generator_optimizer(variant),
    )
    asked = {kind: prompts(usual, kind) for kind in KINDS}
    model, real = trained.model.to(best_device()), real_text_features(usual)["held_out"]
    samples = draw_text_samples(model, asked, usual.sampler(variant))
    scores = measure_text_generator(model, variant, asked, samples, real, usual)
    names = len(np.unique(captioned(profile, "train").names))
    return {
        "variant": variant,
        "steps": optimizer.steps,
        "seed": seed,
        "draws_per_name": optimizer.steps * optimizer.batch_size / names,
        "prompts": KINDS,
        "seconds": trained.curve["seconds"][-1],
        **scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.text_trials", description=__doc__)
    parser.add_argument("--trial", required=True, help="name under `text` in ablations/params.yaml")
    parser.add_argument("--output", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    ablations = load_ablations()
    require_known(arguments.trial, ablations.text, "trial of a text-conditional model")
    trial = ablations.text[arguments.trial]
    profile, usual = trial.profile_of(ablations.values()), load_profile(ablations.profile)
    write_json(
        resolve(arguments.output),
        {"changes": trial.changes, **run_trial(profile, usual, trial.variant)},
    )


if __name__ == "__main__":
    command(main)
