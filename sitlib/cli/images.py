"""`sit encode`, `sit decode`, `sit reconstruct`: photographs as codes, and back."""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitlib.cli import files, models
from sitlib.cli.options import ALL, add_command, add_files, add_tokenizer, scales_list

if TYPE_CHECKING:
    from torch import Tensor

    from sitlib.model.tokenizer import SpectralTokenizer

DEFAULT_TOKENIZER = "that of the pipeline's class-conditional model"
GAP = 8  # px between images side by side
LARGEST_LPIPS = 4_000_000  # px; of a larger image it would take gigabytes of memory
SMALLEST_SHOWN = 256  # px; smaller originals are enlarged where images stand side by side


def add_encode(commands: Any) -> None:
    parser = add_command(
        commands,
        "encode",
        encode,
        "write the codes of images",
        "sit encode photo.jpg\nsit encode photos/ -o codes/ --tokenizer sit4",
        "Images of any size: each is padded and cut into squares. A codes file (safetensors) knows the image's size and its tokenizer.",
    )
    add_files(parser, "PHOTO", "images", "codes")
    add_tokenizer(parser, DEFAULT_TOKENIZER)


def add_decode(commands: Any) -> None:
    parser = add_command(
        commands,
        "decode",
        decode,
        "make images of codes again",
        "sit decode codes/photo.safetensors\nsit decode codes/ -o decoded/ --scales 3",
    )
    add_files(parser, "CODES", "what sit encode wrote", "decoded")
    _add_scales(parser)
    add_tokenizer(parser, "the one that the codes name")


def add_reconstruct(commands: Any) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        reconstruct,
        "show what is left of images after encoding and decoding",
        "sit reconstruct photo.jpg --compare\nsit reconstruct photos/ --scales all",
        "Prints size, codes, bits for a pixel and PSNR; and LPIPS (AlexNet), of images up to 4 megapixels, if its weights are there.",
    )
    add_files(parser, "PHOTO", "images", "reconstructed")
    _add_scales(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also write original and result side by side (default: do not)",
    )
    add_tokenizer(parser, DEFAULT_TOKENIZER)


def _add_scales(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scales",
        type=scales_list,
        metavar="K",
        help="use the first K scales only, for an image of half the side for every scale left out; several as 1,2,3, or all (default: the "
        "whole image)",
    )


def encode(options: argparse.Namespace) -> int:
    from sitlib.cli.codes import codes_file, encode_image

    jobs = files.plan(files.find_images(options), files.output_of(options), files.CODES_SUFFIX)
    tokenizer, outputs = models.chosen_tokenizer(options), files.Outputs(options.overwrite)

    def do(job: files.Job) -> list[str]:
        outputs.claim(job.target)
        image = files.read_image(job.source)
        coded = encode_image(tokenizer.model, image.to(tokenizer.device))
        files.write_file(job.target, codes_file(coded, tokenizer, job.source.name))
        scales, count = len(coded.codes), coded.codes.numel()
        bits = _bits_per_pixel(tokenizer.model, count, image)
        return [_row(files.size_of(image), scales, count, f"{bits:.3f}", job.target)]

    return files.do_all(jobs, do, _row("size", "scales", "codes", "bits/px", "file"))


def decode(options: argparse.Namespace) -> int:
    from sitlib.cli.codes import check_tokenizer, decode_codes, read_codes

    sources = files.find_sources(options.inputs, [files.CODES_SUFFIX], files.output_of(options))
    jobs, outputs = files.plan(sources, files.output_of(options)), files.Outputs(options.overwrite)
    if options.tokenizer is not None:  # a wrong one is told once, not for every file
        models.checkpoint_path(options.tokenizer, "tokenizer", "--tokenizer")
    load = cache(lambda path: models.load_tokenizer(path, options))

    def do(job: files.Job) -> list[str]:
        coded, wanted = read_codes(job.source)
        name = options.tokenizer or Path(wanted["name"]).name
        tokenizer = load(models.checkpoint_path(name, "tokenizer", "--tokenizer"))
        check_tokenizer(tokenizer, wanted)
        coded.codes = coded.codes.to(tokenizer.device)
        numbers = _numbers_of_scales(options, tokenizer.model, len(coded.codes))
        targets = _targets(job, numbers)
        outputs.claim(*targets)
        lines = []
        for scales, target in zip(numbers, targets, strict=True):
            image = decode_codes(tokenizer.model, coded, scales)
            files.write_image(target, image[0])
            lines.append(_row(files.size_of(image), scales, target))
        return lines

    return files.do_all(jobs, do, _row("size", "scales", "file"))


def reconstruct(options: argparse.Namespace) -> int:
    from sitlib.cli.codes import decode_codes, encode_image, reference

    jobs = files.plan(files.find_images(options), files.output_of(options))
    tokenizer, outputs = models.chosen_tokenizer(options), files.Outputs(options.overwrite)
    measures = _measures()

    def do(job: files.Job) -> list[str]:
        image = files.read_image(job.source).to(tokenizer.device)
        coded = encode_image(tokenizer.model, image)
        numbers = _numbers_of_scales(options, tokenizer.model, len(coded.codes))
        targets = _targets(job, numbers)
        outputs.claim(*targets, *([job.variant("compare")] if options.compare else []))
        lines, shown = [], [image]
        for scales, target in zip(numbers, targets, strict=True):
            found = decode_codes(tokenizer.model, coded, scales)
            count = coded.codes[:scales].numel()
            bits = _bits_per_pixel(tokenizer.model, count, found)
            original = reference(tokenizer.model, coded, image, scales)
            scores = [measure(found, original) for measure in measures.values()]
            files.write_image(target, found[0])
            lines.append(_row(files.size_of(found), scales, count, f"{bits:.3f}", *scores, target))
            shown.append(found)
        if options.compare:
            files.write_image(job.variant("compare"), _side_by_side(shown))
            lines.append(f"side by side: {job.variant('compare')}")
        return lines

    return files.do_all(jobs, do, _row("size", "scales", "codes", "bits/px", *measures, "file"))


def _numbers_of_scales(
    options: argparse.Namespace, tokenizer: "SpectralTokenizer", available: int
) -> list[int]:
    """Which numbers of scales are decoded of an image that has `available` of them.

    Raises:
        ValueError: more than it has; or fewer, of a tokenizer that decodes all of them only.
    """
    if options.scales is None:
        return [available]
    whole_only = tokenizer.config.decoder_attention == "full" and tokenizer.config.levels > 0
    if options.scales == ALL:
        return [available] if whole_only else [*range(1, available + 1)]
    if max(options.scales) > available:
        raise ValueError(
            f"it has {available} scales, not {max(options.scales)}: give --scales up to that"
        )
    if whole_only and min(options.scales) < available:
        raise ValueError(
            f"this tokenizer decodes all {available} scales together, so --scales has to be left out: use one with a scale-causal decoder, "
            "such as sit5_sc"
        )
    return options.scales


def _targets(job: files.Job, numbers: list[int]) -> list[Path]:
    """photo.png; or photo-scales1.png, photo-scales2.png, ... of several numbers of scales."""
    return (
        [job.target]
        if len(numbers) == 1
        else [job.variant(f"scales{scales}") for scales in numbers]
    )


def _bits_per_pixel(tokenizer: "SpectralTokenizer", count: int, image: "Tensor") -> float:
    from sitlib.metrics.codebook import bits_per_pixel

    height, width = image.shape[2:]
    return bits_per_pixel(count, tokenizer.config.num_codes, (height, width))


def _measures() -> dict[str, Callable[["Tensor", "Tensor"], str]]:
    """Name -> how near two images [1, 3, H, W] are to each other, to be shown. LPIPS only if its weights are there."""
    from sitlib.metrics import lpips_per_image, psnr_per_image
    from sitlib.metrics.networks import cached_lpips

    measures: dict[str, Callable[[Tensor, Tensor], str]] = {
        "PSNR, dB": lambda *pair: f"{psnr_per_image(*pair).item():.2f}"
    }
    try:
        cached_lpips("alex")
    except FileNotFoundError:
        return measures

    def lpips(image: "Tensor", original: "Tensor") -> str:
        if image.shape[2] * image.shape[3] > LARGEST_LPIPS:
            return "-"
        return f"{lpips_per_image(image, original).item():.3f}"

    return measures | {"LPIPS": lpips}


def _side_by_side(images: list["Tensor"]) -> "Tensor":
    """Images [1, 3, h, w] in one row [3, H, W], all enlarged to the height of the first, or to more where that is small."""
    import torch
    import torch.nn.functional as F

    height, width = images[0].shape[2:]
    factor = max(1, SMALLEST_SHOWN // height)
    size = (height * factor, width * factor)
    shown = [F.interpolate(image, size, mode="nearest-exact")[0].cpu() for image in images]
    gap = torch.ones(3, size[0], GAP)
    return torch.cat([part for image in shown for part in (gap, image)][1:], dim=2)


def _row(*cells: object) -> str:
    """A line of a table; the last column, a file, may be of any length."""
    *columns, last = cells
    return "  ".join([*(f"{cell!s:>9}" for cell in columns), str(last)])
