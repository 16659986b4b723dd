"""Tokenizer loss on pixels, after the inverse DWT: L2 + LPIPS + commitment (SIT, section 4)."""

import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.metrics.networks import load_lpips
from sitlib.model.tokenizer import TokenizerOutput
from sitlib.train.config import TokenizerLossConfig


def border_error(error: Tensor, side: int) -> Tensor:
    """Mean |difference| of an error [B, 3, H, H] across the borders of squares of `side` px."""
    down = error[:, :, side::side] - error[:, :, side - 1 : -1 : side]
    across = error[:, :, :, side::side] - error[:, :, :, side - 1 : -1 : side]
    return down.abs().mean() + across.abs().mean()


class TokenizerLoss(nn.Module):
    """1.0 L2 + 0.1 LPIPS + 0.25 commitment (+ codebook), with the weights of `config`.

    L2 is the mean squared error in [-1, 1] (inferred), LPIPS that of arXiv 1801.03924. Of an
    output's preview, the image of the first scales alone, both are added (ours, not the paper's).
    """

    def __init__(self, config: TokenizerLossConfig):
        super().__init__()
        self.config = config
        self.perceptual = load_lpips(config.lpips_net) if config.lpips else None

    def forward(self, output: TokenizerOutput, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of images [B, 3, H, W] in [0, 1]; its terms before weights, detached."""
        config = self.config
        terms = {
            # [0, 1] -> [-1, 1] doubles differences
            "l2": 4 * F.mse_loss(output.reconstruction, images),
            "commitment": output.commitment_loss,
            "codebook": output.codebook_loss,
        }
        if config.border:
            side = images.shape[-1] // round(output.codes.shape[2] ** 0.5)  # of a token, px
            terms["border"] = border_error(output.reconstruction - images, side)
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(output.reconstruction, images).mean()
        loss = images.new_zeros(())
        for name, term in terms.items():
            loss = loss + getattr(config, name) * term
        if output.preview is not None:
            terms["multiscale"] = self._preview_loss(*output.preview, images.shape[-1])
            loss = loss + config.multiscale * terms["multiscale"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def _preview_loss(self, preview: Tensor, target: Tensor, size: int) -> Tensor:
        """Weighted L2 and LPIPS of images [B, 3, h, h], enlarged to `size` px for LPIPS."""
        loss = self.config.l2 * 4 * F.mse_loss(preview, target)
        if self.perceptual is None:
            return loss
        enlarged = (F.interpolate(x, (size, size), mode="bicubic") for x in (preview, target))
        return loss + self.config.lpips * self.perceptual(*enlarged).mean()
