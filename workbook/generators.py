"""Training an autoregressive variant of a profile on extracted codes: `python -m workbook.generators`, in one process or more."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from sitlib.data import CaptionedImages
from sitlib.data.loader import WINDOW
from sitlib.files import Row
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.text import TextTokenizer
from sitlib.sample.generate import generate
from sitlib.train.config import EngineConfig
from sitlib.train.engine import Part
from sitlib.train.loop import Logged, Phase, seed_everything, train
from sitlib.train.token_corruption import corrupt_codes, corrupt_texts
from workbook.codes import Codes, captioned, load_codes
from workbook.launch import launcher, training_command
from workbook.profile import Profile
from workbook.runs import AutoregressiveRun, Trained, command, trained
from workbook.tokenizers import trained_tokenizer

PICTURES = 8  # samples that are shown while training goes on


def trained_generator(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> Trained[AutoregressiveModel]:
    """The autoregressive model `variant` of a profile, trained with `seed` now or earlier; `pipeline` as for `runs.trained`.

    Models of all seeds are of the codes of one tokenizer, trained with the section's `tokenizer_seed`.
    """
    run = AutoregressiveRun.of(profile, variant, seed)

    def train_now(checkpoints: Path) -> tuple[AutoregressiveModel, list[Row]]:
        codes = load_codes(profile, variant)
        texts = captioned(profile, "train") if run.codes.captions is not None else None
        pictures = (
            _Pictures(profile, variant, codes, texts) if profile.engine.images_every else None
        )
        return _train(
            run,
            codes,
            texts,
            checkpoints,
            f"{variant}, seed {seed}",
            profile.engine,
            pictures,
            profile.sampler(variant),
        )

    launch = launcher("workbook.generators", profile, variant, seed, pipeline)
    if launch is not None:
        load_codes(profile, variant)  # extracted by this process, if they are not there yet
    return trained(run, "autoregressive", variant, AutoregressiveModel, train_now, pipeline, launch)


def _train(
    run: AutoregressiveRun,
    codes: Codes,
    captioned: CaptionedImages | None,
    checkpoints: Path,
    title: str,
    engine: EngineConfig,
    pictures: "_Pictures | None",
    sampling: SamplingConfig | None = None,
) -> tuple[AutoregressiveModel, list[Row]]:
    """Trains a run; `captioned` are the training images of a text-conditional model."""
    seed_everything(run.seed)
    _, num_scales, tokens_per_scale = codes.train.shape
    tokenizer, texts, names = run.codes.tokenizer.model, None, None
    if captioned is not None:
        settings = run.model.text
        assert settings is not None
        every = [text for of_image in captioned.captions for text in of_image]
        texts = TextTokenizer.train(every, settings.vocabulary, settings.max_tokens)
        tokens = [texts.encode(of_image, truncate=True) for of_image in captioned.captions]
        names = captioned.names
    draw = code_map_draws(codes, names, run.optimizer.batch_size, run.seed)
    config = CodeModelConfig(
        run.model,
        num_scales,
        tokens_per_scale,
        tokenizer.num_codes,
        min(tokenizer.num_codebooks, num_scales),
        codes.classes,
        texts.to_json() if texts else None,
        sampling,
    )
    model = AutoregressiveModel(config)

    @lru_cache(maxsize=1)  # a process takes all its parts of one step, then those of the next
    def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the model reads, codes [B, S, N] and a condition, some of it hidden or replaced; and the codes that it shall predict."""
        generator = np.random.default_rng([run.seed, step])
        chosen = torch.from_numpy(draw(step, generator))
        hidden = torch.from_numpy(generator.random(len(chosen)) < run.model.condition_dropout)
        condition = codes.train_labels[chosen]
        if texts is not None:  # one caption of each image
            pick = generator.random(len(chosen))
            of_image = [tokens[image] for image in condition.tolist()]
            condition = torch.stack(
                [t[int(u * len(t))] for t, u in zip(of_image, pick, strict=True)]
            )
            condition = corrupt_texts(condition, texts, run.model.text_noise, generator)
            condition = condition[:, : int((condition != texts.pad).sum(1).max())]
            hidden = hidden[:, None]
        condition, targets = (
            torch.where(hidden, model.unconditional(condition), condition),
            codes.train[chosen],
        )
        read = corrupt_codes(targets, tokenizer.num_codes, run.model.code_noise, generator)
        return read, condition, targets

    def batch_at(step: int, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        return part.of(batch_of(step))

    def loss(
        module: nn.Module, batch: tuple[Tensor, Tensor, Tensor], step: int
    ) -> tuple[Tensor, Logged]:
        *read, targets = batch
        nats_BSN = code_nats(module(*read), targets)
        by_scale = nats_BSN.detach().mean(dim=(0, 2))
        return nats_BSN.mean(), {
            f"nats_scale_{scale}": value for scale, value in enumerate(by_scale, 1)
        }

    phase = Phase(model, loss)
    rows = train(
        [phase],
        batch_at,
        run.optimizer,
        checkpoints=checkpoints,
        engine=engine,
        pictures=partial(pictures.draw, model) if pictures is not None else None,
        title=title,
    )
    return cast(AutoregressiveModel, phase.module), rows


def code_map_draws(
    codes: Codes, names: list[str] | None, batch_size: int, seed: int
) -> Callable[[int, np.random.Generator], np.ndarray]:
    """Which code maps a step reads, int64 [batch_size]: a function of the step and its random numbers.

    Images come equally often; with captions, names do, of which some have many images (the skin tones of an emoji). They are drawn. Of a
    large set in which all have as many code maps, epochs are as good and keep reads from disk together: every map comes once in each.

    Args:
        names: of the images that `codes.train_labels` tell by their positions; None: every code map is of its own.
    """
    count = len(codes.train)
    if names is None:
        kind = np.arange(count)
    else:
        _, number_of = np.unique(np.array(names), return_inverse=True)
        _, kind = np.unique(number_of[codes.train_labels.numpy()], return_inverse=True)
    maps, sizes = np.argsort(kind, kind="stable"), np.bincount(kind)
    ends = np.cumsum(sizes)

    def drawn(step: int, generator: np.random.Generator) -> np.ndarray:
        kinds = generator.integers(len(sizes), size=batch_size)
        return np.array([generator.choice(maps[ends[k] - sizes[k] : ends[k]]) for k in kinds])

    def in_epochs(step: int, generator: np.random.Generator) -> np.ndarray:
        epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
        order = codes.train.order
        return np.array(
            [order.permutation(seed, e)[p] for e, p in zip(epochs, places, strict=True)]
        )

    return in_epochs if count > WINDOW and sizes.min() == sizes.max() else drawn


class _Pictures:
    """Samples for what a few training images show, drawn while training goes on."""

    def __init__(
        self, profile: Profile, variant: str, codes: Codes, captioned: CaptionedImages | None
    ):
        section, name = (
            profile.generator_section(variant),
            profile.autoregressive_variant(variant).tokenizer,
        )
        self.tokenizer = trained_tokenizer(profile, name, section.tokenizer_seed).model
        self.sampling = replace(profile.sampler(variant), batch_size=PICTURES)
        labels = codes.train_labels[:: max(1, len(codes.train_labels) // PICTURES)][:PICTURES]
        self.prompts = (
            labels if captioned is None else [captioned.captions[i][0] for i in labels.tolist()]
        )

    def draw(self, model: AutoregressiveModel) -> Tensor:
        """Images [PICTURES, 3, H, W] in [0, 1]."""
        return self.tokenizer.decode(generate(model, self.prompts, self.sampling).cpu())


if __name__ == "__main__":
    command(partial(training_command, "workbook.generators", trained_generator))
