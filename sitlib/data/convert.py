"""Images -> WebDataset shards: `python -m sitlib.data.convert SOURCE OUTPUT --split train`.

Which image goes into which shard follows from the names of all images. Every shard is made by one process, under another name until it is
complete, so a conversion that was killed goes on when its command is given again and ends with the very bytes of one that was not.
"""

import argparse
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL
from filelock import FileLock, Timeout
from tqdm import tqdm

from sitlib.data.index import DataError
from sitlib.data.index_cache import index_shards
from sitlib.data.manifest import manifest_file, read_json, work_folder, write_json
from sitlib.data.originals import Columns, ImageFiles, ParquetRows, open_originals
from sitlib.data.shards import QUALITY, Settings, Shard, is_finished, made
from sitlib.paths import resolve

FORMAT = 1  # of shards and manifests: those of another one are not continued
NAMED = 5  # skipped images that are named in the terminal; the manifest names all


def convert(
    source: str | Path,
    output: str | Path,
    split: str,
    settings: Settings | None = None,
    *,
    captions: str | Path | None = None,
    columns: Columns | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes one split of `source` as shards `<split>-NNNNN.tar` and a manifest to the folder `output`.

    A sample is an image and a JSON record with `key`, `split`, `file` (name in the source), `class` (name, number or null), `captions`
    where there are some, and `size` (width, height). An image that cannot be decoded is left out and named in the manifest.

    Args:
        source, captions, columns: as for `open_originals`.
        processes: shards that are made at once; the result does not depend on it.

    Returns:
        The manifest.

    Raises:
        DataError: wrong arguments, no image, another process writes to the split, the folder has the split with other settings or from
            other images, or the disk is full. What is finished stays, and the same call goes on from there.
    """
    settings = settings or Settings()
    if not re.fullmatch(r"[A-Za-z0-9]+", split):
        raise DataError(
            f"The split {split!r} becomes a part of file names: use letters and digits."
        )
    if processes < 1:
        raise DataError(f"processes is {processes}; at least one is needed.")
    originals = open_originals(source, split, captions, columns)
    if not len(originals):
        raise DataError(f"There is no image for the split {split!r} in {source}.")
    output = resolve(output)
    work = work_folder(output, split)
    with _disk_errors(output):
        work.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(work / "lock", timeout=0):
                manifest = _convert(originals, output, work, split, settings, processes)
        except Timeout:
            raise DataError(
                f"Another process is converting the split {split!r} into {output}: wait for it, or choose another output."
            ) from None
        except DataError:
            if not (work / "plan.json").exists():  # refused before anything was begun
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)  # another process may do so too
    return manifest


def _convert(
    originals: ImageFiles | ParquetRows,
    output: Path,
    work: Path,
    split: str,
    settings: Settings,
    processes: int,
) -> dict[str, Any]:
    plan = _plan(originals, split, settings)
    done = manifest_file(output, split)
    for file in (done, work / "plan.json"):
        if file.exists():
            _require_equal(read_json(file).get("plan", {}), plan, file, output, split)
    if done.exists():
        return read_json(done)
    if not (work / "plan.json").exists():
        if foreign := sorted(output.glob(f"{split}-*.tar")):
            raise DataError(
                f"{output} has shards of the split {split!r} without a manifest ({foreign[0].name}): choose another output."
            )
        write_json(work / "plan.json", {"plan": plan})
    shards = list(_shards(originals, output, work, split, settings))
    left = [shard for shard in shards if not is_finished(shard)]
    finished = sum(len(shard.originals) for shard in shards) - sum(
        len(shard.originals) for shard in left
    )
    title = f"converting {split}, {len(shards)} shards"
    with tqdm(
        total=len(originals), initial=finished, desc=title, unit="image", mininterval=2.0, ncols=110
    ) as bar:
        for shard in made(left, processes):
            bar.update(len(shard.originals))
    records = [read_json(shard.record) for shard in shards]
    manifest = _manifest(plan, split, records)
    if not manifest["images"]:
        raise DataError(
            f"None of the {len(originals)} images can be decoded, for example {manifest['skipped'][0]}."
        )
    write_json(done, manifest)
    return manifest


def _plan(originals: ImageFiles | ParquetRows, split: str, settings: Settings) -> dict[str, Any]:
    """Everything that determines the shards, as it is compared when a conversion goes on."""
    plan = {"format": FORMAT, "split": split, **asdict(settings)}
    if originals.columns is not None:
        plan |= {f"{name}_column": value for name, value in asdict(originals.columns).items()}
    if settings.short_side is not None or settings.quality is not None:
        plan["pillow"] = PIL.__version__  # another one may write other bytes
    return plan | {"images": len(originals), "fingerprint": originals.fingerprint}


def _require_equal(
    found: dict[str, Any], plan: dict[str, Any], file: Path, output: Path, split: str
) -> None:
    """Raises DataError where what was begun in `output` is not what is asked for now."""
    names = [name for name in {**found, **plan} if found.get(name) != plan.get(name)]
    if not names:
        return
    if set(names) <= {"images", "fingerprint"}:
        what = f"from other images ({found.get('images')} then, {plan['images']} now, or some have changed)"
    else:
        changes = [
            f"{name} was {found.get(name)}, is {plan.get(name)}"
            for name in names
            if name != "fingerprint"
        ]
        what = f"with other settings ({'; '.join(changes)})"
    begun = "the split" if file.name != "plan.json" else "an unfinished conversion of the split"
    raise DataError(
        f"{output} has {begun} {split!r} made {what}: choose another output, or remove {split}-*.tar, "
        f"{manifest_file(output, split).name} and {work_folder(output, split).name} there."
    )


def _shards(
    originals: ImageFiles | ParquetRows, output: Path, work: Path, split: str, settings: Settings
) -> Iterator[Shard]:
    order = originals.order()
    class_names = getattr(originals, "class_names", [])
    for number, first in enumerate(range(0, len(order), settings.per_shard)):
        chosen = originals.originals(order[first : first + settings.per_shard])
        path = output / f"{split}-{number:05d}.tar"
        yield Shard(path, work, split, chosen, originals.columns, class_names, settings)


def _manifest(plan: dict[str, Any], split: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    skipped = [entry for record in records for entry in record.pop("skipped")]
    return {
        "split": split,
        "images": sum(record["images"] for record in records),
        "bytes": sum(record["bytes"] for record in records),
        "skipped_images": len(skipped),
        "plan": plan,
        "shards": records,
        "skipped": skipped,
    }


class _disk_errors:
    """Says a full or read-only disk in a sentence."""

    def __init__(self, output: Path):
        self.output = output

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"The disk of {self.output} is full. The finished shards stay: make room, give the same command again, and it goes on."
            ) from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DataError(f"{self.output} cannot be written to ({error.strerror}).") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sitlib.data.convert",
        description="Writes images as WebDataset shards. A run that was stopped goes on when the same command is given again.",
    )
    parser.add_argument(
        "source",
        help="image folder (split/class/name.jpg), or Parquet files as Hugging Face has them",
    )
    parser.add_argument("output", help="folder for the shards")
    parser.add_argument("--split", required=True, help="train, val or test")
    parser.add_argument(
        "--captions", help="COCO captions file, such as annotations/captions_{split}2017.json"
    )
    parser.add_argument("--image-column", default="image", help="of Parquet files (default: image)")
    parser.add_argument("--label-column", help="of Parquet files (default: label, if there is one)")
    parser.add_argument("--caption-column", help="of Parquet files: a text, or a list of texts")
    parser.add_argument(
        "--per-shard", type=int, default=1000, help="images of a shard (default: 1000)"
    )
    parser.add_argument(
        "--short-side", type=int, help="px; larger images are made as small as this"
    )
    parser.add_argument(
        "--quality",
        type=int,
        help=f"encode all images as JPEG of this quality (smaller ones: {QUALITY})",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="default: as many as cores"
    )
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    try:
        manifest = convert(
            arguments.source,
            arguments.output,
            arguments.split,
            Settings(arguments.per_shard, arguments.short_side, arguments.quality),
            captions=arguments.captions,
            columns=Columns(
                arguments.image_column, arguments.label_column, arguments.caption_column
            ),
            processes=arguments.processes,
        )
    except DataError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The finished shards stay: give the same command again, and it goes on.")
    for name, reason in manifest["skipped"][:NAMED]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    left_out = f", {manifest['skipped_images']} skipped" if manifest["skipped"] else ""
    print(
        f"{manifest['images']} images in {len(manifest['shards'])} shards, {manifest['bytes'] / 1e6:.1f} MB{left_out}; see "
        f"{manifest_file(resolve(arguments.output), arguments.split)}"
    )
    first = resolve(arguments.output) / manifest["shards"][0]["name"]
    is_told = arguments.captions or arguments.caption_column
    if not is_told and set(index_shards([first]).class_of) == {None}:
        print(
            f"Neither classes nor captions in {first.name}: tokenizers can learn from these images, models that are told what to draw "
            "cannot. Images of a class belong into a folder of its name (ImageNet's validation images come in one folder for all).",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
