"""A diffusion model over code vectors, to compare autoregressive models with.

Rectified flow (arXiv 2209.03003) with a transformer (DiT, arXiv 2212.09748, "in-context" form). The
tokenizer decodes the code nearest to each vector, so it limits both kinds of model alike.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn

from sitlib.files import Row
from sitlib.model.config import AutoregressiveConfig
from sitlib.model.sequence import Transformer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import to_dict
from sitlib.train.loop import Logged, train_module
from workbook.codes import Codes
from workbook.profile import Profile
from workbook.runs import AutoregressiveRun, Trained, train_or_load

TIME_FREQUENCIES = 64


@dataclass(frozen=True)
class DiffusionConfig:
    """Sizes of the transformer and of the vectors that it moves, and their classes."""

    shape: AutoregressiveConfig
    num_scales: int
    tokens_per_scale: int
    code_dim: int
    classes: list[str]


class DiffusionModel(nn.Module):
    """Velocity of code vectors [B, S, N, D] between noise, t = 0, and data, t = 1.

    Class ids are 0 ... len(classes) - 1; len(classes) means "no class", for guidance.
    """

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config, shape, width = config, config.shape, config.shape.width
        self.embed = nn.Linear(config.code_dim, width)
        self.class_embedding = nn.Embedding(len(config.classes) + 1, width)
        self.time_embedding = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        num_tokens = config.num_scales * config.tokens_per_scale
        self.position = nn.Parameter(0.5 * torch.randn(num_tokens, width))
        nn.init.normal_(self.class_embedding.weight, std=0.5)
        self.transformer = Transformer(
            shape.layers, width, shape.heads, shape.mlp_ratio, dropout=shape.dropout
        )
        self.to_velocity = nn.Linear(width, config.code_dim)
        nn.init.zeros_(self.to_velocity.weight)
        nn.init.zeros_(self.to_velocity.bias)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Velocity [B, S, N, D] at x [B, S, N, D] of unit variance, times [B], class ids [B]."""
        log_freqs = torch.linspace(0, math.log(1000.0), TIME_FREQUENCIES, device=time.device)
        angles = time[:, None] * log_freqs.exp()
        time_emb = self.time_embedding(torch.cat([angles.sin(), angles.cos()], dim=-1))
        cond = torch.stack([self.class_embedding(labels), time_emb], dim=1)  # [B, 2, C]
        x_BTC = torch.cat([cond, self.embed(x.flatten(1, 2)) + self.position], dim=1)
        return self.to_velocity(self.transformer(x_BTC)[:, 2:]).view(x.shape)

    def loss(self, vectors: Tensor, labels: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Squared error [B] of the velocity at times [B], from noise to vectors [B, S, N, D]."""
        data = vectors * vectors.shape[-1] ** 0.5  # unit vectors: entries of variance 1, as noise
        velocity = self(noise.lerp(data, time[:, None, None, None]), time, labels)
        return (velocity - (data - noise)).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(
        self, labels: Tensor, steps: int, guidance: float, seed: int, batch_size: int = 64
    ) -> Tensor:
        """Unit vectors [B, S, N, D] for class ids [B], by Heun's method.

        Sample i is a function of (seed, i).

        Args:
            steps: of the integration, two evaluations of the model each.
            guidance: weight w of classifier-free guidance, uncond + w (cond - uncond); 1.0 = off.
        """
        c, batches = self.config, []
        shape = (c.num_scales, c.tokens_per_scale, c.code_dim)
        for start in range(0, len(labels), batch_size):
            batch = labels[start : start + batch_size]
            seeds = [(seed << 32) + start + i for i in range(len(batch))]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
            x = torch.stack(noise).to(self.position.device)
            for t, t_next in pairwise(torch.linspace(0, 1, steps + 1).tolist()):
                velocity = self.guided_velocity(x, t, batch, guidance)
                if t_next < 1:
                    ahead = x + (t_next - t) * velocity
                    velocity_ahead = self.guided_velocity(ahead, t_next, batch, guidance)
                    velocity = (velocity + velocity_ahead) / 2
                x = x + (t_next - t) * velocity
            batches.append(F.normalize(x, dim=-1))
        return torch.cat(batches)

    def guided_velocity(self, x: Tensor, time: float, labels: Tensor, guidance: float) -> Tensor:
        """Velocity at one time of all x, with classifier-free guidance."""
        times = torch.full((len(x),), time, device=x.device)
        if guidance == 1.0:
            return self(x, times, labels)
        both = torch.cat([labels, torch.full_like(labels, len(self.config.classes))])
        cond, uncond = self(x.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return uncond + guidance * (cond - uncond)


def trained_diffusion(
    profile: Profile, variant: str, seed: int, codes: Codes, tokenizer: SpectralTokenizer
) -> Trained[DiffusionModel]:
    """A diffusion model over vectors of `codes`, as large as the generator `variant` and trained
    with its optimizer, now or earlier."""
    run = AutoregressiveRun.of(profile, variant, seed)
    batch_size, hidden_share = run.optimizer.batch_size, run.model.condition_dropout

    def train_now(folder: Path) -> tuple[DiffusionModel, list[Row]]:
        set_seed(seed)
        _, num_scales, tokens = codes.train.shape
        vectors = (num_scales, tokens, tokenizer.config.code_dim)
        model = DiffusionModel(DiffusionConfig(run.model, *vectors, codes.classes))

        def batch_at(step: int) -> tuple[Tensor, ...]:
            rng = np.random.default_rng([seed, step])
            indices = torch.from_numpy(rng.integers(len(codes.train), size=batch_size))
            with torch.no_grad():
                vectors = tokenizer.embed_codes(codes.train[indices])
            noise = torch.from_numpy(rng.standard_normal(vectors.shape, dtype=np.float32))
            # More times near the middle, where the direction is hardest to tell (arXiv 2403.03206).
            logits = torch.from_numpy(rng.standard_normal(batch_size, dtype=np.float32))
            is_hidden = torch.from_numpy(rng.random(batch_size) < hidden_share)
            labels = codes.train_labels[indices].masked_fill(is_hidden, len(codes.classes))
            return vectors, labels, noise, logits.sigmoid()

        def loss(module: nn.Module, batch: tuple[Tensor, ...], step: int) -> tuple[Tensor, Logged]:
            return cast(DiffusionModel, module).loss(*batch).mean(), {}

        title = f"{variant}, diffusion, seed {seed}"
        about = {"folder": folder, "run": to_dict(run), "title": title}
        return train_module(model, loss, batch_at, run.optimizer, **about)

    return train_or_load(run, "diffusion", variant, DiffusionModel, train_now)


@torch.no_grad()
def velocity_error(model: DiffusionModel, vectors: Tensor, labels: Tensor) -> float:
    """Mean squared error of the velocity, over 8 evenly spaced times, one noise an image."""
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    steps = [torch.full(labels.shape, (i + 0.5) / 8) for i in range(8)]
    return float(torch.stack([model.loss(vectors, labels, noise, t).mean() for t in steps]).mean())
