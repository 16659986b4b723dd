"""The report site: `python -m workbook.reporting.site` writes reports/index.html and reports/pages from what the pipeline has left.

It reads the executed notebooks beside the front page, the metrics, the examples and docs/*.md; it runs no model and no notebook, so a
change of style is seconds. `workbook.reporting.api` writes the API documentation beside it.
"""

import argparse
import ast
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any, cast

import nbformat

from workbook.paths import resolve
from workbook.reporting.canonical import UNREADABLE
from workbook.reporting.front import (
    API,
    CAPTIONS,
    FIGURES,
    PAGES,
    Report,
    duration,
    environment,
    fact_list,
    front_page,
)
from workbook.reporting.headline import HeadlineError, read_json, runs_of
from workbook.reporting.names import label
from workbook.reporting.page import (
    Heading,
    Links,
    Place,
    is_png,
    markdown_document,
    notebook_document,
    page,
)
from workbook.reporting.story import Results


def find_reports(folder: Path) -> list[Report]:
    """The executed notebooks of `folder` by file name. Raises HeadlineError for a file that is none."""
    reports = []
    for path in sorted(folder.glob("*.ipynb")):
        notebook, _, run = path.stem.partition("-")
        try:
            content = cast(nbformat.NotebookNode, nbformat.read(path, as_version=4))
        except UNREADABLE as error:
            raise HeadlineError(
                f"{path} is not a readable notebook; restore it from git."
            ) from error
        reports.append(Report(path.stem, notebook, run, content))
    return reports


def parameters_of(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """What the runner set in an executed notebook: the assignments of its cell tagged `injected-parameters`."""
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            return {
                cast(ast.Name, statement.targets[0]).id: ast.literal_eval(statement.value)
                for statement in ast.parse(cell.source).body
                if isinstance(statement, ast.Assign)
            }
    return {}


def run_facts(
    report: Report, headline: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, str]:
    """What a report was made with: profile, variant, seed, duration, and what is known of the whole run."""
    given = parameters_of(report.content)
    facts = {
        "Notebook": f"notebooks/{report.notebook}.ipynb",
        "Profile": given.get("profile", headline["profile"]),
    }
    if "variant" in given:
        facts["Model"] = label(given["variant"])
    if "seed" in given:
        facts["Seed"] = str(given["seed"])
    if report.stem in seconds:
        facts["Duration"] = duration(seconds[report.stem])
    return facts | environment(headline)


def caption_of(notebook: str, alt: str) -> str:
    """Caption in HTML of a figure of a notebook, which its text alternative tells; the alternative itself where there is none."""
    for begins, caption in CAPTIONS.get(notebook, {}).items():
        if alt.startswith(begins):
            return caption
    return escape(alt)


def relinked(url: str, folder: Path, pages: Path, places: Mapping[Path, str]) -> str:
    """Address on a page in `pages` of what a source in `folder` links to; `places`: files that have become pages -> these."""
    target, mark, anchor = url.partition("#")
    if not target or ":" in target or target.startswith("/"):
        return url
    path = (folder / target).resolve()
    return (places.get(path) or os.path.relpath(path, pages).replace(os.sep, "/")) + mark + anchor


def read_results(
    headline: Mapping[str, Any], metrics: Path, folder: Path, reports: Sequence[Report]
) -> Results:
    """Everything that the front page tells of: metrics in the folder `metrics`, the rest in the folder of the front page."""

    def optional(path: Path) -> dict[str, Any] | None:
        return read_json(path) if path.exists() else None

    def listed(name: str, variants: Mapping[str, Any]) -> dict[str, list]:
        found = runs_of(metrics / name, None)
        return {variant: found[variant] for variant in variants if variant in found}

    overview = folder / "overview.png"
    return Results(
        headline=headline,
        tokenizers=listed("tokenizer", headline["tokenizer"]),
        generation=listed("generation", headline["generation"]["class"]),
        text=listed("text", headline["generation"]["text"]),
        throughput=optional(metrics / "throughput.json"),
        applications=optional(metrics / "applications.json"),
        examples=optional(folder / "examples.json"),
        overview=overview.read_bytes() if overview.exists() else None,
        notebooks={report.stem: report.content for report in reports},
    )


@dataclass(frozen=True)
class _Page:
    """A page before it is written: its file, title, HTML, a line about it, and headings."""

    address: str
    title: str
    body: str
    about: str
    headings: Sequence[Heading]


def _report_page(report: Report, facts: Mapping[str, str], links: Links, place: Place) -> _Page:
    made = notebook_document(
        report.content,
        report.stem,
        links=links,
        captions=lambda alt: caption_of(report.notebook, alt),
        place=place,
    )
    title = f"{made.title}: {label(report.run)}" if report.run else made.title
    about = ", ".join(
        f"{key.lower()} {facts[key]}"
        for key in ("Profile", "Model", "Seed", "Duration")
        if key in facts
    )
    body = made.body + f'<h2 id="this-run">This run</h2>\n{fact_list(facts)}'
    return _Page(
        report.address,
        title,
        body,
        f"This run: {about}",
        [*made.headings, (2, "this-run", "This run")],
    )


def build(output: Path, headline_file: Path, docs: Path) -> None:
    """Write the front page `output` and `pages/` beside it.

    Raises FileNotFoundError where there is no headline, HeadlineError where a source is broken.
    """
    headline, folder, metrics = read_json(headline_file), output.parent, headline_file.parent
    reports, pages = find_reports(folder), folder / PAGES
    times = [read_json(path) for path in sorted((metrics / "seconds").glob("*.json"))]
    seconds = {record["report"]: record["seconds"] for record in times if "report" in record}
    texts = sorted(docs.glob("*.md"))
    notebooks = folder.resolve().parent / "notebooks"
    places = {(folder / f"{report.stem}.ipynb").resolve(): report.address for report in reports}
    for report in (
        reports
    ):  # notebooks link each other where their sources lie; of many runs the first is meant
        places.setdefault(notebooks / f"{report.notebook}.ipynb", report.address)
    places |= {path.resolve(): f"{path.stem}.html" for path in texts}
    places[output.resolve()] = f"../{output.name}"

    def links(source: Path) -> Links:
        return lambda url: relinked(url, source, pages.resolve(), places)

    def place(picture: bytes) -> str:
        """A figure is kept once, however many reports show it."""
        name = f"{FIGURES}/{sha256(picture).hexdigest()[:16]}.{'png' if is_png(picture) else 'svg'}"
        (pages / name).write_bytes(picture)
        return name

    shutil.rmtree(pages, ignore_errors=True)
    (pages / FIGURES).mkdir(parents=True)
    made = [
        _report_page(report, run_facts(report, headline, seconds), links(notebooks), place)
        for report in reports
    ]
    for path in texts:
        document = markdown_document(
            path.read_text(encoding="utf-8"), path.stem, path.parent, links(path.parent)
        )
        made.append(
            _Page(f"{path.stem}.html", document.title, document.body, "", document.headings)
        )
    ways = [None, *((one.address, one.title) for one in made), None]
    for one, before, after in zip(made, ways, ways[2:], strict=False):
        text = page(
            one.title,
            one.body,
            home=f"../{output.name}",
            before=before,
            after=after,
            about=one.about,
            headings=one.headings,
            has_code='<details class="code"' in one.body,
        )
        (pages / one.address).write_text(text, encoding="utf-8")
    more = {f"{PAGES}/{one.address}": one.title for one in made[len(reports) :]}
    more |= {f"{API}/sitlib.html": "API documentation, from the docstrings"}
    results = read_results(headline, metrics, folder, reports)
    text = front_page(results, reports, more, lambda picture: f"{PAGES}/{place(picture)}")
    output.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m workbook.reporting.site", description=about)
    parser.add_argument(
        "--output",
        default="reports/index.html",
        help="front page; executed notebooks lie beside it",
    )
    parser.add_argument(
        "--headline", default="metrics/headline.json", help="the other metrics lie beside it"
    )
    parser.add_argument("--docs", default="docs", help="folder of further pages in Markdown")
    options = parser.parse_args(arguments)
    if not resolve(options.headline).exists():
        print(f"There is no {options.headline}: run dvc repro.", file=sys.stderr)
        return 1
    try:
        build(resolve(options.output), resolve(options.headline), resolve(options.docs))
    except HeadlineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
