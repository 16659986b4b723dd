"""What a stage runs of `sitlib`, as hashes: the form of the code that the pipeline depends on.

A stage depends on the code it runs, and on nothing that only looks like it: a comment, a docstring, a line break
or a module that it does not import must not train again. So a cheap stage writes for every notebook, and for every
module that can be run, a file with the hashes of the modules of `sitlib` that it imports, directly or not, and the
long stages depend on these files: a list kept by hand would lack some and have others too many.

    python -m workbook.reporting.code_hashes build/notebooks --output build/code
"""

import argparse
import json
import sys
from pathlib import Path
from typing import cast

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from workbook.essence import ABOUT, FETCHING, code_hashes, imported, named, source_of
from workbook.paths import ROOT, resolve
from workbook.reporting.canonical import sources, write_all

# Modules that some entry points do not follow, by how their path begins.
# Restyling a figure must not train again, and pictures on the way change nothing of what is trained.
SHOWING = ("workbook/reporting/", "sitlib/sample/generate.py")
# Codes are a dependency of what is trained on them, so how they came about is not.
TOKENIZING = ("workbook/tokenizers.py", "sitlib/model/tokenizer.py")
NOT_FOLLOWED = {
    "02a_tokenizer_training": SHOWING,
    "03a_autoregressive_training": SHOWING + TOKENIZING,
    "04a_text_training": SHOWING + TOKENIZING,
}


def entry_points(notebooks: Path) -> dict[str, dict[str, str]]:
    """Name -> module -> hash: of each notebook in a folder by its stem, of each module that can be run by its dotted name without `sitlib`.

    Raises ValueError, naming it, if a module or a cell is no Python; magics of IPython in cells are.
    """
    found = {}
    for path in sources(notebooks):
        files: set[str] = set()
        cells = cast(nbformat.NotebookNode, nbformat.read(path, as_version=4)).cells
        for number, cell in enumerate(cells, start=1):
            if cell.cell_type == "code":
                with named(f"Cell {number} of {path.name}"):
                    files |= imported(TransformerManager().transform_cell(cell.source))
        found[path.stem] = code_hashes(files, ABOUT + FETCHING + NOT_FOLLOWED.get(path.stem, ()))
    for path in sorted(
        path for package in ("sitlib", "workbook") for path in (ROOT / package).rglob("*.py")
    ):
        if '__name__ == "__main__"' in source_of(path) and path.stem != "__main__":
            file = path.relative_to(ROOT).as_posix()
            name = file.partition("/")[2].removesuffix(".py").replace("/", ".")
            found[name] = code_hashes({file}, ABOUT if file in FETCHING else ABOUT + FETCHING)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workbook.reporting.code_hashes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("notebooks", help="folder of the notebooks")
    parser.add_argument(
        "--output",
        required=True,
        help="folder for the files; those of entry points that are gone are removed",
    )
    options = parser.parse_args(arguments)
    try:
        found = entry_points(resolve(options.notebooks))
        texts = {
            f"{name}.json": json.dumps(hashes, indent=1) + "\n" for name, hashes in found.items()
        }
        write_all(texts, resolve(options.output))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
