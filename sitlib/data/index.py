"""Where the images of a data source lie: keys, classes and byte ranges, no pixels.

Shards follow the WebDataset convention. They are read by offset, because webdataset only streams.
"""

import hashlib
import json
import re
import sys
import tarfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from platformdirs import user_cache_path

from sitlib.data.decode import IMAGE_SUFFIXES
from sitlib.files import DiskError, atomic_write

CACHE_INDEX_FROM = 256_000_000  # bytes of shards; less is indexed in a second or two
INDEX_THREADS = 16  # hide the latency of a network file system
MANIFEST_SUFFIX = ".manifest.json"  # of what `sitlib.data.convert` writes beside its shards


class DataError(ValueError):
    """A data source that is missing, is empty, or lacks the split or the classes asked for."""


@dataclass(frozen=True)
class Index:
    """Samples of a split as columns; no pixels.

    Attributes:
        spans: int64 [n, 5]: file number, offset, size, offset and size of the JSON record; bytes.
            Size -1: to the end of the file; record size -1: no record.
        class_of: class name, class number or None.
        problems: (name, reason) of samples that cannot be used.
    """

    files: tuple[Path, ...]
    keys: list[str]
    class_of: list[str | int | None]
    spans: np.ndarray
    problems: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, row: int) -> Path:
        """The image file, or the shard."""
        return self.files[self.spans[row, 0]]

    def name(self, row: int) -> str:
        """Name of an image in messages: its file, or the shard and the key."""
        path = self.path(row)
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
        """Fewer samples of the same files, with the same problems."""
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
    """Index of WebDataset shards in their order; that of a large set is kept in the user's cache.

    Reading a million headers takes minutes, their index less than a second. It does not lie beside
    the shards, which may be read-only, and which DVC watches.
    """
    if sum(shard.stat().st_size for shard in shards) < CACHE_INDEX_FROM:
        return _join([index_shard(shard) for shard in shards])
    file = index_cache_file(shards)
    damaged = (OSError, EOFError, ValueError, KeyError, BadZipFile)
    with suppress(*damaged), np.load(file, allow_pickle=False) as content:
        keys, class_of = json.loads(content["text"].tobytes())
        # A million images share a thousand classes.
        class_of = [sys.intern(c) if isinstance(c, str) else c for c in class_of]
        return Index(tuple(shards), keys, class_of, content["spans"])
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        index = _join(list(pool.map(index_shard, shards)))
    if not index.problems:  # these should be said every time, until they are mended
        text = np.frombuffer(json.dumps([index.keys, index.class_of]).encode(), np.uint8)
        try:
            with atomic_write(file, shared=True) as partial, open(partial, "wb") as stream:
                np.savez(stream, spans=index.spans, text=text)
        except DiskError as error:
            warnings.warn(f"the index of {shards[0].parent} is not kept: {error}", stacklevel=2)
    return index


def index_cache_file(shards: Sequence[Path]) -> Path:
    """File for the index of these very shards, by their names, sizes and times."""
    status = [(str(s.absolute()), s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    name = hashlib.sha256(json.dumps(status).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return user_cache_path("sitlib") / "indexes" / f"{name}-2.npz"  # format 2


def index_shard(path: Path) -> Index:
    """Index of one shard; a shard that did not change is read once in a process."""
    status = path.stat()
    return _index_shard(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8192)
def _index_shard(path: Path, mtime_ns: int, size: int) -> Index:
    keys, class_of, spans, problems = [], [], [], []

    def finish(key: str, members: dict[str, tarfile.TarInfo]) -> None:
        try:
            label = _class_of(tar, members)
            suffixes = [s for s in members if s.rpartition(".")[2] in IMAGE_SUFFIXES]
            if not suffixes:
                raise ValueError(f"no image among its files ({', '.join(sorted(members))})")
        except ValueError as error:
            problems.append((f"{path}: {key}", str(error)))
            return
        image, record = members[suffixes[0]], members.get("json")
        keys.append(key)
        class_of.append(sys.intern(label) if isinstance(label, str) else label)
        record_span = (record.offset_data, record.size) if record else (-1, -1)
        spans.append((0, image.offset_data, image.size, *record_span))

    try:
        # "r:" refuses compressed archives, which have no random access.
        with tarfile.open(path, "r:") as tar:
            key, members = "", {}
            try:
                while (member := tar.next()) is not None:
                    # tarfile would keep every header
                    tar.members.clear()  # pyrefly: ignore[missing-attribute]
                    # Files of a sample share the path up to the first dot of the file name.
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
        reason = f"the archive cannot be read to its end ({error}); is it cut off or compressed?"
        problems.append((str(path), reason))
    places = np.array(spans, np.int64).reshape(-1, 5)
    return Index((path,), keys, class_of, places, tuple(problems))


def _class_of(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str | int | None:
    """Class of a sample: its .cls file, or `class`, `label` or `cls` of its JSON record."""

    def content(suffix: str) -> bytes:
        file = tar.extractfile(members[suffix])
        assert file is not None
        return file.read()

    value = None
    if "cls" in members:
        value = content("cls").decode("utf-8", errors="replace").strip()
    elif "json" in members:
        try:
            record = json.loads(content("json"))
        except ValueError as error:
            raise ValueError(f"its JSON record cannot be read ({error})") from None
        if isinstance(record, dict):
            value = next((record[n] for n in ("class", "label", "cls") if n in record), None)
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if isinstance(value, int):
        return value if value >= 0 else None
    return value if isinstance(value, str) and value else None


def _join(indexes: list[Index]) -> Index:
    spans: list[np.ndarray] = [np.empty((0, 5), np.int64)]
    files, keys, class_of, problems = (), [], [], ()
    for index in indexes:
        spans.append(index.spans + [len(files), 0, 0, 0, 0])
        files += index.files
        keys += index.keys
        class_of += index.class_of
        problems += index.problems
    return Index(files, keys, class_of, np.concatenate(spans), problems)


def check_manifests(folder: Path) -> list[dict[str, Any]]:
    """Shards of all manifests in `folder`: `name`, `images`, `bytes` and `sha256` of each.

    Raises:
        DataError: a conversion is not finished, or a shard is missing or has another size.
    """
    for work in sorted(folder.glob(".*.unfinished")):
        split = work.name[1:].removesuffix(".unfinished")
        if not (folder / f"{split}{MANIFEST_SUFFIX}").exists():
            raise DataError(
                f"The conversion of the split {split!r} in {folder} is not finished: give its "
                "command again and it goes on."
            )
    shards = []
    for file in sorted(folder.glob(f"*{MANIFEST_SUFFIX}")):
        try:
            shards_of_split = json.loads(file.read_bytes())["shards"]
            sizes = {folder / shard["name"]: shard["bytes"] for shard in shards_of_split}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file} is not a manifest of sitlib.data.convert.") from None
        for path, size in sizes.items():
            actual = path.stat().st_size if path.exists() else None
            if actual != size:
                state = "is missing" if actual is None else f"has {actual} bytes, not {size}"
                raise DataError(
                    f"{path} {state}, by {file.name}: copy it again, or make the split again with "
                    "sitlib.data.convert."
                )
        shards += shards_of_split
    return shards
