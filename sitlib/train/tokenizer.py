"""Training a tokenizer: `train_tokenizer` shows the whole step, top to bottom."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from sitlib.data import ImageSource, training_views
from sitlib.files import Row
from sitlib.metrics.codebook import code_counts, codebook_statistics
from sitlib.model.config import TokenizerConfig
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import to_dict
from sitlib.train.checkpoint import locked
from sitlib.train.codebooks import (
    initialize_codebooks,
    reset_dead_codes,
    take_over_codes,
    take_over_weights,
)
from sitlib.train.config import DataConfig, TokenizerTraining
from sitlib.train.discriminator import (
    Discriminator,
    adversarial_weight,
    discriminator_loss,
    discriminator_optimizer,
    generator_loss,
    gradient_penalty,
)
from sitlib.train.distributed import all_reduce, rank, world_size
from sitlib.train.loop import TrainLoop, mean_values
from sitlib.train.losses import TokenizerLoss
from sitlib.train.optim import forget_moments

PICTURES = 4  # training views that are shown beside their reconstructions


def train_tokenizer(
    config: TokenizerConfig,
    training: TokenizerTraining,
    data: DataConfig,
    images: ImageSource,
    *,
    seed: int,
    folder: Path,
    base: SpectralTokenizer | None = None,
    **options: Any,
) -> tuple[SpectralTokenizer, list[Row]]:
    """Train a tokenizer on views of `images` (SIT, section 4) -> tokenizer and training curve.

    Args:
        data: how views are cut.
        base: the tokenizer that `training.codes_from` (then only the decoder is trained) or
            `training.starts_from` names.
        folder, options: as for `TrainLoop`.
    """
    keeps_codes = training.codes_from is not None
    if (keeps_codes or training.starts_from is not None) != (base is not None):
        raise ValueError("a run with `codes_from` or `starts_from` needs the tokenizer `base`.")
    losses, adversarial, optimizer_config = training.loss, training.adversarial, training.optimizer
    run = {"model": to_dict(config), "training": to_dict(training)}
    run |= {"data": {**to_dict(data), "images": len(images)}, "seed": seed}
    set_seed(seed)
    tokenizer = SpectralTokenizer(config)
    if base is not None:
        take_over = take_over_codes if keeps_codes else take_over_weights
        take_over(tokenizer, base)
    discriminator = None
    if adversarial.weight:
        channels, spectral_norm = adversarial.channels, adversarial.spectral_norm
        discriminator = Discriminator(data.size, channels, spectral_norm)

    def views_at(step: int, count: int) -> Tensor:
        """Views [count, 3, H, W] of a step with that many: a pure function of the step."""
        cut = {"min_crop": data.min_crop, "flip": data.flip, "recolor": data.recolor}
        return training_views(images, step, count, data.size, seed, kind="crops", **cut)[0]

    def share_at(step: int) -> Tensor:
        # Views come one after another, so those of a process are all of a shorter step.
        count = world_size()
        return views_at(step * count + rank(), optimizer_config.batch_size // count)

    def pictures() -> Tensor:
        """Images [2 PICTURES, 3, H, W]: views, each followed by its reconstruction."""
        views = views_at(0, PICTURES).to(loop.device)
        return torch.stack([views, tokenizer.reconstruct(views)], dim=1).flatten(0, 1)

    with locked(folder), TrainLoop(optimizer_config, folder, run, **options) as loop:
        model, optimizer = loop.prepare(tokenizer, optimizer_config)
        opponent: nn.Module | None = None
        if discriminator is not None:
            d_config = discriminator_optimizer(optimizer_config, adversarial)
            opponent, _ = loop.prepare(discriminator, d_config)
        loss_fn = TokenizerLoss(losses).to(loop.device)
        if loop.resume() == 0 and base is None:
            if rank() == 0:  # normalization and k-means want more views than one batch
                views = views_at(0, data.normalization_views).to(loop.device)
                tokenizer.fit_normalization(views)
                initialize_codebooks(tokenizer, views)
            broadcast(tokenizer.state_dict())  # in place

        # Of the steps since the last row of the curve: how often each code was used.
        sizes = config.num_scales, max(config.codebook_sizes)
        counts = torch.zeros(sizes, dtype=torch.int64, device=loop.device)
        for step, microbatches in loop.steps(share_at, pictures):
            preview_scales = 1 + step % config.levels if losses.multiscale else 0
            adv_weight = adversarial_weight(step, adversarial) if adversarial.weight else 0.0

            # Forward, loss, backward. The gradients of the microbatches add up to the batch's.
            outputs, logged = [], []
            for views in loop.accumulate(model, microbatches):  # [b, 3, H, W]
                with loop.accelerator.autocast():
                    output = model(views, preview_scales)
                    loss, terms = loss_fn(output, views)
                    if discriminator is not None and adv_weight > 0:
                        discriminator.requires_grad_(False)
                        adv_loss = generator_loss(discriminator(output.reconstruction))
                        loss = loss + adv_weight * adv_loss
                        terms["adversarial"] = adv_loss.detach()
                loop.accelerator.backward(loss / len(microbatches))
                outputs.append((output.reconstruction.detach(), output.codes, output.latents))
                logged.append({"loss": loss.detach(), **terms})
            reconstructions, codes, latents = zip(*outputs, strict=True)
            codes, latents = torch.cat(codes), torch.cat(latents)  # [B, S, N], [B, S, N, D]
            values = mean_values(logged)

            # Clip and update.
            grad_norm = loop.update(model)

            # The discriminator learns to tell the views from their reconstructions, held fixed.
            d_values = {}
            if opponent is not None and step >= adversarial.start:
                opponent.requires_grad_(True)
                pairs, logged = list(zip(microbatches, reconstructions, strict=True)), []
                for views, reconstruction in loop.accumulate(opponent, pairs):
                    with loop.accelerator.autocast():
                        real, fake = opponent(views), opponent(reconstruction)  # [b] logits
                        loss = discriminator_loss(real, fake)
                        terms = {
                            "discriminator": loss.detach(),
                            "real_logit": real.detach().mean(),
                            "fake_logit": fake.detach().mean(),
                        }
                        if adversarial.r1 and step % adversarial.r1_every == 0:
                            penalty = gradient_penalty(opponent, views)
                            loss = loss + adversarial.r1 * adversarial.r1_every * penalty
                            terms["gradient_penalty"] = penalty.detach()
                    loop.accelerator.backward(loss / len(microbatches))
                    logged.append(terms)
                loop.update(opponent)
                d_values = mean_values(logged)

            # Dead codes move onto latents of this step.
            if not keeps_codes:
                parts, restarted = map(tokenizer.by_codebook, (latents, codes)), []
                for codebook, z, of_z in zip(tokenizer.codebooks, *parts, strict=True):
                    rows = reset_dead_codes(codebook, z, of_z, losses.reset_dead_codes_after)
                    forget_moments(optimizer, codebook.weight, rows)
                    restarted.append(rows.sum())
                values["restarted"] = torch.stack(restarted).sum()

            # Log.
            values |= {"gradient_norm": grad_norm, **d_values}
            counts += code_counts(codes, max(config.codebook_sizes))
            if loop.is_log_step(step):
                used = all_reduce(counts).cpu()
                values |= codebook_use(used, config)
                counts.zero_()
            loop.log(values)
        loop.take_averages()
        if not keeps_codes:
            tokenizer.count_codes(views_at(0, data.normalization_views).to(loop.device))
    return tokenizer, loop.rows


def codebook_use(counts: Tensor, config: TokenizerConfig) -> Row:
    """Usage (% of codes) and perplexity of every codebook and scale, from counts [S, K]."""
    statistics = codebook_statistics(counts, 0, config)
    by_name = dict(statistics["codebooks"])
    by_name |= {f"scale_{scale['scale']}": scale for scale in statistics["scales"]}
    names = ("usage", "perplexity")
    return {f"{name}_{part}": use[name] for part, use in by_name.items() for name in names}
