"""Files of runs: who may write them, what a full disk leaves, and trainings that are killed."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sitlib.data.decode import list_files
from sitlib.files import (
    DiskError,
    atomic_write,
    load_model,
    read_csv,
    read_metadata,
    save_model,
    write_csv,
    write_json,
    write_tensors,
)
from sitlib.strict import digest
from sitlib.train.checkpoint import StateError, locked
from workbook import runs
from workbook.errors import command
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.runs import TokenizerRun

RUN = TokenizerRun.of(load_profile("smoke"), "sit4", 0)
ROWS = [{"step": 1, "seconds": 0.5}]


@dataclass(frozen=True)
class WeightsConfig:
    count: int = 4


class Weights(torch.nn.Module):
    """A model of nothing but so many numbers."""

    def __init__(self, config: WeightsConfig | None = None):
        super().__init__()
        self.config = config or WeightsConfig()
        self.register_buffer("weights", torch.zeros(self.config.count))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where the results of runs go."""
    monkeypatch.setattr(runs, "resolve", lambda path: tmp_path / path)
    return tmp_path


def make(train_now, run=RUN, pipeline=True):
    return runs.train_or_load(run, "tokenizer", "sit4", Weights, train_now, pipeline)


def with_a_state(checkpoints: Path) -> tuple[Weights, list]:
    (checkpoints / "step-00000004").mkdir(parents=True)
    return Weights(), ROWS


# -- who may write -----------------------------------------------------------------------------


def test_a_run_of_other_settings_is_refused_while_the_same_files_are_made(home):
    other = replace(RUN, data=replace(RUN.data, min_crop=0.5))

    def train_now(checkpoints):
        sentence = rf"model\.safetensors is being made by process {os.getpid()} on "
        with pytest.raises(StateError, match=sentence):
            make(with_a_state, other)
        made = make(with_a_state, other, pipeline=False)  # files of its own
        assert made.path.is_relative_to(home / "scratch")
        return Weights(), ROWS

    first = make(train_now)
    assert first.path.is_relative_to(home / "models")
    assert read_metadata(first.path)["run"] == digest(RUN)
    assert make(None, pipeline=False).path == first.path  # the very run: nothing is trained
    make(with_a_state, other)  # free again
    assert read_metadata(first.path)["run"] == digest(other)


def test_a_lock_is_the_same_file_for_all_who_ever_want_it(tmp_path):
    """If it were removed when free, two could hold it: who had opened it, and who makes it anew."""
    with locked(tmp_path / "states"):
        shutil.rmtree(tmp_path / "states", ignore_errors=True)
        refused = pytest.raises(StateError, match="wait until it has finished")
        with refused, locked(tmp_path / "states"):
            pass
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*.lock")}
    with locked(tmp_path / "states"):
        assert before == {path: path.stat().st_ino for path in tmp_path.rglob("*.lock")} != {}


def test_a_command_whose_reader_has_read_enough_ends_quietly():
    call = "command(lambda: [print('line') for _ in range(100_000)])"
    shell = f'{sys.executable} -c "from workbook.errors import command; {call}" | head -n 1'
    found = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("line\n", "")


# -- a full disk -------------------------------------------------------------------------------


@contextmanager
def no_room(size: int = 4096):
    """No file can grow beyond so many bytes: the system refuses to write, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sentence(path: Path) -> str:
    reason = r"\(.*GiB are free there\)\. Make room or mend that, then give the same command"
    return rf"{path.name} could not be written to {path.parent} {reason}"


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("model.safetensors", lambda path, n: save_model(path, Weights(WeightsConfig(n)))),
        ("curve.csv", lambda path, n: write_csv(path, ROWS * n)),
        ("scores.json", lambda path, n: write_json(path, {"kid": [math.nan, 0.5] * n})),
    ],
)
def test_what_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path, name, write):
    path = tmp_path / "results" / name
    write(path, 2)
    if name == "scores.json":  # what JSON cannot say is null
        assert json.loads(path.read_text()) == {"kid": [None, 0.5] * 2}
    before = path.read_bytes()
    with no_room(), pytest.raises(DiskError, match=sentence(path)):
        write(path, 10_000)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "codes.safetensors"
    if (writer := os.fork()) == 0:
        with atomic_write(path) as file:
            file.touch()
            (file.parent / ".tmpNUKkLi").touch()  # safetensors' own file beside the one asked for
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(writer, 0)
    assert not path.exists() and [*tmp_path.rglob(path.name)]
    assert list_files(tmp_path, {"safetensors"}) == []  # what is left is no input of a command
    write_tensors(path, {"codes": torch.zeros(2)}, {})
    assert [*tmp_path.rglob("*")] == [path]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\x03\x04", "not a whole safetensors file .*torch.save"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\xff\xd8\xff", "a JPEG"),
        # metadata, and one weight
        ("[]", "other metadata than sitlib writes"),
        ('{"class": "Weights"}', "is of another version"),
        ('{"class": "Weights", "config": {"count": "four"}}', "sitlib: config: count must be"),
        ('{"class": "Other"}', "names Other in its metadata"),
        ('{"class": "Weights", "config": {"count": 1}}', "weights that are not finite"),
    ],
)
def test_what_is_no_checkpoint_of_ours_is_told(tmp_path, content, sentence):
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({"weights": torch.tensor([math.nan])}, path, {"about": content})
    with pytest.raises(ValueError, match=f"{path} .*{sentence}"):
        load_model(path, Weights)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load_model(tmp_path, Weights)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path, weights = tmp_path / "model.safetensors", {f"old.{i}": torch.ones(1) for i in range(5)}
    about = {"about": json.dumps({"class": "Weights", "config": {"count": 4}})}
    save_file(weights, path, about)
    sentence = rf"{path} is .*missing weights; unexpected old\.0, old\.1, old\.2 and 2 more"
    with pytest.raises(ValueError, match=sentence):
        load_model(path, Weights)
    save_file({"weights": torch.ones(3)}, path, about)
    with pytest.raises(ValueError, match=r"wrongly shaped weights \[3\] instead of \[4\]"):
        load_model(path, Weights)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "model."])
def test_weights_of_wrapped_models_load(tmp_path, wrapper):
    about = {"about": json.dumps({"class": "Weights", "config": {"count": 4}})}
    save_file({f"{wrapper}weights": torch.ones(4)}, tmp_path / "x.safetensors", about)
    assert load_model(tmp_path / "x.safetensors", Weights).weights.sum() == 4


def test_a_model_that_cannot_be_written_costs_no_state(home):
    def train_now(checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / "step-00000004").mkdir(exist_ok=True)
        return Weights(WeightsConfig(10_000)), ROWS

    with no_room(), pytest.raises(DiskError, match=r"model\.safetensors could not be written"):
        make(train_now)
    assert len(list(home.glob(".ckpt/*/step-*"))) == 1 and not list(home.rglob("*.partial"))
    assert read_csv(make(train_now).path.parents[3] / "metrics/curves/tokenizer/sit4-seed0.csv")
    assert not list(home.glob(".ckpt/*/step-*"))


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (DiskError("no room"), SystemExit, "^no room$"),
        (OSError(errno.ENOSPC, "No space left"), SystemExit, "^The disk is full .*: make room"),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output"),  # is not hidden
    ],
)
def test_a_command_says_a_full_disk_in_a_sentence(error, kind, sentence):
    def main():
        raise error

    with pytest.raises(kind, match=sentence):
        command(main)


# -- kill anything, lose nothing -------------------------------------------------------------------


def content(file: Path) -> object:
    """Bytes; of a curve the numbers but for seconds, as text because "nan" equals itself."""
    return str(read_csv(file) | {"seconds": []}) if file.suffix == ".csv" else file.read_bytes()


def results(folder: Path) -> dict[str, object]:
    """Content of every file but locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return {str(file.relative_to(folder)): content(file) for file in files}


@pytest.mark.parametrize("what", ["tokenizer", "generator", "codes"])
def test_what_is_killed_at_random_moments_ends_with_the_same_bits(tmp_path, what):
    """SIGKILL again and again, of real trainings and of the extraction of codes."""
    command = [sys.executable, str(ROOT / "tests/killed.py"), what, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 180}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = (results(tmp_path / name) for name in ("whole", "killed"))
    assert whole and whole == killed  # the states are gone, too
    if what == "tokenizer":  # everything that has a state was at work
        curve = read_csv(tmp_path / "whole/metrics/curves/tokenizer/sit-seed0.csv")
        assert sum(curve["restarted"]) > 0
        assert math.isfinite(curve["adversarial"][-1] + curve["gradient_penalty"][-1])
    if what == "codes":
        assert sum(name.startswith("codes/train-") for name in whole) == 40
