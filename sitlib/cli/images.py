"""`sit encode`, `sit decode`, `sit reconstruct`: photographs as codes, and back.

A codes file is safetensors: `codes` [k, N], and in its metadata the size of the image, its grid of
tokens, and name and digest of the tokenizer, which alone can decode them.
"""

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sitlib.cli import ALL, TOKENIZER, files
from sitlib.files import read_metadata, write_tensors
from sitlib.model import tiling
from sitlib.model.tokenizer import SpectralTokenizer, codes_digest
from sitlib.strict import require

GAP = 8  # px between images side by side
LARGEST_LPIPS = 4_000_000  # px; a larger image would take gigabytes of memory
SMALLEST_SHOWN = 256  # px high; smaller originals are enlarged where images stand side by side,
LONGEST_SHOWN = 2000  # but not to a longer side
COSTS = ("size", "scales", "codes", "bits/px")  # columns of the tables


def read_codes(path: Path) -> tuple[tiling.ImageCodes, dict]:
    """Read a file of `sit encode`: codes, and `name` and `codes` (a digest) of their tokenizer."""
    require(path.is_file(), "there is no such file")
    metadata = read_metadata(path)
    content = metadata.get("class", "something else")
    is_codes = content == "Codes"
    require(is_codes, f"it holds {content}, not codes: give a file that sit encode wrote")
    try:
        size, grid, tokenizer = (metadata[key] for key in ("size", "token_grid", "tokenizer"))
        origin = {key: str(tokenizer[key]) for key in ("name", "codes")}
        image = tiling.ImageCodes(load_file(path)["codes"], tuple(size), tuple(grid))
        is_sound = all(type(number) is int and number > 0 for number in (*size, *grid))
        require(is_sound and image.codes.ndim == 2, f"an image of {size} px")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is damaged ({error}): encode the image again") from None
    return image, origin


def load_tokenizer(name: str, device: str | None) -> tuple[SpectralTokenizer, dict[str, str]]:
    """A tokenizer, and `name` and `codes` as files of its codes hold them."""
    tokenizer, path = files.load_checkpoint(name, SpectralTokenizer, device)
    name = read_metadata(path).get("name", path.resolve().parent.name)
    return tokenizer, {"name": name, "codes": codes_digest(tokenizer)}


def encode(options: argparse.Namespace) -> int:
    jobs = files.Jobs(options)
    tokenizer, origin = load_tokenizer(options.tokenizer or TOKENIZER, options.device)
    dtype = torch.int16 if max(tokenizer.config.codebook_sizes) <= 2**15 else torch.int32

    def work(path: Path, target: Path) -> list[str]:
        jobs.reserve(target)
        image = files.read_image(path)
        encoded = tiling.encode_image(tokenizer, image)
        name = os.fsencode(path.name).decode(errors="replace")
        metadata = {"class": "Codes", "image": name, "tokenizer": origin}
        metadata |= {"size": encoded.size, "token_grid": encoded.token_grid}
        write_tensors(target, {"codes": encoded.codes.cpu().to(dtype)}, metadata)
        return [files.row(*_costs(tokenizer, encoded.codes, image), target)]

    return jobs.run(work, *COSTS, "file")


def decode(options: argparse.Namespace) -> int:
    jobs = files.Jobs(options)
    load = cache(load_tokenizer)
    if options.tokenizer:  # a missing one is an error once, not for every file
        load(options.tokenizer, options.device)

    def work(path: Path, target: Path) -> list[str]:
        encoded, origin = read_codes(path)
        name = options.tokenizer or Path(origin["name"]).name
        tokenizer, known = load(name, options.device)
        other = f"its codes are of {origin['name']}, and {known['name']} has other weights"
        remedy = "encode the image again, or give the checkpoint that made them with --tokenizer"
        require(known["codes"] == origin["codes"], f"{other}: {remedy}")
        needed, given = tiling.Tiles.of(tokenizer, encoded.size).num_scales, len(encoded.codes)
        require(given == needed, f"it has {given} scales instead of {needed}: encode it again")
        return write_images(jobs, target, tokenizer, encoded)

    return jobs.run(work, "size", "scales", "file")


def write_images(
    jobs: files.Jobs, target: Path, tokenizer: SpectralTokenizer, encoded: tiling.ImageCodes
) -> list[str]:
    """Decode and write the images of the numbers of scales that were asked for; a row of each."""
    rows = []
    for scales, file in outputs_of(jobs, target, tokenizer, len(encoded.codes)):
        image = files.to_bytes(tiling.decode_strips(tokenizer, encoded, scales))
        files.write_image(file, image[0])
        rows.append(files.row(files.size_of(image), scales, file))
    return rows


def reconstruct(options: argparse.Namespace) -> int:
    # Its packages take two seconds and 250 MB, which the other commands do without.
    from sitlib.metrics import lpips_per_image
    from sitlib.metrics.networks import cached_lpips

    jobs = files.Jobs(options)
    name = options.tokenizer or TOKENIZER
    tokenizer, _ = files.load_checkpoint(name, SpectralTokenizer, options.device)
    has_lpips = True
    try:
        cached_lpips("alex")
    except FileNotFoundError:  # its weights were not fetched
        has_lpips = False

    def work(path: Path, target: Path) -> list[str]:
        image = files.read_image(path)
        encoded = tiling.encode_image(tokenizer, image)
        outputs = outputs_of(jobs, target, tokenizer, len(encoded.codes))
        beside = jobs.reserve(target, "compare") if options.compare else []
        lines, shown = [], [_shown(image, encoded.size)] if beside else []
        for scales, file in outputs:
            result = files.to_bytes(tiling.decode_strips(tokenizer, encoded, scales))
            factor = 2 ** (len(encoded.codes) - scales)
            how = factor, tiling.Tiles.of(tokenizer, encoded.size).side
            cells = _costs(tokenizer, encoded.codes[:scales], result)
            cells.append(f"{_psnr(result, _averaged(image, *how)):.2f}")
            if has_lpips and result[0, 0].numel() <= LARGEST_LPIPS:
                original = torch.cat([*_averaged(image, *how)], dim=2).to(tokenizer.device)
                distance = lpips_per_image(tiling.as_float(result).to(original), original)
                cells.append(f"{distance.item():.3f}")
            elif has_lpips:
                cells.append("-")
            shown += [_shown(result, encoded.size)] if beside else []
            if file == outputs[-1][1]:  # writing takes as much memory
                image = image.new_empty(0)
            files.write_image(file, result[0])
            lines.append(files.row(*cells, file))
        for file in beside:
            gap = torch.full((1, 3, shown[0].shape[2], GAP), 255).byte()
            row = [part for image in shown for part in (gap, image)][1:]
            files.write_image(file, torch.cat(row, dim=3)[0])
            lines.append(f"side by side: {file}")
        return lines

    return jobs.run(work, *COSTS, "PSNR, dB", *(["LPIPS"] if has_lpips else []), "file")


def outputs_of(
    jobs: files.Jobs, target: Path, tokenizer: SpectralTokenizer, available: int
) -> list[tuple[int, Path]]:
    """Numbers of scales to decode, each with its reserved file: photo.png, or photo-scales3.png."""
    numbers = jobs.options.scales or [available]
    if numbers == ALL:  # a decoder that attends to all scales has no previews
        is_full = tokenizer.config.decoder_attention == "full"
        numbers = [available] if is_full else list(range(1, available + 1))
    sentence = f"it has {available} scales, not {max(numbers)}: give --scales up to that"
    require(max(numbers) <= available, sentence)
    variants = [f"scales{scales}" for scales in numbers] if len(numbers) > 1 else []
    return list(zip(numbers, jobs.reserve(target, *variants), strict=True))


def _costs(tokenizer: SpectralTokenizer, codes: Tensor, image: Tensor) -> list:
    """Values of the columns COSTS."""
    squares = codes[0].numel() / tokenizer.config.tokens_per_scale
    per_pixel = squares * tokenizer.config.bits(len(codes)) / image[0, 0].numel()
    return [files.size_of(image), len(codes), codes.numel(), f"{per_pixel:.3f}"]


def _averaged(image: Tensor, factor: int, side: int) -> Iterator[Tensor]:
    """Average an image down, as a preview of it is: padded like its tiles, which have that side.

    In strips [1, 3, s, w] in [0, 1], as the whole may not fit in float32.
    """
    height, width = (-(-pixels // factor) for pixels in image.shape[2:])
    for strip in image.split(side, dim=2):
        averaged = F.avg_pool2d(tiling.pad(tiling.as_float(strip), side), factor)
        yield averaged[:, :, :height, :width]
        height -= averaged.shape[2]


def _psnr(result: Tensor, originals: Iterable[Tensor]) -> float:
    """PSNR in dB of an image [1, 3, H, W] to the strips of its original."""
    error, top = 0.0, 0
    for strip in originals:
        rows = tiling.as_float(result[:, :, top : top + strip.shape[2]])
        error += float((rows - strip).square().sum(dtype=torch.float64))
        top += strip.shape[2]
    return -10 * math.log10(error / result.numel()) if error else math.inf


def _shown(image: Tensor, original: Sequence[int]) -> Tensor:
    """An image, uint8 [1, 3, h, w], as it stands beside its original of (H, W) px.

    Pixels are enlarged as squares, or averaged, to one size, neither tiny nor enormous.
    """
    height, width = original
    if (shrink := (height * width / LARGEST_LPIPS) ** 0.5) > 1:
        size = max(1, round(height / shrink)), max(1, round(width / shrink))
    else:
        factor = max(1, min(SMALLEST_SHOWN // height, LONGEST_SHOWN // max(height, width)))
        size = height * factor, width * factor
    is_large = image.shape[2] > size[0]
    how = "bilinear" if is_large else "nearest-exact"
    return F.interpolate(image, size, mode=how, antialias=is_large)
