"""Conversion of image folders, Parquet and COCO to shards that a kill does not change."""

import hashlib
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import webdataset
from pyarrow import parquet
from tiny import encoded

from sitlib.data import DataError, decode_image, open_captioned, open_images
from sitlib.data.convert import convert, main, verify


def picture(number: int, format="PNG", side=24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    return encoded(pixels, format)


def image_folder(root: Path, count=20, **options) -> Path:
    for number in range(count):
        folder = root / f"train/class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.png").write_bytes(picture(number, **options))
    return root


def write_parquet(path: Path, rows: list[dict], classes: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if classes:  # as Hugging Face writes their names
        about = json.dumps({"info": {"features": {"label": {"names": classes}}}})
        table = table.replace_schema_metadata({"huggingface": about})
    parquet.write_table(table, path, row_group_size=4)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_image_is_in_one_shard_unchanged(tmp_path):
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


def test_smaller(tmp_path):
    source = image_folder(tmp_path / "source", count=3, side=40)
    small = picture(7, side=16)
    (source / "train/class0/small.png").write_bytes(small)
    convert(source, tmp_path / "out", "train", short_side=20)
    opened = {Path(record.meta["file"]).name: record for record in open_images(tmp_path / "out")}
    assert opened["000.png"].image.shape == (3, 20, 24)
    assert opened["000.png"].meta["size"] == [24, 20]
    assert (opened["small.png"].image == decode_image(small)).all()  # never enlarged


def test_images_that_are_too_long_for_a_jpeg_are_left_out(tmp_path):
    source = image_folder(tmp_path / "source", count=1)
    (source / "train/class0/long.png").write_bytes(encoded(np.zeros((16, 140_000), np.uint8)))
    skipped = convert(source, tmp_path / "out", "train", short_side=8)["skipped"]
    assert [Path(name).name for name, _ in skipped] == ["long.png"]


@pytest.mark.filterwarnings("ignore:.*files that are not read")
@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("source", "train", {"per_shard": 0}, "per_shard 0, .* at least 1 image"),
        ("source", "train", {"output": " "}, "output ' '"),
        ("", "train", {}, "source ''"),
        ("source", "train", {"output": "source"}, "holds the images themselves"),
        ("source", "val", {}, "no split 'val'"),
        ("shards", "train", {}, "consists of shards already"),
        ("parquet", "train", {}, "no column 'image', only .*picture"),
        ("broken", "train", {}, "Reading .*broken-train.parquet needs pyarrow, and a whole file"),
    ],
)
def test_refusals(tmp_path, monkeypatch, name, split, options, message):
    monkeypatch.chdir(tmp_path)
    convert(image_folder(Path("source"), count=2), "shards", "train")
    write_parquet(Path("parquet/train-0.parquet"), [{"picture": b""}])
    Path("broken").mkdir()
    Path("broken/broken-train.parquet").write_bytes(b"none")
    with pytest.raises(DataError, match=message):
        convert(name, **{"output": "out", "split": split} | options)
    assert not Path("out").exists()


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
        settings = {"per_shard": 5, "short_side": 200}
        fork = multiprocessing.get_context("fork")
        for finished in (1, 5):
            run = fork.Process(target=convert, args=(source, out, "train"), kwargs=settings)
            run.start()
            while len(list(out.glob("*.tar"))) < finished and run.is_alive():
                time.sleep(0.002)
            run.kill()
            run.join()
            assert run.exitcode == -9  # it had not ended by itself
            assert finished <= len(list(out.glob("*.tar"))) < 12
            with pytest.raises(DataError, match=r"out/train\.manifest.* is not finished"):
                open_images(out)
        shards = json.loads((out / "train.manifest.json").read_text())["shards"]
        times = {shard["name"]: (out / shard["name"]).stat().st_mtime_ns for shard in shards}
        convert(source, out, "train", **settings)
        assert len(times) >= 3
        assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
        convert(source, tmp_path / "undisturbed", "train", **settings)
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


class TestParquet:
    def test_images_labels_and_captions(self, tmp_path):
        format_of, out = {n: "JPEG" if n % 2 else "PNG" for n in range(17)}, tmp_path / "out"
        texts_of = {n: [f"caption {n}", f"again\n{n}"][: 1 + n // 10] for n in range(17)}
        for name, numbers in (("train-0", range(10)), ("train-1", range(10, 17)), ("val-0", [3])):
            rows = [
                {"image": {"bytes": picture(n, format_of[n]), "path": None}, "label": n % 3}
                | {"caption": texts_of[n]}
                for n in numbers
            ]
            write_parquet(tmp_path / f"data/{name}-of-2.parquet", rows, ["ant", "bee", "cat"])
        convert(tmp_path, out, "train", per_shard=5)
        opened, captioned = open_images(out), open_captioned(out, "train", "records")
        assert opened.class_names == ["ant", "bee", "cat"]
        assert captioned.images.keys == opened.keys
        seen = Counter()
        for record, captions in zip(opened, captioned.captions, strict=True):
            n = int(captions[0].split()[1])
            seen[n] += 1
            original = decode_image(picture(n, format_of[n]))
            assert (record.image == original).all() and record.label == n % 3
            assert captions == [text.replace("\n", " ") for text in texts_of[n]]
        assert seen == Counter(range(17))
        convert(tmp_path, out, "val")
        assert len(open_images(out, "test")) == 1

    def test_bare_bytes_unknown_labels_and_rows_without_images(self, tmp_path):
        rows = [{"image": picture(n), "label": n - 1, "caption": ["a", None]} for n in range(3)]
        write_parquet(tmp_path / "in/train.parquet", [*rows, {"image": None, "label": 0}])
        manifest = convert(tmp_path / "in", tmp_path / "out", "train")
        assert manifest["skipped"][0][0] == "row 3"
        assert open_images(tmp_path / "out").labels.tolist() == [-1, 0, 1]


def test_the_command(tmp_path, monkeypatch, capsys):
    source, out = image_folder(tmp_path / "source", count=4), tmp_path / "out"
    (source / "train/class0/broken.png").write_bytes(picture(1, side=1))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    said = run(source, out, "--split", "train")
    assert "4 images in 1 shards, 1 skipped" in said
    assert "train/class0/broken.png" in said and "only 9x1 pixels" in said
    assert "all 1 shards are as they were" in run(out, "--verify")
    for arguments, message in (
        ([source, out, "--short-side", 80], "other settings"),
        ([source], "output ''"),
        ([source, "--verify"], "no manifest"),
        ([source, "/dev/null/out"], "could not be written|Not a directory"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
