"""Where the images of a data source lie: keys, classes and byte ranges, never pixels.

Shards follow the WebDataset convention (the files of a sample share the path up to the first dot of the file
name) and are read by offset, because webdataset itself only streams.
"""

import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

import numpy as np

from sitlib.data.decoding import IMAGE_SUFFIXES


class DataError(ValueError):
    """A data source that is not there, is empty, or lacks the split or the class that was asked for."""


@dataclass(frozen=True)
class Index:
    """Columns over samples. `spans` [n, 5] int64: file number, offset, size, offset and size of the record.

    Offsets and sizes are in bytes; size -1 means "to the end of the file", and record size -1 "no record".
    `class_of` holds a class name, a class number, or None. `problems` are (name, reason) of samples that
    cannot be used.
    """

    files: tuple[Path, ...]
    keys: list[str]
    suffixes: list[str]
    class_of: list[str | int | None]
    spans: np.ndarray
    problems: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, row: int) -> str:
        """What a message calls this image: the file, and for a shard the member."""
        file = self.files[self.spans[row, 0]]
        return (
            f"{file}: {self.keys[row]}.{self.suffixes[row]}"
            if self.spans[row, 2] >= 0
            else str(file)
        )

    def content(self, row: int) -> bytes:
        file, offset, size = self.spans[row, :3]
        with open(self.files[file], "rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def record(self, row: int) -> dict:
        """The JSON record of a sample; without one, where it comes from."""
        file, _, _, offset, size = self.spans[row]
        if size < 0:
            return {"key": self.keys[row], "file": str(self.files[file])}
        with open(self.files[file], "rb") as stream:
            stream.seek(offset)
            return json.loads(stream.read(size))

    def take(self, rows: Iterable[int]) -> "Index":
        """The same files and problems, fewer samples."""
        rows = np.asarray(list(rows), dtype=np.int64)
        keys, suffixes = ([column[row] for row in rows] for column in (self.keys, self.suffixes))
        class_of = [self.class_of[row] for row in rows]
        return Index(self.files, keys, suffixes, class_of, self.spans[rows], self.problems)


def join(parts: list[Index]) -> Index:
    """One index over the samples of all parts, in order."""
    files, keys, suffixes, class_of, spans, problems = (
        (),
        [],
        [],
        [],
        [np.empty((0, 5), np.int64)],
        (),
    )
    for part in parts:
        spans.append(part.spans + np.array([len(files), 0, 0, 0, 0]))
        files += part.files
        keys += part.keys
        suffixes += part.suffixes
        class_of += part.class_of
        problems += part.problems
    return Index(files, keys, suffixes, class_of, np.concatenate(spans), problems)


def index_images(paths: list[Path], class_of: list[str | None], keys: list[str]) -> Index:
    """Index of plain image files. The key of an image is its path relative to the data source."""
    spans = np.full((len(paths), 5), -1, np.int64)
    spans[:, 0], spans[:, 1] = np.arange(len(paths)), 0
    suffixes = [path.suffix.lower().lstrip(".") for path in paths]
    return Index(tuple(paths), list(keys), suffixes, list(class_of), spans)


def index_shard(path: Path) -> Index:
    """Index of a WebDataset .tar shard; a shard that did not change is read once in a process."""
    status = os.stat(path)
    return _index_shard(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8192)
def _index_shard(path: Path, mtime_ns: int, size: int) -> Index:
    keys, suffixes, class_of, spans, problems = [], [], [], [], []

    def finish(key: str, members: dict[str, tarfile.TarInfo]) -> None:
        pictures = [suffix for suffix in members if suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
        record = members.get("json")
        try:
            label = _class_of(tar, members)
        except ValueError as error:
            problems.append((f"{path}: {key}", str(error)))
            return
        if not pictures:
            problems.append(
                (f"{path}: {key}", f"no image among its files ({', '.join(sorted(members))})")
            )
            return
        picture = members[pictures[0]]
        keys.append(key)
        suffixes.append(
            sys.intern(pictures[0])
        )  # few different ones, which millions of samples share
        class_of.append(sys.intern(label) if isinstance(label, str) else label)
        where = (record.offset_data, record.size) if record else (-1, -1)
        spans.append((0, picture.offset_data, picture.size, *where))

    try:
        with tarfile.open(
            path, "r:"
        ) as tar:  # "r:" refuses compressed archives, which have no random access
            key, members = "", {}
            try:
                while (member := tar.next()) is not None:
                    # tarfile would keep every header
                    tar.members.clear()  # pyrefly: ignore[missing-attribute]
                    match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)
                    if not member.isreg() or not match:
                        continue
                    if match[1] != key and members:
                        finish(key, members)
                        members = {}
                    key = match[1]
                    members[match[2].lower()] = member
            finally:
                if members:
                    finish(key, members)
    except (tarfile.TarError, EOFError, OSError) as error:
        problems.append(
            (
                str(path),
                f"the archive cannot be read to its end ({error}); is it cut off or compressed?",
            )
        )
    places = np.array(spans, np.int64).reshape(-1, 5)
    return Index((path,), keys, suffixes, class_of, places, tuple(problems))


def _class_of(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str | int | None:
    """Class of a sample: its .cls file (number or name), or `class`, `label` or `cls` of its JSON record."""
    if "cls" in members:
        value = (
            cast(IO[bytes], tar.extractfile(members["cls"]))
            .read()
            .decode("utf-8", errors="replace")
            .strip()
        )
    elif "json" in members:
        try:
            record = json.loads(cast(IO[bytes], tar.extractfile(members["json"])).read())
        except ValueError as error:
            raise ValueError(f"its JSON record cannot be read ({error})") from None
        fields = record if isinstance(record, dict) else {}
        value = next((fields[name] for name in ("class", "label", "cls") if name in fields), None)
    else:
        return None
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if isinstance(value, int):
        return value if value >= 0 else None
    return value if isinstance(value, str) and value else None
