"""`sit doctor`: every check runs, and a broken package stops none."""

import subprocess
import sys
from collections import namedtuple

import pytest

from sitlib.cli import doctor, main
from workbook.paths import ROOT


def test_every_check_runs_here(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS) + 1 and lines[-1] == "everything needed is there"
    assert all(line.startswith("ok ") for line in lines[:-1]) and "with torchvision" in lines[1]


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("requires", lambda name: ["no-such-thing>=1"], "no-such-thing -> pip install"),
        ("requires", lambda name: ["numpy>=99"], "is not >=99 -> pip install"),
        ("shutil.disk_usage", lambda path: namedtuple("U", "free")(1e9), "1.0 GB are free -> free"),
        ("shutil.which", lambda name: "/bin/nvidia-smi", "torch cannot use it -> install a torch"),
    ],
)
def test_what_is_missing_is_told_with_a_remedy(monkeypatch, capsys, name, value, sentence):
    monkeypatch.setattr(f"sitlib.cli.doctor.{name}", value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert sentence in said and said.endswith("1 needed missing\n")


def test_a_machine_without_torch_is_examined_to_the_end():
    """In a process of its own, in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None\n"
    code += "from sitlib.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert len(done.stdout.splitlines()) == len(doctor.CHECKS) + 1
    assert "missing  torch_pair" in done.stdout
