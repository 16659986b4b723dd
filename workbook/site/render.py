"""Notebooks and Markdown as pages that load nothing from outside, in light and in dark."""

import base64
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from html import escape, unescape
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert as mathml
from nbconvert.filters.ansi import ansi2html
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from pygments.formatters import HtmlFormatter

from workbook.figures.core import DPI
from workbook.names import label

Picture = dict[str, Any]  # src, width and height in px, alt, caption, name


@dataclass(frozen=True)
class Page:
    """The HTML of a source, and where it goes. Of a report also which run it is, and figures."""

    address: str
    body: str
    run: str = ""  # "": the only one of its notebook
    facts: Mapping[str, str] = field(default_factory=dict)  # of the run
    pictures: Mapping[str, Picture] = field(default_factory=dict)  # by the name that `show` gave

    @property
    def heading(self) -> str:
        """Text of the first heading, without markup; the address where there is none."""
        found = re.search(r"<h1[^>]*>(.+?)</h1>", self.body)
        return plain(found[1]) if found else self.address

    @property
    def title(self) -> str:
        return f"{self.heading}: {label(self.run)}" if self.run else self.heading

    @property
    def contents(self) -> list[tuple[str, str, str]]:
        """Level, id and text of the headings below the first."""
        found = re.findall(r'<h([23]) id="([^"]+)">(.*?)</h', self.body)
        return [(level, key, plain(text)) for level, key, text in found]

    @property
    def claim(self) -> str:
        """First sentence of the claim, without markup."""
        _, _, rest = self.body.partition("<strong>Claim.</strong>")
        claim = " ".join(plain(rest.partition("</p>")[0]).split())
        sentence, stop, _ = claim.partition(". ")
        return sentence + stop.strip()


def plain(html: str) -> str:
    """Text of HTML, without markup."""
    return unescape(re.sub("<[^>]+>", "", html))


def formula(latex: str, display: str) -> str:
    """LaTeX as MathML, which browsers draw by themselves; unknown LaTeX stays as it is."""
    latex = latex.replace(r"\arg\max", r"\mathrm{argmax}").strip()  # unknown to the converter
    try:
        drawn = mathml(latex, display=display)
    except Exception:  # the converter raises many kinds
        return f"<code>{escape(latex)}</code>"
    if display == "inline":
        return drawn
    return f'<div class="scroll" data-label="Formula, which scrolls">{drawn}</div>'


def aligned(table: str) -> str:
    """Mark the cells of a table's columns of words with `class=text`; numbers stand right."""
    parts = re.split(r"(<tr>|<t[hd]\b[^>]*>)", table)  # what is between tags, tag, ...
    column, columns = 0, {}  # place of a column -> places of its cells' tags in `parts`
    for i in range(1, len(parts), 2):
        column = 0 if parts[i] == "<tr>" else column + 1
        columns.setdefault(column, []).append(i)
    for places in [columns[column] for column in columns if column > 1]:
        _, *texts = (plain(parts[i + 1]).strip() for i in places)  # without the heading
        values = [text for text in texts if text and not text.startswith(("n/a", "x "))]
        has_words = any(re.search("[A-Za-z]{4}", text) for text in texts)
        if has_words or (values and all(text[0].isalpha() for text in values)):
            for i in places:
                parts[i] = parts[i].replace(">", " class=text>")
    return "".join(parts)


class Markdown(IPythonRenderer):
    """Markdown of one page, with MathML (MathJax would have to be loaded) and links of the site.

    Args:
        relink: address in the source -> address on the page.
    """

    def __init__(self, relink: Callable[[str], str]):
        super().__init__(escape=False, exclude_anchor_links=True)
        self.relink, self.keys = relink, set()

    def html(self, text: str) -> str:
        return MarkdownWithMath(renderer=self).render(text)

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

    def heading(self, text: str, level: int, **attrs) -> str:
        words = re.sub(r"[^\w]+", "-", plain(text).lower()).strip("-")
        names = [words or "section", *(f"{words}-{i}" for i in range(2, 100))]
        key = next(name for name in names if name not in self.keys)
        self.keys.add(key)
        return f'<h{level} id="{key}">{text}</h{level}>\n'

    def paragraph(self, text: str) -> str:
        kind = ' class="claim"' if text.startswith("<strong>Claim.") else ""
        return f"<p{kind}>{text}</p>\n"

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, self.relink(url), title)

    def table(self, text: str) -> str:
        table = aligned(f"<table>\n{text}</table>")
        return f'<div class="tables scroll" data-label="Table, which scrolls">\n{table}\n</div>\n'


def stored(content: bytes, folder: Path) -> Picture:
    """Keep a picture once in `folder`, however many pages show it; its address and size."""
    if not content.startswith(b"<"):
        with Image.open(io.BytesIO(content)) as image:
            kind, (width, height) = str(image.format).lower(), image.size
    else:
        points = re.findall(rb'(?:width|height)="([\d.]+)pt"', content[:2000])
        kind, (width, height) = "svg", (round(float(x) / 72 * DPI) for x in points[:2])
    name = f"{sha256(content).hexdigest()[:16]}.{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return {"src": f"{folder.name}/{name}", "width": width, "height": height}


def outputs_of(
    cell: nbformat.NotebookNode, folder: Path, markdown: Markdown
) -> list[dict[str, Any]]:
    """Outputs of a cell, one of `picture`, `table`, `html` and `text` each."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {"text/plain": output.get("text", "")})
        kinds = ("image/svg+xml", "image/png", "image/jpeg")  # vectors are sharper
        if kind := next((kind for kind in kinds if kind in data), ""):
            about = output.metadata.get(kind, {})
            is_text = kind == "image/svg+xml"
            content = data[kind].encode() if is_text else base64.b64decode(data[kind])
            picture = stored(content, folder)
            shown.append({"picture": {"caption": about.get("alt", "")} | about | picture})
        elif "text/html" in data:
            shown.append({"table": aligned(data["text/html"])})
        elif "text/markdown" not in data:
            shown.append({"text": ansi2html(data["text/plain"])})
        elif "caption" not in output.metadata.get("text/markdown", {}):
            shown.append({"html": markdown.html(data["text/markdown"])})
    return shown  # a caption stands in the frame of its figure


def notebook_page(
    address: str,
    notebook: nbformat.NotebookNode,
    markdown: Markdown,
    figures: Path,
    run: str = "",
    facts: Mapping[str, str] | None = None,
) -> Page:
    """An executed notebook as a page, whose pictures go to the folder `figures`."""
    cells, named = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cells.append({"html": markdown.html(cell.source)})
        elif cell.source:
            is_given = "injected-parameters" in cell.metadata.get("tags", [])
            outputs = outputs_of(cell, figures, markdown)
            cells.append({"source": cell.source, "is_given": is_given, "outputs": outputs})
            named |= {x["picture"].get("name"): x["picture"] for x in outputs if "picture" in x}
    body = TEMPLATES.get_template("notebook.html.j2").render(cells=cells)
    return Page(address, body, run, facts or {}, named)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
)
TEMPLATES.filters |= {
    "aligned": aligned,
    "label": label,
    "highlighted": Highlight2HTML(),
    "colours": lambda style, within: HtmlFormatter(style=style).get_style_defs(within),
}
