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


class Original(NamedTuple):
    """One image where it lies; label and captions of Parquet rows come with their content."""

    number: int  # in the source
    name: str
    path: Path
    group: int = 0  # row group of a Parquet file
    row: int = 0  # in its row group
    label: str | int | None = None
    captions: tuple[str, ...] = ()


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
    limits = [("workers", workers, 1), ("per_shard", per_shard, 1), ("quality", quality, 1)]
    for name, value, least in [*limits, ("short_side", short_side, MIN_SIDE)]:
        if value is not None and value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}.")
    if quality is not None and quality > 100:
        raise DataError(f"quality is {quality}; JPEG has 1 to 100.")
    if not re.fullmatch(r"[A-Za-z0-9]+", split):
        raise DataError(
            f"The split {split!r} becomes a part of file names: use letters and digits."
        )

    source, output = Path(source).expanduser(), Path(output).expanduser()
    columns = {"image": image_column, "label": label_column, "caption": caption_column}
    class_names = []
    if files := _parquet_files(source, split):
        if captions:
            raise DataError("Captions of Parquet files are in a column: name it --caption-column.")
        originals, columns, class_names, fingerprint = _list_parquet(files, columns)
    elif label_column or caption_column:
        raise DataError(f"{source} has no Parquet files, and so no columns that could be named.")
    else:
        originals, fingerprint = _list_files(source, split, captions)
        columns = None
    if not originals:
        raise DataError(f"There is no image for the split {split!r} in {source}.")
    settings = {"short_side": short_side, "quality": quality}
    plan = {"split": split, "per_shard": per_shard, **settings, **(columns or {})}
    if short_side or quality:
        plan["pillow"] = PIL.__version__  # another one may write other bytes
    plan |= {"images": len(originals), "fingerprint": fingerprint}

    manifest_file = output / f"{split}{MANIFEST_SUFFIX}"
    work = output / f".{split}.unfinished"
    for file in (manifest_file, work / "plan.json"):
        if file.exists():
            _require_equal(read_json(file).get("plan", {}), plan, file)
    if manifest_file.exists():
        shutil.rmtree(work, ignore_errors=True)
        return read_json(manifest_file)
    foreign = sorted(output.glob(f"{split}-*.tar"))
    if foreign and not (work / "plan.json").exists():
        raise DataError(
            f"{output} has shards of the split {split!r} without a manifest ({foreign[0].name}): "
            "choose another output."
        )

    def make(number: int) -> dict[str, Any]:
        chosen = originals[number * per_shard : (number + 1) * per_shard]
        path = output / f"{split}-{number:05d}.tar"
        record_file = work / f"{path.stem}.json"
        if record_file.exists() and path.exists():
            record = read_json(record_file)
            if record["bytes"] == path.stat().st_size:
                return record
        record = _make_shard(path, split, chosen, columns, class_names, **settings)
        write_json(record_file, record)
        return record

    try:
        write_json(work / "plan.json", {"plan": plan})
        with FileLock(work / "lock", timeout=0):
            numbers = range(-(-len(originals) // per_shard))
            with ThreadPoolExecutor(workers) as pool:  # Pillow decodes without the GIL
                made = pool.map(make, numbers)
                records = list(tqdm(made, f"converting {split}", len(numbers), unit="shard"))
            skipped = [entry for record in records for entry in record.pop("skipped")]
            counts = {
                name: sum(r[name] for r in records) for name in ("images", "bytes", "labeled")
            }
            if not counts["images"]:
                raise DataError(f"None of the images can be decoded, for example {skipped[0]}.")
            manifest = {"split": split, **counts, "plan": plan, "shards": records}
            write_json(manifest_file, manifest | {"skipped": skipped})
    except Timeout:
        raise DataError(
            f"Another process is converting the split {split!r} into {output}: wait for it, or "
            "choose another output."
        ) from None
    shutil.rmtree(work, ignore_errors=True)
    return read_json(manifest_file)


def _require_equal(before: dict[str, Any], plan: dict[str, Any], file: Path) -> None:
    names = [name for name in {**before, **plan} if before.get(name) != plan.get(name)]
    if names:
        changes = "; ".join(f"{n} was {before.get(n)}, is {plan.get(n)}" for n in names)
        raise DataError(
            f"{file} is of another conversion, with other settings or other images ({changes}): "
            f"choose another output, or remove what is there of the split {plan['split']!r}."
        )


# -- originals ---------------------------------------------------------------------------------


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _list_files(
    source: Path, split: str, captions: str | Path | None
) -> tuple[list[Original], str]:
    """Images of a folder, mixed by a hash of their names; and a fingerprint of all."""
    captions_of = {}
    if captions:
        index, captions_of = coco_split(source, split, captions)
    else:
        index, _ = find_split(source, split)
    if (index.spans[:, 2] >= 0).any():
        raise DataError(f"{source} consists of shards already.")
    originals = [
        Original(
            row,
            key,
            index.path(row),
            label=index.class_of[row],
            captions=tuple(captions_of.get(key, ())),
        )
        for row, key in enumerate(index.keys)
    ]
    content = [(o.name, o.path.stat().st_size, o.label, o.captions) for o in originals]
    return sorted(originals, key=lambda o: _hash(o.name)), _hash(json.dumps(content))


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


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(
            "Reading Parquet files needs pyarrow: pip install -e '.[parquet]', or pip install "
            "pyarrow."
        ) from None
    return parquet


def _list_parquet(
    files: list[Path], columns: dict[str, str | None]
) -> tuple[list[Original], dict[str, str | None], list[str], str]:
    """Rows, columns, names of the classes (as Hugging Face writes them), and a fingerprint.

    Row groups, which are read as a whole, are mixed by a hash; rows stay in order.
    """
    groups, class_names = [], []
    for file in files:
        try:
            opened = _parquet().ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as Parquet ({error}).") from None
        schema = opened.schema_arrow
        if not groups:
            columns["label"] = columns["label"] or ("label" if "label" in schema.names else None)
            about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            feature = about.get("info", {}).get("features", {}).get(columns["label"]) or {}
            class_names = feature.get("names") or []
        for option, name in columns.items():
            if name is not None and name not in schema.names:
                raise DataError(
                    f"{file} has no column {name!r}, only {', '.join(schema.names)}: name one by "
                    f"--{option}-column."
                )
        rows = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
        groups += [(file, group, count) for group, count in enumerate(rows)]
    rows = ((file, group, row) for file, group, count in groups for row in range(count))
    originals = [
        Original(number, f"{file.name}: row {row} of row group {group}", file, group, row)
        for number, (file, group, row) in enumerate(rows)
    ]
    originals.sort(key=lambda o: (_hash(f"{o.path.name}:{o.group}"), o.number))
    content = [(file.name, file.stat().st_size, group, count) for file, group, count in groups]
    return originals, columns, class_names, _hash(json.dumps(content))


def _read(
    originals: list[Original], columns: dict[str, str | None] | None, class_names: list[str]
) -> Iterator[tuple[Original, bytes | str]]:
    """Images with their content, or the reason why there is none."""
    if columns is None:
        for original in originals:
            try:
                yield original, original.path.read_bytes()
            except OSError as error:
                yield original, f"it cannot be read ({error.strerror or error})"
        return
    for (path, group), rows in groupby(originals, key=lambda o: (o.path, o.group)):
        names = list(filter(None, columns.values()))
        table = _parquet().ParquetFile(path).read_row_group(group, columns=names)
        for original in rows:
            (values,) = table.slice(original.row, 1).to_pylist()
            image, label, texts = (values.get(name) for name in columns.values())
            if isinstance(label, int):  # Hugging Face writes -1 for "unknown"
                label = class_names[label] if 0 <= label < len(class_names) else label
                label = None if isinstance(label, int) and label < 0 else label
            texts = [texts] if isinstance(texts, str) else texts or ()
            texts = [" ".join(text.split()) for text in texts if isinstance(text, str)]
            original = original._replace(label=label, captions=tuple(filter(None, texts)))
            content = image.get("bytes") if isinstance(image, dict) else image
            is_file = isinstance(content, bytes)
            yield original, content if is_file else f"{columns['image']!r} holds no image file"


# -- shards ------------------------------------------------------------------------------------


def _make_shard(
    path: Path,
    split: str,
    originals: list[Original],
    columns: dict[str, str | None] | None,
    class_names: list[str],
    short_side: int | None,
    quality: int | None,
) -> dict[str, Any]:
    """Write one shard; its entry in the manifest."""
    images, labeled, skipped = 0, 0, []
    with (
        atomic_write(path) as partial,
        tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar,
    ):

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)  # says nothing of when and by whom it was written
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for original, content in _read(originals, columns, class_names):
            try:
                if isinstance(content, str):
                    raise ImageError(content)
                suffix, content, size = _prepare(content, original.name, short_side, quality)
            except ImageError as error:
                skipped.append([original.name, str(error)])
                continue
            record = {"key": f"{original.number:09d}", "split": split, "file": original.name}
            record |= {"class": original.label}
            if original.captions:
                record["captions"] = list(original.captions)
            record["size"] = list(size)
            add(f"{record['key']}.{suffix}", content)
            add(f"{record['key']}.json", json.dumps(record, ensure_ascii=False).encode())
            images += 1
            labeled += original.label is not None
    entry = {"name": path.name, "images": images, "labeled": labeled, "skipped": skipped}
    return entry | {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _prepare(
    content: bytes, name: str, short_side: int | None, quality: int | None
) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes and size (width, height) of an image as it goes into a shard."""
    image = decode_rgb(content)  # also where it stays as it is: damaged images are left out
    short = min(image.size)
    if short_side is not None and short > short_side:
        size = [max(1, round(side * short_side / short)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    elif quality is None:
        # By the content: Parquet files have no names, and others lie.
        with Image.open(io.BytesIO(content)) as opened:
            format = (opened.format or "").lower()
        suffix = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "tiff": "tif"}.get(format, format)
        if suffix not in IMAGE_SUFFIXES:
            suffix = Path(name).suffix.lower().lstrip(".") or "jpg"
        return suffix, content, image.size
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
