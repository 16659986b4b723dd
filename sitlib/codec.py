"""`.sit`: an image file whose every prefix is the image at a smaller size.

It holds the codes of a tokenizer, scale after scale, coded by their frequencies in training, or by
what a `Prior` expects of them. All numbers are big-endian:

    3 bytes     "SIT"
    1           version of the format: 1, or 2 with a prior
    4           tokenizer: the first bytes of `codes_digest`; with a prior, of a hash of both
    2, 2        height and width, px
    1 to 5      bytes of the payload, LEB128
    2 a scale   checksum of its codes; the first one's also of all fields above
    payload     one range-coded stream of all codes (constriction), scale after scale

Probabilities are quotients of integers, so all machines agree on them. A file that was cut off has
its whole scales left: those whose checksums hold when what is missing reads as zeros.
"""

import copy
import hashlib
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, cast

import constriction
import numpy as np
import torch

from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tiling import ImageCodes, Tiles
from sitlib.model.tokenizer import SpectralTokenizer, codes_digest
from sitlib.sample.applications import check_same_codes
from sitlib.strict import require

coder = cast(Any, constriction).stream
MAGIC, STATIC, WITH_PRIOR = b"SIT", 1, 2
FIELDS = struct.Struct(">3sB4sHH")
LARGEST = 2**16 - 1  # px of a side
STEPS, MARGIN, TILES = 32, 1e-9, 16  # of a `Prior`: a nat, of a step, tiles at a time
# Weights of logits so many steps below the largest. `Decimal` rounds alike on every machine.
WEIGHTS = torch.tensor([int(2**24 * (Decimal(-n) / STEPS).exp()) for n in range(533)])


class TooClose(Exception):
    """A logit that another machine might round otherwise."""


class Prior:
    """A masked generator that says what to expect of each scale, given all coarser ones.

    Its logits, in float64, are rounded to 1 / STEPS nats, from which all else follows in integers.
    Machines and threads differ by far less than MARGIN of a step; with a logit that lies closer to
    where rounding changes, an image is coded by frequencies.
    """

    def __init__(self, model: AutoregressiveModel):
        require(model.config.transformer.masked, "a prior is a masked model, this one is not.")
        self.model, digest = copy.deepcopy(model).double().eval(), hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.digest = digest.digest()

    @torch.inference_mode()
    def laws(self, coarser: np.ndarray) -> Iterator[np.ndarray]:
        """Probabilities float32 [t N, K] of the next scale's codes, some tiles after the others.

        `coarser` are the codes [k, M, N] of the scales before. A sixty-fourth goes to all codes
        alike, so that none is free.
        """
        model, c = self.model, self.model.config
        K, given = c.codebook_sizes[len(coarser)], torch.from_numpy(coarser).to(self.device)
        for scales in given.long().split(TILES, dim=1):
            empty = torch.zeros(scales.shape[1], 1, dtype=torch.int64, device=self.device)
            cond = model.unconditional(empty if model.text_tokenizer else empty[:, 0])
            state = model.start_scales(cond)
            for codes in scales:
                model.read_scale(state, codes)
            hidden = empty.expand(-1, c.tokens_per_scale)
            logits = model.read_scale(state, hidden, torch.ones_like(hidden, dtype=torch.bool))
            steps = logits[..., :K].flatten(0, 1).cpu() * STEPS
            if ((steps - steps.floor() - 0.5).abs() < MARGIN).any():
                raise TooClose
            steps = steps.round().long()
            below = (steps.amax(1, keepdim=True) - steps).clamp(max=len(WEIGHTS) - 1)
            weights = WEIGHTS[below]
            weights += 1 + weights.sum(1, keepdim=True) // (64 * K)
            yield (weights / weights.sum(1, keepdim=True)).float().numpy()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def compress(tokenizer: SpectralTokenizer, image: ImageCodes, prior: Prior | None = None) -> bytes:
    """The file of an image's codes, of all scales; ValueError for codes of another tokenizer."""
    if prior is not None:
        check_same_codes(prior.model, tokenizer)
    H, W = image.size
    require(max(H, W) <= LARGEST, f"a side of {max(H, W)} px is more than {LARGEST}.")
    tiles = Tiles.of(tokenizer, image.size)
    shape = tiles.num_scales, tiles.rows * tiles.columns * tokenizer.config.tokens_per_scale
    require(tuple(image.codes.shape) == shape, f"codes of {W}x{H} px are {list(shape)}.")
    codes = image.codes.cpu().int().numpy()
    try:
        ordered = codes if prior is None else codes[:, _by_tile(tokenizer, tiles)]
        payload = _payload(tokenizer, ordered, prior)
    except TooClose:
        prior, ordered = None, codes
        payload = _payload(tokenizer, ordered, None)
    version = STATIC if prior is None else WITH_PRIOR
    fields = FIELDS.pack(MAGIC, version, _name(tokenizer, prior), H, W) + _leb128(len(payload))
    sums = [_checksum(scale, b"" if i else fields) for i, scale in enumerate(ordered)]
    return fields + struct.pack(f">{len(sums)}H", *sums) + payload


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
    known = f"this reads {STATIC} and {WITH_PRIOR}."
    require(version in (STATIC, WITH_PRIOR), f"it is of version {version} of the format, {known}")
    if version == STATIC:
        prior = None
    else:
        require(prior is not None, "this .sit file was written with a prior: give the same one.")
        check_same_codes(cast(Prior, prior).model, tokenizer)
    other = f"it was written with another tokenizer{' or prior' if prior else ''}: give that one"
    require(name == _name(tokenizer, prior), f"{other} (its codes are {name.hex()}...).")
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
    p = [scale.max() for scale in probabilities(tokenizer)[: tiles.num_scales]]
    least = count * sum(-np.log2(p if prior is None else [63 / 64] * len(p))) / 8
    require(least <= length + 8, f"{damaged}: {length} bytes are too few for {W}x{H} px.")
    padded = payload + bytes(-len(payload) % 4 + 16)
    decoder = coder.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))
    scales: list[np.ndarray] = []
    for scale, checksum in enumerate(sums):
        try:
            laws = _laws(tokenizer, prior, scales, count)
            codes = np.concatenate([decoder.decode(*law) for law in laws])
        except (AssertionError, TooClose):  # what no encoder writes
            break
        if _checksum(codes, b"" if scale else fields) != checksum:
            break
        scales.append(codes)
    is_whole = len(scales) == tiles.num_scales
    require(is_whole or is_cut, f"{damaged}: the checksum of scale {len(scales) + 1} is wrong.")
    is_as_written = is_cut or _payload(tokenizer, scales, prior) == payload
    require(is_as_written, f"{damaged} in its last bytes.")  # which mean nothing
    require(bool(scales), "this .sit file is cut off in its first scale, and nothing can be shown.")
    g = tokenizer.config.grid_size
    codes = np.stack(scales)
    if prior is not None:
        codes = codes[:, _by_tile(tokenizer, tiles).argsort()]
    grid = tiles.rows * g, tiles.columns * g
    return ImageCodes(torch.from_numpy(codes).long(), (H, W), grid), is_whole


def ends_of_scales(
    tokenizer: SpectralTokenizer, data: bytes, prior: Prior | None = None
) -> list[int]:
    """With how many bytes of a whole file its first 1, 2, ... scales are whole."""

    def whole(end: int) -> int:
        try:
            return len(decompress(tokenizer, data[:end], prior)[0].codes)
        except ValueError:
            return 0

    places, count = range(len(data) + 1), whole(len(data))
    return [bisect_left(places, scales, key=whole) for scales in range(1, count + 1)]


def probabilities(tokenizer: SpectralTokenizer) -> list[np.ndarray]:
    """Probability of every code of each scale, float32 [K_s]: counts in training, and one more."""
    counts, sizes = tokenizer.code_counts.cpu().numpy(), tokenizer.config.codebook_sizes
    smoothed = [row[:K].astype(np.float64) + 1 for row, K in zip(counts, sizes, strict=True)]
    return [(row / row.sum()).astype(np.float32) for row in smoothed]


def _laws(
    tokenizer: SpectralTokenizer,
    prior: Prior | None,
    coarser: Sequence[np.ndarray] | np.ndarray,
    count: int,
) -> Iterator[tuple[Any, Any]]:
    """How `count` codes of the next scale are coded: what the decoder takes, part after part."""
    if prior is None:
        p = probabilities(tokenizer)[len(coarser)]
        yield coder.model.Categorical(p, perfect=False), count
    else:
        n = tokenizer.config.tokens_per_scale
        given = np.array(coarser, np.int64).reshape(len(coarser), count // n, n)
        for p in prior.laws(given):
            yield coder.model.Categorical(perfect=False), p


def _payload(
    tokenizer: SpectralTokenizer,
    codes_by_scale: Sequence[np.ndarray] | np.ndarray,
    prior: Prior | None,
) -> bytes:
    encoder = coder.queue.RangeEncoder()
    for scale, codes in enumerate(codes_by_scale):
        start = 0
        for model, p in _laws(tokenizer, prior, codes_by_scale[:scale], len(codes)):
            if prior is None:
                encoder.encode(codes, model)
            else:
                encoder.encode(codes[start : start + len(p)], model, p)
                start += len(p)
    return encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")


def _by_tile(tokenizer: SpectralTokenizer, tiles: Tiles) -> np.ndarray:
    """Where the codes of one tile after the other stand in rows over the whole image."""
    g = tokenizer.config.grid_size
    places = np.arange(tiles.rows * tiles.columns * g * g)
    return places.reshape(tiles.rows, g, tiles.columns, g).swapaxes(1, 2).ravel()


def _name(tokenizer: SpectralTokenizer, prior: Prior | None) -> bytes:
    name = bytes.fromhex(codes_digest(tokenizer))
    return name[:4] if prior is None else hashlib.sha256(name + prior.digest).digest()[:4]


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
