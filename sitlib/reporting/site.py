"""The front page of the reports: `python -m sitlib.reporting.site --output reports/index.html`.

The headline as tables, what it was measured on, and a link to every report beside the page.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

from sitlib.paths import resolve
from sitlib.reporting.headline import HeadlineError, read_json
from sitlib.reporting.names import label
from sitlib.reporting.page import page
from sitlib.reporting.tables import html_table

TITLE = "Spectral Image Tokenizer: a workbook"
ABOUT = """An image is turned by a wavelet transform into scales, coarse to fine, and each scale into the same
number of discrete codes, so that an autoregressive model can write an image from its rough outline to its
details. The workbook trains such tokenizers beside the usual one on patches of pixels (ViT-VQGAN), trains a
model over the codes of each, and reports what came out."""
SOURCE = '<a href="https://arxiv.org/abs/2412.09607">Spectral Image Tokenizer</a> (Esteves et al., 2024)'

OVERVIEW_ALT = (
    "A photograph, its wavelet pyramid cut into the same number of patches at every scale, the codes of each scale "
    "as coloured cells, and the reconstruction from the codes."
)

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
    """One HTML report: its file, the notebook it is a run of, the notebook's title, and which run it is."""

    file: str
    notebook: str
    title: str
    run: str


def find_reports(folder: Path) -> list[Report]:
    """The reports of `folder` by file name, without the front page itself."""
    reports = []
    for path in sorted(folder.glob("*.html")):
        if path.name == "index.html":
            continue
        with path.open(encoding="utf-8") as file:
            head = file.read(4096)  # the shell puts metadata and title first
        values = dict(re.findall(r'<meta name="(notebook|heading)" content="([^"]*)">', head))
        notebook = unescape(values.get("notebook", path.stem))
        run = path.stem.removeprefix(notebook).strip("-")
        reports.append(Report(path.name, notebook, unescape(values.get("heading", path.stem)), run))
    return reports


def metrics_table(
    results: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, tuple[str, int, str | None]],
    caption: str,
    protocol: Mapping[str, Any],
) -> str:
    """Table of a section of the headline, one variant a row, and under it how the numbers were measured."""
    present = {key: spec for key, spec in columns.items() if any(key in row for row in results.values())}
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
    return f'<div class="tables">{table}</div>\n{_protocol(protocol)}'


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


def _facts(headline: Mapping[str, Any]) -> str:
    machine = headline["hardware"]
    memory = f", {machine['memory_gib']:g} GiB of memory" if machine["memory_gib"] else ""
    gpu = machine["gpu"] or "no GPU"
    seconds = headline["seconds"]
    facts = {
        "Profile": headline["profile"],
        "Hardware": f"{machine['cpu']}, {machine['logical_cores']} logical cores{memory}, {gpu}",
        "Time": f"{duration(sum(seconds.values()))} for all {len(seconds)} stages together",
        "Versions": ", ".join(f"{name} {number}" for name, number in headline["versions"].items()),
        "Revision": headline["revision"],
    }
    rows = "\n".join(f"<dt>{name}</dt><dd>{escape(str(text))}</dd>" for name, text in facts.items())
    stages = [{"stage": name, "seconds": float(value)} for name, value in seconds.items()]
    times = html_table(stages, "Wall time of each stage", digits=1) if stages else ""
    return f"<dl>\n{rows}\n</dl>\n<details><summary>Time of each stage</summary>\n{times}\n</details>"


def _links(reports: Sequence[Report]) -> str:
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(report.notebook, []).append(report)
    parts = []
    for runs in groups.values():
        title = runs[0].title
        if len(runs) == 1:
            parts.append(f'<li><a href="{escape(runs[0].file)}">{escape(title)}</a></li>')
        else:
            links = [f'<a href="{escape(run.file)}">{escape(label(run.run) or title)}</a>' for run in runs]
            parts.append(f"<li>{escape(title)}: {', '.join(links)}</li>")
    if not parts:
        return "<p>No report yet: run <code>dvc repro</code>.</p>"
    return '<ul class="reports">\n' + "\n".join(parts) + "\n</ul>"


def front_page(headline: Mapping[str, Any], reports: Sequence[Report], overview: str | None = None) -> str:
    """The whole page as HTML; `overview` is the file, beside it, that `sitlib.reporting.overview` draws."""
    protocol = headline["protocol"]
    parts = [f"<h1>{TITLE}</h1>", f"<p>{ABOUT} After {SOURCE}.</p>"]
    if overview is not None:
        parts.append(f'<p><img src="{escape(overview)}" alt="{OVERVIEW_ALT}"></p>')
    if tokenizers := headline["tokenizer"]:
        caption = "Tokenizers on held-out photographs"
        table = metrics_table(tokenizers, TOKENIZER_COLUMNS, caption, protocol["tokenizer"])
        parts += ["<h2>Reconstruction</h2>", table]
    if generators := headline["generation"]["class"]:
        caption = "Class-conditional samples against held-out views"
        table = metrics_table(generators, GENERATION_COLUMNS, caption, protocol["generation"])
        parts += ["<h2>Generation</h2>", table]
    if texts := headline["generation"]["text"]:
        caption = "Text-conditional samples for captions of emoji; right caption among 100"
        parts += [
            "<h2>Generation from texts</h2>",
            metrics_table(texts, TEXT_COLUMNS, caption, protocol["text"]),
        ]
    if tokenizers := headline["text_tokenizer"]:
        caption = "Their tokenizers on held-out emoji"
        parts.append(metrics_table(tokenizers, TOKENIZER_COLUMNS, caption, protocol["text_tokenizer"]))
    parts += ["<h2>Reports</h2>", _links(reports), "<h2>This run</h2>", _facts(headline)]
    return page(TITLE, "\n".join(parts))


def main(arguments: Sequence[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m sitlib.reporting.site", description=about)
    parser.add_argument("--output", required=True, help="HTML file to write; it links the reports beside it")
    parser.add_argument("--headline", default="metrics/headline.json")
    options = parser.parse_args(arguments)
    output, source = resolve(options.output), resolve(options.headline)
    try:
        headline = read_json(source)
    except FileNotFoundError:
        print(f"There is no {options.headline}: run dvc repro.", file=sys.stderr)
        return 1
    except HeadlineError as error:
        print(error, file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = "overview.png" if output.with_name("overview.png").exists() else None
    output.write_text(front_page(headline, find_reports(output.parent), picture), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
