"""Training in several processes, one for each GPU, started from wherever training is asked for.

A notebook that has touched a GPU cannot become one of several processes, so it starts them as a
program of their own (torchrun), passes on
what they print, and reads the files that they leave. On one machine that needs nothing else. On
several, inside a SLURM allocation, srun
starts torchrun on every node; docs/scale.md has the script.
"""

import argparse
import codecs
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist
import yaml

from sitlib.strict import digest, to_dict
from sitlib.train.config import EngineConfig
from sitlib.train.distributed import join_processes, world_size
from workbook.errors import sentence_of
from workbook.paths import ROOT, resolve
from workbook.profile import Profile, load_profile

PORT = 29_400  # where the processes of several machines meet


class LaunchError(ValueError):
    """Processes that could not be started, or that failed."""


def launcher(
    module: str, profile: Profile, variant: str, seed: int, pipeline: bool
) -> Callable[[], None] | None:
    """A function that trains a variant in processes of its own; None if the profile asks for one
    process, or this is one of them already.
    """
    if profile.engine.world_size == 1 or dist.is_initialized():
        return None
    return partial(launch, module, profile, variant, seed, pipeline)


def launch(module: str, profile: Profile, variant: str, seed: int, pipeline: bool) -> None:
    """Runs `python -m <module>` in as many processes as the profile's engine says, and waits for
    them.

    Args:
        module: calls `training_command`.
        profile, variant, seed, pipeline: what is trained; the profile as it is now, whatever its
        file says.

    Raises:
        LaunchError: they could not be started, or one of them failed. What they printed stands
        above.
    """
    file = resolve(f"scratch/profiles/{digest(profile)}.yaml")  # where every machine can read it
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(to_dict(profile), sort_keys=False))
    arguments = ["--profile", str(file), "--variant", variant, "--seed", str(seed)]
    arguments += ["--pipeline"] if pipeline else []
    command = launch_command(profile.engine, ["-m", module, *arguments], os.environ)
    code = stream(command)
    if code:
        raise LaunchError(
            f"Training {variant} in {profile.engine.world_size} processes ended with exit code {code}; what they printed stands above. "
            "Started again, it goes on from its last checkpoint."
        )


def launch_command(
    engine: EngineConfig, program: list[str], environment: Mapping[str, str]
) -> list[str]:
    """The command line that starts `program` (arguments of torchrun, such as `-m`, a module and its
    arguments) in all processes.

    Raises:
        LaunchError: a SLURM allocation of more or fewer nodes than machines; or several machines
        without one, or without MASTER_ADDR.
    """
    module = "torch.distributed.run"
    torchrun = [sys.executable, "-m", module, "--nproc-per-node", str(engine.processes)]
    nodes = environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES"))
    if nodes is not None and nodes != str(engine.machines):
        raise LaunchError(
            f"This SLURM job has {nodes} node(s), and engine.machines of the profile is {engine.machines}: start a job of as many nodes "
            f"(sbatch --nodes={engine.machines}), or set machines: {nodes}."
        )
    if engine.machines == 1:
        return [*torchrun, "--standalone", *program]
    if nodes is None or "MASTER_ADDR" not in environment or shutil.which("srun") is None:
        raise LaunchError(
            f"engine.machines is {engine.machines}: start this from a SLURM job of as many nodes with MASTER_ADDR set to the first of "
            "them (scripts/slurm.sh is an example), or start torchrun on every machine yourself (docs/scale.md)."
        )
    job = environment.get("SLURM_JOB_ID", "0")
    endpoint = f"{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', PORT)}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job]
    srun = ["srun", "--nodes", str(engine.machines), "--ntasks-per-node", "1"]
    srun += ["--kill-on-bad-exit=1"]
    if "SLURM_CPUS_PER_TASK" in environment:  # which srun does not take over from sbatch
        srun += ["--cpus-per-task", environment["SLURM_CPUS_PER_TASK"]]
    return [*srun, *torchrun, "--nnodes", str(engine.machines), *meeting, *program]


def stream(command: list[str]) -> int:
    """Runs a command from the project's root and prints what it prints, as it does; its exit code."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = process.stdout
    assert output is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        while chunk := os.read(output.fileno(), 65_536):
            sys.stdout.write(decoder.decode(chunk))
            sys.stdout.flush()
        return process.wait()
    finally:
        if (
            process.poll() is None
        ):  # interrupted: torchrun ends its processes when it is asked to end
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        output.close()


def training_command(module: str, train: Callable[[Profile, str, int, bool], object]) -> None:
    """The `main` of a module that trains variants: one process, or one of several that torchrun
    started.
    """
    parser = argparse.ArgumentParser(f"python -m {module}", description=training_command.__doc__)
    parser.add_argument("--profile", required=True, help="name, or path of a .yaml file")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipeline", action="store_true", help="write models/, not scratch/")
    arguments = parser.parse_args()
    profile = load_profile(
        Path(arguments.profile) if arguments.profile.endswith(".yaml") else arguments.profile
    )
    if "RANK" in os.environ:
        join_processes()
    with one_for_all():
        train(profile, arguments.variant, arguments.seed, arguments.pipeline)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_for_all() -> Iterator[None]:
    """Around the work of one of several processes: an error in it ends this process at once, after
    saying why, and so the others.

    Leaving the group in an orderly way would wait for them, and they for this one.
    """
    try:
        yield
    except BaseException as error:
        if world_size() == 1:
            raise
        sys.stdout.flush()
        print(sentence_of(error) or traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(1)
