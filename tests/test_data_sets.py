"""The image sets that travel with the repository: splits, licences, attribution."""

import json
import re
from collections import Counter

import pytest
import webdataset

from sitlib.data import open_images
from workbook.paths import ROOT

SETS = ("landscapes", "emoji", "extra")


@pytest.fixture(scope="module")
def records():
    """All records of every set, read by webdataset itself."""
    found = {}
    for name in SETS:
        shards = [str(path) for path in sorted((ROOT / "data" / name).glob("*.tar"))]
        samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        found[name] = [
            (sample["__url__"], sample["__key__"], json.loads(sample["json"])) for sample in samples
        ]
    return found


def test_every_record_says_where_it_comes_from(records):
    for name in SETS:
        for shard, key, record in records[name]:
            assert record["key"] == key and f"/{record['split']}-" in shard
            assert {"class", "package", "file", "licence", "author", "size"} <= record.keys()
            assert re.fullmatch(
                r"CC-BY-SA-[34]\.0|CC-BY-2\.0|CC0-1\.0|MIT|public-domain", record["licence"]
            )
            if record["licence"].startswith("CC-BY"):
                assert record["author"] not in ("", "Various") and record["contact"]


def test_landscapes_classes_and_splits(records):
    count = Counter(record["class"] for *_, record in records["landscapes"])
    large = {"mountain": 50, "arid": 44, "water": 43, "green": 20, "city": 19}
    assert count == large | {
        "sky": 18,
        "snow": 13,
        "lava": 8,
        "space": 8,
        "industrial": 5,
        None: 45,
    }
    keys = [record["key"] for *_, record in records["landscapes"]]
    assert len(set(keys)) == len(keys) == 273
    test = Counter(
        record["class"] for *_, record in records["landscapes"] if record["split"] == "test"
    )
    assert all(1 <= test[name] <= max(1, 0.2 * total) for name, total in count.items())
    split_of = {record["key"]: record["split"] for *_, record in records["landscapes"]}
    assert split_of["mfield0"] == split_of["mfield1"] and split_of["water5"] == split_of["water9"]


def test_a_named_author_goes_before_a_wider_pattern(records):
    """`mountain1*` (public domain) also matches mountain10-sfiera, whose author asks for CC-BY-SA."""
    terms = {record["key"]: record["licence"] for *_, record in records["landscapes"]}
    assert terms["mountain1"] == "public-domain"
    marked = [key for key in terms if "-" in key]
    assert len(marked) > 50 and all(terms[key] == "CC-BY-SA-4.0" for key in marked)
    assert terms["bwerner0"] == "CC-BY-SA-3.0"


def test_emoji_base_names_never_leak(records):
    splits = {}
    for *_, record in records["emoji"]:
        splits.setdefault(record["base_name"], set()).add(record["split"])
        assert (
            record["name"].startswith(record["base_name"])
            and record["short_names"]
            and record["subcategory"]
        )
    assert all(len(found) == 1 for found in splits.values()) and len(splits) == 1851
    share = sum(record["split"] == "test" for *_, record in records["emoji"]) / len(
        records["emoji"]
    )
    assert len(records["emoji"]) == 3374 and 0.08 < share < 0.12


def test_emoji_pictures_never_leak():
    train, test = (open_images("data/emoji", split) for split in ("train", "test"))
    pictures = [
        {source.picture(i)[1].tobytes() for i in range(len(source))} for source in (train, test)
    ]
    assert not pictures[0] & pictures[1]
    assert train.class_names == test.class_names and len(train.class_names) == 9
    assert {train.picture(i)[1].size for i in range(len(train))} == {(128, 128)}
    corner = train[0].image[:, 0, 0]
    assert corner.min() >= 250  # on white


def test_readme_attributes_every_photograph(records):
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for name in ("landscapes", "extra"):
        for *_, record in records[name]:
            (row,) = re.findall(rf"^\| {re.escape(record['key'])} \|.*$", text, flags=re.MULTILINE)
            assert (
                record["licence"] in row
                and record["author"] in row
                and (record["contact"] or "") in row
            )


def test_sets_are_small_enough_to_clone():
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*.tar")) < 23e6
