"""The generators of a profile: `python -m workbook.generators` trains one, in any number of
processes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sitlib.data import CaptionedImages
from sitlib.files import Row
from sitlib.model.config import AutoregressiveConfig, SamplingConfig, TokenizerConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer
from sitlib.sample.generate import generate
from sitlib.strict import require
from sitlib.train.generator import train_generator
from workbook.codes import Codes, captioned, load_codes
from workbook.errors import command
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.runs import (
    AutoregressiveRun,
    Trained,
    starts_processes,
    train_or_load,
    training_command,
)
from workbook.tokenizers import tokenizer_of_codes

PICTURES = 8  # samples that are shown while training goes on


def trained_generator(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> Trained[AutoregressiveModel]:
    """The generator `variant` of a profile, trained with `seed` now or earlier.

    Models of all seeds are of the codes of one tokenizer, trained with the section's
    `tokenizer_seed`. `pipeline`: as for `train_or_load`.
    """
    run = AutoregressiveRun.of(profile, variant, seed)

    def train_now(folder: Path) -> tuple[AutoregressiveModel, list[Row]]:
        codes = load_codes(profile, variant)
        texts = captioned(profile, "train") if run.codes.captions is not None else None
        return train_generator(
            model_config(run, codes, texts, profile.sampler(variant)),
            run.optimizer,
            codes.train,
            codes.train_labels,
            seed=seed,
            folder=folder,
            codebooks=codebooks_of(profile, variant) if run.model.code_vectors else (),
            captions=texts.captions if texts else None,
            names=texts.names if texts else None,
            engine=profile.engine,
            pictures=samples_shown(profile, variant, codes, texts),
            title=f"{variant}, seed {seed}",
            log_folder=resolve("scratch"),
        )

    if starts_processes(profile):
        load_codes(profile, variant)  # extracted by this process, if they are not there yet
    model = AutoregressiveModel
    return train_or_load(run, "autoregressive", variant, model, train_now, pipeline, profile)


def model_config(
    run: AutoregressiveRun,
    codes: Codes,
    captions: CaptionedImages | None,
    sampling: SamplingConfig | None = None,
) -> CodeModelConfig:
    """The configuration of a run together with what its codes, classes or captions fix."""
    texts = None
    if captions is not None and (text := run.model.text) is not None:
        every = [caption for of_image in captions.captions for caption in of_image]
        texts = TextTokenizer.train(every, text.vocab_size, text.max_tokens).to_json()
    return config_over(run.codes.tokenizer.model, run.model, codes.classes, texts, sampling)


def config_over(
    tokenizer: TokenizerConfig,
    shape: AutoregressiveConfig,
    classes: list[str],
    texts: str | None = None,
    sampling: SamplingConfig | None = None,
) -> CodeModelConfig:
    """Configuration of a model over a tokenizer's codes; texts: `TextTokenizer.to_json`."""
    require(tokenizer.grid_sizes is None, "no model writes codes of a tokenizer with grid_sizes")
    books = min(tokenizer.num_codebooks, tokenizer.num_scales)
    sizes = (tokenizer.num_scales, tokenizer.tokens_per_scale, tokenizer.codebook_sizes, books)
    code_dim = tokenizer.code_dim if shape.code_vectors else 0
    return CodeModelConfig(shape, *sizes, classes, texts, sampling, code_dim)


def codebooks_of(profile: Profile, variant: str) -> list[Tensor]:
    """Vectors [K, D] of all codes that a generator of the profile writes, of each codebook."""
    books = tokenizer_of_codes(profile, variant).model.codebooks
    return [book.lookup(torch.arange(book.num_codes)).detach() for book in books]


def samples_shown(
    profile: Profile, variant: str, codes: Codes, captions: CaptionedImages | None
) -> Callable[[AutoregressiveModel], Tensor] | None:
    """A function that draws images [PICTURES, 3, H, W] of what some training images show."""
    if not profile.engine.images_every:
        return None
    tokenizer = tokenizer_of_codes(profile, variant).model
    sampling = replace(profile.sampler(variant), batch_size=PICTURES)
    labels = codes.train_labels[:: max(1, len(codes.train_labels) // PICTURES)][:PICTURES]
    prompts = labels
    if captions is not None:
        prompts = [captions.captions[image][0] for image in labels.tolist()]
    return lambda model: tokenizer.decode(generate(model, prompts, sampling).cpu())


if __name__ == "__main__":
    command(partial(training_command, trained_generator))
