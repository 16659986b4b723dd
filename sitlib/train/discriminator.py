"""The adversarial part of a tokenizer's training: a discriminator, its losses, their weight.

SIT (arXiv 2412.09607, section 4) adds 0.1 times the loss from a StyleGAN discriminator with
spectral normalization; ViT-VQGAN (arXiv 2110.04627) takes that of StyleGAN2 (arXiv 1912.04958).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from sitlib.strict import require
from sitlib.train.config import AdversarialConfig, OptimizerConfig


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator with spectral normalization (arXiv 1802.05957).

    Blocks halve the side (px, a multiple of 8) and double the channels (up to 8 times) until the
    side is odd or below 8. Every pass in training mode advances the norms' power iteration.
    """

    def __init__(self, size: int, channels: int, normalized: bool = True):
        super().__init__()
        sentence = f"the discriminator needs a size that is a multiple of 8, not {size}."
        require(size > 0 and size % 8 == 0, sentence)
        self.from_rgb = _conv(3, channels, kernel=1)
        blocks, side, width = [], size, channels
        while side >= 8 and side % 2 == 0:
            wider = min(2 * width, 8 * channels)
            blocks.append(_Block(width, wider))
            side, width = side // 2, wider
        self.blocks = nn.Sequential(*blocks)
        self.conv = _conv(width + 1, width, kernel=3)  # also of the deviation within the batch
        self.logit = _normalized(nn.Linear(width * side**2, 1))
        for module in [] if normalized else list(self.modules()):
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight", leave_parametrized=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B] of images [B, 3, size, size] in about [0, 1], high for real ones.

        Real and reconstructed images belong in separate calls: each is also judged by how much its
        batch varies. Overshooting pixels are not clamped, so that they have a gradient.
        """
        # Channels last: on a CPU the depthwise blur is then six times faster.
        x = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        x = self.blocks(_activation(self.from_rgb(x)))  # [B, C, side, side]
        x = torch.cat([x, _batch_deviation(x)], dim=1)
        return self.logit(_activation(self.conv(x)).flatten(1)).squeeze(1)


class _Block(nn.Module):
    """Residual block [B, C, H, W] -> [B, C', H / 2, W / 2].

    The blur decimates, for a quarter of the work of StyleGAN2's second convolution. Its division by
    sqrt(2) is left out: the norm of 1 halves the variance of the path that doubles the channels.
    """

    def __init__(self, channels: int, wider: int):
        super().__init__()
        self.halve = _Halve()
        self.conv1 = _conv(channels, channels, kernel=3)
        self.conv2 = _conv(channels, wider, kernel=3)
        self.skip = _conv(channels, wider, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.halve(_activation(self.conv1(x)))
        return _activation(self.conv2(y)) + self.skip(self.halve(x))


class _Halve(nn.Module):
    """StyleGAN2's binomial filter (1, 3, 3, 1) / 8 along both axes, then every second value."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)  # [4, 4]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H / 2, W / 2]
        kernel = self.kernel.expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def _batch_deviation(x: Tensor) -> Tensor:
    """Deviation over the batch, the mean over features (arXiv 1710.10196): a map [B, 1, H, W]."""
    values = x.float() if x.dtype == torch.float16 else x  # in which the constant would be 0
    variance = values.var(dim=0, correction=0)
    deviation = (variance + 1e-8).sqrt().mean()  # so that the gradient is finite at variance 0
    return deviation.to(x.dtype).expand(len(x), 1, *x.shape[2:])


def _activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


def _conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> nn.Module:
    return _normalized(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))


def _normalized(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Spectral norm and an orthogonal start, in which all singular values are 1.

    The norm divides by the largest, for Gaussian weights well above the root mean square of the
    others: the signal would shrink at every layer.
    """
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic loss of telling real images [B] from reconstructions [B'] (StyleGAN2).

    Not the hinge loss: spectral normalization may not allow the scale that its margins ask for.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of reconstructions with logits [B]."""
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """R1 (arXiv 1801.04406): mean squared norm of the logit's gradient at real images [B, 3, H, W].

    The loss adds gamma / 2 times this. Pixels are in [0, 1], so it is 4 times that for pixels in
    [-1, 1], for which StyleGAN2 gives its gamma.
    """
    images = images.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradients.square().sum(dim=(1, 2, 3)).mean()


def adversarial_weight(step: int, config: AdversarialConfig) -> float:
    """Weight of the generator's loss at `step`: 0 in warm-up, then a linear ramp to `weight`."""
    steps = step - config.start - config.warmup
    ramp = min(steps / config.ramp, 1.0) if config.ramp else 1.0
    return config.weight * ramp if steps >= 0 else 0.0


def discriminator_optimizer(config: OptimizerConfig, own: AdversarialConfig) -> OptimizerConfig:
    """Adam of the discriminator: momentum would chase a moving opponent (arXiv 1812.04948)."""
    zero = {"final_learning_rate": 0.0, "beta1": 0.0, "weight_decay": 0.0, "ema_decay": 0.0}
    adam = {"algorithm": "adamw", "learning_rate": own.learning_rate, "beta2": 0.99}
    return replace(config, warmup_steps=0, **adam, **zero)
