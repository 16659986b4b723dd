"""Images made worse in the ways in which a tokenizer makes them worse: blurred, blocky, noisy."""

from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sitlib.data.decoding import rgb_to_tensor

SMALLEST, LARGEST = 0.2, 0.6  # of the side, to which an image is shrunk and enlarged again
WORST, BEST = 2, 20  # JPEG quality
LEAST_NOISE, MOST_NOISE = 0.02, 0.12  # deviation, of pixels in [0, 1]


def degraded(images: Tensor, seed: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], each made worse in ways that follow from the seed and its place in the batch.

    An image is shrunk and enlarged again (smoothly or in squares), compressed as a poor JPEG, or both; or neither; and in half of the
    cases, and always where it was neither, gets noise.
    """
    return torch.stack(
        [_one(x, np.random.default_rng([seed, index])) for index, x in enumerate(images)]
    )


def _one(image: Tensor, rng: np.random.Generator) -> Tensor:
    kind = rng.integers(4)  # shrunk, compressed, both, neither
    if kind in (0, 2):
        shape = image.shape[1:]
        small = [max(1, round(side * rng.uniform(SMALLEST, LARGEST))) for side in shape]
        mode = "bicubic" if rng.random() < 0.5 else "nearest"
        image = F.interpolate(F.interpolate(image[None], small, mode="area"), shape, mode=mode)[0]
    if kind in (1, 2):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(WORST, BEST)))
        image = rgb_to_tensor(Image.open(file).convert("RGB")) / 255
    if kind == 3 or rng.random() < 0.5:
        noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
        image = image + noise * rng.uniform(LEAST_NOISE, MOST_NOISE)
    return image.clamp(0, 1)
