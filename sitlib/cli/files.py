"""Files of the command `sit`: inputs, outputs that replace nothing, checkpoints by name."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sitlib.cli import UsageError, sentence
from sitlib.data.decode import IMAGE_SUFFIXES, decode_image, list_files
from sitlib.files import DiskError, atomic_write, load_model, read_metadata
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import nearest

CHECKPOINT = "model.safetensors"
CODES = {".safetensors"}  # suffixes of files of codes
IMAGES = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
FORMATS = {k: name for k, name in Image.registered_extensions().items() if name in Image.SAVE}


class Jobs:
    """Input files, each with the output file that is made of it.

    `photos/below/a.jpg` becomes `output/below/a.png`; of several inputs each folder keeps its
    name; the second of two files of one stem keeps its suffix.

    Attributes:
        targets: input file -> output file.
        folder: folder of the outputs.
        file: the only output, where -o names a file; else None.
    """

    def __init__(self, options: argparse.Namespace, suffixes: set[str], ending: str = ".png"):
        """Find the inputs: files, and files with one of `suffixes` in folders.

        Raises:
            UsageError: -o names one file for several inputs, or of a kind that is not written.
            ValueError: a folder without such files.
        """
        self.overwrite, self.reserved = options.overwrite, set()
        self.folder = Path(options.output).expanduser()
        suffix = self.folder.suffix.lower()
        is_version = suffix[1:].isdecimal()
        is_folder = self.folder.is_dir() or options.output.endswith("/") or is_version
        if options.output == "-" or suffix not in {"", *FORMATS, *CODES} and not is_folder:
            kinds = f"name{ending}, or {options.output}/ for a folder of that name"
            raise UsageError(f"-o {options.output}: there is no such format; write {kinds}")
        self.file = None if is_folder or not suffix else self.folder
        if self.file and (suffix in CODES) != (ending in CODES):
            raise UsageError(f"-o {self.file}: this command writes files such as name{ending}")

        places: dict[Path, Path] = {}  # input file -> its place below the output folder
        inputs = [Path(name).expanduser() for name in getattr(options, "inputs", [])]
        for path in inputs:
            inside = self._search(path, suffixes) if path.is_dir() else [path]
            root = path.parent if len(inputs) > 1 or not path.is_dir() else path
            places |= {file: file.relative_to(root) for file in inside}
        if self.file and len(places) > 1:
            raise UsageError(f"-o {self.file} names one file, but there are {len(places)} inputs")
        self.inputs = {path.resolve() for path in places}
        self.targets: dict[Path, Path] = {}
        for path, place in places.items():
            place = Path(os.fsencode(place).decode(errors="replace"))  # safetensors wants UTF-8
            target = self.folder / place.with_suffix(ending)
            if target in self.targets.values():
                target = self.folder / f"{place}{ending}"
            self.targets[path] = self.file or target

    def _search(self, folder: Path, suffixes: set[str]) -> list[Path]:
        """Files below a folder, but for hidden ones and the outputs of an earlier run inside it."""
        output, files = self.folder.resolve(), list_files(folder, {s[1:] for s in suffixes})
        if folder.resolve() in output.parents:
            files = [file for file in files if output not in file.resolve().parents]
        if not files:
            raise ValueError(f"In {folder} no file's name ends in {' or '.join(sorted(suffixes))}.")
        return files

    def reserve(self, target: Path, *variants: str) -> list[Path]:
        """Reserve photo.png, or photo-a.png and photo-b.png for "a", "b", before it is made.

        Raises:
            ValueError: it is an input, was there before, or was reserved for another input.
        """
        stem, suffix = target.stem, target.suffix
        paths = [target.with_name(f"{stem}-{variant}{suffix}") for variant in variants] or [target]
        for path in paths:
            if path.resolve() in self.inputs:
                raise ValueError(f"{path} would replace an input: name another folder with -o")
            if path in self.reserved:
                raise ValueError(f"{path} was just written for another input: use another folder")
            if path.exists() and not self.overwrite:
                raise ValueError(f"{path} is there already; --overwrite replaces it")
        self.reserved.update(paths)
        return paths

    def run(self, work: Callable[[Path, Path], list[str]], *header: str) -> int:
        """Call `work(input, output)` for all; print the lines that it returns, below a header.

        Returns:
            0, or 1 if one failed: it is named on stderr, and the others are done.
        """
        if header:
            print(row(*header))
        failed, count = 0, len(self.targets)
        bar = tqdm(self.targets.items(), disable=True if count == 1 else None, ncols=80)
        for path, target in bar:
            try:
                for line in work(path, target):
                    tqdm.write(line)
            except BrokenPipeError:
                raise
            except DiskError as error:  # the next ones would find no room either
                bar.close()
                raise ValueError(str(error)) from None
            except (ValueError, OSError) as error:
                failed += 1
                tqdm.write(f"sit: {path}: {sentence(error)}", file=sys.stderr)
        if failed and count > 1:
            print(f"sit: {count - failed} of {count} done", file=sys.stderr)
        return min(failed, 1)


def row(*cells: object) -> str:
    """A line of a table; the last column, a file, may be of any length."""
    return "  ".join([*(f"{cell!s:>9}" for cell in cells[:-1]), str(cells[-1])])


def read_image(path: Path) -> Tensor:
    """Read an image of any format and size: uint8 [1, 3, H, W]."""
    if not path.is_file():
        raise ValueError("there is no such file")
    return decode_image(path, min_side=1)[None]


def to_bytes(strips: Iterable[Tensor]) -> Tensor:
    """An image in strips [1, 3, s, W] in [0, 1] as uint8 [1, 3, H, W], row after row in memory."""
    rows = [(strip[0].detach().cpu().clamp(0, 1) * 255).round().byte() for strip in strips]
    return torch.cat([row.permute(1, 2, 0) for row in rows]).permute(2, 0, 1)[None]


def write_image(path: Path, image: Tensor) -> None:
    """Write an image [3, H, W], uint8 or in [0, 1], in the format of the file's suffix."""
    image = to_bytes([image[None]])[0] if image.is_floating_point() else image
    with atomic_write(path) as partial:
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(partial, FORMATS[path.suffix.lower()])


def size_of(image: Tensor) -> str:
    """Width and height of an image [..., H, W], such as 64x48."""
    return f"{image.shape[-1]}x{image.shape[-2]}"


def find_checkpoint(name: str, *kinds: str) -> Path:
    """Find a checkpoint by its path, that of its folder, or the name of its run.

    Args:
        name: a path; or a run, with or without its seed, in models/KIND of the current folder or
            of one above it.
        kinds: "tokenizer", "autoregressive".

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    path, here = Path(name).expanduser(), Path.cwd()
    folders = [above / "models" / kind for above in (here, *here.parents) for kind in kinds]
    runs = [folder / run for folder in folders for run in (name, f"{name}-seed0")]
    for file in (path, *(run / CHECKPOINT for run in (path, *runs))):
        if file.is_file():
            return file
    files = [file for folder in folders for file in sorted(folder.glob(f"*/{CHECKPOINT}"))]
    trained = list(dict.fromkeys(file.parent.name.removesuffix("-seed0") for file in files))
    advice = "make tokenizer trains one in minutes, make repro trains all models"
    if trained:
        advice = f"trained are {', '.join(trained)}{nearest(name, trained)}"
    raise ValueError(f"There is no checkpoint {name}; {advice}. The path of one does as well.")


def pick_device(name: str | None) -> str:
    """Device of --device, by default the GPU if there is one, else the CPU."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch finds no GPU here; sit doctor says more.")
    return name or ("cuda" if has_gpu else "cpu")


def load_tokenizer(name: str, device: str | None) -> tuple[SpectralTokenizer, str]:
    """A tokenizer by name or path, and the name that its checkpoint gives it."""
    path = find_checkpoint(name, "tokenizer")
    tokenizer = load_model(path, SpectralTokenizer).to(pick_device(device))
    return tokenizer.requires_grad_(False), read_metadata(path).get("name", path.name)
