"""The codes of one image of any size, and files of them that know their tokenizer.

A file is safetensors: `codes` [k, N], and in the metadata the size of the image, the grid of tokens that the codes make, and the
tokenizer's name and digest. Codes mean something to the encoder and codebooks that made them and to nothing else.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from sitlib import __version__
from sitlib.cli.models import NamedTokenizer
from sitlib.files import read_metadata
from sitlib.model.tiling import pad, tile_codes, tile_images, unpad, untile_codes, untile_images
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import to_dict

BATCH = 64  # squares at a time: memory does not grow with the image


@dataclass
class ImageCodes:
    """The codes of an image of any size."""

    codes: (
        Tensor  # [k, N] int64, coarsest scale first, row-major over the tokens of the whole image
    )
    size: tuple[int, int]  # height and width of the image, px
    token_grid: tuple[int, int]  # rows and columns of tokens, those of the padding included


def square_side(tokenizer: SpectralTokenizer, size: tuple[int, int]) -> int:
    """Side in px of the squares that an image of `size` = (H, W) is cut into: the smallest that holds all of it, else the largest."""
    return next((side for side in tokenizer.sizes if side >= max(size)), tokenizer.sizes[-1])


def encode_image(tokenizer: SpectralTokenizer, image: Tensor) -> ImageCodes:
    """Codes of an image [1, 3, H, W] in [0, 1] of any size, padded at the right and at the bottom."""
    height, width = image.shape[2:]
    side, grid = square_side(tokenizer, (height, width)), tokenizer.config.grid_size
    padded, size = pad(image, side)
    squares, (rows, columns) = tile_images(padded, side)
    codes = torch.cat([tokenizer.encode(batch) for batch in squares.split(BATCH)])
    return ImageCodes(
        untile_codes(codes, rows, columns, grid)[0], size, (rows * grid, columns * grid)
    )


def decode_codes(
    tokenizer: SpectralTokenizer, coded: ImageCodes, scales: int | None = None
) -> Tensor:
    """The image [1, 3, H, W] in [0, 1] of codes; from the first `scales` of k scales, 1 / 2^(k - scales) of it (sides rounded up).

    Raises:
        ValueError: codes or a number of scales that this tokenizer cannot have produced.
    """
    codes, (rows, columns) = tile_codes(
        coded.codes[None], tokenizer.config.grid_size, coded.token_grid
    )
    squares = torch.cat([tokenizer.decode(batch, scales) for batch in codes.split(BATCH)])
    return unpad(untile_images(squares, rows, columns), smaller_size(coded, scales))


def reference(
    tokenizer: SpectralTokenizer, coded: ImageCodes, image: Tensor, scales: int
) -> Tensor:
    """What `decode_codes` of the first `scales` scales is to be compared with: the image [1, 3, H, W], averaged down to that size."""
    padded, _ = pad(image, square_side(tokenizer, coded.size))
    return unpad(
        F.avg_pool2d(padded, 2 ** (len(coded.codes) - scales)), smaller_size(coded, scales)
    )


def smaller_size(coded: ImageCodes, scales: int | None) -> tuple[int, int]:
    """Height and width of the image that the first `scales` scales give, px."""
    factor = 2 ** (len(coded.codes) - (scales or len(coded.codes)))
    return -(-coded.size[0] // factor), -(-coded.size[1] // factor)


def codes_digest(tokenizer: SpectralTokenizer) -> str:
    """16 hexadecimal digits that name what codes depend on: all but the decoder, so that a second decoder reads the same codes."""
    config = {
        key: value
        for key, value in to_dict(tokenizer.config).items()
        if not key.startswith("decoder_")
    }
    state = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name.split(".")[0] not in ("post_quant", "decoder", "unembed"):
            state.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def codes_file(coded: ImageCodes, tokenizer: NamedTokenizer, image: str) -> bytes:
    """The content of a codes file.

    Args:
        image: name of the image's file.
    """
    small = torch.int16 if tokenizer.model.config.num_codes <= 2**15 else torch.int32
    about = {
        "class": "Codes",
        "image": image,
        "size": coded.size,
        "token_grid": coded.token_grid,
        "tokenizer": {
            "name": tokenizer.name,
            "run": tokenizer.run,
            "codes": codes_digest(tokenizer.model),
        },
        "sitlib": __version__,
    }
    codes = coded.codes.cpu().to(small).contiguous()
    return save({"codes": codes}, metadata={"about": json.dumps(about, sort_keys=True)})


def read_codes(path: Path) -> tuple[ImageCodes, dict[str, Any]]:
    """Codes in a file of `codes_file`, and what it says of their tokenizer: `name`, `run`, `codes`.

    Raises:
        ValueError: the file is damaged or is no codes file.
    """
    if not path.is_file():
        raise ValueError("there is no such file")
    about = read_metadata(path.absolute())
    if about.get("class") != "Codes":
        found = about.get("class", "something else")
        raise ValueError(f"it holds {found}, not codes: give a file that sit encode wrote")
    height, width = about["size"]
    rows, columns = about["token_grid"]
    return ImageCodes(load_file(path)["codes"].long(), (height, width), (rows, columns)), about[
        "tokenizer"
    ]


def check_tokenizer(tokenizer: NamedTokenizer, wanted: dict[str, Any]) -> None:
    """Refuses codes of another tokenizer.

    Args:
        wanted: what the codes file says of its tokenizer.

    Raises:
        ValueError: other weights made these codes.
    """
    if codes_digest(tokenizer.model) == wanted["codes"]:
        return
    if wanted["name"] == tokenizer.name:
        raise ValueError(
            f"its codes are of {wanted['name']} as it was before it was trained anew: encode the image again, or give the checkpoint "
            "that made them with --tokenizer"
        )
    raise ValueError(
        f"its codes are of {wanted['name']}, which {tokenizer.name} cannot decode: give that one with --tokenizer"
    )
