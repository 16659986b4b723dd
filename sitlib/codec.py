"""`.sit`: an image file that, cut off after any scale, is the image at a smaller size.

It holds the codes of a tokenizer, scale after scale, coded in the shortest of three ways: by their
frequencies in training, by what a `Prior` expects of them, or as if all were equally frequent.
All numbers are big-endian:

    3 bytes     "SIT"
    1           version of the format: 3 with frequencies, 4 with a prior, 5 with neither
    4           tokenizer: the first bytes of `codes_digest`; with a prior, of a hash of both
    2, 2        height and width, px
    1 to 5      bytes of the payload, LEB128
    2 a scale   the last bytes of the CRC-32 of all fields above and all codes up to this scale's
    payload     one range-coded stream of all codes (constriction), scale after scale

Probabilities are quotients of integers (`sitlib.prior` says how those of a prior are got), so all
machines agree on them. A file that was cut off has its whole scales left: those whose codes are the
same whether what is missing reads as zeros or as ones. Damage is told, but for a chance of 2^-16 if
it begins in the last of these, of 2^-32 in the one before, and so on: then the picture is wrong.
"""

import hashlib
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, cast

import constriction
import numpy as np
import torch

from sitlib.model.tiling import ImageCodes, Tiles
from sitlib.model.tokenizer import SpectralTokenizer, are_integers, check_codes, codes_digest
from sitlib.prior import MARGIN, Prior, TooClose, least_bits
from sitlib.sample.applications import check_same_codes
from sitlib.strict import require

coder = cast(Any, constriction).stream
MAGIC, FREQUENCIES, WITH_PRIOR, UNIFORM = b"SIT", 3, 4, 5
FIELDS = struct.Struct(">3sB4sHH")
LARGEST = 2**16 - 1  # px of a side
MOST_PIXELS = 2 * 89_478_485  # of an image: what Pillow reads
MOST_BYTES = 2**24  # of a file that `sit decompress` reads: 0.75 bits for each of so many pixels
Law = tuple[Any, ...]  # what the coder takes: one distribution, or a family and its parameters
Expected = list[np.ndarray] | Prior  # probabilities of each scale's codes, or what gives them


def compress(tokenizer: SpectralTokenizer, image: ImageCodes, prior: Prior | None = None) -> bytes:
    """The file of an image's codes, of all scales; ValueError for codes of another tokenizer.

    With a prior, if that makes it shorter and all machines can read it.
    """
    H, W = image.size
    check_size(image.size)
    tiles = Tiles.of(tokenizer, image.size)
    shape = tiles.num_scales, tiles.rows * tiles.columns * tokenizer.config.tokens_per_scale
    is_fit = tuple(image.codes.shape) == shape and are_integers(image.codes)
    require(is_fit, f"codes of {W}x{H} px are integers {list(shape)}.")
    check_codes(image.codes[None], tokenizer.config.codebook_sizes)
    codes = image.codes.cpu().int().numpy()
    versions = {version: _expected(tokenizer, version, None) for version in (FREQUENCIES, UNIFORM)}
    payloads = [(_payload(tokenizer, codes, p), version) for version, p in versions.items()]
    payload, version = min(payloads, key=lambda pair: len(pair[0]))
    if prior is not None:
        check_same_codes(prior.model, tokenizer)
        by_tile = codes[:, _by_tile(tokenizer, tiles)]
        try:
            shorter = _payload(tokenizer, by_tile, prior)
        except TooClose:
            shorter = payload
        if len(shorter) < len(payload):
            payload, version, codes = shorter, WITH_PRIOR, by_tile
    name = _name(tokenizer, prior if version == WITH_PRIOR else None)
    fields = FIELDS.pack(MAGIC, version, name, H, W) + _leb128(len(payload))
    sums = [crc & 0xFFFF for crc in accumulate(codes, _checksum, initial=zlib.crc32(fields))][1:]
    return fields + struct.pack(f">{len(sums)}H", *sums) + payload


def check_size(size: Sequence[int]) -> None:
    """Raise ValueError for an image of (H, W) px that no file can have."""
    most = f"a .sit file has 1 to {LARGEST} px a side and at most {MOST_PIXELS} in all"
    H, W = size
    is_possible = min(size) >= 1 and max(size) <= LARGEST and H * W <= MOST_PIXELS
    require(is_possible, f"{most}, not {W}x{H}.")


def has_prior(data: bytes) -> bool:
    """True for a file that only its prior can read."""
    return data[3:4] == bytes([WITH_PRIOR])


def decompress(
    tokenizer: SpectralTokenizer, data: bytes, prior: Prior | None = None
) -> tuple[ImageCodes, bool]:
    """Codes of the scales that are whole in a file, and whether these are all.

    A file without a prior needs none. Raises ValueError for something else than such a file, one of
    another version, tokenizer or prior, and one that is damaged or has no whole scale.
    """
    require(data[:3] == MAGIC, "this is no .sit file.")
    require(len(data) > FIELDS.size, "this .sit file ends in its header.")
    _, version, name, H, W = FIELDS.unpack_from(data)
    sentence = f"this .sit file is of version {version} of the format, and this reads "
    require(FREQUENCIES <= version <= UNIFORM, f"{sentence}{FREQUENCIES} to {UNIFORM}.")
    if version != WITH_PRIOR:
        prior = None
    else:
        require(prior is not None, "this .sit file was written with a prior: give the same one.")
        check_same_codes(cast(Prior, prior).model, tokenizer)
    which = " or prior: give the same" if prior else f": give that one (digest {name.hex()}...)"
    other = f"this .sit file was written with another tokenizer{which}."
    require(name == _name(tokenizer, prior), other)
    damaged = "this .sit file is damaged"
    check_size((H, W))
    length, end = _read_leb128(data, FIELDS.size)
    fields, tiles = data[:end], Tiles.of(tokenizer, (H, W))
    start = end + 2 * tiles.num_scales
    require(len(data) >= start, "this .sit file ends in its header.")
    sums, payload = struct.unpack_from(f">{tiles.num_scales}H", data, end), data[start:]
    require(len(payload) <= length, f"{damaged}: it has {len(payload) - length} bytes too many.")
    is_cut = len(payload) < length

    # No code takes less than the likeliest, so enormous sizes need enormous files, and scales that
    # the bytes cannot pay for are not tried.
    count = tiles.rows * tiles.columns * tokenizer.config.tokens_per_scale
    expected = _expected(tokenizer, version, prior)
    bits = [least_bits(K) for K in tokenizer.config.codebook_sizes]
    if not isinstance(expected, Prior):  # whose probabilities the coder rounds
        bits = [-0.99 * np.log2(p.max()) for p in expected]
    least = count * np.cumsum(bits[: tiles.num_scales]) / 8 - 8  # bytes
    require(least[-1] <= length, f"{damaged}: {length} bytes are too few for {W}x{H} px.")
    decoders = [_decoder(payload, missing) for missing in (b"\0", b"\xff")[: 1 + is_cut]]
    encoder, scales = coder.queue.RangeEncoder(), list[np.ndarray]()
    crc = zlib.crc32(fields)
    for scale, checksum in enumerate(sums):
        codes = None
        if least[scale] <= len(payload):
            most = len(payload) + 8  # bytes that codes may take, for those at hand cannot say more
            codes = _read_scale(tokenizer, expected, scales, count, decoders, encoder, most)
        if codes is None:
            break
        crc = _checksum(crc, codes)
        wrong = f"{damaged}: the checksum of scale {scale + 1} is wrong."
        require(crc & 0xFFFF == checksum, wrong)
        scales.append(codes)
    is_whole = len(scales) == tiles.num_scales
    require(is_whole or is_cut, f"{damaged} in scale {len(scales) + 1}.")
    require(bool(scales), "this .sit file is cut off in its first scale, and nothing can be shown.")
    require(is_cut or _bytes_of(encoder) == payload, f"{damaged} in its last bytes.")
    codes, g = np.stack(scales), tokenizer.config.grid_size
    if prior is not None:
        codes = codes[:, _by_tile(tokenizer, tiles).argsort()]
    grid = tiles.rows * g, tiles.columns * g
    return ImageCodes(torch.from_numpy(codes).long(), (H, W), grid), is_whole


def ends_of_scales(
    tokenizer: SpectralTokenizer, data: bytes, prior: Prior | None = None
) -> list[int]:
    """With how many bytes of a file its first 1, 2, ... scales are whole; raises as `decompress`."""

    def whole(end: int) -> int:
        try:
            return len(decompress(tokenizer, data[:end], prior)[0].codes)
        except ValueError:
            return 0

    places, count = range(len(data) + 1), len(decompress(tokenizer, data, prior)[0].codes)
    return [bisect_left(places, scales, key=whole) for scales in range(1, count + 1)]


def probabilities(tokenizer: SpectralTokenizer) -> list[np.ndarray]:
    """Probability of every code of each scale, float32 [K_s]: counts in training, and one more."""
    counts, sizes = tokenizer.code_counts.cpu().numpy(), tokenizer.config.codebook_sizes
    smoothed = [row[:K].astype(np.float64) + 1 for row, K in zip(counts, sizes, strict=True)]
    return [(row / row.sum()).astype(np.float32) for row in smoothed]


def _expected(tokenizer: SpectralTokenizer, version: int, prior: Prior | None) -> Expected:
    """What a file of this version expects of its codes."""
    if version == UNIFORM:
        return [np.full(K, 1 / K, np.float32) for K in tokenizer.config.codebook_sizes]
    return prior or probabilities(tokenizer)


def _laws(
    tokenizer: SpectralTokenizer,
    expected: Expected,
    coarser: Sequence[np.ndarray] | np.ndarray,
    count: int,
    margin: float = 0.0,
) -> Iterator[tuple[int, Law]]:
    """How `count` codes of the next scale are coded, part after part: so many codes, by this law."""
    if not isinstance(expected, Prior):
        yield count, (coder.model.Categorical(expected[len(coarser)], perfect=False),)
        return
    n = tokenizer.config.tokens_per_scale
    given = np.array(coarser, np.int64).reshape(len(coarser), count // n, n)
    for p in expected.laws(given, margin):
        yield n, (coder.model.Categorical(perfect=False), p)


def _payload(tokenizer: SpectralTokenizer, codes: np.ndarray, expected: Expected) -> bytes:
    """The coded bytes of codes [k, M N]; `TooClose` where a prior is not sure of every reader."""
    encoder = coder.queue.RangeEncoder()
    for scale, of_scale in enumerate(codes):
        start = 0
        for count, law in _laws(tokenizer, expected, codes[:scale], len(of_scale), MARGIN):
            encoder.encode(of_scale[start : start + count], *law)
            start += count
    return _bytes_of(encoder)


def _read_scale(
    tokenizer: SpectralTokenizer,
    expected: Expected,
    coarser: list[np.ndarray],
    count: int,
    decoders: list[Any],
    encoder: Any,
    most: int,
) -> np.ndarray | None:
    """`count` codes of the next scale, encoded again beside it; None if the decoders differ, or all
    codes so far take more than `most` bytes.
    """
    parts = []
    with suppress(TooClose):  # of a prior that has written no file
        for number, law in _laws(tokenizer, expected, coarser, count):
            amount = () if len(law) > 1 else (number,)
            try:
                codes, *others = (decoder.decode(*law, *amount) for decoder in decoders)
            except AssertionError:  # bytes that no encoder writes
                return None
            if any(not np.array_equal(codes, other) for other in others):
                return None
            encoder.encode(codes, *law)
            if 4 * encoder.num_words() > most:
                return None
            parts.append(codes)
        return np.concatenate(parts)
    return None


def _decoder(payload: bytes, missing: bytes) -> Any:
    """A decoder of bytes that go on as zeros, or as `missing` ones where the file was cut off."""
    padded = payload + missing * (-len(payload) % 4 + 16)
    return coder.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))


def _bytes_of(encoder: Any) -> bytes:
    """The words of an encoder as bytes, without zeros in which the last word ends."""
    words = encoder.get_compressed().astype(">u4").tobytes()
    return words[: max(len(words.rstrip(b"\0")), len(words) - 3)]


def _by_tile(tokenizer: SpectralTokenizer, tiles: Tiles) -> np.ndarray:
    """Where the codes of one tile after the other stand in rows over the whole image."""
    g = tokenizer.config.grid_size
    places = np.arange(tiles.rows * tiles.columns * g * g)
    return places.reshape(tiles.rows, g, tiles.columns, g).swapaxes(1, 2).ravel()


def _name(tokenizer: SpectralTokenizer, prior: Prior | None) -> bytes:
    name = bytes.fromhex(codes_digest(tokenizer))
    return name[:4] if prior is None else hashlib.sha256(name + prior.digest).digest()[:4]


def _checksum(before: int, codes: np.ndarray) -> int:
    return zlib.crc32(codes.astype(">u4").tobytes(), before)


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
