"""Decoding, data sources, index, views and degraded copies, on images made here."""

import io
import json
import os
import shutil
import tarfile
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sitlib.data import (
    DataError,
    ImageError,
    decode_image,
    degrade,
    held_out_views,
    images,
    open_images,
    training_views,
)


def gradient(width=40, height=24) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3]
    return np.stack(channels, -1).astype(np.uint8)


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def jpeg(color, size=(32, 24)) -> bytes:
    return encoded(Image.new("RGB", size, color), "JPEG", quality=95)


def pixels(content) -> np.ndarray:
    image = decode_image(content)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


class TestDecoding:
    def test_rgb_is_unchanged_from_bytes_and_from_a_path(self, tmp_path):
        content = encoded(Image.fromarray(gradient()))
        (tmp_path / "a.png").write_bytes(content)
        for source in (content, tmp_path / "a.png", str(tmp_path / "a.png")):
            assert np.array_equal(pixels(source), gradient())

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

    @pytest.mark.parametrize(
        ("orientation", "undo"),
        [
            (3, lambda a: a[::-1, ::-1]),
            (6, lambda a: np.rot90(a, -1)),
            (8, lambda a: np.rot90(a)),
            (2, np.fliplr),
        ],
    )
    def test_exif_orientation_is_applied(self, orientation, undo):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = pixels(encoded(Image.fromarray(gradient()), exif=exif))
        assert np.array_equal(turned, undo(gradient()))

    @pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
    def test_animation_gives_the_first_frame(self, format):
        frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
        options = {"lossless": True} if format == "WEBP" else {}
        options |= {"save_all": True, "append_images": frames[1:], "duration": 50}
        assert np.all(pixels(encoded(frames[0], format, **options)) == [255, 0, 0])

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "cannot be decoded"),
            (b"not an image at all", "cannot be decoded"),
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
        content = bytearray(encoded(Image.fromarray(gradient()), format))
        content[where % len(content)] = value
        with warnings.catch_warnings(), suppress(ImageError):
            warnings.simplefilter("ignore")
            assert decode_image(bytes(content)).shape[0] == 3


def write_shard(path, samples) -> None:
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
        write_shard(tmp_path / "set-train-0000.tar", samples[:7])
        write_shard(tmp_path / "set-train-0001.tar", samples[7:])
        assert len(open_images(tmp_path / "set-train-0000.tar")) == 7
        source = open_images(tmp_path, "train")
        assert source.labels.tolist() == [i % 3 for i in range(12)]
        assert source.labels.dtype == torch.int64 and source.class_names == ["0", "1", "2"]
        assert source.keys == [f"n{i:03}" for i in range(12)]
        record = source[10]
        assert (record.key, record.label, record.class_name) == ("n010", 1, "1")
        assert record.image.shape == (3, 24, 32) and abs(int(record.image[0].max()) - 10) <= 2

    def test_records(self, tmp_path):
        for split, classes in (("train", ["cat", "dog", None]), ("test", ["ant", "dog"])):
            content = encoded(Image.new("RGB", (9, 9), "red"))
            samples = [
                {"__key__": f"{split}/{i}", "left.png": content, "json": {"class": name}}
                for i, name in enumerate(classes)
            ]
            write_shard(tmp_path / f"{split}-0.tar", samples)
        train, test = (open_images(tmp_path, split) for split in ("train", "test"))
        assert train.class_names == test.class_names == ["ant", "cat", "dog"]
        assert train.labels.tolist() == [1, 2, -1] and test.labels.tolist() == [0, 2]
        assert train[2].class_name is None and train[0].key == "train/0"
        assert train[0].meta == {"class": "cat"}
        labeled = train.labeled()
        assert labeled.labels.tolist() == [1, 2] and len(train) == 3

    def test_without_splits_they_are_divided_by_key(self, tmp_path):
        samples = [{"__key__": f"{i}", "jpg": jpeg("red", (8, 8))} for i in range(250)]
        write_shard(tmp_path / "photos.tar", samples[:200])
        train, test = (set(open_images(tmp_path, split).keys) for split in ("train", "test"))
        assert not train & test and len(train | test) == 200 and 8 <= len(test) <= 35
        write_shard(tmp_path / "more.tar", samples[200:])
        assert test <= set(open_images(tmp_path, "test").keys)  # more images move no old one

    def test_damaged(self, tmp_path):
        samples = [{"__key__": f"{i}", "jpg": jpeg("red")} for i in range(6)]
        write_shard(tmp_path / "train-0.tar", samples)
        samples = [{"__key__": "text", "txt": "no image"}, {"__key__": "z", "jpg": jpeg("red")}]
        write_shard(tmp_path / "train-1.tar", samples)
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

    def test_without_splits(self, tmp_path):
        write_folder(tmp_path / "a", [""], per_class=40)
        train, test = open_images(tmp_path / "a", "train"), open_images(tmp_path / "a", "test")
        assert len(train) + len(test) == 80 and not set(train.keys) & set(test.keys)
        assert 1 <= len(test) <= 20 and train.class_names == test.class_names == ["lime", "red"]
        (tmp_path / "b").mkdir()
        for number in range(3):
            (tmp_path / "b" / f"{number}.JPG").write_bytes(jpeg("red"))
        plain = open_images(tmp_path / "b", "train")
        assert len(plain) == 2 and len(open_images(tmp_path / "b", "test")) == 1  # never empty
        assert plain.labels.tolist() == [-1, -1] and plain[0].class_name is None

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
        assert len(source.unusable) == 1
        with pytest.warns(UserWarning, match=r"skipped .*lime/5\.jpg"):
            fresh = training_views(open_images(root), 0, 12, 16, seed=1)
        again = training_views(source, 0, 12, 16, seed=1)
        assert torch.equal(again[0], fresh[0]) and again[2] == fresh[2]

    def test_spellings_of_splits(self, tmp_path):
        for train, test in (("Train", "Test"), ("training", "testing"), ("TRAIN2017", "dev")):
            root = write_folder(tmp_path / train, [train, test])
            for split in ("train", "test"):
                assert open_images(root, split).class_names == ["lime", "red"]
        write_folder(tmp_path / "two", ["val", "validation"])
        with pytest.raises(DataError, match="are both of the split val"):
            open_images(tmp_path / "two", "test")
        write_folder(tmp_path / "above/dataset", ["train", "test"])
        with pytest.raises(DataError, match="dataset holds the splits test, train: give that"):
            open_images(tmp_path / "above")
        write_shard(tmp_path / "Train/set-Train-0.tar", [{"__key__": "a", "jpg": jpeg("red")}])
        with pytest.raises(DataError, match="holds shards .* and folders of splits"):
            open_images(tmp_path / "Train")
        (tmp_path / "Train/set-Train-0.tar").rename(tmp_path / "two/set-Train-0.tar")
        shutil.rmtree(tmp_path / "two/val")
        shutil.rmtree(tmp_path / "two/validation")
        assert open_images(tmp_path / "two", "train").keys == ["a"]

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


REFUSED_SOURCES = [
    ("nowhere", "train", r"neither a folder nor a shard is at .*nowhere"),
    ("text", "train", r"neither WebDataset shards .* found there: .*notes\.txt"),
    ("one", "test", r"no split 'test' in .*one, only \['train'\]"),
    ("empty", "test", "No image can be used: 0 of 0"),
    ("broken", "test", r"No image can be used: 3 of 3 .*0\.jpg"),
]


@pytest.mark.parametrize(("name", "split", "message"), REFUSED_SOURCES)
def test_refusals_say_what_was_looked_for_and_found(tmp_path, name, split, message):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/notes.txt").write_text("no images")
    for each in ("one", "empty", "broken"):
        write_folder(tmp_path / each, ["train"], per_class=1)
    (tmp_path / "empty/test").mkdir()
    (tmp_path / "broken/test").mkdir()
    for number in range(3):
        (tmp_path / f"broken/test/{number}.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / name, split)


@pytest.fixture
def photos(tmp_path):
    """Twenty pictures that differ, every third one without a class."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (8, 16, 3), dtype=np.uint8))
        content = encoded(noise.resize((128, 64), Image.Resampling.BICUBIC))
        record = {"class": None if i % 3 == 0 else "ab"[i % 2]}
        samples.append({"__key__": f"{i:02}", "png": content, "json": record})
    write_shard(tmp_path / "train-0.tar", samples)
    return open_images(tmp_path)


class TestViews:
    @pytest.mark.parametrize("kind", ["crops", "wide"])
    def test_pure_in_seed_and_step(self, photos, kind):
        first = [training_views(photos, step, 6, 16, seed=3, kind=kind) for step in range(5)]
        for step in (4, 0, 2):  # any order, as after a restart
            again = training_views(photos, step, 6, 16, seed=3, kind=kind)
            assert all(torch.equal(a, b) for a, b in zip(first[step][:2], again[:2], strict=True))
            assert first[step][2] == again[2]
        views, labels, keys = first[0]
        assert labels.tolist() == [int(photos.labels[photos.position_of[key]]) for key in keys]
        assert views.shape == (6, 3, 16, 16) and views.dtype == torch.float32
        assert labels.dtype == torch.int64 and views.min() >= 0 and views.max() <= 1
        assert not torch.equal(views, first[1][0])
        assert not torch.equal(views, training_views(photos, 0, 6, 16, seed=4, kind=kind)[0])

    def test_side_position_and_flip_of_crops(self, tmp_path):
        """The picture encodes its coordinates, so that a view tells where it was taken."""
        x = np.repeat(np.arange(256, dtype=np.uint8)[None], 128, 0)
        y = np.repeat(np.arange(128, dtype=np.uint8)[:, None], 256, 1)
        content = encoded(Image.fromarray(np.stack([x, y, y], -1)))
        write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "png": content}])
        source = open_images(tmp_path)

        def measure(**options):
            views = training_views(source, 0, 600, 16, seed=0, **options)[0] * 255
            # Source pixels for a view pixel, negative if mirrored.
            slope = (views[:, 0, 8, 12] - views[:, 0, 8, 4]) / 8
            return slope.abs() * 16, slope < 0, views[:, 0, 8, 8], views[:, 1, 8, 8]

        side, mirrored, center_x, center_y = measure(min_crop=0.25)
        assert 31 <= side.min() < 35 and 122 < side.max() <= 130
        assert abs(side.log().mean().exp() - 64) < 5  # log-uniform between 32 and 128
        assert 0.42 < mirrored.float().mean() < 0.58
        assert center_x.min() < 40 and center_x.max() > 215
        assert center_y.min() < 30 and center_y.max() > 98
        assert not measure(flip=False)[1].any()
        side, _, center_x, _ = measure(kind="wide")
        assert side.min() >= 113 and side.max() <= 130
        assert center_x.min() < 70 and center_x.max() > 185
        assert measure(min_crop=0.01)[0].min() >= 15  # not enlarged while the picture is larger

    def test_views_are_antialiased(self, tmp_path):
        board = np.indices((128, 128)).sum(0) % 2 * 255
        content = encoded(Image.fromarray(board.astype(np.uint8)))
        write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "png": content}])
        views = training_views(open_images(tmp_path), 0, 20, 16, seed=0, kind="wide")[0]
        assert (views[:, :, 2:-2, 2:-2] - 0.5).abs().max() < 0.1

    def test_small_images_are_enlarged_with_a_warning(self, photos):
        with pytest.warns(UserWarning, match="smaller than 100x100; they are enlarged"):
            assert training_views(photos, 0, 8, 100, seed=0)[0].shape == (8, 3, 100, 100)

    def test_held_out_views_take_the_images_in_turn(self, photos):
        views, labels, keys = held_out_views(photos, 50, 16, seed=0)
        assert views.shape == (50, 3, 16, 16) and {keys.count(k) for k in photos.keys} == {2, 3}
        assert labels.tolist() == [int(photos.labels[photos.position_of[key]]) for key in keys]
        assert torch.equal(views[:30], held_out_views(photos, 30, 16, seed=0)[0])
        assert torch.equal(views[20:], held_out_views(photos, 30, 16, seed=0, first=20)[0])
        assert not torch.equal(views[:20], views[20:40])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "narrow"}, "not narrow"),
            ({"min_crop": 0}, "min_crop"),
            ({"seed": -1}, "non-negative"),
        ],
    )
    def test_refusals(self, photos, options, message):
        with pytest.raises(ValueError, match=message):
            training_views(photos, 0, 2, 16, **({"seed": 0} | options))
        for count, size in ((0, 16), (2, 0)):
            with pytest.raises(ValueError, match=f"{count} views of {size} px"):
                training_views(photos, 0, count, size, seed=0)


class TestDegradedCopies:
    @pytest.fixture
    def smooth(self):
        torch.manual_seed(0)
        noise = torch.rand(24, 3, 8, 8)
        return torch.nn.functional.interpolate(noise, (32, 48), mode="bicubic").clamp(0, 1)

    def test_every_copy_is_worse_but_still_like_its_original(self, smooth):
        worse = degrade(smooth, seed=3)
        assert worse.shape == smooth.shape and worse.dtype == torch.float32
        assert worse.min() >= 0 and worse.max() <= 1
        assert ((worse - smooth).square().mean(dim=(1, 2, 3)) > 1e-5).all()
        distances = (worse[:, None] - smooth[None]).square().mean(dim=(2, 3, 4))
        assert torch.equal(distances.argmin(1), torch.arange(len(smooth)))

    def test_copies_follow_from_the_seed_and_their_index_alone(self, smooth):
        worse = degrade(smooth, seed=3)
        assert torch.equal(degrade(smooth[:5], seed=3), worse[:5])
        assert not torch.equal(degrade(smooth, seed=4), worse)
        same = degrade(smooth[:1].expand(8, -1, -1, -1), seed=0)
        assert len({tuple(x.flatten()[:50].tolist()) for x in same}) == 8  # each in its own way


def test_names_with_pax_headers_and_folders(tmp_path):
    """Long and non-ASCII names have headers of their own; the key is the path to the first dot."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for key in ("é" * 80 + "/a", "folder.v2/b"):
            contents = {"JPG": jpeg("red"), "json": json.dumps({"label": 3}).encode()}
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = open_images(tmp_path)
    assert source.keys == ["é" * 80 + "/a", "folder.v2/b"] and source[1].class_name == "3"
