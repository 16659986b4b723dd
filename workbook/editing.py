"""Measuring edits: coarse scales kept, the rest drawn for another caption."""

from typing import Any

import torch
from torch import Tensor

from sitlib.metrics import (
    bootstrap_interval,
    lpips_per_image,
)
from sitlib.metrics.networks import load_lite0
from sitlib.model.precision import best_device
from sitlib.sample.applications import edit
from workbook.application_tasks import Task
from workbook.codes import captioned
from workbook.dual_encoder import judge_features, trained_dual_encoder
from workbook.evaluate import encode
from workbook.evaluate.text import prompts as evaluation_prompts
from workbook.evaluate.text import retrieval
from workbook.profile import Profile
from workbook.train_or_load import DualEncoderRun


def new_captions(profile: Profile, count: int) -> tuple[list[str], list[str], list[str]]:
    """What images shall show instead: `count` captions in new words, the same in known words, and the names, of training images."""
    asked = evaluation_prompts(profile, "seen")
    order = [i % len(asked.captions) for i in range(count)]
    captions, known, names = (
        [parts[i] for i in order] for parts in (asked.captions, asked.known, asked.names)
    )
    return captions, known, names


def editing(profile: Profile, task: Task) -> dict[str, Any]:
    """Held-out images with new captions and k of their scales kept, k from 0 to all.

    Returns:
        `kept` -> k as text -> `frozen_codes_equal`, `r_precision_new` and `r_precision_old` (%, by the dual encoder: the new caption, or
        the image's own, among others of its kind), `lpips_alex` to the original, and intervals. `ceiling`: the same two of real images with
        the new names, and of the originals. The judge knows the new names from its training and not the images' own, and each is sought
        among captions of its own kind, so the two are to be compared with their ceilings and not with each other.
    """
    judge, run, lite0 = (
        trained_dual_encoder(profile).model,
        DualEncoderRun.of(profile),
        load_lite0().to(best_device()),
    )
    asked, known, names = new_captions(profile, len(task.images))
    texts = captioned(profile, "test")
    own, own_names = [texts.captions[position][0] for position in task.positions], task.keys
    codes = encode(task.tokenizer, task.images)
    seen = evaluation_prompts(profile, "seen")
    of_new = judge_features(seen.images, lite0, run, "real images with the new names")
    of_own = judge_features(task.images, lite0, run, "originals")
    kept = {}

    def found_by(features: Tensor, captions: list[str], of: list[str]) -> dict[str, Any]:
        values = retrieval(judge, features, captions, of, profile)
        return {"value": float(values.mean()), "interval": list(bootstrap_interval(values, of))}

    for keep in range(task.tokenizer.geometry.num_scales + 1):
        result = edit(
            task.model,
            task.tokenizer,
            task.images,
            asked,
            keep,
            task.sampling,
            f"editing, {keep} kept",
        )
        features = judge_features(result.images, lite0, run, f"edited, {keep} kept")
        distances = lpips_per_image(result.images, task.images)
        kept[str(keep)] = {
            "frozen_codes_equal": bool(torch.equal(result.codes[:, :keep], codes[:, :keep])),
            "r_precision_new": found_by(features, known, names),
            "r_precision_old": found_by(features, own, own_names),
            "lpips_alex": {
                "value": float(distances.mean()),
                "interval": list(bootstrap_interval(distances, task.keys)),
            },
        }
    ceiling = {
        "r_precision_new": found_by(of_new, seen.known, seen.names),
        "r_precision_old": found_by(of_own, own, own_names),
    }
    return {
        "kept": kept,
        "ceiling": ceiling,
        "candidates": profile.text.evaluation.candidates,
        "images": profile.applications.images,
    }
