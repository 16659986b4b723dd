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
from sitlib.data import (
    CaptionedImages,
    ImageSource,
    held_out_views,
    open_captioned,
    open_images,
    training_views,
)
from sitlib.experiments.runs import CodesRun, command
from sitlib.experiments.tokenizers import trained_tokenizer
from sitlib.paths import resolve

BATCH = 64  # views at a time


@dataclass
class Codes:
    """Codes of wide views, and what is known of their images."""

    train: Tensor  # [M, S, N] int64
    train_labels: Tensor  # [M] int64 class ids; for captioned images, their positions in the training split
    held_out: Tensor  # [V, S, N] int64
    held_out_labels: Tensor  # [V] int64, likewise
    classes: list[str]


def images_of(profile: Profile, variant: str, split: str) -> ImageSource:
    """The images that an autoregressive variant is about: those with a class, or those with captions."""
    run = CodesRun.of(profile, variant)
    if run.captions is not None:
        return captioned(profile, split).images
    return open_images(run.tokenizer.source, split).labelled()


def captioned(profile: Profile, split: str, phrasing: str = "training") -> CaptionedImages:
    """The images of the text-conditional models and their captions; `phrasing` "new": in words that training never sees."""
    run = CodesRun.of(profile, next(iter(profile.text.variants)))
    settings = run.captions
    return open_captioned(
        run.tokenizer.source,
        split,
        settings.source,
        phrasing=phrasing,
        seed=settings.seed,
        count=settings.per_image,
    )


def held_out_wide(profile: Profile, variant: str, count: int) -> tuple[Tensor, Tensor]:
    """Wide views [count, 3, H, W] of the held-out images of an autoregressive variant, and their classes or positions [count]."""
    images, run = images_of(profile, variant, "test"), CodesRun.of(profile, variant)
    views, labels, keys = held_out_views(images, count, run.tokenizer.data.size, run.codes.seed, kind="wide")
    if run.captions is not None:
        position = {key: index for index, key in enumerate(images.keys)}
        labels = torch.tensor([position[key] for key in keys])
    return views, labels


def extract_codes(profile: Profile, variant: str, output: str | Path) -> Codes:
    """Encodes wide views of the images of an autoregressive variant, and writes the codes to `output`."""
    run = CodesRun.of(profile, variant)
    settings, data, seed = run.codes, run.tokenizer.data, run.tokenizer.seed
    name = profile.autoregressive_variant(variant).tokenizer
    model = trained_tokenizer(profile, name, seed).model
    images = images_of(profile, variant, "train")

    def encode(views: Tensor) -> Tensor:
        return torch.cat([model.encode(batch) for batch in views.split(BATCH)])

    codes, labels = [], []
    total = settings.views_per_image * len(images)  # whole epochs: every image as often as any other
    position = {key: index for index, key in enumerate(images.keys)}
    title = f"codes of {name}, seed {seed}"
    for step in tqdm(range(-(-total // BATCH)), title, unit="batch", mininterval=5.0, ncols=110):
        views, classes, keys = training_views(
            images, step, BATCH, data.size, settings.seed, kind="wide", flip=False
        )
        count = min(BATCH, total - step * BATCH)
        if run.captions is not None:
            classes = torch.tensor([position[key] for key in keys])
        for mirrored in (False, True)[: 1 + settings.mirrored]:
            codes.append(encode(views[:count].flip(-1) if mirrored else views[:count]))
            labels.append(classes[:count])
    held_out, held_out_labels = held_out_wide(profile, variant, settings.held_out_views)
    class_names = [] if run.captions is not None else images.class_names
    result = Codes(torch.cat(codes), torch.cat(labels), encode(held_out), held_out_labels, class_names)

    tensors = {field.name: getattr(result, field.name) for field in fields(Codes) if field.type is Tensor}
    write_tensors(output, tensors, {"run": digest(run), "classes": result.classes})
    return result


def load_codes(profile: Profile, variant: str) -> Codes:
    """The codes of this very run: the pipeline's, else those under `scratch/`, extracted now if need be."""
    code_run, name = CodesRun.of(profile, variant), profile.autoregressive_variant(variant).tokenizer
    run, seed = digest(code_run), code_run.tokenizer.seed
    own = resolve(f"scratch/codes/{name}-seed{seed}/{run}.safetensors")
    for path in (resolve(f"codes/{name}-seed{seed}.safetensors"), own):
        about = read_about(path)
        if about.get("run") == run:
            return Codes(**load_file(path), classes=about["classes"])
    return extract_codes(profile, variant, own)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sitlib.experiments.codes", description=__doc__)
    parser.add_argument("--profile", required=True)
    parser.add_argument(
        "--variant", required=True, help="name of the autoregressive variant that needs the codes"
    )
    parser.add_argument(
        "--seed", type=int, required=True, help="seed of the tokenizer, as the profile has it"
    )
    parser.add_argument("--output", required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    wanted = profile.generator_section(arguments.variant).tokenizer_seed
    if arguments.seed != wanted:
        raise ValueError(
            f"tokenizer_seed is {arguments.seed} in params.yaml and {wanted} in the profile: make them the same."
        )
    codes = extract_codes(profile, arguments.variant, arguments.output)
    print(
        f"{len(codes.train)} training and {len(codes.held_out)} held-out code maps, {list(codes.train.shape[1:])} each"
    )


if __name__ == "__main__":
    command(main)
