"""The pipeline: its dependency lists are true, its notebooks canonical, and all of it runs at the smallest profile."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import paper_dry_run
import pytest
import torch
import yaml

from sitlib.files import load_model
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.reporting.canonical import main as canonical
from workbook.reporting.code_hashes import ABOUT, code_hashes, entry_points
from workbook.reporting.machine import machine

STAGES = {
    f"{folder}{name}": stage
    for folder in ("", "ablations/")
    for name, stage in yaml.safe_load((ROOT / f"{folder}dvc.yaml").read_text())["stages"].items()
}
HASHES = entry_points(ROOT / "notebooks")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# -- what a stage depends on -----------------------------------------------------------------------------------------------------------


def entry_point(stage: dict) -> str:
    """What a stage's command runs: the notebook, or the module, the one after `timed` if it is timed."""
    command = " ".join(stage["cmd"]) if isinstance(stage["cmd"], list) else stage["cmd"]
    notebook = next((word for word in command.split() if word.endswith(".ipynb")), None)
    modules = [
        word
        for word in command.split()
        if word.startswith("sitlib.") and word != "workbook.reporting.timed"
    ]
    return Path(notebook).stem if notebook else modules[0].removeprefix("sitlib.")


@pytest.mark.parametrize(
    "name", [name for name in STAGES if name not in ("notebooks", "code", "report")]
)
def test_a_stage_depends_on_the_code_and_the_notebook_that_it_runs(name):
    stage = STAGES[name].get("do", STAGES[name])
    entry = entry_point(stage)
    assert entry in HASHES
    assert f"build/code/{entry}.json" in stage["deps"]
    assert (f"build/notebooks/{entry}.ipynb" in stage["deps"]) == (
        entry in {path.stem for path in NOTEBOOKS}
    )
    for dep in stage["deps"]:
        if "$" not in dep and dep.startswith(("sitlib", "data")):
            assert (ROOT / dep).exists(), f"{name} depends on {dep}, which does not exist"


def test_training_stages_do_not_depend_on_reporting():
    for name, stage in STAGES.items():
        if name.startswith("train"):
            assert not any("reporting" in file for file in HASHES[entry_point(stage)])


def test_imports_run_one_way():
    layers = [
        "wavelets",
        "geometry",
        "squares",
        "transformer",
        "scales",
        "quantizer",
        "tokenizer",
        "losses",
        "discriminator",
        "training",
        "experiments",
        "reporting",
    ]
    models = {f"sitlib/{name}.py" for name in (*layers[: layers.index("losses")], "autoregressive")}
    for file in models:
        above = {
            f
            for f in code_hashes({file}, ABOUT)
            if any(f"/{layer}" in f for layer in layers[layers.index("losses") :]) or "/data/" in f
        }
        assert not above, f"{file} imports {above}"
    for file in [str(path.relative_to(ROOT)) for path in (ROOT / "workbook").glob("*.py")]:
        assert not any(f.startswith("workbook/reporting") for f in code_hashes({file}, ABOUT)), file


# -- notebooks -------------------------------------------------------------------------------------------------------------------------


def test_notebooks_are_canonical(capsys):
    assert canonical([str(ROOT / "notebooks"), "--check"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_classes_and_start_with_a_claim(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and "**Claim.**" in cells[0].source
    assert "parameters" in cells[1].metadata.get("tags", [])
    trees = [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]
    assert not any(isinstance(node, ast.ClassDef) for tree in trees for node in ast.walk(tree))
    assert not any(len(cell.source.splitlines()) > 40 for cell in cells if cell.cell_type == "code")


# -- the paper's shapes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, 1])
def test_the_dry_run_has_the_papers_shapes_and_few_of_everything_else(layers, tmp_path):
    paper_dry_run.prepare(tmp_path, layers)
    code = (
        "import sys; from workbook.profile import load_profile; p = load_profile('paper'); t = p.tokenizer_variant('sit4'); "
        + (
            "print(p.tokenizer.optimizer.steps, t.encoder_layers, t.encoder_width, t.num_codes, p.data.source)"
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", str(layers or 8), "512", "8192", "data/imagenet"], (
        done.stderr
    )
    asked = yaml.safe_load((tmp_path / "params.yaml").read_text())["tokenizers"]
    assert {"sit4", "sit6"} <= set(asked) and len(asked) == len(set(asked))
    assert len(list(tmp_path.glob("data/imagenet/*/*/*.jpg"))) == 2 * paper_dry_run.IMAGES
    assert len(list(tmp_path.glob("data/coco/*2017/*.jpg"))) == 2 * paper_dry_run.IMAGES


def test_a_machine_that_is_too_small_for_the_whole_depth_is_told_before_anything_runs(monkeypatch):
    assert paper_dry_run.lacking(42, 80, False) is paper_dry_run.lacking(42, 20, True) is None
    assert "here are 24 and 100" in paper_dry_run.lacking(24.0, 100.0, True)
    assert "LAYERS=1" in paper_dry_run.lacking(64.0, 79.0, False)
    assert paper_dry_run.memory_and_swap() > 0.5
    monkeypatch.setattr(paper_dry_run, "memory_and_swap", lambda: 1.0)
    monkeypatch.setattr(paper_dry_run, "prepare", lambda *_: pytest.fail("it has begun"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["paper_dry_run.py"])
    with pytest.raises(SystemExit, match="takes 42 GB of memory"):
        paper_dry_run.main()


# -- the whole, at the smallest profile ------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path_factory):
    """A copy of the project's files, with the smoke profile and few variants chosen in params.yaml, as a user would."""
    folder = tmp_path_factory.mktemp("pipeline") / "a clone"
    paper_dry_run.copy_project(folder)
    parameters = yaml.safe_load((folder / "params.yaml").read_text())
    parameters |= {
        "profile": "smoke",
        "tokenizers": ["vit_vqgan", "sit5_sc", "captioned_sit4_sc"],
        "seeds": [0],
        "second_decoders": ["sit5_sc"],
        "second_decoder_seeds": [0],
        "generators": ["vit_vqgan", "sit5_sc"],
        "generator_seeds": [0],
        "text_generators": ["captioned_sit4_sc"],
        "text_seeds": [0],
        "core_ablations": ["wavelet_typed_decoder_causal"],
        "throughput_rounds": 1,
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(parameters))
    ablations = yaml.safe_load((folder / "ablations/params.yaml").read_text())
    steps = {"tokenizer.optimizer.steps": 12, "tokenizer.optimizer.warmup_steps": 2}
    ablations |= {"profile": "smoke", "common": steps}
    (folder / "ablations/params.yaml").write_text(yaml.safe_dump(ablations, sort_keys=False))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["git", "init", "-q"], ["git", "add", "-A"], [*git, "commit", "-qm", "start"]):
        subprocess.run(command, cwd=folder, check=True)
    return folder


def dvc(workspace, *arguments, **options):
    """Runs dvc in the copy, whose own `sitlib` comes first."""
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(workspace),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=workspace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        **options,
    )


@pytest.mark.slow
def test_the_pipeline_runs_end_to_end_then_has_nothing_to_do_and_retrains_only_what_changed(
    workspace,
):
    """One test, because tests of their own could land in several processes, each of which would run the whole pipeline."""
    result = dvc(workspace, "repro")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    results_are_there(workspace)
    nothing_to_do_is_quick_and_opening_a_notebook_trains_nothing(workspace)
    changing_one_variant_retrains_only_that_one(workspace)


def results_are_there(finished):
    headline = json.loads((finished / "metrics/results.json").read_text())
    assert headline["profile"] == "smoke" and headline["hardware"] == [machine()]
    assert set(headline["tokenizer"]) == {"vit_vqgan", "sit5_sc", "sit5_sc_second"}
    assert set(headline["text_tokenizer"]) == {"captioned_sit4_sc"}
    for scores in headline["tokenizer"].values():
        assert {"psnr", "lpips_alex", "lpips_vgg", "usage"} <= set(scores)
        assert 5 < scores["psnr"]["mean"] < 40 and 0 < scores["lpips_alex"]["mean"] < 1.5
    assert set(headline["generation"]["class"]) == {
        "ar_vit_vqgan",
        "ar_sit5_sc",
        "ar_sit5_sc_second",
    }
    scores = headline["generation"]["class"]["ar_sit5_sc"]
    assert scores["fd_lite0"]["mean"] > 0 and scores["nats_per_token"]["mean"] > 0
    scores = headline["generation"]["text"]["ar_captioned_sit4_sc"]
    assert 0 <= scores["r_precision_seen"]["mean"] <= 100 and scores["fd_lite0"]["mean"] > 0
    scores = json.loads((finished / "metrics/text/ar_captioned_sit4_sc-seed0.json").read_text())
    sampler = load_profile("smoke").sampler("ar_captioned_sit4_sc")
    assert scores["protocol"]["top_p"] == sampler.top_p == 0.8
    assert [row["top_p"] for row in scores["top_p_sweep"]] == [0.5, 0.8]
    assert [row["guidance"] for row in scores["guidance_sweep"]] == [1.0, sampler.guidance]
    for sweep in ("top_p_sweep", "guidance_sweep"):
        other, own = scores[sweep]
        assert own["fd_lite0"] == scores["fd_lite0"] != other["fd_lite0"]
    scores = json.loads((finished / "metrics/generation/ar_sit5_sc-seed0.json").read_text())
    assert [row["top_p"] for row in scores["top_p_sweep"]] == [0.8]
    assert {"weights", "wavelet_analysis", "tokenizer_results", "generation_results"} <= set(
        headline["seconds"]
    )
    for stem in (
        "01_wavelet_analysis",
        "02a_tokenizer_training-vit_vqgan-seed0",
        "02a_tokenizer_training-sit5_sc_second-seed0",
        "02b_tokenizer_results",
        "02c_tokenizer_recipe",
        "03b_generation_results",
        "03c_sampling_speed",
        "04a_text_training-ar_captioned_sit4_sc-seed0",
        "04b_text_results",
        "05a_applications",
        "05b_explorer",
        "06a_ablations",
        "06b_scaling",
    ):
        notebook = nbformat.read(finished / f"reports/{stem}.ipynb", as_version=4)
        figures = [
            o
            for c in notebook.cells
            if c.cell_type == "code"
            for o in c.outputs
            if "image/png" in o.get("data", {})
        ]
        is_measured = stem != "06b_scaling" or any((ROOT / "metrics/efficiency").glob("*.json"))
        assert not is_measured or figures
        assert all(o.metadata["image/png"]["alt"] for o in figures)
        assert stem in (finished / "reports/index.html").read_text()
    scores = json.loads((finished / "metrics/applications.json").read_text())
    assert all(row["frozen_codes_equal"] for row in scores["editing"]["kept"].values())
    assert list(scores["editing"]["kept"]) == ["0", "1", "2", "3", "4"]
    assert set(scores["upsampling"]) == {"ar_sit5_sc", "ar_captioned_sit4_sc"}
    for shares in scores["upsampling"].values():
        assert set(shares) == {"8", "4", "2", "several"}
        told, untold = (
            shares["8"][way]["consistency"] for way in ("told, temperature 1", "untold")
        )
        assert abs(told - untold) < 2  # but for clamping, that of the scales that are given
    scores = json.loads((finished / "metrics/tokenizer/sit5_sc-seed0.json").read_text())
    assert set(scores["sets"]) == {"landscapes", "emoji", "extra"}
    assert list(scores["sets"]["emoji"]) == ["64", "32", "16", "8", "4"]
    first, second = (
        load_model(finished / f"models/tokenizer/{name}-seed0/model.safetensors", SpectralTokenizer)
        for name in ("sit5_sc", "sit5_sc_second")
    )
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(first.encode(images), second.encode(images))
    assert [path.name for path in (finished / ".ckpt").iterdir()] == ["locks"]  # no states


def nothing_to_do_is_quick_and_opening_a_notebook_trains_nothing(finished):
    began = time.monotonic()
    again = dvc(finished, "repro")
    assert "Running stage" not in again.stdout and "up to date" in again.stdout
    assert time.monotonic() - began < 20  # about 1.5 s on a quiet machine: far below any stage
    path = finished / "notebooks/02a_tokenizer_training.ipynb"
    source = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # what JupyterLab leaves behind after running and saving
        cell.id = f"changed-{cell.id}"[:20]
        if cell.cell_type == "code":
            cell.execution_count = 7
            cell.outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.metadata["widgets"] = {}
    nbformat.write(notebook, path)
    plan = dvc(finished, "repro", "--dry")
    assert "Running stage 'notebooks'" in plan.stdout
    opened = dvc(finished, "repro")
    assert opened.stdout.count("Running stage") == 1, opened.stdout
    code = next(
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "trained_tokenizer(" in cell.source
    )
    code.source += "\nprint('changed')"
    nbformat.write(notebook, path)
    dvc(finished, "repro", "notebooks")
    changed = dvc(finished, "status").stdout
    path.write_text(source)
    dvc(finished, "repro", "notebooks")
    assert "train_tokenizer@sit5_sc-0" in changed and "train_tokenizer@vit_vqgan-0" in changed


def changing_one_variant_retrains_only_that_one(finished):
    path = finished / "profiles/smoke.yaml"
    before = path.read_text()
    other = before.replace("    sit5_sc: {levels: 4,", "    sit5_sc: {code_dim: 8, levels: 4,")
    assert other != before
    path.write_text(other)
    changed = dvc(finished, "status").stdout
    path.write_text(before)
    assert "train_tokenizer@sit5_sc-0" in changed and "train_tokenizer@vit_vqgan-0" not in changed
