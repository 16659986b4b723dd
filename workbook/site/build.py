"""Write reports/index.html and reports/pages from executed notebooks, metrics, examples and docs.

No model and no notebook runs, so a change of style takes seconds.
"""

import ast
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import nbformat

from workbook.code_hashes import read_notebook
from workbook.names import label
from workbook.site.front import Report, duration, environment, facts, front_page
from workbook.site.render import (
    Heading,
    is_png,
    markdown_document,
    notebook_document,
    page,
)
from workbook.site.results import ResultsError, read_json

PAGES, FIGURES = "pages", "figures"


@dataclass(frozen=True)
class Page:
    """A page before it is written: address, title, HTML, a line about it, headings."""

    address: str
    title: str
    body: str
    about: str
    headings: Sequence[Heading]


def read_reports(folder: Path) -> list[Report]:
    """Executed notebooks of a folder by file name. Raises ValueError for a file that is none."""
    reports = []
    for path in sorted(folder.glob("*.ipynb")):
        notebook, _, run = path.stem.partition("-")
        reports.append(Report(path.stem, notebook, run, read_notebook(path)))
    return reports


def parameters_of(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Assignments of the cell that papermill injected into an executed notebook."""
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            return {
                cast(ast.Name, statement.targets[0]).id: ast.literal_eval(statement.value)
                for statement in ast.parse(cell.source).body
                if isinstance(statement, ast.Assign)
            }
    return {}


def run_facts(report: Report, results: Mapping[str, Any], seconds: Mapping[str, float]) -> dict:
    """Facts of a report's run: profile, model, seed, duration, and the run's environment."""
    given = parameters_of(report.content)
    rows = {
        "Notebook": f"notebooks/{report.notebook}.ipynb",
        "Profile": given.get("profile", results["run"]["profile"]),
        "Model": label(given.get("variant", "")),
        "Seed": str(given.get("seed", "")),
        "Duration": duration(seconds[report.stem]) if report.stem in seconds else "",
    }
    return {name: text for name, text in rows.items() if text} | environment(results["run"])


def relinked(url: str, folder: Path, pages: Path, places: Mapping[Path, str]) -> str:
    """Address on a page in `pages` of what a source in `folder` links to.

    Args:
        places: files that have become pages -> addresses of these.
    """
    target, mark, anchor = url.partition("#")
    if not target or ":" in target or target.startswith("/"):
        return url
    path = (folder / target).resolve()
    return (places.get(path) or os.path.relpath(path, pages).replace(os.sep, "/")) + mark + anchor


def build(root: Path) -> None:
    """Write the site of the project at `root`.

    Raises:
        ResultsError: a source is missing or broken.
    """
    reports_folder, docs, notebooks = root / "reports", root / "docs", root / "notebooks"
    if not (root / "metrics/results.json").exists():
        raise ResultsError("There is no metrics/results.json: run dvc repro.")
    results = read_json(root / "metrics/results.json")
    records = [read_json(path) for path in sorted((root / "metrics/seconds").glob("*.json"))]
    seconds = {record["report"]: record["seconds"] for record in records if "report" in record}
    reports, texts = read_reports(reports_folder), sorted(docs.glob("*.md"))
    pages = reports_folder / PAGES

    # Links between sources become links between pages; of many runs the first is meant.
    places = {reports_folder / f"{report.stem}.ipynb": report.address for report in reports}
    for report in reports:
        places.setdefault(notebooks / f"{report.notebook}.ipynb", report.address)
    places |= {path: f"{path.stem}.html" for path in texts}
    places |= {reports_folder / "index.html": "../index.html"}

    def relink(folder: Path):
        return lambda url: relinked(url, folder, pages, places)

    def store(picture: bytes) -> str:
        """A figure is kept once, however many pages show it."""
        kind = "png" if is_png(picture) else "svg"
        address = f"{FIGURES}/{sha256(picture).hexdigest()[:16]}.{kind}"
        (pages / address).write_bytes(picture)
        return address

    shutil.rmtree(pages, ignore_errors=True)
    (pages / FIGURES).mkdir(parents=True)
    made = []
    for report in reports:
        document = notebook_document(
            report.content, report.stem, notebooks, relink(notebooks), store
        )
        rows = run_facts(report, results, seconds)
        shown = [
            f"{key.lower()} {rows[key]}"
            for key in ("Profile", "Model", "Seed", "Duration")
            if key in rows
        ]
        title = f"{document.title}: {label(report.run)}" if report.run else document.title
        body = document.body + f'<h2 id="this-run">This run</h2>\n{facts(rows)}'
        headings = [*document.headings, (2, "this-run", "This run")]
        made.append(Page(report.address, title, body, f"This run: {', '.join(shown)}", headings))
    for path in texts:
        document = markdown_document(path.read_text("utf-8"), path.stem, docs, relink(docs))
        made.append(Page(f"{path.stem}.html", document.title, document.body, "", document.headings))
    neighbors = [None, *((one.address, one.title) for one in made), None]
    for one, before, after in zip(made, neighbors, neighbors[2:], strict=False):
        html = page(
            one.title,
            one.body,
            home="../index.html",
            before=before,
            after=after,
            about=one.about,
            headings=one.headings,
        )
        (pages / one.address).write_text(html, encoding="utf-8")

    more = [(f"{PAGES}/{one.address}", one.title) for one in made[len(reports) :]]
    if (reports_folder / "api/sitlib.html").exists():
        more.append(("api/sitlib.html", "API documentation, from the docstrings"))
    examples, overview = reports_folder / "examples.json", reports_folder / "overview.png"
    html = front_page(
        results,
        read_json(examples) if examples.exists() else None,
        overview.read_bytes() if overview.exists() else None,
        reports,
        more,
        PAGES,
        lambda picture: f"{PAGES}/{store(picture)}",
    )
    (reports_folder / "index.html").write_text(html, encoding="utf-8")
