"""Runs: everything that determines a trained model, and one load-or-train for all kinds of models.

A run is the part of a profile that determines a model, and a seed. In the pipeline it is trained
into `models/`. In JupyterLab the same call takes that result if it is of the very same run, and
otherwise trains into `scratch/`, so that exploring never touches what the pipeline has made.

A notebook that has touched a GPU cannot become one of several processes, so it starts them, one for
each GPU, as a program of their own (torchrun; in a SLURM allocation of several machines by srun,
see docs/scale.md), passes on what they print, and reads the files that they leave.
"""

import argparse
import codecs
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch.distributed as dist
import yaml
from torch import nn

from sitlib.files import Row, load_model, read_csv, read_metadata, save_model, write_csv
from sitlib.model.config import AutoregressiveConfig, TokenizerConfig
from sitlib.model.pretrained import CHECKPOINT
from sitlib.strict import digest, to_dict
from sitlib.train.checkpoint import locked
from sitlib.train.config import (
    CaptionsConfig,
    CodesConfig,
    DataConfig,
    DualEncoderConfig,
    EngineConfig,
    OptimizerConfig,
    TokenizerTraining,
)
from sitlib.train.distributed import barrier, broadcast_object, join_processes, rank, world_size
from workbook.errors import sentence_of
from workbook.paths import ROOT, resolve
from workbook.profile import Profile, TextSection, load_profile

PORT = 29_400  # where the processes of several machines meet
# Kinds of models that are trained in several processes, by what `python -m` runs in each.
PROGRAMS = {"tokenizer": "workbook.tokenizers", "autoregressive": "workbook.generators"}
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TokenizerRun:
    """Everything that determines a trained tokenizer."""

    data: DataConfig  # with the size of the model
    model: TokenizerConfig
    training: TokenizerTraining
    base: "TokenizerRun | None"  # whose encoder and codebooks, or all weights, it takes over
    seed: int

    @classmethod
    def of(cls, profile: Profile, variant: str, seed: int) -> "TokenizerRun":
        model, training = profile.tokenizer_variant(variant), profile.tokenizer_training(variant)
        name = training.codes_from or training.starts_from
        base = cls.of(profile, name, seed) if name in profile.tokenizer.variants else None
        return cls(profile.tokenizer_data(variant), model, training, base, seed)


@dataclass(frozen=True)
class CodesRun:
    """Everything that determines the codes that a model over codes is trained on."""

    tokenizer: TokenizerRun
    codes: CodesConfig
    captions: CaptionsConfig | None  # None: images with classes

    @classmethod
    def of(cls, profile: Profile, variant: str) -> "CodesRun":
        section = profile.generator_section(variant)
        name = profile.autoregressive_variant(variant).tokenizer
        captions = section.captions if isinstance(section, TextSection) else None
        return cls(TokenizerRun.of(profile, name, section.tokenizer_seed), section.codes, captions)


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
        """Trained on the images of the text-conditional models, which must all be the same."""
        text = profile.text
        tokenizers = [profile.autoregressive_variant(name).tokenizer for name in text.variants]
        data = [profile.tokenizer_data(name) for name in tokenizers]
        if len({*map(digest, data)}) != 1:
            raise ValueError(
                "text.variants: one dual encoder judges all of them, so their tokenizers need the "
                "same `data`."
            )
        names, seed = text.dual_encoder.reconstructions, text.tokenizer_seed
        runs = [TokenizerRun.of(profile, name, seed) for name in names]
        return cls(data[0], text.captions, text.dual_encoder, runs, text.evaluation.seed)


@dataclass
class Trained(Generic[Model]):
    """A model in evaluation mode, its training curve as columns and the file that holds it."""

    model: Model
    curve: dict[str, list[float]]
    path: Path


def train_or_load(
    run: TokenizerRun | AutoregressiveRun | DualEncoderRun,
    kind: str,
    variant: str,
    model_class: type[Model],
    train: Callable[[Path], tuple[Model, list[Row]]],
    pipeline: bool = False,
    profile: Profile | None = None,
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
        profile: whose engine says in how many processes; default: in this one.

    Raises:
        StateError: another process is making these files, the states are of another run, or one
            could not be written.
        DiskError: the files could not be written. The last state is still there.
        ValueError: processes could not be started, or one failed; what they printed stands above.
    """
    key, name = digest(run), f"{variant}-seed{run.seed}"
    model_file = resolve(f"models/{kind}/{name}/{CHECKPOINT}")
    curve_file = resolve(f"metrics/curves/{kind}/{name}.csv")
    states = resolve(f".ckpt/{kind}-{name}")

    def load() -> Trained[Model]:
        return Trained(load_model(model_file, model_class), read_csv(curve_file), model_file)

    def is_there() -> bool:
        is_of_run = read_metadata(model_file).get("run") == key
        return broadcast_object(is_of_run and curve_file.exists())

    if not pipeline:
        if is_there():
            return load()
        own = resolve(f"scratch/{kind}/{name}-{key}")
        model_file, curve_file = own / CHECKPOINT, own / "curve.csv"
        states = resolve(f".ckpt/{kind}-{own.name}")
        if is_there():
            return load()
    if profile is not None and starts_processes(profile):
        launch(PROGRAMS[kind], profile, variant, run.seed, pipeline)
        return load()
    with locked(states.with_name(f"{states.name}.files"), f"{model_file} is being made"):
        model, rows = train(states)
        if rank() == 0:
            write_csv(curve_file, rows)
            save_model(model_file, model.cpu(), run=key, name=f"{kind}/{name}")
            shutil.rmtree(states, ignore_errors=True)
        barrier()
    return load()


# -- several processes -------------------------------------------------------------------------


def starts_processes(profile: Profile) -> bool:
    """True if the engine trains models in other processes than this one."""
    return profile.engine.world_size > 1 and not dist.is_initialized()


def launch(module: str, profile: Profile, variant: str, seed: int, pipeline: bool) -> None:
    """Train a variant by `python -m <module>` in as many processes as the engine says.

    Args:
        module: calls `training_command`.
        profile: as it is now, whatever its file says.
    """
    file = resolve(f"scratch/profiles/{digest(profile)}.yaml")  # where every machine can read it
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(to_dict(profile), sort_keys=False))
    program = ["-m", module, "--profile", str(file), "--variant", variant, "--seed", str(seed)]
    program += ["--pipeline"] if pipeline else []
    if code := stream(launch_command(profile.engine, program, os.environ)):
        raise ValueError(
            f"Training {variant} in {profile.engine.world_size} processes ended with exit code "
            f"{code}; what they printed stands above. Started again, it goes on from its last "
            "checkpoint."
        )


def launch_command(
    engine: EngineConfig, program: list[str], environment: Mapping[str, str]
) -> list[str]:
    """The command line that starts `program` (arguments of torchrun) in all processes.

    Raises:
        ValueError: a SLURM allocation of more or fewer nodes than machines; or several machines
            without one, or without MASTER_ADDR.
    """
    processes, machines = str(engine.processes), str(engine.machines)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    nodes = environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES"))
    if nodes not in (None, machines):
        raise ValueError(
            f"This SLURM job has {nodes} node(s), and engine.machines of the profile is "
            f"{machines}: start a job of as many nodes (sbatch --nodes={machines}), or set machines: {nodes}."
        )
    if engine.machines == 1:
        return [*torchrun, "--standalone", *program]
    if nodes is None or "MASTER_ADDR" not in environment or shutil.which("srun") is None:
        raise ValueError(
            f"engine.machines is {machines}: start this from a SLURM job of as many nodes with "
            "MASTER_ADDR set to the first of them (scripts/slurm.sh is an example), or start "
            "torchrun on every machine yourself (docs/scale.md)."
        )
    endpoint = f"{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', PORT)}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    meeting += ["--rdzv-id", environment.get("SLURM_JOB_ID", "0")]
    srun = ["srun", "--nodes", machines, "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
    if "SLURM_CPUS_PER_TASK" in environment:  # which srun does not take over from sbatch
        srun += ["--cpus-per-task", environment["SLURM_CPUS_PER_TASK"]]
    return [*srun, *torchrun, "--nnodes", machines, *meeting, *program]


def stream(command: list[str]) -> int:
    """Run a command from the project's root, and print what it prints as it does; its exit code."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as process:
        assert process.stdout is not None
        try:
            while chunk := os.read(process.stdout.fileno(), 65_536):
                print(decoder.decode(chunk), end="", flush=True)
        except BaseException:  # interrupted: torchrun ends its processes when it is asked to end
            process.terminate()
            process.wait()  # so that the same run can be started again at once
            raise
    return process.returncode


def training_command(train: Callable[[Profile, str, int, bool], object]) -> None:
    """Train a variant, in one process or as one of several that torchrun started."""
    parser = argparse.ArgumentParser(description=training_command.__doc__)
    parser.add_argument("--profile", required=True, help="name, or path of a .yaml file")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipeline", action="store_true", help="write models/, not scratch/")
    options = parser.parse_args()
    profile = load_profile(options.profile)
    if "RANK" in os.environ:
        join_processes()
    try:
        train(profile, options.variant, options.seed, options.pipeline)
    except BaseException as error:
        if world_size() == 1:
            raise
        # Leaving the group in an orderly way would wait for the others, and they for this process.
        sys.stdout.flush()
        print(sentence_of(error) or traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
