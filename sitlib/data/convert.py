"""Images -> WebDataset shards: `python -m sitlib.data.convert SOURCE OUTPUT --split train`.

The images of a shard follow from the names of all images, and a shard has its name only when it is
complete. So a conversion that was killed goes on when its command is given again, to the very
bytes of one that was not. `--verify` compares all shards with the checksums in the manifest.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from sitlib.data.captions import coco_split
from sitlib.data.decode import IMAGE_SUFFIXES, MIN_SIDE, ImageError, decode_rgb
from sitlib.data.images import STAND_INS, find_split
from sitlib.data.index import MANIFEST_SUFFIX, DataError, check_manifests
from sitlib.files import DiskError, atomic_write, read_json, sha256_of, write_json

QUALITY = 95  # of JPEGs of images that are made smaller, unless told otherwise
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # else the format


class Original(NamedTuple):
    """One image where it lies; label and captions of Parquet rows come with their content."""

    number: int  # in the source
    name: str
    path: Path
    label: str | int | None = None
    captions: tuple[str, ...] = ()
    group: int = 0  # row group of a Parquet file
    row: int = 0  # in its row group


@dataclass
class Originals:
    """All images of a split in the order of the shards, a pure function of their names."""

    images: list[Original]
    fingerprint: str  # changes with names, sizes, labels and captions
    columns: dict[str, str | None] = field(default_factory=dict)  # of Parquet files
    class_names: list[str] = field(default_factory=list)  # of the numbers in a Parquet column


def convert(
    source: str | Path,
    output: str | Path,
    split: str,
    *,
    captions: str | Path | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    per_shard: int = 1000,
    short_side: int | None = None,
    quality: int | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Write one split of `source` as shards `<split>-NNNNN.tar` and a manifest to `output`.

    A sample is an image and a JSON record: `key`, `split`, `file` (name in the source), `class`
    (name, number or null), `captions` where there are some, `size` (width, height). An image that
    cannot be decoded is left out and named in the manifest.

    Args:
        source: image folder as for `open_images`, a folder of Parquet files named by split
            (`train-00000-of-00294.parquet`), or one such file.
        captions: a COCO captions file, as for `open_captioned`.
        image_column, label_column, caption_column: of Parquet files; a column `label` is used
            where there is one.
        short_side: px; larger images are made as small (antialiased).
        quality: of JPEG; None: files stay as they are, but for those that are made smaller.
        workers: threads, one shard each; the result does not depend on it.

    Returns:
        The manifest.

    Raises:
        DataError: wrong arguments, no image, another process converts the split, or `output` has
            the split with other settings or from other images.
        DiskError: the disk is full. Finished shards stay, and the same call goes on from there.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    limits = {"workers": (workers, 1), "per_shard": (per_shard, 1), "quality": (quality, 1)}
    for name, (value, least) in {**limits, "short_side": (short_side, MIN_SIDE)}.items():
        if value is not None and value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}.")
    if quality is not None and quality > 100:
        raise DataError(f"quality is {quality}; JPEG has 1 to 100.")
    if not split.isalnum():
        raise DataError(f"The split {split!r} becomes a part of file names: use letters or digits.")
    columns = {"image": image_column, "label": label_column, "caption": caption_column}
    files = _parquet_files(source, split)
    if files and captions:
        raise DataError("Captions of Parquet files are in a column: name it by --caption-column.")
    originals = _list_parquet(files, columns) if files else _list_files(source, split, captions)
    if not originals.images:
        raise DataError(f"There is no image for the split {split!r} in {source}.")
    plan = {"split": split, "per_shard": per_shard, **originals.columns}
    plan |= {"short_side": short_side, "quality": quality, "images": len(originals.images)}
    plan |= {"fingerprint": originals.fingerprint, "pillow": PIL.__version__}
    if short_side is None and quality is None:
        del plan["pillow"]  # another one may write other bytes, and writes none here

    manifest_file = output / f"{split}{MANIFEST_SUFFIX}"
    work = output / f".{split}.unfinished"
    foreign = sorted(output.glob(f"{split}-*.tar"))
    for file in (manifest_file, work / "plan.json"):
        if file.exists():
            foreign = []
            before = read_json(file).get("plan", {})
            changes = [
                f"{name} was {before.get(name)}, is {plan.get(name)}"
                for name in {**before, **plan}
                if before.get(name) != plan.get(name)
            ]
            if changes:
                raise DataError(
                    f"{file} is of other settings or other images ({'; '.join(changes)}): choose "
                    f"another output, or remove what is there of the split {split!r}."
                )
    if foreign:
        raise DataError(
            f"{output} has shards of the split {split!r} without a manifest ({foreign[0].name}): "
            "choose another output."
        )

    def make(number: int) -> dict[str, Any]:
        path = output / f"{split}-{number:05d}.tar"
        entry_file = work / f"{path.stem}.json"
        if entry_file.exists() and path.exists():
            entry = read_json(entry_file)
            if entry["bytes"] == path.stat().st_size:
                return entry
        images = originals.images[number * per_shard : (number + 1) * per_shard]
        entry = _make_shard(path, split, images, originals, short_side, quality)
        write_json(entry_file, entry)
        return entry

    if not manifest_file.exists():
        write_json(work / "plan.json", {"plan": plan})
        numbers = range(-(-len(originals.images) // per_shard))
        try:
            # Pillow decodes without the GIL, so that threads suffice.
            with FileLock(work / "lock", timeout=0), ThreadPoolExecutor(workers) as pool:
                made = pool.map(make, numbers)
                shards = list(tqdm(made, f"converting {split}", len(numbers), unit="shard"))
        except Timeout:
            raise DataError(
                f"Another process is converting the split {split!r} into {output}: wait for it, or "
                "choose another output."
            ) from None
        manifest = {n: sum(shard[n] for shard in shards) for n in ("images", "bytes", "labeled")}
        skipped = [image for shard in shards for image in shard.pop("skipped")]
        if not manifest["images"]:
            raise DataError(f"None of the images can be decoded, for example {skipped[0]}.")
        write_json(manifest_file, {**manifest, "plan": plan, "shards": shards, "skipped": skipped})
    shutil.rmtree(work, ignore_errors=True)
    return read_json(manifest_file)


# -- originals ---------------------------------------------------------------------------------


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _list_files(source: Path, split: str, captions: str | Path | None) -> Originals:
    captions_of = {}
    if captions:
        index, captions_of = coco_split(source, split, captions)
    else:
        index, _ = find_split(source, split)
    if (index.spans[:, 2] >= 0).any():
        raise DataError(f"{source} consists of shards already.")
    images = [
        Original(row, key, index.path(row), index.class_of[row], tuple(captions_of.get(key, ())))
        for row, key in enumerate(index.keys)
    ]
    content = [(o.name, o.path.stat().st_size, o.label, o.captions) for o in images]
    return Originals(sorted(images, key=lambda o: _hash(o.name)), _hash(content))


def _parquet_files(source: Path, split: str) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix == ".parquet" else []
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else []
    for name in (split, *STAND_INS.get(split, ())):
        if of_split := [file for file in files if name in re.split(r"[-_.]", file.stem)]:
            return of_split
    if files:
        examples = ", ".join(file.name for file in files[:5])
        raise DataError(f"No Parquet file in {source} is named by {split!r}; found {examples}.")
    return []


def _open_parquet(file: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(file)
    except ModuleNotFoundError:
        raise DataError("Reading Parquet files needs pyarrow: pip install pyarrow.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}).") from None


def _list_parquet(files: list[Path], columns: dict[str, str | None]) -> Originals:
    """Row groups, which are read as a whole, are mixed by a hash; rows stay in order."""
    schema = _open_parquet(files[0]).schema_arrow
    columns["label"] = columns["label"] or ("label" if "label" in schema.names else None)
    for option, name in columns.items():
        if name is not None and name not in schema.names:
            raise DataError(
                f"{files[0]} has no column {name!r}, only {', '.join(schema.names)}: name one by "
                f"--{option}-column."
            )
    # As Hugging Face writes the names of classes
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = about.get("info", {}).get("features", {}).get(columns["label"]) or {}
    images, content = [], []
    for file in files:
        opened = _open_parquet(file)
        rows = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
        content.append((file.name, file.stat().st_size, rows))
        for group, row in ((group, row) for group, n in enumerate(rows) for row in range(n)):
            name = f"{file.name}: row {row} of row group {group}"
            images.append(Original(len(images), name, file, group=group, row=row))
    images.sort(key=lambda o: (_hash([o.path.name, o.group]), o.number))
    return Originals(images, _hash(content), columns, feature.get("names") or [])


def _read(images: list[Original], originals: Originals) -> Iterator[tuple[Original, Any]]:
    """Images of one shard, and their files as paths or bytes."""
    columns, names = originals.columns, originals.class_names
    for (path, group), rows in groupby(images, key=lambda o: (o.path, o.group)):
        if not columns:
            yield from ((original, path) for original in rows)
            continue
        wanted = [name for name in columns.values() if name]
        table = _open_parquet(path).read_row_group(group, columns=wanted)
        for original in rows:
            (values,) = table.slice(original.row, 1).to_pylist()
            image, label, texts = (values.get(name) for name in columns.values())
            if isinstance(label, int):  # Hugging Face writes -1 for "unknown"
                label = None if label < 0 else names[label] if label < len(names) else label
            texts = [texts] if isinstance(texts, str) else texts or ()
            texts = [" ".join(text.split()) for text in texts if isinstance(text, str)]
            original = original._replace(label=label, captions=tuple(filter(None, texts)))
            yield original, image.get("bytes") if isinstance(image, dict) else image


# -- shards ------------------------------------------------------------------------------------


def _make_shard(
    path: Path,
    split: str,
    images: list[Original],
    originals: Originals,
    short_side: int | None,
    quality: int | None,
) -> dict[str, Any]:
    """Write one shard; its entry in the manifest."""
    entry: dict[str, Any] = {"name": path.name, "images": 0, "labeled": 0, "skipped": []}
    with (
        atomic_write(path) as partial,
        tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for original, content in _read(images, originals):
            try:
                suffix, content, size = _prepare(content, short_side, quality)
            except (ImageError, OSError) as error:
                entry["skipped"].append([original.name, str(error)])
                continue
            key = f"{original.number:09d}"
            record: dict[str, Any] = {
                "key": key,
                "split": split,
                "file": original.name,
                "class": original.label,
            }
            if original.captions:
                record["captions"] = original.captions
            record["size"] = size
            text = json.dumps(record, ensure_ascii=False).encode()
            for name, data in ((f"{key}.{suffix}", content), (f"{key}.json", text)):
                member = tarfile.TarInfo(name)  # says nothing of when and by whom it was written
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            entry["images"] += 1
            entry["labeled"] += original.label is not None
    return entry | {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _prepare(
    content: Any, short_side: int | None, quality: int | None
) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes and size (width, height) of an image as it goes into a shard."""
    if isinstance(content, Path):
        content = content.read_bytes()
    if not isinstance(content, bytes):
        raise ImageError("its column holds no image file")
    image = decode_rgb(content)  # also where it stays as it is: damaged images are left out
    short = min(image.size)
    if short_side is not None and short > short_side:
        size = [max(1, round(side * short_side / short)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    elif quality is None:
        # By the content: Parquet files have no names, and others lie.
        with Image.open(io.BytesIO(content)) as opened:
            suffix = SUFFIXES.get(opened.format or "", str(opened.format).lower())
        return suffix if suffix in IMAGE_SUFFIXES else "jpg", content, image.size
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality or QUALITY)
    return "jpg", file.getvalue(), image.size


def verify(folder: str | Path) -> int:
    """Compare every shard of the manifests in `folder` with its checksum; the number of shards.

    Raises:
        DataError: no manifest, an unfinished conversion, or shards that are missing or changed.
    """
    folder = Path(folder).expanduser()
    shards = check_manifests(folder)
    if not shards:
        raise DataError(f"There is no manifest (*{MANIFEST_SUFFIX}) in {folder}.")
    bar = tqdm(shards, f"checking {folder.name}", unit="shard")
    changed = [s["name"] for s in bar if sha256_of(folder / s["name"]) != s["sha256"]]
    if changed:
        raise DataError(
            f"{len(changed)} of {len(shards)} shards in {folder} differ from their checksums: "
            f"{', '.join(changed)}. Copy them again."
        )
    return len(shards)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sitlib.data.convert", description=__doc__)
    parser.add_argument("source", help="image folder (split/class/name.jpg) or Parquet files")
    parser.add_argument("output", nargs="?", help="folder of the shards")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--verify", action="store_true", help="only check the shards in SOURCE")
    parser.add_argument("--captions", help="COCO captions file of the images")
    parser.add_argument("--image-column", default="image", help="of Parquet files; default: image")
    parser.add_argument("--label-column", help="of Parquet files; default: label, if there is one")
    parser.add_argument("--caption-column", help="of Parquet files: a text, or a list of texts")
    parser.add_argument("--per-shard", type=int, default=1000, help="images; default: 1000")
    parser.add_argument("--short-side", type=int, help="make larger images as small, in px")
    parser.add_argument("--quality", type=int, help="write all images as JPEGs of this quality")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    arguments = vars(parser.parse_args())
    try:
        if arguments.pop("verify"):
            print(f"all {verify(arguments['source'])} shards are as they were written")
            return
        if arguments["output"] is None:
            parser.error("OUTPUT is missing")
        manifest = convert(**arguments)
    except (DataError, DiskError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The finished shards stay: give the same command again, and it goes on.")
    for name, reason in manifest["skipped"][:5]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    print(
        f"{manifest['images']} images in {len(manifest['shards'])} shards, "
        f"{manifest['bytes'] / 1e6:.1f} MB, {len(manifest['skipped'])} skipped; see "
        f"{arguments['split']}{MANIFEST_SUFFIX} in {arguments['output']}"
    )
    if not (manifest["labeled"] or arguments["captions"] or arguments["caption_column"]):
        print(
            "Neither classes nor captions: tokenizers can learn from these images, models that are "
            "told what to draw cannot. Images of a class belong into a folder of its name "
            "(ImageNet's validation images come in one folder for all).",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
