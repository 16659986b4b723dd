"""Measuring previews: what they cost, and whether they foretell the finished sample."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from sitlib.metrics import (
    bootstrap_interval,
)
from sitlib.metrics.networks import load_lite0
from sitlib.model.precision import best_device
from sitlib.sample.applications import Preview, Samples, preview, refine
from sitlib.sample.generate import generate
from workbook.application_tasks import Task
from workbook.dual_encoder import judge_features, trained_dual_encoder
from workbook.evaluate import decode
from workbook.evaluate.text import prompts as evaluation_prompts
from workbook.profile import Profile
from workbook.train_or_load import DualEncoderRun


def best_preview(profile: Profile, shown: Preview, caption: str) -> int:
    """Which preview fits a caption best, where nobody can choose: the one that the dual encoder finds the most similar."""
    judge, run = trained_dual_encoder(profile).model, DualEncoderRun.of(profile)
    features = judge_features(shown.images, load_lite0().to(best_device()), run, "previews")
    with torch.no_grad():
        similarity = judge.similarity(
            features, judge.text_tokenizer.encode([caption], truncate=True)
        )
    return int(similarity[:, 0].argmax())


def previews(profile: Profile, task: Task) -> dict[str, Any]:
    """Seconds of previews and finished samples, and whether a preview says which sample will be the best.

    Returns:
        `seconds`: of the first preview, of all previews, of finishing one, of one full sample, of as many full samples as previews; of
        each the median and the extremes of several rounds. `choice`: for 1, 2, ... scales the rank correlation, within a prompt, between
        the dual encoder's score of the preview and of the finished sample; mean scores of the finished samples: chosen by preview, at
        random, the best; and the gain of choosing over chance, with intervals over prompts.
    """
    return {"seconds": _preview_seconds(profile, task), "choice": _preview_choice(profile, task)}


def _preview_seconds(profile: Profile, task: Task) -> dict[str, dict[str, float]]:
    settings = profile.applications
    model, tokenizer, sampling, count = task.model, task.tokenizer, task.sampling, settings.previews
    assert isinstance(task.prompts, list)
    prompt, scales = task.prompts[0], tokenizer.geometry.num_scales
    shown = preview(model, tokenizer, prompt, sampling, count)
    actions: dict[str, Callable[[], Samples]] = {
        "first_preview": lambda: preview(model, tokenizer, prompt, sampling, 1),
        "previews": lambda: preview(model, tokenizer, prompt, sampling, count),
        "finish": lambda: refine(model, tokenizer, shown, 0),
        "one_sample": lambda: preview(model, tokenizer, prompt, sampling, 1, scales),
        "samples": lambda: preview(model, tokenizer, prompt, sampling, count, scales),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(settings.rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if round_:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in times.items()
    }


def _preview_choice(profile: Profile, task: Task) -> list[dict[str, Any]]:
    settings = profile.applications
    judge, run, lite0 = (
        trained_dual_encoder(profile).model,
        DualEncoderRun.of(profile),
        load_lite0().to(best_device()),
    )
    asked = evaluation_prompts(profile, "seen")
    captions, known = (texts[: settings.preview_prompts] for texts in (asked.captions, asked.known))
    told = [caption for caption in captions for _ in range(settings.previews)]
    codes = generate(task.model, told, task.sampling, progress="samples of previews")
    tokens = judge.text_tokenizer.encode(known, truncate=True).repeat_interleave(
        settings.previews, dim=0
    )

    def scores(scales: int) -> np.ndarray:
        """Cosine of each image of the first scales with its caption, [prompts, previews]."""
        images = decode(task.tokenizer, codes, scales)
        features = judge_features(images, lite0, run, f"previews of {scales} scales")
        with torch.no_grad():
            similarity = (judge.embed_images(features) * judge.embed_texts(tokens)).sum(dim=1)
        return similarity.view(-1, settings.previews).double().numpy()

    finished = scores(codes.shape[1])
    return [
        {
            "scales": scales,
            "prompts": len(captions),
            "previews": settings.previews,
            **choice_scores(scores(scales), finished),
        }
        for scales in range(1, codes.shape[1])
    ]


def choice_scores(previews: np.ndarray, finished: np.ndarray) -> dict[str, Any]:
    """What choosing by the scores of previews [P, M] means for the finished samples' scores [P, M], of M samples of P prompts."""
    rows = range(len(previews))
    chosen = finished[rows, previews.argmax(axis=1)]
    correlations = np.array(
        [spearmanr(a, b).statistic for a, b in zip(previews, finished, strict=True)]
    )
    correlations = np.nan_to_num(correlations)  # equal previews say nothing
    gain = chosen - finished.mean(axis=1)
    return {
        "rank_correlation": float(correlations.mean()),
        "rank_correlation_interval": list(bootstrap_interval(correlations, rows)),
        "chosen_by_preview": float(chosen.mean()),
        "at_random": float(finished.mean()),
        "best": float(finished.max(axis=1).mean()),
        "gain": float(gain.mean()),
        "gain_interval": list(bootstrap_interval(gain, rows)),
    }
