"""Training an autoregressive variant of a profile on extracted codes."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.autoregressive import AutoregressiveModel, CodeModelConfig
from sitlib.config import Profile
from sitlib.experiments.codes import Codes, load_codes
from sitlib.experiments.runs import AutoregressiveRun, Trained, trained
from sitlib.results import Row
from sitlib.training import Phase, seed_everything, train


def trained_generator(profile: Profile, variant: str, seed: int, pipeline: bool = False) -> Trained:
    """The autoregressive model `variant` of a profile, trained with `seed` now or earlier; `pipeline` as for `runs.trained`.

    It models the codes of the tokenizer that was trained with the same seed.
    """
    run = AutoregressiveRun.of(profile, variant, seed)

    def train_now(checkpoints: Path) -> tuple[AutoregressiveModel, list[Row]]:
        return _train(
            run, load_codes(profile, run.model.tokenizer, seed), checkpoints, f"{variant}, seed {seed}"
        )

    return trained(run, "autoregressive", variant, AutoregressiveModel, train_now, pipeline)


def _train(
    run: AutoregressiveRun, codes: Codes, checkpoints: Path, title: str
) -> tuple[AutoregressiveModel, list[Row]]:
    seed_everything(run.seed)
    _, num_scales, tokens_per_scale = codes.train.shape
    num_codes = run.codes.tokenizer.model.num_codes
    model = AutoregressiveModel(
        CodeModelConfig(run.model, num_scales, tokens_per_scale, num_codes, codes.classes)
    )

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        """Codes [B, S, N] and class ids [B], some of them hidden."""
        generator = np.random.default_rng([run.seed, step])
        chosen = torch.from_numpy(generator.integers(len(codes.train), size=run.optimiser.batch_size))
        hidden = torch.from_numpy(generator.random(len(chosen)) < run.model.class_dropout)
        return codes.train[chosen], codes.train_labels[chosen].masked_fill(hidden, model.no_class)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, Row]:
        target, labels = batch
        logits = module(target, labels)
        nats_BSN = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(
            target.shape
        )
        by_scale = nats_BSN.detach().mean(dim=(0, 2))
        return nats_BSN.mean(), {f"nats_scale_{scale}": value for scale, value in enumerate(by_scale, 1)}

    return model, train([Phase(model, loss)], batch_at, run.optimiser, checkpoints=checkpoints, title=title)
