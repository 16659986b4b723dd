"""Upsampling, editing and previews on held-out images, measured (SIT, arXiv 2412.09607, section 5).

The class-conditional model works on photographs, the text-conditional one on emoji; both are over
the codes of scale-causal tokenizers. Images are [V, 3, H, H] in [0, 1].
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from sitlib import metrics
from sitlib.data import held_out_views, open_images
from sitlib.evaluate import decode, encode, features_of, reconstruct
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.applications import edit, preview, refine, upsample
from sitlib.sample.generate import Prompts, generate
from sitlib.strict import digest
from workbook.codes import captioned, held_out_wide, images_of
from workbook.costs import seconds
from workbook.evaluate import stored_scores
from workbook.evaluate.generation import load_models
from workbook.evaluate.text import Judge
from workbook.evaluate.text import prompts as evaluation_prompts
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.runs import AutoregressiveRun, CodesRun, DualEncoderRun

FILE = "metrics/applications.json"
FACTORS = (8, 4, 2)  # of upsampling


@dataclass
class Task:
    """A generator, its tokenizer, and held-out images with their prompts."""

    variant: str
    model: AutoregressiveModel
    tokenizer: SpectralTokenizer
    sampling: SamplingConfig
    images: Tensor
    prompts: Tensor | list[str] | None  # classes, captions, or nothing
    groups: list[Any]  # resampled for intervals: photograph of each view, name of each emoji


def _task(profile: Profile, variant: str, *images_prompts_groups: Any) -> Task:
    models = load_models(profile, variant, profile.applications.model_seed)
    return Task(variant, *models, profile.sampler(variant), *images_prompts_groups)


def class_task(profile: Profile) -> Task:
    """Wide views of held-out photographs, and their classes."""
    variant, count = profile.applications.class_generator, profile.applications.images
    images, labels = held_out_wide(profile, variant, count)
    num_photographs = len(images_of(profile, variant, "test"))
    groups = [i % num_photographs for i in range(count)]  # views take the photographs in turn
    return _task(profile, variant, images, labels, groups)


def text_task(profile: Profile) -> Task:
    """Wide views of held-out images, and a caption of each; training has not seen their names."""
    variant, texts = profile.applications.text_generator, captioned(profile, "test")
    images, positions = held_out_wide(profile, variant, profile.applications.images)
    captions = [texts.captions[position][0] for position in positions]
    return _task(profile, variant, images, captions, [texts.groups[i] for i in positions])


def extra_task(profile: Profile) -> Task:
    """The extra photographs for the class-conditional model, whose classes are not theirs."""
    variant, settings = profile.applications.class_generator, profile.tokenizer.evaluation
    extra, size = settings.sets["extra"], CodesRun.of(profile, variant).tokenizer.data.size
    source = open_images(resolve(extra.source), "test")
    images, _, keys = held_out_views(source, extra.views, size, settings.seed, kind="wide")
    return _task(profile, variant, images, None, keys)


def enlarge(images: Tensor, size: int, way: str) -> Tensor:
    """Enlarge images to `size` px and clamp: "bicubic" by torch, "lanczos" by Pillow, in float."""
    if way == "bicubic":
        return F.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)
    channels = [
        np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.LANCZOS))
        for values in images.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(channels)).unflatten(0, images.shape[:2]).clamp(0, 1)


def _upsampled(task: Task, small: Tensor, prompts: Prompts | None, **changes: Any) -> Tensor:
    sampling = replace(task.sampling, **changes)
    return upsample(task.model, task.tokenizer, small, prompts, sampling).images


def measure_factor(profile: Profile, task: Task, factor: int) -> dict[str, dict[str, Any]]:
    """Scores of every way to restore images from 1 / factor of their size, way -> scores.

    "untold" samples have no prompt, "told" ones have it; "reconstruction", the originals through
    the tokenizer, bounds all of them. Ratios of LPIPS are to bicubic's and to untold's;
    `consistency` is the PSNR of the result, averaged down, to the input.
    """
    settings, size = profile.applications, task.images.shape[-1]
    small = F.avg_pool2d(task.images, factor)
    results = {way: enlarge(small, size, way) for way in ("bicubic", "lanczos")}
    results["untold"] = _upsampled(task, small, None, temperature=1.0)
    if (told := task.prompts) is not None:
        temperatures, unguided = [1.0], {"temperature": 1.0, "guidance": 1.0}
        if factor == FACTORS[0]:
            results["told, no guidance"] = _upsampled(task, small, told, **unguided)
            temperatures = sorted({*settings.temperatures, 1.0})
        for temperature in temperatures:
            way = f"told, temperature {temperature:g}"
            results[way] = _upsampled(task, small, told, temperature=temperature)
    results["reconstruction"] = reconstruct(task.tokenizer, task.images)[1]

    scores, lpips, names = {}, {}, ["psnr", "lpips_alex"]
    originals = features_of([task.images], f"{task.variant}, originals")
    of_kid = {"kid_subset_size": min(settings.kid_subset_size, len(originals))}
    for way, images in results.items():
        title = f"{task.variant}, 1/{factor}, {way}"
        values = metrics.reconstruction_values(task.images, images, metrics=names, title=title)
        lpips[way] = values["lpips_alex"]
        summary = metrics.summarize_reconstructions(values, task.groups, images.shape[2:])
        row = scores[way] = {name: summary[name] for name in (*names, "intervals")}
        bases = {"lpips_ratio": "bicubic"}
        bases |= {"untold_ratio": "untold"} if way.startswith("told") else {}
        for name, other in bases.items():
            row[name] = float(lpips[way].mean() / lpips[other].mean())
            interval = metrics.paired_interval(lpips[way], lpips[other], task.groups, kind="ratio")
            row[f"{name}_interval"] = list(interval)
        features = features_of([images], title)
        distances = metrics.generation_metrics(features, originals, **of_kid, seed=settings.seed)
        row |= {name: distances[name] for name in ("fd_lite0", "kid")}
        again = F.avg_pool2d(images, factor)
        row["consistency"] = float(metrics.psnr_per_image(again, small).mean())
    return scores


def several_samples(profile: Profile, task: Task) -> dict[str, float]:
    """LPIPS between samples of one input at 1/8, and of their mean and best to the original."""
    settings = profile.applications
    assert task.prompts is not None
    images, prompts = task.images[: settings.repeated], task.prompts[: settings.repeated]
    small = F.avg_pool2d(images, FACTORS[0])
    seeds = range(settings.seed, settings.seed + settings.samples)
    samples = [_upsampled(task, small, prompts, seed=seed) for seed in seeds]
    to_original = torch.stack([metrics.lpips_per_image(sample, images) for sample in samples])
    pairs = [(a, b) for i, a in enumerate(samples) for b in samples[:i]]
    between = [metrics.lpips_per_image(*pair).mean() for pair in pairs]
    return {
        "images": len(images),
        "samples": len(samples),
        "between_samples": float(torch.stack(between).mean()),
        "mean": float(to_original.mean()),
        "best": float(to_original.min(dim=0).values.mean()),
    }


def editing(profile: Profile, task: Task) -> dict[str, Any]:
    """Edit held-out images for new captions, with 0, 1, ... all of their scales kept.

    R-precision (%) is how often the dual encoder finds the new caption, or the image's own. It has
    seen the new names in training, and not the own ones: compare each with its own `ceiling`, that
    of real images with the new names, and of the originals.
    """
    judge, seen = Judge(profile), evaluation_prompts(profile, "seen")
    assert isinstance(own := task.prompts, list)
    columns = (seen.captions, seen.known, seen.names)
    captions, known, names = (list(islice(cycle(column), len(own))) for column in columns)
    codes = encode(task.tokenizer, task.images)

    def mean_of(values: Tensor, groups: list[str]) -> dict[str, Any]:
        interval = metrics.bootstrap_interval(values, groups)
        return {"value": float(values.mean()), "interval": list(interval)}

    def recognized(features: Tensor, texts: list[str], groups: list[str]) -> dict[str, Any]:
        return mean_of(judge.retrieval(features, texts, groups), groups)

    kept = {}
    for keep in range(task.tokenizer.geometry.num_scales + 1):
        edited = edit(task.model, task.tokenizer, task.images, captions, keep, task.sampling)
        features = judge.features(edited.images, f"editing, {keep} kept")
        kept[str(keep)] = {
            "frozen_codes_equal": bool(torch.equal(edited.codes[:, :keep], codes[:, :keep])),
            "r_precision_new": recognized(features, known, names),
            "r_precision_old": recognized(features, own, task.groups),
            "lpips_alex": mean_of(metrics.lpips_per_image(edited.images, task.images), task.groups),
        }
    of_new, of_own = judge.features(seen.images), judge.features(task.images)
    return {
        "kept": kept,
        "ceiling": {
            "r_precision_new": recognized(of_new, seen.known, seen.names),
            "r_precision_old": recognized(of_own, own, task.groups),
        },
        "candidates": profile.text.evaluation.candidates,
        "images": profile.applications.images,
    }


def preview_seconds(profile: Profile, task: Task) -> dict[str, dict[str, float]]:
    """Seconds (median, least, most) of previews, of finishing one, and of whole samples."""
    count, scales = profile.applications.previews, task.tokenizer.geometry.num_scales
    assert isinstance(task.prompts, list)
    arguments = (task.model, task.tokenizer, task.prompts[0], task.sampling)
    first_scales = preview(*arguments, count)
    actions: dict[str, Callable[[], object]] = {
        "first_preview": lambda: preview(*arguments, 1),
        "previews": lambda: preview(*arguments, count),
        "finish": lambda: refine(task.model, task.tokenizer, first_scales, 0),
        "one_sample": lambda: preview(*arguments, 1, scales),
        "samples": lambda: preview(*arguments, count, scales),
    }
    # All actions in turn: a machine that grows slower favours none. The first round warms up.
    num_rounds = profile.applications.rounds + 1
    rounds = [[seconds(action) for action in actions.values()] for _ in range(num_rounds)][1:]
    return {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in zip(actions, zip(*rounds, strict=True), strict=True)
    }


def preview_choice(profile: Profile, task: Task) -> list[dict[str, Any]]:
    """`choice_scores` of previews of 1, 2, ... scales, by the cosine of the dual encoder."""
    settings = profile.applications
    judge, texts = Judge(profile), evaluation_prompts(profile, "seen")
    captions = texts.captions[: settings.preview_prompts]
    prompts = [caption for caption in captions for _ in range(settings.previews)]
    codes = generate(task.model, prompts, task.sampling, progress="samples of previews")
    tokens = judge.model.text_tokenizer.encode(texts.known[: len(captions)], truncate=True)
    tokens = tokens.repeat_interleave(settings.previews, dim=0)

    def scores(scales: int) -> np.ndarray:  # [prompts, previews]
        images = decode(task.tokenizer, codes, scales)
        features = judge.features(images, f"previews of {scales} scales")
        with torch.no_grad():
            embedded = judge.model.embed_images(features) * judge.model.embed_texts(tokens)
        return embedded.sum(dim=1).view(-1, settings.previews).double().numpy()

    *previews, finished = (scores(scales) for scales in range(1, codes.shape[1] + 1))
    about = {"prompts": len(captions), "previews": settings.previews}
    return [
        {"scales": scales, **about, **choice_scores(of_previews, finished)}
        for scales, of_previews in enumerate(previews, 1)
    ]


def choice_scores(previews: np.ndarray, finished: np.ndarray) -> dict[str, Any]:
    """Compare scores [P, M] of M previews of P prompts with those of the finished samples.

    Ranks are correlated within a prompt; the `gain` is over a choice at random.
    """
    prompts, pairs = range(len(previews)), zip(previews, finished, strict=True)
    chosen = finished[prompts, previews.argmax(axis=1)]
    # Equal previews have no correlation, and say nothing.
    correlations = np.nan_to_num([spearmanr(a, b).statistic for a, b in pairs])
    gain = chosen - finished.mean(axis=1)
    return {
        "rank_correlation": float(correlations.mean()),
        "rank_correlation_interval": list(metrics.bootstrap_interval(correlations, prompts)),
        "chosen_by_preview": float(chosen.mean()),
        "at_random": float(finished.mean()),
        "best": float(finished.max(axis=1).mean()),
        "gain": float(gain.mean()),
        "gain_interval": list(metrics.bootstrap_interval(gain, prompts)),
    }


def evaluate_applications(profile: Profile, pipeline: bool = False) -> dict[str, Any]:
    """Upsampling, editing and previews, with their `protocol` and `run`.

    But for the `pipeline` itself, its scores of these very models do.
    """
    settings, evaluation = profile.applications, profile.tokenizer.evaluation
    variants, seed = (settings.class_generator, settings.text_generator), settings.model_seed
    generators = [AutoregressiveRun.of(profile, name, seed) for name in variants]
    samplers = [profile.sampler(name) for name in variants]
    judged = [DualEncoderRun.of(profile), profile.text.evaluation, evaluation]
    run = digest(settings, *generators, *samplers, *judged, list(evaluation.sets))
    if not pipeline and (stored := stored_scores(FILE, run)):
        return stored
    metrics.fetch_weights()
    photographs, emoji, extra = class_task(profile), text_task(profile), extra_task(profile)
    tasks = {task.variant: task for task in (photographs, emoji)}
    sampler = ("top_k", "top_p", "guidance")
    return {
        "run": run,
        "upsampling": {
            name: {str(factor): measure_factor(profile, task, factor) for factor in FACTORS}
            | {"several": several_samples(profile, task)}
            for name, task in tasks.items()
        },
        "foreign": {
            "images": len(extra.images),
            "photographs": len(set(extra.groups)),
            "ways": measure_factor(profile, extra, FACTORS[0]),
        },
        "editing": editing(profile, emoji),
        "previews": {
            "seconds": preview_seconds(profile, emoji),
            "choice": preview_choice(profile, emoji),
        },
        "protocol": {
            "images": settings.images,
            "groups": {name: len(set(task.groups)) for name, task in tasks.items()},
            "inputs": "averaged over squares of 8, 4 and 2 px",
            "intervals": "95 %, percentile bootstrap over photographs; of emoji over names",
            "threads": torch.get_num_threads(),
            "samplers": {
                name: {key: getattr(task.sampling, key) for key in sampler}
                for name, task in tasks.items()
            },
        },
    }
