"""`sit encode`, `sit decode`, `sit reconstruct`: photographs as codes, and back.

A codes file is safetensors: `codes` [k, N], and in its metadata the size of the image, its grid of
tokens, and name and digest of the tokenizer, which alone can decode them.
"""

import argparse
import hashlib
import math
import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sitlib.cli import ALL, TOKENIZER, files
from sitlib.files import read_metadata, write_tensors
from sitlib.metrics import lpips_per_image, psnr_per_image
from sitlib.metrics.networks import cached_lpips
from sitlib.model.tiling import ImageCodes, decode_codes, encode_image, pad, tile_side, unpad
from sitlib.model.tokenizer import DECODER_MODULES, SpectralTokenizer

GAP = 8  # px between images side by side
LARGEST_LPIPS = 4_000_000  # px; a larger image would take gigabytes of memory
SMALLEST_SHOWN = 256  # px; smaller originals are enlarged where images stand side by side
COSTS = ("size", "scales", "codes", "bits/px")  # columns of the tables


def codes_digest(tokenizer: SpectralTokenizer) -> str:
    """16 hexadecimal digits of all weights but the decoder's: those on which codes depend."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name.split(".")[0] not in DECODER_MODULES:
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_codes(path: Path) -> tuple[ImageCodes, dict]:
    """Read a file of `sit encode`: codes, and `name` and `codes` (a digest) of their tokenizer."""
    if not path.is_file():
        raise ValueError("there is no such file")
    metadata = read_metadata(path)
    if metadata.get("class") != "Codes":
        content = metadata.get("class", "something else")
        raise ValueError(f"it holds {content}, not codes: give a file that sit encode wrote")
    try:
        codes = load_file(path)["codes"]  # int16 or int32 [k, N]
        image = ImageCodes(codes.long(), tuple(metadata["size"]), tuple(metadata["token_grid"]))
        origin = {key: str(metadata["tokenizer"][key]) for key in ("name", "codes")}
        numbers = [*image.size, *image.token_grid]
        is_sound = codes.ndim == 2 and not codes.is_floating_point() and codes.numel() > 0
        if not is_sound or len(numbers) != 4 or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError(f"codes {list(codes.shape)} of an image of {image.size} px")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is damaged ({error}): encode the image again") from None
    return image, origin


def encode(options: argparse.Namespace) -> int:
    jobs = files.Jobs(options, files.IMAGES, ".safetensors")
    tokenizer, name = files.load_tokenizer(options.tokenizer or TOKENIZER, options.device)
    origin = {"name": name, "codes": codes_digest(tokenizer)}
    dtype = torch.int16 if tokenizer.config.num_codes <= 2**15 else torch.int32

    def work(path: Path, target: Path) -> list[str]:
        jobs.reserve(target)
        image = files.read_image(path)
        encoded = encode_image(tokenizer, image.to(tokenizer.device))
        metadata = {
            "class": "Codes",
            "image": os.fsencode(path.name).decode(errors="replace"),
            "tokenizer": origin,
        }
        metadata |= {"size": encoded.size, "token_grid": encoded.token_grid}
        write_tensors(target, {"codes": encoded.codes.cpu().to(dtype)}, metadata)
        return [files.row(*_costs(tokenizer, encoded.codes, image), target)]

    return jobs.run(work, *COSTS, "file")


def decode(options: argparse.Namespace) -> int:
    jobs = files.Jobs(options, files.CODES)
    load = cache(files.load_tokenizer)
    if options.tokenizer:  # a missing one is an error once, not for every file
        load(options.tokenizer, options.device)

    def work(path: Path, target: Path) -> list[str]:
        encoded, origin = read_codes(path)
        tokenizer, name = load(options.tokenizer or Path(origin["name"]).name, options.device)
        if codes_digest(tokenizer) != origin["codes"]:
            raise ValueError(
                f"its codes are of {origin['name']}, and {name} has other weights: encode the "
                "image again, or give the checkpoint that made them with --tokenizer"
            )
        lines = []
        for scales, file in _outputs(options, tokenizer, encoded, jobs, target):
            image = decode_codes(tokenizer, encoded, scales)
            files.write_image(file, image[0])
            lines.append(files.row(files.size_of(image), scales, file))
        return lines

    return jobs.run(work, "size", "scales", "file")


def reconstruct(options: argparse.Namespace) -> int:
    jobs = files.Jobs(options, files.IMAGES)
    tokenizer, _ = files.load_tokenizer(options.tokenizer or TOKENIZER, options.device)
    has_lpips = True
    try:
        cached_lpips("alex")
    except FileNotFoundError:  # its weights were not fetched
        has_lpips = False

    def work(path: Path, target: Path) -> list[str]:
        image = files.read_image(path).to(tokenizer.device)
        encoded = encode_image(tokenizer, image)
        padded, _ = pad(image, tile_side(tokenizer, encoded.size))
        outputs = _outputs(options, tokenizer, encoded, jobs, target)
        beside = jobs.reserve(target, "compare") if options.compare else []
        lines, shown = [], [image]
        for scales, file in outputs:
            result = decode_codes(tokenizer, encoded, scales)
            # A preview is compared with the image averaged down to its size.
            original = F.avg_pool2d(padded, 2 ** (len(encoded.codes) - scales))
            original = unpad(original, encoded.size_at(scales))
            cells = _costs(tokenizer, encoded.codes[:scales], result)
            cells.append(f"{psnr_per_image(result, original).item():.2f}")
            if has_lpips:
                is_small = result[0, 0].numel() <= LARGEST_LPIPS
                cells.append(f"{lpips_per_image(result, original).item():.3f}" if is_small else "-")
            files.write_image(file, result[0])
            lines.append(files.row(*cells, file))
            shown.append(result)
        for file in beside:
            files.write_image(file, _side_by_side(shown))
            lines.append(f"side by side: {file}")
        return lines

    return jobs.run(work, *COSTS, "PSNR, dB", *(["LPIPS"] if has_lpips else []), "file")


def _outputs(
    options: argparse.Namespace,
    tokenizer: SpectralTokenizer,
    image: ImageCodes,
    jobs: files.Jobs,
    target: Path,
) -> list[tuple[int, Path]]:
    """Numbers of scales to decode, each with its reserved file: photo.png, or photo-scales3.png."""
    available = len(image.codes)
    numbers = [available] if options.scales is None else list(options.scales)
    if options.scales == ALL:  # a decoder that attends to all scales has no previews
        is_full = tokenizer.config.decoder_attention == "full"
        numbers = [available] if is_full else list(range(1, available + 1))
    if max(numbers) > available:
        raise ValueError(f"it has {available} scales, not {max(numbers)}: give --scales up to that")
    variants = [f"scales{scales}" for scales in numbers] if len(numbers) > 1 else []
    return list(zip(numbers, jobs.reserve(target, *variants), strict=True))


def _costs(tokenizer: SpectralTokenizer, codes: Tensor, image: Tensor) -> list:
    """Values of the columns COSTS."""
    bits = codes.numel() * math.log2(tokenizer.config.num_codes) / image[0, 0].numel()
    return [files.size_of(image), len(codes), codes.numel(), f"{bits:.3f}"]


def _side_by_side(images: list[Tensor]) -> Tensor:
    """Images [1, 3, h, w] in one row [3, H, W], enlarged to the first, or more if that is small."""
    height, width = images[0].shape[2:]
    factor = max(1, SMALLEST_SHOWN // height)
    size = (height * factor, width * factor)
    row = [F.interpolate(image, size, mode="nearest-exact")[0].cpu() for image in images]
    gap = torch.ones(3, size[0], GAP)
    return torch.cat([tile for image in row for tile in (gap, image)][1:], dim=2)
