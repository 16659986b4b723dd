"""Decoding, data sources and views of sitlib.data, on images made here."""

import io
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from multiprocessing import get_all_start_methods

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
    held_out_views,
    open_images,
    prefetch,
    sources,
    training_views,
)
from workbook.paths import ROOT


def gradient(width=40, height=24) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3], -1).astype(
        np.uint8
    )


def file_of(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def jpeg(colour, size=(32, 24)) -> bytes:
    return file_of(Image.new("RGB", size, colour), "JPEG", quality=95)


def pixels(content) -> np.ndarray:
    image = decode_image(content)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


class TestDecoding:
    def test_rgb_is_unchanged_from_bytes_and_from_a_path(self, tmp_path):
        content = file_of(Image.fromarray(gradient()), "PNG")
        (tmp_path / "a.png").write_bytes(content)
        assert np.array_equal(pixels(content), gradient())
        assert np.array_equal(pixels(tmp_path / "a.png"), gradient())
        assert np.array_equal(pixels(str(tmp_path / "a.png")), gradient())

    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_16_bit_grey_is_scaled_not_clipped(self, format):
        values = np.linspace(0, 65535, 40 * 24).round().astype(np.uint16).reshape(24, 40)
        found = pixels(file_of(Image.fromarray(values), format))
        assert np.array_equal(found[..., 0], np.round(values / 257).astype(np.uint8))
        assert np.array_equal(found[..., 0], found[..., 2])

    def test_grey_one_bit_and_palette(self):
        image = Image.fromarray(gradient())
        grey = np.asarray(image.convert("L"))
        assert np.array_equal(
            pixels(file_of(image.convert("L"), "PNG")), np.repeat(grey[..., None], 3, -1)
        )
        assert set(np.unique(pixels(file_of(image.convert("1"), "PNG")))) == {0, 255}
        palette = image.quantize(16)
        assert np.array_equal(pixels(file_of(palette, "PNG")), np.asarray(palette.convert("RGB")))

    def test_transparency_is_composited_on_white(self):
        alpha = np.full((24, 40, 1), 255, np.uint8)
        alpha[:, :10], alpha[:, 10:20] = 0, 128
        found = pixels(
            file_of(Image.fromarray(np.concatenate([gradient(), alpha], -1)), "PNG")
        ).astype(float)
        weight = alpha / 255
        assert np.abs(found - (weight * gradient() + (1 - weight) * 255)).max() <= 1
        assert np.all(found[:, :10] == 255)

    def test_transparent_palette_entry_and_grey_alpha(self):
        palette = Image.new("P", (20, 20), 0)
        palette.putpalette([200, 0, 0, 0, 0, 200])
        palette.paste(1, (10, 0, 20, 20))
        found = pixels(file_of(palette, "GIF", transparency=0))
        assert np.all(found[:, :10] == 255) and np.all(found[:, 10:] == [0, 0, 200])
        grey = Image.merge("LA", [Image.new("L", (16, 16), 0), Image.new("L", (16, 16), 128)])
        assert np.all(np.abs(pixels(file_of(grey, "PNG")).astype(int) - 127) <= 1)

    def test_cmyk_jpeg(self):
        cyan = file_of(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
        assert np.all(np.abs(pixels(cyan).astype(int) - [0, 255, 255]) <= 4)

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
        assert np.array_equal(
            pixels(file_of(Image.fromarray(gradient()), "PNG", exif=exif)), undo(gradient())
        )

    @pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
    def test_animation_gives_the_first_frame(self, format):
        frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if format == "WEBP" else {}
        content = file_of(
            frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options
        )
        assert np.all(pixels(content) == [255, 0, 0])

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "cannot be decoded"),
            (b"not an image at all", "cannot be decoded"),
            (jpeg("red")[:200], "cannot be decoded"),
            (file_of(Image.fromarray(gradient(200, 200)), "PNG")[:-2000], "cannot be decoded"),
            (jpeg("red", (1, 1)), "only 1x1 pixels"),
            (jpeg("red", (500, 3)), "only 500x3 pixels"),
            (
                file_of(Image.fromarray(gradient()[..., 0].astype(np.float32)), "TIFF"),
                "floating point",
            ),
            (
                file_of(Image.fromarray(gradient()[..., 0].astype(np.int32) * 1000), "TIFF"),
                "do not fit 16 bits",
            ),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, content, reason):
        with pytest.raises(ImageError, match=reason) as error:
            decode_image(content)
        assert "BytesIO" not in str(error.value)

    def test_a_single_pixel_is_decoded_if_asked_for(self):
        assert decode_image(
            file_of(Image.new("RGB", (1, 1), "lime"), "PNG"), min_side=1
        ).flatten().tolist() == [0, 255, 0]

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"])
    )
    def test_damage_gives_an_image_or_an_image_error(self, where, value, format):
        content = bytearray(file_of(Image.fromarray(gradient()), format))
        content[where % len(content)] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(ImageError):
                assert decode_image(bytes(content)).shape[0] == 3


def write_shard(path, samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def colour_folder(root, names, colours=("red", "lime"), per_class=6):
    """root/<name>/colour/n.jpg for every name ('' for no split)."""
    for name in names:
        for colour in colours:
            folder = root / name / colour
            folder.mkdir(parents=True)
            for number in range(per_class):
                (folder / f"{number}.jpg").write_bytes(jpeg(colour))
    return root


class TestSources:
    def test_shards_with_class_numbers(self, tmp_path):
        samples = [{"__key__": f"n{i:03}", "jpg": jpeg((i, 0, 0)), "cls": i % 3} for i in range(12)]
        write_shard(tmp_path / "train-0000.tar", samples[:7])
        write_shard(tmp_path / "train-0001.tar", samples[7:])
        source = open_images(tmp_path, "train")
        assert (
            source.labels.tolist() == [i % 3 for i in range(12)]
            and source.labels.dtype == torch.int64
        )
        assert source.class_names == ["0", "1", "2"] and source.keys == [
            f"n{i:03}" for i in range(12)
        ]
        record = source[10]
        assert (record.key, record.label, record.class_name) == ("n010", 1, "1")
        assert record.image.shape == (3, 24, 32) and abs(int(record.image[0].max()) - 10) <= 2
        assert open_images(tmp_path, "train", classes=["2", "0"]).labels.tolist() == [1, 0] * 4

    def test_shards_with_records(self, tmp_path):
        for split, classes in (("train", ["cat", "dog", None]), ("test", ["ant", "dog"])):
            samples = [
                {
                    "__key__": f"{split}/{i}",
                    "left.png": file_of(Image.new("RGB", (9, 9), "red"), "PNG"),
                    "json": {"class": c},
                }
                for i, c in enumerate(classes)
            ]
            write_shard(tmp_path / f"{split}-0.tar", samples)
        train, test = (open_images(tmp_path, split) for split in ("train", "test"))
        assert (
            train.class_names == test.class_names == ["ant", "cat", "dog"]
        )  # one meaning in all splits
        assert train.labels.tolist() == [1, 2, -1] and test.labels.tolist() == [0, 2]
        assert (
            train[2].class_name is None
            and train[0].meta == {"class": "cat"}
            and train[0].key == "train/0"
        )
        labelled = train.labelled()
        assert (
            labelled.labels.tolist() == [1, 2]
            and len(train) == 3
            and labelled.class_names == train.class_names
        )

    def test_patterns(self, tmp_path):
        for shard in range(3):
            write_shard(
                tmp_path / f"set-train-{shard:02}.tar",
                [{"__key__": f"{shard}", "jpg": jpeg("red"), "cls": shard}],
            )
        assert len(open_images(f"{tmp_path}/set-train-{{00..01}}.tar")) == 2
        assert len(open_images(f"{tmp_path}/set-*.tar")) == 3
        with pytest.raises(DataError, match=r"set-train-03\.tar"):
            open_images(f"{tmp_path}/set-train-{{00..03}}.tar")
        with pytest.raises(DataError, match=r"no split 'test'.*\['train'\]"):
            open_images(f"{tmp_path}/set-*.tar", "test")

    def test_shards_without_splits_are_divided_by_key(self, tmp_path):
        samples = [{"__key__": f"{i}", "jpg": jpeg("red", (8, 8))} for i in range(200)]
        write_shard(tmp_path / "photos.tar", samples)
        train, test = (set(open_images(tmp_path, split).keys) for split in ("train", "test"))
        assert not train & test and len(train | test) == 200 and 8 <= len(test) <= 35
        write_shard(
            tmp_path / "more.tar",
            [{"__key__": f"x{i}", "jpg": jpeg("red", (8, 8))} for i in range(50)],
        )
        assert test <= set(
            open_images(tmp_path, "test").keys
        )  # more images move none of the old ones

    def test_folder_with_splits(self, tmp_path):
        colour_folder(tmp_path, ["train", "val"])
        train, test = open_images(tmp_path, "train"), open_images(tmp_path, "test")
        assert len(train) == len(test) == 12 and train.class_names == ["lime", "red"]
        assert train.keys[0] == "train/lime/0.jpg" and test.keys[0] == "val/lime/0.jpg"
        image = train[0].image.float().mean((1, 2))
        assert train[0].class_name == "lime" and image[1] > 200 > 60 > image[0]

    def test_of_a_test_split_without_classes_the_validation_images_are_taken(self, tmp_path):
        """As ImageNet and MS-COCO are downloaded."""
        root = colour_folder(tmp_path / "imagenet", ["train", "val"])
        (root / "test").mkdir()
        (root / "test/0.jpg").write_bytes(jpeg("red"))
        test = open_images(root, "test")
        assert len(test) == len(test.labelled()) == 12 and test.keys[0] == "val/lime/0.jpg"
        for split in ("train2017", "val2017", "test2017"):
            (tmp_path / "coco" / split).mkdir(parents=True)
            (tmp_path / "coco" / split / "a.jpg").write_bytes(jpeg("red"))
        assert open_images(tmp_path / "coco", "test").keys == ["val2017/a.jpg"]
        (tmp_path / "coco/val2017/a.jpg").unlink()
        (tmp_path / "coco/val2017").rmdir()
        assert open_images(tmp_path / "coco", "test").keys == ["test2017/a.jpg"]  # better than none
        own = colour_folder(tmp_path / "own", ["train", "val", "test"])
        assert open_images(own, "test").keys[0] == "test/lime/0.jpg"

    def test_folder_with_classes_and_without(self, tmp_path):
        colour_folder(tmp_path / "a", [""], per_class=40)
        train, test = open_images(tmp_path / "a", "train"), open_images(tmp_path / "a", "test")
        assert (
            len(train) + len(test) == 80
            and not set(train.keys) & set(test.keys)
            and 1 <= len(test) <= 20
        )
        assert train.class_names == test.class_names == ["lime", "red"]
        (tmp_path / "b").mkdir()
        for number in range(3):
            (tmp_path / "b" / f"{number}.JPG").write_bytes(jpeg("red"))
        plain = open_images(tmp_path / "b", "train")
        assert (
            len(plain) == 2 and len(open_images(tmp_path / "b", "test")) == 1
        )  # never an empty side
        assert (
            plain.labels.tolist() == [-1, -1]
            and plain.class_names == []
            and plain[0].class_name is None
        )
        with pytest.raises(DataError, match="has a class"):
            plain.labelled()

    def test_errors_say_what_was_looked_for_and_found(self, tmp_path):
        with pytest.raises(DataError, match="looked for a folder or a .tar shard at .*nowhere"):
            open_images(tmp_path / "nowhere")
        (tmp_path / "notes.txt").write_text("no images")
        with pytest.raises(
            DataError, match=r"neither WebDataset shards .* found there: notes\.txt"
        ):
            open_images(tmp_path)
        root = colour_folder(tmp_path / "set", ["train"])
        with pytest.raises(
            DataError, match=r"no split 'test' in .*set; found the splits \['train'\]"
        ):
            open_images(root, "test")
        with pytest.raises(DataError, match=r"no class \['blue'\] in .*'train'.*\['lime', 'red'\]"):
            open_images(root, "train", classes=["red", "blue"])
        (root / "test").mkdir()
        with pytest.raises(DataError, match="'test' of .*set has no usable image"):
            open_images(root, "test")
        for number in range(3):
            (root / "test" / f"{number}.jpg").write_bytes(b"broken")
        with (
            pytest.warns(UserWarning, match="skipped"),
            pytest.raises(DataError, match=r"None of the 3 images.*0\.jpg"),
        ):
            open_images(root, "test")
        assert issubclass(DataError, ValueError)

    def test_names_and_numbers_do_not_mix(self, tmp_path):
        write_shard(
            tmp_path / "train-0.tar",
            [
                {"__key__": "a", "jpg": jpeg("red"), "cls": 1},
                {"__key__": "b", "jpg": jpeg("red"), "cls": "dog"},
            ],
        )
        with pytest.raises(DataError, match="mixes class names and class numbers"):
            open_images(tmp_path)

    def test_unusable_images_are_named_counted_and_left_out(self, tmp_path):
        root = colour_folder(tmp_path, ["train"])
        (root / "train/red/2.jpg").write_bytes(jpeg("red")[:150])
        (root / "train/red/dot.png").write_bytes(file_of(Image.new("RGB", (1, 1)), "PNG"))
        with pytest.warns(UserWarning) as caught:
            source = open_images(root, "train")
        messages = [str(warning.message) for warning in caught]
        assert any("red/2.jpg" in message for message in messages)
        assert any("2 of 13 images" in message for message in messages)
        assert len(source) == len(source.labels) == 11
        assert [name.rpartition("/")[2] for name, _ in source.skipped] == ["2.jpg", "dot.png"]
        assert {record.class_name for record in source} == {"red", "lime"}

    def test_in_large_sets_the_next_usable_image_stands_in(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "CHECK_AT_MOST", 3)
        root = colour_folder(tmp_path, ["train"])
        (root / "train/lime/5.jpg").write_bytes(b"broken")
        source = open_images(root, "train")
        assert len(source) == 12 and not source.skipped
        with pytest.warns(UserWarning, match=r"skipped .*lime/5\.jpg"):
            assert source[5].key == "train/red/0.jpg" and source[5].class_name == "red"
        assert len(source.skipped) == 1
        with pytest.warns(UserWarning, match=r"skipped .*lime/5\.jpg"):
            fresh = training_views(open_images(root), 0, 12, 16, seed=1)
        again = training_views(source, 0, 12, 16, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(again[:2], fresh[:2], strict=True))
        assert again[2] == fresh[2]

    def test_damaged_shards(self, tmp_path):
        write_shard(
            tmp_path / "train-0.tar", [{"__key__": f"{i}", "jpg": jpeg("red")} for i in range(6)]
        )
        write_shard(
            tmp_path / "train-1.tar",
            [{"__key__": "text", "txt": "no image"}, {"__key__": "z", "jpg": jpeg("red")}],
        )
        content = (tmp_path / "train-0.tar").read_bytes()
        (tmp_path / "train-0.tar").write_bytes(content[: 512 * 4 + 100])
        with pytest.warns(UserWarning) as caught:
            source = open_images(tmp_path)
        assert source.keys[-1] == "z" and "text" not in source.keys
        text = " ".join(str(warning.message) for warning in caught)
        assert "train-0.tar" in text and "text: no image among its files (txt)" in text

    def test_cache_is_bounded_and_changes_nothing(self, tmp_path):
        root = colour_folder(tmp_path, ["train"])
        small, large = open_images(root, cache_bytes=5 * 32 * 24 * 4), open_images(root)
        assert all(torch.equal(a.image, b.image) for a, b in zip(small, large, strict=True))
        assert len(small._store._cache) == 5 and len(large._store._cache) == 12


@pytest.fixture
def photos(tmp_path):
    """Twenty pictures that differ, every third one without a class."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)).resize(
            (128, 64), Image.Resampling.BICUBIC
        )
        samples.append(
            {
                "__key__": f"{i:02}",
                "png": file_of(noise, "PNG"),
                "json": {"class": None if i % 3 == 0 else "ab"[i % 2]},
            }
        )
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
        images, labels, keys = first[0]
        position = {key: index for index, key in enumerate(photos.keys)}
        assert labels.tolist() == [int(photos.labels[position[key]]) for key in keys]
        assert (
            images.shape == (6, 3, 16, 16)
            and images.dtype == torch.float32
            and labels.dtype == torch.int64
        )
        assert images.min() >= 0 and images.max() <= 1
        assert not torch.equal(images, first[1][0])
        assert not torch.equal(images, training_views(photos, 0, 6, 16, seed=4, kind=kind)[0])

    def test_batches_only_cut_one_stream(self, photos):
        small = torch.cat([training_views(photos, step, 4, 16, seed=0)[0] for step in range(3)])
        assert torch.equal(small, training_views(photos, 0, 12, 16, seed=0)[0])

    def test_an_epoch_shows_every_image_once(self, tmp_path):
        samples = [
            {"__key__": f"{i}", "png": file_of(Image.new("RGB", (20, 20), (i, 0, 0)), "PNG")}
            for i in range(24)
        ]
        write_shard(tmp_path / "train-0.tar", samples)
        source = open_images(tmp_path)
        shown = [
            (training_views(source, step, 8, 8, seed=5)[0][:, 0, 0, 0] * 255).round().int().tolist()
            for step in range(6)
        ]
        epochs = [sum(shown[:3], []), sum(shown[3:], [])]
        assert all(sorted(epoch) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1]

    def test_side_position_and_flip_of_crops(self, tmp_path):
        """The picture encodes its coordinates, so that a view tells where it was taken."""
        x = np.repeat(np.arange(256, dtype=np.uint8)[None], 128, 0)
        y = np.repeat(np.arange(128, dtype=np.uint8)[:, None], 256, 1)
        picture = Image.fromarray(np.stack([x, y, y], -1))
        write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "png": file_of(picture, "PNG")}])
        source = open_images(tmp_path)

        def measure(**options):
            views = training_views(source, 0, 600, 16, seed=0, **options)[0] * 255
            # Source pixels for a view pixel, negative if mirrored.
            slope = (views[:, 0, 8, 12] - views[:, 0, 8, 4]) / 8
            return slope.abs() * 16, slope < 0, views[:, 0, 8, 8], views[:, 1, 8, 8]

        side, mirrored, centre_x, centre_y = measure(min_crop=0.25)
        assert 31 <= side.min() < 35 and 122 < side.max() <= 130
        assert abs(side.log().mean().exp() - 64) < 5  # log-uniform between 32 and 128
        assert 0.42 < mirrored.float().mean() < 0.58
        assert (
            centre_x.min() < 40
            and centre_x.max() > 215
            and centre_y.min() < 30
            and centre_y.max() > 98
        )
        assert not measure(flip=False)[1].any()
        side, mirrored, centre_x, _ = measure(kind="wide")
        assert (
            side.min() >= 113 and side.max() <= 130 and centre_x.min() < 70 and centre_x.max() > 185
        )
        assert (
            measure(min_crop=0.01)[0].min() >= 15
        )  # never enlarged while the picture is large enough

    def test_views_are_antialiased(self, tmp_path):
        board = np.indices((128, 128)).sum(0) % 2 * 255
        write_shard(
            tmp_path / "train-0.tar",
            [{"__key__": "a", "png": file_of(Image.fromarray(board.astype(np.uint8)), "PNG")}],
        )
        views = training_views(open_images(tmp_path), 0, 20, 16, seed=0, kind="wide")[0]
        assert (views[:, :, 2:-2, 2:-2] - 0.5).abs().max() < 0.1

    def test_small_images_are_enlarged_with_one_warning(self, photos):
        with pytest.warns(
            UserWarning, match="128x64 pixels; they are enlarged to views of 100x100"
        ) as caught:
            images, *_ = training_views(photos, 0, 8, 100, seed=0)
            training_views(photos.labelled(), 1, 8, 100, seed=0)
        assert images.shape == (8, 3, 100, 100) and len(caught) == 1

    def test_held_out_views_take_the_images_in_turn(self, photos):
        images, labels, keys = held_out_views(photos, 50, 16, seed=0)
        counts = [keys.count(key) for key in photos.keys]
        assert images.shape == (50, 3, 16, 16) and set(counts) == {2, 3}
        assert labels.tolist() == [int(photos.labels[photos.keys.index(key)]) for key in keys]
        assert torch.equal(images[:30], held_out_views(photos, 30, 16, seed=0)[0])
        assert not torch.equal(images[:20], images[20:40])

    def test_labelled_views_all_have_a_class(self, photos):
        labels = torch.cat(
            [
                training_views(photos.labelled(), step, 8, 16, seed=0, kind="wide")[1]
                for step in range(4)
            ]
        )
        assert labels.min() == 0 and labels.max() == 1
        assert -1 in training_views(photos, 0, 20, 16, seed=0)[1]

    def test_wrong_arguments(self, photos):
        for options, message in (
            ({"kind": "narrow"}, "'crops' or 'wide'"),
            ({"min_crop": 0}, "min_crop"),
            ({"seed": -1}, "seed"),
        ):
            with pytest.raises(ValueError, match=message):
                training_views(photos, 0, 2, 16, **({"seed": 0} | options))


class TestPrefetch:
    def test_order_and_thread(self):
        found = list(prefetch(lambda step: (step, threading.current_thread().name), 3, 20))
        assert found == [(step, (step, "prefetch")) for step in range(3, 20)]
        assert list(prefetch(lambda step: step, 5, 5)) == []

    def test_exceptions_reach_the_consumer_at_their_step(self):
        seen = []
        with pytest.raises(ZeroDivisionError):
            for step, _ in prefetch(lambda step: 1 / (step - 4), 0, 10):
                seen.append(step)
        assert seen == [0, 1, 2, 3]

    def test_leaving_the_loop_stops_the_thread(self):
        before, started = threading.active_count(), []
        for step, _ in prefetch(started.append, 0, 10**9, depth=2):
            if step == 3:
                break
        deadline = time.time() + 5
        while threading.active_count() > before and time.time() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before and len(started) < 12

    def test_a_batch_may_have_more_tensors_than_files_may_be_open_unless_one_asks(self):
        """32 parts of three tensors of each step, as the paper's text models have them, each a file of shared memory."""
        if "fork" not in get_all_start_methods():
            pytest.skip("no worker processes here")
        program = """if True:
            import resource, torch
            from sitlib.data import prefetch
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (128, most))
            steps = prefetch(lambda step: [torch.full((4,), step) for _ in range(96)], 0, 8, workers=2)
            found = []
            for step, tensors in steps:
                found.append(sum(int(tensor[0]) for tensor in tensors) == 96 * step)
            print(found == [True] * 8)
        """
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "True\n", done.stderr[-2000:]
