"""`sit --help`, at once, and `sit doctor`, which a broken package does not stop."""

import shlex

import pytest
from tiny import python

from sitlib.cli import COMMANDS, build_parser, doctor, main


def test_help_is_there_at_once():
    """In a process of its own: nothing that takes seconds is imported."""
    code = (
        "import sys; from sitlib.cli import main; assert main(['sample', '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'yaml', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} are imported' if heavy else main(['--help']))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_are_taken_by_the_parser(name):
    lines = [line for line in COMMANDS[name][3].splitlines() if line.startswith("  sit ")]
    assert lines and all(line.startswith(f"  sit {name}") for line in lines)
    for line in lines:
        assert build_parser().parse_args(shlex.split(line)[1:]).command == name


def test_every_check_runs_here(weights_folder, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS) + 1 and lines[-1] == "everything needed is there"
    assert all(line.startswith("ok ") for line in lines[:-1]) and "with torchvision" in lines[1]


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("requires", lambda name: ["no-such-thing>=1"], "no-such-thing -> pip install"),
        ("requires", lambda name: ["numpy>=99"], "is not >=99 -> pip install"),
        ("shutil.which", lambda name: "/bin/nvidia-smi", "torch cannot use it -> install a torch"),
    ],
)
def test_what_is_missing_is_told_with_a_remedy(monkeypatch, capsys, name, value, sentence):
    monkeypatch.setattr(f"sitlib.cli.doctor.{name}", value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert sentence in said and said.endswith("1 needed missing\n")


def test_what_evaluation_lacks_is_told_and_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SITLIB_WEIGHTS", str(tmp_path))
    assert main(["doctor"]) == 0  # all other commands do without
    said = capsys.readouterr().out
    assert f"{tmp_path}/alexnet_lpips.safetensors -> sit doctor --fetch" in said

    def fetch():
        for name in ("alexnet", "vgg16"):
            (tmp_path / f"{name}_lpips.safetensors").touch()

    monkeypatch.setattr("sitlib.metrics.fetch_weights", fetch)
    assert main(["doctor", "--fetch"]) == 0
    assert f"ok       evaluation: networks of LPIPS in {tmp_path}" in capsys.readouterr().out


def test_a_machine_without_torch_is_examined_to_the_end():
    """In a process of its own, in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None\n"
    code += "from sitlib.cli import main; sys.exit(main(['doctor']))"
    done = python(code)
    assert done.returncode == 1 and done.stderr == ""
    assert len(done.stdout.splitlines()) == len(doctor.CHECKS) + 1
    assert "missing  torch_pair" in done.stdout
