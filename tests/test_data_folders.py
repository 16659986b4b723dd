"""Where the images are is said once, in params.yaml: profiles and stages follow."""

import shutil

import pytest
import yaml
from dvc.repo import Repo

from sitlib.strict import ConfigError
from workbook import profile
from workbook.paths import ROOT
from workbook.profile import fill_in, load_profile

PARAMETERS = yaml.safe_load((ROOT / "params.yaml").read_text())
OWN = {
    "data_folder": "/big/imagenet",
    "captioned_data_folder": "data/my coco",
    "extra_data_folder": "data/more",
}


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """A params.yaml with folders of a user."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMETERS | OWN))
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.setattr(profile, "resolve", lambda path: tmp_path / path)


@pytest.mark.parametrize("name", ["quick", "smoke", "paper"])
def test_profiles_follow(own_folders, name):
    loaded = load_profile(name)
    assert loaded.data.source == OWN["data_folder"]
    captioned = {
        loaded.autoregressive_variant(variant).tokenizer for variant in loaded.text.variants
    }
    assert {loaded.tokenizer_data(variant).source for variant in captioned} == {
        OWN["captioned_data_folder"]
    }
    sources = {chosen.source for chosen in loaded.tokenizer.evaluation.sets.values()}
    assert sources <= set(OWN.values()) and OWN["data_folder"] in sources
    if name == "paper":
        assert loaded.text.captions.source == "data/my coco/annotations/captions_{split}2017.json"


def test_a_plain_path_stays_and_an_unknown_name_is_refused():
    assert fill_in("data/{split}/x", PARAMETERS) == "data/{split}/x"
    with pytest.raises(
        ConfigError, match=r"names \$\{data_foldr\}, which params.yaml does not have.*data_folder"
    ):
        fill_in({"source": "${data_foldr}/x"}, PARAMETERS)
    with pytest.raises(ConfigError, match="tokenizers"):  # there, but not a text
        fill_in("${tokenizers}", PARAMETERS)


def test_stages_follow(tmp_path):
    """All stages that read images depend on the user's folders, also where two of them are one."""
    own = OWN | {"extra_data_folder": "data/my coco"}
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMETERS | own))
    repo = Repo.init(str(tmp_path), no_scm=True)
    deps = {stage.name: {str(dep) for dep in stage.deps} for stage in repo.index.stages}
    repo.close()
    bundled = ("data/landscapes", "data/emoji", "data/extra")
    for name, paths in deps.items():
        if name not in ("wavelet_analysis", "sit_from_scratch"):  # which are about these very sets
            assert not any(path.endswith(bundled) for path in paths), name
    own_of = {
        name: {path for path in paths if path.endswith(("imagenet", "my coco"))}
        for name, paths in deps.items()
    }
    assert len(own_of["train_tokenizer@sit4-seed0"]) == len(own_of["extract_codes@sit4-seed0"]) == 2
    assert any("/big/imagenet" in path for path in own_of["real_features"])
    assert any("my coco" in path for path in own_of["real_text_features"])
