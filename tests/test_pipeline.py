"""The pipeline: its dependency lists are true, and all of it runs at the smallest profile."""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import paper_dry_run
import pytest
import yaml
from tiny import python

from sitlib.strict import to_dict
from workbook import __main__ as main
from workbook import code_hashes, stages
from workbook.machine import machine
from workbook.params import pipeline_params
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.rates import FORMATS
from workbook.run_stages import reason_of
from workbook.stages import FUNCTIONS, NOTEBOOKS, stage_hashes

STAGES = {
    name: (stage.get("do", stage), file)
    for file in ("dvc.yaml", "study/dvc.yaml")
    for name, stage in yaml.safe_load((ROOT / file).read_text())["stages"].items()
}
PACKAGES = ("sitlib", "workbook")
NOTEBOOK_PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# -- what a stage depends on -------------------------------------------------------------------


def test_every_stage_is_a_command_and_every_command_a_stage():
    assert set(STAGES) == {*NOTEBOOKS, *FUNCTIONS}
    for name, (stage, _) in STAGES.items():
        assert re.match(rf"python -m workbook {name}( \w+=\S+)*$", stage["cmd"])


@pytest.mark.parametrize("name", sorted(set(STAGES) - {"prepare", "report"}))
def test_a_stage_depends_on_what_it_runs_and_on_what_is_there(name):
    stage, _ = STAGES[name]
    assert f"build/code/{name}.json" in stage["deps"]
    for dependency in stage["deps"]:
        if "$" not in dependency and dependency.startswith(("data", "profiles", "study")):
            assert (ROOT / dependency).exists()


def test_every_format_of_files_has_its_stage():
    listed = yaml.safe_load((ROOT / "study/dvc.yaml").read_text())["stages"]["rates"]["foreach"]
    assert set(listed) == {"sit", *FORMATS}


def test_to_import_a_model_does_not_import_the_compiler():
    code = "import sys, sitlib.model.generator, sitlib.codec; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# -- a stage as a command ----------------------------------------------------------------------


def test_code_that_is_edited_while_a_stage_runs_fails_it(monkeypatch, tmp_path, request):
    (tmp_path / "workbook/evaluate").mkdir(parents=True)
    edited = tmp_path / "workbook/evaluate/text.py"
    edited.write_text("x = 1")
    monkeypatch.setattr(code_hashes, "ROOT", tmp_path)
    code_hashes.module.cache_clear()
    request.addfinalizer(code_hashes.module.cache_clear)
    edit = "workbook.evaluate.text.trained_dual_encoder"
    monkeypatch.setattr(edit, lambda profile: edited.write_text("x = 2"))
    sentence = "Edited while dual_encoder ran: workbook/evaluate/text.py"
    with pytest.raises(ValueError, match=sentence):
        main.run("dual_encoder", {"profile": "smoke"})


def test_what_changes_after_the_pipeline_began_fails_the_stage_at_once(monkeypatch, tmp_path):
    hashes, values = stage_hashes("throughput"), to_dict(load_profile("smoke"))
    for name, content in (("code/throughput.json", hashes), ("profiles/smoke.yaml", values)):
        (tmp_path / "build" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "build" / name).write_text(yaml.safe_dump(content))
    monkeypatch.setenv("DVC_STAGE", "throughput")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    assert stages.stale("throughput", "smoke") is None
    monkeypatch.setattr(stages, "stage_hashes", lambda _: {**hashes, "sitlib/new.py": "1"})
    assert stages.stale("throughput", "smoke") == "sitlib/new.py"
    changed = to_dict(load_profile("smoke")) | {"data": {}}
    monkeypatch.setattr(stages, "to_dict", lambda _: changed)
    assert stages.stale("throughput", "smoke") == "data in the profile smoke, sitlib/new.py"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train_tokenisers"], "There is no stage 'train_tokenisers'; there are ablations, "),
        (["train_tokenizer", "sit4", "run="], "sit4, run=: arguments are of the form key=value"),
        (["evaluate_tokenizer", "run=5"], "'5' is no run"),
        (["evaluate_tokenizer", "run=sit4-seed00"], "'sit4-seed00' is no run"),
        (["evaluate_tokenizer", "run=sit4"], "'sit4' is no run: write <variant>-seed<number>"),
        (["extract_codes", "run=sit9-seed0"], "No model of the profile is over codes of sit9"),
        (["extract_codes", "run=sit4-seed7"], "over codes of sit4-seed7: make the seed"),
        (["scaling", "colour=1"], "06b_scaling has no parameter colour"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        main.run(arguments[0], main.values([*arguments[1:], "profile=smoke"]))


def test_reasons_are_told_in_words():
    changes = [
        {"changed deps": {"build/profiles/q.yaml": {"text.captions": "modified"}, "a": "new"}},
        {"changed deps": {"build/code/x.json": "modified"}},
        {"changed outs": {"models/x": "deleted"}},
    ]
    assert reason_of(changes) == "text.captions modified, a new, its code modified and 1 more"
    for gone in ("deleted", "not in cache"):
        assert reason_of([{"changed outs": {"models/x": gone}}]) == "results are not there"
    assert reason_of(["changed command"]) == "changed command"


# -- notebooks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOK_PATHS, ids=lambda path: path.stem)
def test_a_notebook_starts_with_a_claim_and_parameters(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and "**Claim.**" in cells[0].source
    assert "parameters" in cells[1].metadata.get("tags", [])
    for cell in cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            assert len(cell.source.splitlines()) <= 90
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith(PACKAGES):
                    line = ast.Module([node], [])
                    exec(compile(line, path.name, "exec"), {})  # what it imports is there


# -- the paper's shapes ------------------------------------------------------------------------


def test_the_dry_run_has_the_papers_shapes_and_few_of_everything_else(tmp_path):
    paper_dry_run.prepare(tmp_path, layers=1)
    code = (
        "from workbook.profile import load_profile; p = load_profile('paper'); "
        "t = p.tokenizer_variant('sit4'); print(p.tokenizer.optimizer.steps, t.encoder_layers, "
        "t.encoder_width, t.num_codes, p.data.source)"
    )
    done = python(code, tmp_path, PYTHONPATH=str(tmp_path))
    shapes = ["2", "1", "512", "8192", "data/imagenet"]
    assert done.stdout.split() == shapes, done.stderr
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert {"sit4-seed0", "sit6-seed0"} <= set(params["tokenizers"])
    assert "ar_sit4_improved-seed0" in params["generators"]
    for pattern in ("imagenet/*/*/*.jpg", "coco/*2014/*.jpg"):
        assert len(list(tmp_path.glob(f"data/{pattern}"))) == 2 * paper_dry_run.IMAGES


# -- the whole, at the smallest profile ----------------------------------------------------------


@pytest.fixture
def workspace(tmp_path_factory):
    """A copy of the project's files, with the smoke profile and few runs in params.yaml."""
    folder = tmp_path_factory.mktemp("pipeline") / "a clone"
    paper_dry_run.copy_project(folder)
    params = pipeline_params() | {
        "profile": "smoke",
        "tokenizers": {
            "vit_vqgan-seed0": "weights",
            "sit5_sc-seed0": "weights",
            "captioned_sit4_sc-seed0": "weights",
            "sit5_sc_second-seed0": "models/tokenizer/sit5_sc-seed0",
        },
        "codes": {
            "vit_vqgan-seed0": "autoregressive",
            "sit5_sc-seed0": "autoregressive",
            "captioned_sit4_sc-seed0": "text",
        },
        "generators": {
            "ar_vit_vqgan-seed0": "vit_vqgan-seed0",
            "ar_sit5_sc-seed0": "sit5_sc-seed0",
        },
        "text_generators": {"ar_captioned_sit4_sc-seed0": "captioned_sit4_sc-seed0"},
        "decoded_again": {
            "ar_sit5_sc_second-seed0": {"of": "ar_sit5_sc-seed0", "decoder": "sit5_sc_second-seed0"}
        },
        "throughput": {"rounds": 1, "batch_size": 4},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["git", "init", "-q"], ["git", "add", "-A"], [*git, "commit", "-qm", "start"]):
        subprocess.run(command, cwd=folder, check=True)
    return folder


def run_module(workspace, *arguments):
    """Run a module in the copy, whose own packages come first."""
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(workspace), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=workspace,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def repro(workspace):
    done = run_module(
        workspace, "workbook.run_stages", "dvc.yaml", "--jobs", "2", "--alone", "throughput"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_pipeline_runs_end_to_end_then_has_nothing_to_do_and_retrains_only_what_changed(
    workspace,
):
    """One test, because of several each could run the whole pipeline in a process of its own."""
    said = repro(workspace)
    assert "stages of dvc.yaml will run:" in said
    assert re.search(r"evaluate_tokenizer@sit5_sc-seed0 +has never run here", said)
    results_are_there(workspace)
    opening_a_notebook_or_changing_a_comment_trains_nothing(workspace)
    a_change_retrains_what_it_reaches_and_no_more(workspace)


def results_are_there(finished):
    results = json.loads((finished / "metrics/results.json").read_text())
    assert results["run"]["profile"] == "smoke" and results["run"]["hardware"] == [machine()]
    trained = "train_tokenizer@sit5_sc_second-seed0"
    assert {"weights", "tokenizer_results", trained} <= set(results["run"]["seconds"])
    assert set(results["tokenizers"]) == {"vit_vqgan", "sit5_sc", "sit5_sc_second"}
    assert set(results["captioned_tokenizers"]) == {"captioned_sit4_sc"}
    for scores in results["tokenizers"].values():
        assert 5 < scores["psnr"]["mean"] < 40 and 0 < scores["lpips_alex"]["mean"] < 1.5
    second = "ar_sit5_sc_second"
    assert set(results["generators"]) == {"ar_vit_vqgan", "ar_sit5_sc", second}
    scores = results["generators"]["ar_sit5_sc"]
    assert scores["fd_lite0"]["mean"] > 0 and scores["nats_per_token"]["mean"] > 0
    scores = results["text_generators"]["ar_captioned_sit4_sc"]
    assert 0 <= scores["r_precision_seen"]["mean"] <= 100 and scores["fd_lite0"]["mean"] > 0
    scores = json.loads((finished / "metrics/text/ar_captioned_sit4_sc-seed0.json").read_text())
    sampler = load_profile("smoke").sampler("ar_captioned_sit4_sc")
    assert scores["protocol"]["top_p"] == sampler.top_p == 0.8
    assert [row["top_p"] for row in scores["top_p_sweep"]] == [0.5, 0.8]
    for sweep in ("top_p_sweep", "guidance_sweep"):
        other, own = scores[sweep]
        assert own["fd_lite0"] == scores["fd_lite0"] != other["fd_lite0"]
    index = (finished / "reports/index.html").read_text()
    for stem in NOTEBOOKS.values():
        reports = list(finished.glob(f"reports/{stem}*.ipynb"))
        assert reports and all(path.stem in index for path in reports), stem
    scores = json.loads((finished / "metrics/applications.json").read_text())
    assert all(row["frozen_codes_equal"] for row in scores["editing"]["kept"].values())
    assert set(scores["upsampling"]) == {"ar_sit5_sc", "ar_captioned_sit4_sc"}
    scores = json.loads((finished / "metrics/tokenizer/sit5_sc-seed0.json").read_text())
    assert set(scores["sets"]) == {"landscapes", "emoji", "extra"}
    assert list(scores["sets"]["emoji"]) == ["64", "32", "16", "8", "4"]
    assert (finished / "reports/api/sitlib.html").exists()


def opening_a_notebook_or_changing_a_comment_trains_nothing(finished):
    path = finished / "notebooks/02a_tokenizer_training.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # what JupyterLab leaves behind after running and saving
        cell.id = f"changed-{cell.id}"[:20]
        if cell.cell_type == "code":
            cell.execution_count = 7
            cell.outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.metadata["widgets"] = {}
    nbformat.write(notebook, path)
    with (finished / "sitlib/model/tokenizer.py").open("a") as file:
        file.write("# A comment.\n")
    plan = repro(finished)
    assert re.findall(r"^  (\w\S*) ", plan, re.MULTILINE) in ([], ["report"])  # its pages


def a_change_retrains_what_it_reaches_and_no_more(finished):
    profile = finished / "profiles/smoke.yaml"
    text = profile.read_text()
    changed = text.replace("    sit5_sc: {", "    sit5_sc: {code_dim: 8, ", 1)
    assert changed != text
    profile.write_text(changed)
    waiting = status(finished)
    assert {"train_tokenizer@sit5_sc-seed0", "train_tokenizer@sit5_sc_second-seed0"} <= waiting
    assert not [stage for stage in waiting if "train_tokenizer@vit_vqgan" in stage]
    profile.write_text(text)
    path = finished / "notebooks/02a_tokenizer_training.ipynb"
    path.write_text(path.read_text().replace("style()", "style()\\nprint('changed')", 1))
    assert {"train_tokenizer@sit5_sc-seed0", "train_tokenizer@vit_vqgan-seed0"} <= status(finished)


def status(finished) -> set[str]:
    assert run_module(finished, "dvc", "repro", "prepare").returncode == 0
    return set(json.loads(run_module(finished, "dvc", "status", "--json").stdout))
