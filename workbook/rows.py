"""Rows of `ablations/params.yaml`: ablations, a ladder of model sizes, trials of text models."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sitlib.model.config import STRICT
from sitlib.strict import from_dict, require, require_known, to_dict
from workbook.paths import resolve
from workbook.profile import Profile, changed, load_profile, read_yaml

ABLATIONS = "ablations/params.yaml"


@dataclass(frozen=True, config=STRICT)
class AblationRow:
    """A tokenizer, compared with the others of its group."""

    group: str
    tokenizer: dict[str, Any]  # keys in which it differs, as in a profile's `tokenizer.variants`
    # Also train a model over the codes of its first seed, and judge its samples.
    generate: bool = False


@dataclass(frozen=True, config=STRICT)
class Rung:
    """One size of one kind of model over the codes of a tokenizer variant of the profile."""

    kind: Literal["autoregressive", "diffusion"]
    tokenizer: str
    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    learning_rate: PositiveFloat
    steps: PositiveInt
    batch_size: PositiveInt
    sampling_steps: PositiveInt = 25  # of a diffusion model, two evaluations each


@dataclass(frozen=True, config=STRICT)
class TextTrial:
    """A text-conditional model trained otherwise than the profile says."""

    tokenizer: str  # the model is the profile's variant ar_<tokenizer>
    changes: dict[str, Any]  # dotted keys of the profile, in its section `text`

    def __post_init__(self):
        wrong = [key for key in self.changes if not key.startswith("text.")]
        require(
            not wrong,
            f"a trial of a text-conditional model changes keys of `text`, not {', '.join(wrong)}",
        )

    @property
    def variant(self) -> str:
        return f"ar_{self.tokenizer}"

    def profile_of(self, values: dict[str, Any]) -> Profile:
        """The profile in `values` with the changes made.

        Raises:
            ConfigError: no such variant, or a change that the profile refuses.
        """
        profile = from_dict(Profile, changed(values, self.changes), f"trial of {self.variant}")
        require_known(self.variant, profile.text.variants, "text variant")
        return profile


@dataclass(frozen=True, config=STRICT)
class Ablations:
    """Content of ablations/params.yaml."""

    profile: str  # where everything comes from that is not said here
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    common: dict[str, Any]  # dotted keys of the profile that all rows change
    rows: dict[str, AblationRow]
    ladder: dict[str, Rung]
    text: dict[str, TextTrial]

    def values(self) -> dict[str, Any]:
        """The profile's plain values."""
        return to_dict(load_profile(self.profile))

    def profile_of(self, name: str) -> Profile:
        """The profile in which the row is a tokenizer variant, and `ar_<row>` a model of its codes.

        Raises:
            ConfigError: no such row, or a key in it that a profile refuses.
        """
        require_known(name, self.rows, "ablation")
        changes, values = self.rows[name].tokenizer, changed(self.values(), self.common)
        values["tokenizer"]["variants"] = {name: changes}
        size = changes.get("size", values["tokenizer"]["common"]["size"])
        # A model over codes needs a tokenizer of the profile's size.
        generators = {f"ar_{name}": {"tokenizer": name}} if size == values["data"]["size"] else {}
        values["autoregressive"] |= {"variants": generators, "samplers": {}}
        values["text"] |= {"variants": {}, "samplers": {}}
        values["text"]["dual_encoder"]["reconstructions"] = []
        return from_dict(Profile, values, f"ablations/params.yaml: {name}")


def load_ablations(path: str | Path = ABLATIONS) -> Ablations:
    """Read and check the rows."""
    return from_dict(Ablations, read_yaml(resolve(path)), Path(path).name)
