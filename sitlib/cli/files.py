"""Input files and folders, the files that come of them, and one after another without losing any: a bad one is named and skipped."""

import argparse
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sitlib.cli.options import UsageError

if TYPE_CHECKING:
    from torch import Tensor

CODES_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Source:
    """An input file, and its place below the output folder."""

    path: Path
    place: Path


@dataclass(frozen=True)
class Job:
    """An input file, and the file that will come of it."""

    source: Path
    target: Path

    def variant(self, ending: str) -> Path:
        """A file beside the target: photo.png -> photo-compare.png."""
        return self.target.with_name(f"{self.target.stem}-{ending}{self.target.suffix}")


class KeptError(Exception):
    """An output is there already and was not asked to be replaced."""


class Outputs:
    """The files of one run: none that was there before is replaced unless that is asked for, and none is written twice."""

    def __init__(self, overwrite: bool):
        self.overwrite = overwrite
        self.claimed: set[Path] = set()

    def claim(self, *targets: Path) -> None:
        """Raises `KeptError` unless all of these may be written; to be called before work is spent on them."""
        for target in targets:
            if target in self.claimed:
                raise KeptError(
                    f"{target} was just written for another input: use another output folder"
                )
            if target.exists() and not self.overwrite:
                raise KeptError(f"{target} is there already; --overwrite replaces it")
        self.claimed.update(targets)


def find_sources(inputs: list[str], suffixes: Iterable[str], output: str) -> list[Source]:
    """Files that were named, and those below folders that were named, sorted; hidden ones and those below `output` are left out.

    A single folder's files keep their places in it; of several inputs each folder keeps its name.

    Args:
        suffixes: those that count in a folder, lower case with dots. A file that is named itself may have any, or not be there.

    Raises:
        ValueError: a folder in which there is no such file.
    """
    suffixes, found = set(suffixes), []
    for name in inputs:
        path = Path(name).expanduser()
        if not path.is_dir():
            found.append(Source(path, Path(path.name)))
            continue
        inside = [file for file in _walk(path, output) if file.suffix.lower() in suffixes]
        if not inside:
            raise ValueError(
                f"In the folder {path} there is no file whose name ends in {' or '.join(sorted(suffixes))}."
            )
        root = Path(path.resolve().name) if len(inputs) > 1 else Path()
        found += [Source(file, root / file.relative_to(path)) for file in inside]
    return list({source.path.resolve(): source for source in found}.values())


def find_images(options: argparse.Namespace) -> list[Source]:
    """The image files that a command's inputs stand for; see `find_sources`."""
    from sitlib.data.decode import IMAGE_SUFFIXES

    return find_sources(
        options.inputs, [f".{suffix}" for suffix in IMAGE_SUFFIXES], output_of(options)
    )


def output_of(options: argparse.Namespace) -> str:
    """Where a command writes."""
    return options.output or options.default_folder


def _walk(folder: Path, output: str) -> list[Path]:
    """Files below a folder, but for hidden ones and what an earlier run wrote into an output folder inside it."""
    left_out = Path(output).expanduser().resolve()
    files = []
    for where, folders, names in os.walk(folder):
        here = Path(where)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() != left_out
        ]
        files += [here / name for name in names if not name.startswith(".")]
    return sorted(files)


def plan(sources: list[Source], output: str, suffix: str = ".png") -> list[Job]:
    """Which file comes of which: `place/stem<suffix>` below the folder `output`, or `output` itself where it names a file.

    Two files of one stem, such as a.jpg and a.png, keep their suffixes: a.jpg.png and a.png.png.

    Raises:
        UsageError: `output` names a file but there are several inputs, or a file of another kind.
        ValueError: two inputs would become one file, or an output would replace an input.
    """
    if file := as_file(output, suffix):
        if len(sources) > 1:
            raise UsageError(
                f"-o {output} names one file, but there are {len(sources)} inputs: name a folder"
            )
        jobs = [Job(sources[0].path, file)]
    else:
        folder = output_folder(output)
        stems = Counter(source.place.with_name(source.place.stem) for source in sources)
        jobs = []
        for source in sources:
            place = source.place
            stem = place.stem if stems[place.with_name(place.stem)] == 1 else place.name
            jobs.append(Job(source.path, folder / place.parent / f"{stem}{suffix}"))
    first: dict[Path, Path] = {}
    for job in jobs:
        if job.target in first:
            raise ValueError(
                f"{first[job.target]} and {job.source} would both become {job.target}: run sit for each, with an output folder of its own."
            )
        first[job.target] = job.source
    inputs = {source.path.resolve() for source in sources}
    if replaced := [target for target in first if target.resolve() in inputs]:
        raise ValueError(
            f"{replaced[0]} would replace an input: name another output folder with -o."
        )
    return jobs


def output_folder(output: str) -> Path:
    """The folder that an output path names, which need not be there yet.

    Raises:
        UsageError: a file is there.
    """
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"-o {output} is a file: name a folder, or a file that ends in .png or {CODES_SUFFIX}"
        )
    return folder


def as_file(output: str, suffix: str) -> Path | None:
    """The file that an output path names, or None if it is a folder: what exists as one, ends in a slash or has no known suffix.

    Raises:
        UsageError: a file of a kind that is not written here.
    """
    path = Path(output).expanduser()
    ending = path.suffix.lower()
    if (
        path.is_dir()
        or output.endswith(("/", os.sep))
        or ending not in (*_pillow_formats(), CODES_SUFFIX)
    ):
        return None
    if (ending == CODES_SUFFIX) != (suffix == CODES_SUFFIX):
        wanted = CODES_SUFFIX if suffix == CODES_SUFFIX else "an image's, such as .png"
        raise UsageError(f"-o {output}: the name of a file that is written here ends in {wanted}")
    return path


def _pillow_formats() -> dict[str, str]:
    """Suffix -> name of the format, of those that Pillow can write."""
    from PIL import Image

    known = Image.registered_extensions()  # also registers what writes them
    return {suffix: name for suffix, name in known.items() if name in Image.SAVE}


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all: beside its place first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_image(path: Path, image: "Tensor") -> None:
    """Writes an image [3, H, W] in [0, 1], in the format of the file's suffix."""
    from PIL import Image

    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, _pillow_formats()[path.suffix.lower()])
    write_file(path, content.getvalue())


def read_image(path: Path) -> "Tensor":
    """An image file of any kind and size -> float [1, 3, H, W] in [0, 1].

    Raises:
        ValueError: it is not there or cannot be decoded; the message does not name it.
    """
    from sitlib.data import decode_image

    if not path.is_file():
        raise ValueError("there is no such file")
    return decode_image(path, min_side=1)[None] / 255


def size_of(image: "Tensor") -> str:
    """Width and height of an image [1, 3, H, W]."""
    return f"{image.shape[3]}x{image.shape[2]}"


def do_all(jobs: list[Job], do: Callable[[Job], list[str]], header: str | None = None) -> int:
    """Does one job after another, with a progress bar where there are several and a terminal to show it.

    Args:
        do: does a job and returns the lines to print of it.
        header: line above all others, if there is one.

    Returns:
        0, or 1 if something was not done: that is named on stderr, and the others are done.
    """
    from tqdm import tqdm

    from sitlib.cli import sentence

    failed, kept, done = 0, [], 0
    with tqdm(
        total=len(jobs), unit="file", disable=True if len(jobs) == 1 else None, ncols=80
    ) as bar:
        for job in jobs:
            try:
                lines = do(job)
                for line in lines if done or header is None else [header, *lines]:
                    tqdm.write(line, file=sys.stdout)
                done += 1
            except KeptError as error:
                kept.append(str(error))
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                failed += 1
                tqdm.write(f"sit: {job.source}: {sentence(error)}", file=sys.stderr)
            bar.update()
    if kept:
        others = f" (so are those of {len(kept) - 1} other inputs)" if len(kept) > 1 else ""
        print(f"sit: {kept[0]}{others}", file=sys.stderr)
    if len(jobs) > 1 and done < len(jobs):
        print(f"sit: {done} of {len(jobs)} done", file=sys.stderr)
    return 0 if done == len(jobs) else 1
