"""One shard of a conversion, and the processes that make several at once."""

import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_connections
from pathlib import Path
from typing import Any

from PIL import Image

from sitlib.data.decoding import IMAGE_SUFFIXES, ImageError, decode_rgb
from sitlib.data.index import DataError
from sitlib.data.manifest import read_json, sha256_of, write_json
from sitlib.data.originals import Columns, Original, read

QUALITY = 95  # of images that are made smaller, unless told otherwise


@dataclass(frozen=True)
class Settings:
    """What is done to the images.

    Attributes:
        per_shard: images of a shard.
        short_side: px; larger images are made as small (antialiased); None: they keep their size.
        quality: of JPEG; None: files stay as they are, but for those that are made smaller, which get 95.
    """

    per_shard: int = 1000
    short_side: int | None = None
    quality: int | None = None

    def __post_init__(self):
        if self.per_shard < 1:
            raise DataError(f"per_shard is {self.per_shard}; a shard needs at least one image.")
        if self.short_side is not None and self.short_side < 8:
            raise DataError(f"short_side is {self.short_side} px; at least 8 are needed.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}; JPEG has 1 to 100.")


@dataclass(frozen=True)
class Shard:
    """What a process needs to make one shard."""

    path: Path
    work: Path
    split: str
    originals: list[Original]
    columns: Columns | None
    class_names: list[str]
    settings: Settings

    @property
    def record(self) -> Path:
        return self.work / f"{self.path.stem}.json"


def is_finished(shard: Shard) -> bool:
    """Its record is written after it has got its name."""
    return (
        shard.record.exists()
        and shard.path.exists()
        and read_json(shard.record)["bytes"] == shard.path.stat().st_size
    )


def made(shards: Sequence[Shard], processes: int) -> Iterator[Shard]:
    """Makes shards, some at once, and yields each when it is finished."""
    if processes == 1:
        for shard in shards:
            make_shard(shard)
            yield shard
        return
    # Not forked from this process, so that they hold neither its lock nor its threads.
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload([__name__])  # imports once what all of them need
    with ProcessPoolExecutor(processes, context, initializer=_end_with_parent) as pool:
        waiting, running = list(reversed(shards)), {}
        try:
            while waiting or running:
                while (
                    waiting and len(running) < 2 * processes
                ):  # a plan of millions of images stays here
                    shard = waiting.pop()
                    running[pool.submit(make_shard, shard)] = shard
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield running.pop(future)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it went: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait_for_connections([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_shard(shard: Shard) -> None:
    """Writes one shard and then its record, each under its name only when it is complete."""
    partial = shard.work / f"{shard.path.name}.partial"
    images, skipped = 0, []
    try:
        with open(partial, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for original, content, problem in read(shard.originals, shard.columns):
                    try:
                        if content is None:
                            raise ImageError(problem)
                        suffix, content, size = _prepared(content, original.name, shard.settings)
                    except ImageError as error:
                        skipped.append([original.name, str(error)])
                        continue
                    record = _record(original, shard, size)
                    _add(tar, f"{record['key']}.{suffix}", content)
                    _add(
                        tar,
                        f"{record['key']}.json",
                        json.dumps(record, ensure_ascii=False).encode(),
                    )
                    images += 1
            stream.flush()
            os.fsync(stream.fileno())
        record = {"name": shard.path.name, "images": images, "bytes": partial.stat().st_size}
        record |= {"sha256": sha256_of(partial), "skipped": skipped}
        os.replace(partial, shard.path)
        write_json(shard.record, record)
    finally:
        partial.unlink(missing_ok=True)


def _record(original: Original, shard: Shard, size: tuple[int, int]) -> dict[str, Any]:
    label = original.label
    if isinstance(label, int) and label < len(shard.class_names):
        label = shard.class_names[label]
    record: dict[str, Any] = {
        "key": f"{original.number:09d}",
        "split": shard.split,
        "file": original.name,
        "class": label,
    }
    if original.captions:
        record["captions"] = list(original.captions)
    return record | {"size": list(size)}


def _prepared(content: bytes, name: str, settings: Settings) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes and size (width, height) of an image as it goes into a shard; ImageError where it cannot be decoded."""
    image = decode_rgb(content)
    short = min(image.size)
    is_smaller = settings.short_side is not None and short > settings.short_side
    if not is_smaller and settings.quality is None:
        return _suffix(content, name), content, image.size
    if is_smaller:
        assert settings.short_side is not None
        size = [max(1, round(side * settings.short_side / short)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=settings.quality or QUALITY)
    return "jpg", file.getvalue(), image.size


def _suffix(content: bytes, name: str) -> str:
    """By the content: Parquet files have no names, and others lie."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format is not None
        suffix = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}.get(
            image.format, image.format.lower()
        )
    return suffix if suffix in IMAGE_SUFFIXES else Path(name).suffix.lower().lstrip(".") or "jpg"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a member whose header says nothing of when and by whom it was written."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
