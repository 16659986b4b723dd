"""Image and text encoder with a common space, to judge samples for texts (CLIP, arXiv 2103.00020).

Small, and trained on the data set's own captions: an MLP on frozen EfficientNet-Lite0 features, and
a text transformer. Similarities are comparable within one model only; none is a CLIP score.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from sitlib.model.config import STRICT, Probability, check_width
from sitlib.model.text import TextEncoder, TextTokenizer

FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # of similarities in the loss; CLIP's


@dataclass(frozen=True, config=STRICT)
class DualEncoderShape:
    """Image and text encoder with a common space. Ours; defaults are those of the profile quick."""

    layers: PositiveInt = 1  # of the text encoder
    width: PositiveInt = 128
    heads: PositiveInt = 4
    dim: PositiveInt = 128  # of the common space
    dropout: Probability = 0.2

    def __post_init__(self):
        check_width(self.width, self.heads)


@dataclass(frozen=True, config=STRICT)
class StoredDualEncoderConfig:
    """All that a checkpoint stores besides weights: the encoders, their words and features."""

    shape: DualEncoderShape
    text_tokenizer: str  # `TextTokenizer.to_json()`
    num_features: int  # of an image


class DualEncoder(nn.Module):
    """Image features [B, F] and token ids of texts [B, L] -> unit vectors [B, D] of one space."""

    def __init__(self, config: StoredDualEncoderConfig):
        super().__init__()
        self.config, shape = config, config.shape
        self.text_tokenizer = TextTokenizer.from_json(config.text_tokenizer)
        self.image_encoder = nn.Sequential(
            nn.LayerNorm(config.num_features),
            nn.Dropout(shape.dropout),
            nn.Linear(config.num_features, shape.width),
            nn.GELU(),
            nn.Dropout(shape.dropout),
            nn.Linear(shape.width, shape.dim),
        )
        words = self.text_tokenizer
        size = (words.vocab_size, words.max_tokens, shape.layers, shape.width, shape.heads)
        self.text_encoder = TextEncoder(*size, dropout=shape.dropout)
        self.text_projection = nn.Linear(shape.width, shape.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))  # inverse temperature

    def embed_images(self, features: Tensor) -> Tensor:  # [B, F] -> unit vectors [B, D]
        return F.normalize(self.image_encoder(features).float(), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:  # [B, L] -> unit vectors [B, D]
        x_BLC, mask_BL = self.text_encoder(tokens)
        sum_BC = x_BLC.masked_fill(~mask_BL[..., None], 0).sum(dim=1)
        mean_BC = sum_BC / mask_BL.sum(dim=1, keepdim=True)
        return F.normalize(self.text_projection(mean_BC).float(), dim=-1)

    def similarity(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Cosines [M, C] of image features [M, F] and token ids of texts [C, L]."""
        images, texts = self.embed_images(features), self.embed_texts(tokens)
        # In float32: bf16 could not tell good captions apart.
        with torch.autocast(images.device.type, enabled=False):
            return images @ texts.T

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logits [M, C] for `contrastive_loss`."""
        return self.log_scale.exp() * self.similarity(features, tokens)

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Clamp the learned factor to 100, after an update: a clamp in the loss has no gradient."""
        self.log_scale.clamp_(max=math.log(LARGEST_SCALE))


def contrastive_loss(logits: Tensor, names: Tensor) -> Tensor:
    """Symmetric InfoNCE of images and their captions, in nats (arXiv 2103.00020).

    Logits [B, B] are of every image and every caption; caption i is that of image i. Captions of
    the same content, a number [B] int64, of another image do not count as wrong.
    """
    targets = torch.arange(len(names), device=names.device)
    is_same_name = (names[:, None] == names) & (targets[:, None] != targets)
    logits = logits.masked_fill(is_same_name, float("-inf"))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
