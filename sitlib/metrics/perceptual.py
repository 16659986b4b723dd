"""LPIPS, the learned perceptual distance (Zhang et al., arXiv 1801.03924), without a download at run time.

Network, scaling and linear heads (version 0.1) are those of the `lpips` package; only the trunk, which the
package would fetch from the web, comes from the files of `sitlib.metrics.weights`.
"""

import warnings
from importlib.resources import files
from pathlib import Path
from typing import cast

import lpips
import torch
from torch import nn

from sitlib.metrics.weights import ALEXNET, VGG16, load_weights

TRUNK_FILES = {"alex": ALEXNET, "vgg": VGG16}
SMALLEST_SIZE = {"alex": 31, "vgg": 16}  # px; below, a pooling layer of the trunk has nothing left


class PerceptualDistance(nn.Module):
    """Frozen LPIPS on RGB images in [0, 1]. Always in evaluation mode: `train()` has no effect."""

    def __init__(self, network: lpips.LPIPS, net: str):
        super().__init__()
        self.network = network
        self.net = net
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Distances `[B]`, at least 0, larger for less alike; gradients flow to `images` only.

        Args:
            images: `[B, 3, H, W]`, RGB in [0, 1].
            references: the same shape and range; treated as constant, so that no graph is kept for them.

        Raises `ValueError` if the shapes differ, are not RGB images, or are too small for the trunk.
        """
        if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "images and references must be two RGB batches [B, 3, H, W] of one shape, "
                f"not {list(images.shape)} and {list(references.shape)}."
            )
        if min(images.shape[2:]) < SMALLEST_SIZE[self.net]:
            raise ValueError(
                f"LPIPS-{self.net} needs images of at least {SMALLEST_SIZE[self.net]} px a side, "
                f"not {list(images.shape[2:])}."
            )
        # The layout in which convolutions on a CPU are fastest.
        images, references = (
            x.contiguous(memory_format=torch.channels_last) for x in (images, references.detach())
        )
        return self.network(images, references, normalize=True).flatten()


def load_lpips(net: str = "alex", folder="weights") -> PerceptualDistance:
    """LPIPS on an AlexNet ("alex": fast, the usual metric) or a VGG16 trunk ("vgg"), on the CPU, in float32.

    Args:
        net: "alex" or "vgg".
        folder: where `python -m sitlib.metrics.weights` wrote its files; relative to the project's root.

    Raises `ValueError` for another `net`, `FileNotFoundError` if the weights were not fetched. Draws no
    random numbers.
    """
    if net not in TRUNK_FILES:
        raise ValueError(
            f"There is no LPIPS trunk {net!r} here; choose one of {sorted(TRUNK_FILES)}."
        )
    trunk = load_weights(TRUNK_FILES[net], folder)
    # On the meta device, or the package would first draw 61 M (AlexNet) or 138 M (VGG16) random numbers.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision: `pretrained` is deprecated
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.lpips.ScalingLayer()
    heads = torch.load(
        cast(Path, files(lpips)) / "weights" / "v0.1" / f"{net}.pth",
        map_location="cpu",
        weights_only=True,
    )
    # `lpips` slices torchvision's `features` but keeps the layer numbers: net.slice2.3 is features.3.
    state = {f"lins.{name.removeprefix('lin')}": value for name, value in heads.items()} | heads
    for name in network.net.state_dict():
        state[f"net.{name}"] = trunk.pop(f"features.{name.split('.', 1)[1]}")
    state |= {
        f"scaling_layer.{name}": value for name, value in network.scaling_layer.state_dict().items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    network.to(memory_format=torch.channels_last)
    return PerceptualDistance(network, net)
