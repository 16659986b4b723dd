"""A small diffusion model over code vectors, for comparison with autoregressive models.

Rectified flow (arXiv 2209.03003) with a transformer (DiT, arXiv 2212.09748, "in-context" form). The
tokenizer decodes the code nearest to each vector, so it limits both kinds of model alike.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from sitlib.model.config import STRICT, Probability, check_width
from sitlib.model.sequence import Transformer

TIME_FREQUENCIES = 64


@dataclasses.dataclass(frozen=True, config=STRICT)
class DiffusionConfig:
    """A transformer that moves code vectors from noise to data."""

    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveFloat
    dropout: Probability
    condition_dropout: Probability  # of training samples whose class is hidden, for guidance

    def __post_init__(self):
        check_width(self.width, self.heads, self.mlp_ratio)


@dataclass(frozen=True)
class FlowConfig:
    """All that a checkpoint stores besides weights: the transformer, its vectors, its classes."""

    shape: DiffusionConfig
    num_scales: int
    tokens_per_scale: int
    code_dim: int
    classes: list[str]


class DiffusionModel(nn.Module):
    """Velocity of code vectors [B, S, N, D] between noise, t = 0, and data, t = 1.

    Attributes:
        no_class: class id that means "no class", for classifier-free guidance.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config, shape = config, config.shape
        self.no_class, width = len(config.classes), shape.width
        self.num_tokens = config.num_scales * config.tokens_per_scale
        self.embed = nn.Linear(config.code_dim, width)
        self.class_embedding = nn.Embedding(len(config.classes) + 1, width)
        self.time_embedding = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.position = nn.Parameter(0.5 * torch.randn(self.num_tokens, width))
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
        data = _to_unit_variance(vectors)
        velocity = self(noise.lerp(data, time[:, None, None, None]), time, labels)
        return (velocity - (data - noise)).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(
        self, labels: Tensor, *, steps: int, guidance: float, seed: int, batch_size: int = 64
    ) -> Tensor:
        """Unit vectors [B, S, N, D] for class ids [B], by Heun's method.

        Sample i is a function of (seed, i).

        Args:
            steps: of the integration, two evaluations of the model each.
            guidance: weight w of classifier-free guidance, uncond + w (cond - uncond); 1.0 = off.
        """
        c, batches = self.config, []
        shape = (c.num_scales, c.tokens_per_scale, c.code_dim)
        times = torch.linspace(0, 1, steps + 1).tolist()
        for start in range(0, len(labels), batch_size):
            batch = labels[start : start + batch_size]
            seeds = [(seed << 32) + start + i for i in range(len(batch))]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
            x = torch.stack(noise).to(self.position.device)
            for t, t_next in pairwise(times):
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
        both = torch.cat([labels, self.unconditional(labels)])
        cond, uncond = self(x.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return uncond + guidance * (cond - uncond)

    def unconditional(self, labels: Tensor) -> Tensor:
        """Ids of the same shape that mean "no class"."""
        return torch.full_like(labels, self.no_class)


def _to_unit_variance(vectors: Tensor) -> Tensor:
    """Unit vectors [..., D] -> entries of variance 1 on average, as noise has."""
    return vectors * vectors.shape[-1] ** 0.5
