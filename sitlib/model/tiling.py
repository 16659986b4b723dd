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

BATCH = 64  # tiles at a time


@dataclass
class ImageCodes:
    """Codes of an image of any size."""

    codes: Tensor  # [k, N] int64, coarsest scale first, row-major over the tokens of the image
    size: tuple[int, int]  # height and width of the image, px
    token_grid: tuple[int, int]  # rows and columns of tokens, those of the padding included

    def size_at(self, scales: int) -> tuple[int, int]:
        """Height and width in px of the image of the first `scales` scales."""
        factor = 2 ** (len(self.codes) - scales)
        return -(-self.size[0] // factor), -(-self.size[1] // factor)


def encode_image(tokenizer: SpectralTokenizer, image: Tensor) -> ImageCodes:
    """Encode an image [1, 3, H, W], float in [0, 1] or uint8, of any size.

    It is padded at the right and the bottom.
    """
    side, grid_size = tile_side(tokenizer, image.shape[2:]), tokenizer.config.grid_size
    (H, W), strips = image.shape[2:], []
    columns = -(-W // side)
    for strip in image.split(side, dim=2):
        tiles, _ = tile_images(pad(as_float(strip), side)[0], side)
        codes = torch.cat([tokenizer.encode(batch) for batch in tiles.split(BATCH)])  # [K, k, g^2]
        strips.append(untile_codes(codes, 1, columns, grid_size)[0])
    grid = (len(strips) * grid_size, columns * grid_size)
    return ImageCodes(torch.cat(strips, dim=1), (H, W), grid)


def as_float(image: Tensor) -> Tensor:
    """uint8 pixels as floating point in [0, 1]; others as they are."""
    return image if image.is_floating_point() else image / 255


def decode_codes(
    tokenizer: SpectralTokenizer, image: ImageCodes, scales: int | None = None
) -> Tensor:
    """Decode an image [1, 3, h, w] in [0, 1]; from the first scales alone, a smaller one.

    With `scales` of k scales its sides are 1 / 2^(k - scales) of the whole image's, rounded up.

    Raises:
        ValueError: codes or a number of scales that this tokenizer cannot have produced.
    """
    return torch.cat([*decode_strips(tokenizer, image, scales)], dim=2)


def decode_strips(
    tokenizer: SpectralTokenizer, image: ImageCodes, scales: int | None = None
) -> Iterator[Tensor]:
    """The image of `decode_codes` from top to bottom, in strips [1, 3, s, w] of a row of tiles."""
    config, side = tokenizer.config, tile_side(tokenizer, image.size)
    grid = tuple(-(-pixels // side) * config.grid_size for pixels in image.size)
    num_scales = config.num_scales - (config.size // side).bit_length() + 1
    if (*image.codes.shape,) != (num_scales, math.prod(grid)) or image.token_grid != grid:
        raise ValueError(
            f"an image of {image.size[1]}x{image.size[0]} px has codes [{num_scales}, "
            f"{math.prod(grid)}] on a grid {grid}, these are {list(image.codes.shape)} on "
            f"{image.token_grid}."
        )
    scales = len(image.codes) if scales is None else scales
    height, width = image.size_at(scales)
    for codes in image.codes[None].split(config.grid_size * grid[1], dim=2):
        tiles, (_, columns) = tile_codes(codes, config.grid_size, (config.grid_size, grid[1]))
        tiles = torch.cat([tokenizer.decode(batch, scales) for batch in tiles.split(BATCH)])
        strip = untile_images(tiles, 1, columns)[:, :, :height, :width]
        height -= strip.shape[2]
        yield strip


def tile_side(tokenizer: SpectralTokenizer, size: Sequence[int]) -> int:
    """Side in px of the tiles of an image of (H, W) px: the smallest that holds it, or the largest."""
    sides = [side for side in tokenizer.sizes if side >= max(size)]
    return sides[0] if sides else tokenizer.sizes[-1]


def tile_images(images: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """[B, C, R side, K side] -> tiles [B R K, C, side, side], and (R, K)."""
    B, C, H, W = images.shape
    R, K = H // side, W // side
    x = images.reshape(B, C, R, side, K, side).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B * R * K, C, side, side), (R, K)


def untile_images(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Tiles [B R K, C, side, side] -> [B, C, R side, K side]."""
    BRK, C, side, _ = tiles.shape
    B = BRK // (rows * columns)
    x = tiles.reshape(B, rows, columns, C, side, side).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C, rows * side, columns * side)


def tile_codes(
    codes: Tensor, grid_size: int, token_grid: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Codes [B, k, N] of images of (rows, columns) tokens -> those of tiles [B R K, k, g^2], (R,
    K).
    """
    tiles, tile_grid = tile_images(codes.unflatten(2, token_grid), grid_size)
    return tiles.flatten(2), tile_grid


def untile_codes(codes: Tensor, rows: int, columns: int, grid_size: int) -> Tensor:
    """Codes of tiles [B R K, k, g^2] -> [B, k, R K g^2], row-major over the whole image."""
    maps = codes.unflatten(2, (grid_size, grid_size))
    return untile_images(maps, rows, columns).flatten(2)


def pad(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Repeat the last pixels of images [B, C, H, W] at the right and bottom up to multiples.

    Returns:
        The padded images, and (H, W) for `unpad`.
    """
    if images.ndim != 4 or multiple < 1 or 0 in images.shape[2:]:
        raise ValueError(f"pad takes images [B, C, H, W], not {list(images.shape)}.")
    H, W = images.shape[2:]
    return F.pad(images, (0, -W % multiple, 0, -H % multiple), mode="replicate"), (H, W)


def unpad(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The first `size` = (H, W) px of padded images."""
    return images[:, :, : size[0], : size[1]]
