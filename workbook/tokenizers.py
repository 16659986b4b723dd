"""The tokenizers of a profile: `python -m workbook.tokenizers` trains one, in any number of
processes.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from sitlib.data import ImageSource, held_out_views, hold_back, mixed, open_images
from sitlib.files import Row
from sitlib.metrics.weights import fetch_weights
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import require_known
from sitlib.train.config import DataConfig
from sitlib.train.tokenizer import train_tokenizer
from workbook.errors import command
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.runs import TokenizerRun, Trained, train_or_load, training_command


def trained_tokenizer(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> Trained[SpectralTokenizer]:
    """The tokenizer `variant` of a profile, trained with `seed` now or earlier.

    A variant with `codes_from` or `starts_from` needs the tokenizer named there, of the same seed,
    which is found or trained in the same way. `pipeline`: as for `train_or_load`.
    """
    run = TokenizerRun.of(profile, variant, seed)

    def train_now(folder: Path) -> tuple[SpectralTokenizer, list[Row]]:
        name = run.training.codes_from or run.training.starts_from
        if name in profile.tokenizer.variants:
            base = trained_tokenizer(profile, name, seed).model
        else:
            base = SpectralTokenizer.from_pretrained(name) if name else None
        return train_tokenizer(
            run.model,
            run.training,
            run.data,
            open_split(run.data, "train"),
            seed=seed,
            folder=folder,
            engine=profile.engine,
            base=base,
            title=f"{variant}, seed {seed}",
            log_folder=resolve("scratch"),
        )

    if run.training.loss.lpips:
        fetch_weights()  # before several processes want them
    model = SpectralTokenizer
    return train_or_load(run, "tokenizer", variant, model, train_now, pipeline, profile)


def open_split(data: DataConfig, split: str) -> ImageSource:
    """Images of "train" or "test"; where training images are kept apart, these are "test"."""

    def opened(folder: str) -> ImageSource:
        if not data.validation_percent:
            return open_images(resolve(folder), split)
        images = open_images(resolve(folder), "train")
        return hold_back(images, data.validation_percent)[split == "test"]

    sources = [opened(folder) for folder in data.sources]
    return sources[0] if len(sources) == 1 else mixed(sources, [*data.sources.values()])


def tokenizer_of_codes(profile: Profile, variant: str) -> Trained[SpectralTokenizer]:
    """The tokenizer whose codes a generator of the profile models."""
    name = profile.autoregressive_variant(variant).tokenizer
    return trained_tokenizer(profile, name, profile.generator_section(variant).tokenizer_seed)


def held_out_set(
    profile: Profile,
    name: str | None = None,
    size: int | None = None,
    count: int | None = None,
    first: int = 0,
) -> tuple[Tensor, list[str]]:
    """Evaluation views [V, 3, H, H], the same for every tokenizer, and the keys of their images.

    Args:
        name: of `tokenizer.evaluation.sets`; default: the first.
        size: H, px; default: the size of training views.
        count, first: how many views, from which on; default: all, which of a large set may be more
            than the memory holds.
    """
    settings = profile.tokenizer.evaluation
    name = next(iter(settings.sets)) if name is None else name
    require_known(name, settings.sets, "evaluation set")
    chosen, size = settings.sets[name], profile.data.size if size is None else size
    count = chosen.views - first if count is None else min(count, chosen.views - first)
    source = open_split(replace(profile.data, source=chosen.source), "test")
    options = {"first": first, "kind": chosen.kind}
    images, _, keys = held_out_views(source, count, size, settings.seed, **options)
    return images, keys


if __name__ == "__main__":
    command(partial(training_command, trained_tokenizer))
