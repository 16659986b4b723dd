"""Trained models by name, of a folder, and of the Hub."""

import json

import pytest
import torch
from tiny import fresh_generator, tokenizer_of

from sitlib.model import pretrained
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer


def same_weights(first, second):
    torch.testing.assert_close(first.state_dict(), second.state_dict(), atol=0, rtol=0)
    assert first.config == second.config and not second.training


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_model_comes_back_from_its_folder_from_the_package_and_from_the_hub(
    tmp_path, monkeypatch, kind
):
    tokenizer, generator = tokenizer_of(), fresh_generator(kind)
    for model in (tokenizer, generator):
        name = type(model).__name__.lower()
        model.save_pretrained(tmp_path / name)
        assert "2412.09607" in (tmp_path / name / "README.md").read_text()
        assert json.loads((tmp_path / name / "config.json").read_text())
        same_weights(model, type(model).from_pretrained(tmp_path / name))
        monkeypatch.setattr(pretrained, "PACKAGED", tmp_path)
        same_weights(model, type(model).from_pretrained(name))

        asked = {}

        def download(repo, file, _name=name, _asked=asked, **options):
            _asked.update(options, repo=repo)
            return str(tmp_path / _name / file)

        monkeypatch.setattr(pretrained, "hf_hub_download", download)
        same_weights(model, type(model).from_pretrained("user/model", revision="v2"))
        assert asked == {"repo": "user/model", "revision": "v2"}
    with pytest.raises(ValueError, match="names SpectralTokenizer in its metadata"):
        AutoregressiveModel.from_pretrained("spectraltokenizer")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("photos-265", "'photos-265' is no model of this package .photos-256., no folder.*mean"),
        ("photos-256", "is not a whole safetensors file"),
        ("photographs", "photographs holds no model.safetensors, only old.pt: safetensors alone"),
    ],
)
def test_other_names_are_refused(tmp_path, monkeypatch, name, sentence):
    monkeypatch.setattr(pretrained, "PACKAGED", tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in ("photos-256", "photographs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "photographs/old.pt").touch()
    (tmp_path / "photos-256/model.safetensors").write_bytes(b"PK")
    with pytest.raises(ValueError, match=sentence):
        SpectralTokenizer.from_pretrained(name)
