"""The files of both packages with the first line of their docstrings, as README shows them.

python scripts/tree.py           print the tree
python scripts/tree.py --write   put it into README.md
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- tree -->\n```\n", "```\n<!-- end of tree -->")


def tree() -> str:
    """One line a file: its path below the package, and what its docstring begins with."""
    command = ["git", "-C", str(ROOT), "ls-files", "sitlib/*.py", "workbook/*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    lines, folder = [], Path()
    for file in map(Path, sorted(listed, key=lambda name: (Path(name).parent.parts, name))):
        docstring = ast.get_docstring(ast.parse((ROOT / file).read_text("utf-8"))) or ""
        about = docstring.split("\n\n")[0].replace("\n", " ")
        about = about.split(": `python")[0].rstrip(".")
        if file.parent != folder:
            folder = file.parent
            note = about if file.name == "__init__.py" else ""
            lines.append(f"{folder.as_posix() + '/':24}{note}".rstrip())
        if file.name != "__init__.py":
            lines.append(f"  {file.name:22}{about}"[:150].rstrip())
    return "\n".join(lines) + "\n"


def with_tree(text: str) -> str:
    """README's text with the tree between the two marks."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + tree() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(with_tree(readme.read_text("utf-8")), encoding="utf-8")
    else:
        print(tree(), end="")
