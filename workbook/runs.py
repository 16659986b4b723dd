"""Runs and their files: how a trained model is named, found again and kept apart from what others made.

A run is the parts of a profile that determine a trained model, and a seed. In the pipeline a run is trained into its own folder under
`models/`. In JupyterLab the same call finds that result if it is of the very same run, and otherwise trains into `scratch/`, so that
exploring never touches what the pipeline has made.
"""

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from braceexpand import braceexpand
from torch import nn

from sitlib.data.index import MANIFEST_SUFFIX
from sitlib.files import (
    DiskError,
    Row,
    load_model,
    read_csv,
    read_metadata,
    save_model,
    sha256_of,
    write_csv,
)
from sitlib.model.config import AutoregressiveConfig, TokenizerConfig
from sitlib.strict import digest
from sitlib.train.checkpoint import StateError, locked, remove_states
from sitlib.train.config import (
    CaptionsConfig,
    CodesConfig,
    DataConfig,
    DualEncoderConfig,
    OptimizerConfig,
    TokenizerTraining,
)
from sitlib.train.distributed import barrier, broadcast_object, rank
from workbook.code_hashes import code_hashes
from workbook.finished import FOLDER, Finished
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.sections import TextSection

SMALL_SET = (
    2**28
)  # bytes of images that are read to tell whether they are the same: a second or less


@dataclass(frozen=True)
class TokenizerRun:
    """Everything that determines a trained tokenizer."""

    made_by: ClassVar[str] = "workbook/tokenizers.py"

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

    made_by: ClassVar[str] = "workbook/codes.py"

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

    made_by: ClassVar[str] = "workbook/generators.py"

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

    made_by: ClassVar[str] = "workbook/dual_encoder.py"

    data: DataConfig
    captions: CaptionsConfig
    model: DualEncoderConfig
    reconstructed_by: list[TokenizerRun]  # in the order of `model.reconstructions`
    seed: int

    @classmethod
    def of(cls, profile: Profile) -> "DualEncoderRun":
        """Trained on the images and captions of the text-conditional models, which must all be the same."""
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
    """What determines a trained model: a dataclass, hashed into the name of its result.

    Attributes:
        made_by: file of the code that does it, which is no part of the name.
    """

    made_by: ClassVar[str]

    @property
    def seed(self) -> int: ...

    @property
    def source(self) -> str: ...


Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Trained(Generic[Model]):
    """A trained model in evaluation mode, its training curve as columns and the file that holds it."""

    model: Model
    curve: dict[str, list[float]]
    path: Path


def trained(
    run: Run,
    kind: str,
    variant: str,
    model_class: type[Model],
    train_now: Callable[[Path], tuple[Model, list[Row]]],
    pipeline: bool,
    launch: Callable[[], None] | None = None,
) -> Trained[Model]:
    """The model of a run, trained now or earlier. Of several processes all call this, and the first writes the files.

    Args:
        kind, variant: name the model's files, with the seed of the run.
        model_class: for `load_model`.
        train_now: trains with resumable checkpoints in the folder that it is given; returns the model and its training curve.
        pipeline: train, and write the pipeline's files, as its stages do, unless this very run had finished and the pipeline has not gone
            through since then (`workbook.finished`). Otherwise take the pipeline's result if it is of this very
            run, else what was trained in `scratch/` before, else train there.
        launch: where the run is to be trained in processes of its own: starts them and waits until they have written its files.

    Raises:
        StateError: another process is making these files, or a state could not be written.
        DiskError: they could not be written, for instance to a full disk. The last state is still there.
    """
    key = digest(run)
    shared, own = _pipeline_files(kind, variant, run.seed), _own_files(kind, variant, run.seed, key)
    if not pipeline:
        found = [
            read_metadata(files.model).get("run") == key and files.curve.exists()
            for files in (shared, own)
        ]
        for files, is_there in zip((shared, own), broadcast_object(found), strict=True):
            if is_there:
                return files.load(model_class)
    files = shared if pipeline else own
    name = f"{kind}-{files.model.parent.name}"
    # Of a large set it takes a while to tell whether its images are the same: the first process does it, once.
    is_first, resumed = rank() == 0, resume_key(run) if rank() == 0 else ""
    finished = Finished(name, resumed, resolve(FOLDER))
    if pipeline and broadcast_object(is_first and finished.restore(files.by_name)):
        if is_first:
            print(f"This very run had finished: {files.model} is what it made.", file=sys.stderr)
        return files.load(model_class)
    if launch is not None:
        launch()
        return files.load(model_class)
    # Runs of other settings may have the same output, and of the same settings another one.
    with locked(resolve(".ckpt") / name, f"{files.model} is being made"):
        checkpoints = broadcast_object(checkpoint_folder(resumed) if is_first else Path())
        model, rows = train_now(checkpoints)
        if is_first:
            write_csv(files.curve, rows)
            name = f"{kind}/{variant}-seed{run.seed}"
            save_model(files.model, model.cpu(), run=key, name=name)
            if pipeline:
                finished.keep(files.by_name)
            with (
                suppress(StateError),
                locked(checkpoints),
            ):  # unless another process goes on from them
                remove_states(checkpoints)
        barrier()
    return files.load(model_class)


@dataclass(frozen=True)
class _Files:
    model: Path
    curve: Path

    @property
    def by_name(self) -> dict[str, Path]:
        return {"model.safetensors": self.model, "curve.csv": self.curve}

    def load(self, model_class: type[Model]) -> Trained[Model]:
        return Trained(load_model(self.model, model_class), read_csv(self.curve), self.model)


def _pipeline_files(kind: str, variant: str, seed: int) -> _Files:
    return _Files(
        resolve(f"models/{kind}/{variant}-seed{seed}/model.safetensors"),
        resolve(f"metrics/curves/{kind}/{variant}-seed{seed}.csv"),
    )


def _own_files(kind: str, variant: str, seed: int, key: str) -> _Files:
    folder = resolve(f"scratch/{kind}/{variant}-seed{seed}-{key}")
    return _Files(folder / "model.safetensors", folder / "curve.csv")


def checkpoint_folder(key: str) -> Path:
    """Where the run of a `resume_key` keeps its states; says so if there are some that it cannot go on from."""
    folder = resolve(".ckpt") / key
    _tell_of_others(folder)
    return folder


def resume_key(run: Run | CodesRun, purpose: str = "") -> str:
    """Names what may be gone on with: digests of the run's configuration, of its images and of the code that makes it, joined by "-"."""
    code = code_hashes({run.made_by}, ("sitlib/metrics/weights",))
    return "-".join(digest(part) for part in ([run, purpose], _fingerprint(run.source), code))


def _fingerprint(source: str) -> list[list[Any]]:
    """Of images: names and contents. Of a large set names and sizes, and contents of its JSON files; if none of them is a manifest with
    checksums of the others, also their times.

    No absolute paths, no hidden files, and no times where contents are known: a copy of the images is as good.
    """
    path = resolve(source)
    if path.is_dir():
        files, root = [file for file in path.rglob("*") if file.is_file()], path
    else:
        files, root = (
            [Path(name) for pattern in braceexpand(str(path)) for name in glob(pattern)],
            path.parent,
        )
    name_of = {file: os.path.relpath(file, root) for file in sorted(files)}
    hidden = re.compile(r"(^|/)\.(?!\./)")  # a part that starts with a dot and is not ".."
    sizes = {file: file.stat().st_size for file, name in name_of.items() if not hidden.search(name)}
    is_small = sum(sizes.values()) <= SMALL_SET
    is_listed = any(file.name.endswith(MANIFEST_SUFFIX) for file in sizes)

    def content(file: Path) -> str:
        if is_small or file.suffix == ".json":
            return sha256_of(file)
        return "" if is_listed else str(file.stat().st_mtime_ns)

    return [[name_of[file], size, content(file)] for file, size in sizes.items()]


def _tell_of_others(folder: Path) -> None:
    """Says on the terminal where states of a run are that were made from other images or by other code than those of `folder`."""
    own = folder.name.split("-")
    for other in sorted(folder.parent.glob(f"{own[0]}-*-*")):
        states = sorted(other.glob("step-*"))
        if other == folder or not states:
            continue
        parts = zip(("images", "code"), own[1:], other.name.split("-")[1:], strict=True)
        changed = " and ".join(name for name, ours, theirs in parts if ours != theirs)
        step = int(states[-1].name.removeprefix("step-"))
        print(
            f"This run has a state of step {step} in {other}, of other {changed}: it does not go on from there, and unless you go back to "
            f"that {changed}, or it is being trained, the folder can be removed.",
            file=sys.stderr,
        )


def command(main: Callable[[], None]) -> None:
    """Runs the `main` of a module; what is wrong with its input ends in one sentence on the terminal and exit code 1."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` for instance, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (sentence := sentence_of(error)) is None:
            raise
        sys.exit(sentence)


def sentence_of(error: BaseException) -> str | None:
    """What a user is told of an error that is none of the code's, or None."""
    if isinstance(error, ValueError | FileNotFoundError | StateError | DiskError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({error}): make room, then give the same command again."
    return None
