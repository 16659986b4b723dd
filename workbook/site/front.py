"""The front page: the paper beside this run, the story in five sections, all reports, all numbers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import nbformat

from sitlib.metrics import GENERATION_METRICS, METRICS
from workbook.figures.tables import COLUMNS, Column, html_table
from workbook.names import label
from workbook.site.compare import BASELINE
from workbook.site.render import Store, aligned, data_uri, figure, notebook_title, page, picture_of

TITLE = "Spectral Image Tokenizer: a workbook"
ABOUT = """A wavelet transform turns an image into scales, coarse to fine, and each scale becomes the
same number of discrete codes, so that an autoregressive model writes an image from its rough outline to
its details. The workbook trains such tokenizers beside the usual one on patches of pixels (ViT-VQGAN),
trains a model over the codes of each, and reports what came out. After
<a href="https://arxiv.org/abs/2412.09607">Spectral Image Tokenizer</a> (Esteves, Suhail and Makadia,
ICCV 2025)."""
OVERVIEW_ALT = """A photograph, its wavelet pyramid cut into the same number of patches at every scale, the
codes of each scale as coloured cells, and the reconstruction from the codes."""

# Section: heading, its text, and the figures of executed notebooks that it shows (notebook, name).
WHAT = """A wavelet transform takes a photograph apart into scales: a small version of it, and the
details that each doubling of the size adds. SIT cuts every scale into the <strong>same number of
patches</strong> and replaces each patch by one code of a learned table. The finer a scale, the more
values share a code. ViT-VQGAN, the usual tokenizer, cuts the pixels themselves into patches."""
COARSE_TO_FINE = """The codes of a scale-causal tokenizer can be decoded from the coarsest scale on, so the
first codes of a sequence are already an image. A model that writes them one by one therefore draws from
coarse to fine."""
APPLICATIONS = """A model over coarse-to-fine codes can be given some scales and draw the others.
Upsampling draws the details of a small image: plausible, not right. Editing keeps the codes of the
coarse scales to the bit and draws the rest for another caption."""
COST = """A small image needs only the first scales, while the baseline always draws the whole image."""

# key of results.json -> caption, and columns
RECONSTRUCTION = (*METRICS, "fd_lite0", "usage")
GENERATION = ("r_precision_seen", "r_precision_held_out", *GENERATION_METRICS, "nats_per_token")
TABLES = {
    "tokenizers": ("Tokenizers on held-out photographs", RECONSTRUCTION),
    "generators": ("Class-conditional samples against held-out views", GENERATION),
    "captioned_tokenizers": ("Tokenizers of captioned images", RECONSTRUCTION),
    "text_generators": ("Text-conditional samples; right caption among 100", GENERATION),
}


@dataclass(frozen=True)
class Report:
    """An executed notebook: stem of its file, notebook that it is a run of, which run ("": only)."""

    stem: str
    notebook: str
    run: str
    content: nbformat.NotebookNode

    @property
    def address(self) -> str:
        return f"{self.stem}.html"


def duration(seconds: float) -> str:
    """Seconds for a reader: 41 s, 12 min 5 s, 2 h 3 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def facts(rows: Mapping[str, Any]) -> str:
    """A list of names and values."""
    items = [f"<dt>{name}</dt><dd>{escape(str(text))}</dd>" for name, text in rows.items()]
    return "<dl>\n" + "\n".join(items) + "\n</dl>"


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
        "Precision": "; ".join(dict.fromkeys(precisions)),
        "Versions": ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
        **({"Lock file": run["lock"]} if run.get("lock") else {}),
        "Gathered at commit": commit + (", with uncommitted changes" if dirty else ""),
    }


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n{body}\n</details>"


def _scrolling(table: str) -> str:
    return f'<div class="tables scroll">{aligned(table)}</div>'


def metrics_table(key: str, results: Mapping[str, Any]) -> str:
    """One table of results.json and, folded, how its numbers were measured."""
    caption, names = TABLES[key]
    group, protocol = results[key], results["protocol"].get(key, {})
    columns = [(k, COLUMNS[k]) for k in names if any(k in row for row in group.values())]
    rows = [
        {"model": label(variant)}
        | {column.arrow: _scaled(row.get(k), column) for k, column in columns}
        for variant, row in group.items()
    ]
    seeds = max(value["seeds"] for row in group.values() for value in row.values())
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    digits = {column.arrow: column.digits for _, column in columns}
    best = {column.arrow: column.best for _, column in columns if column.best}
    table = html_table(rows, f"{caption}; {spread}", digits=digits, best=best)
    items = "".join(
        f"<li>{escape(name.replace('_', ' ') + ': ' + _text(value))}</li>"
        for name, value in protocol.items()
    )
    return _scrolling(table) + _details("How this was measured", f"<ul>{items}</ul>")


def _scaled(value: Mapping[str, Any] | None, column: Column) -> dict[str, Any]:
    """Mean and deviation of results.json in the unit of the column."""
    return {k: v and v * column.factor for k, v in (value or {}).items()}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def report_list(reports: Sequence[Report], folder: str) -> str:
    """A card for every notebook, with the first sentence of its claim and links to its runs."""
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(report.notebook, []).append(report)
    cards = []
    for runs in groups.values():
        source = runs[0].content.cells[0].source if runs[0].content.cells else ""
        claim = " ".join(source.partition("**Claim.**")[2].partition("\n\n")[0].split())
        sentence, stop, _ = claim.replace("*", "").replace("`", "").partition(". ")
        text = f"<p>{escape(sentence + stop.strip())}</p>"
        title = escape(notebook_title(runs[0].content, runs[0].stem))

        def link(run: Report, text: str) -> str:
            return f'<a href="{folder}/{escape(run.address)}">{text}</a>'

        if len(runs) == 1:
            cards.append(f"<li>{link(runs[0], title)}{text}</li>")
        else:
            items = "".join(f"<li>{link(run, escape(label(run.run)))}</li>" for run in runs)
            folded = _details(f"{len(runs)} runs", f"<ul>{items}</ul>")
            cards.append(f"<li>{title}{text}{folded}</li>")
    return '<ul class="reports">\n' + "\n".join(cards) + "\n</ul>"


def compare_exhibit(examples: Mapping[str, Any]) -> str:
    """A line to move between two versions of a photograph; report.js brings it to life."""
    names = list(examples["names"])
    right = next((name for name in ("sit5", "sit4") if name in names), names[-1])
    left = BASELINE if BASELINE in names else names[0]
    first = examples["photographs"][0]

    def options(default: str) -> str:
        return "".join(
            f'<option value="{name}"{" selected" * (name == default)}>{escape(text)}</option>'
            for name, text in examples["names"].items()
        )

    def image(name: str, kind: str) -> str:
        alt = escape(f"{first['name']}, {examples['names'][name]}")
        source = first["images"][name]["png"]
        return f'<img class="{kind}" src="{source}" width="448" height="448" alt="{alt}">'

    return (
        '<section class="exhibit" id="compare" data-compare aria-labelledby="compare-title">'
        '<h3 id="compare-title">Compare reconstructions</h3><p>Held-out photographs, the first of '
        "each class, nothing picked. Drag the line, or use the arrow keys.</p>"
        "<fieldset data-photographs><legend>Photograph</legend></fieldset>"
        f'<div class="sides"><label>Left <select data-left>{options(left)}</select></label>'
        f"<label>Right <select data-right>{options(right)}</select></label></div>"
        f'<div class="compare">{image(right, "under")}{image(left, "over")}<span class="line">'
        '</span><span class="tag left"></span><span class="tag right"></span><input type="range" '
        'min="0" max="100" value="50" aria-label="Place of the line between left and right"></div>'
        '<p data-said aria-live="polite"></p></section>'
    )


def scale_exhibit(examples: Mapping[str, Any]) -> str:
    """A slider for the number of scales that are decoded, beside the original."""
    first, name = examples["photographs"][0], escape(examples["names"][examples["scales_of"]])
    steps, alt = first["scales"], escape(first["name"])
    shown = min(3, len(steps))
    return (
        '<section class="exhibit scales" id="scales" data-scales aria-labelledby="scales-title">'
        f'<h3 id="scales-title">Decode the first scales of {name}</h3><p>The codes of a photograph, '
        "cut off after one scale, two scales and so on. Pixels are enlarged, not smoothed.</p>"
        "<fieldset data-photographs><legend>Photograph</legend></fieldset>"
        '<div class="sides"><label for="scale-count">Scales</label><input type="range" '
        f'id="scale-count" min="1" max="{len(steps)}" value="{shown}" step="1"></div>'
        '<p data-said aria-live="polite"></p><div class="pair"><div><img class="pixels" data-partial '
        f'src="{steps[shown - 1]["png"]}" width="320" height="320" '
        f'alt="{alt} from its first scales">Decoded</div><div><img class="pixels" data-original '
        f'src="{first["images"]["original"]["png"]}" width="320" height="320" '
        f'alt="{alt}, original">Original</div></div></section>'
    )


def front_page(
    results: Mapping[str, Any],
    examples: Mapping[str, Any] | None,
    overview: bytes | None,
    reports: Sequence[Report],
    more: Iterable[tuple[str, str]],
    folder: str,
    store: Store = data_uri,
) -> str:
    """The front page as HTML.

    Args:
        results: content of results.json.
        examples: content of examples.json, for the sliders.
        overview: PNG of the picture that explains the project.
        more: address and title of further pages.
        folder: address of the reports' pages.
        store: where figures go.
    """
    parts, headings = [f"<h1>{TITLE}</h1>", f"<p>{ABOUT}</p>"], []
    by_notebook = {report.notebook: report for report in reversed(reports)}
    numbers = iter(range(1, 100))

    def section(key: str, title: str, *bodies: str) -> None:
        if any(bodies):
            headings.append((2, key, title))
            parts.extend([f'<h2 id="{key}">{title}</h2>', *bodies])

    def reused(notebook: str, name: str) -> str:
        """The figure of this name in an executed notebook, with a link to its page."""
        report = by_notebook.get(notebook)
        for cell in report.content.cells if report else []:
            for output in cell.get("outputs", []):
                picture = picture_of(output)
                if report and picture and picture[1].get("name") == name:
                    data, about = picture
                    link = f'<a href="{folder}/{report.address}">where it comes from</a>'
                    caption = f"{escape(about.get('caption', ''))} More: {link}."
                    return figure(data, about["alt"], next(numbers), caption, store)
        return ""

    run = results["run"]
    if results["headline"]:
        caption = (
            "Against ViT-VQGAN, or the model over its codes: differences in dB, else ratios (x)"
        )
        table = html_table(results["headline"], caption).replace("<table>", '<table class="wrap">')
        note = (
            "<p>Relative changes only: the paper measures ImageNet and MS-COCO at 256 px with "
            "generators of 350 to 650 million parameters, this run the images of the profile "
            f"{escape(run['profile'])} with small ones. Distance is FID in the paper and FD-Lite0 "
            "here; the paper's text-conditional model has the scale-causal decoder alone and reads "
            "captions of photographs, ours of emoji. Images a second are of the paper's sizes with a "
            "transformer small enough for this machine and random weights. Brackets: 95 % over "
            "photographs. ↑: higher is better; ↓: lower is better.</p>"
        )
        section("headline", "The paper and this run", _scrolling(table), note)
    if overview:
        caption = "A photograph on its way through the tokenizer; patches of each scale in orange."
        picture = figure(overview, " ".join(OVERVIEW_ALT.split()), next(numbers), caption, store)
        section("what", "What SIT is", f"<p>{WHAT}</p>", picture)
    section(
        "reconstruction",
        "Reconstruction",
        compare_exhibit(examples) if examples else "",
        reused("02b_tokenizer_results", "against-baseline"),
    )
    has_scales = examples is not None and examples["scales_of"]
    section(
        "generation",
        "From coarse to fine",
        f"<p>{COARSE_TO_FINE}</p>",
        scale_exhibit(examples) if examples and has_scales else "",
        reused("03b_generation_results", "film"),
    )
    applications = [reused("05a_applications", name) for name in ("upsampling", "editing")]
    section("applications", "Upsampling and editing", f"<p>{APPLICATIONS}</p>", *applications)
    section("cost", "Cost", f"<p>{COST}</p>", reused("03c_sampling_speed", "throughput"))
    section("reports", "Reports", report_list(reports, folder))
    items = [f'<li><a href="{escape(url)}">{escape(title)}</a></li>' for url, title in more]
    section("more", "Further pages", '<ul class="more">' + "".join(items) + "</ul>")
    tables = [metrics_table(key, results) for key in TABLES if results.get(key)]
    section("numbers", "All numbers", *tables)

    seconds = run["seconds"]
    stages = [{"stage": name, "seconds": float(value)} for name, value in seconds.items()]
    total = f"{duration(sum(seconds.values()))} for all {len(seconds)} stages together"
    rows = {"Profile": run["profile"], "Time": total, **environment(run)}
    times = _scrolling(html_table(stages, "Wall time of each stage", digits=1))
    section("run", "This run", facts(rows), _details("Time of each stage", times))
    if examples:
        text = json.dumps(examples).replace("</", "<\\/")
        parts.append(f'<script type="application/json" id="examples">{text}</script>')
    return page(TITLE, "\n".join(parts), headings=headings)
