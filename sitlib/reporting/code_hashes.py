"""What a stage runs of `sitlib`, as hashes: the form of the code that the pipeline depends on.

A stage depends on the code it runs, and on nothing that only looks like it: a comment, a docstring, a line break
or a module that it does not import must not train again. So a cheap stage writes for every notebook, and for every
module that can be run, a file with the hashes of the modules of `sitlib` that it imports, directly or not, and the
long stages depend on these files: a list kept by hand would lack some and have others too many.

    python -m sitlib.reporting.code_hashes --output build/code
"""

import argparse
import ast
import hashlib
import io
import json
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import cast

import nbformat

from sitlib.paths import ROOT, resolve

# Modules that are not followed from an entry point, by how its name begins; an entry of a folder ends with "/".
# Nothing but a description and a version. And the weights are a dependency of the stages that read them, so how they were fetched and
# checked is not.
ABOUT = ("sitlib/__init__.py",)
FETCHING = ("sitlib/weights.py", "sitlib/weights_verification.py")
# Restyling a figure must not train again, and pictures on the way change nothing of what is trained.
SHOWING = ("sitlib/reporting/", "sitlib/sampling.py")
# Codes are a dependency of what is trained on them, so how they came about is not.
TOKENIZING = ("sitlib/experiments/tokenizers.py", "sitlib/tokenizer.py")
NOT_FOLLOWED = {
    "02a_": SHOWING,
    "03a_": SHOWING + TOKENIZING,
    "04a_": SHOWING + TOKENIZING,
}

JOINED = {"FSTRING_START": 1, "FSTRING_END": -1, "TSTRING_START": 1, "TSTRING_END": -1}
UNSEEN = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


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
    """Modules of `sitlib` that Python source imports, anywhere in it, and their packages, as files relative to the root."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = [Path(*name.split(".")) for name in names if name.split(".")[0] == "sitlib"]
    files = {path.with_suffix(".py") for path in paths}
    files |= {package / "__init__.py" for path in paths for package in (path, *path.parents)}
    return {file.as_posix() for file in files if (ROOT / file).exists()}


@cache
def _module(file: str) -> tuple[str, frozenset[str]]:
    """Hash of a module's essence and of the files beside it that it names, and the modules that it imports.

    Raises ValueError, naming the file, if it is no Python.
    """
    path = ROOT / file
    try:
        source = path.read_text(encoding="utf-8")
        digest = hashlib.sha256(essence(source).encode())
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError) as error:
        raise ValueError(f"{file} cannot be read as Python: {error}") from error
    texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    for name in sorted(text for text in texts if isinstance(text, str) and "." in text and "/" not in text):
        beside = path.parent / name
        if len(name) < 100 and beside.suffix not in (".py", "") and beside.is_file():
            digest.update(beside.read_bytes())
    return digest.hexdigest()[:16], frozenset(imported(source))


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


def entry_points() -> dict[str, dict[str, str]]:
    """Name -> module -> hash: of each notebook by its stem, of each module that can be run by its dotted name without `sitlib`."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = cast(nbformat.NotebookNode, nbformat.read(path, as_version=4)).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        files = set().union(*(imported(source) for source in code))
        found[path.stem] = code_hashes(files, ABOUT + FETCHING + NOT_FOLLOWED.get(path.stem[:4], ()))
    for path in sorted((ROOT / "sitlib").rglob("*.py")):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem != "__main__":
            file = path.relative_to(ROOT).as_posix()
            name = file.removeprefix("sitlib/").removesuffix(".py").replace("/", ".")
            found[name] = code_hashes({file}, ABOUT if file in FETCHING else ABOUT + FETCHING)
    return found


def write(output: Path) -> list[Path]:
    """Writes the file of each entry point into `output`, if it differs, and removes those without one."""
    texts = {f"{name}.json": json.dumps(hashes, indent=1) + "\n" for name, hashes in entry_points().items()}
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob("*.json"):
        if stale.name not in texts:
            stale.unlink()
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    return [output / name for name in texts]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sitlib.reporting.code_hashes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", required=True, help="folder for the files")
    options = parser.parse_args(arguments)
    try:
        write(resolve(options.output))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
