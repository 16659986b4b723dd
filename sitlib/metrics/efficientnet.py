"""EfficientNet-Lite0: features for distances between image sets, where FID's Inception cannot be had.

EfficientNet (Tan and Le 2019, arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, trained on
ImageNet. Distances on its features are comparable with each other only, and are called FD-Lite0, never FID.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.metrics.weights import LITE0, load_weights

# Kernel, stride, output channels, expansion, repeats of each stage. The stem before them has 32 channels,
# stride 2.
STAGES = (
    (3, 1, 16, 1, 1),
    (3, 2, 24, 6, 2),
    (5, 2, 40, 6, 2),
    (3, 2, 80, 6, 3),
    (5, 1, 112, 6, 3),
    (5, 2, 192, 6, 4),
    (3, 1, 320, 6, 1),
)
INPUT_SIZE = 224  # px
NUM_FEATURES = 1280
BATCH_NORM_EPS = 1e-3


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, then ReLU6 if asked.

    A stride of 2 on an even image pads one pixel more at the right and bottom than at the left and top.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        relu6: bool = True,
    ):
        super().__init__(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups)
        self.relu6 = relu6

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input, self.weight
        if self.stride[0] == 2:
            # A zero column or row before the kernel moves it by one pixel, as padding less there would: a copy of the kernel, not of x.
            weight = F.pad(weight, (1 - x.shape[3] % 2, 0, 1 - x.shape[2] % 2, 0))
        x = F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)
        return F.relu6(x, inplace=True) if self.relu6 else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection; with a shortcut where the shape stays."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int
    ):
        super().__init__()
        width = channels_in * expansion
        self.expand = SameConv(channels_in, width, 1) if expansion > 1 else None
        self.depthwise = SameConv(width, width, kernel, stride, groups=width)
        self.project = SameConv(width, channels_out, 1, relu6=False)
        self.shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return y.add_(x) if self.shortcut else y


class Lite0(nn.Module):
    """The frozen classifier, its batch normalizations folded into the convolutions. Use `load_lite0`."""

    num_features = NUM_FEATURES

    def __init__(self):
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        blocks, channels = [], 32
        for kernel, stride, channels_out, expansion, repeats in STAGES:
            for i in range(repeats):
                blocks.append(
                    InvertedResidual(
                        channels, channels_out, kernel, stride if i == 0 else 1, expansion
                    )
                )
                channels = channels_out
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(channels, NUM_FEATURES, 1)
        self.classifier = nn.Linear(NUM_FEATURES, 1000)

    @torch.no_grad()
    def features(self, images: Tensor, size: int = INPUT_SIZE) -> Tensor:
        """Pooled features `[B, 1280]`, at least 0, of `images` `[B, 3, H, W]`, RGB in [0, 1] of any size.

        The images are resized to 224x224 px, bicubic and antialiased, and clamped to [0, 1] as 8-bit images
        would be. A smaller `size`, px, costs less, and its features compare with each other only.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"EfficientNet-Lite0 takes RGB images [B, 3, H, W], not {list(images.shape)}."
            )
        images = images.to(self.classifier.weight)
        if images.shape[2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        x = (images * 255 - 127) / 128
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        return self.head(self.blocks(x)).mean(dim=(2, 3))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """ImageNet class logits `[B, 1000]` of `images` `[B, 3, H, W]`, RGB in [0, 1]."""
        return self.classifier(self.features(images))


def fold_batch_norm(weights: dict[str, Tensor], conv: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals `conv` and the batch normalization `norm` behind it."""
    scale = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + BATCH_NORM_EPS)
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return weights[f"{conv}.weight"] * scale[:, None, None, None], bias


def load_lite0(folder="weights") -> Lite0:
    """EfficientNet-Lite0 on the CPU in float32, frozen, in evaluation mode; move it with `.to(device)`.

    Args:
        folder: where `python -m sitlib.metrics.weights` wrote its files; relative to the project's root.

    Raises `FileNotFoundError` if the weights were not fetched.
    """
    source = load_weights(LITE0, folder)
    with torch.device("meta"):  # no random numbers drawn
        network = Lite0()
    # Our module -> the source's convolution and its batch normalization, both by name.
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i, block in enumerate(network.blocks):
        if block.expand is not None:
            pairs[f"blocks.{i}.expand"] = (f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        pairs[f"blocks.{i}.depthwise"] = (f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        pairs[f"blocks.{i}.project"] = (f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    state = {"classifier.weight": source["_fc.weight"], "classifier.bias": source["_fc.bias"]}
    for name, (conv, norm) in pairs.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = fold_batch_norm(source, conv, norm)
    network.load_state_dict(state, strict=True, assign=True)
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
