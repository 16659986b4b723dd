"""Training a tokenizer: `train_tokenizer` shows the whole step, top to bottom."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor

from sitlib.data import ImageSource, training_views
from sitlib.files import Row
from sitlib.metrics.codebook import code_counts, codebook_statistics
from sitlib.model.config import TokenizerConfig
from sitlib.model.tokenizer import SpectralTokenizer, TokenizerOutput
from sitlib.strict import to_dict
from sitlib.train.codebooks import initialize_codebooks, update_codebooks
from sitlib.train.config import (
    AdversarialConfig,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    TokenizerTraining,
)
from sitlib.train.discriminator import (
    Discriminator,
    adversarial_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from sitlib.train.distributed import (
    ONE_PROCESS,
    Microbatch,
    all_reduce,
    broadcast_params,
    rank,
    world_size,
)
from sitlib.train.loop import TrainLoop, mean_values
from sitlib.train.losses import TokenizerLoss
from sitlib.train.optim import ema_update, forget_moments

PICTURES = 4  # training views that are shown beside their reconstructions


def train_tokenizer(
    config: TokenizerConfig,
    training: TokenizerTraining,
    data: DataConfig,
    images: ImageSource,
    *,
    seed: int,
    folder: str | Path,
    engine: EngineConfig = ONE_PROCESS,
    base: SpectralTokenizer | None = None,
    title: str = "tokenizer",
    log_folder: str | Path = "scratch",
) -> tuple[SpectralTokenizer, list[Row]]:
    """Train a tokenizer on views of `images` (SIT, section 4), resumable to the bit.

    Args:
        config: the model. training: losses, discriminator, optimizer. data: how views are cut.
        folder: of resumable states; remove it (`remove_states`) once the result is safe.
        engine: devices and processes. A tokenizer is never sharded: its codebooks change in place.
        base: the tokenizer whose encoder and codebooks are taken over, if `training.codes_from`
            names one: then only the decoder is trained.
        title, log_folder: as for `TrainLoop`.

    Returns:
        The tokenizer and its training curve: rows of `step`, `learning_rate`, `seconds`, `loss`,
        terms of the loss, `gradient_norm`, usage and perplexity of codebooks and scales.

    Raises:
        ValueError: `base` is missing, or given to a run that learns its own codes.
        FloatingPointError, StateError: see `TrainLoop`.
    """
    if (training.codes_from is None) != (base is None):
        raise ValueError("a run with `codes_from`, and no other, needs the tokenizer `base`.")
    if engine.strategy == "fsdp":
        engine = replace(engine, strategy="ddp")
    losses, adversarial = training.loss, training.adversarial
    batch_size, num_codes = training.optimizer.batch_size, config.num_codes
    run = {
        "model": to_dict(config),
        "training": to_dict(training),
        "data": {**to_dict(data), "images": len(images)},
        "seed": seed,
    }
    set_seed(seed)
    tokenizer = SpectralTokenizer(config)
    if base is not None:
        tokenizer.freeze_encoder_from(base)
    learns_codes = base is None
    loss_fn = TokenizerLoss(losses)
    discriminator = None
    if adversarial.weight:
        channels, spectral_norm = adversarial.channels, adversarial.spectral_norm
        discriminator = Discriminator(data.size, channels, spectral_norm)

    def views_at(step: int, count: int) -> Tensor:
        """Views [count, 3, H, W] of a step with that many: a pure function of the step."""
        cut = {"min_crop": data.min_crop, "flip": data.flip}
        return training_views(images, step, count, data.size, seed, kind="crops", **cut)[0]

    def batch_at(step: int, part: Microbatch) -> Tensor:
        # Views come one after another, so those of a part are the batch of a shorter step.
        return views_at(step * part.count + part.index, batch_size // part.count)

    def pictures() -> Tensor:
        """Images [2 PICTURES, 3, H, W]: views, each followed by its reconstruction."""
        views = views_at(0, PICTURES).to(loop.device)
        return torch.stack([views, tokenizer.reconstruct(views)], dim=1).flatten(0, 1)

    with TrainLoop(training.optimizer, engine, folder, run, title, log_folder) as loop:
        model, optimizer, schedule, ema = loop.prepare(tokenizer, training.optimizer)
        d_config = discriminator_optimizer(training.optimizer, adversarial)
        opponent = loop.prepare(discriminator, d_config) if discriminator is not None else None
        loss_fn = loss_fn.to(loop.device)
        if loop.resume() == 0 and learns_codes:
            if rank() == 0:  # normalization and k-means want more views than one batch
                views = views_at(0, data.normalization_views).to(loop.device)
                tokenizer.fit_normalization(views)
                initialize_codebooks(tokenizer, views)
            broadcast_params(tokenizer)

        # Of the steps since the last row of the curve: how often each code was used.
        counts = torch.zeros(config.num_scales, num_codes, dtype=torch.int64, device=loop.device)
        num_images = 0
        for step, microbatches in loop.steps(batch_at, pictures):
            # Early on the decoder reads a mixture of the encoder's outputs and their codes.
            warmup = losses.quant_warmup_steps if learns_codes else 0
            quant_ratio = min(1.0, step / warmup) if warmup else 1.0
            preview_scales = 1 + step % config.levels if losses.multiscale else 0
            adv_weight = adversarial_weight(step, adversarial)

            # Forward, loss, backward. The gradients of the microbatches add up to the batch's.
            outputs, logged = [], []
            for views in loop.engine.accumulate(model, microbatches):  # [b, 3, H, W]
                with loop.accelerator.autocast():
                    output = model(views, quant_ratio, preview_scales)
                    loss, terms = loss_fn(output, views)
                    if discriminator is not None and adv_weight > 0:
                        discriminator.requires_grad_(False)
                        adv_loss = generator_loss(discriminator(output.reconstruction))
                        loss = loss + adv_weight * adv_loss
                        terms["adversarial"] = adv_loss.detach()
                loop.accelerator.backward(loss / len(microbatches))
                outputs.append(detached(output))
                logged.append({"loss": loss.detach(), **terms})

            # Clip and update.
            grad_norm = loop.clip_grad_norm(model, training.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()  # at once: loss scaling touches the gradients of all models
            schedule.step()

            # The discriminator learns to tell the views from their reconstructions, held fixed.
            d_logged = []
            if opponent is not None and step >= adversarial.start:
                d_model, d_optimizer, d_schedule, _ = opponent
                d_model.requires_grad_(True)
                pairs = list(zip(microbatches, outputs, strict=True))
                for views, output in loop.engine.accumulate(d_model, pairs):
                    with loop.accelerator.autocast():
                        real, fake = d_model(views), d_model(output.reconstruction)  # [b] logits
                        d_loss = discriminator_loss(real, fake)
                        d_terms = {
                            "discriminator": d_loss.detach(),
                            "real_logit": real.detach().mean(),
                            "fake_logit": fake.detach().mean(),
                        }
                        if adversarial.r1 and step % adversarial.r1_every == 0:
                            penalty = gradient_penalty(d_model, views)
                            d_loss = d_loss + adversarial.r1 * adversarial.r1_every * penalty
                            d_terms["gradient_penalty"] = penalty.detach()
                    loop.accelerator.backward(d_loss / len(microbatches))
                    d_logged.append(d_terms)
                loop.clip_grad_norm(d_model, d_config.clip_norm)
                d_optimizer.step()
                d_optimizer.zero_grad()
                d_schedule.step()

            # Codebook upkeep: codes that learn by moving averages, and restarts of dead ones.
            codes = torch.cat([output.codes for output in outputs])  # [B, S, N]
            latents = torch.cat([output.latents for output in outputs])  # [B, S, N, D]
            values = {**mean_values(logged)}
            if learns_codes:
                after = losses.reset_dead_codes_after
                restarted = update_codebooks(tokenizer, latents, codes, after)
                for codebook, rows in zip(tokenizer.codebooks, restarted, strict=True):
                    forget_moments(optimizer, codebook.get_parameter("weight"), rows)
                values["restarted"] = torch.stack(restarted).sum()
            if ema is not None:
                ema_update(ema, tokenizer, training.optimizer.ema_decay)

            # Log.
            values["gradient_norm"] = grad_norm
            values |= mean_values(d_logged) if d_logged else {}
            counts += code_counts(codes, num_codes)
            num_images += len(codes)
            if loop.is_log_step(step):
                used = all_reduce(counts).cpu()
                values |= codebook_use(used, num_images * world_size(), len(tokenizer.codebooks))
                counts.zero_()
                num_images = 0
            loop.log(values)
        loop.trained(tokenizer, model, ema)
    return tokenizer, loop.rows


def discriminator_optimizer(
    config: OptimizerConfig, adversarial: AdversarialConfig
) -> OptimizerConfig:
    """Adam of the discriminator: momentum would chase a moving opponent (arXiv 1812.04948)."""
    zero = {"final_learning_rate": 0.0, "beta1": 0.0, "weight_decay": 0.0, "ema_decay": 0.0}
    rate = adversarial.learning_rate
    return replace(config, learning_rate=rate, warmup_steps=0, beta2=0.99, **zero)


def detached(output: TokenizerOutput) -> TokenizerOutput:
    """The output without what autograd keeps, and without its preview."""
    tensors = {name: x.detach() for name, x in vars(output).items() if name != "preview"}
    return TokenizerOutput(**tensors, preview=None)


def codebook_use(counts: Tensor, num_images: int, num_codebooks: int) -> Row:
    """Usage (% of codes) and perplexity of every codebook and scale, from counts [S, K]."""
    statistics = codebook_statistics(counts, num_images, num_codebooks)
    by_name = dict(statistics["codebooks"])
    by_name |= {f"scale_{scale['scale']}": scale for scale in statistics["scales"]}
    names = ("usage", "perplexity")
    return {f"{name}_{part}": use[name] for part, use in by_name.items() for name in names}
