"""What ablations/params.yaml says: rows of ablations, a ladder of model sizes, and other trainings of text-conditional models."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sitlib.config.profile import Profile
from sitlib.config.strict import ConfigError, Strict, from_dict, known, require
from sitlib.paths import resolve

ABLATIONS = "ablations/params.yaml"


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A profile's plain values with the values at dotted keys replaced; raises ConfigError for a key that is not there."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target.get(section, {}) if isinstance(target, dict) else {}
        if name not in target:
            raise ConfigError(f"a change of {key}, which the profile does not have.")
        target[name] = value
    return values


@dataclass(frozen=True)
class AblationRow(Strict):
    """One row of ablations/params.yaml."""

    group: str  # rows of a group are compared with each other
    # Keys in which it differs from `tokenizer.common`, as in a profile's `tokenizer.variants`.
    tokenizer: dict[str, Any]
    generate: bool = (
        False  # also train a model over the codes of its first seed, and judge its samples
    )


@dataclass(frozen=True)
class Rung(Strict):
    """One size of one kind of model over the codes of a tokenizer variant of the profile."""

    kind: Literal["autoregressive", "diffusion"]
    tokenizer: str
    layers: int
    width: int
    heads: int
    learning_rate: float
    steps: int
    batch_size: int
    sampling_steps: int = 25  # of a diffusion model, two evaluations each


@dataclass(frozen=True)
class TextTrial(Strict):
    """A text-conditional model trained otherwise than the profile says."""

    tokenizer: str  # the model is the profile's variant ar_<tokenizer>
    changes: dict[str, Any]  # dotted keys of the profile, in its section `text`

    def __post_init__(self):
        others = [key for key in self.changes if not key.startswith("text.")]
        require(
            not others,
            f"a trial of a text-conditional model changes keys of `text`, not {', '.join(others)}",
        )

    @property
    def variant(self) -> str:
        return f"ar_{self.tokenizer}"

    def profile_of(self, values: dict[str, Any]) -> Profile:
        """The profile in `values` with the changes made.

        Raises:
            ConfigError: no such variant, or a change that the profile refuses.
        """
        profile = from_dict(
            Profile, changed(values, self.changes), where=f"trial of {self.variant}"
        )
        known(self.variant, profile.text.variants, "text variant")
        return profile


@dataclass(frozen=True)
class Ablations(Strict):
    """Content of ablations/params.yaml.

    `profile` is where everything comes from that is not said here, and `common` the keys of it (dotted) that all rows change.
    """

    profile: str
    seeds: list[int]
    common: dict[str, Any]
    rows: dict[str, AblationRow]
    ladder: dict[str, Rung]
    text: dict[str, TextTrial]

    def __post_init__(self):
        require(len(self.seeds) > 0, "seeds must name at least one seed")

    def values(self) -> dict[str, Any]:
        """The profile's plain values."""
        return yaml.safe_load(resolve(f"profiles/{self.profile}.yaml").read_text())

    def profile_of(self, name: str) -> Profile:
        """The profile in which the row is a tokenizer variant, and `ar_<row>` a model over its codes.

        Raises:
            ConfigError: no such row, or a key in it that a profile refuses.
        """
        known(name, self.rows, "ablation")
        values = changed(self.values(), self.common)
        values["tokenizer"]["variants"] = {name: self.rows[name].tokenizer}
        size = self.rows[name].tokenizer.get("size", values["tokenizer"]["common"]["size"])
        generators = {f"ar_{name}": {"tokenizer": name}} if size == values["data"]["size"] else {}
        values["autoregressive"] |= {"variants": generators, "samplers": {}}
        values["text"] |= {"variants": {}, "samplers": {}}
        values["text"]["dual_encoder"]["reconstructions"] = []
        values["applications"]["baseline"] = name
        return from_dict(Profile, values, where=f"ablations/params.yaml: {name}")


def load_ablations(path: str | Path = ABLATIONS) -> Ablations:
    """The rows that there are to be."""
    return from_dict(Ablations, yaml.safe_load(resolve(path).read_text()), where=Path(path).name)
