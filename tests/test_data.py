"""Decoding and data sources, on images made here."""

import io
import os
import tarfile
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import encoded

from sitlib.data import (
    DataError,
    ImageError,
    decode_image,
    images,
    mixed,
    open_images,
    training_views,
)
from sitlib.data.loader import recolored


def gradient(width=40, height=24) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3]
    return np.stack(channels, -1).astype(np.uint8)


def jpeg(color, size=(32, 24), **options) -> bytes:
    return encoded(Image.new("RGB", size, color), "JPEG", quality=95, **options)


def pixels(content) -> np.ndarray:
    image = decode_image(content)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


class TestDecoding:
    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_16_bit_grey_is_scaled_not_clipped(self, format):
        values = np.linspace(0, 65535, 40 * 24).round().astype(np.uint16).reshape(24, 40)
        grey = pixels(encoded(Image.fromarray(values), format))
        assert np.array_equal(grey[..., 0], np.round(values / 257).astype(np.uint8))
        assert np.array_equal(grey[..., 0], grey[..., 2])

    def test_grey_one_bit_palette_and_cmyk(self):
        image = Image.fromarray(gradient())
        grey = np.asarray(image.convert("L"))[..., None]
        assert np.array_equal(pixels(encoded(image.convert("L"))), np.repeat(grey, 3, -1))
        assert set(np.unique(pixels(encoded(image.convert("1"))))) == {0, 255}
        palette = image.quantize(16)
        assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
        cyan = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
        assert np.all(np.abs(pixels(cyan).astype(int) - [0, 255, 255]) <= 4)

    def test_transparency_is_composited_on_white(self):
        alpha = np.full((24, 40, 1), 255, np.uint8)
        alpha[:, :10], alpha[:, 10:20] = 0, 128
        rgba = Image.fromarray(np.concatenate([gradient(), alpha], -1))
        composited, weight = pixels(encoded(rgba)).astype(float), alpha / 255
        assert np.abs(composited - (weight * gradient() + (1 - weight) * 255)).max() <= 1
        palette = Image.new("P", (20, 20), 0)
        palette.putpalette([200, 0, 0, 0, 0, 200])
        palette.paste(1, (10, 0, 20, 20))
        composited = pixels(encoded(palette, "GIF", transparency=0))
        assert np.all(composited[:, :10] == 255) and np.all(composited[:, 10:] == [0, 0, 200])
        grey = Image.merge("LA", [Image.new("L", (16, 16), 0), Image.new("L", (16, 16), 128)])
        assert np.all(np.abs(pixels(encoded(grey)).astype(int) - 127) <= 1)
        deep = Image.fromarray(np.array([[0, 0, 30000] * 3] * 8, np.uint16))
        assert (pixels(encoded(deep, transparency=0))[0, :3, 0] == [255, 255, 117]).all()

    def test_exif_orientation_is_applied(self):
        undo = {3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, -1), 8: np.rot90, 2: np.fliplr}
        exif = Image.Exif()
        for orientation, upright in undo.items():
            exif[0x0112] = orientation
            turned = pixels(encoded(gradient(), exif=exif))
            assert np.array_equal(turned, upright(gradient()))

    def test_animation_gives_the_first_frame(self):
        frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
        options = {"save_all": True, "append_images": frames[1:], "duration": 50}
        for format in ("GIF", "PNG"):
            assert np.all(pixels(encoded(frames[0], format, **options)) == [255, 0, 0])

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "cannot be decoded"),
            (jpeg("red")[:200], "cannot be decoded"),
            (encoded(Image.fromarray(gradient(200, 200)))[:-2000], "cannot be decoded"),
            (jpeg("red", (1, 1)), "only 1x1 pixels"),
            (encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "floating point"),
            (encoded(Image.fromarray(np.full((9, 9), 10**6, np.int32)), "TIFF"), "not fit 16 bits"),
        ],
    )
    def test_refusals(self, content, reason):
        with pytest.raises(ImageError, match=reason) as error:
            decode_image(content)
        assert "BytesIO" not in str(error.value)
        assert decode_image(jpeg("red", (1, 1)), min_side=1).shape == (3, 1, 1)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP"]))
    def test_damage_gives_an_image_or_an_image_error(self, where, value, format):
        content = bytearray(encoded(gradient(), format))
        content[where % len(content)] = value
        with warnings.catch_warnings(), suppress(ImageError):
            warnings.simplefilter("ignore")
            assert decode_image(bytes(content)).shape[0] == 3


def write_shard(path, *samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def write_folder(root, splits, colors=("red", "lime"), per_class=6):
    """root/<split>/<color>/<number>.jpg for every split ("" for none)."""
    for split in splits:
        for color in colors:
            (root / split / color).mkdir(parents=True)
            for number in range(per_class):
                (root / split / color / f"{number}.jpg").write_bytes(jpeg(color))
    return root


class TestShards:
    """Written by webdataset."""

    def test_class_numbers(self, tmp_path):
        samples = [{"__key__": f"n{i:03}", "jpg": jpeg((i, 0, 0)), "cls": i % 3} for i in range(12)]
        write_shard(tmp_path / "set-train-0000.tar", *samples[:7])
        write_shard(tmp_path / "set-train-0001.tar", *samples[7:])
        assert len(open_images(tmp_path / "set-train-0000.tar")) == 7
        source = open_images(tmp_path, "train")
        assert source.labels.tolist() == [i % 3 for i in range(12)]
        assert source.labels.dtype == torch.int64 and source.class_names == ["0", "1", "2"]
        assert source.keys == [f"n{i:03}" for i in range(12)]
        record = source[10]
        assert (record.key, record.label, record.class_name) == ("n010", 1, "1")
        assert record.image.shape == (3, 24, 32) and abs(int(record.image[0].max()) - 10) <= 2

    def test_records(self, tmp_path):
        content = encoded(Image.new("RGB", (9, 9), "red"))
        for split, classes in (("train", ["cat", "dog", None]), ("test", ["ant", "dog"])):
            records = [{"left.png": content, "json": {"class": name}} for name in classes]
            samples = [{"__key__": f"{split}/{i}", **record} for i, record in enumerate(records)]
            write_shard(tmp_path / f"{split}-0.tar", *samples)
        train, test = (open_images(tmp_path, split) for split in ("train", "test"))
        assert train.class_names == test.class_names == ["ant", "cat", "dog"]
        assert train.labels.tolist() == [1, 2, -1] and test.labels.tolist() == [0, 2]
        assert train[2].class_name is None and train[0].key == "train/0"
        assert train[0].meta == {"class": "cat"}
        assert train.labeled().labels.tolist() == [1, 2] and len(train) == 3

    def test_names_with_pax_headers_and_folders(self, tmp_path):
        """Long and non-ASCII names have headers of their own; a key ends at the first dot."""
        with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
            for key in ("é" * 80 + "/a", "folder.v2/b"):
                for ending, content in (("JPG", jpeg("red")), ("json", b'{"label": 3}')):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        source = open_images(tmp_path)
        assert source.keys == ["é" * 80 + "/a", "folder.v2/b"] and source[1].class_name == "3"

    def test_without_splits_they_are_divided_by_key(self, tmp_path):
        samples = [{"__key__": f"{i}", "jpg": jpeg("red", (8, 8))} for i in range(250)]
        write_shard(tmp_path / "photos.tar", *samples[:200])
        train, test = (set(open_images(tmp_path, split).keys) for split in ("train", "test"))
        assert not train & test and len(train | test) == 200 and 8 <= len(test) <= 35
        assert train | test == set(open_images(tmp_path, "all").keys)
        write_shard(tmp_path / "more.tar", *samples[200:])
        assert test <= set(open_images(tmp_path, "test").keys)  # more images move no old one

    def test_damaged(self, tmp_path):
        last = {"__key__": "z", "jpg": jpeg("red")}
        write_shard(tmp_path / "train-0.tar", *({**last, "__key__": f"{i}"} for i in range(6)))
        write_shard(tmp_path / "train-1.tar", {"__key__": "text", "txt": "no image"}, last)
        content = (tmp_path / "train-0.tar").read_bytes()
        (tmp_path / "train-0.tar").write_bytes(content[: 512 * 4 + 100])
        with pytest.warns(UserWarning) as caught:
            source = open_images(tmp_path)
        text = " ".join(str(warning.message) for warning in caught)
        assert "train-0.tar has unusable samples" in text
        assert "train-1.tar has unusable samples: text: no image among its files (txt)" in text
        assert source.keys[-1] == "z" and "text" not in source.keys


class TestFolders:
    def test_splits_and_classes(self, tmp_path):
        write_folder(tmp_path, ["train", "val"])
        train, test = open_images(tmp_path, "train"), open_images(tmp_path, "test")
        assert len(train) == len(test) == 12 and train.class_names == ["lime", "red"]
        assert train.keys[0] == "train/lime/0.jpg" and test.keys[0] == "val/lime/0.jpg"
        image = train[0].image.float().mean((1, 2))
        assert train[0].class_name == "lime" and image[1] > 200 > 60 > image[0]

    def test_of_a_test_split_without_classes_the_validation_images_are_taken(self, tmp_path):
        """As ImageNet and MS-COCO are downloaded."""
        root = write_folder(tmp_path / "imagenet", ["train", "val"])
        (root / "test").mkdir()
        (root / "test/0.jpg").write_bytes(jpeg("red"))
        test = open_images(root, "test")
        assert len(test) == len(test.labeled()) == 12 and test.keys[0] == "val/lime/0.jpg"
        for split in ("train2017", "val2017", "test2017"):
            (tmp_path / "coco" / split).mkdir(parents=True)
            (tmp_path / "coco" / split / "a.jpg").write_bytes(jpeg("red"))
        assert open_images(tmp_path / "coco", "test").keys == ["val2017/a.jpg"]
        (tmp_path / "coco/val2017").rename(tmp_path / "coco/elsewhere")
        assert open_images(tmp_path / "coco", "test").keys == ["test2017/a.jpg"]  # better than none
        labeled = write_folder(tmp_path / "labeled", ["train", "val", "test"])
        assert open_images(labeled, "test").keys[0] == "test/lime/0.jpg"

    def test_without_splits_and_classes(self, tmp_path):
        for number in range(3):
            (tmp_path / f"{number}.JPG").write_bytes(jpeg("red"))
        train, test = open_images(tmp_path, "train"), open_images(tmp_path, "test")
        assert len(train) == 2 and len(test) == 1  # never empty
        assert len(open_images(tmp_path, "all")) == 3
        assert train.labels.tolist() == [-1, -1] and train[0].class_name is None
        with pytest.raises(DataError, match="None of the 2 images .* has a class"):
            train.labeled()

    def test_unusable_images_are_named_counted_and_left_out(self, tmp_path):
        root = write_folder(tmp_path, ["train"])
        (root / "train/red/2.jpg").write_bytes(jpeg("red")[:150])
        (root / "train/red/dot.png").write_bytes(encoded(Image.new("RGB", (1, 1))))
        with pytest.warns(UserWarning, match=r"2 of 13 images .*2\.jpg: .*dot\.png: .*only 1x1"):
            source = open_images(root)
        assert len(source) == len(source.labels) == 11 and len(source.unusable) == 2
        assert {record.class_name for record in source} == {"red", "lime"}

    def test_in_large_sets_the_next_usable_image_stands_in(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images, "DECODE_AT_OPENING", 3)
        root = write_folder(tmp_path, ["train"])
        (root / "train/lime/5.jpg").write_bytes(b"broken")
        source = open_images(root)
        assert len(source) == 12 and not source.unusable
        with pytest.warns(UserWarning, match=r"skipped .*lime/5\.jpg"):
            assert source[5].key == "train/red/0.jpg" and source[5].class_name == "red"
        with pytest.warns(UserWarning, match=r"skipped .*lime/5\.jpg"):
            fresh = training_views(open_images(root), 0, 12, 16, seed=1)
        again = training_views(source, 0, 12, 16, seed=1)
        assert torch.equal(again[0], fresh[0]) and again[2] == fresh[2]

    def test_spellings_of_splits(self, tmp_path):
        for train, test in (("Train", "Test"), ("training", "testing"), ("TRAIN2017", "dev")):
            root = write_folder(tmp_path / train, [train, test])
            for split in ("train", "test"):
                assert open_images(root, split).class_names == ["lime", "red"]
        for folder in (tmp_path / "alone", root):
            write_shard(folder / "set-Train-0.tar", {"__key__": "a", "jpg": jpeg("red")})
        assert open_images(tmp_path / "alone", "train").keys == ["a"]
        with pytest.raises(DataError, match="holds shards and folders of splits"):
            open_images(root)

    def test_links_pipes_and_other_files(self, tmp_path):
        write_folder(tmp_path / "real", [""], per_class=20)
        root = tmp_path / "set"
        (root / "plain").mkdir(parents=True)
        for name, target in (("a", "red"), ("b", "red"), ("c", "lime")):
            (root / name).symlink_to(tmp_path / "real" / target)
        (root / "plain/above").symlink_to(root)  # would never end
        (root / "plain/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
        os.mkfifo(root / "plain/pipe.png")  # would wait for a writer
        for name in ("x.heic", "y.HEIC", "z.svg", "README"):
            (root / "plain" / name).touch()
        name = os.fsdecode(b"caf\xe9.jpg")
        (root / "plain" / name).write_bytes(jpeg("red"))
        left_out = "2 broken links or pipes, 2 .heic, 1 without ending, 1 .svg"
        with pytest.warns(UserWarning, match=f"has files that are not read: {left_out}"):
            sets = [open_images(root, split) for split in ("train", "test")]
        assert sum(map(len, sets)) == 61 and sets[0].class_names == ["a", "b", "c", "plain"]
        assert any(f"plain/{name}" in images.keys for images in sets)

    def test_a_folder_that_cannot_be_read_is_an_error(self, tmp_path, monkeypatch):
        root, scandir = write_folder(tmp_path, ["train"]), os.scandir

        def closed(path):  # as for everybody but root
            if Path(path).name == "lime":
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", closed)
        with pytest.raises(DataError, match=r"lime cannot be read \(Permission denied\)"):
            open_images(root)

    def test_what_is_there_twice_or_of_no_class_is_named(self, tmp_path):
        records = [("0", ["a"]), ("1", np.nan), ("2", "red"), ("2", "lime")]
        samples = [{"__key__": k, "jpg": jpeg("red"), "json": {"class": c}} for k, c in records]
        write_shard(tmp_path / "train-0.tar", *samples)
        write_shard(tmp_path / "extra-0.tar")
        with pytest.warns(UserWarning) as warned:
            source = open_images(tmp_path)
        assert (source.keys, source.class_names) == (["2"], ["red"])
        said = " ".join(str(warning.message) for warning in warned)
        for part in ("2.json is there twice", "class ['a'] is", "class nan is", "extra-0.tar"):
            assert part in said


REFUSED_SOURCES = [
    ("", "train", "neither a folder nor a shard is at ''"),
    ("manifest", "train", "train.manifest.json is damaged"),
    ("text", "train", r"neither shards .* only .*notes\.txt"),
    ("one", "test", r"no split 'test' in .*one, only \['train'\]"),
    ("empty", "test", "No image can be used: 0 of 0"),
    ("broken", "test", r"No image can be used: 3 of 3 .*0\.jpg"),
    ("two", "test", "are both of the split val"),
    ("above", "train", "two holds the splits train, val: give that"),
]


@pytest.mark.filterwarnings("ignore:.*files that are not read")
@pytest.mark.parametrize(("name", "split", "message"), REFUSED_SOURCES)
def test_refusals_say_what_was_looked_for_and_found(tmp_path, name, split, message):
    for each in ("one", "empty", "broken"):
        write_folder(tmp_path / each, ["train"], per_class=1)
        (tmp_path / each / "test").mkdir()
    (tmp_path / "one/test").rmdir()
    for number in range(3):
        (tmp_path / f"broken/test/{number}.jpg").write_bytes(b"broken")
    write_folder(tmp_path / "two", ["val", "validation"])
    write_folder(tmp_path / "above/two", ["train", "val"])
    for each, file in (("text", "notes.txt"), ("manifest", "train.manifest.json")):
        (tmp_path / each).mkdir()
        (tmp_path / each / file).write_text("[]")
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / name if name else "", split)


def test_several_sources_are_mixed_as_often_as_asked():
    landscapes, emoji = (open_images(f"data/{name}", "train") for name in ("landscapes", "emoji"))
    both = mixed([landscapes, emoji], [3, 1])
    assert len(both) == 3 * len(landscapes) + len(emoji)
    assert set(both.class_names) == {*landscapes.class_names, *emoji.class_names}
    keys = training_views(both, 0, len(both), 16, seed=0)[2]  # an epoch
    assert Counter(keys) == Counter(3 * landscapes.keys + emoji.keys)


@given(st.lists(st.floats(0, 0.999), min_size=4, max_size=4))
def test_other_colors_are_turned_hues(draws):
    grey = np.linspace(60, 190, 27, dtype=np.float32).reshape(3, 3, 3).mean(2, keepdims=True)
    again = recolored(np.repeat(grey, 3, axis=2), np.array(draws))
    np.testing.assert_allclose(again, again.mean(2, keepdims=True) * np.ones(3), atol=0.2)
    # Half a turn of the hue makes a color its complement, of the same luma.
    red = np.array([[[150.0, 110.0, 110.0]]])
    other = recolored(red, np.array([0.5, 0.5, 0.5, 0.5]))[0, 0]
    luma = np.array([0.299, 0.587, 0.114])
    assert other @ luma == pytest.approx(red[0, 0] @ luma, abs=0.01)
    assert other[0] < other[1] and other[1] == pytest.approx(other[2], abs=1.0)
