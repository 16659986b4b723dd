"""Runs the stages of a DVC file that are not up to date, several side by side: `python -m sitlib.experiments.grid ablations/dvc.yaml`.

DVC itself runs one stage after the other; small trainings are faster as several processes of one thread each. Every stage is still a
`dvc repro` of its own, so what is finished stays finished: after an interruption the same command goes on with the rest.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from sitlib.experiments.runs import command
from sitlib.paths import ROOT, resolve

LOGS = "scratch/logs"
BUSY = (
    "Unable to acquire lock",
    "is busy, it is being blocked by",
)  # another DVC command is at work for a moment
WAIT_SECONDS, ATTEMPTS = 5, 200


def waiting_stages(file: str) -> list[str]:
    """Names of the stages in a DVC file whose dependencies, parameters or results have changed, in the order of the file.

    Raises:
        ValueError: DVC cannot read the file.
    """
    status, names = _dvc("status", "--json", file), _dvc("stage", "list", "--name-only", file)
    for answer in (status, names):
        if answer.returncode:
            raise ValueError(f"DVC cannot read {file}: {answer.stderr.strip() or answer.stdout.strip()}")
    changed, listed = json.loads(status.stdout or "{}"), names.stdout.split()
    return [stage for stage in listed if stage in changed]


def run_stage(stage: str, threads: int | None = 1) -> tuple[bool, Path]:
    """Runs one stage, with as many threads as PyTorch likes if `threads` is None; whether it succeeded, and the file of its output."""
    log = resolve(LOGS) / f"{stage.split('@')[-1].replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        result = _dvc("repro", "--single-item", stage, **limit)
        log.write_text(result.stdout + result.stderr)
        if result.returncode == 0 or not any(sign in result.stderr for sign in BUSY):
            break
        time.sleep(WAIT_SECONDS)
    return result.returncode == 0, log


def _succeeded(stage: str, succeeded: bool, log: Path) -> bool:
    if not succeeded:
        last = log.read_text().strip().splitlines()[-3:]
        tqdm.write(f"{stage} failed; {log.relative_to(ROOT)} ends with:\n  " + "\n  ".join(last))
    return succeeded


def _dvc(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sitlib.experiments.grid", description=__doc__)
    parser.add_argument("file", help="DVC file with the stages")
    parser.add_argument(
        "--alone", nargs="*", default=[], help="stages that run last, with nothing beside them"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="stages at a time, one thread each")
    arguments = parser.parse_args()
    stages = waiting_stages(arguments.file)
    alone = [stage for stage in stages if stage.split(":")[-1] in arguments.alone]
    failed: list[str] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = {pool.submit(run_stage, stage): stage for stage in stages if stage not in alone}
        for job in tqdm(as_completed(jobs), "stages", total=len(jobs), unit="stage", ncols=110):
            if not _succeeded(jobs[job], *job.result()):
                failed.append(jobs[job])
    for stage in alone:
        print(f"{stage}, with nothing beside it", flush=True)
        if not _succeeded(stage, *run_stage(stage, threads=None)):
            failed.append(stage)
    if failed:
        raise ValueError(f"{len(failed)} of {len(stages)} stages failed; the others are done.")


if __name__ == "__main__":
    command(main)
