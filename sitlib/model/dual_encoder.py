"""An image and a text encoder with a common space, by which text-conditional samples are judged (CLIP, arXiv 2103.00020).

Small, and trained on the data set's own images and captions: the image side is an MLP on frozen features (EfficientNet-Lite0's), the text
side a transformer. Similarities compare with those of the same dual encoder only; none is a CLIP score.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.model.text import TextEncoder, TextTokenizer
from sitlib.train.config import DualEncoderConfig

FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # of similarities in the loss; CLIP's


@dataclass(frozen=True)
class StoredDualEncoderConfig:
    """A `DualEncoderConfig` together with what its data fix: stored in the checkpoint."""

    shape: DualEncoderConfig
    text_tokenizer: str  # `TextTokenizer.to_json()`
    num_features: int  # of an image


class DualEncoder(nn.Module):
    """Features of images [B, F] and token ids of texts [B, L] -> l2-normalized vectors [B, D] of one space.

    Attributes:
        config: its configuration.
        text_tokenizer: makes token ids of texts.
        log_scale: logarithm of the learned factor (the inverse temperature) by which the loss multiplies similarities.
    """

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
        self.text_encoder = TextEncoder(
            self.text_tokenizer.vocabulary,
            self.text_tokenizer.max_tokens,
            shape.layers,
            shape.width,
            shape.heads,
            dropout=shape.dropout,
        )
        self.text_projection = nn.Linear(shape.width, shape.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def embed_images(self, features: Tensor) -> Tensor:
        """Vectors [B, D] of length 1 of image features [B, F]."""
        return F.normalize(self.image_encoder(features).float(), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Vectors [B, D] of length 1 of token ids [B, L] int64; of no text does it depend on its padding or on the other texts."""
        x_BLC, mask_BL = self.text_encoder(tokens)
        mean_BC = x_BLC.masked_fill(~mask_BL[..., None], 0).sum(dim=1) / mask_BL.sum(
            dim=1, keepdim=True
        )
        return F.normalize(self.text_projection(mean_BC).float(), dim=-1)

    def similarity(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Cosines [M, C] in [-1, 1] of images, features [M, F], and texts, token ids [C, L]."""
        images, texts = self.embed_images(features), self.embed_texts(tokens)
        with torch.autocast(
            images.device.type, enabled=False
        ):  # bf16 could not tell good captions apart
            return images @ texts.T

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logits [M, C] for `contrastive_loss`: similarities times the learned factor."""
        return self.log_scale.exp() * self.similarity(features, tokens)

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Keeps the learned factor at 100 or less; called after every update, because a clamp in the loss would stop its gradient."""
        self.log_scale.clamp_(max=math.log(LARGEST_SCALE))


def contrastive_loss(logits: Tensor, names: Tensor) -> Tensor:
    """Symmetric InfoNCE of images and their captions, in nats: a scalar (arXiv 2103.00020).

    The mean of two cross-entropies: of the right caption among all captions of the batch, and of the right image among all images. A
    caption of the same name, of another image or phrased in another way, is not wrong: it does not count.

    Args:
        logits: of every image and every caption, [B, B]; caption i is that of image i.
        names: number of what each image shows, int64 [B].
    """
    own = torch.arange(len(names), device=names.device)
    not_wrong = (names[:, None] == names) & (own[:, None] != own)
    logits = logits.masked_fill(not_wrong, float("-inf"))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
