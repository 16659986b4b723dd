"""Look for everything that a pipeline needs before anything is trained: `python -m workbook
weights`.

Missing classes or captions should not be noticed after days, by the first stage that needs them.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from sitlib.data import DataError, ImageSource, held_out_positions, open_images
from sitlib.metrics import InceptionMetrics
from sitlib.metrics.weights import fetch_weights
from workbook.codes import captioned
from workbook.errors import command
from workbook.params import pipeline_params, seeds_by_variant
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.runs import CodesRun, launch_command


def fetch_and_check(profile: Profile) -> None:
    """Fetch the networks that judge images, and look at all images and captions that are needed."""
    fetch_weights(resolve("weights"))
    if profile.tokenizer.evaluation.inception:
        InceptionMetrics()
    check_images(profile, pipeline_params())


def check_images(profile: Profile, lists: Mapping[str, Any]) -> None:
    """Open every set of images as the stages will, and print what is in it.

    Args:
        lists: variants by what is made of them, as in `params.yaml`.

    Raises:
        DataError: images, classes or captions are missing.
        ConfigError: the profile has no variant of a listed name.
    """

    @cache  # small sets are decoded every time
    def opened(source: str, split: str) -> ImageSource:
        return open_images(resolve(source), split)

    tokenizers = seeds_by_variant(lists["tokenizers"])
    for source in sorted({s for name in tokenizers for s in profile.tokenizer_data(name).sources}):
        print(f"{source}: {len(opened(source, 'train')):,} images to train tokenizers on.")
    for name, judged in profile.tokenizer.evaluation.sets.items():
        print(f"{judged.source}: {len(opened(judged.source, 'test')):,} held-out images, {name}.")
    runs = [CodesRun.of(profile, name) for name in seeds_by_variant(lists["generators"])]
    for source in sorted({run.tokenizer.data.folder for run in runs}):
        train, test = (opened(source, split).labeled() for split in ("train", "test"))
        numbers = f"of {len(train):,} images for training and {len(test):,} held out"
        print(f"{source}: {len(train.class_names):,} classes, {numbers}.")
    for split in ("train", "test"):
        texts, wanted = captioned(profile, split), profile.text.evaluation.prompts
        if (count := len(set(texts.groups))) < wanted:
            found = f"{texts.images.where} has only {count} names"
            raise DataError(f"text.evaluation.prompts is {wanted}, but {found}.")
        edited, order = profile.applications.images, profile.text.codes.seed
        if split == "test":
            shown = held_out_positions(texts.images, edited, order)
            ((_, most),) = Counter(texts.groups[image] for image in shown).most_common(1)
            if edited - most < profile.text.evaluation.candidates - 1:
                found = f"{edited - most} captions of the first {edited} images have other names"
                wanted = f"text.evaluation.candidates = {profile.text.evaluation.candidates}"
                raise DataError(f"raise applications.images: {found}, too few for {wanted}.")
        number = sum(map(len, texts.captions))
        print(f"{texts.images.where}: {number:,} captions of {len(texts.names):,} images.")


def check_nodes(profile: Profile) -> None:
    """Raise ValueError unless this is a SLURM job of as many nodes as the profile says."""
    launch_command(profile.engine, [], os.environ)


if __name__ == "__main__":  # in scripts/slurm.sh, before nodes are kept for hours
    command(lambda: check_nodes(load_profile(sys.argv[1])))
