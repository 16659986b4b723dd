"""`sit sample`, `sit upsample`, `sit edit`: images, or their details, drawn by a generator."""

import argparse
import math
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import center_crop
from torchvision.utils import make_grid
from tqdm import tqdm

from sitlib.cli import GENERATORS, files
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample import applications
from sitlib.sample.generate import generate
from sitlib.strict import ConfigError, digest, from_dict, nearest, require, to_dict

BATCH = 16  # images drawn at a time: files appear while others are still drawn
GAP = 2  # px between the images of a grid

Prompts = Tensor | list[str] | None  # class ids [count], texts, or None without a prompt


def load_sampler(
    name: str, options: argparse.Namespace
) -> tuple[AutoregressiveModel, SpectralTokenizer, SamplingConfig]:
    """Load a generator and its tokenizer -> both, and how to sample."""
    model, path = files.load_checkpoint(name, AutoregressiveModel, options.device)
    if options.steps_per_scale and not model.config.transformer.masked:
        sequential = f"{name} draws code after code: it takes no --steps-per-scale"
        raise argparse.ArgumentError(None, sequential)
    sampling = to_dict(model.config.sampling or SamplingConfig())
    for key in ("seed", "guidance", "temperature", "top_p", "steps_per_scale"):
        if (value := getattr(options, key)) is not None:
            sampling[key] = value
    try:
        sampling = from_dict(SamplingConfig, sampling, "options")
    except ConfigError as error:
        raise argparse.ArgumentError(None, str(error)) from None
    # The tokenizer from the folder of models in which this model lies, else by its name.
    variant = model.config.transformer.tokenizer
    beside = path.resolve().parent.parent.parent / "tokenizer" / f"{variant}-seed0"
    name = options.tokenizer or (str(beside) if beside.is_dir() else variant)
    tokenizer, _ = files.load_checkpoint(name, SpectralTokenizer, options.device)
    applications.check_same_codes(model, tokenizer)
    return model, tokenizer, sampling


def load_generator(
    options: argparse.Namespace,
) -> tuple[AutoregressiveModel, SpectralTokenizer, SamplingConfig, Prompts]:
    """`load_sampler` of the options, and the prompt --count times."""
    name = options.model or GENERATORS["class" if options.text is None else "text"]
    model, tokenizer, sampling = load_sampler(name, options)
    return model, tokenizer, sampling, _prompts(model.config.classes, options)


def _prompts(classes: list[str], options: argparse.Namespace) -> Prompts:
    """The prompt of the options, for a model of these classes; of texts, if it has none."""
    if options.text is not None:
        listed = " or ".join(classes)
        require(not classes, f"This model draws classes, not texts: --class {listed}.")
        return [options.text] * options.count
    if (name := options.class_name) is None:
        return None
    require(bool(classes), "This model draws texts, not classes: use --text.")
    known = [c.lower() for c in classes]
    if name.lower() not in known:
        listed = f"{', '.join(classes)}{nearest(name, classes)}"
        raise ValueError(f"This model does not know the class {name[:60]}; it knows {listed}.")
    return torch.full((options.count,), known.index(name.lower()))


def sample(options: argparse.Namespace) -> int:
    jobs = files.Jobs(options)
    _require_one_output(jobs, options.count + options.grid)
    model, tokenizer, sampling, prompts = load_generator(options)
    assert prompts is not None  # the parser requires one
    text = options.class_name or options.text
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    if not 0 < len(words) <= 60:
        words = f"{words[:50] or 'text'}-{digest(text)[:8]}"
    scales = f"-scales{options.scales}" if options.scales else ""
    target = jobs.folder / f"{words}-seed{sampling.seed}{scales}.png"
    numbers = [f"{i:0{len(str(options.count - 1))}}" for i in range(options.count)]
    numbers += ["grid"] if options.grid else []
    targets = jobs.reserve(jobs.file) if jobs.file else jobs.reserve(target, *numbers)

    images: list[Tensor] = []
    for start in tqdm(range(0, options.count, BATCH), disable=None, ncols=80):
        some = prompts[start : start + BATCH]
        codes = generate(model, some, sampling, scales=options.scales, first_sample=start)
        for image in tokenizer.decode(codes).cpu():
            files.write_image(targets[len(images)], image)
            tqdm.write(str(targets[len(images)]))
            images.append(image)
    if options.grid:
        columns = columns_of(len(images))
        grid = make_grid(images, columns, padding=GAP, pad_value=1.0)[:, GAP:-GAP, GAP:-GAP]
        files.write_image(targets[-1], grid)
        print(targets[-1])
    return 0


def _require_one_output(jobs: files.Jobs, count: int) -> None:
    """Refuse the name of one file for several."""
    if jobs.file and count > 1:
        several = f"-o {jobs.file} names one file, but several will be written"
        raise argparse.ArgumentError(None, several)


def columns_of(count: int) -> int:
    """Columns of a grid of images; no cell is empty if a shape of at most 1:3 has none."""
    full = (c for c in range(1, count + 1) if count % c == 0 and count <= c * c <= 3 * count)
    return next(full, math.ceil(math.sqrt(count)))


def redraw(options: argparse.Namespace) -> int:
    """Draw --count versions of every input image, made a square of --size, for `edit` the full."""
    jobs = files.Jobs(options)
    _require_one_output(jobs, options.count)
    model, tokenizer, sampling, prompts = load_generator(options)
    full = tokenizer.sizes[-1]
    if options.command == "edit":
        draw, size = partial(applications.edit, keep=options.keep), full
    else:
        draw, size = applications.upsample, options.size
        *small, full = tokenizer.sizes
        if size and small and size not in small:
            raise argparse.ArgumentError(
                None, f"--size {size} is none of {small}, which it enlarges"
            )
    variants = [*map(str, range(options.count))] if options.count > 1 else []

    def work(path: Path, target: Path) -> list[str]:
        targets = jobs.reserve(target, *variants)
        image = files.read_image(path)
        square = image / 255
        if size:  # the center, resized to the full size and averaged down, as first scales are
            square = center_crop(square, [min(image.shape[2:])])
            square = F.interpolate(square, (full, full), mode="bicubic", antialias=True)
            square = F.avg_pool2d(square.clamp(0, 1), full // size)
        squares = square.to(tokenizer.device).expand(options.count, -1, -1, -1)
        drawn = draw(model, tokenizer, squares, prompts, sampling=sampling).images
        for file, result in zip(targets, drawn, strict=True):
            files.write_image(file, result)
        sizes = " -> ".join(map(files.size_of, (image, square, drawn)))
        return [f"{file}: {sizes}" for file in targets]

    return jobs.run(work)


upsample = edit = redraw
