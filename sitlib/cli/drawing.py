"""`sit sample`, `sit upsample`, `sit edit`: images, or the details of images, drawn by an autoregressive model."""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitlib.cli import files, models
from sitlib.cli.options import (
    OfProfile,
    UsageError,
    add_command,
    add_files,
    add_output,
    add_prompt,
    add_sampling,
    number_from,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sitlib.model.config import SamplingConfig

BATCH = 16  # samples drawn at a time: files appear, and the progress bar moves, while others are still drawn
GAP = 2  # px between the images of a grid


def add_sample(commands: Any) -> None:
    parser = add_command(
        commands,
        "sample",
        sample,
        "draw new images of a class or a text",
        'sit sample --class mountain --count 8 --grid\nsit sample --text "an emoji of a red apple" --seed 3\n'
        "sit sample --class water --count 16 --scales 2    # small previews, in less time",
    )
    add_prompt(parser, required=True)
    add_sampling(parser)
    parser.add_argument(
        "--scales",
        type=number_from(1),
        metavar="K",
        help="stop after the first K scales: a small preview of what the same seed gives in full (default: all scales)",
    )
    parser.add_argument(
        "--grid",
        action="store_true",
        help="also write all images as one (default: each for itself only)",
    )
    add_output(parser, "samples")


def add_upsample(commands: Any) -> None:
    parser = add_command(
        commands,
        "upsample",
        upsample,
        "draw the details that small images lack",
        'sit upsample small.png --class mountain\nsit upsample emoji.png --size 8 --text "a red apple"',
        "Takes squares of the sizes of a scale-causal tokenizer's first scales: 4, 8, 16 or 32 px for sit5_sc.",
    )
    add_files(parser, "IMAGE", "small images", "upsampled")
    parser.add_argument(
        "--size",
        type=number_from(1),
        metavar="PX",
        help="first make the centre of an image a square of this side (default: the image must have a fitting size)",
    )
    add_prompt(parser, required=False)
    add_sampling(parser)


def add_edit(commands: Any) -> None:
    parser = add_command(
        commands,
        "edit",
        edit,
        "keep the coarse scales of images and draw the details anew, for a class or a text",
        'sit edit photo.png --keep 2 --class snow\nsit edit apple.png --keep 1 --text "a green apple" --count 4',
        "Of an image of another size its centre is taken, as a square of the tokenizer's size.",
    )
    add_files(parser, "PHOTO", "images", "edited")
    parser.add_argument(
        "--keep",
        type=number_from(0),
        default=2,
        metavar="K",
        help="scales that stay as they are, coarsest first; 0: nothing stays (default: %(default)s)",
    )
    add_prompt(parser, required=False)
    add_sampling(parser)


def sample(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sitlib.sample.generate import generate

    sampling = _sampling(options, options.text is not None)
    outputs, targets, grid = (
        files.Outputs(options.overwrite),
        *_sample_files(options, sampling.seed),
    )
    try:
        outputs.claim(*targets, *([grid] if grid else []))
    except files.KeptError as error:
        raise ValueError(f"{error}, another --seed draws other images.") from None
    generator = models.chosen_generator(options)
    model, tokenizer = generator.model, generator.tokenizer
    _check_scales(options, generator)
    drawn = []
    with tqdm(total=len(targets), unit="image", disable=None, ncols=80) as bar:
        for start in range(0, len(targets), BATCH):
            names = targets[start : start + BATCH]
            prompts = generator.prompts(len(names))
            codes = generate(model, prompts, sampling, scales=options.scales, first_sample=start)
            for name, image in zip(names, tokenizer.decode(codes), strict=True):
                files.write_image(name, image)
                tqdm.write(str(name), file=sys.stdout)
                if grid:
                    drawn.append(image.cpu())
                bar.update()
    if grid:
        files.write_image(grid, _grid(drawn))
        print(grid)
    return 0


def upsample(options: argparse.Namespace) -> int:
    from sitlib.sample.applications import upsample as draw

    jobs, outputs = _jobs(options), files.Outputs(options.overwrite)
    generator = models.chosen_generator(options)
    model, tokenizer = generator.model, generator.tokenizer
    sampling = _sampling(options, model.text_tokenizer is not None)
    small = tokenizer.sizes[:-1]
    if not small:
        raise ValueError(
            "This model's tokenizer knows images of one size only, so it cannot upsample: choose a model over scale-causal codes, such as "
            "ar_sit5_sc."
        )
    sizes = " or ".join(map(str, small))
    if options.size is not None and options.size not in small:
        raise ValueError(
            f"Images of {options.size} px cannot be upsampled by this model: give --size {sizes}."
        )

    def do(job: files.Job) -> list[str]:
        targets = _targets(job, options.count)
        outputs.claim(*targets)
        image = files.read_image(job.source)
        size = files.size_of(image)
        if options.size is not None:
            image = _centre_square(image, tokenizer.sizes[-1], options.size)
        elif image.shape[2] != image.shape[3] or image.shape[2] not in small:
            raise ValueError(
                f"it has {size} px, but squares of {sizes} px can be upsampled: --size {small[-1]} makes one of its centre"
            )
        images = image.to(tokenizer.device).expand(options.count, -1, -1, -1)
        found = draw(model, tokenizer, images, generator.prompts(options.count), sampling).images
        return _written(
            targets, found, size if options.size is None else f"{size} as {files.size_of(image)}"
        )

    return files.do_all(jobs, do)


def edit(options: argparse.Namespace) -> int:
    from sitlib.sample.applications import edit as draw

    jobs, outputs = _jobs(options), files.Outputs(options.overwrite)
    generator = models.chosen_generator(options)
    model, tokenizer = generator.model, generator.tokenizer
    sampling = _sampling(options, model.text_tokenizer is not None)
    scales, side = tokenizer.geometry.num_scales, tokenizer.sizes[-1]
    if options.keep > scales:
        raise ValueError(
            f"The model has {scales} scales: give --keep 0 ... {scales}, not {options.keep}."
        )

    def do(job: files.Job) -> list[str]:
        targets = _targets(job, options.count)
        outputs.claim(*targets)
        image = files.read_image(job.source)
        size = files.size_of(image)
        if image.shape[2:] != (side, side):
            image, size = _centre_square(image, side, side), f"the centre of {size}"
        images = image.to(tokenizer.device).expand(options.count, -1, -1, -1)
        prompts = generator.prompts(options.count)
        found = draw(model, tokenizer, images, prompts, options.keep, sampling).images
        return _written(targets, found, size)

    return files.do_all(jobs, do)


def _sampling(options: argparse.Namespace, is_text: bool) -> "SamplingConfig":
    """The profile's sampler of the model with what was given on the command line laid over it."""
    from dataclasses import replace

    asked = {name: getattr(options, name) for name in ("seed", "guidance", "temperature", "top_p")}
    asked = {name: value for name, value in asked.items() if not isinstance(value, OfProfile)}
    base = models.sampler(options, is_text)
    try:
        return replace(base, **asked)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _sample_files(options: argparse.Namespace, seed: int) -> tuple[list[Path], Path | None]:
    """One file for each sample, named by what it shows, the seed and its number; and that of the grid, if there is to be one."""
    output = options.output or "samples"
    if file := files.as_file(output, ".png"):
        if options.count > 1 or options.grid:
            raise UsageError(
                f"-o {output} names one file, but several will be written: name a folder"
            )
        return [file], None
    told = options.class_name if options.text is None else options.text
    words = re.sub(r"[\W_]+", "-", told.lower()).strip("-")[:60]
    scales = "" if options.scales is None else f"-scales{options.scales}"
    folder, stem = files.output_folder(output), f"{words}-seed{seed}{scales}"
    digits = len(str(options.count - 1))
    targets = [folder / f"{stem}-{index:0{digits}}.png" for index in range(options.count)]
    return targets, folder / f"{stem}-grid.png" if options.grid else None


def _check_scales(options: argparse.Namespace, generator: models.Generator) -> None:
    """Refuses a number of scales that cannot be drawn or shown, before anything is drawn."""
    if options.scales is None:
        return
    scales = generator.tokenizer.geometry.num_scales
    if options.scales > scales:
        raise ValueError(
            f"The model has {scales} scales: give --scales 1 ... {scales}, not {options.scales}."
        )
    if options.scales < scales and generator.tokenizer.config.decoder_attention == "full":
        raise ValueError(
            "This model's tokenizer decodes all scales together, so it has no previews: leave --scales out, or choose a model over "
            "scale-causal codes, such as ar_sit5_sc."
        )


def _jobs(options: argparse.Namespace) -> list[files.Job]:
    return files.plan(files.find_images(options), files.output_of(options))


def _targets(job: files.Job, count: int) -> list[Path]:
    """photo.png; or photo-0.png, photo-1.png, ... of several samples."""
    return [job.target] if count == 1 else [job.variant(str(index)) for index in range(count)]


def _written(targets: list[Path], images: "Tensor", size: str) -> list[str]:
    """Writes images [M, 3, H, W]; the lines to print of them."""
    for target, image in zip(targets, images, strict=True):
        files.write_image(target, image)
    return [f"{target}: {size} -> {files.size_of(images)}" for target in targets]


def _centre_square(image: "Tensor", full: int, size: int) -> "Tensor":
    """The centre of an image [1, 3, H, W] as a square of `size` px: resized to `full` px, the tokenizer's size, then averaged down, as the
    first scales of a large image are."""
    import torch.nn.functional as F

    side = min(image.shape[2:])
    top, left = ((length - side) // 2 for length in image.shape[2:])
    square = image[:, :, top : top + side, left : left + side]
    square = F.interpolate(square, (full, full), mode="bicubic", antialias=True).clamp(0, 1)
    return F.avg_pool2d(square, full // size)


def _grid(images: list["Tensor"]) -> "Tensor":
    """Images [3, H, W] in rows and columns, about as many of each, on white."""
    import torch

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[1:]
    grid = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[:, top : top + height, left : left + width] = image
    return grid
