"""`.sit`: an image file whose every prefix is the image at a smaller size.

It holds the codes of a tokenizer, scale after scale, coded by their frequencies in training. All
numbers are big-endian:

    3 bytes     "SIT"
    1           version of the format
    4           tokenizer: the first bytes of `codes_digest`
    2, 2        height and width, px
    1 to 5      bytes of the payload, LEB128
    2 a scale   checksum of its codes; the first one's also of all fields above
    payload     one range-coded stream of all codes (constriction), scale after scale

Probabilities are quotients of integers, so all machines agree on them. A file that was cut off has
its whole scales left: those whose checksums hold when what is missing reads as zeros.
"""

import struct
import zlib
from collections.abc import Iterable
from typing import Any, cast

import constriction
import numpy as np
import torch

from sitlib.model.tiling import ImageCodes, Tiles
from sitlib.model.tokenizer import SpectralTokenizer, codes_digest
from sitlib.strict import require

coder = cast(Any, constriction).stream
MAGIC, VERSION = b"SIT", 1
FIELDS = struct.Struct(">3sB4sHH")
LARGEST = 2**16 - 1  # px of a side


def compress(tokenizer: SpectralTokenizer, image: ImageCodes) -> bytes:
    """The file of an image's codes, of all scales; ValueError for codes of another tokenizer."""
    H, W = image.size
    require(max(H, W) <= LARGEST, f"a side of {max(H, W)} px is more than {LARGEST}.")
    tiles = Tiles.of(tokenizer, image.size)
    shape = tiles.num_scales, tiles.rows * tiles.columns * tokenizer.config.tokens_per_scale
    require(tuple(image.codes.shape) == shape, f"codes of {W}x{H} px are {list(shape)}.")
    codes_by_scale = image.codes.cpu().int().numpy()
    payload = _payload(tokenizer, codes_by_scale)
    fields = FIELDS.pack(MAGIC, VERSION, _name(tokenizer), H, W) + _leb128(len(payload))
    sums = [
        _checksum(codes, b"" if scale else fields) for scale, codes in enumerate(codes_by_scale)
    ]
    return fields + struct.pack(f">{len(sums)}H", *sums) + payload


def decompress(tokenizer: SpectralTokenizer, data: bytes) -> tuple[ImageCodes, bool]:
    """Codes of the scales that are whole in a file, and whether these are all.

    Raises ValueError for something else than such a file, one of another version or tokenizer, and
    one that is damaged or has no whole scale.
    """
    require(data[:3] == MAGIC, "this is no .sit file.")
    require(len(data) > FIELDS.size, "this .sit file ends in its header.")
    _, version, name, H, W = FIELDS.unpack_from(data)
    require(version == VERSION, f"it is of version {version} of the format, this reads {VERSION}.")
    other = "it was written with another tokenizer: give that one"
    require(name == _name(tokenizer), f"{other} (its codes are {name.hex()}...).")
    damaged = "this .sit file is damaged"
    require(min(H, W) > 0, f"{damaged}: {W}x{H} px.")
    length, end = _read_leb128(data, FIELDS.size)
    fields, tiles = data[:end], Tiles.of(tokenizer, (H, W))
    start = end + 2 * tiles.num_scales
    require(len(data) > start, "this .sit file ends in its header.")
    sums, payload = struct.unpack_from(f">{tiles.num_scales}H", data, end), data[start:]
    require(len(payload) <= length, f"{damaged}: it has {len(payload) - length} bytes too many.")
    is_cut = len(payload) < length

    # No code takes less than the likeliest, so an enormous size needs an enormous file.
    count = tiles.rows * tiles.columns * tokenizer.config.tokens_per_scale
    p = probabilities(tokenizer)[: tiles.num_scales]
    least = count * sum(-np.log2(scale.max()) for scale in p) / 8
    require(least <= length + 8, f"{damaged}: {length} bytes are too few for {W}x{H} px.")
    padded = payload + bytes(-len(payload) % 4 + 16)
    decoder, scales = coder.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32)), []
    for scale, (model, checksum) in enumerate(zip(_models(tokenizer), sums, strict=False)):
        try:
            codes = decoder.decode(model, count)
        except AssertionError:  # what no encoder writes
            break
        if _checksum(codes, b"" if scale else fields) != checksum:
            break
        scales.append(codes)
    is_whole = len(scales) == tiles.num_scales
    require(is_whole or is_cut, f"{damaged}: the checksum of scale {len(scales) + 1} is wrong.")
    is_as_written = is_cut or _payload(tokenizer, scales) == payload  # the last bits mean nothing
    require(is_as_written, f"{damaged} in its last bytes.")
    require(bool(scales), "this .sit file is cut off in its first scale, and nothing can be shown.")
    g = tokenizer.config.grid_size
    codes = torch.from_numpy(np.stack(scales)).long()
    return ImageCodes(codes, (H, W), (tiles.rows * g, tiles.columns * g)), is_whole


def probabilities(tokenizer: SpectralTokenizer) -> list[np.ndarray]:
    """Probability of every code of each scale, float32 [K_s]: counts in training, and one more."""
    counts, sizes = tokenizer.code_counts.cpu().numpy(), tokenizer.config.codebook_sizes
    smoothed = [row[:K].astype(np.float64) + 1 for row, K in zip(counts, sizes, strict=True)]
    return [(row / row.sum()).astype(np.float32) for row in smoothed]


def _models(tokenizer: SpectralTokenizer) -> list[Any]:
    """Fixed-point probabilities of each scale, as the coder takes them."""
    return [coder.model.Categorical(p, perfect=False) for p in probabilities(tokenizer)]


def _payload(tokenizer: SpectralTokenizer, codes_by_scale: Iterable[np.ndarray]) -> bytes:
    encoder = coder.queue.RangeEncoder()
    for codes, model in zip(codes_by_scale, _models(tokenizer), strict=False):
        encoder.encode(codes, model)
    return encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")


def _name(tokenizer: SpectralTokenizer) -> bytes:
    return bytes.fromhex(codes_digest(tokenizer))[:4]


def _checksum(codes: np.ndarray, fields: bytes) -> int:
    return zlib.crc32(fields + codes.astype(">u4").tobytes()) & 0xFFFF


def _leb128(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _leb128(rest) if rest else bytes([low])


def _read_leb128(data: bytes, start: int) -> tuple[int, int]:
    """A number of at most five bytes, and where it ends."""
    number = 0
    for place, byte in enumerate(data[start : start + 5]):
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number, start + place + 1
    raise ValueError("this .sit file is damaged, or ends in its header.")
