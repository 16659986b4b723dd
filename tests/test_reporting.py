"""Canonical notebooks, the runner, figures and tables, the headline and the front page."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from workbook.figures import core
from workbook.paths import ROOT
from workbook.reporting import canonical, executed, runner
from workbook.site import render

# ---------------------------------------------------------------- canonical notebooks


@pytest.fixture
def saved_in_lab() -> nbformat.NotebookNode:
    """A notebook as JupyterLab leaves it: outputs, counts, metadata, random ids, an empty cell at the end."""
    cells = [
        new_markdown_cell("# Title é", attachments={"a.png": {"image/png": "aGk="}}),
        new_code_cell(
            "x = 1\nx", execution_count=7, metadata={"tags": ["parameters"], "collapsed": True}
        ),
        new_code_cell("", metadata={"trusted": True}),
    ]
    cells[1].outputs = [new_output("execute_result", {"text/plain": "1"}, execution_count=7)]
    kernel = {"name": "my-env", "display_name": "Mine", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "widgets": {"state": {}}})


def test_canonical_keeps_code_text_tags_and_attachments_only(saved_in_lab):
    text = canonical.canonical(nbformat.writes(saved_in_lab), "x.ipynb")
    kept = json.loads(text)
    assert [cell["id"] for cell in kept["cells"]] == ["cell-01", "cell-02"]
    assert kept["metadata"] == {"kernelspec": canonical.KERNELSPEC}
    assert kept["cells"][0]["attachments"] == {"a.png": {"image/png": "aGk="}}
    code = kept["cells"][1]
    assert code["metadata"] == {"tags": ["parameters"]}
    assert (code["outputs"], code["execution_count"], code["source"]) == (
        [],
        None,
        ["x = 1\n", "x"],
    )
    assert text.endswith("}\n") and "é" in text
    nbformat.validate(nbformat.reads(text, as_version=4))


def test_canonical_is_idempotent_and_blind_to_what_jupyterlab_changes(saved_in_lab):
    text = canonical.canonical(nbformat.writes(saved_in_lab), "x.ipynb")
    assert canonical.canonical(text, "x.ipynb") == text
    rerun = nbformat.reads(text, as_version=4)
    rerun.cells[1].update(execution_count=1, outputs=[new_output("stream", text="hello")])
    rerun.cells.append(new_code_cell("\n"))
    rerun.metadata.language_info = {"name": "python", "version": "3.12.1"}
    assert canonical.canonical(nbformat.writes(rerun), "x.ipynb") == text
    rerun.cells[1].source = "x = 2"
    assert canonical.canonical(nbformat.writes(rerun), "x.ipynb") != text


def test_canonical_command_checks_writes_and_copies(saved_in_lab, tmp_path, capsys):
    folder, copies = tmp_path / "notebooks", tmp_path / "build"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "01_x-checkpoint.ipynb").write_text("{broken")
    copies.mkdir()
    (copies / "00_gone.ipynb").write_text("{}")
    nbformat.write(saved_in_lab, folder / "01_x.ipynb")
    assert canonical.main([str(folder), "--check"]) == 1
    said = capsys.readouterr().err
    assert "01_x.ipynb is not canonical" in said and "--write" in said
    assert canonical.main([str(folder), "--output", str(copies)]) == 0
    assert canonical.main([str(folder), "--write"]) == 0
    assert canonical.main([str(folder), "--check"]) == 0
    assert (copies / "01_x.ipynb").read_text() == (folder / "01_x.ipynb").read_text()
    assert [path.name for path in copies.iterdir()] == ["01_x.ipynb"]


@pytest.mark.parametrize("content", [b"{broken", b"[]", b'{"cells": 3}', b"\xff\xfe", b""])
def test_a_file_that_is_no_notebook_is_named(content, tmp_path, capsys):
    (tmp_path / "07_bad.ipynb").write_bytes(content)
    assert canonical.main([str(tmp_path), "--check"]) == 1
    said = capsys.readouterr().err
    assert "07_bad.ipynb is not a readable notebook" in said and "Traceback" not in said


def test_an_empty_folder_of_notebooks_is_an_error(tmp_path, capsys):
    assert canonical.main([str(tmp_path), "--check"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_the_notebooks_of_the_project_are_canonical():
    assert canonical.not_canonical(ROOT / "notebooks") == []


# ---------------------------------------------------------------- the runner

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
    new_code_cell("print('so far', end='')"),
    new_markdown_cell("text"),
    new_code_cell("raise ValueError('no\\nluck')"),
]


def run_notebook(
    cells: list, folder: Path, name: str, *arguments: str
) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, as a stage of the pipeline does."""
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        new_notebook(cells=cells, metadata={"kernelspec": canonical.KERNELSPEC}),
        folder / f"{name}.ipynb",
    )
    command = [sys.executable, "-m", "workbook.reporting.runner", str(folder / f"{name}.ipynb")]
    command += [
        "--output",
        str(folder / "reports" / f"{name}-run"),
        "--stage",
        "demo stage",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("demo folder")
    seconds = str(folder / "metrics" / "seconds.json")
    return folder, run_notebook(
        DEMO, folder, "01_demo", "-p", "variant", "sit4", "-p", "steps", "3", "--seconds", seconds
    )


def output_text(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )


def test_a_run_prints_live_and_writes_report_and_time(demo):
    folder, done = demo
    assert done.returncode == 0, done.stderr
    assert "sit4 int\n" in done.stdout and "ETA 00:01" in done.stdout and "3/3" in done.stderr
    assert sorted(path.name for path in (folder / "reports").iterdir()) == [
        "01_demo-run.ipynb",
        "failed",
    ]
    assert not list((folder / "reports" / "failed").iterdir())
    record = json.loads((folder / "metrics" / "seconds.json").read_text())
    assert (
        record["stage"] == "demo stage"
        and record["report"] == "01_demo-run"
        and 0 < record["seconds"] < 100
    )


def test_a_run_uses_this_interpreter_and_the_project_root(demo):
    _, done = demo
    assert f"where {ROOT} {sys.executable}" in done.stdout


def test_the_executed_notebook_holds_results_only(demo):
    folder, _ = demo
    notebook = nbformat.read(folder / "reports" / "01_demo-run.ipynb", as_version=4)
    nbformat.validate(notebook)
    text = output_text(notebook)
    assert "sit4 int" in text and "100\n" in text and "<cell>:9: UserWarning: careful" in text
    for noise in ("ETA", "it/s", "\r", "50", str(ROOT)):
        assert noise not in text
    assert "where . " in text
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:02d}" for i in range(1, 7)]
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert notebook.cells[-1].outputs[-1].data["text/plain"] == "<object at 0x…>"


class Page(HTMLParser):
    """What a browser would fetch for a page, and the text alternatives of its images."""

    def __init__(self, html: str):
        super().__init__()
        self.fetched, self.alternatives, self.tags = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.alternatives.append(values.get("alt"))
        if tag != "a":
            self.fetched += [
                values[key] for key in ("src", "href", "srcset", "data") if key in values
            ]


def fetched(html: str) -> list[str]:
    return [url for url in Page(html).fetched if not url.startswith("data:")] + re.findall(
        r"@import|url\(\s*['\"]?http", html
    )


def test_the_page_of_a_run_is_readable_offline(demo):
    folder, _ = demo
    made = render.notebook_document(
        nbformat.read(folder / "reports" / "01_demo-run.ipynb", as_version=4),
        "01_demo",
        ROOT,
        lambda url: f"moved/{url}" if ":" not in url else url,
    )
    html = render.page(
        made.title, made.body, home="../index.html", about="Seed 0", headings=made.headings
    )
    parsed = Page(html)
    assert fetched(html) == []
    assert parsed.alternatives == ['A line that "rises" & falls']
    text = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.S)
    assert "math" in parsed.tags and "$" not in text
    assert (
        "<title>Demo of a run</title>" in html
        and 'href="../index.html"' in html
        and "Seed 0" in html
    )
    assert 'href="https://arxiv.org/abs/1"' in html  # what leads outside stays
    assert (
        "23.456" in html and "Parameters of this run" in html and '<details class="code">' in html
    )
    assert (
        '<figcaption><strong>Figure 1.</strong> A line that "rises" & falls</figcaption>'
        in unescape(html)
    )


def test_equal_results_give_equal_bytes(demo):
    folder, _ = demo
    first = {path.name: path.read_bytes() for path in (folder / "reports").glob("01_demo*")}
    again = run_notebook(DEMO, folder, "01_demo", "-p", "variant", "sit4", "-p", "steps", "3")
    assert again.returncode == 0
    assert {path.name: path.read_bytes() for path in (folder / "reports").glob("01_demo*")} == first


def test_a_failing_cell_ends_in_two_lines_and_leaves_old_reports_alone(tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "02_bad-run.ipynb").write_text("old")
    done = run_notebook(FAILING, tmp_path, "02_bad", "--seconds", str(tmp_path / "seconds.json"))
    partial = tmp_path / "reports" / "failed" / "02_bad-run.ipynb"
    assert done.returncode == 1
    assert done.stdout == "so far\n"
    assert done.stderr.splitlines() == [
        "02_bad failed in cell 2: ValueError: no luck",
        f"The partial notebook is at {partial}",
    ]
    assert "so far" in output_text(nbformat.read(partial, as_version=4))
    assert (tmp_path / "reports" / "02_bad-run.ipynb").read_text() == "old"
    assert not (tmp_path / "seconds.json").exists()


def test_a_dead_kernel_ends_in_two_lines(tmp_path):
    cells = [
        new_code_cell("x = 1"),
        new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
    ]
    done = run_notebook(cells, tmp_path, "03_dead")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "03_dead failed in cell 2: the kernel died, often because memory ran out"
    assert (
        tmp_path / "reports" / "failed" / "03_dead-run.ipynb"
    ).exists() and "03_dead-run.ipynb" in second


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_takes_its_kernel_along(number, status, tmp_path):
    pid = str(tmp_path / "pid")
    source = (
        f"import os, time\nopen({pid!r}, 'w').write(str(os.getpid()))\nprint('up')\ntime.sleep(60)"
    )
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), tmp_path / "04_long.ipynb")
    command = [sys.executable, "-m", "workbook.reporting.runner", str(tmp_path / "04_long.ipynb")]
    command += ["--output", str(tmp_path / "reports" / "04_long"), "--stage", "long"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore SIGINT, and what they start ignores it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status
    assert (
        "Traceback" not in said or "IPKernelApp" in said
    )  # the kernel may complain, the runner does not
    kernel = int(Path(pid).read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(kernel):
        time.sleep(0.1)
    assert not alive(kernel)
    assert not list((tmp_path / "reports").glob("*.*"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_mistakes_on_the_command_line_are_sentences(tmp_path, capsys):
    path = tmp_path / "05_x.ipynb"
    nbformat.write(new_notebook(cells=DEMO[:2]), path)
    options = ["--output", str(tmp_path / "out"), "--stage", "s"]
    for extra, sentence in [
        (
            ["-p", "colour", "1"],
            "05_x has no parameter colour; its parameters cell defines: variant, steps.",
        ),
        (["-p", "steps", "[1"], "'[1' is not a YAML value: quote it."),
    ]:
        assert runner.main([str(path), *options, *extra]) == 1
        assert capsys.readouterr().err == sentence + "\n"
    assert runner.main([str(tmp_path / "06_none.ipynb"), *options]) == 1
    assert "There is no notebook" in capsys.readouterr().err
    path.write_text("{broken")
    assert runner.main([str(path), *options]) == 1
    assert "is not a readable notebook" in capsys.readouterr().err


def test_parameters_are_typed_as_in_yaml():
    values = {
        "3": 3,
        "0.5": 0.5,
        "1e-4": 1e-4,
        "sit4": "sit4",
        "[1, a]": [1, "a"],
        "null": None,
        "true": True,
    }
    assert {text: runner.parameter(text) for text in values} == values
    assert isinstance(runner.parameter("1e3"), float)


def test_a_report_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "report.html"
    runner.write(target, "first")
    with pytest.raises(UnicodeEncodeError):
        runner.write(target, "half \ud800")
    assert target.read_text() == "first" and [path.name for path in target.parent.iterdir()] == [
        "report.html"
    ]


# ---------------------------------------------------------------- executed notebooks and the page


def test_progress_lines_go_and_results_stay():
    bars = "epoch 1\r 10%|#  | 1/10 [00:01<00:09, 1.0it/s]\n37it [00:01, 30it/s]\nstep 5/9 ETA 0:12\r\n"
    assert executed.without_progress(f"loss 0.5\n{bars}done\r\n") == "loss 0.5\ndone\n"
    assert executed.without_progress("50 %|x\nBETA 3\n\n") == "50 %|x\nBETA 3\n\n"


def test_small_png_keeps_photographs_exact_and_drawings_close(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(pixels(executed.smaller_png(encoded(noise))), noise)
    fig, axis = plt.subplots(dpi=100)
    for phase in range(8):
        axis.plot(
            np.sin(np.arange(200) / 20 + phase), color=core.colour(f"series {phase}"), alpha=0.7
        )
    drawing = core.png(fig)
    plt.close(fig)
    smaller = executed.smaller_png(drawing)
    assert len(smaller) < 0.7 * len(drawing)
    assert np.abs(pixels(smaller).astype(int) - pixels(drawing)).mean() < 0.5
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    assert executed.smaller_png(encoded(clear)) == encoded(clear)


def encoded(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_widget_outputs_are_dropped():
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "  0%|"}
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[new_output("display_data", data)])])
    executed.clean(notebook)
    assert notebook.cells[0].outputs == []
