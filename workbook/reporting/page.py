"""From notebooks and Markdown to the pages of the report site: HTML that loads nothing from outside, in light and in dark."""

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

from workbook.paths import ROOT
from workbook.reporting.plots import DPI

HERE = Path(__file__).parent
STYLE = (HERE / "report.css").read_text(encoding="utf-8").strip()
SCRIPT = (HERE / "report.js").read_text(encoding="utf-8").strip()
TEMPLATE = (HERE / "report.html.j2").read_text(encoding="utf-8")

Links = Callable[[str], str]  # what a link in a source becomes on the page
Place = Callable[[bytes], str]  # puts a PNG or SVG somewhere and returns its address on the page
Heading = tuple[int, str, str]  # level, id, HTML of the text


@dataclass(frozen=True)
class Document:
    """A rendered notebook or Markdown file: its title, HTML, and headings of levels 2 and 3."""

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
    has_code: bool = False,
) -> str:
    """Whole HTML document around `body`.

    Args:
        home: address of the front page, empty on the front page itself.
        before, after: address and title of the neighbouring pages.
        about: a line of text under the first heading.
        headings: for the table of contents, which comes next.
        has_code: whether there is folded code to show.
    """
    ways = [
        f'<a href="{escape(home)}">All reports</a>'
        if home
        else "<span>Spectral Image Tokenizer</span>"
    ]
    for rel, arrow, way in (
        ("prev", "<span>←</span> {}", before),
        ("next", "{} <span>→</span>", after),
    ):
        if way:
            number = way[1].partition(" · ")[0]
            name = f"{'Previous' if rel == 'prev' else 'Next'}: {way[1]}"
            ways.append(
                f'<a rel="{rel}" href="{escape(way[0])}" aria-label="{escape(name)}">{arrow.format(f"<i>{escape(number)}</i>")}</a>'
            )
    buttons = (
        '<button type="button" data-code aria-pressed="false">Show code</button>'
        if has_code
        else ""
    )
    buttons += '<button type="button" data-theme-switch hidden>Dark</button>'
    foot = "".join(
        f'<a rel="{rel}" href="{escape(way[0])}"><span>{word}</span> {escape(way[1])}</a>'
        for rel, word, way in (("prev", "Previous", before), ("next", "Next", after))
        if way
    )
    line = f'<p class="run">{escape(about)}</p>' if about else ""
    body = body.replace("</h1>", f"</h1>\n{line}\n{_contents(headings)}", 1)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_code_style()}\n{STYLE}\n</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">To the text</a>\n'
        f'<header class="bar"><nav aria-label="Pages">{"".join(ways)}</nav><div>{buttons}</div></header>\n'
        f'<main id="main">\n<article>\n{body}\n</article>\n</main>\n'
        f"{f'<footer><nav aria-label=Neighbours>{foot}</nav></footer>' if foot else ''}\n"
        f"<script>\n{SCRIPT}\n</script>\n</body>\n</html>\n"
    )


def _code_style() -> str:
    """Colours of code in light and in dark, as report.css switches them."""

    def colours(style: str, prefix: str) -> str:
        return HtmlFormatter(style=style).get_style_defs(f"{prefix} .highlight")

    dark = colours("github-dark", ":root:not([data-theme=light])")
    chosen = colours("github-dark", ":root[data-theme=dark]")
    return (
        f"{colours('xcode', ':root')}\n"
        f"@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n@media screen {{\n{chosen}\n}}"
    )


def _contents(headings: Sequence[Heading]) -> str:
    if len(headings) < 2:
        return ""
    items = "".join(
        f'<li class="level-{level}"><a href="#{key}">{re.sub("<[^>]+>", "", text)}</a></li>'
        for level, key, text in headings
    )
    return f'<nav class="contents" aria-label="Contents"><details open><summary>Contents</summary><ul>{items}</ul></details></nav>'


def formula(source: str, display: str) -> str:
    """LaTeX as MathML, which browsers draw by themselves; what the converter does not know stays LaTeX."""
    try:
        return mathml(source.strip(), display=display)
    except Exception:  # the converter raises many kinds for LaTeX that it does not know
        return f"<code>{escape(source)}</code>"


def is_png(picture: bytes) -> bool:
    """Whether a picture is a PNG; else it is an SVG."""
    return picture.startswith(b"\x89PNG")


def inline(picture: bytes) -> str:
    """Address of a PNG or SVG that is its own content."""
    kind = "png" if is_png(picture) else "svg+xml"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode("ascii")


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG or of one of our SVGs, in pixels."""
    if is_png(picture):
        return struct.unpack(">II", picture[16:24])
    points = re.findall(rb'(?:width|height)="([\d.]+)pt"', picture[:2000])
    width, height = (round(float(length) / 72 * DPI) for length in points[:2])
    return width, height


def figure(picture: bytes, alt: str, number: int, caption: str, place: Place = inline) -> str:
    """A PNG or SVG on a light card, with a numbered caption in HTML."""
    width, height = _size(picture)
    return (
        f'<figure><div class="card scroll{" wide" if width > 700 else ""}" data-label="Figure {number}, which scrolls">'
        f'<img src="{place(picture)}" width="{width}" height="{height}" alt="{escape(alt)}"></div>'
        f"<figcaption><strong>Figure {number}.</strong> {caption}</figcaption></figure>"
    )


def aligned(table: str) -> str:
    """HTML of a table of ours with the columns of words marked, so that they can stand left and numbers right."""
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)
    ]
    words = {
        column
        for column in range(1, len(rows[0]) if rows else 0)
        if any(
            re.search("[A-Za-z]{4}", re.sub("<[^>]+>", "", row[column]))
            for row in rows[1:]
            if len(row) > column
        )
        or (
            all(re.match(r"(<strong>)?[A-Za-z]", row[column]) for row in rows if len(row) > column)
            and any(
                not row[column].startswith(("n/a", "x ")) for row in rows[1:] if len(row) > column
            )
        )
    }

    def marked(row: re.Match) -> str:
        count = iter(range(len(row[0])))
        return re.sub(
            r"<(t[hd])( scope=[^>\s]+)?>",
            lambda cell: (
                f"<{cell[1]}{cell[2] or ''}{' class=text' if next(count) in words else ''}>"
            ),
            row[0],
        )

    return re.sub(r"<tr>.*?</tr>", marked, table, flags=re.S)


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML (MathJax would have to be loaded), links between pages, and headings that are remembered."""

    def __init__(self, headings: list[Heading], links: Links, **options):
        super().__init__(escape=False, embed_images=True, exclude_anchor_links=True, **options)
        self.headings, self.links = headings, links

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

    def heading(self, text: str, level: int, **attrs) -> str:
        name = (
            re.sub(r"[^\w]+", "-", unescape(re.sub("<[^>]+>", "", text)).lower()).strip("-")
            or "section"
        )
        taken = {key for _, key, _ in self.headings}
        key = next(k for k in (name, *(f"{name}-{i}" for i in range(2, 1000))) if k not in taken)
        self.headings.append((level, key, text))
        return f'<h{level} id="{key}">{text}</h{level}>\n'

    def paragraph(self, text: str) -> str:
        return (
            f'<p class="claim">{text}</p>\n'
            if text.startswith("<strong>Claim.")
            else f"<p>{text}</p>\n"
        )

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, self.links(url), title)

    def table(self, text: str) -> str:
        table = aligned(f"<table>\n{text}</table>")
        return f'<div class="tables scroll" data-label="Table, which scrolls">\n{table}\n</div>\n'


class _Exporter(HTMLExporter):
    """nbconvert's exporter with our template; what belongs to one notebook is set before each export."""

    headings: list[Heading]
    links: Links
    captions: Callable[[str], str]
    place: Place
    figures: int

    def draw(self, output: nbformat.NotebookNode, kind: str) -> str:
        self.figures += 1
        data, alt = output.data[kind], output.metadata.get(kind, {}).get("alt", "")
        picture = base64.b64decode(data) if kind == "image/png" else data.encode()
        return figure(picture, alt, self.figures, self.captions(alt), self.place)

    @pass_context
    def markdown2html(self, context, source):
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(
            self.headings, self.links, attachments=attachments, path=str(ROOT / "notebooks")
        )
        return MarkdownWithMath(renderer=renderer).render(source)


def notebook_title(notebook: nbformat.NotebookNode, default: str) -> str:
    """First top heading of the notebook."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("# "):
                    return line.removeprefix("# ").strip()
    return default


@cache
def _exporter() -> _Exporter:
    """One for all notebooks: to read the templates takes longer than to fill them."""
    config = Config()
    # No JavaScript and no widgets: they need libraries from the network.
    config.NbConvertBase.display_data_priority = [
        "text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain",
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


def notebook_document(
    notebook: nbformat.NotebookNode,
    name: str,
    *,
    links: Links = str,
    captions: Callable[[str], str] = escape,
    place: Place = inline,
) -> Document:
    """An executed notebook as HTML.

    Args:
        name: title where it has none.
        captions: alternative text of a figure -> its caption in HTML.
        place: where figures go; by default into the page.
    """
    exporter = _exporter()
    exporter.headings, exporter.links, exporter.captions, exporter.place = (
        [],
        links,
        captions,
        place,
    )
    exporter.figures = 0
    body, _ = exporter.from_notebook_node(notebook)
    contents = [heading for heading in exporter.headings if heading[0] in (2, 3)]
    return Document(notebook_title(notebook, name), body, contents)


def markdown_document(text: str, name: str, folder: Path, links: Links = str) -> Document:
    """A Markdown file as HTML; its images, which lie relative to `folder`, become part of the page. `name`: title where it has none."""
    headings: list[Heading] = []
    renderer = _Renderer(headings, links, attachments={}, path=str(folder))
    body = MarkdownWithMath(renderer=renderer).render(text)
    title = next(
        (re.sub("<[^>]+>", "", text) for level, _, text in headings if level == 1), escape(name)
    )
    return Document(
        unescape(title), body, [heading for heading in headings if heading[0] in (2, 3)]
    )
