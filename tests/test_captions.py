"""Captions from names and from COCO files, on a small set made here and on the emoji of the repository."""

import io
import json
import random
import string
import warnings

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sitlib.data import DataError, emoji_captions, open_captioned, open_images, sources
from sitlib.data.captions import MORE, TEMPLATES
from sitlib.data.layout import find_split

WAVE = {
    "key": "1f44b-1f3fd",
    "name": "WAVING HAND SIGN, medium skin tone",
    "base_name": "WAVING HAND SIGN",
    "short_names": ["wave", "hand-that_waves"],
    "category": "People & Body",
    "subcategory": "hand-fingers-open",
}


def picture(colour, format="JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, format=format)
    return buffer.getvalue()


def said(name: str) -> str:
    """How captions say a name: the caption of a plain template."""
    texts = emoji_captions({"key": "k", "name": name}, count=99)
    (text,) = [text for text in texts if text.startswith("emoji: ")]
    return text.removeprefix("emoji: ")


@pytest.fixture(scope="module")
def emoji():
    """Records of the repository's emoji by split, without decoding a picture."""
    found = {}
    for split in ("train", "test"):
        index, _ = find_split("data/emoji", split)
        found[split] = [index.record(row) for row in range(len(index))]
    return found


class TestEmojiCaptions:
    def test_all_fields_are_used_and_nothing_else(self):
        every = {
            phrasing: emoji_captions(WAVE, phrasing, count=len(templates))
            for phrasing, templates in TEMPLATES.items()
        }
        name = "waving hand sign, medium skin tone"
        assert {len(texts) for texts in every.values()} == {
            len(TEMPLATES["training"]),
            len(TEMPLATES["new"]),
        }
        assert all(name in text for texts in every.values() for text in texts)
        assert {
            name,
            f"people and body: {name}",
            f"hand fingers open: {name}",
            f"{name}, also called wave",
        } <= set(every["training"])
        assert f"{name}, or in other words wave" in every["new"]

    def test_more_captions_than_templates_are_in_further_phrasings(self):
        usual, most = (
            emoji_captions(WAVE, count=count) for count in (len(TEMPLATES["training"]), 99)
        )
        assert most[: len(usual)] == usual and len(most) == len(usual) + len(MORE)
        assert all("waving hand sign, medium skin tone" in text for text in most)
        few = {
            "key": "k",
            "name": "A house",
        }  # has fewer captions than templates, but none of the others
        assert (
            len(emoji_captions(few, count=len(usual)))
            < len(usual)
            < len(emoji_captions(few, count=99))
        )

    def test_phrasings_share_no_template_and_no_caption(self):
        assert not {*TEMPLATES["training"], *MORE} & set(TEMPLATES["new"])
        assert not set(emoji_captions(WAVE, count=99)) & set(emoji_captions(WAVE, "new", count=99))

    @pytest.mark.parametrize("phrasing", list(TEMPLATES))
    def test_pure_in_seed_and_key(self, phrasing):
        first = emoji_captions(WAVE, phrasing, seed=3)
        random.seed(1)  # other random numbers play no part
        assert emoji_captions(dict(reversed(WAVE.items())), phrasing, seed=3) == first
        assert (
            len(first) == len(set(first)) == 4 and emoji_captions(WAVE, phrasing, 3, 6)[:4] == first
        )
        assert any(emoji_captions(WAVE, phrasing, seed) != first for seed in range(4, 8))
        keys = [{**WAVE, "key": str(number)} for number in range(200)]
        starts = [emoji_captions(record, phrasing, seed=3)[0] for record in keys]
        every = emoji_captions(WAVE, phrasing, seed=3, count=len(TEMPLATES[phrasing]))
        assert set(starts) == set(every)  # every template is used

    @pytest.mark.parametrize(
        ("written", "spoken"),
        [
            ("KEYCAP: *", "keycap asterisk"),
            ("KEYCAP 7", "keycap 7"),
            ("FAMILY: WOMAN, BOY, BOY", "family, woman, boy, boy"),
            ("KISS: MAN, MAN, dark skin tone, dark skin tone", "kiss, man, man, dark skin tone"),
            ("VAMPIRE, medium-light skin tone", "vampire, medium-light skin tone"),
            ("Congo - Brazzaville Flag", "congo brazzaville flag"),
            ("Myanmar (Burma) Flag", "myanmar burma flag"),
            ("U.S. Virgin Islands Flag", "us virgin islands flag"),
            ("Trinidad & Tobago Flag", "trinidad and tobago flag"),
            ("Côte d’Ivoire Flag", "côte d'ivoire flag"),
            ("HEAR-NO-EVIL MONKEY", "hear-no-evil monkey"),
            ("SQUARED CJK UNIFIED IDEOGRAPH-7121", "squared cjk unified ideograph 無"),
            ("  two\n words_here ", "two words here"),
        ],
    )
    def test_names_as_they_are_said(self, written, spoken):
        assert said(written) == spoken

    @pytest.mark.parametrize(
        ("name", "short_names", "keyword"),
        [
            ("DOG FACE", ["dog"], None),  # says no more than the name
            ("CAT", ["cat2"], None),
            ("Somalia Flag", ["flag-so"], None),
            ("CLOCK FACE ONE-THIRTY", ["clock130"], None),
            ("CROSS MARK", ["x"], None),
            ("THUMBS UP SIGN", ["+1", "thumbsup"], "thumbsup"),
            ("MAN ARTIST", ["male-artist"], "male artist"),
            ("AUTOMOBILE", ["car", "red_car"], "car"),
        ],
    )
    def test_keywords_are_words_that_the_name_lacks(self, name, short_names, keyword):
        texts = emoji_captions({"key": "k", "name": name, "short_names": short_names}, count=99)
        found = [text.rpartition(", also called ")[2] for text in texts if ", also called " in text]
        assert found == ([keyword] if keyword else [])

    def test_a_name_is_enough(self):
        record = {"key": "k", "name": "A house", "category": None}
        for phrasing in TEMPLATES:
            texts = emoji_captions(record, phrasing, count=10)
            assert len(texts) == 7 and all("a house" in text and "{" not in text for text in texts)

    @given(st.text(max_size=30))
    def test_any_name_gives_clean_captions_or_an_error(self, name):
        try:
            texts = emoji_captions({"key": "k", "name": name})
        except DataError as error:
            assert "record of 'k' has no `name`" in str(error)
            assert not any(c in string.ascii_letters + string.digits for c in name)
        else:
            assert len(texts) == 4
            assert all(
                text == " ".join(text.split()) and not set(text) & set('*_"#{}()') for text in texts
            )

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="no phrasing 'old': choose 'training' or 'new'"):
            emoji_captions(WAVE, "old")
        with pytest.raises(ValueError, match="count is 0"):
            emoji_captions(WAVE, count=0)
        for record in ({"key": "k"}, {"key": "k", "name": None}, {"key": "k", "name": "***"}):
            with pytest.raises(
                DataError, match="record of 'k' has no `name` with a letter or digit"
            ):
                emoji_captions(record)


class TestOpenNames:
    def test_every_image_has_the_captions_of_its_record(self, tmp_path):
        names = ["BEAR", "BEAR, dark skin tone", "COW"]
        samples = [
            {
                "__key__": f"{i}",
                "png": picture("red", "PNG"),
                "json": {"key": f"{i}", "name": name, "base_name": name[:4]},
            }
            for i, name in enumerate(names)
        ]
        samples.insert(
            1, {"__key__": "broken", "png": b"no picture", "json": {"key": "broken", "name": "x"}}
        )
        with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
            for sample in samples:
                writer.write(sample)
        with pytest.warns(UserWarning, match="skipped"):
            found = open_captioned(tmp_path, "train", "names", seed=5, count=3)
        assert found.images.keys == ["0", "1", "2"] and found.names == ["BEAR", "BEAR", "COW"]
        expected = [
            emoji_captions({"key": f"{i}", "name": name}, "training", 5, 3)
            for i, name in enumerate(names)
        ]
        assert found.captions == expected
        with pytest.warns(UserWarning, match="skipped"):
            new = open_captioned(tmp_path, "train", "names", phrasing="new")
        assert new.captions[2] == emoji_captions({"key": "2", "name": "COW"}, "new")

    def test_the_emoji_of_the_repository(self, emoji):
        found = open_captioned("data/emoji", "test", "names", count=6)
        assert found.images.keys == open_images("data/emoji", "test").keys
        assert found.captions == [emoji_captions(record, count=6) for record in emoji["test"]]
        assert found.names == [record["base_name"] for record in emoji["test"]]
        assert {len(texts) for texts in found.captions} == {6}

    def test_base_names_and_captions_of_test_are_not_in_train(self, emoji):
        bases, texts = (
            {
                split: {value for record in records for value in of(record)}
                for split, records in emoji.items()
            }
            for of in (lambda record: [record["base_name"]], emoji_captions)
        )
        assert not bases["train"] & bases["test"] and not texts["train"] & texts["test"]

    def test_no_new_caption_is_a_training_caption(self, emoji):
        records = [record for split in emoji.values() for record in split]
        training, new = (
            [text for record in records for text in emoji_captions(record, phrasing, count=99)]
            for phrasing in TEMPLATES
        )
        assert not set(training) & set(new)
        words = [len(text.split()) for text in training + new]
        assert max(words) <= 24 and sum(number < 16 for number in words) > 0.98 * len(words)
        assert not any(set(text) & set("*()&_.’") for text in training + new)

    def test_skin_tones_are_told_apart(self, emoji):
        names = {}
        for split in emoji.values():
            for record in split:
                names.setdefault(said(record["name"]), set()).add(record["name"])
        assert all(len(same) == 1 for same in names.values())
        assert sum(name.endswith("skin tone") for name in names) > 1400

    def test_images_without_names(self, tmp_path):
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "a.jpg").write_bytes(picture("red"))
        with pytest.raises(
            DataError,
            match=r"split 'train' of .* has no names .* record of 'train/a\.jpg' has no `name`",
        ):
            open_captioned(tmp_path, "train", "names")
        with pytest.raises(DataError, match="no data source"):
            open_captioned(tmp_path / "nowhere", "train", "names")
        with pytest.raises(ValueError, match="no phrasing 'old'"):
            open_captioned(tmp_path, "train", "names", phrasing="old")


def write_coco(path, captions: dict[str, list[str]], start=0) -> None:
    """A COCO captions file; the annotations stand in another order than the images."""
    images = [{"id": start + i, "file_name": name, "license": 1} for i, name in enumerate(captions)]
    annotations = [
        {"id": 10 * i + j, "image_id": start + i, "caption": text}
        for i, texts in enumerate(captions.values())
        for j, text in enumerate(texts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "info": {},
                "images": images,
                "annotations": sorted(annotations, key=lambda a: -a["image_id"]),
            }
        )
    )


def write_images(folder, *names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture("red"))


@pytest.fixture
def coco(tmp_path):
    """COCO as it is distributed: train2017 and val2017 with captions, test2017 without."""
    for split, names in (("train", "ba"), ("val", "c")):
        write_images(tmp_path / f"{split}2017", *(f"{name}.jpg" for name in names))
        texts = {f"{name}.jpg": [f"one {name}", f" two\n{name} "] for name in names}
        write_coco(tmp_path / f"annotations/captions_{split}2017.json", texts, start=ord(names[0]))
    write_images(tmp_path / "test2017", "d.jpg")
    return str(tmp_path / "{split}2017"), str(tmp_path / "annotations/captions_{split}2017.json")


class TestOpenCoco:
    def test_splits_in_folders_of_their_own(self, coco, recwarn):
        source, captions = coco
        train = open_captioned(source, "train", captions)
        assert train.images.keys == train.names == ["b.jpg", "a.jpg"]  # in the order of the file
        assert train.captions == [["one b", "two b"], ["one a", "two a"]]
        assert train.images.labels.tolist() == [-1, -1] and train.images[1].class_name is None
        assert train.images[1].key == "a.jpg" and train.images[1].image.shape == (3, 16, 16)
        assert (
            repr(train.images) == f"ImageSource(the split 'train' of {source}: 2 images, 0 classes)"
        )
        assert open_captioned(source, "val", captions).names == ["c.jpg"]
        assert open_captioned(source, "test", captions).names == [
            "c.jpg"
        ]  # test2017 has no captions
        assert not recwarn.list

    def test_one_folder_whose_splits_are_in_the_files(self, tmp_path, recwarn):
        write_images(tmp_path / "images", "a.jpg", "b.jpg", "x/c.jpg")
        write_coco(tmp_path / "train.json", {"a.jpg": ["a"], "x/c.jpg": ["c"]})
        write_coco(tmp_path / "test.json", {"b.jpg": ["b"]})
        found = [
            open_captioned(tmp_path / "images", split, tmp_path / "{split}.json")
            for split in ("train", "test")
        ]
        assert [each.names for each in found] == [
            ["a.jpg", "x/c.jpg"],
            ["b.jpg"],
        ] and not recwarn.list

    @pytest.mark.parametrize("inside", ["", "{split}/"])
    def test_one_file_and_a_folder_with_splits(self, tmp_path, inside, recwarn):
        write_images(tmp_path / "set", "train/a.jpg", "train/b.jpg", "val/c.jpg")
        names = [
            f"{inside.format(split=split)}{name}.jpg"
            for split, name in (("train", "a"), ("train", "b"), ("val", "c"))
        ]
        write_coco(tmp_path / "captions.json", {name: [f"of {name}"] for name in names})
        train, test = (
            open_captioned(tmp_path / "set", split, tmp_path / "captions.json")
            for split in ("train", "test")
        )
        assert (
            train.names == names[:2]
            and test.names == names[2:]
            and test.captions == [[f"of {names[2]}"]]
        )
        assert not recwarn.list  # an image of the other split is not missing

    def test_split_folders_inside_the_source_as_other_stages_read_them(self, tmp_path, recwarn):
        write_images(tmp_path / "set", "train/a.jpg", "val/a.jpg")
        for split in ("train", "val"):
            write_coco(tmp_path / f"{split}.json", {"a.jpg": [f"in {split}"]})
        for split, folder in (("train", "train"), ("test", "val")):
            found = open_captioned(tmp_path / "set", split, tmp_path / "{split}.json")
            assert found.captions == [[f"in {folder}"]]
            assert found.images[0].meta["file"] == str(tmp_path / "set" / folder / "a.jpg")
            assert len(open_images(tmp_path / "set", split)) == 1
        assert not recwarn.list

    def test_one_file_and_a_folder_without_splits_are_divided_as_everywhere(
        self, tmp_path, recwarn
    ):
        names = [f"{number}.jpg" for number in range(40)]
        write_images(tmp_path / "set", *names)
        write_coco(tmp_path / "captions.json", {name: [name] for name in names})
        for split in ("train", "test"):
            found = open_captioned(tmp_path / "set", split, tmp_path / "captions.json")
            assert sorted(found.names) == sorted(open_images(tmp_path / "set", split).keys)
            assert (
                found.captions == [[name] for name in found.names]
                and found.images[0].key == found.names[0]
            )
        assert not recwarn.list

    def test_what_cannot_be_used_is_left_out_with_one_warning(self, coco, tmp_path):
        source, captions = coco
        names = [
            "a.jpg",
            "gone1.jpg",
            "gone2.jpg",
            "gone3.jpg",
            "gone4.jpg",
            "silent.jpg",
            "damaged.jpg",
            "b.jpg",
        ]
        texts = {name: ["text", "  "] for name in names} | {"silent.jpg": [" "]}
        write_images(tmp_path / "train2017", "silent.jpg")
        (tmp_path / "train2017" / "damaged.jpg").write_bytes(picture("red")[:100])
        write_coco(tmp_path / "annotations/captions_train2017.json", texts)
        with pytest.warns(UserWarning) as caught:
            found = open_captioned(source, "train", captions)
        (warning,) = caught
        message = str(warning.message)
        assert warning.filename == __file__ and "6 of the 8 images that" in message
        assert (
            f"4 not in {tmp_path / 'train2017'} (gone1.jpg, gone2.jpg, gone3.jpg, ...)" in message
        )
        assert "1 without a caption (silent.jpg)" in message
        assert "1 unreadable (damaged.jpg: it cannot be decoded" in message
        assert found.names == found.images.keys == ["a.jpg", "b.jpg"] and found.captions == [
            ["text"],
            ["text"],
        ]

    def test_large_sets_are_not_decoded_at_opening(self, coco, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "CHECK_AT_MOST", 1)
        source, captions = coco
        (tmp_path / "train2017" / "b.jpg").write_bytes(b"damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = open_captioned(source, "train", captions)
        with pytest.warns(UserWarning, match=r"skipped .*b\.jpg"):
            assert (
                found.images[0].key == "a.jpg"
            )  # the next one stands in, and its key leads to its captions

    def test_an_image_that_is_listed_twice_has_all_captions(self, tmp_path):
        write_images(tmp_path / "train", "a.jpg")
        images = [{"id": number, "file_name": "a.jpg"} for number in (1, 2)]
        annotations = [{"image_id": number, "caption": str(number)} for number in (1, 2, 3)]
        (tmp_path / "train.json").write_text(
            json.dumps({"images": images, "annotations": annotations})
        )
        assert open_captioned(
            tmp_path / "{split}", "train", tmp_path / "{split}.json"
        ).captions == [["1", "2"]]

    def test_nothing_there(self, coco, tmp_path):
        source, captions = coco
        with pytest.raises(
            DataError,
            match=r"split 'train' of .* has no captions: there is no file .*/wrong_train\.json\.$",
        ):
            open_captioned(source, "train", tmp_path / "wrong_{split}.json")
        with pytest.raises(DataError, match=r"there is no folder .*/wrong\.$"):
            open_captioned(tmp_path / "wrong", "train", captions)
        (tmp_path / "annotations/captions_val2017.json").unlink()
        with pytest.raises(
            DataError,
            match=r"no file .*_test2017\.json; no file .*_val2017\.json; no file .*no folder",
        ):
            open_captioned(source, "test", captions)

    def test_nothing_matched(self, coco, tmp_path):
        source, captions = coco
        write_coco(tmp_path / "annotations/captions_train2017.json", {"x.jpg": ["x"], "a.jpg": []})
        with pytest.raises(
            DataError,
            match=r"None of the 2 images .* 'train' .*: 1 not in .*train2017 \(x\.jpg\); 1 without a caption \(a\.jpg\)\.$",
        ):
            open_captioned(source, "train", captions)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("{", "cannot be read as JSON"),
            ("[]", "not a COCO captions file: it holds no object"),
            ('{"annotations": []}', "not a COCO captions file: it has no list 'images'"),
            ('{"images": []}', "it has no list 'annotations'"),
            (
                '{"images": [{"id": 1}], "annotations": []}',
                "not all of its 'images' have a 'file_name'",
            ),
            (
                '{"images": [{"file_name": "a.jpg"}], "annotations": []}',
                "not all of its 'images' have a 'id'",
            ),
            (
                '{"images": [], "annotations": [{"caption": "a"}]}',
                "not all of its 'annotations' have a 'image_id'",
            ),
            (
                '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}',
                r"not all of its 'annotations' have a 'caption' \(files named instances",
            ),
        ],
    )
    def test_files_of_another_kind(self, coco, tmp_path, content, reason):
        source, captions = coco
        (tmp_path / "annotations/captions_train2017.json").write_text(content)
        with pytest.raises(DataError, match=rf"captions_train2017\.json .*{reason}"):
            open_captioned(source, "train", captions)
