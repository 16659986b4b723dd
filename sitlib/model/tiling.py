"""Images of any size: padded, cut into tiles that the tokenizer takes, and put together again.

Neighboring tiles share a token, over whose pixels one fades into the other, so that no seam shows;
of grids below 8 tokens a side they share none, as that would be many. A row of tiles is encoded or
decoded at a time, so that memory hardly grows with the image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import require

BATCH = 8  # tiles at a time: of 256 px, 100 MB in the widest layer
SMALLEST_GRID = 8  # tokens per side of tiles that share one


@dataclass
class ImageCodes:
    """Codes of an image of any size."""

    codes: Tensor  # [k, N] int64, coarsest scale first, row-major over the tokens of all tiles
    size: tuple[int, int]  # height and width of the image, px
    token_grid: tuple[int, int]  # rows and columns of tokens: those of tiles side by side


@dataclass(frozen=True)
class Tiles:
    """Squares that cover an image."""

    side: int  # px
    shared: int  # px that neighbors share
    rows: int
    columns: int
    num_scales: int  # of each tile

    @classmethod
    def of(cls, tokenizer: SpectralTokenizer, size: Sequence[int]) -> "Tiles":
        """Of an image of (H, W) px: one of the smallest side that holds it, or several."""
        sides = [side for side in tokenizer.sizes if side >= max(size)]
        side, grid = sides[0] if sides else tokenizer.sizes[-1], tokenizer.config.grid_size
        shared = side // grid if grid >= SMALLEST_GRID else 0
        rows, columns = (1 + max(0, -(-(px - side) // (side - shared))) for px in size)
        num_scales = tokenizer.config.num_scales - (tokenizer.config.size // side).bit_length() + 1
        return cls(side, shared, rows, columns, num_scales)

    @property
    def step(self) -> int:
        """Px from one tile to the next."""
        return self.side - self.shared


def encode_image(tokenizer: SpectralTokenizer, image: Tensor) -> ImageCodes:
    """Encode an image [1, 3, H, W], float in [0, 1] or uint8, padded at the right and bottom."""
    is_pixels = image.dtype == torch.uint8 or image.is_floating_point()
    is_one = image.ndim == 4 and len(image) == 1 and image.numel() > 0 and is_pixels
    require(is_one, f"give one image [1, 3, H, W], not {image.dtype} {list(image.shape)}.")
    (H, W), g, strips = image.shape[2:], tokenizer.config.grid_size, []
    tiles = Tiles.of(tokenizer, (H, W))
    for top in range(0, tiles.rows * tiles.step, tiles.step):
        strip = as_float(image[:, :, top : top + tiles.side])
        right = (tiles.columns - 1) * tiles.step + tiles.side - W
        strip = F.pad(strip, (0, right, 0, tiles.side - strip.shape[2]), mode="replicate")
        squares = strip[0].unfold(2, tiles.side, tiles.step).movedim(2, 0)  # [K, 3, s, s]
        codes = torch.cat([tokenizer.encode(batch) for batch in squares.split(BATCH)])  # [K, k, N]
        strips.append(torch.cat([*codes.unflatten(2, (g, g))], dim=2))  # [k, g, K g]
    codes = torch.cat(strips, dim=1)  # [k, R g, K g]
    return ImageCodes(codes.flatten(1), (H, W), (codes.shape[1], codes.shape[2]))


def as_float(image: Tensor) -> Tensor:
    """uint8 pixels as floating point in [0, 1]; others as they are."""
    return image if image.is_floating_point() else image / 255


def decode_codes(
    tokenizer: SpectralTokenizer, image: ImageCodes, scales: int | None = None
) -> Tensor:
    """The image [1, 3, h, w] in [0, 1]; of `scales` of S, 1 / 2^(S - scales) of its sides.

    Codes may be of the first scales alone; `scales` are by default those that there are.
    """
    return torch.cat([*decode_strips(tokenizer, image, scales)], dim=2)


def decode_strips(
    tokenizer: SpectralTokenizer, image: ImageCodes, scales: int | None = None
) -> Iterator[Tensor]:
    """The image of `decode_codes` from top to bottom, in strips [1, 3, s, w] of a row of tiles."""
    g, tiles, available = (
        tokenizer.config.grid_size,
        Tiles.of(tokenizer, image.size),
        len(image.codes),
    )
    grid = tiles.rows * g, tiles.columns * g
    needed = (grid[0] * grid[1], *grid)
    given = (image.codes.shape[1], *image.token_grid)
    if given != needed or not 1 <= available <= tiles.num_scales:
        size, about = "x".join(map(str, image.size[::-1])), (available, *given)
        needed = f"1 ... {tiles.num_scales}, {needed}"
        raise ValueError(f"scales, codes and grid of {size} px are {needed}, not {about}.")
    scales = available if scales is None else scales
    factor = 2 ** (tiles.num_scales - scales)
    height, width = (-(-pixels // factor) for pixels in image.size)
    shared, above = tiles.shared // factor, None
    for row, codes in enumerate(image.codes.unflatten(1, grid).split(g, dim=1), 1):  # [k, g, K g]
        squares = torch.stack(codes.split(g, dim=2)).flatten(2)  # [K, k, N]
        squares = torch.cat([tokenizer.decode(batch, scales) for batch in squares.split(BATCH)])
        pieces = [squares[:1]]
        for square in squares[1:]:  # of what stands, only the last square's edge changes
            done = pieces[-1].shape[3] - shared
            pair = faded(pieces[-1], square[None], shared, dim=3)
            pieces[-1:] = pair.split([done, pair.shape[3] - done], dim=3)
        strip = torch.cat(pieces, dim=3)
        strip = strip if above is None else faded(above, strip, shared, dim=2)
        if shared and row < tiles.rows:  # the last rows are shared with the next strip
            strip, above = strip[:, :, :-shared], strip[:, :, -shared:]
        strip = strip[:, :, :height, :width]
        height -= strip.shape[2]
        yield strip


def faded(first: Tensor, second: Tensor, shared: int, dim: int) -> Tensor:
    """Two images [1, 3, h, w] side by side, of whose pixels so many are of one place."""
    if not shared:
        return torch.cat([first, second], dim)
    share = (torch.arange(shared, device=first.device) + 0.5) / shared
    share = share if dim == 3 else share[:, None]
    ends = first.narrow(dim, first.shape[dim] - shared, shared), second.narrow(dim, 0, shared)
    rest = second.narrow(dim, shared, second.shape[dim] - shared)
    before = first.narrow(dim, 0, first.shape[dim] - shared)
    return torch.cat([before, torch.lerp(*ends, share.to(first)), rest], dim)


def pad(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last pixels of images [B, C, H, W] at the right and bottom up to multiples."""
    H, W = images.shape[2:]
    return F.pad(images, (0, -W % multiple, 0, -H % multiple), mode="replicate")
