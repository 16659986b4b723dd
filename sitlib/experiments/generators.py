"""Training an autoregressive variant of a profile on extracted codes: `python -m sitlib.experiments.generators`, in one process or more."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sitlib.autoregressive import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.config import EngineConfig, Profile
from sitlib.data import CaptionedImages
from sitlib.engine import Part
from sitlib.experiments.codes import Codes, captioned, load_codes
from sitlib.experiments.launch import launcher, training_command
from sitlib.experiments.noise import noisy_codes, noisy_texts
from sitlib.experiments.runs import AutoregressiveRun, Trained, command, trained
from sitlib.experiments.tokenizers import trained_tokenizer
from sitlib.results import Row
from sitlib.sampling import generate
from sitlib.text import TextTokenizer
from sitlib.training import Phase, seed_everything, train

PICTURES = 8  # samples that are shown while training goes on


def trained_generator(profile: Profile, variant: str, seed: int, pipeline: bool = False) -> Trained:
    """The autoregressive model `variant` of a profile, trained with `seed` now or earlier; `pipeline` as for `runs.trained`.

    Models of all seeds are of the codes of one tokenizer, trained with the section's `tokenizer_seed`.
    """
    run = AutoregressiveRun.of(profile, variant, seed)

    def train_now(checkpoints: Path) -> tuple[AutoregressiveModel, list[Row]]:
        codes = load_codes(profile, variant)
        texts = captioned(profile, "train") if run.codes.captions is not None else None
        pictures = _Pictures(profile, variant, codes, texts) if profile.engine.images_every else None
        return _train(run, codes, texts, checkpoints, f"{variant}, seed {seed}", profile.engine, pictures)

    launch = launcher("sitlib.experiments.generators", profile, variant, seed, pipeline)
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
) -> tuple[AutoregressiveModel, list[Row]]:
    """Trains a run; `captioned` are the training images of a text-conditional model.

    Images come equally often; with captions, names do, of which some have many images (the skin tones of an emoji).
    """
    seed_everything(run.seed)
    _, num_scales, tokens_per_scale = codes.train.shape
    tokenizer, texts = run.codes.tokenizer.model, None
    maps_of = [
        np.array([index]) for index in range(len(codes.train))
    ]  # code maps of what comes equally often
    if captioned is not None:
        settings = run.model.text
        every = [text for of_image in captioned.captions for text in of_image]
        texts = TextTokenizer.train(every, settings.vocabulary, settings.max_tokens)
        tokens = [texts.encode(of_image, truncate=True) for of_image in captioned.captions]
        name_of = np.array([captioned.names[image] for image in codes.train_labels.tolist()])
        _, kind, counts = np.unique(name_of, return_inverse=True, return_counts=True)
        maps_of = np.split(np.argsort(kind, kind="stable"), np.cumsum(counts)[:-1])
    config = CodeModelConfig(
        run.model,
        num_scales,
        tokens_per_scale,
        tokenizer.num_codes,
        min(tokenizer.num_codebooks, num_scales),
        codes.classes,
        texts.to_json() if texts else None,
    )
    model = AutoregressiveModel(config)

    def batch_at(step: int, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """What the model reads, codes [B, S, N] and a condition, some of it hidden or replaced; and the codes that it shall predict."""
        generator = np.random.default_rng([run.seed, step])
        kinds = [maps_of[kind] for kind in generator.integers(len(maps_of), size=run.optimiser.batch_size)]
        chosen = torch.from_numpy(np.array([generator.choice(maps) for maps in kinds]))
        hidden = torch.from_numpy(generator.random(len(chosen)) < run.model.condition_dropout)
        condition = codes.train_labels[chosen]
        if texts is not None:  # one caption of each image
            pick = generator.random(len(chosen))
            of_image = [tokens[image] for image in condition.tolist()]
            condition = torch.stack([t[int(u * len(t))] for t, u in zip(of_image, pick, strict=True)])
            condition = noisy_texts(condition, texts, run.model.text_noise, generator)
            condition = condition[:, : int((condition != texts.pad).sum(1).max())]
            hidden = hidden[:, None]
        condition, targets = (
            torch.where(hidden, model.unconditional(condition), condition),
            codes.train[chosen],
        )
        read = noisy_codes(targets, tokenizer.num_codes, run.model.code_noise, generator)
        return part.of((read, condition, targets))

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor], step: int) -> tuple[Tensor, Row]:
        *read, targets = batch
        nats_BSN = code_nats(module(*read), targets)
        by_scale = nats_BSN.detach().mean(dim=(0, 2))
        return nats_BSN.mean(), {f"nats_scale_{scale}": value for scale, value in enumerate(by_scale, 1)}

    phase = Phase(model, loss)
    rows = train(
        [phase],
        batch_at,
        run.optimiser,
        checkpoints=checkpoints,
        engine=engine,
        pictures=partial(pictures.draw, model) if pictures is not None else None,
        title=title,
    )
    return phase.module, rows


class _Pictures:
    """Samples for what a few training images show, drawn while training goes on."""

    def __init__(self, profile: Profile, variant: str, codes: Codes, captioned: CaptionedImages | None):
        section, name = profile.generator_section(variant), profile.autoregressive_variant(variant).tokenizer
        self.tokenizer = trained_tokenizer(profile, name, section.tokenizer_seed).model
        self.sampling = replace(section.sampling, batch_size=PICTURES)
        labels = codes.train_labels[:: max(1, len(codes.train_labels) // PICTURES)][:PICTURES]
        self.prompts = labels if captioned is None else [captioned.captions[i][0] for i in labels.tolist()]

    def draw(self, model: AutoregressiveModel) -> Tensor:
        """Images [PICTURES, 3, H, W] in [0, 1]."""
        return self.tokenizer.decode(generate(model, self.prompts, self.sampling).cpu())


if __name__ == "__main__":
    command(partial(training_command, "sitlib.experiments.generators", trained_generator))
