"""Files of the command `sit`: inputs, outputs that replace nothing, checkpoints by name."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sitlib.cli import sentence
from sitlib.files import DiskError, Model, atomic_write, load_model
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.pretrained import CHECKPOINT, PACKAGED, checkpoint_in
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.strict import nearest, require

KINDS = {SpectralTokenizer: "tokenizer", AutoregressiveModel: "autoregressive"}  # below models/
CODES, SUFFIX = ".safetensors", ".sit"  # of files of codes, of compressed images
# By suffix; icons have sizes of their own, whatever the image has.
FORMATS = {k: name for k, name in Image.registered_extensions().items() if name in Image.SAVE}
FORMATS = {k: name for k, name in FORMATS.items() if name not in ("ICO", "ICNS")}


class Jobs:
    """Input files, each with the output file that is made of it: `targets`.

    `photos/below/a.jpg` becomes `output/below/a.png`; of several inputs each folder keeps its name;
    the second of two files of one stem keeps its suffix. `file` is the only output, if -o names it.
    """

    def __init__(self, options: argparse.Namespace):
        """Find the inputs: files, and in folders all images, or all files of codes."""
        self.options, self.reserved = options, set()
        self.folder = Path(options.output)
        suffix = self.folder.suffix.lower()
        is_folder = options.output.endswith("/") or self.folder.is_dir()
        is_folder = is_folder or suffix[1:].isdecimal() or not suffix  # v1.5 is a folder
        endings = {"encode": CODES, "compress": SUFFIX, "evaluate": ".json"}
        ending = endings.get(options.command, ".png")
        written = FORMATS if ending == ".png" else {ending}
        if options.output == "-" or not is_folder and suffix not in written:
            kinds = f"a file such as name{ending}, or {options.output}/ for a folder of that name"
            raise argparse.ArgumentError(None, f"-o {options.output}: give {kinds}")
        if not is_folder and written is FORMATS:
            try:  # some formats of Pillow take no colors, or cannot be written on this machine
                Image.new("RGB", (8, 8)).save(BytesIO(), FORMATS[suffix])
            except (OSError, ValueError) as error:
                raise argparse.ArgumentError(None, f"-o {options.output}: {error}") from None
        self.file = None if is_folder else self.folder

        places: dict[Path, Path] = {}  # input file -> its place below the output folder
        inputs = [Path(name) for name in getattr(options, "inputs", [])]
        for path in inputs:
            is_folder = os.path.isdir(path)  # False where nobody may look: told when it is read
            found = self._inside(path) if is_folder else [path]
            root = path if is_folder and len(inputs) == 1 else path.parent
            places |= {file: file.relative_to(root) for file in found}
        if self.file and len(places) > 1:
            several = f"-o {self.file} names one file, but there are {len(places)} inputs"
            raise argparse.ArgumentError(None, several)
        self.inputs = {os.path.realpath(path) for path in places}  # also links that lead nowhere
        self.targets: dict[Path, Path] = {}
        for path, place in places.items():
            place = Path(os.fsencode(place).decode(errors="replace"))  # safetensors wants UTF-8
            target = self.folder / place.with_suffix(ending)
            if target in self.targets.values():
                target = self.folder / f"{place}{ending}"
            self.targets[path] = self.file or target

    def _inside(self, folder: Path) -> list[Path]:
        """Files below a folder, but for hidden ones and the outputs of an earlier run inside it."""
        from sitlib.data.decode import IMAGE_SUFFIXES, list_files  # sit sample needs none of it

        of_codes = {"decode": {CODES[1:]}, "decompress": {SUFFIX[1:]}}
        endings = of_codes.get(self.options.command, IMAGE_SUFFIXES)
        output, files = self.folder.resolve(), list_files(folder, endings)
        if folder.resolve() in output.parents:
            files = [file for file in files if output not in file.resolve().parents]
        listed = " or ".join(sorted(f".{ending}" for ending in endings))
        require(bool(files), f"In {folder} no file's name ends in {listed}.")
        return files

    def reserve(self, target: Path, *variants: str) -> list[Path]:
        """Reserve photo.png, or photo-a.png and photo-b.png for "a", "b", before it is made."""
        stem, suffix = target.stem, target.suffix
        paths = [target.with_name(f"{stem}-{variant}{suffix}") for variant in variants] or [target]
        for path in paths:
            if os.path.realpath(path) in self.inputs:
                require(suffix not in (CODES, SUFFIX), f"{path} is no image")
                raise ValueError(f"{path} would replace an input: name another folder with -o")
            if path in self.reserved:
                raise ValueError(f"{path} was just written for another input: use another folder")
            if path.is_dir() or any(above.is_file() for above in path.parents):
                taken = "a folder has its name, or a file that of its folder"
                raise ValueError(f"{path} cannot be written, as {taken}: name another with -o")
            if path.exists() and not self.options.overwrite:
                raise ValueError(f"{path} is there already; --overwrite replaces it")
        self.reserved.update(paths)
        return paths

    def run(self, work: Callable[[Path, Path], list[str]], *header: str) -> int:
        """Call `work(input, output)` for all, print its lines; 1 if one failed, else 0."""
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
            except (ValueError, OSError, MemoryError) as error:
                failed += 1
                said = sentence(error)
                said = said if said.startswith((f"{path} ", f"{path}: ")) else f"{path}: {said}"
                tqdm.write(f"sit: {said}", file=sys.stderr)
        if failed and count > 1:
            print(f"sit: {count - failed} of {count} done", file=sys.stderr)
        return min(failed, 1)


def row(*cells: object) -> str:
    """A line of a table; the last column, a file, may be of any length."""
    return "  ".join([*(f"{cell!s:>9}" for cell in cells[:-1]), str(cells[-1])])


def read_image(path: Path) -> Tensor:
    """Read an image of any format and size: uint8 [1, 3, H, W]."""
    from sitlib.data.decode import decode_image

    require(path.is_file(), "there is no such file")
    return decode_image(path, min_side=1)[None]


def to_bytes(strips: Iterable[Tensor]) -> Tensor:
    """An image in strips [1, 3, s, W] in [0, 1] as uint8 [1, 3, H, W], row after row in memory."""
    pixels, shape = bytearray(), []
    for strip in strips:  # kept in one piece, as many small ones would keep memory from the system
        rows = (strip[0].detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        pixels += rows.contiguous().numpy().tobytes()
        shape = [-1, *rows.shape[1:]]  # [H, W, 3]
    return torch.frombuffer(pixels, dtype=torch.uint8).view(shape).permute(2, 0, 1)[None]


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

    A run, with or without its seed, is in models/KIND of the current folder or of one above it, or
    is a model of this package.
    """
    path, here = Path(name), Path.cwd()
    folders = [above / "models" / kind for above in (here, *here.parents) for kind in kinds]
    runs = [folder / run for folder in folders for run in (name, f"{name}-seed0")]
    for file in (path, *(run / CHECKPOINT for run in (path, *runs, PACKAGED / name))):
        if file.is_file():
            return file
    if path.is_dir():
        return checkpoint_in(path)
    places = (*folders, PACKAGED)
    files = [file for folder in places for file in sorted(folder.glob(f"*/{CHECKPOINT}"))]
    known = list(dict.fromkeys(file.parent.name.removesuffix("-seed0") for file in files))
    there = f"there is {', '.join(known) or 'none yet'}{nearest(name, known)}"
    advice = "make repro trains the workbook's; the path of one does as well"
    raise ValueError(f"There is no checkpoint {name}, {there}; {advice}.")


def load_checkpoint(name: str, cls: type[Model], device: str | None) -> tuple[Model, Path]:
    """Load a tokenizer or a generator onto --device, by name or path; and say where it lies."""
    has_device = device != "cuda" or torch.cuda.is_available()
    require(has_device, "--device cuda: torch finds no GPU here; sit doctor says more.")
    path = find_checkpoint(name, KINDS[cls])
    return load_model(path, cls).to(device or best_device()).requires_grad_(False), path
