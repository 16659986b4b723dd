"""The front page of the report site: the paper beside this run, the story, a card for every report, all numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import yaml

from workbook.reporting.exhibits import embedded
from workbook.reporting.names import label
from workbook.reporting.page import Place, aligned, inline, notebook_title, page
from workbook.reporting.story import Results, headline_rows, story
from workbook.reporting.tables import html_table

TITLE = "Spectral Image Tokenizer: a workbook"
ABOUT = """An image is turned by a wavelet transform into scales, coarse to fine, and each scale into the same
number of discrete codes, so that an autoregressive model can write an image from its rough outline to its
details. The workbook trains such tokenizers beside the usual one on patches of pixels (ViT-VQGAN), trains a
model over the codes of each, and reports what came out."""
SOURCE = '<a href="https://arxiv.org/abs/2412.09607">Spectral Image Tokenizer</a> (Esteves, Suhail and Makadia, ICCV 2025)'
PAGES, API, FIGURES = (
    "pages",
    "api",
    "figures",
)  # folders beside the front page, and one of its pages
CAPTIONS = yaml.safe_load(Path(__file__).with_name("captions.yaml").read_text(encoding="utf-8"))

# key in the headline -> (column, decimals, which is better)
TOKENIZER_COLUMNS = {
    "psnr": ("PSNR, dB ↑", 2, "max"),
    "lpips_alex": ("LPIPS-Alex ↓", 3, "min"),
    "lpips_vgg": ("LPIPS-VGG ↓", 3, "min"),
    "usage": ("codes used, % ↑", 1, "max"),
}
GENERATION_COLUMNS = {
    "fd_lite0": ("FD-Lite0 ↓", 1, "min"),
    "kid": ("KID-Lite0 ↓", 4, "min"),
    "precision": ("precision ↑", 2, "max"),
    "recall": ("recall ↑", 2, "max"),
    # Not ranked: codes of different tokenizers do not carry the same information.
    "nats_per_token": ("nats per token", 3, None),
}
TEXT_COLUMNS = {
    "r_precision_seen": ("R-precision, seen names, % ↑", 1, "max"),
    "r_precision_held_out": ("R-precision, new names, % ↑", 1, "max"),
    **GENERATION_COLUMNS,
}


@dataclass(frozen=True)
class Report:
    """An executed notebook: its file's stem, the notebook that it is a run of, and which run ("" where there is one)."""

    stem: str
    notebook: str
    run: str
    content: nbformat.NotebookNode

    @property
    def address(self) -> str:
        return f"{self.stem}.html"


def metrics_table(
    results: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, tuple[str, int, str | None]],
    caption: str,
    protocol: Mapping[str, Any],
) -> str:
    """Table of a section of the headline, one variant a row, and under it how the numbers were measured."""
    present = {
        key: spec for key, spec in columns.items() if any(key in row for row in results.values())
    }
    rows = [
        {"model": label(variant), **{name: values.get(key) for key, (name, *_) in present.items()}}
        for variant, values in results.items()
    ]
    seeds = sorted({value["seeds"] for row in results.values() for value in row.values()})
    several = f"mean ± standard deviation over {' or '.join(map(str, seeds))} seeds"
    caption = f"{caption}; {several if seeds[-1:] > [1] else 'one seed'}"
    best = {name: direction for name, _, direction in present.values() if direction}
    digits = {name: number for name, number, _ in present.values()}
    table = html_table(rows, caption, digits=digits, best=best)
    return f"{_scrolling(table)}\n{_protocol(protocol)}"


def _scrolling(table: str) -> str:
    return f'<div class="tables scroll">{aligned(table)}</div>'


def _protocol(protocol: Mapping[str, Any]) -> str:
    if not protocol:
        return ""
    items = [f"{key.replace('_', ' ')}: {_text(value)}" for key, value in protocol.items()]
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<details><summary>How this was measured</summary><ul>{listed}</ul></details>"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def duration(seconds: float) -> str:
    """Seconds as a reader would say them: 41 s, 12 min 5 s, 2 h 3 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _hardware(machine: Mapping[str, Any]) -> str:
    memory = f", {machine['memory_gib']:g} GiB of memory" if machine["memory_gib"] else ""
    return f"{machine['cpu']}, {machine['logical_cores']} logical cores{memory}, {machine['gpu'] or 'no GPU'}"


def _precision(wanted: str, machine: Mapping[str, Any]) -> str:
    found = machine["auto_precision"] if wanted == "auto" else wanted
    return "float32" if found == "no" else f"{found} in training, float32 elsewhere"


def environment(headline: Mapping[str, Any]) -> dict[str, str]:
    commit, dirty, _ = headline["revision"].partition("-dirty")
    machines = headline["hardware"]
    return {
        "Hardware": "; ".join(map(_hardware, machines)),
        "Precision": "; ".join(
            dict.fromkeys(_precision(headline["precision"], each) for each in machines)
        ),
        "Versions": ", ".join(f"{name} {number}" for name, number in headline["versions"].items()),
        "Commit": f"{commit}{', with changes that were not committed' if dirty else ''}, when the results were gathered",
    }


def fact_list(facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"<dt>{name}</dt><dd>{escape(str(text))}</dd>" for name, text in facts.items())
    return f"<dl>\n{rows}\n</dl>"


def _facts(headline: Mapping[str, Any]) -> str:
    seconds = headline["seconds"]
    facts = {
        "Profile": headline["profile"],
        "Time": f"{duration(sum(seconds.values()))} for all {len(seconds)} stages together",
        **environment(headline),
    }
    stages = [{"stage": name, "seconds": float(value)} for name, value in seconds.items()]
    times = html_table(stages, "Wall time of each stage", digits=1) if stages else ""
    return f"{fact_list(facts)}\n<details><summary>Time of each stage</summary>\n{_scrolling(times)}\n</details>"


def _claim(notebook: nbformat.NotebookNode) -> str:
    """First sentence of the claim with which a notebook begins, as plain text."""
    source = notebook.cells[0].source if notebook.cells else ""
    text = (
        " ".join(source.partition("**Claim.**")[2].partition("\n\n")[0].split())
        .replace("*", "")
        .replace("`", "")
    )
    first, stop, _ = text.partition(". ")
    return f"{first}{stop.strip()}"


def _links(reports: Sequence[Report]) -> str:
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(report.notebook, []).append(report)
    parts = []
    for runs in groups.values():
        title, claim = (
            escape(notebook_title(runs[0].content, runs[0].stem)),
            f"<p>{escape(_claim(runs[0].content))}</p>",
        )
        if len(runs) == 1:
            parts.append(f'<li><a href="{PAGES}/{escape(runs[0].address)}">{title}</a>{claim}</li>')
        else:
            links = [
                f'<a href="{PAGES}/{escape(run.address)}">{escape(label(run.run) or run.stem)}</a>'
                for run in runs
            ]
            parts.append(
                f"<li>{title}{claim}<details><summary>{len(runs)} runs</summary><ul>"
                + "".join(f"<li>{link}</li>" for link in links)
                + "</ul></details></li>"
            )
    if not parts:
        return "<p>No report yet: run <code>dvc repro</code>.</p>"
    return '<ul class="reports">\n' + "\n".join(parts) + "\n</ul>"


def front_page(
    results: Results,
    reports: Sequence[Report],
    more: Mapping[str, str],
    place: Place = inline,
) -> str:
    """The front page as HTML.

    Args:
        more: addresses of further pages -> their titles.
        place: where figures go.
    """
    headline, headings = results.headline, []
    protocol, parts = headline["protocol"], [f"<h1>{TITLE}</h1>", f"<p>{ABOUT} After {SOURCE}.</p>"]

    def section(key: str, title: str, *bodies: str) -> None:
        headings.append((2, key, title))
        parts.extend([f'<h2 id="{key}">{title}</h2>', *bodies])

    first: dict[str, str] = {}
    for report in reports:
        first.setdefault(report.notebook, f"{PAGES}/{report.address}")
    if rows := headline_rows(results):
        note = (
            "<p>Relative changes only: the paper measures ImageNet and MS-COCO at 256 px with generators of 350 to 650 million "
            f"parameters, this run the images of the profile {escape(headline['profile'])} with small ones. Distance is FID in the "
            "paper and FD-Lite0 here; the paper's text-conditional model has the scale-causal decoder alone (AR-SIT-SCD-4) and reads "
            "captions of photographs, ours of emoji. Images a second are of the paper's sizes, 256 px and 1,024 tokens, with a transformer "
            "small enough for this machine and random weights. Brackets: 95 % over photographs. ↑: higher is better; ↓: lower is "
            "better.</p>"
        )
        table = html_table(
            rows,
            "Against ViT-VQGAN, or the model over its codes: differences in dB, all else ratios (x)",
        )
        section(
            "headline",
            "The paper and this run",
            _scrolling(table.replace("<table>", '<table class="wrap">')),
            note,
        )
    for number, (key, title, body) in enumerate(story(results, first, CAPTIONS, place), 1):
        section(key, f"{number}. {title}", body)
    section("reports", "Reports", _links(reports))
    if more:
        items = "".join(
            f'<li><a href="{escape(url)}">{escape(title)}</a></li>' for url, title in more.items()
        )
        section("more", "Further pages", f'<ul class="more">{items}</ul>')
    section("numbers", "All numbers")
    if tokenizers := headline["tokenizer"]:
        caption = "Tokenizers on held-out photographs"
        table = metrics_table(tokenizers, TOKENIZER_COLUMNS, caption, protocol["tokenizer"])
        parts += ["<h3>Reconstruction</h3>", table]
    if generators := headline["generation"]["class"]:
        caption = "Class-conditional samples against held-out views"
        table = metrics_table(generators, GENERATION_COLUMNS, caption, protocol["generation"])
        parts += ["<h3>Generation</h3>", table]
    if texts := headline["generation"]["text"]:
        caption = "Text-conditional samples for captions of emoji; right caption among 100"
        parts += [
            "<h3>Generation from texts</h3>",
            metrics_table(texts, TEXT_COLUMNS, caption, protocol["text"]),
        ]
    if tokenizers := headline["text_tokenizer"]:
        caption = "Their tokenizers on held-out emoji"
        parts.append(
            metrics_table(tokenizers, TOKENIZER_COLUMNS, caption, protocol["text_tokenizer"])
        )
    section("run", "This run", _facts(headline))
    if results.examples:
        parts.append(embedded(results.examples))
    return page(TITLE, "\n".join(parts), headings=headings)
