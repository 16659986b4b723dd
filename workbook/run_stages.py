"""Run the stages of a DVC file that are not up to date, several side by side, after saying why.

DVC itself runs one stage after the other; small trainings are faster as several processes of one
thread each. Every stage is still a `dvc repro` of its own, so what is finished stays finished:
after an interruption the same command goes on with the rest.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Set
from contextlib import suppress
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from sitlib.files import read_json
from workbook.errors import command
from workbook.machine import machine
from workbook.paths import ROOT, resolve

MOST_JOBS = 8  # each may take 2 GB of memory
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
# Another DVC command is at work for a moment: the stage is started again.
BUSY = (b"Unable to acquire lock", b"is busy, it is being blocked by")
ATTEMPTS = 500
EDGE = re.compile(r'"([^"]+)" -> "([^"]+)";')
# Memory of large tensors stays with the process, in glibc; else it is new pages, filled with
# zeros, every time, which takes longer than many an operation.
KEEP_MEMORY = {f"MALLOC_{what}_THRESHOLD_": str(2**30) for what in ("MMAP", "TRIM")}

Graph = dict[str, set[str]]  # stage -> those that it depends on, in the order of the file


def dvc(*arguments: str) -> str:
    """Output of a DVC command.

    Raises:
        ValueError: it failed, for instance because dvc.yaml cannot be read.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise ValueError(f"dvc {' '.join(arguments)} failed: {reason}")
    return done.stdout.decode(errors="replace")


def short(stage: str) -> str:
    """Name of a stage without its file."""
    return stage.rpartition(":")[2]


def stage_graph(file: str) -> Graph:
    """Every stage of a DVC file with those of the file that it depends on."""
    graph: Graph = {stage: set() for stage in dvc("stage", "list", "--name-only", file).split()}
    for before, after in EDGE.findall(dvc("dag", "--dot", file)):
        if before in graph and after in graph:
            graph[after].add(before)
    return graph


def waiting_stages(file: str, graph: Graph) -> dict[str, str]:
    """Stage -> why it has to run, in the order of the file."""
    status = json.loads(dvc("status", "--json", file) or "{}")
    lock = resolve(file).with_suffix(".lock")
    ran = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
    reasons = {
        stage: reason_of(changes) if short(stage) in ran else "has never run here"
        for stage, changes in status.items()
        if stage in graph
    }
    order = list(graph)
    for stage in TopologicalSorter(graph).static_order():
        if stage not in reasons and (before := [name for name in graph[stage] if name in reasons]):
            reasons[stage] = f"follows {short(min(before, key=order.index))}"
    return {stage: reasons[stage] for stage in graph if stage in reasons}


def reason_of(changes: list[Any]) -> str:
    """The answer of `dvc status --json` for a stage, in words: the dependencies that changed."""
    texts = []
    for change in changes:
        for kind, paths in change.items() if isinstance(change, dict) else [(change, {})]:
            if kind == "changed outs":
                is_gone = {*paths.values()} <= {"deleted", "not in cache"}
                texts.append("results are not there" if is_gone else "results were edited")
            elif kind == "changed deps":
                for path, state in paths.items():
                    parameters = state.items() if isinstance(state, dict) else [(path, state)]
                    texts += [f"{name} {how}" for name, how in parameters]
            else:
                texts.append(kind)
    texts = [re.sub(r"^build/code/\S+", "its code", text) for text in texts]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def past_seconds() -> dict[str, float]:
    """Stage -> seconds that it took when it last ran."""
    records = [read_json(path) for path in resolve("metrics/seconds").glob("*.json")]
    return {record["stage"]: record["seconds"] for record in records}


def start(stage: str, threads: int | None) -> tuple[subprocess.Popen, Path]:
    """Start a stage in a session of its own; the process and the file of its output."""
    log = resolve("scratch/logs") / f"{short(stage).replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = KEEP_MEMORY | os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    with log.open("wb") as out:  # not a pipe: the stage ends well even if this process is killed
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    return process, log


def run_stages(
    stages: Collection[str],
    graph: Graph,
    jobs: int,
    alone: Set[str] = frozenset(),
    threads: int | None = 1,
) -> list[str]:
    """Run stages side by side, each after those that it depends on; those that failed.

    First come those with the longest way to the end, after what they took the last time.

    Args:
        jobs: most of them at a time.
        alone: names of those that run with nothing beside them, with all threads.
        threads: of each of the others; None: as many as PyTorch likes.
    """
    needed = {stage: graph[stage] & set(stages) for stage in stages}
    sorter = TopologicalSorter(needed)
    sorter.prepare()
    past = past_seconds()
    known = [past[short(stage)] for stage in stages if short(stage) in past]
    usual = sum(known) / len(known) if known else 1.0
    work = {stage: past.get(short(stage), usual) for stage in stages}

    @cache
    def way(stage: str) -> float:
        """Seconds of the longest chain of stages that begins with this one."""
        return work[stage] + max((way(s) for s in stages if stage in needed[s]), default=0.0)

    ready: list[str] = []
    running: dict[str, tuple[subprocess.Popen, Path]] = {}
    began: dict[str, float] = {}
    attempts, failed, done, finished = dict.fromkeys(stages, 0), [], 0, 0.0
    options = {"bar_format": BAR, "ncols": 120, "smoothing": 0, "mininterval": 10, "miniters": 0}
    bar = tqdm(total=sum(work.values()), **options)
    try:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=way, reverse=True)
            for stage in sorted(ready, key=lambda name: short(name) in alone):
                is_alone = short(stage) in alone
                if len(running) < (1 if is_alone else jobs) and not alone & {*map(short, running)}:
                    ready.remove(stage)
                    running[stage] = start(stage, None if is_alone else threads)
                    began[stage] = time.monotonic()
            if not running:
                break  # what is left waits for stages that failed
            bar.set_description_str(f"{done} of {len(stages)} stages", refresh=False)
            bar.set_postfix_str(", ".join(map(short, running)), refresh=False)
            time.sleep(0.5)
            for stage, (process, log) in [*running.items()]:
                if process.poll() is None:
                    continue
                del running[stage]
                output, attempts[stage] = log.read_bytes(), attempts[stage] + 1
                if process.returncode == 0:
                    sorter.done(stage)
                    done += 1
                    finished += work[stage]
                elif attempts[stage] < ATTEMPTS and any(sign in output for sign in BUSY):
                    ready.append(stage)
                else:
                    failed.append(stage)
                    last = output.decode(errors="replace").strip().splitlines()[-3:]
                    title = f"{stage} failed; {log.relative_to(ROOT)} ends with:"
                    tqdm.write("\n  ".join([title, *last]))
            # A stage at work counts for as long as it runs, at most for what it took the last time.
            at_work = (min(time.monotonic() - began[s], work[s]) for s in running)
            bar.update(finished + sum(at_work) - bar.n)
    finally:
        bar.close()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # as Ctrl-C, then harder
            for process, _ in running.values():
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                for process, _ in running.values():
                    process.wait(20)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.run_stages", description=__doc__)
    parser.add_argument("file", help="DVC file with the stages")
    parser.add_argument("--alone", nargs="*", default=[], help="stages with nothing beside them")
    parser.add_argument(
        "--jobs",
        type=int,
        help="stages at a time, one thread each (the number of cores, at most 8; 1 with a GPU)",
    )
    arguments = parser.parse_args()
    has_gpu = machine()["gpu"] is not None  # which a stage uses whole
    jobs = arguments.jobs or (1 if has_gpu else min(os.cpu_count() or 1, MOST_JOBS))
    if not (ROOT / ".git").exists():
        raise ValueError("DVC needs a git repository, and this folder is none: run `git init`.")
    try:
        with FileLock(resolve(".dvc/tmp/run_stages.lock"), timeout=0):
            # What the others depend on: which of them have anything to do is seen only then.
            dvc("repro", "prepare")
            graph = stage_graph(arguments.file)
            reasons = waiting_stages(arguments.file, graph)
            if not reasons:
                print(f"All stages of {arguments.file} are up to date.")
                return
            print(f"{len(reasons)} of {len(graph)} stages of {arguments.file} will run:")
            width = max(len(short(stage)) for stage in reasons)
            for stage, reason in reasons.items():
                print(f"  {short(stage):{width}}  {reason}", flush=True)
            threads = None if has_gpu else 1
            failed = run_stages(list(reasons), graph, jobs, {*arguments.alone}, threads)
    except Timeout:
        raise ValueError(
            "Another `make repro` is at work in this folder: wait for it, or interrupt it."
        ) from None
    except KeyboardInterrupt:
        print("\nInterrupted: what is done stays; the same command runs the rest.", file=sys.stderr)
        sys.exit(130)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(reasons)} stages failed, and those that follow them were not "
            "run; the others are done."
        )


if __name__ == "__main__":
    command(main)
