"""Extracting codes once with a frozen tokenizer: `python -m sitlib.experiments.codes`. Training on codes then touches no pixels."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sitlib.checkpoint import read_about, write_tensors
from sitlib.config import Profile, digest, load_profile
from sitlib.data import held_out_views, open_images, training_views
from sitlib.experiments.runs import CodesRun, command
from sitlib.experiments.tokenizers import trained_tokenizer
from sitlib.paths import resolve

BATCH = 64  # views at a time


@dataclass
class Codes:
    """Codes of wide views and their classes."""

    train: Tensor  # [M, S, N] int64
    train_labels: Tensor  # [M] int64
    held_out: Tensor  # [V, S, N] int64
    held_out_labels: Tensor  # [V] int64
    classes: list[str]


def held_out_wide(profile: Profile, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Wide views of labelled held-out photographs: images [count, 3, H, W], labels [count], keys."""
    source = open_images(profile.data.source, "test").labelled()
    return held_out_views(source, count, profile.data.size, profile.autoregressive.codes.seed, kind="wide")


def extract_codes(profile: Profile, tokenizer: str, seed: int, output: str | Path) -> Codes:
    """Encodes wide views of the labelled photographs, each view and its mirror image, and writes the codes to `output`."""
    settings, data = profile.autoregressive.codes, profile.data
    model = trained_tokenizer(profile, tokenizer, seed).model
    photographs = open_images(data.source, "train").labelled()

    def encode(images: Tensor) -> Tensor:
        return torch.cat([model.encode(batch) for batch in images.split(BATCH)])

    codes, labels = [], []
    total = settings.views_per_image * len(
        photographs
    )  # whole epochs: every photograph as often as any other
    title = f"codes of {tokenizer}, seed {seed}"
    for step in tqdm(range(-(-total // BATCH)), title, unit="batch", mininterval=5.0, ncols=110):
        views, view_labels = training_views(
            photographs, step, BATCH, data.size, settings.seed, kind="wide", flip=False
        )
        count = min(BATCH, total - step * BATCH)
        codes += [encode(views[:count]), encode(views[:count].flip(-1))]
        labels += [view_labels[:count]] * 2
    held_out, held_out_labels, _ = held_out_wide(profile, settings.held_out_views)
    result = Codes(
        torch.cat(codes), torch.cat(labels), encode(held_out), held_out_labels, photographs.class_names
    )

    tensors = {field.name: getattr(result, field.name) for field in fields(Codes) if field.type is Tensor}
    write_tensors(
        output, tensors, {"run": digest(CodesRun.of(profile, tokenizer, seed)), "classes": result.classes}
    )
    return result


def load_codes(profile: Profile, tokenizer: str, seed: int) -> Codes:
    """The codes of this very run: the pipeline's, else those under `scratch/`, extracted now if need be."""
    run = digest(CodesRun.of(profile, tokenizer, seed))
    own = resolve(f"scratch/codes/{tokenizer}-seed{seed}/{run}.safetensors")
    for path in (resolve(f"codes/{tokenizer}-seed{seed}.safetensors"), own):
        about = read_about(path)
        if about.get("run") == run:
            return Codes(**load_file(path), classes=about["classes"])
    return extract_codes(profile, tokenizer, seed, own)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sitlib.experiments.codes", description=__doc__)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--tokenizer", required=True, help="name of a tokenizer variant")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    codes = extract_codes(
        load_profile(arguments.profile), arguments.tokenizer, arguments.seed, arguments.output
    )
    print(
        f"{len(codes.train)} training and {len(codes.held_out)} held-out code maps, {list(codes.train.shape[1:])} each"
    )


if __name__ == "__main__":
    command(main)
