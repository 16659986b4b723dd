"""Training a tokenizer variant of a profile."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sitlib.config import Profile
from sitlib.data import held_out_views, open_images, training_views
from sitlib.experiments.runs import TokenizerRun, Trained, best_device, trained
from sitlib.losses import TokenizerLoss
from sitlib.results import Row
from sitlib.tokenizer import SpectralTokenizer, TokenizerOutput
from sitlib.training import Phase, seed_everything, train
from sitlib.weights import ensure_weights


def trained_tokenizer(profile: Profile, variant: str, seed: int, pipeline: bool = False) -> Trained:
    """The tokenizer `variant` of a profile, trained with `seed` now or earlier; `pipeline` as for `runs.trained`."""
    run = TokenizerRun.of(profile, variant, seed)
    title = f"{variant}, seed {seed}"
    return trained(
        run, "tokenizer", variant, SpectralTokenizer, lambda folder: _train(run, folder, title), pipeline
    )


def held_out_crops(profile: Profile) -> tuple[Tensor, list[str]]:
    """The evaluation crops [V, 3, H, W] of a profile, the same for every tokenizer, and the keys of their photographs."""
    settings = profile.tokenizer.evaluation
    source = open_images(profile.data.source, "test")
    images, _, keys = held_out_views(source, settings.views, profile.data.size, settings.seed, kind="crops")
    return images, keys


def _train(run: TokenizerRun, checkpoints: Path, title: str) -> tuple[SpectralTokenizer, list[Row]]:
    seed_everything(run.seed)
    images, device = open_images(run.data.source, "train"), best_device()
    tokenizer = SpectralTokenizer(run.model)
    ensure_weights()
    loss_terms = TokenizerLoss(run.loss).to(device)
    output: TokenizerOutput | None = None

    def views(step: int, count: int) -> Tensor:
        data = run.data
        return training_views(
            images, step, count, data.size, run.seed, kind="crops", min_crop=data.min_crop, flip=data.flip
        )[0]

    def start() -> None:
        """Normalisation and k-means need the training images, and more of them than one batch."""
        sample = views(0, run.data.normalisation_views).to(device)
        tokenizer.measure_normalisation(sample)
        tokenizer.initialise_codebooks(sample)

    def loss(model: nn.Module, batch: Tensor, step: int) -> tuple[Tensor, Row]:
        nonlocal output
        output = model(batch)
        terms = loss_terms(output, batch)
        return terms.total, terms.parts

    def after_update(optimiser: torch.optim.Optimizer) -> Row:
        restarted = tokenizer.restart_dead_codes(output, run.loss.restart_after)
        for codebook, moved in zip(tokenizer.codebooks, restarted, strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):  # a code that was moved has no history
                optimiser.state[codebook.weight][moment][moved] = 0.0
        return {
            "restarted": float(sum(len(moved) for moved in restarted)),
            **_perplexity(tokenizer, output.codes),
        }

    curve = train(
        [Phase(tokenizer, loss, after_update)],
        lambda step: views(step, run.optimiser.batch_size),
        run.optimiser,
        checkpoints=checkpoints,
        start=start,
        title=title,
    )
    return tokenizer, curve


def _perplexity(tokenizer: SpectralTokenizer, codes: Tensor) -> Row:
    """Perplexity of each codebook over a batch of codes [B, S, N]: the number of codes in even use."""
    parts = (
        {"approximation": codes[:, :1], "details": codes[:, 1:]}
        if len(tokenizer.codebooks) == 2
        else {"pixels": codes}
    )
    shares = {name: torch.bincount(part.flatten()) / part.numel() for name, part in parts.items()}
    return {f"perplexity_{name}": torch.special.entr(share).sum().exp() for name, share in shares.items()}
