"""Stages side by side: their order, failures, interruptions, and two pipelines at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from tiny import interruptible

from workbook import params, run_stages
from workbook.paths import ROOT, resolve

GRAPH = {"a": set(), "b": {"a"}, "c": {"b"}, "x": set(), "alone": set(), "d.yaml:y": {"x"}}


@pytest.fixture
def log(tmp_path, monkeypatch):
    """File of begins and ends, one a line, of stages that take no time and fail if told so."""
    path = tmp_path / "log"

    def start(stage, threads):
        said = tmp_path / "said"
        said.write_bytes(b"x\xff went wrong\n")  # no UTF-8
        line = f"echo begin {stage} {threads} >> {path}; sleep 0.1; echo end {stage} >> {path}"
        failing = "; exit 1" if stage == os.environ.get("FAILING") else ""
        return subprocess.Popen(["sh", "-c", line + failing]), ROOT / said

    monkeypatch.setattr(run_stages, "start", start)
    monkeypatch.setattr(run_stages, "past_seconds", lambda: {"a": 5.0, "x": 1.0})
    monkeypatch.setattr(run_stages, "ROOT", tmp_path)
    return path


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_stages_run_after_those_that_they_need_and_some_alone(log, jobs):
    assert run_stages.run_stages(list(GRAPH), GRAPH, jobs, {"alone"}) == []
    lines = [line.split() for line in log.read_text().splitlines()]
    order = {(words[0], words[1]): position for position, words in enumerate(lines)}
    assert len(order) == 2 * len(GRAPH)
    for stage, needed in GRAPH.items():
        assert all(order["begin", stage] > order["end", before] for before in needed)
    assert order["end", "alone"] == order["begin", "alone"] + 1
    assert lines[order["begin", "alone"]][2] == "None"  # as many threads as PyTorch likes
    if jobs == 1:
        assert [words[1] for words in lines if words[0] == "begin"][:2] == ["a", "b"]  # the longest


def test_what_follows_a_failed_stage_is_not_run_and_the_rest_is(log, monkeypatch, capsys):
    monkeypatch.setenv("FAILING", "b")
    assert run_stages.run_stages(list(GRAPH), GRAPH, 2) == ["b"]
    ran = {line.split()[1] for line in log.read_text().splitlines()}
    assert ran == set(GRAPH) - {"c"}
    assert "b failed" in (said := capsys.readouterr()).out + said.err


def test_a_second_pipeline_in_the_folder_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_stages", "dvc.yaml"])
    with FileLock(resolve(".dvc/tmp/run_stages.lock")), pytest.raises(ValueError, match="Another"):
        run_stages.main()


def test_a_folder_without_git_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run_stages", "dvc.yaml"])
    monkeypatch.setattr(run_stages, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="run `git init`"):
        run_stages.main()


@pytest.mark.parametrize("content", ["", "- quick", "a:\t1\n\tb", "tokenizers: {}", "profile: 3"])
def test_what_is_wrong_with_params_yaml_is_a_sentence(monkeypatch, tmp_path, content):
    (tmp_path / "params.yaml").write_text(content)
    monkeypatch.setattr(params, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"params.yaml (needs|must|is not)"):
        params.pipeline_params()


def test_an_interruption_ends_the_stages_and_is_a_sentence(tmp_path):
    code = (
        "import subprocess, sys\nfrom pathlib import Path\nfrom workbook import run_stages as r\n"
        "from workbook.errors import command\n"
        "def start(stage, threads):\n"
        "    p = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "    print('up', p.pid, flush=True)\n    return p, Path('log')\n"
        "r.start = start\ncommand(lambda: r.run_stages(['a'], {'a': set()}, 1))\n"
    )
    process = interruptible([sys.executable, "-c", code])
    child = int(process.stdout.readline().split()[1])
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
