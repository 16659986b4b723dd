"""Files that say what they are: weights in safetensors with the model's configuration in the metadata."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sitlib.config import ConfigError, from_dict, to_dict
from sitlib.paths import resolve

Model = TypeVar("Model", bound=nn.Module)


def save_model(path: str | Path, model: nn.Module, config: Any, about: dict[str, str]) -> None:
    """Writes `model` to `path`, whole or not at all: the file appears under its name only when it is complete.

    Args:
        config: the dataclass from which the model is built again.
        about: further text for the metadata (data set, steps, seed, ...).
    """
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"class": type(model).__name__, "config": json.dumps(to_dict(config)), **about}
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial, metadata)
    os.replace(partial, path)


def load_model(path: str | Path, model_class: type[Model], config_class: type) -> Model:
    """The model in a file that `save_model` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds another kind of model or another configuration than this version knows.
    """
    path = resolve(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path.name} in {path.parent}: train it first (make repro).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a complete safetensors file ({error}): train it again or fetch it again.") from None
    if metadata.get("class") != model_class.__name__:
        found = metadata.get("class", "no class at all")
        raise ValueError(f"{path.name} names {found} in its metadata, not {model_class.__name__}: another file is needed.")
    try:
        config = from_dict(config_class, json.loads(metadata["config"]), where=path.name)
    except ConfigError as error:
        raise ValueError(f"{path.name} was written by another version of sitlib: {error}") from None
    model = model_class(config)
    model.load_state_dict(state)
    return model.eval()
