"""The adversarial part of a tokenizer's training: a discriminator, its losses, and when its word counts.

SIT (arXiv 2412.09607, section 4) adds to the reconstruction loss 0.1 times the loss from a StyleGAN discriminator, with spectral
normalization against instability; ViT-VQGAN (arXiv 2110.04627) takes that of StyleGAN2 (arXiv 1912.04958). Knows nothing of tokenizers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from sitlib.train.config import AdversarialConfig


class Discriminator(nn.Module):
    """The residual discriminator of StyleGAN2 with spectral normalization (arXiv 1802.05957) of every convolution and linear map.

    A 1x1 convolution from RGB, blocks that halve the side and double the channels (up to 8 times) until the side is odd or below 8
    (4 for powers of two, 6 for 96), the deviation within the batch as one more feature, a 3x3 convolution, and a linear map to one
    logit. All state is in `state_dict`: besides the weights, the vectors of the power iteration, which every training-mode forward
    advances by one round. In evaluation mode they rest.

    Args:
        size: side of the images, px, a multiple of 8.
        channels: at full size.
        normalized: with spectral normalization.

    Raises:
        ValueError: a size that is not a positive multiple of 8; no channels.
    """

    def __init__(self, size: int, channels: int, normalized: bool = True):
        super().__init__()
        if size < 8 or size % 8:
            raise ValueError(
                f"The discriminator halves its images: size must be a multiple of 8, it is {size}."
            )
        if channels < 1:
            raise ValueError(
                f"The discriminator needs at least 1 channel, it was given {channels}."
            )
        self.size = size
        self.from_rgb = _conv(3, channels, kernel=1)
        blocks, side, width = [], size, channels
        while side >= 8 and side % 2 == 0:
            wider = min(2 * width, 8 * channels)
            blocks.append(_Block(width, wider))
            side, width = side // 2, wider
        self.blocks = nn.Sequential(*blocks)
        self.conv = _conv(width + 1, width, kernel=3)
        self.logit = _normalized(nn.Linear(width * side**2, 1))
        if not normalized:
            for module in list(self.modules()):
                if is_parametrized(module, "weight"):
                    remove_parametrizations(module, "weight", leave_parametrized=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B] of images [B, 3, H, W], high for real ones.

        Real and reconstructed images belong in separate calls: each image is also judged by how much its batch varies.

        Args:
            images: RGB in [0, 1]; reconstructions that overshoot are not clamped, so that their gradient stays.

        Raises:
            ValueError: images of another shape than [B, 3, size, size].
        """
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"The discriminator takes images [B, 3, {self.size}, {self.size}], it was given {list(images.shape)}."
            )
        # Channels last: on a CPU the depthwise blur is then six times faster.
        x = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        x = _activation(self.from_rgb(x))
        x = self.blocks(x)  # [B, C, side, side]
        x = torch.cat([x, _batch_deviation(x)], dim=1)
        x = _activation(self.conv(x))
        return self.logit(x.flatten(1)).squeeze(1)


class _Block(nn.Module):
    """Residual block [B, C, H, W] -> [B, C', H / 2, W / 2].

    Two things differ from StyleGAN2. Its second convolution decimates by its stride, after a blur at full size; here the blur
    decimates, which is as free of aliasing for a quarter of its work. And its sum is divided by sqrt(2) to keep the variance; here the
    norm of 1 already halves the variance of the skip path where it doubles the channels.
    """

    def __init__(self, channels: int, wider: int):
        super().__init__()
        self.halve = _Halve()
        self.conv1 = _conv(channels, channels, kernel=3)
        self.conv2 = _conv(channels, wider, kernel=3)
        self.skip = _conv(channels, wider, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _activation(self.conv1(x))
        y = _activation(self.conv2(self.halve(y)))
        return y + self.skip(self.halve(x))


class _Halve(nn.Module):
    """[B, C, H, W] -> [B, C, H / 2, W / 2]: StyleGAN2's binomial filter (1, 3, 3, 1) / 8 along both axes, then every second value."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)  # [4, 4]

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(
            x, self.kernel.expand(channels, 1, 4, 4), stride=2, padding=1, groups=channels
        )


def _batch_deviation(x: Tensor) -> Tensor:
    """[B, 1, H, W], constant: the standard deviation over the batch, averaged over features (arXiv 1710.10196, section 3).

    The group is the whole batch, of any size, where StyleGAN2 takes four images. One image has deviation 0.
    """
    values = x.float() if x.dtype == torch.float16 else x  # in which the constant would be 0
    variance = values.var(dim=0, correction=0)
    deviation = (
        (variance + 1e-8).sqrt().mean()
    )  # the constant keeps the gradient finite at variance 0
    return deviation.to(x.dtype).expand(len(x), 1, *x.shape[2:])


def _activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


def _conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> nn.Module:
    return _normalized(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))


def _normalized(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Spectral norm and an orthogonal start, in which all singular values are 1.

    The norm divides by the largest singular value. For Gaussian weights (He) that is well above the root mean square of the others, so
    that the signal would shrink at every layer; orthogonal weights keep its variance, which is what He's scale is for.
    """
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Scalar: the logistic loss of telling real images [B] from reconstructions [B'] (arXiv 1406.2661, as in StyleGAN2).

    Not the hinge loss: its margins of +-1 ask for a scale of logits that spectral normalization may not allow, and beyond them an image
    teaches nothing. The logistic loss is smooth and has no scale of its own.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Scalar: the non-saturating loss of reconstructions with logits [B], strongest where the discriminator is surest."""
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """R1 (arXiv 1801.04406): scalar, the mean over real images of the squared norm of the logit's gradient; can be backpropagated.

    The loss adds gamma / 2 times this. The gradient is with respect to pixels in [0, 1], so the penalty is 4 times that of pixels in
    [-1, 1], for which StyleGAN2 gives its gamma. Paid every k-th step only, it is weighted with k (StyleGAN2, section 4.1).

    Args:
        discriminator: images [B, 3, H, W] -> logits [B].
        images: real images [B, 3, H, W] in [0, 1].
    """
    images = images.detach().requires_grad_()
    logits = discriminator(images)
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  # [B, 3, H, W]
    return gradients.square().sum(dim=(1, 2, 3)).mean()


def adversarial_weight(step: int, config: AdversarialConfig) -> float:
    """Weight of the generator's loss at `step`: 0 during warm-up, then a linear ramp to `weight`."""
    steps = step - config.start - config.warmup
    if steps < 0:
        return 0.0
    return config.weight * (min(steps / config.ramp, 1.0) if config.ramp else 1.0)
