"""Notebooks run from top to bottom: what is printed, kept and cleaned, and how failures end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tiny import interruptible

from workbook import run_notebook as runner
from workbook.paths import ROOT

PROGRAM = """
import json, sys
from pathlib import Path
from workbook.errors import command
from workbook.run_notebook import run_notebook
path, output, parameters = sys.argv[1:]
command(lambda: run_notebook(Path(path), Path(output), json.loads(parameters)))
"""

DEMO = [
    new_markdown_cell(
        "# Demo of a run\n\nEnergy $E_s = \\sum_i c_i^2$ and [a paper](https://arxiv.org/abs/1).\n\n$$a^2$$"
    ),
    new_code_cell("variant: str = 'none'\nsteps = 1", metadata={"tags": ["parameters"]}),
    new_code_cell(
        "import os, sys, warnings\nfrom tqdm import tqdm\nfrom workbook.figures import core as plots, table\n"
        "for i in tqdm(range(steps)): pass\nprint('step 1 of 2, ETA 00:01')\nprint('50\\r100')\n"
        "print('where', os.getcwd(), sys.executable)\nprint(variant, type(steps).__name__)\n"
        "warnings.warn('careful')"
    ),
    new_code_cell(
        "import matplotlib.pyplot as plt\nplots.style()\nfig, axis = plt.subplots()\naxis.plot([1, 3, 2])\n"
        "plots.show(fig, 'A line that \"rises\" & falls')"
    ),
    new_code_cell("table([{'model': 'SIT-4', 'PSNR': 23.456}], 'Scores')\nobject()"),
]
FAILING = [
    new_code_cell(  # and what the kernel says while it ends is nobody's business
        "import atexit, sys\natexit.register(print, 'late', file=sys.__stderr__)\nprint('so far', end='')"
    ),
    new_markdown_cell("text"),
    new_code_cell("raise ValueError('no\\nluck')"),
]


def command(folder: Path, name: str, parameters: str = "{}") -> list[str]:
    paths = [str(folder / f"{name}.ipynb"), str(folder / f"reports/{name}-run.ipynb")]
    return [sys.executable, "-c", PROGRAM, *paths, parameters]


def run(cells: list, folder: Path, name: str, parameters: str = "{}"):
    """Run a notebook in a process of its own, as a stage of the pipeline does."""
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    full = command(folder, name, parameters)
    return subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("demo folder")
    return folder, run(DEMO, folder, "01_demo", '{"variant": "sit4", "steps": 3}')


def output_text(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_a_run_prints_live_with_this_interpreter_and_keeps_results_only(demo):
    folder, done = demo
    assert done.returncode == 0, done.stderr
    assert "sit4 int\n" in done.stdout and "ETA 00:01" in done.stdout and "3/3" in done.stderr
    assert f"where {ROOT} {sys.executable}" in done.stdout
    assert [path.name for path in (folder / "reports").glob("*/*")] == []  # nothing failed
    notebook = nbformat.read(folder / "reports" / "01_demo-run.ipynb", as_version=4)
    nbformat.validate(notebook)
    text = output_text(notebook)
    assert "sit4 int" in text and "100\n" in text and "<cell>:9: UserWarning: careful" in text
    assert not [noise for noise in ("ETA", "it/s", "\r", "50", str(ROOT)) if noise in text]
    assert "where . " in text
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:02d}" for i in range(1, 7)]
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert notebook.cells[-1].outputs[-1].data["text/plain"] == "<object at 0x…>"


def test_equal_results_give_equal_bytes_and_long_folders_hold_no_sockets(
    demo, tmp_path, monkeypatch
):
    folder, _ = demo
    report = folder / "reports/01_demo-run.ipynb"
    before = report.read_bytes()
    long = tmp_path / ("x" * 120)  # a path of a socket may have 107 characters
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    again = run(DEMO, folder, "01_demo", '{"variant": "sit4", "steps": 3}')
    assert again.returncode == 0 and report.read_bytes() == before


def test_a_failing_cell_ends_in_two_lines_and_leaves_old_reports_alone(tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "02_bad-run.ipynb").write_text("old")
    done = run(FAILING, tmp_path, "02_bad")
    partial = tmp_path / "reports" / "failed" / "02_bad-run.ipynb"
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert done.stderr.splitlines() == [
        "02_bad failed in cell 2: ValueError: no luck",
        f"The partial notebook is at {partial}",
    ]
    assert "so far" in output_text(nbformat.read(partial, as_version=4))
    assert (tmp_path / "reports" / "02_bad-run.ipynb").read_text() == "old"


def test_a_dead_kernel_ends_in_its_last_words_and_two_lines(tmp_path):
    kill = new_code_cell(
        "import os, signal, sys\nsys.__stderr__.write('last words\\n')\nsys.__stderr__.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run([new_code_cell("x = 1"), kill], tmp_path, "03_dead")
    assert done.returncode == 1
    said, first, second = done.stderr.splitlines()
    assert said == "last words"
    assert first == "03_dead failed in cell 2: the kernel died, often because memory ran out"
    assert (tmp_path / "reports/failed/03_dead-run.ipynb").exists() and "03_dead-run" in second


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_takes_its_kernel_along(number, status, tmp_path):
    pid = tmp_path / "pid"
    source = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    cells = [new_code_cell(source + "print('up')\ntime.sleep(60)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "04_long.ipynb")
    process = interruptible(command(tmp_path, "04_long"))
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(int(pid.read_text())):
        time.sleep(0.1)
    assert not alive(int(pid.read_text())) and not list((tmp_path / "reports").glob("*.*"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_parameters_that_the_notebook_lacks_are_named(tmp_path):
    path = tmp_path / "05_x.ipynb"
    nbformat.write(new_notebook(cells=DEMO[:2]), path)
    with pytest.raises(ValueError, match="05_x has no parameter color; .* variant, steps"):
        runner.run_notebook(path, tmp_path / "out.ipynb", {"color": 1})
    with pytest.raises(ValueError, match="There is no notebook"):
        runner.run_notebook(tmp_path / "06_none.ipynb", tmp_path / "out.ipynb", {})


# -- what is kept ------------------------------------------------------------------------------


def test_progress_lines_go_and_results_stay():
    bars = "epoch 1\r 10%|#  | 1/10 [00:01<00:09, 1.0it/s]\n37it [00:01, 30it/s]\nstep 5/9 ETA 0:12\r\n"
    assert runner.without_progress(f"loss 0.5\n{bars}done\r\n") == "loss 0.5\ndone\n"
    assert runner.without_progress("50 %|x\nBETA 3\n\n") == "50 %|x\nBETA 3\n\n"
