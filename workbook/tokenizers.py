"""The tokenizers of a profile: `python -m workbook.tokenizers` trains one, in any number of
processes.
"""

from functools import partial
from pathlib import Path

from torch import Tensor

from sitlib.data import held_out_views, open_images
from sitlib.files import Row
from sitlib.metrics.weights import fetch_weights
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train.tokenizer import train_tokenizer
from workbook.errors import command
from workbook.launch import launcher, training_command
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.train_or_load import TokenizerRun, Trained, train_or_load


def trained_tokenizer(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> Trained[SpectralTokenizer]:
    """The tokenizer `variant` of a profile, trained with `seed` now or earlier.

    A variant with `codes_from` needs that variant's tokenizer of the same seed, which is found or
    trained in the same way. `pipeline`: as for `train_or_load`.
    """
    run = TokenizerRun.of(profile, variant, seed)

    def train_now(folder: Path) -> tuple[SpectralTokenizer, list[Row]]:
        base = run.training.codes_from
        return train_tokenizer(
            run.model,
            run.training,
            run.data,
            open_images(resolve(run.data.source), "train"),
            seed=seed,
            folder=folder,
            engine=profile.engine,
            base=trained_tokenizer(profile, base, seed).model if base else None,
            title=f"{variant}, seed {seed}",
            log_folder=resolve("scratch"),
        )

    if run.training.loss.lpips:
        fetch_weights()  # before several processes want them
    launch = launcher("workbook.tokenizers", profile, variant, seed, pipeline)
    return train_or_load(run, "tokenizer", variant, SpectralTokenizer, train_now, pipeline, launch)


def held_out_set(
    profile: Profile,
    name: str | None = None,
    size: int | None = None,
    count: int | None = None,
    first: int = 0,
) -> tuple[Tensor, list[str]]:
    """Evaluation views [V, 3, H, H] of a profile, the same for every tokenizer, and the keys of
    their photographs.

    Args:
        name: of `tokenizer.evaluation.sets`; default: the first.
        size: H, px; default: the size of training views.
        count, first: how many views, from which on; default: all, which of a large set may be more
        than the memory holds.

    Raises:
        ValueError: the profile has no set of this name.
    """
    settings = profile.tokenizer.evaluation
    name = next(iter(settings.sets)) if name is None else name
    if name not in settings.sets:
        raise ValueError(
            f"There is no evaluation set {name!r}; the profile has {', '.join(settings.sets)}."
        )
    chosen, size = settings.sets[name], profile.data.size if size is None else size
    source = open_images(resolve(chosen.source), "test")
    count = chosen.views - first if count is None else min(count, chosen.views - first)
    images, _, keys = held_out_views(
        source, count, size, settings.seed, kind=chosen.kind, first=first
    )
    return images, keys


if __name__ == "__main__":
    command(partial(training_command, "workbook.tokenizers", trained_tokenizer))
