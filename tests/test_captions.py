"""Captions from names and from COCO files, on small sets and on the emoji of the repository."""

import json
import random
import string

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import encoded

from sitlib.data import DataError, emoji_captions, open_captioned
from sitlib.data.captions import TEMPLATES
from sitlib.data.convert import convert
from sitlib.data.images import find_split
from workbook.paths import ROOT

EMOJI = ROOT / "data/emoji"
PICTURE = encoded(Image.new("RGB", (16, 16), "red"), "JPEG")
WAVE = {
    "key": "1f44b-1f3fd",
    "name": "WAVING HAND SIGN, medium skin tone",
    "base_name": "WAVING HAND SIGN",
    "short_names": ["wave", "hand-that_waves"],
    "category": "People & Body",
    "subcategory": "hand-fingers-open",
}


def said(name: str) -> str:
    """A name as captions say it: the caption of a plain template."""
    texts = emoji_captions({"key": "k", "name": name}, count=99)
    (text,) = [text for text in texts if text.startswith("emoji: ")]
    return text.removeprefix("emoji: ")


class TestEmojiCaptions:
    def test_all_fields_are_used_and_nothing_else(self):
        texts = {p: emoji_captions(WAVE, p, count=len(TEMPLATES[p])) for p in TEMPLATES}
        name = "waving hand sign, medium skin tone"
        assert all(name in text for p in TEMPLATES for text in texts[p])
        expected = [f"people and body: {name}", f"hand fingers open: {name}"]
        assert {name, *expected, f"{name}, also called wave"} <= set(texts["training"])
        assert f"{name}, or in other words wave" in texts["new"]

    @pytest.mark.parametrize("phrasing", list(TEMPLATES))
    def test_pure_in_seed_and_key(self, phrasing):
        first = emoji_captions(WAVE, phrasing, seed=3)
        random.seed(1)  # other random numbers play no part
        assert emoji_captions(dict(reversed(WAVE.items())), phrasing, seed=3) == first
        assert len(set(first)) == 4 and emoji_captions(WAVE, phrasing, 3, 6)[:4] == first
        keys = [{**WAVE, "key": str(number)} for number in range(200)]
        starts = {emoji_captions(record, phrasing, seed=3)[0] for record in keys}
        assert starts == set(emoji_captions(WAVE, phrasing, seed=3, count=len(TEMPLATES[phrasing])))

    @pytest.mark.parametrize(
        ("written", "spoken"),
        [
            ("KEYCAP: *", "keycap asterisk"),
            ("KISS: MAN, MAN, dark skin tone, dark skin tone", "kiss, man, man, dark skin tone"),
            ("Congo - Brazzaville Flag", "congo brazzaville flag"),
            ("U.S. Virgin Islands Flag", "us virgin islands flag"),
            ("Trinidad & Tobago Flag", "trinidad and tobago flag"),
            ("Côte d’Ivoire Flag", "côte d'ivoire flag"),
            ("SQUARED CJK UNIFIED IDEOGRAPH-7121", "squared cjk unified ideograph 無"),
            ("  two\n words_here ", "two words here"),
        ],
    )
    def test_names_as_they_are_said(self, written, spoken):
        assert said(written) == spoken

    @pytest.mark.parametrize(
        ("name", "short_name", "keyword"),
        [
            ("DOG FACE", "dog", []),  # says no more than the name
            ("CAT", "cat2", []),
            ("MAN ARTIST", "male-artist", ["male artist"]),
        ],
    )
    def test_keywords_are_words_that_the_name_lacks(self, name, short_name, keyword):
        texts = emoji_captions({"key": "k", "name": name, "short_names": [short_name]}, count=99)
        told = [t.rpartition(", also called ")[2] for t in texts if ", also called " in t]
        assert told == keyword

    @given(st.text(max_size=30))
    def test_any_name_gives_clean_captions_or_an_error(self, name):
        try:
            texts = emoji_captions({"key": "k", "name": name})
        except DataError as error:
            assert "record of 'k' has no `name`" in str(error)
            assert not any(c in string.ascii_letters + string.digits for c in name)
        else:
            assert len(texts) == 4
            assert all(t == " ".join(t.split()) and not set(t) & set('*_"#{}()') for t in texts)

    def test_no_new_caption_of_the_emoji_is_a_training_caption(self):
        records = [s.record() for split in ("train", "test") for s in find_split(EMOJI, split)[0]]
        training, new = (
            {text for record in records for text in emoji_captions(record, phrasing, count=99)}
            for phrasing in TEMPLATES
        )
        assert not training & new
        assert max(len(text.split()) for text in training | new) <= 24
        names = {record["name"] for record in records}
        assert len({said(name) for name in names}) == len(names)  # also of other skin tones


def test_every_image_has_the_captions_of_its_record(tmp_path):
    names = ["BEAR", "BEAR, dark skin tone", "COW"]
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "x", "png": b"no picture", "json": {"key": "x", "name": "x"}})
        for i, name in enumerate(names):
            record = {"key": f"{i}", "name": name, "base_name": name[:4]}
            record |= {"group": "ANIMAL"} if i == 0 else {}
            writer.write({"__key__": f"{i}", "jpg": PICTURE, "json": record})
    for phrasing in TEMPLATES:
        with pytest.warns(UserWarning, match="skipped"):
            opened = open_captioned(tmp_path, "train", "names", phrasing=phrasing, seed=5, count=3)
        assert opened.images.keys == ["0", "1", "2"]
        assert opened.names == ["BEAR", "BEAR", "COW"]
        assert opened.groups == ["ANIMAL", "BEAR", "COW"]
        records = [{"key": f"{i}", "name": name} for i, name in enumerate(names)]
        assert opened.captions == [emoji_captions(r, phrasing, 5, 3) for r in records]


def write_coco(path, captions: dict[str, list[str]], start=0) -> None:
    """A COCO captions file; the annotations stand in another order than the images."""
    content = [{"id": start + i, "file_name": name} for i, name in enumerate(captions)]
    annotations = [
        {"image_id": start + i, "caption": text}
        for i, texts in reversed(list(enumerate(captions.values())))
        for text in texts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "images": content, "annotations": annotations}))


@pytest.fixture
def coco(tmp_path):
    """COCO as it is distributed: train2017 and val2017 with captions, test2017 without."""
    for split, names in (("train", "ba"), ("val", "c"), ("test", "d")):
        (tmp_path / f"{split}2017").mkdir()
        for name in names:
            (tmp_path / f"{split}2017/{name}.jpg").write_bytes(PICTURE)
        texts = {f"{name}.jpg": [f"one {name}", f" two\n{name} "] for name in names}
        if split != "test":
            file = tmp_path / f"annotations/captions_{split}2017.json"
            write_coco(file, texts, start=ord(names[0]))
    return tmp_path, str(tmp_path / "annotations/captions_{split}2017.json")


class TestOpenCoco:
    def test_as_it_is_downloaded(self, coco, recwarn):
        root, captions = coco
        train = open_captioned(root, "train", captions)
        files = ["b.jpg", "a.jpg"]  # in the order of the file
        assert train.images.keys == train.names == train.groups == files
        assert train.captions == [["one b", "two b"], ["one a", "two a"]]
        assert train.images[1].class_name is None and train.images[1].key == "a.jpg"
        assert train.images[0].meta["file"] == str(root / "train2017/b.jpg")
        for split in ("val", "test"):  # test2017 has no captions
            assert open_captioned(root, split, captions).names == ["c.jpg"]
        assert not recwarn.list

    def test_shards_of_it_say_the_same(self, coco, tmp_path):
        (root, captions), out = coco, tmp_path / "out"
        for split in ("train", "val"):
            convert(root, out, split, per_shard=1, captions=captions)
            before = open_captioned(root, split, captions)
            after = open_captioned(out, split, "records")
            captions_of = dict(zip(before.names, before.captions, strict=True))
            files = [record.meta["file"] for record in after.images]
            assert sorted(files) == sorted(captions_of)
            assert after.captions == [captions_of[name] for name in files]

    def test_what_cannot_be_used_is_left_out_with_a_warning(self, coco):
        root, captions = coco
        gone = [f"gone{n}.jpg" for n in range(4)]
        texts = {name: ["text", "  "] for name in ["a.jpg", *gone, "damaged.jpg", "b.jpg"]}
        (root / "train2017/silent.jpg").write_bytes(PICTURE)
        (root / "train2017/damaged.jpg").write_bytes(PICTURE[:100])
        write_coco(root / "annotations/captions_train2017.json", texts | {"silent.jpg": [" "]})
        with pytest.warns(UserWarning) as caught:
            opened = open_captioned(root, "train", captions)
        text = " ".join(str(warning.message) for warning in caught)
        assert f"are not in {root / 'train2017'} or have no caption: gone0.jpg, gone1.jpg" in text
        assert "5 of the 8 images" in text and "silent.jpg" in text
        assert "1 of 3 images of" in text and "damaged.jpg: it cannot be decoded" in text
        assert opened.names == opened.images.keys == ["a.jpg", "b.jpg"]
        assert opened.captions == [["text"], ["text"]]


@pytest.mark.parametrize("captions", ["one text", [1], [""]])
def test_captions_of_records_are_a_list_of_texts(tmp_path, captions):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "a", "jpg": PICTURE, "json": {"captions": captions}})
    with pytest.raises(DataError, match="has no list `captions` of texts"):
        open_captioned(tmp_path, "train", "records")


@pytest.mark.parametrize(
    ("source", "captions", "message"),
    [
        ("", "names", r"record of 'train2017/a\.jpg' has no `name`"),
        ("", "wrong_{split}.json", r"There are no captions: no file .*wrong_train\.json"),
        ("wrong", "annotations/captions_{split}2017.json", r"no folder .*/wrong of images"),
        ("", "train_list.json", r"Name one file for each split, with \{split\} for its name"),
        ("", "{split}_empty.json", r"2 of the 2 .* no caption: a\.jpg, x\.jpg$"),
        ("", "{split}_list.json", "not a COCO captions file"),
        ("", "{split}_instances.json", "not a COCO .*'caption'"),
    ],
)
def test_refusals(coco, source, captions, message):
    root, _ = coco
    write_coco(root / "train_empty.json", {"x.jpg": ["x"], "a.jpg": []})
    instances = '{"images": [], "annotations": [{"image_id": 1}]}'
    for name, text in {"list": "[]", "instances": instances}.items():
        (root / f"train_{name}.json").write_text(text)
    captions = captions if captions in ("names", "records") else root / captions
    with pytest.raises(DataError, match=message):
        open_captioned(root / source, "train", captions)
