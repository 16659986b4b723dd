"""Measuring upsampling, editing and previews on held-out images: `python -m workbook.applications`.

Two models do each task that they can: the class-conditional one on photographs, the text-conditional one on emoji, both over the codes of
scale-causal tokenizers. The functions that are measured are those of `sitlib.sample.applications`.
"""

import argparse
from typing import Any

import torch

from sitlib.files import read_json, write_json
from sitlib.metrics.weights import fetch_weights
from sitlib.strict import digest
from workbook.application_tasks import class_task, foreign, text_task
from workbook.editing import editing
from workbook.errors import command
from workbook.evaluate.rate_distortion import rate_distortion
from workbook.paths import resolve
from workbook.previews import previews
from workbook.profile import Profile, load_profile
from workbook.train_or_load import AutoregressiveRun, DualEncoderRun, TokenizerRun
from workbook.upsampling import foreign_upsampling, upsampling


def measure(profile: Profile) -> dict[str, Any]:
    """Everything of the module, and the protocol."""
    settings = profile.applications
    photographs, texts = class_task(profile), text_task(profile)
    tokenizer = profile.autoregressive_variant(settings.class_generator).tokenizer
    seed = profile.autoregressive.tokenizer_seed
    results = {
        "rate_distortion": rate_distortion(profile, [settings.baseline, tokenizer], seed),
        "upsampling": upsampling(profile, [photographs, texts]),
        "foreign": foreign_upsampling(profile, foreign(profile)),
        "editing": editing(profile, texts),
        "previews": previews(profile, texts),
    }
    protocol = {
        "images": settings.images,
        "groups": {task.variant: len(set(task.keys)) for task in (photographs, texts)},
        "inputs": "averaged over squares of 8, 4 and 2 px",
        "intervals": "95 %, percentile bootstrap over photographs; of emoji over names",
        "threads": torch.get_num_threads(),
        "samplers": {
            task.variant: {
                name: getattr(task.sampling, name)
                for name in ("top_k", "top_p", "guidance", "guidance_growth")
            }
            for task in (photographs, texts)
        },
    }
    return {**results, "protocol": protocol}


def application_scores(profile: Profile) -> dict[str, Any]:
    """The pipeline's measurements of these very models, or else measurements that are made now."""
    path = resolve("metrics/applications.json")
    if path.exists() and (scores := read_json(path)).get("run") == _run(profile):
        return scores
    fetch_weights()
    return measure(profile)


def _run(profile: Profile) -> str:
    settings, seed = profile.applications, profile.applications.model_seed
    runs = [
        AutoregressiveRun.of(profile, name, seed)
        for name in (settings.class_generator, settings.text_generator)
    ]
    baseline = TokenizerRun.of(profile, settings.baseline, profile.autoregressive.tokenizer_seed)
    samplers = [
        profile.sampler(name) for name in (settings.class_generator, settings.text_generator)
    ]
    sets = profile.tokenizer.evaluation
    judged = [DualEncoderRun.of(profile), profile.text.evaluation, sets, list(sets.sets)]
    return digest(settings, *runs, baseline, *samplers, *judged)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.applications", description=__doc__)
    parser.add_argument("--profile", required=True)
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    write_json(resolve("metrics/applications.json"), {"run": _run(profile), **measure(profile)})


if __name__ == "__main__":
    command(main)
