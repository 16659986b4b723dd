"""Canonical notebooks: the form in which they are kept in git, and the form that the pipeline depends on.

JupyterLab rewrites a notebook whenever it is saved: outputs, execution counts, kernel and widget metadata,
an empty cell at the end. A pipeline that depended on that file would train again because someone looked at
it. So a cheap stage writes a copy that holds the code and the text and nothing else, and the long stages
depend on the copies.

    python -m workbook.reporting.canonical notebooks --output build/notebooks   copies (stale ones are removed)
    python -m workbook.reporting.canonical notebooks --check                    exit status 1 if one differs
    python -m workbook.reporting.canonical notebooks --write                    rewrite the files themselves
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import nbformat

from workbook.paths import resolve

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


# What nbformat raises for a file that is not a notebook.
UNREADABLE = (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError)


class NotebookError(ValueError):
    """A notebook that cannot be read; the message names the file."""


def canonical(text: str, name: str) -> str:
    """Canonical form of the notebook in `text`; idempotent. `name` is what an error calls the notebook.

    Kept: the sources, the cells' tags and attachments. Dropped: outputs, counts, other metadata, empty cells.
    Raises NotebookError if `text` is not a notebook.
    """
    try:
        notebook = cast(nbformat.NotebookNode, nbformat.reads(text, as_version=4))
        cells = [_canonical_cell(cell) for cell in notebook.cells if cell.source.strip()]
    except (*UNREADABLE, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise NotebookError(
            f"{name} is not a readable notebook ({reason}); restore it from git."
        ) from error
    for index, cell in enumerate(cells, start=1):
        cell["id"] = f"cell-{index:02d}"
    return dumps(
        {"cells": cells, "metadata": {"kernelspec": KERNELSPEC}, "nbformat": 4, "nbformat_minor": 5}
    )


def dumps(notebook: dict) -> str:
    """Notebook as JSON: sorted keys, one space of indent, letters as they are, a newline at the end."""
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _canonical_cell(cell: nbformat.NotebookNode) -> dict:
    tags = cell.metadata.get("tags", [])
    metadata = {"tags": list(tags)} if tags else {}
    kept = {"cell_type": cell.cell_type, "metadata": metadata, "source": str(cell.source)}
    if cell.cell_type == "code":
        kept |= {"execution_count": None, "outputs": []}
    elif cell.get("attachments"):
        kept["attachments"] = cell.attachments
    return kept


def sources(folder: Path) -> list[Path]:
    """Notebooks in `folder` itself, by name. Raises NotebookError if there is none."""
    found = sorted(path for path in folder.glob("*.ipynb") if path.is_file())
    if not found:
        raise NotebookError(f"No notebook (*.ipynb) in {folder}.")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NotebookError(
            f"{path} is not a readable notebook (not UTF-8); restore it from git."
        ) from error


def not_canonical(folder: Path) -> list[Path]:
    """Notebooks of `folder` that differ from their canonical form."""
    return [path for path in sources(folder) if (text := _read(path)) != canonical(text, str(path))]


def write_copies(folder: Path, output: Path) -> list[Path]:
    """Write a canonical copy of each notebook of `folder` into `output`; remove copies without a source."""
    return write_all(
        {path.name: canonical(_read(path), str(path)) for path in sources(folder)}, output
    )


def write_all(texts: Mapping[str, str], output: Path) -> list[Path]:
    """Write every text under its name into `output`; remove files of the same kinds that are not among them."""
    output.mkdir(parents=True, exist_ok=True)
    for suffix in {Path(name).suffix for name in texts}:
        for stale in output.glob(f"*{suffix}"):
            if stale.name not in texts:
                stale.unlink()
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    return [output / name for name in texts]


def main(arguments: list[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m workbook.reporting.canonical", description=about)
    parser.add_argument("folder", help="folder of notebooks")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", help="folder for the canonical copies")
    action.add_argument(
        "--check", action="store_true", help="only list the notebooks that are not canonical"
    )
    action.add_argument("--write", action="store_true", help="rewrite the notebooks in place")
    options = parser.parse_args(arguments)
    folder = resolve(options.folder)
    try:
        if options.output:
            write_copies(folder, resolve(options.output))
            return 0
        different = not_canonical(folder)
        if options.write:
            for path in different:
                path.write_text(canonical(_read(path), str(path)), encoding="utf-8")
            return 0
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    for path in different:
        print(f"{path} is not canonical.", file=sys.stderr)
    if different:
        print(
            f"Run: python -m workbook.reporting.canonical {options.folder} --write", file=sys.stderr
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
