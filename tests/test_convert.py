"""sitlib.data.convert: image folders, Parquet and COCO -> shards that a kill does not change."""

import errno
import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import webdataset
from filelock import FileLock
from PIL import Image
from pyarrow import parquet

from sitlib.data import DataError, decode_image, open_captioned, open_images, originals, shards
from sitlib.data.convert import convert, main
from sitlib.data.manifest import read_json, work_folder
from sitlib.data.originals import Columns
from sitlib.data.shards import Settings
from sitlib.data.verify import verify
from workbook.paths import ROOT


def picture(number: int, format="PNG", side=24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def image_folder(root: Path, count=20, split="train", **options) -> Path:
    for number in range(count):
        folder = root / split / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.png").write_bytes(picture(number, **options))
    return root


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "sitlib.data.convert", *map(str, arguments)]


class TestFolders:
    def test_every_image_is_in_one_shard_unchanged(self, tmp_path):
        source = image_folder(tmp_path / "source")
        manifest = convert(source, tmp_path / "out", "train", Settings(per_shard=8))
        assert manifest["images"] == 20 and [shard["images"] for shard in manifest["shards"]] == [
            8,
            8,
            4,
        ]
        before, after = open_images(source, "train"), open_images(tmp_path / "out", "train")
        assert len(after) == 20 and after.class_names == before.class_names
        found = {record.meta["file"]: record for record in after}
        assert sorted(found) == sorted(before.keys)
        for record in before:
            assert (found[record.key].image == record.image).all()
            assert found[record.key].class_name == record.class_name
        first = [record.meta["file"] for record in (after[i] for i in range(8))]
        assert len({Path(name).parent.name for name in first}) == 3  # classes are mixed
        # Other readers of the format agree.
        paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
        samples = list(webdataset.WebDataset(paths, shardshuffle=False))
        assert len(samples) == 20
        for sample in samples:
            record = json.loads(sample["json"])
            assert sample["png"] == (source / record["file"]).read_bytes()
            assert record["key"] == sample["__key__"] and record["size"] == [32, 24]

    def test_the_result_depends_on_nothing_but_images_and_settings(self, tmp_path):
        convert(image_folder(tmp_path / "a"), tmp_path / "one", "train", Settings(per_shard=6))
        convert(image_folder(tmp_path / "b"), tmp_path / "two", "train", Settings(per_shard=6))
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def test_smaller_and_encoded_again(self, tmp_path):
        source = image_folder(tmp_path / "source", count=3, side=40)
        (source / "train/class0/small.png").write_bytes(picture(7, side=16))
        convert(source, tmp_path / "out", "train", Settings(short_side=20))
        found = {
            Path(record.meta["file"]).name: record
            for record in open_images(tmp_path / "out", "train")
        }
        assert found["000.png"].image.shape == (3, 20, 24) and found["000.png"].meta["size"] == [
            24,
            20,
        ]
        assert (
            found["small.png"].image == decode_image(picture(7, side=16))
        ).all()  # never enlarged
        convert(source, tmp_path / "jpeg", "train", Settings(quality=90))
        jpeg = {
            Path(record.meta["file"]).name: record
            for record in open_images(tmp_path / "jpeg", "train")
        }
        assert jpeg["small.png"].image.shape == (3, 16, 24)
        assert not (jpeg["small.png"].image == found["small.png"].image).all()

    def test_bad_images_are_named_and_skipped(self, tmp_path):
        source = image_folder(tmp_path / "source", count=6)
        (source / "train/class0/cut.jpg").write_bytes(picture(1, "JPEG")[:200])
        (source / "train/class1/dot.png").write_bytes(picture(1, side=1))
        manifest = convert(source, tmp_path / "out", "train", Settings(per_shard=3))
        assert manifest["images"] == 6 and manifest["skipped_images"] == 2
        assert sorted(Path(name).name for name, _ in manifest["skipped"]) == ["cut.jpg", "dot.png"]
        assert any("only 9x1 pixels" in reason for _, reason in manifest["skipped"])
        assert len(open_images(tmp_path / "out", "train")) == 6

    def test_two_splits_side_by_side(self, tmp_path):
        source = image_folder(image_folder(tmp_path / "source"), count=5, split="val")
        for split in ("train", "val"):
            convert(source, tmp_path / "out", split, Settings(per_shard=8))
        assert len(open_images(tmp_path / "out", "train")) == 20
        assert len(open_images(tmp_path / "out", "test")) == 5 and verify(tmp_path / "out") == 4


class TestRefusals:
    def test_wrong_arguments(self, tmp_path):
        source = image_folder(tmp_path / "source", count=2)
        for message, split, options in (
            ("letters and digits", "tr/ain", {}),
            ("processes is 0", "train", {"processes": 0}),
            ("no split 'val'", "val", {}),
            ("no columns", "train", {"columns": Columns("picture")}),
        ):
            with pytest.raises(DataError, match=message):
                convert(source, tmp_path / "out", split, **options)
        for message, options in (
            ("at least one", {"per_shard": 0}),
            ("1 to 100", {"quality": 0}),
            ("8 are needed", {"short_side": 2}),
        ):
            with pytest.raises(DataError, match=message):
                Settings(**options)
        assert not (tmp_path / "out").exists()

    def test_other_settings_and_other_images(self, tmp_path):
        source, out = image_folder(tmp_path / "source"), tmp_path / "out"
        convert(source, out, "train", Settings(per_shard=8))
        before = contents(out)
        with pytest.raises(DataError, match="other settings .*per_shard was 8, is 9"):
            convert(source, out, "train", Settings(per_shard=9))
        with pytest.raises(DataError, match="short_side was None, is 20"):
            convert(source, out, "train", Settings(per_shard=8, short_side=20))
        (source / "train/class0/new.png").write_bytes(picture(99))
        with pytest.raises(DataError, match="other images .20 then, 21 now"):
            convert(source, out, "train", Settings(per_shard=8))
        (source / "train/class0/new.png").unlink()
        times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        convert(source, out, "train", Settings(per_shard=8))  # nothing is left to do
        assert contents(out) == before and times == {
            path: path.stat().st_mtime_ns for path in out.iterdir()
        }

    def test_shards_of_others(self, tmp_path):
        source, out = image_folder(tmp_path / "source", count=2), tmp_path / "out"
        out.mkdir()
        (out / "train-0007.tar").write_bytes(b"mine")
        with pytest.raises(DataError, match=r"without a manifest .train-0007\.tar"):
            convert(source, out, "train")
        assert list(contents(out)) == ["train-0007.tar"]
        with pytest.raises(DataError, match="consists of shards already"):
            convert(convert_some(tmp_path), tmp_path / "again", "train")

    def test_two_at_once(self, tmp_path):
        source, out = image_folder(tmp_path / "source", count=2), tmp_path / "out"
        work = work_folder(out, "train")
        work.mkdir(parents=True)
        with (
            FileLock(work / "lock"),
            pytest.raises(DataError, match="Another process is converting"),
        ):
            convert(source, out, "train")
        convert(source, out, "train")


def convert_some(folder: Path, count=12) -> Path:
    convert(
        image_folder(folder / "some", count=count),
        folder / "converted",
        "train",
        Settings(per_shard=5),
    )
    return folder / "converted"


class TestInterruption:
    def test_a_full_disk_is_said_and_the_rest_is_made_later(self, tmp_path, monkeypatch):
        source, out = image_folder(tmp_path / "source"), tmp_path / "out"
        add = shards._add
        room = iter(range(22))  # members: ten images and their records, and two

        def into_a_small_disk(*arguments):
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            add(*arguments)

        monkeypatch.setattr(shards, "_add", into_a_small_disk)
        with pytest.raises(DataError, match="disk of .*out is full.*give the same command again"):
            convert(source, out, "train", Settings(per_shard=5))
        assert sorted(path.name for path in out.glob("*.tar")) == [
            "train-00000.tar",
            "train-00001.tar",
        ]
        assert not list(out.rglob("*.partial"))
        times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        with pytest.raises(DataError, match="'train' in .*out is not finished"):
            open_images(out, "train")
        monkeypatch.setattr(shards, "_add", add)
        convert(source, out, "train", Settings(per_shard=5))
        assert times == {path: path.stat().st_mtime_ns for path in times}  # not made again
        convert(source, tmp_path / "undisturbed", "train", Settings(per_shard=5))
        assert contents(out) == contents(tmp_path / "undisturbed")

    def test_killed_at_any_moment_it_ends_with_the_same_bytes(self, tmp_path):
        source, out = image_folder(tmp_path / "source", count=60, side=360), tmp_path / "out"
        arguments = [source, out, "--split", "train", "--per-shard", 5, "--short-side", 200]
        for finished, processes in ((1, 2), (5, 1)):
            run = subprocess.Popen(
                command(*arguments, "--processes", processes), cwd=ROOT, stderr=subprocess.DEVNULL
            )
            while len(list(out.glob("*.tar"))) < finished and run.poll() is None:
                time.sleep(0.002)
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
            workers = children.read_text().split() if children.exists() else []
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL  # it had not ended by itself
            there = len(list(out.glob("*.tar")))
            assert finished <= there < 12 and not (out / "train.manifest.json").exists()
            with pytest.raises(DataError, match="not finished"):
                open_images(out, "train")
            deadline = time.time() + 10
            while any(map(is_running, workers)) and time.time() < deadline:
                time.sleep(0.02)
            assert not any(map(is_running, workers))  # nobody writes on
        finished = {
            path.with_suffix(".tar").name for path in work_folder(out, "train").glob("train-*.json")
        }
        times = {name: (out / name).stat().st_mtime_ns for name in finished}
        settings = Settings(per_shard=5, short_side=200)
        convert(source, out, "train", settings)
        assert len(times) >= 4 and all(
            (out / name).stat().st_mtime_ns == at for name, at in times.items()
        )
        convert(source, tmp_path / "undisturbed", "train", settings)
        assert contents(out) == contents(tmp_path / "undisturbed")
        assert len(open_images(out, "train")) == 60

    def test_a_finished_shard_that_was_cut_off_is_made_again(self, tmp_path, monkeypatch):
        source, out = image_folder(tmp_path / "source"), tmp_path / "out"

        def stop(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("sitlib.data.convert._manifest", stop)
            convert(source, out, "train", Settings(per_shard=5))
        with open(out / "train-00001.tar", "ab") as file:
            file.truncate(1000)
        convert(source, out, "train", Settings(per_shard=5))
        assert verify(out) == 4


def is_running(process: str) -> bool:
    """A process that has ended and is not yet buried counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestManifest:
    def test_changed_missing_and_short_shards(self, tmp_path):
        folder = convert_some(tmp_path)
        assert verify(folder) == 3
        shard = folder / "train-00001.tar"
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
        with pytest.warns(UserWarning, match="skipped"):
            open_images(folder, "train")  # sizes are as they were
        with pytest.raises(DataError, match=r"1 of 3 shards .* differ .*train-00001\.tar"):
            verify(folder)
        shard.write_bytes(content[:-512])
        for check in (verify, open_images):
            with pytest.raises(DataError, match=r"train-00001\.tar has \d+ bytes in place of \d+"):
                check(folder)
        shard.unlink()
        with pytest.raises(DataError, match=r"train-00001\.tar is missing"):
            open_images(folder, "train")
        with pytest.raises(DataError, match="no manifest"):
            verify(image_folder(tmp_path / "none", count=1))


def write_parquet(path: Path, rows: list[dict], features: dict | None = None, group=4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    parquet.write_table(table, path, row_group_size=group)


class TestParquet:
    def rows(self, numbers, **columns):
        return [
            {
                "image": {"bytes": picture(n, "JPEG" if n % 2 else "PNG"), "path": None},
                "label": n % 3,
            }
            | {name: value(n) for name, value in columns.items()}
            for n in numbers
        ]

    def test_images_labels_and_captions(self, tmp_path):
        features = {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}
        write_parquet(
            tmp_path / "data/train-00000-of-00002.parquet",
            self.rows(range(10), text=lambda n: [f"caption {n}", f"again\n{n}"]),
            features,
        )
        write_parquet(
            tmp_path / "data/train-00001-of-00002.parquet",
            self.rows(range(10, 17), text=lambda n: [f"caption {n}"]),
            features,
        )
        write_parquet(
            tmp_path / "data/validation-00000-of-00001.parquet", self.rows(range(3)), features
        )
        out = tmp_path / "out"
        columns = Columns(caption="text")
        manifest = convert(tmp_path, out, "train", Settings(per_shard=5), columns=columns)
        assert manifest["images"] == 17 and manifest["plan"]["label_column"] == "label"
        convert(tmp_path, out, "val", Settings(per_shard=5))
        found = open_images(out, "train")
        assert len(found) == 17 and found.class_names == ["ant", "bee", "cat"]
        captioned = open_captioned(out, "train", "records")
        assert captioned.images.keys == found.keys
        seen = Counter()
        for record, captions in zip(found, captioned.captions, strict=True):
            number = int(captions[0].split()[1])
            seen[number] += 1
            assert (
                record.image == decode_image(picture(number, "JPEG" if number % 2 else "PNG"))
            ).all()
            assert record.label == number % 3
            assert captions == (
                [f"caption {number}", f"again {number}"] if number < 10 else [f"caption {number}"]
            )
        assert seen == Counter(range(17))
        assert len(open_images(out, "test")) == 3
        with pytest.raises(DataError, match="has no list `captions` of texts: convert"):
            open_captioned(out, "val", "records")

    def test_bare_bytes_unknown_labels_and_rows_without_images(self, tmp_path):
        rows = [{"picture": picture(n), "kind": n - 1} for n in range(3)] + [
            {"picture": None, "kind": 0}
        ]
        write_parquet(tmp_path / "photos.parquet", rows)
        columns = Columns("picture", "kind")
        manifest = convert(tmp_path / "photos.parquet", tmp_path / "out", "train", columns=columns)
        assert manifest["images"] == 3 and "holds no bytes" in manifest["skipped"][0][1]
        labels = [record.meta["class"] for record in open_images(tmp_path / "out", "train")]
        assert sorted(labels, key=str) == [0, 1, None]

    def test_columns_and_splits_that_are_not_there(self, tmp_path):
        write_parquet(tmp_path / "train-0.parquet", self.rows(range(2)))
        with pytest.raises(
            DataError, match="no column 'picture', only image, label: name one by --image-column"
        ):
            convert(tmp_path, tmp_path / "out", "train", columns=Columns("picture"))
        with pytest.raises(DataError, match="named by the split 'test'; found train-0.parquet"):
            convert(tmp_path, tmp_path / "out", "test")
        (tmp_path / "broken-train.parquet").write_bytes(b"none")
        with pytest.raises(DataError, match="broken-train.parquet cannot be read as Parquet"):
            convert(tmp_path, tmp_path / "out", "train")

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        write_parquet(tmp_path / "train-0.parquet", self.rows(range(2)))
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DataError, match="needs pyarrow: pip install"):
            originals.open_originals(tmp_path, "train")


class TestCoco:
    def write(self, root: Path) -> Path:
        for split, names in (("train", "abcd"), ("val", "xy")):
            folder = root / f"{split}2017"
            folder.mkdir(parents=True)
            images, annotations = [], []
            for number, name in enumerate(names):
                (folder / f"{name}.jpg").write_bytes(picture(ord(name), "JPEG"))
                images.append({"id": number, "file_name": f"{name}.jpg"})
                annotations += [{"image_id": number, "caption": f"{name} {k}\n"} for k in range(2)]
            (root / "annotations").mkdir(exist_ok=True)
            content = {"images": images, "annotations": annotations}
            (root / f"annotations/captions_{split}2017.json").write_text(json.dumps(content))
        return root

    def test_the_folder_as_it_is_downloaded(self, tmp_path):
        root = self.write(tmp_path / "coco")
        json_of = root / "annotations/captions_{split}2017.json"
        found = open_captioned(root, "train", json_of)
        assert found.images.keys == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"] and found.captions[1] == [
            "b 0",
            "b 1",
        ]
        assert open_captioned(root, "test", json_of).captions == [["x 0", "x 1"], ["y 0", "y 1"]]
        assert open_images(root, "test").keys == ["val2017/x.jpg", "val2017/y.jpg"]
        assert len(open_images(root, "train")) == 4
        (root / "test2017").mkdir()  # has no captions
        (root / "test2017/t.jpg").write_bytes(picture(1, "JPEG"))
        assert open_captioned(root, "test", json_of).images.keys == ["x.jpg", "y.jpg"]
        (root / "train2014").mkdir()
        with pytest.raises(
            DataError, match="two folders of the split 'train', train2014 and train2017"
        ):
            open_images(root, "train")

    def test_converted_it_says_the_same(self, tmp_path):
        root, out = self.write(tmp_path / "coco"), tmp_path / "out"
        json_of = root / "annotations/captions_{split}2017.json"
        for split in ("train", "val"):
            convert(root, out, split, Settings(per_shard=3), captions=json_of)
        for split in ("train", "test"):
            before, after = (
                open_captioned(root, split, json_of),
                open_captioned(out, split, "records"),
            )
            said = dict(zip(before.images.keys, before.captions, strict=True))
            files = [record.meta["file"] for record in after.images]
            assert sorted(files) == sorted(said) and after.captions == [
                said[name] for name in files
            ]


def test_the_command(tmp_path, monkeypatch, capsys):
    source = image_folder(tmp_path / "source", count=4)
    (source / "train/class0/broken.png").write_bytes(b"?")
    arguments = [source, tmp_path / "out", "--split", "train", "--processes", 1]
    monkeypatch.setattr(sys, "argv", command(*arguments)[2:])
    main()
    said = capsys.readouterr()
    assert "4 images in 1 shards" in said.out and "1 skipped" in said.out
    assert "skipped train/class0/broken.png" in said.err and "image/s" in said.err
    assert "classes" not in said.err
    assert read_json(tmp_path / "out/train.manifest.json")["images"] == 4
    monkeypatch.setattr(sys, "argv", command(*arguments, "--quality", 80)[2:])
    with pytest.raises(SystemExit, match="other settings .*quality was None, is 80"):
        main()


def test_who_converts_images_without_classes_is_told(tmp_path, monkeypatch, capsys):
    image_folder(tmp_path / "source", count=4)
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for number, file in enumerate(sorted((tmp_path / "source").rglob("*.png"))):
            (tmp_path / "flat" / split / f"{number}.png").write_bytes(file.read_bytes())
    monkeypatch.setattr(
        sys,
        "argv",
        command(tmp_path / "flat", tmp_path / "out", "--split", "val", "--processes", 1)[2:],
    )
    main()
    assert "Neither classes nor captions in val-" in capsys.readouterr().err
