"""Training a tokenizer variant of a profile: `python -m workbook.tokenizers`, in as many processes as launch it."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sitlib.data import ImageSource, held_out_views, open_images, training_views
from sitlib.files import Row
from sitlib.metrics.codebook import code_counts, statistics_of_counts
from sitlib.metrics.weights import fetch_weights
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer, TokenizerOutput
from sitlib.train.codebooks import initialize_codebooks, update_codebooks
from sitlib.train.config import EngineConfig
from sitlib.train.discriminator import (
    Discriminator,
    adversarial_weight,
    discriminator_learns,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from sitlib.train.distributed import num_processes, sum_over_processes
from sitlib.train.engine import ONE_PROCESS, Part
from sitlib.train.loop import Logged, Phase, seed_everything, train
from sitlib.train.losses import TokenizerLoss
from workbook.launch import launcher, training_command
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.runs import TokenizerRun, Trained, command, trained

PICTURES = 4  # of which reconstructions are shown while training goes on


def trained_tokenizer(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> Trained[SpectralTokenizer]:
    """The tokenizer `variant` of a profile, trained with `seed` now or earlier; `pipeline` as for `runs.trained`.

    A variant with `codes_from` needs that variant's tokenizer of the same seed, which is found or trained in the same way.
    """
    run = TokenizerRun.of(profile, variant, seed)
    title = f"{variant}, seed {seed}"

    def train_now(checkpoints: Path) -> tuple[SpectralTokenizer, list[Row]]:
        images = open_images(resolve(run.data.source), "train")
        base = run.training.codes_from
        codes = trained_tokenizer(profile, base, seed).model if base else None
        return train_tokenizer(run, images, checkpoints, title, codes, profile.engine)

    if run.training.loss.lpips:
        fetch_weights()  # before several processes want them
    launch = launcher("workbook.tokenizers", profile, variant, seed, pipeline)
    return trained(run, "tokenizer", variant, SpectralTokenizer, train_now, pipeline, launch)


def held_out_set(
    profile: Profile,
    name: str | None = None,
    size: int | None = None,
    count: int | None = None,
    first: int = 0,
) -> tuple[Tensor, list[str]]:
    """Evaluation views [V, 3, H, H] of a profile, the same for every tokenizer, and the keys of their photographs.

    Args:
        name: of `tokenizer.evaluation.sets`; default: the first.
        size: H, px; default: the size of training views.
        count, first: how many views, from which on; default: all, which of a large set may be more than the memory holds.

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


def train_tokenizer(
    run: TokenizerRun,
    images: ImageSource,
    checkpoints: Path,
    title: str,
    codes: SpectralTokenizer | None = None,
    engine: EngineConfig = ONE_PROCESS,
) -> tuple[SpectralTokenizer, list[Row]]:
    """Trains a run on `images`, resumable from the folder `checkpoints`; the tokenizer and its training curve.

    Args:
        codes: the tokenizer whose encoder and codebooks are taken over, where the run has one.
        engine: devices and processes. A tokenizer is never sharded: its codebooks change in place between the steps.

    Raises:
        ValueError: `codes` is missing, or given to a run that learns its own.
    """
    if (run.codes is None) != (codes is None):
        raise ValueError(
            "a run with `codes_from`, and no other, needs the tokenizer whose codes it takes over."
        )
    seed_everything(run.seed)
    data, device = run.data, best_device()
    tokenizer = SpectralTokenizer(run.model)
    if codes is not None:
        tokenizer.freeze_encoder_from(codes)

    def views(step: int, count: int) -> Tensor:
        return training_views(
            images,
            step,
            count,
            data.size,
            run.seed,
            kind="crops",
            min_crop=data.min_crop,
            flip=data.flip,
        )[0]

    def start() -> None:
        """Normalization and k-means need the training images, and more of them than one batch."""
        if codes is None:
            sample = views(0, data.normalization_views).to(device)
            tokenizer.fit_normalization(sample)
            initialize_codebooks(tokenizer, sample)

    batch_size = run.training.optimizer.batch_size

    def batch_at(step: int, part: Part) -> Tensor:
        """The views of a batch come one after another, so those of its parts are the batches of shorter steps."""
        return views(step * part.count + part.index, batch_size // part.count)

    def pictures() -> Tensor:
        """Views that training begins with, each beside its reconstruction."""
        shown = views(0, PICTURES).to(device)
        return torch.stack([shown, tokenizer.reconstruct(shown)], dim=1).flatten(0, 1)

    curve = train(
        _phases(run, tokenizer, device),
        batch_at,
        run.training.optimizer,
        checkpoints=checkpoints,
        engine=replace(engine, strategy="ddp") if engine.strategy == "fsdp" else engine,
        start=start,
        pictures=pictures,
        title=title,
    )
    return tokenizer, curve


def _phases(run: TokenizerRun, tokenizer: SpectralTokenizer, device: torch.device) -> list[Phase]:
    """The tokenizer's update and, with an adversarial term, the discriminator's."""
    training, adversarial = run.training, run.training.adversarial
    if training.loss.lpips:
        fetch_weights()
    loss_terms = TokenizerLoss(training.loss).to(device)
    discriminator = None
    if adversarial.weight:
        discriminator = Discriminator(
            run.data.size, adversarial.channels, adversarial.spectral_norm
        )
    outputs: list[
        TokenizerOutput
    ] = []  # of the parts of this step's batch, without what autograd keeps
    to_judge: deque[Tensor] = (
        deque()
    )  # their reconstructions, until the discriminator has learned from them
    counts: list[Tensor] = []  # of codes, by step since the last row of the training curve
    images_seen = 0

    def loss(model: nn.Module, batch: Tensor, step: int) -> tuple[Tensor, Logged]:
        ramp = 0 if tokenizer.encoder_is_frozen else training.loss.quant_warmup_steps
        smaller = 1 + step % run.model.levels if training.loss.multiscale else 0
        output = model(batch, quantization(step, ramp), smaller)
        terms = loss_terms(output, batch)
        total, parts = terms.total, terms.parts
        weight = adversarial_weight(step, adversarial)
        if weight > 0:
            assert discriminator is not None
            discriminator.requires_grad_(False)
            fooled = generator_loss(discriminator(output.reconstruction))
            total, parts = total + weight * fooled, {**parts, "adversarial": fooled.detach()}
        outputs.append(_detached(output))
        if discriminator_learns(step, adversarial):
            to_judge.append(outputs[-1].reconstruction)
        return total, parts

    def after_update(optimizer: torch.optim.Optimizer) -> Logged:
        nonlocal images_seen
        codes, latents = (
            torch.cat([getattr(output, name) for output in outputs])
            for name in ("codes", "latents")
        )
        whole = replace(outputs[-1], codes=codes, latents=latents)
        outputs.clear()
        counts.append(code_counts(codes, run.model.num_codes))
        images_seen += len(codes)
        if tokenizer.encoder_is_frozen:
            return {}
        moved = update_codebooks(tokenizer, whole, training.loss.restart_after)
        for codebook, codes in zip(tokenizer.codebooks, moved, strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):  # a code that was moved has no history
                if codebook.weight in optimizer.state:
                    optimizer.state[codebook.weight][moment].masked_fill_(codes[:, None], 0.0)
        return {"restarted": torch.stack(moved).sum()}

    def at_log() -> Row:
        nonlocal images_seen
        total, images = torch.stack(counts).sum(dim=0), images_seen * num_processes()
        counts.clear()
        images_seen = 0
        return _codebook_use(sum_over_processes(total).cpu(), images, tokenizer)

    phases = [Phase(tokenizer, loss, after_update, at_log)]
    if discriminator is not None:
        settings = replace(
            training.optimizer,
            learning_rate=adversarial.learning_rate,
            final_learning_rate=0.0,
            warmup_steps=0,
            beta1=0.0,  # momentum would chase a moving opponent (StyleGAN, arXiv 1812.04948)
            beta2=0.99,
            weight_decay=0.0,
            ema_decay=0.0,
        )
        phases.append(
            Phase(discriminator, _discrimination(run, to_judge.popleft), optimizer=settings)
        )
    return phases


def quantization(step: int, ramp: int) -> float:
    """How much of a code, instead of the encoder's output, the decoder is given at `step`."""
    return min(1.0, step / ramp) if ramp else 1.0


def _detached(output: TokenizerOutput) -> TokenizerOutput:
    tensors = {name: value.detach() for name, value in vars(output).items() if name != "preview"}
    return TokenizerOutput(**tensors, preview=None)


def _discrimination(run: TokenizerRun, reconstruction_of_next: Callable[[], Tensor]) -> Callable:
    """The discriminator's loss on a part of a batch and its reconstruction; parts come in the order in which they were reconstructed."""
    adversarial = run.training.adversarial

    def loss(model: nn.Module, batch: Tensor, step: int) -> tuple[Tensor, Logged] | None:
        if not discriminator_learns(step, adversarial):
            return None
        model.requires_grad_(True)
        real, fake = model(batch), model(reconstruction_of_next())
        total = discriminator_loss(real, fake)
        values = {
            "discriminator": total.detach(),
            "real_logit": real.detach().mean(),
            "fake_logit": fake.detach().mean(),
        }
        if adversarial.r1 and step % adversarial.r1_every == 0:
            penalty = gradient_penalty(model, batch)
            total = total + adversarial.r1 * adversarial.r1_every * penalty
            values["gradient_penalty"] = penalty.detach()
        return total, values

    return loss


def _codebook_use(counts: Tensor, num_images: int, tokenizer: SpectralTokenizer) -> Row:
    """Usage (% of codes) and perplexity of every codebook and scale, from counts [S, K] of the codes of so many images."""
    statistics = statistics_of_counts(counts, num_images, num_codebooks=len(tokenizer.codebooks))
    row = {}
    for name, book in statistics["codebooks"].items():
        row |= {f"{value}_{name}": book[value] for value in ("usage", "perplexity")}
    for scale in statistics["scales"]:
        row |= {
            f"{value}_scale_{scale['scale']}": scale[value] for value in ("usage", "perplexity")
        }
    return row


if __name__ == "__main__":
    command(partial(training_command, "workbook.tokenizers", trained_tokenizer))
