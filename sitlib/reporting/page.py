"""The HTML shell of every report: one self-contained file that opens offline, in light and in dark."""

from html import escape
from pathlib import Path

import nbformat
from jinja2 import DictLoader, pass_context
from latex2mathml.converter import convert as mathml
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from sitlib.paths import ROOT

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
TEMPLATE = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")


def page(title: str, body: str, *, navigation: str = "", metadata: dict[str, str] | None = None) -> str:
    """Whole HTML document around `body` that loads nothing; `metadata` becomes `<meta>` elements."""
    meta = "\n".join(
        f'<meta name="{escape(name)}" content="{escape(value)}">' for name, value in (metadata or {}).items()
    )
    code = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark_code = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{meta}\n<title>{escape(title)}</title>\n<style>\n{code}\n"
        f"@media (prefers-color-scheme: dark) {{\n{dark_code}\n}}\n{STYLE.strip()}\n</style>\n</head>\n"
        "<body>\n"
        f"{f'<nav>{navigation}</nav>' if navigation else ''}\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def formula(source: str, display: str) -> str:
    """LaTeX as MathML, which browsers draw by themselves; what the converter does not know stays LaTeX."""
    try:
        return mathml(source.strip(), display=display)
    except Exception:  # the converter raises many kinds for LaTeX that it does not know
        return f"<code>{escape(source)}</code>"


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML: MathJax would have to be loaded from the network."""

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source):
        renderer = _Renderer(
            escape=False,
            attachments=context.get("cell", {}).get("attachments", {}),
            embed_images=True,
            exclude_anchor_links=True,
            path=str(ROOT / "notebooks"),
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


def notebook_page(notebook: nbformat.NotebookNode, name: str, stage: str) -> str:
    """HTML report of an executed notebook. `name`: the source's stem; `stage`: which run, for the reader."""
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
    body, _ = exporter.from_notebook_node(notebook)
    title = notebook_title(notebook, name)
    navigation = f'<a href="index.html">All reports</a> · {escape(stage)}'
    metadata = {"notebook": name, "heading": title}
    return page(f"{title} ({stage})", body, navigation=navigation, metadata=metadata)
