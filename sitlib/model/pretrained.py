"""Trained models by name: of this package, of a folder, of the Hugging Face Hub."""

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import nn

from sitlib.files import load_model, save_model, write_json
from sitlib.strict import nearest, require, to_dict

CHECKPOINT = "model.safetensors"
PACKAGED = Path(__file__).parents[1] / "weights"  # a folder of each model that comes along
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # as others write weights

CARD = """---
{{ card_data }}
---

`sitlib.model` of the workbook Spectral Image Tokenizer ([arXiv 2412.09607]({{ paper_url }})), whose
`from_pretrained` loads it; config.json has all of its settings.
"""
ABOUT = {"library_name": "sitlib", "license": "apache-2.0", "model_card_template": CARD}


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint of a folder; if it has none, a ValueError that names pickles in its place."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    others = f", only {', '.join(pickles)}: safetensors alone are read" if pickles else ""
    require((folder / CHECKPOINT).is_file(), f"{folder} holds no {CHECKPOINT}{others}.")
    return folder / CHECKPOINT


class Pretrained(nn.Module, ModelHubMixin, paper_url="https://arxiv.org/abs/2412.09607", **ABOUT):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of a model with a `config`."""

    config: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """A model in evaluation mode: of this package by name, of a folder, or a Hub id "user/name".

        `options` are those of `hf_hub_download`: revision, cache_dir, local_files_only, token.
        Raises ValueError for another name, or a file that is not a whole model of this class.
        """
        name = str(pretrained_model_name_or_path)
        for folder in (PACKAGED / name, Path(name)):
            if folder.is_dir():
                return load_model(checkpoint_in(folder), cls)
        known = sorted(path.parent.name for path in PACKAGED.glob(f"*/{CHECKPOINT}"))
        sentence = f"{name!r} is no model of this package ({', '.join(known) or 'it has none'}"
        require(name.count("/") == 1, f"{sentence}), no folder, no Hub id{nearest(name, known)}.")
        return load_model(hf_hub_download(name, CHECKPOINT, **options), cls)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Weights, which hold the configuration, and the configuration once more, to be read."""
        save_model(save_directory / CHECKPOINT, self)
        write_json(save_directory / "config.json", to_dict(self.config))
