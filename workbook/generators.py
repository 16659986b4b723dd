"""The generators of a profile: `python -m workbook.generators` trains one, in any number of
processes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from sitlib.data import CaptionedImages
from sitlib.files import Row
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.text import TextTokenizer
from sitlib.sample.generate import generate
from sitlib.train.generator import train_generator
from workbook.codes import Codes, captioned, load_codes
from workbook.errors import command
from workbook.launch import launcher, training_command
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer
from workbook.train_or_load import AutoregressiveRun, Trained, train_or_load

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
            captions=texts.captions if texts else None,
            names=texts.names if texts else None,
            engine=profile.engine,
            pictures=samples_shown(profile, variant, codes, texts),
            title=f"{variant}, seed {seed}",
            log_folder=resolve("scratch"),
        )

    launch = launcher("workbook.generators", profile, variant, seed, pipeline)
    if launch is not None:
        load_codes(profile, variant)  # extracted by this process, if they are not there yet
    return train_or_load(
        run, "autoregressive", variant, AutoregressiveModel, train_now, pipeline, launch
    )


def model_config(
    run: AutoregressiveRun,
    codes: Codes,
    captions: CaptionedImages | None,
    sampling: SamplingConfig | None = None,
) -> CodeModelConfig:
    """The configuration of a run together with what its codes, classes or captions fix."""
    _, num_scales, tokens_per_scale = codes.train.shape
    tokenizer, texts = run.codes.tokenizer.model, None
    if captions is not None and (text := run.model.text) is not None:
        every = [caption for of_image in captions.captions for caption in of_image]
        texts = TextTokenizer.train(every, text.vocab_size, text.max_tokens).to_json()
    return CodeModelConfig(
        run.model,
        num_scales,
        tokens_per_scale,
        tokenizer.num_codes,
        min(tokenizer.num_codebooks, num_scales),
        codes.classes,
        texts,
        sampling,
    )


def samples_shown(
    profile: Profile, variant: str, codes: Codes, captions: CaptionedImages | None
) -> Callable[[AutoregressiveModel], Tensor] | None:
    """A function that draws images [PICTURES, 3, H, W] of what some training images show."""
    if not profile.engine.images_every:
        return None
    name = profile.autoregressive_variant(variant).tokenizer
    seed = profile.generator_section(variant).tokenizer_seed
    tokenizer = trained_tokenizer(profile, name, seed).model
    sampling = replace(profile.sampler(variant), batch_size=PICTURES)
    labels = codes.train_labels[:: max(1, len(codes.train_labels) // PICTURES)][:PICTURES]
    prompts = labels
    if captions is not None:
        prompts = [captions.captions[image][0] for image in labels.tolist()]
    return lambda model: tokenizer.decode(generate(model, prompts, sampling).cpu())


if __name__ == "__main__":
    command(partial(training_command, "workbook.generators", trained_generator))
