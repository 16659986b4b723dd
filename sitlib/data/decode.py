"""Image files, in folders or in WebDataset shards: found, and decoded to 8-bit sRGB."""

import json
import os
import re
import sys
import tarfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps
from torch import Tensor, from_numpy

STRIP = 1024  # rows of pixels at a time
MIN_SIDE = 8  # px; smaller ones are tracking pixels and placeholders
IMAGE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")
IMAGE_SUFFIXES += ("ppm", "pgm", "pbm", "jp2", "avif")
MAX_NAMED = 20  # images that a warning names
PROFILE = "icc_profile"  # name of the color profile in the `info` of Pillow's images


class DataError(ValueError):
    """A set of images that is missing, is empty, or lacks the split or the classes asked for."""


class ImageError(ValueError):
    """An image that cannot be used; the message gives the reason without the name of the file."""


class Sample(NamedTuple):
    """Where an image lies: a file, or byte ranges of a shard."""

    key: str  # of the sample in its shard, or the path in the image folder
    class_name: str | None  # a number as text
    path: Path
    offset: int = 0
    size: int = -1  # to the end of the file
    json_offset: int = 0
    json_size: int = 0

    def __str__(self) -> str:
        return str(self.path) if self.size < 0 else f"{self.path}: {self.key}"

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the file."""
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def decode(self) -> Image.Image | str:
        """The image, or the reason why it cannot be used."""
        try:
            return decode_rgb(self.read(self.offset, self.size))
        except (ImageError, OSError) as error:
            return str(error)

    def record(self) -> dict[str, Any]:
        """JSON record; of a plain file `key` and `file`."""
        if not self.json_size:
            return {"key": self.key, "file": str(self.path)}
        return json.loads(self.read(self.json_offset, self.json_size))


# -- decoding ----------------------------------------------------------------------------------


def decode_image(source: bytes | str | PathLike, *, min_side: int = MIN_SIDE) -> Tensor:
    """Decode an image to uint8 RGB [3, H, W] as `decode_rgb` does; warn of a broken profile."""
    image = decode_rgb(source, min_side=min_side)
    if PROFILE in image.info:
        warnings.warn("its color profile is broken; the colors are taken as sRGB", stacklevel=2)
    return rgb_to_tensor(image)


def rgb_to_tensor(image: Image.Image) -> Tensor:
    """PIL image of mode RGB -> uint8 tensor [3, H, W] that owns its memory."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    # Of all rows at once Pillow makes two more copies.
    for top in range(0, image.height, STRIP):
        box = (0, top, image.width, min(top + STRIP, image.height))
        pixels[top : top + STRIP] = np.asarray(image.crop(box))
    return from_numpy(pixels).permute(2, 0, 1)


def decode_rgb(source: bytes | str | PathLike, *, min_side: int = MIN_SIDE) -> Image.Image:
    """Decode an image file, given as a path or as its content, to a PIL image of mode RGB, in sRGB.

    Takes the first frame of an animation, turns it upright as EXIF says, applies its color profile,
    composites transparency on white, scales 16-bit grey (65535 -> 255) and converts palette, grey,
    CMYK and YCbCr. A profile that cannot be applied is ignored, and all that is left in `info`.
    ImageError for what cannot be used.
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
        reason = re.sub("(?<=cannot identify image file) .*", "", reason)  # its name
        raise ImageError(f"it cannot be decoded ({reason})") from error
    if min(image.size) < min_side:
        raise ImageError(f"it has only {image.width}x{image.height} pixels, needs {min_side}")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow knows the colors of LAB itself.
    profile, alpha = image.info.get(PROFILE) if image.mode != "LAB" else None, None
    info: dict[str | tuple[int, int], Any] = {}
    is_grey = image.mode != "P" and Image.getmodebase(image.mode) == "L"
    if image.mode.startswith("I"):  # "I;16" in all byte orders; "I" also holds 16-bit values
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"its values {values.min()}..{values.max()} do not fit 16 bits")
        # Pillow's own conversion clips at 255.
        clear = image.info.get("transparency")  # a value of 16 bits
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(((values != clear) * 255).astype(np.uint8)))
    if image.mode == "F":
        raise ImageError("its floating point values have no defined white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if profile:  # of the colors before they are mixed with white
        fitting = ["CMYK"] if image.mode == "CMYK" else ["RGB", "L"] if is_grey else ["RGB"]
        try:
            mode, to_srgb = _read_profile(profile)
            if mode not in fitting:
                raise ValueError(f"it describes {mode} images")
            if to_srgb:
                rgb = to_srgb.apply(image if mode == "CMYK" else rgb.convert(mode))
        except Exception:  # ImageCms raises several
            info = {PROFILE: profile}
    if alpha is not None:
        rgb.putalpha(alpha)
        white = Image.new("RGBA", rgb.size, "white")
        white.alpha_composite(rgb)
        rgb = white.convert("RGB")
    rgb.info = info
    return rgb


@lru_cache(maxsize=16)  # a set has few, and reading one takes longer than an image
def _read_profile(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Mode of the images that a color profile describes, and their conversion to sRGB, if any."""
    opened = ImageCms.ImageCmsProfile(BytesIO(profile))
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[opened.profile.xcolor_space.strip()]
    spaces, fine = (opened, ImageCms.createProfile("sRGB")), ImageCms.Flags.HIGHRESPRECALC
    to_srgb = ImageCms.buildTransform(*spaces, mode, "RGB", flags=fine)
    if mode == "RGB":  # most are of sRGB itself, and change nothing but roundings
        colors = (np.indices((9, 9, 9)) * 31).astype(np.uint8).reshape(3, 27, 27).transpose(1, 2, 0)
        changed = np.asarray(to_srgb.apply(Image.fromarray(colors))).astype(int)
        to_srgb = to_srgb if np.abs(changed - colors).max() > 2 else None
    return mode, to_srgb


# -- folders and shards ------------------------------------------------------------------------


def list_files(folder: Path, endings: Container[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files below a folder with such endings, by path, but for hidden ones; links are followed."""
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
            elif os.path.isdir(entry.path):
                if os.path.realpath(entry.path) not in here:  # a link to a folder above
                    search(entry.path, here)
            elif not os.path.isfile(entry.path):  # which would hang or fail when it is opened
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


def read_shards(shards: list[Path]) -> list[Sample]:
    """Samples of shards, in their order. Warns of those without an image.

    They are read by offset, because webdataset only streams. A process walks over the headers of a
    shard once, unless it changes: about 90 us an image.
    """
    status = [shard.stat() for shard in shards]
    times, sizes = [s.st_mtime_ns for s in status], [s.st_size for s in status]
    with ThreadPoolExecutor(16) as pool:  # which hide the latency of a network file system
        return list(chain(*pool.map(_read_headers, shards, times, sizes)))


@lru_cache(maxsize=8192)
def _read_headers(path: Path, mtime_ns: int, size: int) -> list[Sample]:
    problems, members_of = [], defaultdict(dict)
    try:
        # "r:" refuses compressed archives, which have no random access.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # Files of a sample share the path up to the first dot of the file name.
                match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)
                if not match or member.isdir():
                    continue
                members, ending = members_of[match[1]], match[2].lower()
                if ending in members or not member.isreg():
                    problems.append(f"{member.name} is there twice, or is a link")
                else:
                    members[ending] = member.offset_data, member.size
    except (tarfile.TarError, EOFError, OSError) as error:
        problems.append(f"it cannot be read to its end ({error}); is it cut off or compressed?")
    samples = []
    for key, members in members_of.items():
        images = [span for s, span in members.items() if s.rpartition(".")[2] in IMAGE_SUFFIXES]
        try:
            if not images:
                raise ValueError(f"no image among its files ({', '.join(sorted(members))})")
            sample = Sample(key, None, path, *images[0], *members.get("json", ()))
            samples.append(sample._replace(class_name=_class_of(sample, members.get("cls"))))
        except (ValueError, AttributeError, RecursionError) as error:
            problems.append(f"{key}: {error}")
    if problems:
        message = f"{path} has unusable samples: {'; '.join(problems[:MAX_NAMED])}"
        warnings.warn(message, stacklevel=2)
    return samples


def _class_of(sample: Sample, cls: tuple[int, int] | None) -> str | None:
    """Class of a sample: its .cls file, or `class`, `label` or `cls` of its JSON record."""
    record = {"cls": sample.read(*cls).decode(errors="replace")} if cls else sample.record()
    values = [record.get(name) for name in ("class", "label", "cls")]
    value = next((value for value in values if value is not None), "")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"its class {value!r} is neither a text nor a whole number")
    name = str(value).strip()
    # Negative numbers mean "unknown". A million images share a thousand names.
    return None if re.fullmatch(r"|-\d+", name) else sys.intern(name)
