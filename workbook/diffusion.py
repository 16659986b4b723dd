"""A small diffusion model over the code vectors of a tokenizer: what autoregressive models are compared with.

Rectified flow (arXiv 2209.03003) with a transformer (DiT, arXiv 2212.09748, in its "in-context" form): all vectors of an image start as
noise and move along straight lines to the data at once. Class and time are two more tokens before those of the image, so the block is the
one that everything else uses. The model reads and draws vectors of codes, which lie on a sphere; the tokenizer decodes what was drawn
after replacing each vector by its nearest code, so reconstruction limits it as it limits an autoregressive model.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from sitlib.model.config import STRICT, Probability, check_width
from sitlib.model.sequence import Transformer

TIME_FREQUENCIES = 64


@dataclasses.dataclass(frozen=True, config=STRICT)
class DiffusionConfig:
    """A transformer that moves code vectors from noise to data, compared with autoregressive ones."""

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
    """A `DiffusionConfig` together with what its tokenizer and its data fix: stored in the checkpoint."""

    shape: DiffusionConfig
    num_scales: int
    tokens_per_scale: int
    code_dim: int
    classes: list[str]


class DiffusionModel(nn.Module):
    """Velocity of code vectors [B, S, N, D] between noise (t = 0) and data (t = 1), given class ids [B].

    Attributes:
        no_class: the class id that stands for "no class given", for classifier-free guidance.
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

    def forward(self, vectors: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Velocities [B, S, N, D] at noisy `vectors` [B, S, N, D] of unit variance, times [B] in [0, 1] and class ids [B]."""
        shape = vectors.shape
        frequencies = torch.exp(
            torch.linspace(0, math.log(1000.0), TIME_FREQUENCIES, device=time.device)
        )
        angles = time[:, None] * frequencies
        told = torch.stack(
            [
                self.class_embedding(labels),
                self.time_embedding(torch.cat([angles.sin(), angles.cos()], dim=-1)),
            ],
            dim=1,
        )
        x_BTC = self.embed(vectors.flatten(1, 2)) + self.position
        x_BTC = torch.cat([told, x_BTC], dim=1)
        x_BTC = self.transformer(x_BTC)
        return self.to_velocity(x_BTC[:, 2:]).view(shape)

    def loss(self, vectors: Tensor, labels: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mean squared error [B] of the velocity on the way from `noise` to the unit `vectors` [B, S, N, D] at times [B]."""
        data = _to_unit_variance(vectors)
        at = time[:, None, None, None]
        found = self(noise.lerp(data, at), time, labels)
        return (found - (data - noise)).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def draw(
        self, labels: Tensor, *, steps: int, guidance: float, seed: int, batch_size: int = 64
    ) -> Tensor:
        """Unit vectors [B, S, N, D] for class ids [B], by Heun's method; sample i depends on the seed and i alone.

        Args:
            steps: of the integration, two evaluations of the model each.
            guidance: weight w of classifier-free guidance, uncond + w (cond - uncond); 1.0 = off.
        """
        config, drawn = self.config, []
        shape = (config.num_scales, config.tokens_per_scale, config.code_dim)
        for start in range(0, len(labels), batch_size):
            told = labels[start : start + batch_size]
            x = torch.stack(
                [
                    torch.randn(
                        shape, generator=torch.Generator().manual_seed((seed << 32) + start + i)
                    )
                    for i in range(len(told))
                ]
            ).to(self.position.device)
            times = torch.linspace(0, 1, steps + 1).tolist()
            for now, then in zip(times[:-1], times[1:], strict=True):
                velocity = self._guided(x, now, told, guidance)
                ahead = x + (then - now) * velocity
                if then < 1:
                    velocity = (velocity + self._guided(ahead, then, told, guidance)) / 2
                x = x + (then - now) * velocity
            drawn.append(F.normalize(x, dim=-1))
        return torch.cat(drawn)

    def _guided(self, x: Tensor, time: float, labels: Tensor, guidance: float) -> Tensor:
        times = torch.full((len(x),), time, device=x.device)
        if guidance == 1.0:
            return self(x, times, labels)
        both = self(
            x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, self.unconditional(labels)])
        )
        told, untold = both.chunk(2)
        return untold + guidance * (told - untold)

    def unconditional(self, labels: Tensor) -> Tensor:
        """The ids of the same shape that say nothing."""
        return torch.full_like(labels, self.no_class)


def _to_unit_variance(vectors: Tensor) -> Tensor:
    """Unit vectors [..., D] -> entries of variance 1 on average, as noise has."""
    return vectors * vectors.shape[-1] ** 0.5
