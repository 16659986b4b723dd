"""Conversion of image folders, Parquet and COCO to shards that a kill does not change."""

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
from PIL import Image
from pyarrow import parquet

from sitlib.data import DataError, decode_image, open_captioned, open_images
from sitlib.data.convert import convert, main, verify
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
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "sitlib.data.convert", *map(str, arguments)]


class TestFolders:
    def test_every_image_is_in_one_shard_unchanged(self, tmp_path):
        source = image_folder(tmp_path / "source")
        manifest = convert(source, tmp_path / "out", "train", per_shard=8)
        assert [shard["images"] for shard in manifest["shards"]] == [8, 8, 4]
        before, after = open_images(source), open_images(tmp_path / "out")
        assert len(after) == 20 and after.class_names == before.class_names
        record_of = {record.meta["file"]: record for record in after}
        for record in before:
            assert (record_of[record.key].image == record.image).all()
            assert record_of[record.key].class_name == record.class_name
        assert len(set(after.labels[:8].tolist())) == 3  # classes are mixed
        # Other readers of the format agree.
        paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
        samples = list(webdataset.WebDataset(paths, shardshuffle=False))
        assert len(samples) == 20
        for sample in samples:
            record = json.loads(sample["json"])
            assert sample["png"] == (source / record["file"]).read_bytes()
            assert record["key"] == sample["__key__"] and record["size"] == [32, 24]

    def test_smaller(self, tmp_path):
        source = image_folder(tmp_path / "source", count=3, side=40)
        small = picture(7, side=16)
        (source / "train/class0/small.png").write_bytes(small)
        convert(source, tmp_path / "out", "train", short_side=20)
        opened = {
            Path(record.meta["file"]).name: record for record in open_images(tmp_path / "out")
        }
        assert opened["000.png"].image.shape == (3, 20, 24)
        assert opened["000.png"].meta["size"] == [24, 20]
        assert (opened["small.png"].image == decode_image(small)).all()  # never enlarged


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("source", "train", {"per_shard": 0}, "per_shard is 0"),
        ("source", "val", {}, "no split 'val'"),
        ("shards", "train", {}, "consists of shards already"),
        ("parquet", "train", {}, "no column 'image', only .*picture"),
        (
            "parquet",
            "test",
            {},
            "holds neither WebDataset shards .* found there: .*train-0.parquet",
        ),
        ("broken", "train", {}, "Reading .*broken-train.parquet needs pyarrow, and a whole file"),
    ],
)
def test_refusals(tmp_path, name, split, options, message):
    image_folder(tmp_path / "source", count=2)
    convert(tmp_path / "source", tmp_path / "shards", "train")
    write_parquet(tmp_path / "parquet/train-0.parquet", [{"picture": b""}])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/broken-train.parquet").write_bytes(b"none")
    with pytest.raises(DataError, match=message):
        convert(tmp_path / name, tmp_path / "out", split, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="holds the images themselves"):
        convert(tmp_path / "source", tmp_path / "source", "train")
    with pytest.raises(DataError, match="must not be empty"):
        convert(tmp_path / "source", " ", "train")


class TestInterruption:
    def test_other_settings_images_and_shards_are_refused(self, tmp_path):
        source, out = image_folder(tmp_path / "source"), tmp_path / "out"
        convert(source, out, "train", per_shard=8)
        before = contents(out)
        with pytest.raises(DataError, match="other settings .*'per_shard': 8.* now .* 9"):
            convert(source, out, "train", per_shard=9)
        (source / "train/class0/new.png").write_bytes(picture(99))
        with pytest.raises(DataError, match="images .*'images': 20.* now .* 21"):
            convert(source, out, "train", per_shard=8)
        (source / "train/class0/new.png").unlink()
        times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        convert(source, out, "train", per_shard=8)  # nothing is left to do
        assert contents(out) == before
        assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
        (out / "train.manifest.json").unlink()
        with pytest.raises(DataError, match=r"train-00000\.tar has no manifest"):
            convert(source, out, "train")

    @pytest.mark.parametrize("parquet", [False, True])
    def test_killed_at_any_moment_it_ends_with_the_same_bytes(self, tmp_path, parquet):
        source, out = image_folder(tmp_path / "source", count=60, side=360), tmp_path / "out"
        if parquet:
            rows = [{"image": file.read_bytes()} for file in sorted(source.rglob("*.png"))]
            write_parquet(tmp_path / "parquet/train-0.parquet", rows)
            source = tmp_path / "parquet"
        arguments = [source, out, "--split", "train", "--per-shard", 5, "--short-side", 200]
        for finished in (1, 5):
            run = subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL)
            while len(list(out.glob("*.tar"))) < finished and run.poll() is None:
                time.sleep(0.002)
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL  # it had not ended by itself
            assert finished <= len(list(out.glob("*.tar"))) < 12
            with pytest.raises(DataError, match=r"out/train\.manifest.* is not finished"):
                open_images(out)
        shards = json.loads((out / "train.manifest.json").read_text())["shards"]
        times = {shard["name"]: (out / shard["name"]).stat().st_mtime_ns for shard in shards}
        convert(source, out, "train", per_shard=5, short_side=200)
        assert len(times) >= 3
        assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
        convert(source, tmp_path / "undisturbed", "train", per_shard=5, short_side=200)
        assert contents(out) == contents(tmp_path / "undisturbed")

    def test_changed_missing_and_short_shards(self, tmp_path):
        folder = tmp_path / "out"
        convert(image_folder(tmp_path / "source", count=12), folder, "train", per_shard=5)
        assert verify(folder) == 3
        shard = folder / "train-00001.tar"
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
        with pytest.warns(UserWarning, match="skipped"):
            open_images(folder)  # sizes are as they were
        with pytest.raises(DataError, match=r"train-00001\.tar differs from its"):
            verify(folder)
        shard.write_bytes(content[:-512])
        for check in (verify, open_images):
            with pytest.raises(DataError, match=r"train-00001\.tar has \d+ bytes, not \d+"):
                check(folder)
        shard.unlink()
        with pytest.raises(DataError, match=r"train-00001\.tar has 0 bytes"):
            open_images(folder)
        with pytest.raises(DataError, match="no manifest"):
            verify(tmp_path / "source")


def write_parquet(path: Path, rows: list[dict], features: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if features:
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    parquet.write_table(table, path, row_group_size=4)


class TestParquet:
    def rows(self, numbers, **columns):
        formats = {n: "JPEG" if n % 2 else "PNG" for n in numbers}
        return [
            {"image": {"bytes": picture(n, formats[n]), "path": None}, "label": n % 3}
            | {name: value(n) for name, value in columns.items()}
            for n in numbers
        ]

    def test_images_labels_and_captions(self, tmp_path):
        features = {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}
        files = [("train-0-of-2", range(10)), ("train-1-of-2", range(10, 17)), ("val-0", range(3))]
        for name, numbers in files:
            rows = self.rows(
                numbers, caption=lambda n: [f"caption {n}", f"again\n{n}"][: 1 + n // 10]
            )
            write_parquet(tmp_path / f"data/{name}.parquet", rows, features)
        out = tmp_path / "out"
        convert(tmp_path, out, "train", per_shard=5)
        opened, captioned = open_images(out), open_captioned(out, "train", "records")
        assert opened.class_names == ["ant", "bee", "cat"]
        assert captioned.images.keys == opened.keys
        seen = Counter()
        for record, captions in zip(opened, captioned.captions, strict=True):
            n = int(captions[0].split()[1])
            seen[n] += 1
            original = decode_image(picture(n, "JPEG" if n % 2 else "PNG"))
            assert (record.image == original).all() and record.label == n % 3
            assert captions == [f"caption {n}", f"again {n}"][: 1 + n // 10]
        assert seen == Counter(range(17))
        convert(tmp_path, out, "val")
        assert len(open_images(out, "test")) == 3

    def test_bare_bytes_unknown_labels_and_rows_without_images(self, tmp_path):
        rows = [{"image": picture(n), "label": n - 1} for n in range(3)]
        write_parquet(tmp_path / "in/train.parquet", [*rows, {"image": None, "label": 0}])
        manifest = convert(tmp_path / "in", tmp_path / "out", "train")
        assert manifest["skipped"][0][0] == "row 3"
        assert open_images(tmp_path / "out").labels.tolist() == [-1, 0, 1]


def test_coco_converted_says_the_same(tmp_path):
    root, out = tmp_path / "coco", tmp_path / "out"
    json_of = root / "annotations/captions_{split}2017.json"
    json_of.parent.mkdir(parents=True)
    for split, names in (("train", "abcd"), ("val", "xy")):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number, name in enumerate(names):
            (root / f"{split}2017/{name}.jpg").write_bytes(picture(number, "JPEG"))
            images.append({"id": number, "file_name": f"{name}.jpg"})
            annotations += [{"image_id": number, "caption": f"{name} {k}\n"} for k in range(2)]
        content = json.dumps({"images": images, "annotations": annotations})
        Path(str(json_of).format(split=split)).write_text(content)
        convert(root, out, split, per_shard=3, captions=json_of)
        before, after = open_captioned(root, split, json_of), open_captioned(out, split, "records")
        captions_of = dict(zip(before.images.keys, before.captions, strict=True))
        files = [record.meta["file"] for record in after.images]
        assert sorted(files) == sorted(captions_of)
        assert after.captions == [captions_of[name] for name in files]


def test_the_command(tmp_path, monkeypatch, capsys):
    source = image_folder(tmp_path / "source", count=4)
    (source / "train/class0/broken.png").write_bytes(picture(1, side=1))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", command(*arguments)[2:])
        main()
        return capsys.readouterr()

    said = run(source, tmp_path / "out")
    assert "4 images in 1 shards, 1 skipped" in said.out
    assert "train/class0/broken.png" in said.out and "only 9x1 pixels" in said.out
    assert "all 1 shards are as they were" in run(tmp_path / "out", "--verify").out
    for arguments, message in (
        ([source, tmp_path / "out", "--short-side", 80], "other settings"),
        ([source, "--verify"], "no manifest"),
        ([source, "/dev/null/out"], "could not be written|Not a directory"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
