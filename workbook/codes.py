"""Codes of views, extracted once with a frozen tokenizer, so that training touches no pixels.

`torchrun --nproc-per-node 8 -m workbook extract_codes run=...` shares the work between processes.
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sitlib.data import (
    CaptionedImages,
    ImageSource,
    TokenShards,
    held_out_views,
    make_shards,
    open_captioned,
    prefetch,
    read_manifest,
    training_views,
)
from sitlib.data.captions import Phrasing
from sitlib.files import sha256_of
from sitlib.model.transformer import best_device
from sitlib.strict import digest
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.runs import CodesRun
from workbook.tokenizers import open_split, tokenizer_of_codes

BATCH = 64  # views at a time
SHARD_BYTES = 2**27  # of codes, at most (but at least one batch)
Views = tuple[Tensor, Tensor]  # [B, 3, H, W] in [0, 1], labels int64 [B]


@dataclass
class Codes:
    """Codes of wide views. Labels are class ids; of captioned images, positions in their split."""

    train: TokenShards  # [M, S, N], read from disk where it is indexed
    train_labels: Tensor  # [M] int64
    held_out: Tensor  # [V, S, N] int64
    held_out_labels: Tensor  # [V] int64
    classes: list[str]


def images_of(profile: Profile, variant: str, split: str) -> ImageSource:
    """Images of an autoregressive variant: those with a class, or those with captions."""
    if variant in profile.text.variants:
        return captioned(profile, split).images
    data = CodesRun.of(profile, variant).tokenizer.data
    return open_split(replace(data, source=data.folder), split).labeled()


def captioned(profile: Profile, split: str, phrasing: Phrasing = "training") -> CaptionedImages:
    """Images of the text-conditional models with captions ("new": in unseen phrasings)."""
    run, settings = CodesRun.of(profile, next(iter(profile.text.variants))), profile.text.captions
    captions = settings.source
    captions = captions if captions in ("names", "records") else resolve(captions)
    options = {"phrasing": phrasing, "seed": settings.seed, "count": settings.per_image}
    return _opened(resolve(run.tokenizer.data.folder), split, captions, **options)


_opened = lru_cache(maxsize=4)(open_captioned)  # thousands of images take seconds


def held_out_wide(profile: Profile, variant: str, count: int, first: int = 0) -> Views:
    """Wide held-out views of an autoregressive variant, without the first `first` ones."""
    images = images_of(profile, variant, "test")
    return _held_out(images, CodesRun.of(profile, variant), count, first)


def _held_out(images: ImageSource, run: CodesRun, count: int, first: int) -> Views:
    size, seed = run.tokenizer.data.size, run.codes.seed
    views, labels, keys = held_out_views(images, count, size, seed, kind="wide", first=first)
    return views, _labels(run, images, labels, keys)


def _labels(run: CodesRun, images: ImageSource, classes: Tensor, keys: list[str]) -> Tensor:
    """Class ids [B] of views, or the positions [B] of captioned images."""
    if run.captions is None:
        return classes
    return torch.tensor([images.position_of[key] for key in keys])


def extract_codes(profile: Profile, variant: str, folder: str | Path, workers: int = 0) -> Codes:
    """Encode wide views of the images of an autoregressive variant into a folder of shards.

    The processes of a launcher (torchrun) share the work; a killed call is continued by the next.
    `workers` is for `prefetch`.
    """
    run = CodesRun.of(profile, variant)
    settings, data, config = run.codes, run.tokenizer.data, run.tokenizer.model
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **os.environ}
    rank, world_size, local_rank = (int(launcher[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = best_device()
    if device.type == "cuda" and local_rank < torch.cuda.device_count():
        device = torch.device("cuda", local_rank)
    name = profile.autoregressive_variant(variant).tokenizer
    tokenizer = tokenizer_of_codes(profile, variant)
    model = tokenizer.model.to(device)
    train, test = (images_of(profile, variant, split) for split in ("train", "test"))
    # Whole epochs: every image as often as any other.
    num_views = {"train": settings.views_per_image * len(train)}
    num_views |= {"held_out": settings.held_out_views}

    def make_batch(split: str, number: int) -> tuple[list[Tensor], Tensor]:
        """Views [B, 3, H, W], their mirror images where wanted, and labels [B]."""
        count = min(BATCH, num_views[split] - number * BATCH)
        if split == "held_out":
            views, labels = _held_out(test, run, count, number * BATCH)
            return [views], labels
        place = number, BATCH, data.size, settings.seed
        views, classes, keys = training_views(train, *place, kind="wide", flip=False)
        labels = _labels(run, train, classes, keys)
        return [views[:count], views[:count].flip(-1)][: 1 + settings.mirrored], labels[:count]

    def make_shard(split: str, batches: range) -> tuple[Tensor, Tensor]:
        codes, labels = [], []
        ahead = prefetch(partial(make_batch, split), batches.start, batches.stop, workers=workers)
        title = f"codes of {name}: {split}"
        for _, (views, of_views) in tqdm(ahead, title, len(batches), unit="batch", mininterval=5.0):
            codes += [model.encode(v.to(device)).cpu() for v in views]
            labels += [of_views] * len(views)
        return torch.cat(codes), torch.cat(labels)

    num_codes = BATCH * (1 + settings.mirrored) * config.num_scales * config.tokens_per_scale
    per_shard = max(1, SHARD_BYTES // (2 * num_codes))
    num_batches = {split: -(-count // BATCH) for split, count in num_views.items()}
    manifest = {
        "run": digest(run),
        "tokenizer": sha256_of(tokenizer.path),
        "classes": [] if run.captions is not None else train.class_names,
    }
    folder, ranks = resolve(folder), (rank, world_size)
    most = max(config.codebook_sizes)
    make_shards(folder, num_batches, per_shard, make_shard, manifest, most, *ranks)
    return read_codes(folder)


def extract_run(profile: Profile, variant: str, seed: int, workers: int | None = None) -> None:
    """Codes of the pipeline by the tokenizer `variant`, for all models of the profile over them."""
    variants = [*profile.autoregressive.variants, *profile.text.variants]
    variants = [v for v in variants if profile.autoregressive_variant(v).tokenizer == variant]
    variants = [v for v in variants if profile.generator_section(v).tokenizer_seed == seed]
    if not variants:
        raise ValueError(
            f"No model of the profile is over codes of {variant}-seed{seed}: make the seed that "
            "params.yaml lists, and tokenizer_seed of the profile, the same."
        )
    processes = profile.engine.data_workers if workers is None else workers
    codes = extract_codes(profile, variants[0], f"codes/{variant}-seed{seed}", processes)
    shape = list(codes.train.shape[1:])
    print(f"{len(codes.train)} training and {len(codes.held_out)} held-out code maps, {shape} each")


def read_codes(folder: Path) -> Codes:
    """Codes in a folder that `extract_codes` has written."""
    train, held_out = (TokenShards(folder, split) for split in ("train", "held_out"))
    classes = read_manifest(folder)["classes"]
    return Codes(train, train.labels, held_out[:], held_out.labels, classes)


def load_codes(profile: Profile, variant: str) -> Codes:
    """Codes of this very run: the pipeline's, else those under `scratch/`, extracted if need be."""
    run = CodesRun.of(profile, variant)
    name = f"{profile.autoregressive_variant(variant).tokenizer}-seed{run.tokenizer.seed}"
    scratch = resolve(f"scratch/codes/{name}/{digest(run)}")
    for folder in (resolve(f"codes/{name}"), scratch):
        if read_manifest(folder).get("run") == digest(run):
            return read_codes(folder)
    return extract_codes(profile, variant, scratch)
