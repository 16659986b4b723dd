"""Measuring upsampling, editing and previews on held-out images: `python -m sitlib.experiments.applications`.

Two models do each task that they can: the class-conditional one on photographs, the text-conditional one on emoji, both over the codes of
scale-causal tokenizers. The functions that are measured are those of `sitlib.applications`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sitlib.applications import Drawn, edit, preview, refine, upsample
from sitlib.autoregressive import AutoregressiveModel
from sitlib.config import Profile, SamplingConfig, digest, load_profile
from sitlib.data import held_out_views, open_images
from sitlib.dual_encoder import DualEncoder
from sitlib.experiments.codes import captioned, held_out_wide, images_of
from sitlib.experiments.dual_encoder import judge_features, trained_dual_encoder
from sitlib.experiments.generators import trained_generator
from sitlib.experiments.rate_distortion import rate_distortion
from sitlib.experiments.runs import AutoregressiveRun, DualEncoderRun, TokenizerRun, command
from sitlib.experiments.text_evaluation import prompts as evaluation_prompts
from sitlib.experiments.tokenizers import trained_tokenizer
from sitlib.lite0 import Lite0, load_lite0
from sitlib.metrics import (
    bootstrap_interval,
    generation_metrics,
    lite0_features,
    lpips_per_image,
    paired_interval,
    psnr_per_image,
    r_precision,
    reconstruction_values,
)
from sitlib.paths import resolve
from sitlib.perceptual import load_lpips
from sitlib.results import read_metrics, write_metrics
from sitlib.sampling import Prompts, generate
from sitlib.tokenizer import SpectralTokenizer

SHARES = (8, 4, 2)  # of the full side, that inputs of upsampling have


@dataclass
class Task:
    """A generator, its tokenizer, and held-out images with what the model is told of them."""

    variant: str
    model: AutoregressiveModel
    tokenizer: SpectralTokenizer
    sampling: SamplingConfig
    images: Tensor  # [V, 3, H, H]
    prompts: Prompts
    keys: list[Any]  # the photograph of each view


def class_task(profile: Profile) -> Task:
    """Wide views of held-out photographs and their classes."""
    variant, count = profile.applications.class_generator, profile.applications.images
    images, labels = held_out_wide(profile, variant, count)
    photographs = len(images_of(profile, variant, "test"))
    return Task(variant, *_models(profile, variant), images, labels, [i % photographs for i in range(count)])


def text_task(profile: Profile) -> Task:
    """Wide views of held-out images and a caption of each."""
    variant, count = profile.applications.text_generator, profile.applications.images
    images, positions = held_out_wide(profile, variant, count)
    texts = captioned(profile, "test")
    captions = [texts.captions[position][0] for position in positions.tolist()]
    return Task(variant, *_models(profile, variant), images, captions, positions.tolist())


def _models(profile: Profile, variant: str) -> tuple[AutoregressiveModel, SpectralTokenizer, SamplingConfig]:
    section, name = profile.generator_section(variant), profile.autoregressive_variant(variant).tokenizer
    model = trained_generator(profile, variant, profile.applications.model_seed).model
    return model, trained_tokenizer(profile, name, section.tokenizer_seed).model, section.sampling


# -- upsampling ------------------------------------------------------------------------------------------------------------------------


def enlarged(images: Tensor, size: int, way: str) -> Tensor:
    """Images [B, 3, h, h] in [0, 1] enlarged to `size` px, clamped: "bicubic" by torch, "lanczos" by Pillow (in float)."""
    if way == "bicubic":
        return F.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)
    if way != "lanczos":
        raise ValueError(f"there is no way to enlarge {way!r}: choose 'bicubic' or 'lanczos'.")

    def channel(values: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.LANCZOS))

    found = np.stack([channel(values) for values in images.flatten(0, 1).numpy()])
    return torch.from_numpy(found).unflatten(0, images.shape[:2]).clamp(0, 1)


def upsampling(profile: Profile, tasks: list[Task]) -> dict[str, Any]:
    """Held-out images at 1/8, 1/4 and 1/2 of the size, enlarged in several ways.

    Returns:
        variant -> share as text -> way -> `lpips_alex`, `psnr` (dB) to the original, their `intervals`, `lpips_ratio` to bicubic and its
        `ratio_interval`, `fd_lite0` to the originals, `consistency` (PSNR, dB, of the result averaged down again to the input). Ways are
        "bicubic", "lanczos", "untold" (the model is told nothing) and "told, temperature T". And `several`: of repeated samples at 1/8.
    """
    lite0, found = load_lite0(), {}
    for task in tasks:
        originals = lite0_features(task.images, lite0, progress=f"{task.variant}, originals")
        found[task.variant] = {
            str(share): _ways(task, share, originals, lite0, profile) for share in SHARES
        } | {"several": _several(task, profile)}
    return found


def _ways(task: Task, share: int, originals: Tensor, lite0: Lite0, profile: Profile) -> dict[str, Any]:
    """Scores of every way of upsampling from 1 / share of the size."""
    settings, full = profile.applications, task.images.shape[-1]
    small = F.avg_pool2d(task.images, share)

    def drawn(told: Prompts | None, temperature: float) -> Tensor:
        sampling = replace(task.sampling, temperature=temperature)
        return upsample(task.model, task.tokenizer, small, told, sampling).images

    ways = {way: enlarged(small, full, way) for way in ("bicubic", "lanczos")}
    ways["untold"] = drawn(None, 1.0)
    for temperature in settings.temperatures if share == SHARES[0] else (1.0,):
        ways[f"told, temperature {temperature:g}"] = drawn(task.prompts, temperature)
    scores, lpips = {}, {}
    for way, images in ways.items():
        title = f"{task.variant}, 1/{share}, {way}"
        values = reconstruction_values(task.images, images, lpips_nets=("alex",), progress=title)
        lpips[way] = values["lpips_alex"]
        scores[way] = {
            **{name: float(values[name].mean()) for name in ("psnr", "lpips_alex")},
            "intervals": {
                name: list(bootstrap_interval(values[name], task.keys)) for name in ("psnr", "lpips_alex")
            },
            "lpips_ratio": float(lpips[way].mean() / lpips["bicubic"].mean()),
            "ratio_interval": list(paired_interval(lpips[way], lpips["bicubic"], task.keys, kind="ratio")),
            "fd_lite0": _distance(images, originals, lite0, profile, title),
            "consistency": float(psnr_per_image(F.avg_pool2d(images, share), small).mean()),
        }
    return scores


def _distance(images: Tensor, originals: Tensor, lite0: Lite0, profile: Profile, title: str) -> float:
    subset = profile.applications.kid_subset_size
    return generation_metrics(images, originals, lite0=lite0, kid_subset_size=subset, progress=title)[
        "fd_lite0"
    ]


def _several(task: Task, profile: Profile) -> dict[str, float]:
    """Several samples from one input at 1/8: how far apart they are, and what choosing the best would give, in LPIPS-Alex."""
    settings, share = profile.applications, SHARES[0]
    images = task.images[: settings.repeated]
    told = task.prompts[: settings.repeated]
    network = load_lpips("alex")
    drawn = [
        upsample(
            task.model, task.tokenizer, F.avg_pool2d(images, share), told, replace(task.sampling, seed=seed)
        ).images
        for seed in range(settings.samples)
    ]
    to_original = torch.stack([lpips_per_image(found, images, network) for found in drawn])
    between = [lpips_per_image(a, b, network).mean() for i, a in enumerate(drawn) for b in drawn[:i]]
    return {
        "images": len(images),
        "samples": len(drawn),
        "between_samples": float(torch.stack(between).mean()),
        "mean": float(to_original.mean()),
        "best": float(to_original.min(dim=0).values.mean()),
    }


# -- editing ---------------------------------------------------------------------------------------------------------------------------


def new_captions(profile: Profile, count: int) -> tuple[list[str], list[str], list[str]]:
    """What images shall show instead: `count` captions in new words, the same in known words, and the names, of training images."""
    asked = evaluation_prompts(profile, "seen")
    order = [i % len(asked.captions) for i in range(count)]
    return tuple([parts[i] for i in order] for parts in (asked.captions, asked.known, asked.names))


def editing(profile: Profile, task: Task) -> dict[str, Any]:
    """Held-out images with new captions and k of their scales kept, k from 0 to all.

    Returns:
        `kept` -> k as text -> `frozen_codes_equal`, `r_precision_new` and `r_precision_old` (%, by the dual encoder: the new caption, or
        the image's own, among others of its kind), `lpips_alex` to the original, and intervals.
    """
    settings = profile.applications
    judge, run, lite0 = trained_dual_encoder(profile).model, DualEncoderRun.of(profile), load_lite0()
    asked, known, names = new_captions(profile, len(task.images))
    texts = captioned(profile, "test")
    own = [texts.captions[key][0] for key in task.keys]
    own_names = [texts.names[key] for key in task.keys]
    codes = torch.cat([task.tokenizer.encode(batch) for batch in task.images.split(64)])
    network, kept = load_lpips("alex"), {}

    def found_by(features: Tensor, captions: list[str], of: list[str]) -> dict[str, Any]:
        values = 100 * _retrieved(judge, features, captions, of, profile)
        return {"value": float(values.mean()), "interval": list(bootstrap_interval(values, of))}

    for keep in range(task.tokenizer.geometry.num_scales + 1):
        result = edit(
            task.model, task.tokenizer, task.images, asked, keep, task.sampling, f"editing, {keep} kept"
        )
        features = judge_features(result.images, lite0, run, f"edited, {keep} kept")
        lpips = lpips_per_image(result.images, task.images, network)
        kept[str(keep)] = {
            "frozen_codes_equal": bool(torch.equal(result.codes[:, :keep], codes[:, :keep])),
            "r_precision_new": found_by(features, known, names),
            "r_precision_old": found_by(features, own, own_names),
            "lpips_alex": {
                "value": float(lpips.mean()),
                "interval": list(bootstrap_interval(lpips, task.keys)),
            },
        }
    return {"kept": kept, "candidates": profile.text.evaluation.candidates, "images": settings.images}


def _retrieved(
    judge: DualEncoder, features: Tensor, captions: list[str], names: list[str], profile: Profile
) -> Tensor:
    """Whether each image's caption is found among those of other names, [M]."""
    settings = profile.text.evaluation
    with torch.no_grad():
        similarity = judge.similarity(features, judge.text_tokenizer.encode(captions, truncate=True))
    right = torch.arange(len(similarity))
    return r_precision(similarity, right, names, candidates=settings.candidates, seed=settings.seed)


# -- previews --------------------------------------------------------------------------------------------------------------------------


def previews(profile: Profile, task: Task) -> dict[str, Any]:
    """Seconds of previews and finished samples, and whether a preview says which sample will be the best.

    Returns:
        `seconds`: of the first preview, of all previews, of finishing one, of one full sample, of as many full samples as previews; the
        medians of several rounds. `choice`: for 1, 2, ... scales the rank correlation, within a prompt, between the dual encoder's
        score of the preview and of the finished sample; and mean scores of the finished samples: chosen by preview, at random, the best.
    """
    return {"seconds": _preview_seconds(profile, task), "choice": _preview_choice(profile, task)}


def _preview_seconds(profile: Profile, task: Task) -> dict[str, float]:
    settings = profile.applications
    model, tokenizer, sampling, count = task.model, task.tokenizer, task.sampling, settings.previews
    prompt, scales = task.prompts[0], tokenizer.geometry.num_scales
    shown = preview(model, tokenizer, prompt, sampling, count)
    actions: dict[str, Callable[[], Drawn]] = {
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
    return {name: statistics.median(values) for name, values in times.items()}


def _preview_choice(profile: Profile, task: Task) -> list[dict[str, float]]:
    settings = profile.applications
    judge, run, lite0 = trained_dual_encoder(profile).model, DualEncoderRun.of(profile), load_lite0()
    captions = evaluation_prompts(profile, "seen").captions[: settings.preview_prompts]
    told = [caption for caption in captions for _ in range(settings.previews)]
    codes = generate(task.model, told, task.sampling, progress="samples of previews")
    tokens = judge.text_tokenizer.encode(captions, truncate=True).repeat_interleave(settings.previews, dim=0)

    def scores(scales: int) -> np.ndarray:
        """Cosine of each image of the first scales with its caption, [prompts, previews]."""
        images = torch.cat([task.tokenizer.decode(batch, scales) for batch in codes.split(64)])
        features = judge_features(images, lite0, run, f"previews of {scales} scales")
        with torch.no_grad():
            similarity = (judge.embed_images(features) * judge.embed_texts(tokens)).sum(dim=1)
        return similarity.view(-1, settings.previews).double().numpy()

    finished = scores(codes.shape[1])
    rows = []
    for scales in range(1, codes.shape[1]):
        seen = scores(scales)
        chosen = finished[np.arange(len(seen)), seen.argmax(axis=1)]
        rows.append(
            {
                "scales": scales,
                "rank_correlation": float(
                    np.mean([_spearman(a, b) for a, b in zip(seen, finished, strict=True)])
                ),
                "chosen_by_preview": float(chosen.mean()),
                "at_random": float(finished.mean()),
                "best": float(finished.max(axis=1).mean()),
                "prompts": len(captions),
                "previews": settings.previews,
            }
        )
    return rows


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two vectors without ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


# -- other data ------------------------------------------------------------------------------------------------------------------------


def foreign(profile: Profile) -> Task:
    """The extra photographs, of which the class-conditional model is told nothing."""
    chosen = profile.tokenizer.evaluation.sets["extra"]
    size, seed = profile.data.size, profile.tokenizer.evaluation.seed
    images, _, keys = held_out_views(
        open_images(chosen.source, "test"), chosen.views, size, seed, kind="wide"
    )
    variant = profile.applications.class_generator
    return Task(variant, *_models(profile, variant), images, len(images), keys)


def foreign_upsampling(profile: Profile, task: Task) -> dict[str, Any]:
    """The extra photographs from 1/8 of the size: bicubic, Lanczos, and the class-conditional model that is told nothing."""
    lite0 = load_lite0()
    originals = lite0_features(task.images, lite0, progress="extra, originals")
    subset = min(profile.applications.kid_subset_size, len(task.images) // 2)
    chosen = replace(
        profile, applications=replace(profile.applications, kid_subset_size=subset, temperatures=[1.0])
    )
    ways = _ways(replace(task, prompts=len(task.images)), SHARES[0], originals, lite0, chosen)
    ways.pop("told, temperature 1")
    return {"images": len(task.images), "photographs": len(set(task.keys)), "ways": ways}


# -- results ---------------------------------------------------------------------------------------------------------------------------


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
        "photographs": {task.variant: len(set(task.keys)) for task in (photographs, texts)},
        "inputs": "averaged over squares of 8, 4 and 2 px",
        "intervals": "95 %, percentile bootstrap over photographs",
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
    path = "metrics/applications.json"
    if resolve(path).exists() and (scores := read_metrics(path)).get("run") == _run(profile):
        return scores
    return measure(profile)


def _run(profile: Profile) -> str:
    settings, seed = profile.applications, profile.applications.model_seed
    runs = [
        AutoregressiveRun.of(profile, name, seed)
        for name in (settings.class_generator, settings.text_generator)
    ]
    baseline = TokenizerRun.of(profile, settings.baseline, profile.autoregressive.tokenizer_seed)
    samplers = [profile.autoregressive.sampling, profile.text.sampling]
    judged = [DualEncoderRun.of(profile), profile.text.evaluation, profile.tokenizer.evaluation]
    return digest(settings, *runs, baseline, *samplers, *judged)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sitlib.experiments.applications", description=__doc__)
    parser.add_argument("--profile", required=True)
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    write_metrics("metrics/applications.json", {"run": _run(profile), **measure(profile)})


if __name__ == "__main__":
    command(main)
