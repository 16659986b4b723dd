"""Hashes of what stages run: what changes them, what does not, and that they leave nothing out."""

import ast
import json

import nbformat
import pytest
from tiny import python

from workbook import code_hashes as hashing
from workbook import stages
from workbook.code_hashes import code_hashes, notebook_hashes, plain, read_notebook
from workbook.paths import ROOT

SOURCE = '''"""About the module."""
import os


# Why it is so.
def area(width, height=1):
    """Width times height."""
    text = f"{width:>{height}} # not a comment"
    return width * height + len(text)  # pixels
'''


@pytest.mark.parametrize(
    "before, after, is_same",
    [
        ('"""About the module."""\n', '"""Another text,\n\nof several lines."""\n', True),
        ('    """Width times height."""\n', "", True),
        ("# Why it is so.\n", "", True),
        ("  # pixels", "  # in pixels", True),
        ("area(width, height=1)", "area(\n    width, height=1  # one row\n)", True),
        ("height=1", "height=2", False),
        ("not a comment", "not  a comment", False),
        ("{height}}", "{width}}", False),
        ("import os\n", "", False),
        ('"""Width times height."""', 'area = """Width times height."""', False),
    ],
)
def test_comments_docstrings_and_layout_are_not_the_code(before, after, is_same):
    assert before in SOURCE
    trees = [ast.parse(text) for text in (SOURCE, SOURCE.replace(before, after))]
    assert (plain(trees[0]) == plain(trees[1])) is is_same


def test_every_module_that_a_stage_loads_is_hashed():
    hashed = stages.stage_hashes("evaluate_tokenizer")
    modules = [name[:-3].replace("/", ".") for name in hashed if ":" not in name]
    imports = ", ".join(name.removesuffix(".__init__") for name in modules)
    loaded = "[m.__file__ for n, m in sys.modules.items() if n.startswith(('sitlib', 'workbook'))]"
    done = python(f"import json, sys, {imports}\nprint(json.dumps({loaded}))")
    files = {file.removeprefix(f"{ROOT}/") for file in json.loads(done.stdout)}
    missing = [file for file in files - set(hashed) if not file.startswith(stages.FETCHING)]
    assert len(files) > 10 and not missing


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of three modules, and a function that writes a notebook and hashes it."""
    (tmp_path / "sitlib").mkdir()
    files = {"low.py": "x = 1\n", "high.py": "def f():\n    from sitlib.low import x\n"}
    files |= {"styled.py": 'STYLE = "style.css"\n', "style.css": "a {}"}
    for name, text in files.items():
        (tmp_path / "sitlib" / name).write_text(text)
    monkeypatch.setattr(hashing, "ROOT", tmp_path)

    def hashes(*cells):
        hashing.module.cache_clear()
        written = [nbformat.v4.new_code_cell(source) for source in cells]
        nbformat.write(nbformat.v4.new_notebook(cells=written), tmp_path / "01_x.ipynb")
        return notebook_hashes(tmp_path / "01_x.ipynb")

    yield tmp_path / "sitlib", hashes
    hashing.module.cache_clear()


def test_a_change_reaches_those_that_import_it_and_no_other(project):
    package, hashes = project
    cells = "%matplotlib inline\nimport sitlib.high", "!ls", "%%bash\nls"  # magics are no Python
    first, styled = hashes(*cells), code_hashes(["sitlib/styled.py"])
    assert set(first) == {"notebooks/01_x.ipynb", "sitlib/high.py", "sitlib/low.py"}
    (package / "low.py").write_text("x = 1  # one\n")
    assert hashes(*cells) == first
    (package / "low.py").write_text("x = 2\n")
    second = hashes(*cells)
    assert [name for name in first if first[name] != second[name]] == ["sitlib/low.py"]
    (package / "style.css").write_text("b {}")
    hashing.module.cache_clear()
    assert code_hashes(["sitlib/styled.py"]) != styled
    assert hashes(*cells) == second != hashes(*cells, "print(1)")


@pytest.mark.parametrize(
    "cell, module, sentence",
    [
        ("x = (", "", "Cell 1 of 01_x.ipynb cannot be read as Python"),
        ("import sitlib.low", "x = (\n", "sitlib/low.py cannot be read as Python"),
        ("import sitlib.low", "from . import a\n", "sitlib/low.py .* imports relatively"),
    ],
)
def test_what_cannot_be_followed_is_named(cell, module, sentence, project):
    (project[0] / "low.py").write_text(module)
    with pytest.raises(ValueError, match=sentence):
        project[1](cell)


def test_what_trains_depends_on_no_figure_and_no_maker_of_its_codes():
    for stage in ("train_tokenizer", "train_autoregressive", "train_text"):
        files = set(stages.stage_hashes(stage))
        assert not [file for file in files if "figures" in file or "explorer" in file]
        assert ("sitlib/model/tokenizer.py" in files) == (stage == "train_tokenizer")
        assert {"sitlib/train/loop.py", "sitlib/model/transformer.py"} <= files


# -- notebooks ---------------------------------------------------------------------------------


def test_notebooks_are_kept_without_outputs():
    notebooks = [read_notebook(path) for path in (ROOT / "notebooks").glob("*.ipynb")]
    code = [cell for notebook in notebooks for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
