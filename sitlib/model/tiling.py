"""Images larger than a tokenizer's square, and of any shape: cut into squares, and put together again; padded, and unpadded.

A tokenizer knows squares of one side. A larger image is a batch of squares to it, so that a long panorama costs what its squares cost and
is encoded as well as they are. Codes of all squares are kept as one grid, row-major over the whole image.
"""

import torch.nn.functional as F
from torch import Tensor


def tile_images(images: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """[B, C, R side, K side] -> squares [B R K, C, side, side], and (R, K)."""
    rows, columns = images.shape[2] // side, images.shape[3] // side
    x = images.unflatten(3, (columns, side)).unflatten(2, (rows, side))  # [B, C, R, side, K, side]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2), (rows, columns)


def untile_images(squares: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `tile_images`."""
    x = squares.unflatten(0, (len(squares) // (rows * columns), rows, columns)).permute(
        0, 3, 1, 4, 2, 5
    )  # [B, C, R, side, K, side]
    return x.flatten(4, 5).flatten(2, 3)


def untile_codes(codes: Tensor, rows: int, columns: int, grid: int) -> Tensor:
    """Codes [B R K, k, grid^2] of squares -> [B, k, R K grid^2], row-major over the tokens of the whole image."""
    batch = len(codes) // (rows * columns)
    x = codes.unflatten(2, (grid, grid)).unflatten(
        0, (batch, rows, columns)
    )  # [B, R, K, k, grid, grid]
    return x.permute(0, 3, 1, 4, 2, 5).flatten(2)


def tile_codes(
    codes: Tensor, grid: int, token_grid: tuple[int, int] | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Inverse of `untile_codes`: codes [B, k, N] -> those of squares [B R K, k, grid^2], and (R, K).

    Args:
        grid: tokens per side of a square.
        token_grid: rows and columns of tokens in the whole image; those of one square by default.

    Raises:
        ValueError: N codes do not make such a grid.
    """
    num_tokens = codes.shape[2]
    if token_grid is None:
        if (
            num_tokens != grid**2
        ):  # even where N is a square number: a wide image would come back scrambled
            raise ValueError(
                f"{num_tokens} codes a scale are of an image of several squares: say how many rows and columns of tokens it has, "
                f"decode(codes, token_grid=(rows, columns)), multiples of {grid}."
            )
        token_grid = (grid, grid)
    if len(token_grid) != 2:
        raise ValueError(f"token_grid is (rows, columns) of tokens, not {token_grid}.")
    height, width = token_grid
    if height * width != num_tokens or min(height, width) < 1 or height % grid or width % grid:
        raise ValueError(
            f"token_grid {height} x {width} does not fit {num_tokens} codes a scale: its sides are multiples of {grid} and their "
            "product is the number of codes."
        )
    rows, columns = height // grid, width // grid
    x = codes.unflatten(2, (rows, grid, columns, grid))  # [B, k, R, grid, K, grid]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(4, 5).flatten(0, 2), (rows, columns)


def pad(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Images [B, C, H, W] enlarged at the right and at the bottom, by repeating their last pixels, to sides that are multiples.

    Returns:
        The enlarged images, and (H, W) for `unpad`.
    """
    if images.ndim != 4:
        raise ValueError(f"pad takes images [B, C, H, W], not {list(images.shape)}.")
    height, width = images.shape[2:]
    if multiple < 1 or height < 1 or width < 1:
        raise ValueError(
            f"an image of {height} x {width} px cannot be padded to multiples of {multiple}."
        )
    padded = F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    return padded, (height, width)


def unpad(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The first `size` = (H, W) px of padded images [B, C, ., .]."""
    return images[:, :, : size[0], : size[1]]
