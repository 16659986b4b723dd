"""The image sets of the repository: splits, licences, attribution; and folders of a user."""

import json
import re
import shutil
from collections import Counter

import pytest
import webdataset
import yaml
from dvc.repo import Repo
from emoji_groups import neutral

from sitlib.data import open_images
from sitlib.strict import ConfigError
from workbook import profile
from workbook.paths import ROOT
from workbook.profile import fill_in, load_profile


@pytest.fixture(scope="module")
def records():
    """All records of every set by key, read by webdataset itself."""
    found = {}
    for name in ("landscapes", "emoji", "extra", "things"):
        shards = [str(path) for path in sorted((ROOT / "data" / name).glob("*.tar"))]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
        found[name] = {sample["__key__"]: json.loads(sample["json"]) for sample in samples}
        assert len(found[name]) == len(samples)
        assert all(f"/{json.loads(s['json'])['split']}-" in s["__url__"] for s in samples)
    return found


def test_every_record_says_where_it_comes_from(records):
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    licences = r"CC-BY-SA-[34]\.0|CC-BY-[234]\.0|CC0-1\.0|MIT|public-domain"
    for name, of_set in records.items():
        for key, record in of_set.items():
            assert record["key"] == key and re.fullmatch(licences, record["licence"])
            assert {"class", "package", "file", "author", "size"} <= record.keys()
            if record["licence"].startswith("CC-BY"):
                assert record["author"] not in ("", "Various") and record["contact"]
            if name != "emoji":
                (row,) = re.findall(rf"^\| {re.escape(key)} \|.*$", text, flags=re.MULTILINE)
                assert record["licence"] in row and record["author"] in row
                assert (record["contact"] or "") in row


def test_photographs_are_held_out_by_class_origin_and_panorama(records):
    count = Counter(record["class"] for record in records["landscapes"].values())
    held_out = [r["class"] for r in records["landscapes"].values() if r["split"] == "test"]
    test = Counter(held_out)
    assert all(1 <= test[name] <= max(1, 0.2 * total) for name, total in count.items())
    split_of = {key: record["split"] for key, record in records["landscapes"].items()}
    assert split_of["mfield0"] == split_of["mfield1"] and split_of["water5"] == split_of["water9"]
    origins = {"train": set(), "test": set()}
    for record in records["things"].values():
        origins[record["split"]].add((record["package"], record["file"].split("/")[0]))
    assert origins["test"] and not origins["train"] & origins["test"]


def test_neither_things_nor_pictures_of_emoji_leak(records):
    emoji, split_of, group_of, names = records["emoji"].values(), {}, {}, {}
    for record in emoji:
        assert split_of.setdefault(record["group"], record["split"]) == record["split"]
        assert group_of.setdefault(neutral_code(record), record["group"]) == record["group"]
        names.setdefault(record["base_name"], set()).add(record["group"])
    assert all(len(found) == 1 for found in names.values())
    share = sum(record["split"] == "test" for record in emoji) / len(emoji)
    assert len(emoji) == 3374 and 0.08 < share < 0.12
    train, test = (open_images(ROOT / "data/emoji", split) for split in ("train", "test"))
    pictures = [{s.picture(i)[1].tobytes() for i in range(len(s))} for s in (train, test)]
    assert not pictures[0] & pictures[1]
    assert train[0].image[:, 0, 0].min() >= 250  # on white


def neutral_code(record):
    return neutral(record["key"].replace("-fe0f", ""))


# -- folders of a user -----------------------------------------------------------------------------

PARAMETERS = yaml.safe_load((ROOT / "params.yaml").read_text())
OWN = {"data_folder": "/big/imagenet", "captioned_data_folder": "data/my coco"}
OWN["extra_data_folder"] = "data/more"


@pytest.mark.parametrize("name", ["quick", "smoke", "paper"])
def test_profiles_name_the_folders_of_params(tmp_path, monkeypatch, name):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMETERS | OWN))
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.setattr(profile, "resolve", lambda path: tmp_path / path)
    loaded = load_profile(name)
    assert loaded.data.source == OWN["data_folder"]
    variants = {loaded.autoregressive_variant(name).tokenizer for name in loaded.text.variants}
    sources = {loaded.tokenizer_data(variant).source for variant in variants}
    assert sources == {OWN["captioned_data_folder"]}
    sources = {chosen.source for chosen in loaded.tokenizer.evaluation.sets.values()}
    assert sources <= set(OWN.values()) and OWN["data_folder"] in sources
    if name == "paper":
        assert loaded.text.captions.source == "data/my coco/annotations/captions_{split}2014.json"


def test_a_plain_path_stays_and_an_unknown_name_is_refused():
    assert fill_in("data/{split}/x", PARAMETERS) == "data/{split}/x"
    message = r"names \$\{data_foldr\}, which params.yaml does not have.*data_folder"
    with pytest.raises(ConfigError, match=message):
        fill_in({"source": "${data_foldr}/x"}, PARAMETERS)
    with pytest.raises(ConfigError, match="tokenizers"):  # there, but not a text
        fill_in("${tokenizers}", PARAMETERS)


def test_stages_depend_on_the_folders_of_params(tmp_path):
    """All that read images, also where two of the folders are one."""
    own = OWN | {"extra_data_folder": "data/my coco"}
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMETERS | own))
    repo = Repo.init(str(tmp_path), no_scm=True)
    deps = {stage.name: {str(dep) for dep in stage.deps} for stage in repo.index.stages}
    repo.close()
    bundled = ("data/landscapes", "data/emoji", "data/extra")
    for name, paths in deps.items():
        # These are about these very sets.
        about_them = ("sit_from_scratch", "wavelet_analysis", "pretrained", "explorer")
        if name not in about_them:
            assert not any(path.endswith(bundled) for path in paths), name
    for name in ("train_tokenizer@sit4-seed0", "extract_codes@sit4-seed0"):
        assert sum(path.endswith(("imagenet", "my coco")) for path in deps[name]) == 2
    assert any("/big/imagenet" in path for path in deps["real_features"])
    assert any("my coco" in path for path in deps["real_text_features"])


def test_names_of_one_thing_in_other_genders_are_one_group(records):
    """The rule is by code points: here it is checked against the words of all names."""
    groups = {record["base_name"]: record["group"] for record in records["emoji"].values()}
    by_words = {}
    for name, group in groups.items():
        by_words.setdefault(re.sub(r"\b(WO)?(MAN|MEN)\b:? ?", "", name), set()).add(group)
    assert all(len(found) == 1 for found in by_words.values()) and len(by_words) < len(groups) - 70
    for first, *others in (
        ["RUNNER", "MAN RUNNING", "WOMAN RUNNING"],  # whose words do not tell
        ["SHRUG", "MAN SHRUGGING"],
        ["FAMILY", "FAMILY: MAN, BOY", "FAMILY: WOMAN, GIRL"],
        ["COUPLE WITH HEART", "COUPLE WITH HEART: WOMAN, MAN"],
        ["PEOPLE HOLDING HANDS", "MAN AND WOMAN HOLDING HANDS", "TWO MEN HOLDING HANDS"],
        ["CHILD", "BOY", "GIRL"],
        ["MX CLAUS", "FATHER CHRISTMAS"],
        ["DANCER", "MAN DANCING"],
        ["MERPERSON", "MERMAID", "MERMAN"],
    ):
        assert {groups[name] for name in (first, *others)} == {first}
    apart = ["MANS SHOE", "WOMANS HAT", "ASTRONAUT", "ROCKET", "ADULT", "BABY", "PERSON: BALD"]
    assert len({groups[name] for name in apart}) == len(apart)
