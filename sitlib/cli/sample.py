"""`sit sample`, `sit upsample`, `sit edit`: images, or their details, drawn by a generator."""

import argparse
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import center_crop
from torchvision.utils import make_grid
from tqdm import tqdm

from sitlib.cli import GENERATORS, UsageError, files
from sitlib.files import load_model
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.tiling import as_float
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample import applications
from sitlib.sample.generate import generate
from sitlib.strict import ConfigError, digest, from_dict, nearest, to_dict

BATCH = 16  # images drawn at a time: files appear while others are still drawn
GAP = 2  # px between the images of a grid

Loaded = tuple[AutoregressiveModel, SpectralTokenizer, SamplingConfig, Tensor | list[str] | None]


def load_generator(options: argparse.Namespace) -> Loaded:
    """Load the model of --model, or the default one for the prompt, and its tokenizer.

    Returns:
        The model, the tokenizer of its codes, how to sample, and the prompt --count times: class
        ids [count], texts, or None.

    Raises:
        ValueError: a missing checkpoint, a prompt that the model does not take, or a tokenizer of
            other codes.
    """
    name = options.model or GENERATORS["class" if options.text is None else "text"]
    path = files.find_checkpoint(name, "autoregressive")
    model = load_model(path, AutoregressiveModel).to(files.pick_device(options.device))
    prompts = _prompts(model.requires_grad_(False), options)
    settings = {key: getattr(options, key) for key in ("seed", "guidance", "temperature", "top_p")}
    settings = {key: value for key, value in settings.items() if value is not None}
    try:
        defaults = to_dict(model.config.sampling or SamplingConfig())
        sampling = from_dict(SamplingConfig, {**defaults, **settings}, "options")
    except ConfigError as error:
        raise UsageError(str(error)) from None
    # The tokenizer from the folder of models in which this model lies, else by its name.
    variant = model.config.transformer.tokenizer
    beside = path.resolve().parents[2] / "tokenizer" / f"{variant}-seed0"
    default = str(beside) if beside.is_dir() else variant
    tokenizer, _ = files.load_tokenizer(options.tokenizer or default, options.device)
    applications.check_same_codes(model, tokenizer)
    return model, tokenizer, sampling, prompts


def _prompts(model: AutoregressiveModel, options: argparse.Namespace) -> Tensor | list[str] | None:
    """Class ids [count], texts or None, if the model is conditioned on such."""
    name, classes = options.class_name, model.config.classes
    if options.text is not None:
        if classes:
            raise ValueError(
                f"This model draws classes, not texts: --class {' or '.join(classes)}."
            )
        return [options.text] * options.count
    if name is None:
        return None
    if not classes:
        raise ValueError("This model draws texts, not classes: use --text.")
    name = next((c for c in classes if c.lower() == name.lower()), name)
    if name not in classes:
        listed = f"{', '.join(classes)}{nearest(name, classes)}"
        raise ValueError(f"This model does not know the class {name}; it knows {listed}.")
    return torch.full((options.count,), classes.index(name))


def sample(options: argparse.Namespace) -> int:
    jobs = files.Jobs(options, files.IMAGES)
    if jobs.file and (options.count > 1 or options.grid):
        raise UsageError(f"-o {jobs.file} names one file, but several will be written")
    model, tokenizer, sampling, prompts = load_generator(options)
    assert prompts is not None  # the parser requires one
    text = options.class_name or options.text
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:60] or f"text-{digest(text)[:8]}"
    scales = f"-scales{options.scales}" if options.scales else ""
    target = jobs.folder / f"{words}-seed{sampling.seed}{scales}.png"
    numbers = [f"{i:0{len(str(options.count - 1))}}" for i in range(options.count)]
    numbers += ["grid"] if options.grid else []
    targets = jobs.reserve(jobs.file) if jobs.file else jobs.reserve(target, *numbers)

    images: list[Tensor] = []
    for start in tqdm(range(0, options.count, BATCH), disable=None, ncols=80):
        codes = generate(
            model,
            prompts[start : start + BATCH],
            sampling,
            scales=options.scales,
            first_sample=start,
        )
        for image in tokenizer.decode(codes).cpu():
            files.write_image(targets[len(images)], image)
            tqdm.write(str(targets[len(images)]))
            images.append(image)
    if options.grid:
        columns = math.ceil(math.sqrt(len(images)))
        grid = make_grid(images, columns, padding=GAP, pad_value=1.0)[:, GAP:-GAP, GAP:-GAP]
        files.write_image(targets[-1], grid)
        print(targets[-1])
    return 0


def upsample(options: argparse.Namespace) -> int:
    def prepare(image: Tensor, full: int) -> Tensor:
        return center_square(image, full, options.size) if options.size else image

    return _redraw(options, applications.upsample, prepare)


def edit(options: argparse.Namespace) -> int:
    def prepare(image: Tensor, full: int) -> Tensor:
        return image if image.shape[2:] == (full, full) else center_square(image, full, full)

    return _redraw(options, partial(applications.edit, keep=options.keep), prepare)


def _redraw(options: argparse.Namespace, draw: Callable, prepare: Callable) -> int:
    """Draw --count versions of every input image, made a square by `prepare(image, full size)`."""
    jobs = files.Jobs(options, files.IMAGES)
    model, tokenizer, sampling, prompts = load_generator(options)
    variants = [*map(str, range(options.count))] if options.count > 1 else []

    def work(path: Path, target: Path) -> list[str]:
        targets = jobs.reserve(target, *variants)
        image = files.read_image(path)
        square = as_float(prepare(image, tokenizer.sizes[-1])).to(tokenizer.device)
        squares = square.expand(options.count, -1, -1, -1)
        drawn = draw(model, tokenizer, squares, prompts, sampling=sampling).images
        for file, result in zip(targets, drawn, strict=True):
            files.write_image(file, result)
        sizes = " -> ".join(map(files.size_of, (image, square, drawn)))
        return [f"{file}: {sizes}" for file in targets]

    return jobs.run(work)


def center_square(image: Tensor, full: int, size: int) -> Tensor:
    """The center of an image [1, 3, H, W], float or uint8, as a square of `size` px.

    It is resized to the tokenizer's full size, then averaged down, as the first scales are.
    """
    square = as_float(center_crop(image, [min(image.shape[2:])]))
    square = F.interpolate(square, (full, full), mode="bicubic", antialias=True).clamp(0, 1)
    return F.avg_pool2d(square, full // size)
