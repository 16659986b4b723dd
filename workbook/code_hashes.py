"""Hashes of what stages run: the code without comments and docstrings, notebooks without outputs.

A pipeline that depended on the files themselves would train again because somebody corrected a
comment, or looked at a notebook and saved it. So the stage `prepare` writes one file of hashes for
every stage (`build/code/STAGE.json`), and the stages depend on these.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, cast

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from workbook.paths import ROOT

PACKAGES = ("sitlib", "workbook")
STYLES = (".css", ".j2", ".js")  # files that modules read, named in them
# What nbformat raises for a file that is not a notebook.
UNREADABLE = (nbformat.ValidationError, AttributeError, KeyError, TypeError, ValueError)


def plain(node: Any) -> Any:
    """A syntax tree as lists and texts: no positions, no docstrings, the same in all Pythons.

    `ast.dump` is not: 3.13 leaves out empty fields, and 3.12 has new ones that are mostly empty.
    """
    if isinstance(node, list):
        return [plain(item) for item in node if not _is_docstring(item)]
    if isinstance(node, ast.AST):
        fields = {name: plain(value) for name, value in ast.iter_fields(node)}
        given = {name: value for name, value in fields.items() if value not in ("None", [])}
        return [type(node).__name__, given]
    return repr(node)


def _is_docstring(node: Any) -> bool:
    """True for a statement that is nothing but a text."""
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def digest(content: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of bytes, or of plain values as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def imported(tree: ast.AST) -> set[str]:
    """Files of our packages, relative to the root, that Python code imports anywhere in it.

    Raises:
        SyntaxError: it imports relatively, which is not followed here.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise SyntaxError(f"line {node.lineno} imports relatively; write `from sitlib...`")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {Path(*name.split(".")) for name in names if name.split(".")[0] in PACKAGES}
    modules |= {parent for path in modules for parent in path.parents if parent.name}
    files = {file for path in modules for file in (path.with_suffix(".py"), path / "__init__.py")}
    return {file.as_posix() for file in files if (ROOT / file).exists()}


@cache
def module(file: str) -> tuple[str, frozenset[str]]:
    """Hash of a module and of the style files that it names, and the files that it imports.

    Read once; `module.cache_clear()` forgets it.
    """
    path = ROOT / file
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = imported(tree)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as Python: {error}") from error
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    beside = [p for p in sorted(path.parent.iterdir()) if p.suffix in STYLES and p.name in texts]
    return digest([plain(tree), *(digest(p.read_bytes()) for p in beside)]), frozenset(imports)


def code_hashes(files: Iterable[str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """Module -> hash, of `files` and all that they import, directly or not, sorted by name.

    Args:
        without: modules that are not followed, by how their path begins.

    Raises:
        ValueError: a module is no Python; the message names it.
    """
    hashes: dict[str, str] = {}
    queue = list(files)
    while queue:
        file = queue.pop()
        if file not in hashes and not file.startswith(without):
            hashes[file], imports = module(file)
            queue += imports
    return dict(sorted(hashes.items()))


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook file.

    Raises:
        ValueError: there is none, or it is no notebook.
    """
    try:
        notebook = cast(nbformat.NotebookNode, nbformat.read(path, as_version=4))
        _ = [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]
        return notebook
    except FileNotFoundError:
        raise ValueError(f"There is no notebook {path}.") from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is not a readable notebook: {reason}.") from error


def notebook_hashes(path: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Hashes of a notebook's cells, but not of outputs, and of all modules that they import."""
    notebook, files = read_notebook(path), set()
    cells = [(c.cell_type, c.source, c.metadata.get("tags")) for c in notebook.cells if c.source]
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code":  # which may have magics
            try:
                files |= imported(ast.parse(TransformerManager().transform_cell(cell.source)))
            except SyntaxError as error:
                text = f"Cell {number} of {path.name} cannot be read as Python: {error}"
                raise ValueError(text) from error
    return {f"notebooks/{path.name}": digest(cells)} | code_hashes(files, without)
