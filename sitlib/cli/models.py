"""Which trained models a command uses: found by name, path or default, and fitting each other."""

import argparse
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitlib.cli.options import UsageError, given
from sitlib.files import load_model
from sitlib.paths import resolve

if TYPE_CHECKING:
    import torch

    from sitlib.model.config import SamplingConfig
    from sitlib.model.generator import AutoregressiveModel
    from sitlib.model.tokenizer import SpectralTokenizer
    from workbook.profile import Profile

FILE = "model.safetensors"
TRAIN = {
    "tokenizer": "make tokenizer trains the default one in minutes, make repro (or dvc repro) all of them",
    "autoregressive": "make repro (or dvc repro) trains them",
}


@cache
def pipeline_profile() -> "Profile":
    """The profile that params.yaml names, from which defaults come.

    Raises:
        ValueError: there is no params.yaml, as where sitlib was installed without its project.
    """
    import yaml

    from workbook.profile import load_profile

    path = resolve("params.yaml")
    if not path.exists():
        raise ValueError(
            f"There is no params.yaml in {path.parent}, which names the default models and samplers: install the project itself "
            "(pip install -e . in its folder); to encode and decode, a checkpoint named with --tokenizer is enough."
        )
    return load_profile(yaml.safe_load(path.read_text())["profile"])


def checkpoint_path(name: str, kind: str, option: str) -> Path:
    """The checkpoint that a name or a path stands for.

    Args:
        name: a file; a folder with a model.safetensors in it; or the name of one of the pipeline's runs, with or without its seed.
        kind: "tokenizer" or "autoregressive".
        option: the command line option that names another one, for messages.

    Raises:
        ValueError: there is no such checkpoint; the message lists those that there are, or says how to get one.
    """
    from sitlib.strict import nearest

    path = Path(name).expanduser()
    for found in (path, path / FILE):
        if found.is_file():
            return found
    if path.name != name or path.suffix == ".safetensors":  # a path and no name
        raise ValueError(
            f"There is no checkpoint {name}: {option} takes the path of a safetensors file, or the name of a trained model."
        )
    folder = resolve("models") / kind
    for run in (name, f"{name}-seed0"):
        if (folder / run / FILE).is_file():
            return folder / run / FILE
    there = sorted(path.parent.name for path in folder.glob(f"*/{FILE}"))
    names = [run.removesuffix("-seed0") for run in there]
    known = (
        f"trained are {', '.join(names)}{nearest(name, names)}"
        if names
        else f"none is trained yet: {TRAIN[kind]}"
    )
    raise ValueError(
        f"There is no {kind} checkpoint {name!r} in {folder}; {known}. {option} also takes the path of a checkpoint."
    )


def device_of(options: argparse.Namespace) -> "torch.device":
    """The device that was asked for, or the accelerator if there is one, else the CPU."""
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is not known: give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine; sit doctor says more.")
    return device


@dataclass
class NamedTokenizer:
    """A tokenizer, and what its checkpoint says of itself."""

    model: "SpectralTokenizer"
    name: str  # of its run, such as tokenizer/sit5_sc-seed0, or of its file
    run: str | None  # digest of the configuration that it was trained with

    @property
    def device(self) -> "torch.device":
        return self.model.device


def load_tokenizer(path: Path, options: argparse.Namespace) -> NamedTokenizer:
    """The tokenizer in a checkpoint, on the device that was asked for."""
    from sitlib.files import read_metadata
    from sitlib.model.tokenizer import SpectralTokenizer

    model = load_model(path, SpectralTokenizer).to(device_of(options)).requires_grad_(False)
    about = read_metadata(path)
    return NamedTokenizer(model, about.get("name", path.name), about.get("run"))


def chosen_tokenizer(options: argparse.Namespace) -> NamedTokenizer:
    """The tokenizer of --tokenizer, or the one over whose codes the pipeline's class-conditional model is."""
    name = options.tokenizer
    if name is None:
        profile = pipeline_profile()
        name = profile.autoregressive_variant(profile.applications.class_generator).tokenizer
    return load_tokenizer(checkpoint_path(name, "tokenizer", "--tokenizer"), options)


@dataclass
class Generator:
    """An autoregressive model, the tokenizer of its codes, and what it is told."""

    model: "AutoregressiveModel"
    tokenizer: "SpectralTokenizer"
    class_id: int | None
    text: str | None

    def prompts(self, count: int) -> Any:
        """What `count` samples are told, as `generate` takes it."""
        import torch

        if self.class_id is not None:
            return torch.full((count,), self.class_id)
        return count if self.text is None else [self.text] * count


def chosen_generator(options: argparse.Namespace) -> Generator:
    """The model of --model, or the pipeline's for what it is told, and its tokenizer.

    Raises:
        ValueError: a missing checkpoint, a class or text that the model cannot be told, or a tokenizer of other codes.
    """
    from sitlib.model.generator import AutoregressiveModel

    name = given(options.model, options.text is not None)
    path = checkpoint_path(name, "autoregressive", "--model")
    model = load_model(path, AutoregressiveModel).to(device_of(options)).requires_grad_(False)
    class_id = _class_id(model, options.class_name, name)
    _check_text(model, options.text, name)
    variant = model.config.transformer.tokenizer
    if options.tokenizer is not None:
        found = checkpoint_path(options.tokenizer, "tokenizer", "--tokenizer")
    else:  # of the models among which this one lies, else the pipeline's
        beside = path.absolute().parent.parent.parent / "tokenizer" / f"{variant}-seed0" / FILE
        found = beside if beside.is_file() else checkpoint_path(variant, "tokenizer", "--tokenizer")
    tokenizer = load_tokenizer(found, options).model
    theirs, ours, geometry = model.config, tokenizer.config, tokenizer.geometry
    if (theirs.num_scales, theirs.tokens_per_scale, theirs.num_codes, theirs.num_codebooks) != (
        geometry.num_scales,
        geometry.tokens_per_scale,
        ours.num_codes,
        len(tokenizer.codebooks),
    ):
        raise ValueError(
            f"The model {name} writes codes of the tokenizer {variant}, not of {found}: give that one with --tokenizer."
        )
    return Generator(model, tokenizer, class_id, options.text)


def sampler(options: argparse.Namespace, is_text: bool) -> "SamplingConfig":
    """How the pipeline's profile draws from the model of --model; from one that it does not know, as from most of its kind."""
    from sitlib.files import read_metadata

    profile = pipeline_profile()
    section = profile.text if is_text else profile.autoregressive
    path = checkpoint_path(
        given(options.model, options.text is not None), "autoregressive", "--model"
    )
    run = read_metadata(path).get("name", "")  # such as autoregressive/ar_sit5_sc-seed0
    variant = re.sub(r"-seed\d+$", "", run.rpartition("/")[2])
    return profile.sampler(variant) if variant in section.variants else section.sampling


def _class_id(model: "AutoregressiveModel", class_name: str | None, name: str) -> int | None:
    from sitlib.strict import nearest

    classes = model.config.classes
    if class_name is None:
        return None
    if not classes:
        raise ValueError(
            f"The model {name} is told texts, not classes: say with --text what to draw."
        )
    if class_name not in classes:
        raise ValueError(
            f"The model {name} knows no class {class_name!r}; it knows {', '.join(classes)}{nearest(class_name, classes)}."
        )
    return classes.index(class_name)


def _check_text(model: "AutoregressiveModel", text: str | None, name: str) -> None:
    if text is None:
        return
    if model.text_tokenizer is None:
        raise ValueError(
            f"The model {name} is told classes, not texts: choose one with --class, of {', '.join(model.config.classes)}."
        )
    model.text_tokenizer.encode([text])  # raises for an empty or too long one
