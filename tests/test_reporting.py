"""Canonical notebooks, the runner, figures and tables, the headline and the front page."""

import base64
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
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from skimage.color import rgb2lab

from sitlib.train.engine import precision
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.reporting import (
    canonical,
    executed,
    front,
    headline,
    names,
    page,
    plots,
    runner,
    site,
    tables,
)
from workbook.reporting.comparison import sets_table
from workbook.reporting.front import environment
from workbook.reporting.generation_plots import sweep_curves
from workbook.reporting.machine import machine
from workbook.reporting.names import of_each

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
        "import os, sys, warnings\nfrom tqdm import tqdm\nfrom workbook.reporting import plots\n"
        "for i in tqdm(range(steps)): pass\nprint('step 1 of 2, ETA 00:01')\nprint('50\\r100')\n"
        "print('where', os.getcwd(), sys.executable)\nprint(variant, type(steps).__name__)\n"
        "warnings.warn('careful')"
    ),
    new_code_cell(
        "import matplotlib.pyplot as plt\nplots.style()\nfig, axis = plt.subplots()\naxis.plot([1, 3, 2])\n"
        "plots.show(fig, 'A line that \"rises\" & falls')"
    ),
    new_code_cell("plots.table([{'model': 'SIT-4', 'PSNR': 23.456}], 'Scores')\nobject()"),
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
    made = page.notebook_document(
        nbformat.read(folder / "reports" / "01_demo-run.ipynb", as_version=4),
        "01_demo",
        links=lambda url: f"moved/{url}" if ":" not in url else url,
    )
    html = page.page(
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
            np.sin(np.arange(200) / 20 + phase), color=plots.colour(f"series {phase}"), alpha=0.7
        )
    drawing = plots.png(fig)
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


def test_formulas_become_mathml_and_unknown_ones_stay():
    assert "<msup>" in page.formula("a^2", "inline") and 'display="block"' in page.formula(
        "x", "block"
    )
    assert "<code>" in page.formula(r"\frac{", "inline")


# ---------------------------------------------------------------- figures and tables


def test_models_keep_their_colour_and_name():
    assert (
        plots.colour("sit4")
        == plots.colour("sit4-seed1")
        == plots.colour("ar_sit4-0")
        != plots.colour("vit_vqgan")
    )
    assert plots.colour("anything else") == plots.colour("anything else") in plots.SPARE
    expected = {
        "sit4": "SIT-4",
        "vit_vqgan": "ViT-VQGAN",
        "ar_sit5-seed1": "AR-SIT-5, seed 1",
        "ar_vit_vqgan": "AR-ViT-VQGAN",
        "sit_scd4": "SIT-scd4",
        "top_k": "top k",
    }
    assert {name: names.label(name) for name in expected} == expected


# How colours look without one kind of cones, on linear RGB (Machado, Oliveira & Fernandes 2009, severity 1).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize(
    "together",
    [
        ["vit_vqgan", "sit4", "sit5", "sit5_sc", "sit5_sc_second"],
        ["ar_vit_vqgan", "ar_sit4", "ar_sit5_sc", "ar_sit5_sc_second"],
        ["ar_captioned_vit_vqgan", "ar_captioned_sit4_sc"],
        ["ar_vit_vqgan", "ar_sit4_scd"],
    ],
)
def test_models_of_one_figure_are_told_apart_by_everybody(together, deficiency):
    seen = []
    for name in together:
        code = plots.colour(name)
        rgb = np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        changed = np.clip(np.asarray(DEFICIENCIES[deficiency]) @ linear, 0, 1)
        shown = np.where(
            changed <= 0.0031308, 12.92 * changed, 1.055 * changed ** (1 / 2.4) - 0.055
        )
        seen.append(rgb2lab(shown[None, None])[0, 0])
    distances = {
        (one, other): np.linalg.norm(seen[i] - seen[i + 1 + j])
        for i, one in enumerate(together)
        for j, other in enumerate(together[i + 1 :])
    }
    assert min(distances.values()) > 15, distances  # in CIELAB; 2 is just noticeable side by side


def test_every_model_has_a_colour_of_its_own():
    models = [name for name in plots.COLOURS if "sit" in name and not name.startswith("ar_")]
    assert len({plots.colour(name) for name in models}) == len(models)


def test_show_attaches_the_alternative_and_closes(monkeypatch):
    shown = []
    monkeypatch.setattr(
        plots, "display", lambda data, raw, metadata: shown.append((data, metadata))
    )
    fig, _ = plt.subplots()
    with pytest.raises(ValueError, match="what the figure shows"):
        plots.show(fig, "  ")
    plots.show(fig, "One\n  line")
    ((data, metadata),) = shown
    assert metadata == {kind: {"alt": "One line"} for kind in ("image/png", "image/svg+xml")}
    assert (
        base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        and data["text/plain"] == "One line"
    )
    assert not plt.fignum_exists(fig.number)


def line(points=3):
    fig, axis = plt.subplots(figsize=(5, 3))
    axis.plot(np.random.default_rng(0).random(points), label="PSNR")
    axis.legend()
    return fig


def test_lines_are_drawn_as_vectors_and_pixels_as_pixels():
    plots.style()
    vectors, again = plots.svg(line()), plots.svg(line())
    assert (
        vectors == again
        and ">PSNR</text>" in vectors
        and "<image" not in vectors
        and "Date" not in vectors
    )
    assert plots.svg(line(20_000)) is None  # larger than its pixels
    fig = line()
    fig.axes[0].imshow(np.zeros((2, 2)))
    assert plots.svg(fig) is None
    fig = line()
    sizes = [re.search(r'width="(\d+)" height="(\d+)"', page.figure(picture, "a line", 1, "")).groups()
             for picture in (vectors.encode(), plots.png(fig))]  # fmt: skip
    assert sizes[0] == sizes[1] == ("550", "330")
    plt.close("all")


@pytest.mark.parametrize("rows", [None, ["original", "decoded from codes"]])
def test_image_grid_draws_pixels_as_exact_squares(rows):
    images = np.random.default_rng(0).random((4, 3, 16, 16)).astype(np.float32)
    fig = plots.image_grid(
        images, titles=["a", "b"] if rows else list("abcd"), row_labels=rows, scale=3
    )
    drawn = pixels(plots.png(fig))
    plt.close(fig)
    for image in images:
        tile = (
            (image.transpose(1, 2, 0) * 255 + 0.5)
            .astype(np.uint8)
            .repeat(3, axis=0)
            .repeat(3, axis=1)
        )
        windows = np.lib.stride_tricks.sliding_window_view(drawn, tile.shape)[:, :, 0]
        assert (windows == tile).all(axis=(2, 3, 4)).sum() == 1


def test_image_grid_of_64_px_images_fills_a_page_and_no_more():
    fig = plots.image_grid(np.zeros((16, 1, 64, 64)), row_labels=["original", "ViT-VQGAN"])
    width, height = fig.get_size_inches() * fig.dpi
    plt.close(fig)
    assert 8 * 128 < width <= plots.PAGE_WIDTH and height > 2 * 128


def test_image_grid_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"not \[1, 2, 8, 8\]"):
        plots.image_grid(np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="3 titles"):
        plots.image_grid(np.zeros((4, 3, 8, 8)), titles=list("abc"), columns=2)
    with pytest.raises(ValueError, match="3 row labels for 4 images in 2 columns, 2 rows"):
        plots.image_grid(np.zeros((4, 3, 8, 8)), row_labels=list("abc"), columns=2)


def test_smoothing_keeps_lines_and_means():
    line = np.arange(50.0)
    assert np.allclose(plots.smoothed(line, 5)[2:-2], line[2:-2])
    assert np.allclose(plots.smoothed(np.full(30, 2.5), 9), 2.5)
    assert np.array_equal(plots.smoothed(line, 1), line)


def test_curves_one_panel_a_column_and_one_legend_entry_a_run():
    runs = {
        f"sit4-seed{seed}": {
            "step": range(40),
            "loss": np.arange(40.0),
            "psnr": [np.nan] * 20 + [20.0] * 20,
        }
        for seed in (0, 1)
    }
    fig = plots.curves(runs, {"loss": "loss", "psnr": "PSNR, dB"})
    assert [axis.get_ylabel() for axis in fig.axes] == ["loss", "PSNR, dB"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "SIT-4, seed 0",
        "SIT-4, seed 1",
    ]
    plt.close(fig)
    with pytest.raises(ValueError, match="sit4-seed0 lack 'lpips'"):
        plots.curves(runs, ["lpips"])
    plt.close("all")


def test_tables_format_values_and_mark_the_best():
    rows = [
        {"model": "a<b", "PSNR": {"mean": 23.456, "std": 0.12, "seeds": 2}, "n": 12345},
        {"model": "c", "PSNR": {"mean": 24.0, "std": None, "seeds": 1}, "n": None},
        {"model": "d", "PSNR": float("nan")},
    ]
    html = tables.html_table(rows, "Scores & more", digits={"PSNR": 2}, best={"PSNR": "max"})
    assert "<caption>Scores &amp; more</caption>" in html and "a&lt;b" in html
    assert (
        "<td>23.46 ± 0.12</td>" in html
        and "<td><strong>24.00</strong></td>" in html
        and "n/a" in html
    )
    text = tables.text_table(rows, "Scores", digits={"PSNR": 2}, best={"PSNR": "max"})
    assert "24.00*" in text and len(text.splitlines()) == 5
    with pytest.raises(ValueError, match="LPIPS"):
        tables.html_table(rows, "x", best={"LPIPS": "min"})


def test_columns_of_words_stand_left_and_numbers_right():
    rows = [
        {"model": "a", "by": "told", "LPIPS": 0.1, "ratio": "x 0.83"},
        {"model": "b", "by": "n/a", "LPIPS": None},
    ]
    html = page.aligned(tables.html_table(rows, "Scores"))
    assert re.findall(r"<t[hd][^>]*class=text[^>]*>(.*?)<", html) == ["by", "told", "n/a"]
    assert re.sub(" class=text", "", html) == tables.html_table(rows, "Scores")


# ---------------------------------------------------------------- headline and front page


@pytest.fixture
def project(tmp_path) -> Path:
    """Metrics of two tokenizers (two seeds), a generator (one seed), and a run that is no longer listed."""
    files = {
        "tokenizer/sit4-seed0": {"psnr": 23.0, "lpips_alex": 0.2, "lpips_vgg": 0.3, "usage": 99.0},
        "tokenizer/sit4-seed1": {"psnr": 24.0, "lpips_alex": 0.18, "lpips_vgg": 0.3, "usage": 97.0},
        "tokenizer/vit_vqgan-seed0": {
            "psnr": 22.0,
            "lpips_alex": 0.25,
            "lpips_vgg": None,
            "usage": 99.0,
        },
        "tokenizer/vit_vqgan-seed1": {
            "psnr": 22.2,
            "lpips_alex": 0.25,
            "lpips_vgg": 0.4,
            "usage": 99.0,
        },
        "tokenizer/sit9-seed0": {"psnr": 99.0},
        "generation/ar_sit4-seed0": {"fd_lite0": 120.5, "kid": 0.0123, "nats_per_token": 4.5},
    }
    for name, values in files.items():
        protocol = (
            {"views": "400 crops", "seed": 0} if name.startswith("tokenizer") else {"samples": 512}
        )
        write_json(
            tmp_path / "metrics" / f"{name}.json",
            {**values, "protocol": protocol, "codebooks": {"detail": {}}},
        )
    # The last two are of runs that are not listed, and of no run.
    timed = {
        "weights": 30.5,
        "train@sit4-0": 150.0,
        "train@sit9-0": 20.0,
        "extract_codes@sit4": 60.0,
    }
    for stage, seconds in timed.items():
        write_json(
            tmp_path / "metrics" / "seconds" / f"{stage}.json", {"stage": stage, "seconds": seconds}
        )
    (tmp_path / "params.yaml").write_text(
        "profile: quick\ntokenizers: [vit_vqgan, sit4]\nseeds: [0, 1]\n"
        "generators: [sit4]\ngenerator_seeds: [0]\n"
    )
    return tmp_path


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def test_headline_gathers_every_listed_run(project, capsys):
    found = headline.gather(project)
    assert found["profile"] == "quick" and found["revision"] == "unknown"
    assert list(found["tokenizer"]) == ["vit_vqgan", "sit4"]
    assert "tokenizer/sit9-seed0.json" in capsys.readouterr().out
    sit4 = found["tokenizer"]["sit4"]
    assert list(sit4) == ["psnr", "lpips_alex", "lpips_vgg", "usage"]
    assert sit4["psnr"] == {"mean": 23.5, "std": pytest.approx(0.707107), "seeds": 2}
    assert found["tokenizer"]["vit_vqgan"]["lpips_vgg"] == {"mean": None, "std": None, "seeds": 2}
    assert found["generation"]["class"]["ar_sit4"]["kid"] == {
        "mean": 0.0123,
        "std": None,
        "seeds": 1,
    }
    assert found["seconds"] == {"extract_codes@sit4": 60.0, "train@sit4-0": 150.0, "weights": 30.5}
    assert found["protocol"]["tokenizer"] == {"views": "400 crops", "seed": 0}
    assert found["hardware"] == [machine()] and machine()["logical_cores"] >= 1 and machine()["cpu"]
    assert found["precision"] == load_profile("quick").engine.precision
    assert found["versions"]["torch"] and found["versions"]["python"].startswith("3.")
    json.dumps(found, allow_nan=False)


def test_results_are_of_the_machines_that_their_stages_ran_on(project):
    cluster = {**machine(), "cpu": "A", "gpu": "8 x H100", "auto_precision": "bf16"}
    laptop = {**machine(), "cpu": "B", "memory_gib": None, "gpu": None, "auto_precision": "no"}
    for name, seconds, where in (("a", 1.0, laptop), ("b", 5.0, cluster), ("c", 3.0, laptop)):
        write_json(
            project / f"metrics/seconds/{name}.json",
            {"stage": name, "seconds": seconds, "machine": where},
        )
    found = headline.gather(project)
    assert found["hardware"] == [cluster, laptop]
    facts = environment({**found, "precision": "auto"})
    assert facts["Hardware"].startswith("A, ") and "8 x H100; B, " in facts["Hardware"]
    assert facts["Precision"] == "bf16 in training, float32 elsewhere; float32"
    assert environment({**found, "precision": "no"})["Precision"] == "float32"


def test_the_machine_is_told_as_torch_knows_it():
    found = machine()
    assert found["auto_precision"] == precision("auto")
    assert (found["gpu"] is not None) == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("rows", "gpu", "meant"),
    [
        ("NVIDIA H100, 9.0\nNVIDIA H100, 9.0\n", "2 x NVIDIA H100", "bf16"),
        ("Tesla T4, 7.5\n", "Tesla T4", "fp16"),
    ],
)
def test_the_gpus_of_a_machine_are_those_that_the_driver_names(
    tmp_path, monkeypatch, rows, gpu, meant
):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{rows}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (machine()["gpu"], machine()["auto_precision"]) == (gpu, meant)


def test_headline_has_improved_models_where_params_yaml_lists_them(project):
    metrics = project / "metrics/generation"
    write_json(
        metrics / "ar_sit4_improved-seed0.json",
        json.loads((metrics / "ar_sit4-seed0.json").read_text()),
    )
    assert list(headline.gather(project)["generation"]["class"]) == ["ar_sit4"]
    with (project / "params.yaml").open("a") as file:
        file.write("improved_generators: [sit4]\n")
    assert list(headline.gather(project)["generation"]["class"]) == ["ar_sit4", "ar_sit4_improved"]


def test_headline_shows_where_protocols_differ(project):
    path = project / "metrics" / "tokenizer" / "sit4-seed0.json"
    write_json(path, json.loads(path.read_text()) | {"protocol": {"views": "100 crops", "seed": 0}})
    views = headline.gather(project)["protocol"]["tokenizer"]["views"]
    assert views == {"sit4": "100 crops", "vit_vqgan": "400 crops"}


def test_headline_without_metrics_or_with_broken_ones_is_a_sentence(project):
    (project / "metrics" / "tokenizer" / "sit4-seed1.json").write_text("{")
    with pytest.raises(headline.HeadlineError, match=r"sit4-seed1\.json is not JSON"):
        headline.gather(project)
    for path in (project / "metrics").glob("*/*-seed*.json"):
        path.unlink()
    with pytest.raises(headline.HeadlineError, match="run dvc repro"):
        headline.gather(project)


def test_revision_is_dirty_only_for_tracked_sources(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True
        )

    git("init", "-q")
    assert headline.revision(tmp_path) == "unknown"
    for name in ("code.py", "metrics/a.json", "dvc.lock", "ablations/dvc.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = headline.revision(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    for name in ("metrics/a.json", "dvc.lock", "ablations/dvc.lock", "new.txt"):
        (tmp_path / name).write_text("2")
    assert headline.revision(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert headline.revision(tmp_path) == f"{clean}-dirty"


def test_the_site_shows_the_headline_and_links_every_report(project, demo):
    reports, docs = project / "reports", project / "docs"
    reports.mkdir()
    docs.mkdir()
    notebook = nbformat.read(demo[0] / "reports" / "01_demo-run.ipynb", as_version=4)
    notebook.cells[0].source += "\n\n[next](02_train.ipynb), [code](../sitlib/page.py)"
    for stem in ("01_demo", "02_train-sit4-seed0", "02_train-vit_vqgan-seed0"):
        nbformat.write(notebook, reports / f"{stem}.ipynb")
    (docs / "scale.md").write_text(
        "# Scale & size\n\nSee [the run](../reports/01_demo.ipynb), [home](../reports/index.html#run).\n\n"
        "## One\n\n| a | b |\n|---|---|\n| 1 | $x^2$ |\n\n## One\n"
    )
    (reports / "pages").mkdir()
    (reports / "pages" / "99_gone.html").write_text("of a notebook that is gone")
    times = {"stage": "train@sit4-0", "report": "02_train-sit4-seed0", "seconds": 150.0}
    write_json(project / "metrics" / "seconds" / "train@sit4-0.json", times)
    write_json(project / "metrics" / "headline.json", headline.gather(project))
    output = reports / "index.html"
    command = ["--output", str(output), "--headline", str(project / "metrics" / "headline.json")]
    written = []
    for _ in range(2):
        assert site.main([*command, "--docs", str(docs)]) == 0
        written.append({path.name: path.read_text() for path in reports.rglob("*.html")})
    assert written[0] == written[1]
    first = written[0]["index.html"]
    assert set(written[0]) == {"index.html", "scale.html"} | {
        f"{p.stem}.html" for p in reports.glob("*.ipynb")
    }
    (drawn,) = (reports / "pages" / "figures").iterdir()  # three reports show the same figure
    for name, html in written[0].items():
        assert (
            set(fetched(html)) <= {f"figures/{drawn.name}"} and "prefers-color-scheme: dark" in html
        ), name
    assert "<strong>23.50 ± 0.71</strong>" in first and "120.5" in first and "4 min 0 s" in first
    assert re.findall(r'href="(pages/[^"]+|api/[^"]+)">([^<]+)<', first) == [
        ("pages/01_demo.html", "Demo of a run"),
        ("pages/02_train-sit4-seed0.html", "SIT-4, seed 0"),
        ("pages/02_train-vit_vqgan-seed0.html", "ViT-VQGAN, seed 0"),
        ("pages/scale.html", "Scale &amp; size"),
        ("api/sitlib.html", "API documentation, from the docstrings"),
    ]
    train = written[0]["02_train-sit4-seed0.html"]
    assert "<dd>2 min 30 s</dd>" in train and "<dd>SIT-4</dd>" in train and "logical cores" in train
    assert (
        'rel="prev" href="01_demo.html"' in train
        and 'rel="next" href="02_train-vit_vqgan-seed0.html"' in train
    )
    assert (
        'href="02_train-sit4-seed0.html">next</a>' in train
        and 'href="../../sitlib/page.py">code</a>' in train
    )
    scale = written[0]["scale.html"]
    assert 'href="01_demo.html">the run' in scale and 'href="../index.html#run">home' in scale
    assert (
        'id="one"' in scale
        and 'href="#one-2"' in scale
        and "<msup>" in scale
        and "<td>1</td>" in scale
    )


def test_a_notebook_that_cannot_be_read_is_named_by_the_site(project, capsys):
    (project / "reports").mkdir()
    (project / "reports" / "01_x.ipynb").write_text("{")
    write_json(project / "metrics" / "headline.json", headline.gather(project))
    headline_file = str(project / "metrics" / "headline.json")
    assert (
        site.main(
            ["--output", str(project / "reports" / "index.html"), "--headline", headline_file]
        )
        == 1
    )
    assert "01_x.ipynb is not a readable notebook" in capsys.readouterr().err


def test_front_page_without_headline_is_a_sentence(tmp_path, capsys):
    assert (
        site.main(
            ["--output", str(tmp_path / "index.html"), "--headline", str(tmp_path / "none.json")]
        )
        == 1
    )
    assert "run dvc repro" in capsys.readouterr().err
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"), (7380, "2 h 3 min")],
)
def test_durations_are_readable(seconds, text):
    assert front.duration(seconds) == text


def test_api_pages_do_not_tell_where_the_project_lies(tmp_path):
    from workbook.paths import ROOT
    from workbook.reporting.api import write

    write(tmp_path / "api")
    pages = [path for path in (tmp_path / "api").rglob("*") if path.is_file()]
    assert pages and not [path.name for path in pages if str(ROOT) in path.read_text()]


def test_settings_that_differ_are_told_of_each_model():
    assert of_each(0.3) == "0.3" and of_each(None) == "None" and of_each("constant") == "constant"
    assert (
        of_each({"ar_sit4": 0.3, "ar_vit_vqgan": 0.6}) == "0.3 for AR-SIT-4, 0.6 for AR-ViT-VQGAN"
    )


def test_a_sweep_is_a_line_through_means_and_a_dot_for_each_seed():
    def rows(value):
        return [{"top_p": top_p, "fd_lite0": value + top_p} for top_p in (0.1, 0.5, 1.0)]

    figure = sweep_curves({"ar_sit4": [rows(10), rows(14)]}, "top_p", "top-p", {"fd_lite0": "FD"})
    (axis,) = figure.axes
    line, *dots = axis.lines
    assert (line.get_xdata() == [0.1, 0.5, 1.0]).all() and len(dots) == 2
    np.testing.assert_allclose(line.get_ydata(), [12.1, 12.5, 13.0])
    assert axis.get_xlabel() == "top-p" and axis.get_ylabel() == "FD"


def test_sizes_at_which_a_metric_was_not_measured_have_none_of_it():
    def seed(psnr, vgg):
        record = dict.fromkeys(
            ("psnr", "lpips_alex", "ssim", "fd_lite0", "kid", "lite0_score"), psnr
        )
        record |= {"bits_per_pixel": 1.0, "photographs": ["a", "b"], "counts": [1, 1]}
        record["by_photograph"] = {"psnr": [psnr, psnr], "lpips_alex": [psnr, psnr]}
        return {"sets": {"photos": {"64": record | vgg, "32": record}}}

    seeds = [seed(20.0, {"lpips_vgg": 0.2}), seed(22.0, {"lpips_vgg": 0.4})]
    full, half = sets_table({"sit4": seeds}, [64, 32])
    assert full["VGG"] == pytest.approx(0.3) and half["VGG"] is None and full["SSIM"] == 21.0
    (missing,) = sets_table({"sit4": [seeds[0], seed(22.0, {})]}, [64])
    assert missing["VGG"] is None  # and no mean of the one seed that has it
