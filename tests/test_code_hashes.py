"""Hashes of the code that stages run: what changes them, what does not, and that they leave nothing out."""

import json
import re
import subprocess
import sys

import nbformat
import pytest

from workbook import essence as essences
from workbook.essence import essence
from workbook.paths import ROOT
from workbook.reporting import code_hashes

SOURCE = '''"""About the module."""
import os


# Why it is so.
def area(width, height=1):
    """Width times height."""
    text = f"{width:>{height}} # not a comment"
    return width * height + len(text)  # pixels
'''


@pytest.mark.parametrize(
    "before, after",
    [
        ('"""About the module."""\n', '"""Another text,\n\nof several lines."""\n'),
        ('"""About the module."""\n', ""),
        ('    """Width times height."""\n', ""),
        ("# Why it is so.\n", ""),
        ("  # pixels", "  # in pixels"),
        ("import os\n\n\n", "import os\n"),
        ("area(width, height=1)", "area(\n    width, height=1  # one row\n)"),
        ("width * height + len(text)", "width*height + len(text)"),
    ],
)
def test_what_does_not_change_the_program_does_not_change_its_essence(before, after):
    assert before in SOURCE
    assert essence(SOURCE.replace(before, after)) == essence(SOURCE)


@pytest.mark.parametrize(
    "before, after",
    [
        ("width * height", "width + height"),
        ("height=1", "height=2"),
        ("not a comment", "not  a comment"),
        ("{height}}", "{width}}"),
        ("import os\n", ""),
        ("    return", "    if width:\n        return"),
        ('"""Width times height."""', 'pass; "text"; area = """Width times height."""'),
    ],
)
def test_what_changes_the_program_changes_its_essence(before, after):
    assert before in SOURCE
    assert essence(SOURCE.replace(before, after)) != essence(SOURCE)


def test_a_block_that_ends_earlier_is_another_program():
    assert essence("if a:\n    b\n    c\n") != essence("if a:\n    b\nc\n")
    assert essence("x = '''a\n\nb'''\n") != essence("x = '''a\nb'''\n")
    assert essence("x = f'''a\n\n{b}'''\n") != essence("x = f'''a\n{b}'''\n")


@pytest.mark.parametrize("name", ["tokenizer_evaluation", "ablations", "weights"])
def test_every_module_that_is_loaded_is_hashed(name):
    code = (
        f"import json, sys, {name}; "
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'sitlib']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {file.removeprefix(f"{ROOT}/") for file in json.loads(done.stdout)}
    left_out = set(code_hashes.ABOUT) | (set() if name == "weights" else set(code_hashes.FETCHING))
    assert len(loaded) >= 3
    assert loaded - left_out <= set(code_hashes.entry_points(ROOT / "notebooks")[name])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of three modules and a notebook, with what the command makes of them."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "sitlib").mkdir()
    runnable = '\nif __name__ == "__main__":\n    print(1)\n'
    files = {
        "low.py": "x = 1\n",
        "high.py": "def f():\n    from sitlib.low import x\n" + runnable,
        "styled.py": 'STYLE = "style.css"\n' + runnable,
        "style.css": "a {}",
    }
    for name, text in files.items():
        (tmp_path / "sitlib" / name).write_text(text)
    for module in (code_hashes, essences):
        monkeypatch.setattr(module, "ROOT", tmp_path)

    def notebook(*sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks/01_x.ipynb")

    def hashes():
        essences._module.cache_clear()
        command = [str(tmp_path / "notebooks"), "--output", str(tmp_path / "code")]
        status = code_hashes.main(command)
        return (
            {path.stem: path.read_text() for path in (tmp_path / "code").glob("*")}
            if status == 0
            else None
        )

    notebook("import sitlib.styled")
    yield tmp_path / "sitlib", notebook, hashes
    essences._module.cache_clear()


def test_a_change_reaches_those_that_import_it_and_no_other(project):
    package, notebook, hashes = project
    first = hashes()
    assert set(first) == {"01_x", "high", "styled"}
    assert set(json.loads(first["high"])) == {"sitlib/high.py", "sitlib/low.py"}
    (package / "low.py").write_text("x = 1  # one\n")
    assert hashes() == first
    (package / "low.py").write_text("x = 2\n")
    second = hashes()
    assert second["high"] != first["high"] and second["styled"] == first["styled"]
    (package / "style.css").write_text("b {}")
    third = hashes()
    assert third["styled"] != first["styled"] and third["01_x"] != first["01_x"]
    (package / "high.py").unlink()
    assert set(hashes()) == {"01_x", "styled"}


def test_cells_may_have_magics_and_what_cannot_be_followed_is_named(project, capsys):
    package, notebook, hashes = project
    notebook("%matplotlib inline\nimport sitlib.low", "!ls", "%%bash\nls")
    assert set(json.loads(hashes()["01_x"])) == {"sitlib/low.py"}
    notebook("x = 1", "x = (")
    assert (
        hashes() is None
        and "Cell 2 of 01_x.ipynb cannot be read as Python" in capsys.readouterr().err
    )
    notebook("x = 1")
    mistakes = {
        "x = (\n": "styled.py cannot be read",
        "from . import low\n": "styled.py .* imports relatively",
    }
    for text, said in mistakes.items():
        (package / "styled.py").write_text(text)
        (package / "high.py").write_text(
            'import sitlib.styled\nif __name__ == "__main__":\n    pass\n'
        )
        assert hashes() is None and re.search(said, capsys.readouterr().err)
    (package / "styled.py").write_bytes(b"\xff")
    assert hashes() is None and "styled.py cannot be read as Python" in capsys.readouterr().err


def test_what_trains_depends_on_no_figure_and_no_maker_of_its_codes():
    entries = code_hashes.entry_points(ROOT / "notebooks")
    tokenizer, generator, text = (
        entries[name]
        for name in ("02a_tokenizer_training", "03a_autoregressive_training", "04a_text_training")
    )
    assert "sitlib/model/tokenizer.py" in tokenizer and "sitlib/train/loop.py" in tokenizer
    assert {"sitlib/model/generator.py", "sitlib/model/transformer.py", "sitlib/train/loop.py"} <= {
        *generator
    } & {*text}
    assert "sitlib/model/tokenizer.py" not in {*generator, *text}
