"""Images -> WebDataset shards: `python -m sitlib.data.convert SOURCE OUTPUT --split train`.

Shards are written one after the other, and which image lies where follows from the names of all. So
a conversion that was killed goes on when its command is given again, to the very bytes of one that
was not. `--verify` compares all shards with the checksums in the manifest.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from sitlib.data.captions import coco_split
from sitlib.data.decode import IMAGE_SUFFIXES, MIN_SIDE, DataError, ImageError, decode_rgb
from sitlib.data.images import MANIFEST_SUFFIX, check_manifests, find_split
from sitlib.files import DiskError, atomic_write, read_json, sha256_of, write_json

SUFFIXES = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "tiff": "tif"}  # else Pillow's format

# Key, name, class, captions and content of every image in the order of the shards; how many; and
# a fingerprint of them all
Originals = tuple[Iterator[tuple[str, str, Any, list[str], Any]], int, str]


def convert(
    source: str | Path,
    output: str | Path,
    split: str,
    *,
    captions: str | Path | None = None,
    per_shard: int = 1000,
    short_side: int | None = None,
) -> dict[str, Any]:
    """Write one split of `source` as shards `<split>-NNNNN.tar` and a manifest, which is returned.

    A sample is an image and a JSON record: `key`, `split`, `file` (name in the source), `class` (or
    null), `captions` (may be empty), `size` (width, height). `source` is an image folder as for
    `open_images`, or has Parquet files named by split. Images whose short side is above
    `short_side` px are made as small; others stay as files. After a DiskError the same call goes
    on.
    """
    are_named = str(source).strip() and str(output).strip()  # no unset variables of a shell
    if not are_named or per_shard < 1 or (short_side is not None and short_side < MIN_SIDE):
        given = f"source {str(source)!r}, output {str(output)!r}, per_shard {per_shard}, short_side"
        least = f"name two folders, and at least 1 image and {MIN_SIDE} px"
        raise DataError(f"{given} {short_side}: {least}.")
    source, output = Path(source).expanduser().resolve(), Path(output).expanduser()
    if output.resolve() in (source, source.parent):  # shards would hide the folders beside them
        raise DataError(f"{output} holds the images themselves: choose another output.")
    tables = sorted(source.rglob("*.parquet"))
    tables = [table for table in tables if split in re.split(r"[-_.]", table.stem)]
    listed = _list_parquet(tables) if tables else _list_files(source, split, captions)
    originals, total, fingerprint = listed
    plan = {"split": split, "per_shard": per_shard, "short_side": short_side}
    plan |= {"images": total, "fingerprint": fingerprint}
    file = output / f"{split}{MANIFEST_SUFFIX}"
    if not file.exists():
        if foreign := sorted(output.glob(f"{split}-*.tar")):
            raise DataError(f"{foreign[0]} has no manifest beside it: choose another output.")
        write_json(file, {"finished": False, "plan": plan, "shards": [], "skipped": []})
    manifest = read_json(file)
    if manifest["plan"] != plan:
        other = f"{file} is of other settings or images ({manifest['plan']}, now {plan})"
        raise DataError(f"{other}: choose another output, or remove its split {split!r}.")
    numbers = range(len(manifest["shards"]), -(-total // per_shard))
    originals = islice(originals, numbers.start * per_shard, None)
    sample = partial(_sample, split=split, short_side=short_side)
    # Pillow decodes without Python's lock, so that threads suffice.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number in tqdm(numbers, f"converting {split}", unit="shard"):
            samples = pool.map(sample, islice(originals, per_shard))
            path = output / f"{split}-{number:05d}.tar"
            manifest["shards"].append(_write_shard(path, samples, manifest["skipped"]))
            manifest["finished"] = number == numbers[-1]
            write_json(file, manifest)
    return manifest


def _list_files(source: Path, split: str, captions: str | Path | None) -> Originals:
    """Images of a folder, in the order of a hash of their names, which mixes the classes."""
    listed = coco_split(source, split, captions) if captions else (find_split(source, split)[0], {})
    samples, captions_of = listed
    if not samples or samples[0].size >= 0:
        raise DataError(f"{source} has no image files: it is empty, or consists of shards already.")
    originals = [
        (f"{row:09d}", s.key, s.class_name, captions_of.get(s.key, []), s.path)
        for row, s in enumerate(samples)
    ]
    about = [(name, path.stat().st_size, *more) for _, name, *more, path in originals]
    ordered = sorted(originals, key=lambda original: _hash(original[1]))
    return iter(ordered), len(originals), _hash(about)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _list_parquet(files: list[Path]) -> Originals:
    """Images of Parquet files in their order."""
    try:
        from pyarrow.parquet import ParquetFile

        tables = [ParquetFile(file) for file in files]
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"Reading {files[0]} needs pyarrow, and a whole file: {error}.") from None
    schema = tables[0].schema_arrow
    present = [name for name in ("image", "label", "caption") if name in schema.names]
    if "image" not in present:
        raise DataError(f"{files[0]} has no column 'image', only {schema.names}.")
    # As Hugging Face writes the names of classes
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = (about.get("info", {}).get("features", {}).get("label") or {}).get("names") or []
    name_of = dict(enumerate(names))

    def rows() -> Iterator:
        batches = (batch for table in tables for batch in table.iter_batches(64, columns=present))
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            image, label, texts = row["image"], row.get("label"), row.get("caption") or []
            texts = [texts] if isinstance(texts, str) else texts
            texts = [" ".join(text.split()) for text in texts if text]
            content = image.get("bytes") if isinstance(image, dict) else image
            yield f"{number:09d}", f"row {number}", name_of.get(label, label), texts, content

    fingerprint = _hash([(file.name, file.stat().st_size) for file in files])
    return rows(), sum(table.metadata.num_rows for table in tables), fingerprint


def _sample(original: tuple, split: str, short_side: int | None) -> tuple[dict, str, bytes]:
    """Record, suffix and image file of a sample; of a bad one the reason and no file."""
    key, name, label, captions, content = original
    record = {"key": key, "split": split, "file": name, "class": label, "captions": captions}
    try:
        content = content.read_bytes() if isinstance(content, Path) else content or b""
        image = decode_rgb(content)  # also where it stays as it is: damaged images are left out
        # By the content: Parquet files have no names, and others lie.
        suffix = str(Image.open(io.BytesIO(content)).format).lower()
        suffix = SUFFIXES.get(suffix, suffix if suffix in IMAGE_SUFFIXES else "jpg")
        if short_side is not None and (short := min(image.size)) > short_side:
            size = [round(side * short_side / short) for side in image.size]
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            file, suffix = io.BytesIO(), "jpg"
            image.save(file, "JPEG", quality=95)  # OSError above 65,500 px
            content = file.getvalue()
    except (ImageError, OSError) as error:
        return record, str(error), b""
    return record | {"size": image.size}, suffix, content


def _write_shard(path: Path, samples: Iterator[tuple], skipped: list) -> dict[str, Any]:
    """Write a shard; return its entry for the manifest. Bad samples are added to `skipped`."""
    images = 0
    # Two processes that convert the same images write the same bytes, each to a file of its own.
    with atomic_write(path, shared=True) as file, tarfile.open(file, "w") as tar:
        for record, suffix, content in samples:
            if not content:
                skipped.append([record["file"], suffix])
                continue
            images += 1
            text = json.dumps(record).encode()  # ASCII: names need not be UTF-8
            for ending, data in ((suffix, content), ("json", text)):
                member = tarfile.TarInfo(f"{record['key']}.{ending}")  # no time, no owner
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    size, sha256 = path.stat().st_size, sha256_of(path)
    return {"name": path.name, "images": images, "bytes": size, "sha256": sha256}


def verify(folder: str | Path) -> int:
    """Number of shards in the manifests of `folder`; DataError if one is missing or changed."""
    shards = check_manifests(Path(folder).expanduser()) if str(folder).strip() else []
    if not shards:
        raise DataError(f"There is no manifest (*{MANIFEST_SUFFIX}) in {str(folder)!r}.")
    folder = Path(folder).expanduser()
    for shard in tqdm(shards, f"checking {folder.name}", unit="shard"):
        if sha256_of(folder / shard["name"]) != shard["sha256"]:
            raise DataError(f"{folder / shard['name']} differs from its checksum: copy it again.")
    return len(shards)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sitlib.data.convert", description=__doc__)
    parser.add_argument("source", help="image folder (split/class/name.jpg) or Parquet files")
    parser.add_argument("output", nargs="?", help="folder of the shards")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--verify", action="store_true", help="only check the shards in SOURCE")
    parser.add_argument("--captions", help="COCO captions file of the images, with {split}")
    parser.add_argument("--per-shard", type=int, default=1000, help="images; default: 1000")
    parser.add_argument("--short-side", type=int, help="make larger images as small, in px")
    arguments = vars(parser.parse_args())
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if arguments.pop("verify"):
            print(f"all {verify(arguments['source'])} shards are as they were written")
            return
        manifest = convert(**arguments | {"output": arguments["output"] or ""})
    except (DataError, DiskError) as error:
        sys.exit(str(error))
    images, skipped = sum(s["images"] for s in manifest["shards"]), manifest["skipped"]
    print(f"{images} images in {len(manifest['shards'])} shards, {len(skipped)} skipped")
    print(*skipped[:5], sep="\n")


if __name__ == "__main__":
    main()
