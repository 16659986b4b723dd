"""Images of any size: padded, cut into tiles that the tokenizer takes, and put together again.

A row of tiles is encoded or decoded at a time, so that memory hardly grows with the image. Codes of
all tiles are kept as one grid.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import require

BATCH = 64  # tiles at a time


@dataclass
class ImageCodes:
    """Codes of an image of any size."""

    codes: Tensor  # [k, N] int64, coarsest scale first, row-major over the tokens of the image
    size: tuple[int, int]  # height and width of the image, px
    token_grid: tuple[int, int]  # rows and columns of tokens, those of the padding included


def encode_image(tokenizer: SpectralTokenizer, image: Tensor) -> ImageCodes:
    """Encode an image [1, 3, H, W], float in [0, 1] or uint8, padded at the right and bottom."""
    is_pixels = image.dtype == torch.uint8 or image.is_floating_point()
    is_one = image.ndim == 4 and len(image) == 1 and image.numel() > 0 and is_pixels
    require(is_one, f"give one image [1, 3, H, W], not {image.dtype} {list(image.shape)}.")
    (H, W), g = image.shape[2:], tokenizer.config.grid_size
    side, strips = tile_side(tokenizer, (H, W)), []
    for strip in image.split(side, dim=2):
        padded = pad(as_float(strip), side)[0]  # [3, s, K s]
        tiles = torch.stack(padded.split(side, dim=2))  # [K, 3, s, s]
        codes = torch.cat([tokenizer.encode(batch) for batch in tiles.split(BATCH)])  # [K, k, g^2]
        strips.append(torch.cat([*codes.unflatten(2, (g, g))], dim=2))  # [k, g, K g]
    codes = torch.cat(strips, dim=1)  # [k, R g, K g]
    return ImageCodes(codes.flatten(1), (H, W), (codes.shape[1], codes.shape[2]))


def as_float(image: Tensor) -> Tensor:
    """uint8 pixels as floating point in [0, 1]; others as they are."""
    return image if image.is_floating_point() else image / 255


def decode_codes(
    tokenizer: SpectralTokenizer, image: ImageCodes, scales: int | None = None
) -> Tensor:
    """The image [1, 3, h, w] in [0, 1]; of `scales` of k, 1 / 2^(k - scales) of its sides."""
    return torch.cat([*decode_strips(tokenizer, image, scales)], dim=2)


def decode_strips(
    tokenizer: SpectralTokenizer, image: ImageCodes, scales: int | None = None
) -> Iterator[Tensor]:
    """The image of `decode_codes` from top to bottom, in strips [1, 3, s, w] of a row of tiles."""
    config, side = tokenizer.config, tile_side(tokenizer, image.size)
    grid = tuple(-(-pixels // side) * config.grid_size for pixels in image.size)
    num_scales = config.num_scales - (config.size // side).bit_length() + 1
    needed = (num_scales, math.prod(grid), *grid)
    if (given := (*image.codes.shape, *image.token_grid)) != needed:
        size = "x".join(map(str, image.size[::-1]))
        raise ValueError(f"scales, codes and grid of {size} px are {needed}, not {given}.")
    scales = num_scales if scales is None else scales
    height, width = (-(-pixels // 2 ** (num_scales - scales)) for pixels in image.size)
    for codes in image.codes.unflatten(1, grid).split(config.grid_size, dim=1):  # [k, g, K g]
        tiles = torch.stack(codes.split(config.grid_size, dim=2)).flatten(2)  # [K, k, g^2]
        tiles = torch.cat([tokenizer.decode(batch, scales) for batch in tiles.split(BATCH)])
        strip = torch.cat([*tiles], dim=2)[None, :, :height, :width]  # [1, 3, s, w]
        height -= strip.shape[2]
        yield strip


def tile_side(tokenizer: SpectralTokenizer, size: Sequence[int]) -> int:
    """Side in px of the tiles of an image of (H, W) px: the smallest that holds it, or the last."""
    sides = [side for side in tokenizer.sizes if side >= max(size)]
    return sides[0] if sides else tokenizer.sizes[-1]


def pad(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last pixels of images [B, C, H, W] at the right and bottom up to multiples."""
    H, W = images.shape[2:]
    return F.pad(images, (0, -W % multiple, 0, -H % multiple), mode="replicate")
