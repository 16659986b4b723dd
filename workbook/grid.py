"""Runs the stages of a DVC file that are not up to date, several side by side: `python -m workbook.grid dvc.yaml`.

DVC itself runs one stage after the other; small trainings are faster as several processes of one thread each. Every stage is still a
`dvc repro` of its own, and starts when those that it depends on are done. So what is finished stays finished: after an interruption the
same command goes on with the rest.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from sitlib.files import read_json
from workbook.paths import ROOT, resolve
from workbook.runs import command

LOGS = "scratch/logs"
MOST_JOBS = 8  # each may take 2 GB of memory
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
BUSY = (
    "Unable to acquire lock",
    "is busy, it is being blocked by",
)  # another DVC command is at work for a moment
WAIT_SECONDS, ATTEMPTS = 2, 500
REFRESH_SECONDS = 10
# Memory of large tensors stays with the process, in glibc; else it is new pages, filled with zeros, every time, which takes longer than
# many an operation.
KEEP_MEMORY = {f"MALLOC_{what}_THRESHOLD_": str(2**30) for what in ("MMAP", "TRIM")}
EDGE = re.compile(r'"([^"]+)" -> "([^"]+)";')


def needed_by_stage(file: str) -> dict[str, set[str]]:
    """Every stage of a DVC file, in the order of the file, with those of the file that it depends on.

    Raises:
        ValueError: DVC cannot read the file.
    """
    listed = _answer(file, "stage", "list", "--name-only").split()
    needed: dict[str, set[str]] = {stage: set() for stage in listed}
    for before, after in EDGE.findall(_answer(file, "dag", "--dot")):
        if before in needed and after in needed:
            needed[after].add(before)
    return needed


def waiting_stages(file: str, needed: Mapping[str, set[str]]) -> list[str]:
    """Names of the stages in a DVC file that have changed in dependencies, parameters or results, or come after such.

    Args:
        needed: every stage with those that it depends on (`needed_by_stage`); its order is that of the answer.

    Raises:
        ValueError: DVC cannot read the file.
    """
    changed = set(json.loads(_answer(file, "status", "--json") or "{}"))
    waiting: set[str] = set()
    more = changed & needed.keys()
    while more:
        waiting |= more
        more = {stage for stage, before in needed.items() if before & waiting} - waiting
    return [stage for stage in needed if stage in waiting]


def run_stage(stage: str, threads: int | None = 1) -> tuple[bool, Path]:
    """Runs one stage, with as many threads as PyTorch likes if `threads` is None; whether it succeeded, and the file of its output."""
    log = resolve(LOGS) / f"{stage.split(':')[-1].replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    attempts = 0
    while True:
        attempts += 1
        limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        with open(log, "w") as output:  # no pipe: a stage ends well even if this process is killed
            result = subprocess.run(
                [sys.executable, "-m", "dvc", "repro", "--single-item", stage],
                cwd=ROOT,
                env={**KEEP_MEMORY, **os.environ, **limit},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        is_busy = any(sign in log.read_text() for sign in BUSY)
        if result.returncode == 0 or not is_busy or attempts == ATTEMPTS:
            return result.returncode == 0, log
        time.sleep(WAIT_SECONDS)


def run_stages(
    stages: Iterable[str],
    needed: Mapping[str, set[str]],
    jobs: int,
    alone: Iterable[str] = (),
    threads: int | None = 1,
    seconds: Mapping[str, float] | None = None,
) -> tuple[list[str], list[str]]:
    """Runs stages side by side, each after those that it needs; first those with the longest way to the end.

    Args:
        needed: for every stage those that it depends on; what is not among `stages` is taken for done.
        jobs: most of them at a time.
        alone: names without file of those that run with nothing beside them and all threads, as late as others permit.
        threads: of each of the others; None: as many as PyTorch likes.
        seconds: what stages took before, for the time that is left; the others are taken for average ones.

    Returns:
        Those that failed, and those that were not run because of it.
    """
    left = dict.fromkeys(stages)
    known = [taken for stage, taken in (seconds or {}).items() if stage in left]
    work = dict.fromkeys(left, sum(known) / len(known) if known else 1.0) | (dict(seconds or {}))
    count, longest = len(left), _longest_ways(left, needed, work)
    failed: list[str] = []
    running: dict[Future, str] = {}

    def is_alone(stage: str) -> bool:
        return stage.split(":")[-1] in alone

    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(
            total=sum(work[stage] for stage in left), bar_format=BAR, ncols=120, smoothing=0
        ) as bar,
    ):
        while True:
            open_stages = {*left, *running.values(), *failed}
            ready = [stage for stage in left if not needed[stage] & open_stages]
            ready.sort(key=longest.__getitem__, reverse=True)
            side_by_side = [stage for stage in ready if not is_alone(stage)][: jobs - len(running)]
            if any(map(is_alone, running.values())):
                side_by_side = []
            if not side_by_side and not running and ready:
                side_by_side = ready[:1]  # one that wants to be alone
            for stage in side_by_side:
                del left[stage]
                running[pool.submit(run_stage, stage, None if is_alone(stage) else threads)] = stage
            if not running:
                return failed, list(left)
            done = count - len(left) - len(running)
            bar.set_description_str(f"{done} of {count} stages", refresh=False)
            bar.set_postfix_str(
                ", ".join(stage.split(":")[-1] for stage in running.values())
            )  # and the time
            finished = wait(running, timeout=REFRESH_SECONDS, return_when=FIRST_COMPLETED).done
            for job in finished:
                stage, (succeeded, log) = running.pop(job), job.result()
                bar.update(work[stage])
                if not succeeded:
                    failed.append(stage)
                    last = log.read_text().strip().splitlines()[-3:]
                    tqdm.write(
                        f"{stage} failed; {log.relative_to(ROOT)} ends with:\n  "
                        + "\n  ".join(last)
                    )


def _longest_ways(
    stages: Iterable[str], needed: Mapping[str, set[str]], work: Mapping[str, float]
) -> dict[str, float]:
    """Stage -> work of the longest chain of stages that begins with it."""
    after: dict[str, list[str]] = {stage: [] for stage in stages}
    for stage in after:
        for before in needed[stage] & after.keys():
            after[before].append(stage)

    @cache
    def way(stage: str) -> float:
        return work[stage] + max(map(way, after[stage]), default=0.0)

    return {stage: way(stage) for stage in after}


def past_seconds() -> dict[str, float]:
    """Stage -> seconds that it took when it last ran, of the stages that were timed (`workbook.reporting.timed` and `runner`)."""
    timed = [read_json(path) for path in resolve("metrics/seconds").glob("*.json")]
    return {entry["stage"]: entry["seconds"] for entry in timed}


def _answer(file: str, *arguments: str) -> str:
    result, attempts = _dvc(*arguments, file), 1
    while result.returncode and attempts < ATTEMPTS and any(sign in result.stderr for sign in BUSY):
        if attempts == 1:
            print("Waiting for a stage that an earlier command has started.", flush=True)
        time.sleep(WAIT_SECONDS)
        result, attempts = _dvc(*arguments, file), attempts + 1
    if result.returncode:
        raise ValueError(
            f"DVC cannot read {file}: {result.stderr.strip() or result.stdout.strip()}"
        )
    return result.stdout


def _dvc(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.grid", description=__doc__)
    parser.add_argument("file", help="DVC file with the stages")
    parser.add_argument(
        "--first",
        nargs="*",
        default=[],
        help="quick stages on whose results it depends which of the others have anything to do",
    )
    parser.add_argument(
        "--alone", nargs="*", default=[], help="stages that run with nothing beside them"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="stages at a time, one thread each (default: the number of cores, at most 8; one stage where there are GPUs)",
    )
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()  # which a stage uses whole
    jobs = arguments.jobs or (1 if has_gpu else min(os.cpu_count() or 1, MOST_JOBS))
    needed = needed_by_stage(arguments.file)
    stages = waiting_stages(arguments.file, needed)
    first = [stage for stage in stages if stage.split(":")[-1] in arguments.first]
    for stage in first:
        succeeded, log = run_stage(stage)
        if not succeeded:
            raise ValueError(f"{stage} failed: {log.read_text().strip()}")
    if first:
        stages = waiting_stages(arguments.file, needed)
    if not stages:
        print(f"All stages of {arguments.file} are up to date.")
        return
    failed, skipped = run_stages(
        stages,
        needed,
        jobs,
        arguments.alone,
        threads=None if has_gpu else 1,
        seconds=past_seconds(),
    )
    if failed:
        later = f", {len(skipped)} that need them were not run" if skipped else ""
        raise ValueError(
            f"{len(failed)} of {len(stages)} stages failed{later}; the others are done."
        )


if __name__ == "__main__":
    command(main)
