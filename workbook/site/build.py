"""Write reports/index.html and reports/pages from executed notebooks, metrics, examples and docs.

No model and no notebook runs, so a change of style takes seconds.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sitlib.metrics import METRICS
from workbook.code_hashes import read_notebook
from workbook.figures.tables import COLUMNS, html_table
from workbook.names import label
from workbook.params import split_run
from workbook.paths import ROOT, resolve
from workbook.profile import Profile
from workbook.site.findings import (
    findings,
    said_of_trials,
    summary_of_findings,
    write_results,
)
from workbook.site.render import TEMPLATES, Markdown, Page, notebook_page, stored
from workbook.site.results import GENERATOR_METRICS, read_json

# key of results.json -> caption, and columns
RECONSTRUCTION = (*METRICS, "fd_lite0", "usage")
TABLES = {
    "tokenizers": ("Tokenizers on held-out photographs", RECONSTRUCTION),
    "generators": ("Class-conditional samples against held-out views", GENERATOR_METRICS),
    "captioned_tokenizers": ("Tokenizers of captioned images", RECONSTRUCTION),
    "text_generators": (
        "Text-conditional samples; right caption among 100. A distance below that of the "
        "reconstructions is no success: 04b says why",
        GENERATOR_METRICS,
    ),
}


def duration(seconds: float) -> str:
    """Seconds for a reader: 41 s, 12 min 5 s, 2 h 3 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def environment(run: Mapping[str, Any]) -> dict[str, str]:
    """Machine, precision, versions and commit of the run in results.json."""
    machines, precisions = [], []
    for machine in run["hardware"]:
        memory = f", {machine['memory_gib']:g} GiB" if machine["memory_gib"] else ""
        cores = f"{machine['logical_cores']} logical cores"
        machines.append(f"{machine['cpu']}, {cores}{memory}, {machine['gpu'] or 'no GPU'}")
        name = machine["auto_precision"] if run["precision"] == "auto" else run["precision"]
        precisions.append("float32" if name == "no" else f"{name} in training, float32 elsewhere")
    commit, dirty, _ = run["revision"].partition("-dirty")
    return {
        "Hardware": "; ".join(machines),
        "Precision": f"{'; '.join(dict.fromkeys(precisions))} (the study's rows: float32)",
        "Versions": ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
        **({"Lock file": run["lock"]} if run.get("lock") else {}),
        "Gathered at commit": commit + (", with uncommitted changes" if dirty else ""),
    }


def metrics_table(group: Mapping[str, Any], caption: str, names: tuple[str, ...]) -> str:
    """A table of results.json: model -> metric -> mean and deviation over seeds."""
    columns = [(key, COLUMNS[key]) for key in names if any(key in row for row in group.values())]
    rows: list[dict[str, Any]] = []
    for variant, row in group.items():
        rows.append({"model": label(variant)})
        for key, column in columns:
            value = row.get(key, {})
            rows[-1][column.arrow] = {k: x and x * column.factor for k, x in value.items()}
    seeds = max(value["seeds"] for row in group.values() for value in row.values())
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return html_table(rows, f"{caption}; {spread}", best=True)


def front_page(
    root: Path,
    results: Mapping[str, Any],
    reports: Mapping[str, list[Page]],
    guides: list[Page],
    folder: str,
) -> Page:
    """The front page; `reports`: notebook -> pages of its runs; `folder`: address of the pages."""
    run, reports_folder = results["run"], root / "reports"
    seconds, examples = run["seconds"], reports_folder / "examples.json"
    overview = reports_folder / "overview.png"
    figures = reports_folder / folder / "figures"
    stages = [{"stage": name, "seconds": float(value)} for name, value in seconds.items()]
    total = f"{duration(sum(seconds.values()))} for all {len(seconds)} stages together"
    tables = [
        (metrics_table(results[key], *about), results["protocol"].get(key, {}))
        for key, about in TABLES.items()
        if results.get(key)
    ]
    body = TEMPLATES.get_template("front.html.j2").render(
        findings={
            name: html_table(rows, caption, digits=1)
            for name, (caption, rows) in findings(results).items()
        },
        summary=summary_of_findings(results),
        trials=said_of_trials(results),
        overview=stored(overview.read_bytes(), figures) if overview.exists() else None,
        examples=read_json(examples) if examples.exists() else None,
        reports=reports,
        guides=guides,
        has_api=(reports_folder / "api/sitlib.html").exists(),
        tables=tables,
        facts={"Profile": run["profile"], "Time": total, **environment(run)},
        times=html_table(stages, "Wall time of each stage", digits=1),
        folder=folder,
    )
    return Page("index.html", body)


def write_report(_: Profile) -> None:
    """Results in one file, the pages of all reports, the front page and the API documentation."""
    write_results(ROOT)
    shutil.rmtree(resolve("reports/api"), ignore_errors=True)
    options = [
        "-d",
        "google",
        "--no-show-source",
        "--no-search",
    ]  # an index has as many MB as pages
    pages = ["-m", "pdoc", *options, "-o", "reports/api", "sitlib"]
    subprocess.run([sys.executable, *pages], check=True, cwd=ROOT)
    for file in (file for file in resolve("reports/api").rglob("*") if file.is_file()):
        text = file.read_text("utf-8")  # default values are paths of this machine
        text = text.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
        file.write_text(text, "utf-8")
    build(ROOT)


def build(root: Path) -> None:
    """Write the site of the project at `root`.

    Raises:
        ValueError: a source is missing or broken.
    """
    if not (root / "metrics/results.json").exists():
        raise ValueError("There is no metrics/results.json: run dvc repro.")
    results = read_json(root / "metrics/results.json")
    records = [read_json(path) for path in (root / "metrics/seconds").glob("*.json")]
    seconds = {record["report"]: record["seconds"] for record in records if "report" in record}
    notebooks, guides = sorted((root / "reports").glob("*.ipynb")), sorted(root.glob("docs/*.md"))
    pages = root / "reports/pages"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()

    # Links between sources become links between pages; of many runs the first is meant.
    places = {path: f"{path.stem}.html" for path in [*notebooks, *guides]}
    for path in reversed(notebooks):
        places[root / f"notebooks/{path.stem.partition('-')[0]}.ipynb"] = places[path]
    places[root / "reports/index.html"] = "../index.html"

    def relink(folder: Path) -> Callable[[str], str]:
        """Address on a page of what a source in `folder` links to."""

        def relinked(url: str) -> str:
            target, mark, anchor = url.partition("#")
            if not target or ":" in target or target.startswith("/"):
                return url
            path = (folder / target).resolve()
            place = places.get(path) or os.path.relpath(path, pages).replace(os.sep, "/")
            return place + mark + anchor

        return relinked

    reports: dict[str, list[Page]] = {}
    for path in notebooks:
        name, _, run = path.stem.partition("-")
        notebook = read_notebook(path)
        tagged = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
        given = re.search('^profile = "(.+)"', tagged[0].source, re.M) if tagged else None
        model, seed = split_run(run) if run else ("", "")
        rows = {
            "notebook": f"notebooks/{name}.ipynb",
            "profile": given[1] if given else results["run"]["profile"],
            "model": label(model),
            "seed": str(seed),
            "duration": duration(seconds[path.stem]) if path.stem in seconds else "",
        }
        rows = {key: text for key, text in rows.items() if text}
        markdown, figures = Markdown(relink(root / "notebooks")), pages / "figures"
        page = notebook_page(places[path], notebook, markdown, figures, run, rows)
        reports.setdefault(name, []).append(page)
    texts = [
        Page(places[path], Markdown(relink(root / "docs")).html(path.read_text("utf-8")))
        for path in guides
    ]
    front = front_page(root, results, reports, texts, "pages/")
    template = TEMPLATES.get_template("page.html.j2")
    html = template.render(page=front)
    (root / "reports/index.html").write_text(html, encoding="utf-8")
    made = [page for runs in reports.values() for page in runs] + texts
    for page, before, after in zip(made, [None, *made], [*made[1:], None], strict=False):
        html = template.render(page=page, home="../index.html", before=before, after=after)
        (pages / page.address).write_text(html, encoding="utf-8")
