"""What a converted split consists of: `<split>.manifest.json` beside its shards."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sitlib.data.index import DataError

SUFFIX = ".manifest.json"


def manifest_file(folder: Path, split: str) -> Path:
    return folder / f"{split}{SUFFIX}"


def work_folder(folder: Path, split: str) -> Path:
    """What a conversion keeps beside its shards until it is finished."""
    return folder / f".{split}.unfinished"


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a file, whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def read_json(file: Path) -> dict[str, Any]:
    """Raises DataError where the file is no JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no JSON object.")
    return content


def sha256_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_shards(folder: Path) -> None:
    """Raises DataError where a conversion into `folder` is not finished, or a shard of a manifest is missing or cut off."""
    for work in sorted(folder.glob(".*.unfinished")):
        split = work.name[1:].removesuffix(".unfinished")
        if not manifest_file(folder, split).exists():
            raise DataError(
                f"The conversion of the split {split!r} in {folder} is not finished: give its command again and it goes on."
            )
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        for shard in shards_of(file):
            path = folder / shard["name"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                found = (
                    "is missing"
                    if size is None
                    else f"has {size} bytes in place of {shard['bytes']}"
                )
                raise DataError(
                    f"{path} {found}, by {file.name}: copy it again, or make the split again with sitlib.data.convert."
                )


def shards_of(file: Path) -> list[dict[str, Any]]:
    """The shards that a manifest lists: `name`, `images`, `bytes` and `sha256` of each."""
    shards = read_json(file).get("shards")
    if not isinstance(shards, list) or not all(
        {"name", "bytes", "sha256"} <= shard.keys() for shard in shards
    ):
        raise DataError(f"{file} is not a manifest of sitlib.data.convert.")
    return shards
