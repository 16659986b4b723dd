"""results.json, README's numbers, and a site built from a small project."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workbook.figures import tables
from workbook.machine import machine
from workbook.paths import ROOT
from workbook.site import build, findings, render, results
from workbook.site.compare import headline

SVG = '<svg width="72pt" height="36pt" viewBox="0 0 72 36"></svg>'


def write(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def tokenizer_metrics(psnr: float, lpips_vgg: float | None) -> dict:
    by_photograph = {"psnr": [psnr, psnr + 1], "lpips_alex": [0.2, 0.3]}
    record = {"by_photograph": by_photograph, "photographs": ["a", "b"], "counts": [1, 1]}
    protocol = {"source": "data/x", "views": "400 crops"}
    scores = {"psnr": psnr, "lpips_alex": 0.25, "lpips_vgg": lpips_vgg, "usage": 99.0}
    return scores | {"sets": {"photos": {"64": record}}, "protocol": protocol}


@pytest.fixture
def project(tmp_path) -> Path:
    """Metrics of two tokenizers with two seeds, a generator, and a run that is no longer listed."""
    metrics = tmp_path / "metrics"
    for variant, psnr in (("vit_vqgan", 22.0), ("sit4", 23.0), ("sit9", 99.0)):
        for seed in (0, 1):
            values = tokenizer_metrics(psnr + seed, None if variant == "vit_vqgan" else 0.3)
            write(metrics / f"tokenizer/{variant}-seed{seed}.json", values)
    protocol = {
        "samples": 512,
        "reference_images": 512,
        "reference_groups": 35,
        "reference_size": 64,
        "top_p": 0.9,
        "guidance": 1.5,
    }
    generator = {"fd_lite0": 120.5, "kid": 0.0123, "protocol": protocol}
    generator["memorisation"] = {"share_below_5th": 0.125}
    write(metrics / "generation/ar_sit4-seed0.json", generator)
    write(metrics / "seconds/weights.json", {"stage": "weights", "seconds": 30.5})
    timed = {"stage": "train@sit4-0", "report": "02_train-sit4-seed0", "seconds": 150.0}
    write(metrics / "seconds/train.json", timed | {"machine": machine() | {"cpu": "A"}})
    scores = {"psnr": 22.0, "lpips_vgg": 0.4, "lpips_alex": 0.2, "ssim": 0.5, "fd_lite0": 99.0}
    seeds = {
        seed: scores | {"coded_bits": 570.0, "by_photograph": {"psnr": [21.0 + int(seed), 23.0]}}
        for seed in "01"
    }
    row = {"group": "headline", "title": "ViT-VQGAN", "seeds": seeds, "photographs": ["a", "b"]}
    row |= {"steps": 1400, "protocol": {"images": 400, "size": [64, 64]}}
    row |= {"tokens": 64, "bits": 576.0, "parameters": 10**6, "flops_per_image": 10**8}
    write(metrics / "study/rows/vit_vqgan.json", row)
    distance = {"half_written": {"psnr": 25}, "to_reconstructions": {"fd_lite0": 20}}
    distance["protocol"] = protocol
    by_place = {"text.common.order": "by_place"}
    written = {s: {"nats_per_image": 10 + s, **distance} for s in (0, 1)}
    write(metrics / "study/generators/emoji_by_place.json", {"changes": by_place, "seeds": written})
    masked = {"nats_per_image": 9, "by_passes": []}
    write(metrics / "study/generators/emoji_masked.json", {"changes": {}, "seeds": {0: masked}})
    (tmp_path / "params.yaml").write_text(
        "profile: quick\ntokenizers: [vit_vqgan-seed0, vit_vqgan-seed1, sit4-seed0, sit4-seed1]\n"
        "generators: {ar_sit4-seed0: 0}\ndecoded_again: {}\ntext_generators: {}\n"
    )
    (tmp_path / "README.md").write_text(
        "Before.\n{}\n{}\n{}\n{}\nAfter.".format(*sum(findings.MARKS.values(), ()))
    )
    return tmp_path


def test_results_gather_every_listed_run(project):
    gathered = results.gather(project)
    assert list(gathered["tokenizers"]) == ["vit_vqgan", "sit4"]
    sit4, baseline = gathered["tokenizers"]["sit4"], gathered["tokenizers"]["vit_vqgan"]
    assert sit4["psnr"] == {"mean": 23.5, "std": pytest.approx(0.707107), "seeds": 2}
    assert baseline["lpips_vgg"] == {"mean": None, "std": None, "seeds": 2}
    assert gathered["generators"]["ar_sit4"]["kid"] == {"mean": 0.0123, "std": None, "seeds": 1}
    run = gathered["run"]
    assert run["seconds"] == {"train@sit4-0": 150.0, "weights": 30.5}
    assert [machine["cpu"] for machine in run["hardware"]] == ["A"]
    (row,) = gathered["reconstruction"]
    assert (row["model"], row["seeds"]) == ("ViT-VQGAN", 2)
    assert row["LPIPS-VGG, x first row"] == "1.00"
    assert gathered["claims"]["SIT-5 reconstructs better than ViT-VQGAN"]["verdict"] == "not run"


def test_the_headline_has_other_metrics_samplers_and_trainings():
    def model(fd, kid):
        own = {"fd_lite0": fd, "kid": kid, "jackknife": {"fd_lite0": 0.0, "kid": 0.3 * kid}}
        sweep = [{"fd_lite0": fd}, {"fd_lite0": fd / fd**0.5}]
        return own | {"to_reconstructions": own, "top_p_sweep": sweep, "guidance_sweep": []}

    runs = {"ar_vit_vqgan": [model(100.0, 0.2)], "ar_sit4": [model(400.0, 0.3)]}
    again = {name: model(50.0, 0.1) for name in runs}
    first, second = headline(runs, [], again)
    assert (first["ours"], first["KID"]) == ("x 4.00 ± 0.00", "x 1.50 ± 0.64")
    assert (first["other samplers"], first["trained again"]) == (
        "x 2.00 to 4.00",
        "x 1.00 (KID x 1.00)",
    )
    assert second["ours"] == "x 4.00 ± 0.00" and not second["other samplers"]
    assert headline(runs, [], {})[0]["trained again"] == ""


def test_readme_tells_the_numbers_of_the_results(project):
    for _ in range(2):
        findings.write_results(project)
        text = (project / "README.md").read_text()
        assert "| ViT-VQGAN | 576 | 570 | 1.0 | 100 | 0.400 [" in text and text.endswith("\nAfter.")
        assert "| emoji | by place | 512 | 10.5 | 20.0 | 25.0 |" in text
        assert "| SIT-5 reconstructs better than ViT-VQGAN |  |  |  | not run |" in text
        assert text.count("| model | bits |") == 1
        assert "2 seeds, 1,400 steps, 400 crops of 2 held-out photographs, 64 px" in text
    committed = results.read_json(ROOT / "metrics/results.json")
    readme = (ROOT / "README.md").read_text()
    assert findings.with_results(readme, committed) == readme


def test_models_are_compared_after_as_many_steps_each():
    values = {"sit4": (1400, 0.5), "sit4_350": (350, 0.66), "vit_vqgan_350": (350, 0.6)}
    values |= {"vit_vqgan": (1400, 0.4), "sit4_books": (1400, 9.0), "sit4_700": (700, 0.5)}
    rows = {
        name: {"group": group, "steps": steps, "seeds": {"0": {"lpips_vgg": x, "fd_lite0": x * x}}}
        for name, (steps, x) in values.items()
        for group in ["steps" if name[-1] == "0" else "headline"]
    }
    vgg, fd = results.lengths(rows)
    first = {"model": "SIT-4 of the paper", "measure": "LPIPS-VGG"}
    assert vgg == first | {"350 steps": "1.10", "1,400 steps": "1.25"}
    assert (fd["measure"], fd["350 steps"], fd["1,400 steps"]) == ("FD-Lite0", "1.21", "1.56")


def test_missing_and_broken_files_are_named(project):
    with pytest.raises(ValueError, match=r"no metrics/results\.json"):
        build.build(project)
    findings.write_results(project)
    (project / "reports").mkdir()
    (project / "reports/01_x.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"01_x\.ipynb is not a readable notebook"):
        build.build(project)
    (project / "metrics/tokenizer/sit4-seed1.json").write_text("{")
    with pytest.raises(ValueError, match=r"sit4-seed1\.json is not JSON"):
        results.gather(project)
    shutil.rmtree(project / "metrics/tokenizer")
    shutil.rmtree(project / "metrics/generation")
    with pytest.raises(ValueError, match="run dvc repro"):
        results.gather(project)


def test_revision_is_dirty_only_for_tracked_sources(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def write_all(content, *names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)

    git("init", "-q")
    assert results.revision(tmp_path) == "unknown"
    write_all("1", "code.py", "metrics/a.json", "dvc.lock")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = results.revision(tmp_path)
    write_all("2", "metrics/a.json", "dvc.lock", "new.txt")
    assert re.fullmatch("[0-9a-f]{12}", clean) and results.revision(tmp_path) == clean
    write_all("2", "code.py")
    assert results.revision(tmp_path) == f"{clean}-dirty"


def executed_notebook() -> nbformat.NotebookNode:
    """A notebook with a formula, a table and a figure with a caption, as the runner leaves it."""
    about = {"alt": 'A line that "rises" & falls', "caption": "Up is better.", "name": "film"}
    shown = [
        ("image/svg+xml", SVG, about),
        ("text/markdown", "*Up is better.*", {"caption": True}),
        ("text/html", tables.html_table([{"model": "a"}], "Scores"), {}),
    ]
    outputs = [
        new_output("display_data", {kind: content}, metadata={kind: about})
        for kind, content, about in shown
    ]
    text = "# Demo of a run\n\n**Claim.** It *works*. More.\n\n$$a^2$$\n\n[next](02_train.ipynb)"
    given = {"metadata": {"tags": ["injected-parameters"]}}
    parameters = new_code_cell('profile = "smoke"\nvariant = "sit4"\nseed = 0', **given)
    code = new_code_cell("show(figure)", outputs=outputs)
    return new_notebook(cells=[new_markdown_cell(text), parameters, code])


def test_the_site_shows_results_and_links_every_report(project):
    reports, docs = project / "reports", project / "docs"
    reports.mkdir()
    docs.mkdir()
    for stem in ("03b_generation_results", "02_train-sit4-seed0", "02_train-vit_vqgan-seed0"):
        nbformat.write(executed_notebook(), reports / f"{stem}.ipynb")
    (docs / "scale.md").write_text("# Scale & size\n\n[run](../reports/index.html#run)\n\n## One\n")
    findings.write_results(project)
    written = []
    for _ in range(2):
        build.build(project)
        written.append({path.name: path.read_text() for path in reports.rglob("*.html")})
    pages = written[0]
    assert pages == written[1] and len(pages) == 5
    (figure,) = (reports / "pages/figures").iterdir()  # all reports show the same one
    index, train = pages["index.html"], pages["02_train-sit4-seed0.html"]
    assert f'src="pages/figures/{figure.name}"' in index and "Up is better. More:" in index
    assert "<strong>23.50 ± 0.71</strong>" in index and "120.5" in index and "3 min 0 s" in index
    assert "<p>It works.</p>" in index
    assert re.findall(r'href="pages/([^"]+).html">([^<]+)<', index)[-4:] == [
        ("02_train-sit4-seed0", "SIT-4, seed 0"),
        ("02_train-vit_vqgan-seed0", "ViT-VQGAN, seed 0"),
        ("03b_generation_results", "Demo of a run"),
        ("scale", "Scale &amp; size"),
    ]
    assert "model SIT-4, seed 0, duration 2 min 30 s" in train and "<msup>" in train
    assert 'href="02_train-sit4-seed0.html">next</a>' in train and train.count("Up is better.") == 1
    assert "profile smoke" in train and 'href="../index.html#run">run' in pages["scale.html"]
    for html in pages.values():
        assert not re.findall(r'(?:src|href)="https?:(?!//arxiv)', html)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_formula_of_the_notebooks_is_drawn(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for block, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", cell.source, re.S):
            if cell.cell_type == "markdown":
                drawn = render.formula(block or inline, "block" if block else "inline")
                assert "\\" not in re.sub("<[^>]+>", "", drawn), block or inline


def test_small_things_of_a_page():
    assert "<msup>" in render.formula("a^2", "inline")
    assert "<code>" in render.formula(r"\frac{", "x")
    rows = [{"model": "a", "by": "told", "x": 0.1}, {"model": "b", "by": "n/a", "x": None}]
    html = render.aligned(tables.html_table(rows, "Scores"))
    assert re.findall(r"<t[hd][^>]*class=text[^>]*>(.*?)<", html) == ["by", "told", "n/a"]
    texts = {0.4: "0 s", 59.6: "1 min 0 s", 725: "12 min 5 s", 7380: "2 h 3 min"}
    assert {seconds: build.duration(seconds) for seconds in texts} == texts
