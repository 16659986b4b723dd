"""Image files: found in folders, and decoded to 8-bit RGB, or an error that says why not."""

import os
import warnings
from collections import Counter
from collections.abc import Container
from io import BytesIO
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

MIN_SIDE = 8  # px; smaller ones are tracking pixels and placeholders
IMAGE_SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"}
IMAGE_SUFFIXES |= {"ppm", "pgm", "pbm", "jp2", "avif"}


class DataError(ValueError):
    """A set of images that is missing, is empty, or lacks the split or the classes asked for."""


class ImageError(ValueError):
    """An image that cannot be used; the message gives the reason without the name of the file."""


def list_files(folder: Path, endings: Container[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files below a folder with such endings, by path, but for hidden ones; links are followed.

    One warning counts what is left out, by ending.

    Raises DataError: a folder cannot be read.
    """
    files, others = [], Counter[str]()

    def search(folder: str, above: frozenset[str]) -> None:
        here = above | {os.path.realpath(folder)}
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"The folder {folder} cannot be read ({error.strerror}).") from None
        for entry in entries:
            ending = entry.name.rpartition(".")[2].lower() if "." in entry.name else ""
            if entry.name.startswith("."):
                continue
            elif entry.is_dir():
                if os.path.realpath(entry.path) not in here:  # a link to a folder above
                    search(entry.path, here)
            elif not entry.is_file():  # which would hang or fail when it is opened
                others["broken links or pipes"] += 1
            elif ending in endings:
                files.append(Path(entry.path))
            else:
                others[f".{ending}" if ending else "without ending"] += 1

    search(str(folder), frozenset())
    if others:
        counts = ", ".join(f"{count} {ending}" for ending, count in others.most_common())
        warnings.warn(f"{folder} has files that are not read: {counts}", stacklevel=2)
    return files


def decode_rgb(source: bytes | str | PathLike, *, min_side: int = MIN_SIDE) -> Image.Image:
    """Decode an image file, given as a path or as its content, to a PIL image of mode RGB.

    Takes the first frame of an animation, turns it upright as EXIF says, composites transparency
    on white, scales 16-bit grey (65535 -> 255) and converts palette, grey, CMYK and YCbCr. Color
    profiles are not applied.

    Raises:
        ImageError: corrupt file, unknown format, a side below `min_side` pixels, more than about
            179 million pixels (Pillow's guard), or values of unknown range (32-bit, floating).
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            image = _to_rgb(opened)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason.split(" <_io.BytesIO")[0]  # Pillow prints the address of the buffer
        raise ImageError(f"it cannot be decoded ({reason})") from error
    if min(image.size) < min_side:
        raise ImageError(f"it has only {image.width}x{image.height} pixels, needs {min_side}")
    return image


def decode_image(source: bytes | str | PathLike, *, min_side: int = MIN_SIDE) -> torch.Tensor:
    """Decode an image file to uint8 RGB [3, H, W], 0..255; rules and errors of `decode_rgb`."""
    return rgb_to_tensor(decode_rgb(source, min_side=min_side))


def rgb_to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL image of mode RGB -> uint8 tensor [3, H, W] that owns its memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" in all byte orders; "I" also holds 16-bit values
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"its values {values.min()}..{values.max()} do not fit 16 bits")
        # Pillow's own conversion clips at 255.
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("its floating point values have no defined white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
