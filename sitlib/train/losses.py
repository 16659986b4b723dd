"""What a reconstruction is judged by in training: one sum in pixel space, after the inverse DWT (SIT, arXiv 2412.09607, section 4)."""

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.metrics.networks import load_lpips
from sitlib.model.tokenizer import TokenizerOutput
from sitlib.train.config import TokenizerLossConfig


@dataclass
class LossTerms:
    """The weighted sum and its unweighted parts, all scalars."""

    total: Tensor
    parts: dict[str, Tensor]  # name -> value before its weight, detached


class TokenizerLoss(nn.Module):
    """1.0 L2 + 0.1 LPIPS + 0.25 commitment (+ codebook), the weights being those of `config`.

    L2 is the mean squared error in [-1, 1]. LPIPS (arXiv 1801.03924) compares features of a frozen network. Where the image of the first
    scales is given too, L2 and LPIPS of it are added (ours, not the paper's), LPIPS after enlarging it to the full size, as it is judged.
    """

    def __init__(self, config: TokenizerLossConfig, weights: str | None = None):
        super().__init__()
        self.config = config
        self.perceptual = load_lpips(config.lpips_net, weights) if config.lpips else None

    def forward(self, output: TokenizerOutput, images: Tensor) -> LossTerms:
        """Loss of one pass over images [B, 3, H, W] in [0, 1]."""
        parts = {
            "l2": 4
            * F.mse_loss(output.reconstruction, images),  # [0, 1] -> [-1, 1] doubles differences
            "commitment": output.commitment_loss,
            "codebook": output.codebook_loss,
        }
        if self.perceptual is not None:
            parts["lpips"] = self.perceptual(output.reconstruction, images).mean()
        total = cast(
            Tensor, sum(getattr(self.config, name) * value for name, value in parts.items())
        )
        if output.preview is not None:
            parts["multiscale"] = self._of_smaller(*output.preview, images.shape[-1])
            total = total + self.config.multiscale * parts["multiscale"]
        return LossTerms(total, {name: value.detach() for name, value in parts.items()})

    def _of_smaller(self, reconstruction: Tensor, target: Tensor, size: int) -> Tensor:
        """Weighted L2 and LPIPS of images [B, 3, h, h], h below `size`."""
        total = self.config.l2 * 4 * F.mse_loss(reconstruction, target)
        if self.perceptual is None:
            return total
        enlarged = (
            F.interpolate(x, (size, size), mode="bicubic") for x in (reconstruction, target)
        )
        return total + self.config.lpips * self.perceptual(*enlarged).mean()
