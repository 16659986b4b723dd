"""Training in 1, 2, ... processes of one thread each, at the same global batch: images a second, and the loss, which must not change.

    python benchmarks/scaling.py [--processes 1 2] [--variant sit4] [--steps 40]

Processes are started as `workbook.runs` starts them; on a machine with GPUs each takes one. The first row of the training curve
is left out: it holds the warm-up. On a machine with other work, or with fewer cores than processes, the table says little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

import torch

from sitlib.data import open_images
from sitlib.train.config import EngineConfig
from sitlib.train.distributed import join_processes, rank
from sitlib.train.tokenizer import train_tokenizer
from workbook.paths import resolve
from workbook.profile import load_profile
from workbook.runs import TokenizerRun, launch_command


def engine_of(processes: int) -> EngineConfig:
    return replace(
        load_profile("smoke").engine,
        processes=processes,
        strategy="single" if processes == 1 else "ddp",
    )


def work(options: argparse.Namespace) -> None:
    """One of the processes."""
    if "RANK" in os.environ:
        join_processes()
    profile = load_profile(options.profile)
    run = TokenizerRun.of(profile, options.variant, 0)
    training, steps = run.training, options.steps
    optimizer = replace(
        training.optimizer,
        steps=steps,
        warmup_steps=0,
        log_every=steps // 4,
        checkpoint_every=steps // 4 * 100,
    )
    run = replace(
        run, training=replace(training, optimizer=optimizer, loss=replace(training.loss, lpips=0.0))
    )
    with tempfile.TemporaryDirectory() as folder:
        images = open_images(resolve(run.data.source), "train")
        settings = {"seed": 0, "folder": Path(folder), "engine": engine_of(options.work)}
        _, rows = train_tokenizer(run.model, run.training, run.data, images, **settings)
    if rank() == 0:
        seconds = rows[-1]["seconds"] - rows[0]["seconds"]
        images = (rows[-1]["step"] - rows[0]["step"]) * optimizer.batch_size
        Path(options.output).write_text(
            json.dumps({"rate": images / seconds, "loss": rows[-1]["loss"]})
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--variant", default="sit4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work(options)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.cuda.device_count()} GPUs"
    )
    print("  processes  images/s  of the first  loss of the last rows")
    first = None
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "result.json")
            own = [
                "--profile",
                options.profile,
                "--variant",
                options.variant,
                "--steps",
                str(options.steps),
            ]
            program = [__file__, *own, "--work", str(processes), "--output", str(output)]
            command = (
                [sys.executable, *program]
                if processes == 1
                else launch_command(engine_of(processes), program, os.environ)
            )
            subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
            )
            result = json.loads(output.read_text())
        first = first or result["rate"]
        print(
            f"  {processes:9d}  {result['rate']:8.1f}  {result['rate'] / first:12.2f}  {result['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
