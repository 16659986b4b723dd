"""What Python modules do, as hashes: without comments, docstrings and line breaks, and with all that they import of `sitlib`.

Two things depend on code in this form: the pipeline's stages, and the names of resumable states.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from workbook.paths import ROOT

# Modules that are not followed, by how their path begins. First: nothing but a description and a version.
ABOUT = ("sitlib/__init__.py",)
# The weights are a dependency of the stages that read them, so how they were fetched and checked is not.
FETCHING = ("sitlib/metrics/weights.py",)

JOINED = {"FSTRING_START": 1, "FSTRING_END": -1, "TSTRING_START": 1, "TSTRING_END": -1}
UNSEEN = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}


def essence(source: str) -> str:
    """What Python makes of `source`, one statement a line: no comments, docstrings, line breaks or spaces that say nothing.

    Equal in all versions of Python that can read the source. Raises SyntaxError if there is none.
    """
    ast.parse(source)  # the tokenizer alone lets much pass
    statements: list[str] = []
    words: list[str] = []
    lines = source.splitlines(keepends=True)
    depth, start, is_text = 0, (0, 0), True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # Since Python 3.12 an f-string comes in pieces: take it whole, as before.
        step = JOINED.get(tokenize.tok_name[token.type], 0)
        if step > 0 and depth == 0:
            start = token.start
        depth += step
        if depth > 0 or token.type in UNSEEN:
            continue
        if token.type == tokenize.NEWLINE:
            if not is_text:  # a statement of nothing but text is a docstring
                statements.append(" ".join(words))
            words, is_text = [], True
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            statements.append(tokenize.tok_name[token.type])
        else:
            text = _between(lines, start, token.end) if step < 0 else token.string
            is_text = is_text and token.type == tokenize.STRING
            words.append(text)
    return "\n".join(statements)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])


def imported(source: str) -> set[str]:
    """Modules of `sitlib` that Python source imports, anywhere in it, and their packages, as files relative to the root.

    Raises SyntaxError if it is no Python, or imports relatively, which cannot be followed here.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise SyntaxError(f"line {node.lineno} imports relatively; write `from sitlib...`")
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = [
        Path(*name.split(".")) for name in names if name.split(".")[0] in ("sitlib", "workbook")
    ]
    files = {path.with_suffix(".py") for path in paths}
    files |= {package / "__init__.py" for path in paths for package in (path, *path.parents)}
    return {file.as_posix() for file in files if (ROOT / file).exists()}


@cache
def _module(file: str) -> tuple[str, frozenset[str]]:
    """Hash of a module's essence and of the files beside it that it names, and the modules that it imports.

    Raises ValueError, naming the file, if it is no Python.
    """
    path = ROOT / file
    source = source_of(path)
    with named(file):
        digest, imports = hashlib.sha256(essence(source).encode()), imported(source)
    texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    for name in sorted(
        text for text in texts if isinstance(text, str) and "." in text and "/" not in text
    ):
        beside = path.parent / name
        if len(name) < 100 and beside.suffix not in (".py", "") and beside.is_file():
            digest.update(beside.read_bytes())
    return digest.hexdigest()[:16], frozenset(imports)


def source_of(path: Path) -> str:
    with named(path.relative_to(ROOT).as_posix()):
        return path.read_text(encoding="utf-8")


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turns what reading Python raises into a ValueError that says where."""
    try:
        yield
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError) as error:
        raise ValueError(f"{what} cannot be read as Python: {error}") from error


def code_hashes(files: set[str], left_out: tuple[str, ...]) -> dict[str, str]:
    """Module -> hash, of `files` and all modules that they import, directly or not, but through `left_out`, sorted by name."""
    found: dict[str, str] = {}
    queue = list(files)
    while queue:
        file = queue.pop()
        if file in found or file.startswith(left_out):
            continue
        found[file], imports = _module(file)
        queue += imports
    return dict(sorted(found.items()))
