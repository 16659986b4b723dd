"""Indexes of large sets of shards, kept in the user's cache folder: reading a million headers takes minutes, reading their index seconds.

They do not lie beside the shards, because these may be on a disk that cannot be written to, and because a folder that DVC watches must not
change when it is read. Which file belongs to which shards follows from the names, sizes and times of the shards, so a stale one is never
used; and it appears under its name only when it is complete, so that many processes and machines may look for it at once.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from platformdirs import user_cache_path

from sitlib.data.index import Index, index_shard, join

CACHE_FROM = 256_000_000  # bytes of shards; less is indexed in a second or two
FORMAT = 1  # of the files, part of their names: an older one is not read
THREADS = 16  # read headers at once, which hides the waiting for a network file system


def index_shards(shards: Sequence[Path]) -> Index:
    """One index over WebDataset shards, in their order; read from the cache where a large set was indexed before."""
    if sum(shard.stat().st_size for shard in shards) < CACHE_FROM:
        return join([index_shard(shard) for shard in shards])
    file = cache_file(shards)
    with suppress(
        OSError, EOFError, ValueError, KeyError, BadZipFile
    ):  # not there, or damaged: made again
        return _read(file, shards)
    with ThreadPoolExecutor(THREADS) as pool:
        index = join(list(pool.map(index_shard, shards)))
    if not index.problems:  # what is wrong with a set should be said every time, until it is mended
        try:
            _write(file, index)
        except OSError as error:
            warnings.warn(
                f"the index of {shards[0].parent} cannot be kept in {file.parent} ({error}), so that it is made again next time",
                stacklevel=2,
            )
    return index


def cache_file(shards: Sequence[Path]) -> Path:
    """Where the index of these very shards is kept."""
    status = [(str(shard), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    name = sha256(json.dumps([FORMAT, status]).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return user_cache_path("sitlib") / "indexes" / f"{name}.npz"


def _write(file: Path, index: Index) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds, numbers = {}, {}
    for name, column in (
        ("suffixes", index.suffixes),
        ("class_of", index.class_of),
    ):  # few different values
        kinds[name] = list(dict.fromkeys(column))
        number_of = {value: number for number, value in enumerate(kinds[name])}
        numbers[name] = np.array([number_of[value] for value in column], np.int32)
    text = json.dumps({"keys": index.keys, **kinds}).encode()
    descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(stream, spans=index.spans, text=np.frombuffer(text, np.uint8), **numbers)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _read(file: Path, shards: Sequence[Path]) -> Index:
    with np.load(file, allow_pickle=False) as content:
        text = json.loads(content["text"].tobytes())
        suffixes, class_of = (
            [text[name][number] for number in content[name].tolist()]
            for name in ("suffixes", "class_of")
        )
        return Index(tuple(shards), text["keys"], suffixes, class_of, content["spans"])
