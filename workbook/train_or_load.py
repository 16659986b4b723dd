"""One load-or-train for tokenizers, models over codes and the dual encoder.

A run is the part of a profile that determines a trained model, and a seed. In the pipeline it is
trained into `models/`. In JupyterLab the same call takes that result if it is of the very same run,
and otherwise trains into `scratch/`, so that exploring never touches what the pipeline has made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from torch import nn

from sitlib.files import (
    Row,
    load_model,
    read_csv,
    read_json,
    read_metadata,
    save_model,
    write_csv,
)
from sitlib.model.config import TokenizerConfig
from sitlib.model.generator_config import AutoregressiveConfig
from sitlib.strict import digest
from sitlib.train.checkpoint import locked, remove_states
from sitlib.train.config import (
    CaptionsConfig,
    CodesConfig,
    DataConfig,
    DualEncoderConfig,
    OptimizerConfig,
    TokenizerTraining,
)
from sitlib.train.distributed import barrier, broadcast_object, rank
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.sections import TextSection


@dataclass(frozen=True)
class TokenizerRun:
    """Everything that determines a trained tokenizer."""

    data: DataConfig  # with the size of the model
    model: TokenizerConfig
    training: TokenizerTraining
    codes: "TokenizerRun | None"  # the run whose encoder and codebooks it takes over, if it does
    seed: int

    @classmethod
    def of(cls, profile: Profile, variant: str, seed: int) -> "TokenizerRun":
        model, training = profile.tokenizer_variant(variant), profile.tokenizer_training(variant)
        codes = cls.of(profile, training.codes_from, seed) if training.codes_from else None
        return cls(profile.tokenizer_data(variant), model, training, codes, seed)

    @property
    def source(self) -> str:
        return self.data.source


@dataclass(frozen=True)
class CodesRun:
    """Everything that determines a set of extracted codes."""

    tokenizer: TokenizerRun
    codes: CodesConfig
    captions: CaptionsConfig | None  # None: images with classes

    @classmethod
    def of(cls, profile: Profile, variant: str) -> "CodesRun":
        """The codes that the autoregressive variant is trained on."""
        section, name = (
            profile.generator_section(variant),
            profile.autoregressive_variant(variant).tokenizer,
        )
        captions = section.captions if isinstance(section, TextSection) else None
        return cls(TokenizerRun.of(profile, name, section.tokenizer_seed), section.codes, captions)

    @property
    def source(self) -> str:
        return self.tokenizer.source


@dataclass(frozen=True)
class AutoregressiveRun:
    """Everything that determines a trained autoregressive model, its tokenizer included."""

    codes: CodesRun
    model: AutoregressiveConfig
    optimizer: OptimizerConfig
    seed: int

    @classmethod
    def of(cls, profile: Profile, variant: str, seed: int) -> "AutoregressiveRun":
        model = profile.autoregressive_variant(variant)
        return cls(CodesRun.of(profile, variant), model, profile.generator_optimizer(variant), seed)

    @property
    def source(self) -> str:
        return self.codes.source


@dataclass(frozen=True)
class DualEncoderRun:
    """Everything that determines the dual encoder that judges text-conditional samples."""

    data: DataConfig
    captions: CaptionsConfig
    model: DualEncoderConfig
    reconstructed_by: list[TokenizerRun]  # in the order of `model.reconstructions`
    seed: int

    @classmethod
    def of(cls, profile: Profile) -> "DualEncoderRun":
        """Trained on the images and captions of the text-conditional models, which must all be the
        same.
        """
        names = {
            profile.autoregressive_variant(variant).tokenizer for variant in profile.text.variants
        }
        data = {digest(found): found for found in map(profile.tokenizer_data, sorted(names))}
        if len(data) != 1:
            raise ValueError(
                "text.variants: one dual encoder judges all of them, so their tokenizers need the same `data`."
            )
        section = profile.text
        config = section.dual_encoder
        tokenizers = [
            TokenizerRun.of(profile, name, section.tokenizer_seed)
            for name in config.reconstructions
        ]
        (images,) = data.values()
        return cls(images, section.captions, config, tokenizers, section.evaluation.seed)

    @property
    def source(self) -> str:
        return self.data.source


class Run(Protocol):
    """A dataclass of everything that determines a trained model."""

    @property
    def seed(self) -> int: ...


Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Trained(Generic[Model]):
    """A model in evaluation mode, its training curve as columns and the file that holds it."""

    model: Model
    curve: dict[str, list[float]]
    path: Path


def is_of_run(path: Path, run: str) -> bool:
    """True for a result, a JSON or safetensors file, that names the digest `run` as its run."""
    if path.suffix == ".json":
        return path.exists() and read_json(path).get("run") == run
    return read_metadata(path).get("run") == run


def train_or_load(
    run: Run,
    kind: str,
    variant: str,
    model_class: type[Model],
    train: Callable[[Path], tuple[Model, list[Row]]],
    pipeline: bool,
    launch: Callable[[], None] | None = None,
) -> Trained[Model]:
    """The model of a run, trained now or earlier.

    Of several processes all call this, and rank 0 writes the files. An interrupted training goes on
    from its last state, in a folder of `.ckpt` that refuses another run.

    Args:
        kind, variant: name the model's files, with the seed of the run.
        train: trains with resumable states in the folder that it is given; returns the model and
            its training curve.
        pipeline: train, and write the pipeline's files, as its stages do. Otherwise take the
            pipeline's result if it is of this very run, else what was trained in `scratch/`
            before, else train there.
        launch: starts processes of their own that train the run, and waits until they have written
            its files.

    Raises:
        StateError: another process is making these files, the states are of another run, or one
            could not be written.
        DiskError: the files could not be written. The last state is still there.
    """
    key, name = digest(run), f"{variant}-seed{run.seed}"
    shared = (
        resolve(f"models/{kind}/{name}/model.safetensors"),
        resolve(f"metrics/curves/{kind}/{name}.csv"),
    )
    scratch = resolve(f"scratch/{kind}/{name}-{key}")
    own = (scratch / "model.safetensors", scratch / "curve.csv")

    def load(files: tuple[Path, Path]) -> Trained[Model]:
        model, curve = files
        return Trained(load_model(model, model_class), read_csv(curve), model)

    if not pipeline:
        are_there = [is_of_run(model, key) and curve.exists() for model, curve in (shared, own)]
        for files, is_there in zip((shared, own), broadcast_object(are_there), strict=True):
            if is_there:
                return load(files)
    files = model_file, curve_file = shared if pipeline else own
    if launch is not None:
        launch()
        return load(files)
    states = resolve(".ckpt") / f"{kind}-{name if pipeline else scratch.name}"
    with locked(states.with_name(f"{states.name}.files"), f"{model_file} is being made"):
        model, rows = train(states)
        if rank() == 0:
            write_csv(curve_file, rows)
            save_model(model_file, model.cpu(), run=key, name=f"{kind}/{name}")
            remove_states(states)
        barrier()
    return load(files)
