"""Files that say what they are: weights in safetensors with the model's configuration in the metadata."""

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sitlib.config import ConfigError, from_dict, to_dict
from sitlib.disk import whole_file
from sitlib.paths import resolve

Model = TypeVar("Model", bound=nn.Module)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes tensors to a safetensors file, whole or not at all: it appears under its name only when it is complete.

    Args:
        about: plain values for the file's metadata. They are one JSON text, because safetensors keeps no order between entries and
            equal content should be equal bytes.

    Raises:
        DiskError: it could not be written, for instance to a full disk.
    """
    metadata = {"about": json.dumps(about, sort_keys=True)}
    with whole_file(resolve(path)) as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def read_about(path: str | Path) -> dict[str, Any]:
    """What a file of `write_tensors` says of itself; empty where there is no such file or it says nothing."""
    path = Path(path) if Path(path).exists() else resolve(path)
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("about", "{}"))
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a complete safetensors file ({error}): make it again."
        ) from None


def save_model(path: str | Path, model: nn.Module, config: Any, about: dict[str, Any]) -> None:
    """Writes weights and configuration of `model`.

    Args:
        config: the dataclass from which the model is built again.
        about: further plain values for the metadata, such as the name of the run.
    """
    write_tensors(
        path,
        model.state_dict(),
        {"class": type(model).__name__, "config": to_dict(config), **about},
    )


def load_model(path: str | Path, model_class: type[Model], config_class: type) -> Model:
    """The model in a file that `save_model` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds another kind of model or another configuration than this version knows.
    """
    path = (
        Path(path) if Path(path).exists() else resolve(path)
    )  # a user's own file, or one of the project
    if not path.exists():
        raise FileNotFoundError(
            f"There is no checkpoint {path.name} in {path.parent}: train it first (make repro)."
        )
    about = read_about(path)
    if about.get("class") != model_class.__name__:
        found = about.get("class", "no class at all")
        raise ValueError(
            f"{path.name} names {found} in its metadata, not {model_class.__name__}: another file is needed."
        )
    try:
        config = from_dict(config_class, about["config"], where=path.name)
    except ConfigError as error:
        raise ValueError(f"{path.name} was written by another version of sitlib: {error}") from None
    model = model_class(config)
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path.name} does not hold the weights of this version's {model_class.__name__}: {error}"
        ) from None
    return model.eval()
