"""Where the images of a set lie: keys, classes and byte ranges, no pixels.

Shards follow the WebDataset convention. They are read by offset, because webdataset only streams.
"""

import json
import re
import sys
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sitlib.data.decode import IMAGE_SUFFIXES

THREADS = 16  # that read headers, to hide the latency of a network file system
MANIFEST_SUFFIX = ".manifest.json"  # of the file that sitlib.data.convert writes beside its shards


class DataError(ValueError):
    """A set of images that is missing, is empty, or lacks the split or the classes asked for."""


@dataclass(frozen=True)
class Index:
    """Samples of a split as columns.

    Attributes:
        class_of: class name, class number or None.
        spans: int64 [n, 5]: file number, offset and size of the image, offset and size of the JSON
            record; bytes. Size -1: to the end of the file; record size -1: no record.
        problems: (name, reason) of samples that cannot be used.
    """

    files: tuple[Path, ...]
    keys: list[str]
    class_of: list[str | int | None]
    spans: np.ndarray
    problems: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, row: int) -> str:
        """Name of an image in messages: its file, or the shard and the key."""
        path = self.files[self.spans[row, 0]]
        return str(path) if self.spans[row, 2] < 0 else f"{path}: {self.keys[row]}"

    def content(self, row: int) -> bytes:
        """Bytes of the image file."""
        return self._read(*self.spans[row, :3])

    def record(self, row: int) -> dict[str, Any]:
        """JSON record of a sample; of a plain file `key` and `file`."""
        file, _, _, offset, size = self.spans[row]
        if size < 0:
            return {"key": self.keys[row], "file": str(self.files[file])}
        return json.loads(self._read(file, offset, size))

    def take(self, rows: Iterable[int]) -> "Index":
        """Some samples, with the problems of all."""
        rows = np.fromiter(rows, np.int64)
        keys, class_of = ([column[r] for r in rows] for column in (self.keys, self.class_of))
        return Index(self.files, keys, class_of, self.spans[rows], self.problems)

    def _read(self, file: int, offset: int, size: int) -> bytes:
        with open(self.files[file], "rb") as stream:
            stream.seek(offset)
            return stream.read(size)


def index_files(paths: Sequence[Path], class_of: list, keys: list[str]) -> Index:
    """Index of plain image files."""
    spans = np.full((len(paths), 5), -1, np.int64)
    spans[:, 0], spans[:, 1] = np.arange(len(paths)), 0
    return Index(tuple(paths), keys, class_of, spans)


def index_shards(shards: Sequence[Path]) -> Index:
    """Index of WebDataset shards, in their order.

    A process walks over the headers of a shard once, unless the shard changes: about 90 us an image.
    """
    status = [shard.stat() for shard in shards]
    with ThreadPoolExecutor(THREADS) as pool:
        columns = pool.map(
            _read_headers, shards, [s.st_mtime_ns for s in status], [s.st_size for s in status]
        )
        keys, class_of, spans, problems = zip(*columns, strict=True)
    spans = [rows + [number, 0, 0, 0, 0] for number, rows in enumerate(spans)]
    keys, class_of, problems = (list(chain(*column)) for column in (keys, class_of, problems))
    return Index(tuple(shards), keys, class_of, np.concatenate(spans), tuple(problems))


@lru_cache(maxsize=8192)
def _read_headers(path: Path, mtime_ns: int, size: int) -> tuple[list, list, np.ndarray, list]:
    """Columns of one shard: keys, classes, spans with file number 0, problems."""
    keys, class_of, spans, problems = [], [], [], []
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        # "r:" refuses compressed archives, which have no random access.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # Files of a sample share the path up to the first dot of the file name.
                match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)
                if member.isreg() and match:
                    samples.setdefault(match[1], {})[match[2].lower()] = member
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = f"the archive cannot be read to its end ({error}); is it cut off or compressed?"
        problems.append((str(path), reason))
    with open(path, "rb") as stream:

        def content(member: tarfile.TarInfo | None) -> bytes:
            if member is None:
                return b""
            stream.seek(member.offset_data)
            return stream.read(member.size)

        for key, members in samples.items():
            record = members.get("json")
            images = [m for s, m in members.items() if s.rpartition(".")[2] in IMAGE_SUFFIXES]
            try:
                if not images:
                    raise ValueError(f"no image among its files ({', '.join(sorted(members))})")
                class_of.append(_class_of(content(members.get("cls")), content(record)))
            except ValueError as error:
                problems.append((f"{path}: {key}", str(error)))
                continue
            keys.append(key)
            record_span = (record.offset_data, record.size) if record else (-1, -1)
            spans.append((0, images[0].offset_data, images[0].size, *record_span))
    return keys, class_of, np.array(spans, np.int64).reshape(-1, 5), problems


def _class_of(cls: bytes, record: bytes) -> str | int | None:
    """Class of a sample: its .cls file, or `class`, `label` or `cls` of its JSON record."""
    value = cls.decode(errors="replace").strip()
    if not cls and record:
        fields = json.loads(record)
        if isinstance(fields, dict):
            value = next((fields[n] for n in ("class", "label", "cls") if n in fields), None)
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if isinstance(value, int):
        return value if value >= 0 else None
    # A million images share a thousand names.
    return sys.intern(value) if isinstance(value, str) and value else None


def check_manifests(folder: Path) -> list[dict[str, Any]]:
    """Shards of all manifests in `folder`: `name`, `images`, `bytes` and `sha256` of each.

    Raises:
        DataError: a conversion is not finished, or a shard is missing or has another size.
    """
    shards = []
    for file in sorted(folder.glob(f"*{MANIFEST_SUFFIX}")):
        try:
            manifest = json.loads(file.read_bytes())
            finished, bytes_of = (
                manifest["finished"],
                {s["name"]: s["bytes"] for s in manifest["shards"]},
            )
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file} is not a manifest of sitlib.data.convert.") from None
        if not finished:
            raise DataError(f"The conversion of {file} is not finished: give its command again.")
        for name, expected in bytes_of.items():
            path = folder / name
            if (actual := path.stat().st_size if path.exists() else 0) != expected:
                raise DataError(f"{path} has {actual} bytes, not {expected}: copy it again.")
        shards += manifest["shards"]
    return shards
