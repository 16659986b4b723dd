"""Extracting codes once with a frozen tokenizer: `python -m workbook.codes`. Training on codes then touches no pixels.

The same command may run many times at once, on many machines: its processes share the work (`torchrun --nproc-per-node 8 -m
workbook.codes ...` gives each its GPU).
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sitlib.data import (
    CaptionedImages,
    ImageSource,
    held_out_views,
    open_captioned,
    open_images,
    prefetch,
    training_views,
)
from sitlib.data.captions import Phrasing
from sitlib.data.manifest import sha256_of
from sitlib.data.token_shards import CodeMaps, Job, jobs, make_shards, read_manifest, read_maps
from sitlib.model.precision import best_device
from sitlib.strict import digest
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.runs import CodesRun, command, resume_key
from workbook.tokenizers import trained_tokenizer

BATCH = 64  # views at a time


@dataclass
class Codes:
    """Codes of wide views, and what is known of their images."""

    train: CodeMaps  # [M, S, N], read from disk where it is indexed
    train_labels: (
        Tensor  # [M] int64 class ids; for captioned images, their positions in the training split
    )
    held_out: Tensor  # [V, S, N] int64
    held_out_labels: Tensor  # [V] int64, likewise
    classes: list[str]


def images_of(profile: Profile, variant: str, split: str) -> ImageSource:
    """The images that an autoregressive variant is about: those with a class, or those with captions."""
    run = CodesRun.of(profile, variant)
    if run.captions is not None:
        return captioned(profile, split).images
    return open_images(run.tokenizer.source, split).labelled()


def captioned(profile: Profile, split: str, phrasing: Phrasing = "training") -> CaptionedImages:
    """The images of the text-conditional models and their captions; `phrasing` "new": in words that training never sees."""
    run = CodesRun.of(profile, next(iter(profile.text.variants)))
    settings = run.captions
    assert settings is not None
    return open_captioned(
        run.tokenizer.source,
        split,
        settings.source,
        phrasing=phrasing,
        seed=settings.seed,
        count=settings.per_image,
    )


def held_out_wide(
    profile: Profile, variant: str, count: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Wide views [count, 3, H, W] of the held-out images of an autoregressive variant, and their classes or positions [count].

    Args:
        first: views to leave out at the beginning of the set, which can so be made in parts.
    """
    images, run = images_of(profile, variant, "test"), CodesRun.of(profile, variant)
    return _held_out(images, run, count, first)


def _held_out(images: ImageSource, run: CodesRun, count: int, first: int) -> tuple[Tensor, Tensor]:
    views, labels, keys = held_out_views(
        images, count, run.tokenizer.data.size, run.codes.seed, kind="wide", first=first
    )
    return views, labels if run.captions is None else _positions(images, keys)


def _positions(images: ImageSource, keys: list[str]) -> Tensor:
    """[B] int64: where the images of some keys are in their split."""
    return torch.tensor([images.position_of[key] for key in keys])


def extract_codes(profile: Profile, variant: str, output: str | Path, workers: int = 0) -> Codes:
    """Encodes wide views of the images of an autoregressive variant, and writes the codes to the folder `output`.

    Several processes that are given the same arguments share the work; one that was killed goes on at its shards when it is called again.

    Args:
        workers: processes that decode images, as for `prefetch`.
    """
    run = CodesRun.of(profile, variant)
    settings, data, seed = run.codes, run.tokenizer.data, run.tokenizer.seed
    name = profile.autoregressive_variant(variant).tokenizer
    tokenizer = trained_tokenizer(profile, name, seed)
    device = _own_device()
    model = tokenizer.model.to(device)
    images = {
        "train": images_of(profile, variant, "train"),
        "held_out": images_of(profile, variant, "test"),
    }
    # Whole epochs: every image as often as any other.
    totals = {
        "train": settings.views_per_image * len(images["train"]),
        "held_out": settings.held_out_views,
    }

    def batch(split: str, number: int) -> tuple[list[Tensor], Tensor]:
        """Views and, where wanted, their mirror images; labels."""
        count = min(BATCH, totals[split] - number * BATCH)
        if split == "held_out":
            views, labels = _held_out(images[split], run, count, number * BATCH)
            return [views], labels
        views, labels, keys = training_views(
            images[split], number, BATCH, data.size, settings.seed, kind="wide", flip=False
        )
        labels = labels if run.captions is None else _positions(images[split], keys)
        return [views[:count], views[:count].flip(-1)][: 1 + settings.mirrored], labels[:count]

    def make(job: Job) -> tuple[Tensor, Tensor]:
        codes, labels = [], []
        batches = prefetch(
            lambda number: batch(job.split, number),
            job.batches.start,
            job.batches.stop,
            workers=workers,
        )
        title = f"codes of {name}, seed {seed}: {job.name.removesuffix('.safetensors')}"
        for _, (views, of_views) in tqdm(
            batches, title, len(job.batches), unit="batch", mininterval=5.0, ncols=110
        ):
            codes += [model.encode(part.to(device)).cpu() for part in views]
            labels += [of_views] * len(views)
        return torch.cat(codes), torch.cat(labels)

    config = run.tokenizer.model
    maps = BATCH * (1 + settings.mirrored)
    wanted = jobs(
        {split: -(-total // BATCH) for split, total in totals.items()},
        maps * (config.levels + 1) * config.tokens_per_scale * 2,
    )
    class_names = [] if run.captions is not None else images["train"].class_names
    about = {"run": digest(run), "classes": class_names}
    make_shards(
        output, resume_key(run, sha256_of(tokenizer.path)), wanted, make, about, config.num_codes
    )
    return read_codes(output)


def _own_device() -> torch.device:
    """This process's GPU where a launcher has started one for each."""
    device = best_device()
    return (
        torch.device(device.type, int(os.environ["LOCAL_RANK"])) if _has_own_gpu(device) else device
    )


def _has_own_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and int(os.environ.get("LOCAL_RANK", "-1")) in range(
        torch.cuda.device_count()
    )


def read_codes(folder: str | Path) -> Codes:
    """The codes in a folder that `extract_codes` has written."""
    train, held_out = (read_maps(folder, split) for split in ("train", "held_out"))
    return Codes(
        train, train.labels, held_out[:], held_out.labels, read_manifest(folder)["classes"]
    )


def load_codes(profile: Profile, variant: str) -> Codes:
    """The codes of this very run: the pipeline's, else those under `scratch/`, extracted now if need be."""
    code_run, name = (
        CodesRun.of(profile, variant),
        profile.autoregressive_variant(variant).tokenizer,
    )
    run, seed = digest(code_run), code_run.tokenizer.seed
    own = resolve(f"scratch/codes/{name}-seed{seed}/{run}")
    for folder in (resolve(f"codes/{name}-seed{seed}"), own):
        if read_manifest(folder).get("run") == run:
            return read_codes(folder)
    return extract_codes(profile, variant, own)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.codes", description=__doc__)
    parser.add_argument("--profile", required=True)
    parser.add_argument(
        "--variant", required=True, help="name of the autoregressive variant that needs the codes"
    )
    parser.add_argument(
        "--seed", type=int, required=True, help="seed of the tokenizer, as the profile has it"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that decode images (default: data_workers of the engine)",
    )
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    workers = profile.engine.data_workers if arguments.workers is None else arguments.workers
    wanted = profile.generator_section(arguments.variant).tokenizer_seed
    if arguments.seed != wanted:
        raise ValueError(
            f"tokenizer_seed is {arguments.seed} in params.yaml and {wanted} in the profile: make them the same."
        )
    codes = extract_codes(profile, arguments.variant, arguments.output, workers)
    print(
        f"{len(codes.train)} training and {len(codes.held_out)} held-out code maps, {list(codes.train.shape[1:])} each"
    )


if __name__ == "__main__":
    command(main)
