"""API documentation from the docstrings: `python -m workbook.reporting.api --output reports/api`.

pdoc makes the pages; they load nothing but the style sheet and the search index beside them.
"""

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pdoc.doc
import pdoc.extract
import pdoc.render
import pdoc.search

from workbook.paths import ROOT, resolve

TEMPLATES = Path(__file__).with_name("api_templates")
ROOT_NAME = "root of the project"  # for its path on this machine, a default value of the library
LEFT_OUT = "workbook.reporting"  # how the pages are made, no part of the library


def _is_public(member: pdoc.doc.Doc) -> bool:
    return not member.name.startswith("_") or member.name == "__init__"


def search_index(modules: Mapping[str, pdoc.doc.Module]) -> str:
    """The script that searches. pdoc's own has another content where Node is installed, and signatures with mark-up."""
    documents = pdoc.search.make_index(modules, _is_public, "google")
    for document in documents:
        for key in ("signature", "annotation", "default_value"):
            if key in document:
                document[key] = re.sub(r"<[^>]+>", "", document[key])
    template = pdoc.render.env.get_template("search.js.jinja2")
    return template.render(search_index=json.dumps(documents).replace(str(ROOT), ROOT_NAME))


def write(output: Path) -> None:
    """Write a page for every public module of sitlib into the folder `output`, anew."""
    names = pdoc.extract.walk_specs(["sitlib", f"!{LEFT_OUT}"])
    modules = {name: pdoc.doc.Module.from_name(name) for name in names}
    pdoc.render.configure(
        docformat="google",
        show_source=False,
        template_directory=TEMPLATES,
        footer_text="Spectral Image Tokenizer",
    )
    shutil.rmtree(output, ignore_errors=True)
    for name, module in modules.items():
        path = output / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        html = re.sub(
            r'<a class="headerlink" href="#([^"]+)">',
            r'<a class="headerlink" href="#\1" aria-label="Link to \1">',
            pdoc.render.html_module(module, modules).replace(str(ROOT), ROOT_NAME),
        )
        path.write_text(html, encoding="utf-8")
    style = pdoc.render.env.get_template("style.css.jinja2").render()
    (output / "style.css").write_text(style, encoding="utf-8")
    (output / "search.js").write_text(search_index(modules), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m workbook.reporting.api", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", default="reports/api", help="folder to write")
    write(resolve(parser.parse_args().output))


if __name__ == "__main__":
    main()
