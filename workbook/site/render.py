"""Notebooks and Markdown -> HTML pages that load nothing from outside, in light and in dark."""

import base64
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape, unescape
from pathlib import Path

import nbformat
from jinja2 import DictLoader, pass_context
from latex2mathml.converter import convert as mathml
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from workbook.figures.core import DPI

HERE = Path(__file__).parent
STYLE = (HERE / "report.css").read_text(encoding="utf-8").strip()
SCRIPT = (HERE / "report.js").read_text(encoding="utf-8").strip()
TEMPLATE = (HERE / "report.html.j2").read_text(encoding="utf-8")

Relink = Callable[[str], str]  # address in a source -> address on the page
Store = Callable[[bytes], str]  # puts a PNG or SVG somewhere and returns its address on the page
Heading = tuple[int, str, str]  # level, id, HTML of the text


@dataclass(frozen=True)
class Document:
    """A rendered source: its title, HTML, and headings of levels 2 and 3."""

    title: str
    body: str
    headings: Sequence[Heading]


def page(
    title: str,
    body: str,
    *,
    home: str = "",
    before: tuple[str, str] | None = None,
    after: tuple[str, str] | None = None,
    about: str = "",
    headings: Sequence[Heading] = (),
) -> str:
    """Whole HTML document around `body`.

    Args:
        home: address of the front page, empty on the front page itself.
        before, after: address and title of the neighbouring pages.
        about: a line below the first heading.
        headings: of the table of contents, which comes next.
    """
    links = [
        f'<a href="{escape(home)}">All reports</a>'
        if home
        else "<span>Spectral Image Tokenizer</span>"
    ]
    foot = []
    for rel, word, way in (("prev", "Previous", before), ("next", "Next", after)):
        if way:
            address, name = escape(way[0]), escape(way[1])
            number = f"<i>{name.partition(' · ')[0]}</i>"
            text = f"<span>←</span> {number}" if rel == "prev" else f"{number} <span>→</span>"
            links.append(f'<a rel="{rel}" href="{address}" aria-label="{word}: {name}">{text}</a>')
            foot.append(f'<a rel="{rel}" href="{address}"><span>{word}</span> {name}</a>')
    buttons = '<button type="button" data-theme-switch hidden>Dark</button>'
    if '<details class="code"' in body:
        buttons = (
            '<button type="button" data-code aria-pressed="false">Show code</button>' + buttons
        )
    contents = "".join(
        f'<li class="level-{level}"><a href="#{key}">{re.sub("<[^>]+>", "", text)}</a></li>'
        for level, key, text in headings
    )
    if contents:
        contents = (
            '<nav class="contents" aria-label="Contents"><details open><summary>Contents</summary>'
            f"<ul>{contents}</ul></details></nav>"
        )
    line = f'<p class="run">{escape(about)}</p>' if about else ""
    body = body.replace("</h1>", f"</h1>\n{line}\n{contents}", 1)
    neighbors = (
        f'<footer><nav aria-label="Neighbours">{"".join(foot)}</nav></footer>' if foot else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_code_style()}\n{STYLE}\n</style>\n</head>\n"
        '<body>\n<a class="skip" href="#main">To the text</a>\n'
        f'<header class="bar"><nav aria-label="Pages">{"".join(links)}</nav>'
        f"<div>{buttons}</div></header>\n"
        f'<main id="main">\n<article>\n{body}\n</article>\n</main>\n{neighbors}\n'
        f"<script>\n{SCRIPT}\n</script>\n</body>\n</html>\n"
    )


@cache
def _code_style() -> str:
    """Colours of code in light and in dark, switched as report.css switches the rest."""

    def colours(name: str, prefix: str) -> str:
        return HtmlFormatter(style=name).get_style_defs(f"{prefix} .highlight")

    by_system = colours("github-dark", ":root:not([data-theme=light])")
    by_choice = colours("github-dark", ":root[data-theme=dark]")
    return (
        f"{colours('xcode', ':root')}\n@media screen and (prefers-color-scheme: dark) {{\n{by_system}"
        f"\n}}\n@media screen {{\n{by_choice}\n}}"
    )


def formula(latex: str, display: str) -> str:
    """LaTeX as MathML, which browsers draw by themselves; unknown LaTeX stays as it is."""
    try:
        # The converter does not know the two words together.
        latex = latex.replace(r"\arg\max", r"\mathrm{argmax}").strip()
        drawn = mathml(latex, display=display)
        if display == "inline":
            return drawn
        return f'<div class="scroll" data-label="Formula, which scrolls">{drawn}</div>'
    except Exception:  # the converter raises many kinds
        return f"<code>{escape(latex)}</code>"


def is_png(picture: bytes) -> bool:
    """True for a PNG, False for an SVG."""
    return picture.startswith(b"\x89PNG")


def data_uri(picture: bytes) -> str:
    """Address of a PNG or SVG that is its own content."""
    kind = "png" if is_png(picture) else "svg+xml"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode("ascii")


def figure(picture: bytes, alt: str, number: int, caption: str, store: Store = data_uri) -> str:
    """A PNG or SVG on a light card with a numbered caption (HTML)."""
    if is_png(picture):
        width, height = struct.unpack(">II", picture[16:24])
    else:
        points = re.findall(rb'(?:width|height)="([\d.]+)pt"', picture[:2000])
        width, height = (round(float(length) / 72 * DPI) for length in points[:2])
    wide = " wide" if width > 700 else ""
    return (
        f'<figure><div class="card scroll{wide}" data-label="Figure {number}, which scrolls">'
        f'<img src="{store(picture)}" width="{width}" height="{height}" alt="{escape(alt)}"></div>'
        f"<figcaption><strong>Figure {number}.</strong> {caption}</figcaption></figure>"
    )


def picture_of(output: nbformat.NotebookNode) -> tuple[bytes, dict[str, str]] | None:
    """The picture of a notebook's output, SVG before PNG, and what `figures.show` says of it."""
    data = output.get("data", {})
    for kind in ("image/svg+xml", "image/png"):
        if kind in data:
            raw = data[kind].encode() if kind.endswith("xml") else base64.b64decode(data[kind])
            return raw, output.metadata.get(kind, {})
    return None


def _text_columns(rows: list[list[str]]) -> set[int]:
    """Indices of a table's columns that hold words, which stand left; numbers stand right."""
    plain = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows]

    def is_text(column: list[str]) -> bool:
        values = [cell for cell in column if cell and not cell.startswith(("n/a", "x "))]
        return any(re.search("[A-Za-z]{4}", cell) for cell in column) or (
            bool(values) and all(cell[0].isalpha() for cell in values)
        )

    width = max((len(row) for row in plain), default=0)
    return {c for c in range(1, width) if is_text([row[c] for row in plain[1:] if len(row) > c])}


def aligned(table: str) -> str:
    """Mark the cells of an HTML table's columns of words with `class=text`."""
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    text = _text_columns([re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows])

    def mark(row: re.Match) -> str:
        count = iter(range(len(row[0])))

        def cell(tag: re.Match) -> str:
            return f"<{tag[1]}{tag[2] or ''}{' class=text' if next(count) in text else ''}>"

        return re.sub(r"<(t[hd])( scope=[^>\s]+)?>", cell, row[0])

    return re.sub(r"<tr>.*?</tr>", mark, table, flags=re.S)


class _Renderer(IPythonRenderer):
    """Markdown with MathML (MathJax would have to be loaded), relinked, headings remembered."""

    def __init__(self, headings: list[Heading], relink: Relink, **options):
        super().__init__(escape=False, embed_images=True, exclude_anchor_links=True, **options)
        self.headings, self.relink = headings, relink

    def block_html(self, html: str) -> str:
        # Embedding images parses the block and closes every tag: <details> before its Markdown.
        return super().block_html(html) if "<img" in html else html

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

    def heading(self, text: str, level: int, **attrs) -> str:
        words = re.sub(r"[^\w]+", "-", unescape(re.sub("<[^>]+>", "", text)).lower()).strip("-")
        taken = {key for _, key, _ in self.headings}
        names = [words or "section", *(f"{words}-{i}" for i in range(2, 100))]
        key = next(name for name in names if name not in taken)
        self.headings.append((level, key, text))
        return f'<h{level} id="{key}">{text}</h{level}>\n'

    def paragraph(self, text: str) -> str:
        kind = ' class="claim"' if text.startswith("<strong>Claim.") else ""
        return f"<p{kind}>{text}</p>\n"

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, self.relink(url), title)

    def table(self, text: str) -> str:
        table = aligned(f"<table>\n{text}</table>")
        return f'<div class="tables scroll" data-label="Table, which scrolls">\n{table}\n</div>\n'


class _Exporter(HTMLExporter):
    """nbconvert's exporter with our template; `headings` and so on are set before each export."""

    headings: list[Heading]
    relink: Relink
    store: Store
    folder: Path
    figures: int

    def draw(self, output: nbformat.NotebookNode) -> str:
        picture = picture_of(output)
        assert picture is not None
        self.figures += 1
        data, about = picture
        alt = about.get("alt", "")
        return figure(data, alt, self.figures, escape(about.get("caption", alt)), self.store)

    @pass_context
    def markdown2html(self, context, source):
        attachments = context.get("cell", {}).get("attachments", {})
        path = str(self.folder)
        renderer = _Renderer(self.headings, self.relink, attachments=attachments, path=path)
        return MarkdownWithMath(renderer=renderer).render(source)


@cache
def _exporter() -> _Exporter:
    """One for all notebooks: reading the templates takes longer than filling them."""
    config = Config()
    # No JavaScript and no widgets: they need libraries from the network.
    config.NbConvertBase.display_data_priority = [
        "text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "text/plain",
    ]  # fmt: skip
    exporter = _Exporter(
        config=config,
        template_name="basic",
        template_file="report.html.j2",
        extra_loaders=[DictLoader({"report.html.j2": TEMPLATE})],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    exporter.register_filter("latex", lambda text: formula(text.strip().strip("$"), "block"))
    exporter.register_filter("figure", exporter.draw)
    exporter.register_filter("aligned", aligned)
    return exporter


def notebook_title(notebook: nbformat.NotebookNode, default: str) -> str:
    """Text of the notebook's first top heading."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    match = re.search(r"^# (.+)$", "\n".join(sources), re.M)
    return match[1].strip() if match else default


def notebook_document(
    notebook: nbformat.NotebookNode, name: str, folder: Path, relink: Relink = str, store=data_uri
) -> Document:
    """An executed notebook as HTML; `folder` is where its source lies, `name` a title in reserve."""
    exporter = _exporter()
    exporter.headings, exporter.relink, exporter.store = [], relink, store
    exporter.folder, exporter.figures = folder, 0
    for cell in notebook.cells:  # captions stand in the frame of their figure here
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if not output.get("metadata", {}).get("text/markdown", {}).get("caption")
            ]
    body, _ = exporter.from_notebook_node(notebook)
    contents = [heading for heading in exporter.headings if heading[0] in (2, 3)]
    return Document(notebook_title(notebook, name), body, contents)


def markdown_document(text: str, name: str, folder: Path, relink: Relink = str) -> Document:
    """A Markdown file in `folder` as HTML; its images become part of the page."""
    headings: list[Heading] = []
    renderer = _Renderer(headings, relink, attachments={}, path=str(folder))
    body = MarkdownWithMath(renderer=renderer).render(text)
    titles = [re.sub("<[^>]+>", "", text) for level, _, text in headings if level == 1]
    contents = [heading for heading in headings if heading[0] in (2, 3)]
    return Document(unescape(titles[0]) if titles else name, body, contents)
