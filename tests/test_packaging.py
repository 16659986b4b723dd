"""The lists of packages are honest, and the commands that a newcomer types work."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workbook.machine import lock_hash
from workbook.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pywavelets": "pywt", "pillow": "PIL", "pyyaml": "yaml", "ipython": "IPython"}
IMPORTED_AS |= {"scikit-image": "skimage", "scikit-learn": "sklearn"}
IMPORTED_AS |= {"pillow-jxl-plugin": "pillow_jxl"}


def packages(requirements: list[str]) -> set[str]:
    """Import names of a list of requirements."""
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def names_imported(path: Path) -> set[str]:
    """Names of the modules that a Python file imports."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}


def imports(folder: Path) -> set[str]:
    """Top-level names of other people's packages that the Python files below `folder` import."""
    names = {name.split(".")[0] for path in folder.rglob("*.py") for name in names_imported(path)}
    # Scripts and tests import their neighbors, tests scripts, too.
    near = {path.stem for place in (folder, ROOT / "scripts") for path in place.glob("*.py")}
    return names - set(sys.stdlib_module_names) - near - {"sitlib", "workbook"}


CORE = packages(PROJECT["dependencies"])
EXTRAS = {name: packages(listed) for name, listed in PROJECT["optional-dependencies"].items()}


def test_the_library_imports_the_core_and_the_workbook_the_lab():
    library, workbook = imports(ROOT / "sitlib"), imports(ROOT / "workbook")
    assert library - CORE - EXTRAS["lab"] - EXTRAS["parquet"] == set()
    assert workbook - CORE - EXTRAS["lab"] == set()
    assert CORE - library - workbook == set()


def test_scripts_tests_and_benchmarks_import_what_their_extras_list():
    assert imports(ROOT / "scripts") - CORE - EXTRAS["data"] == set()
    assert imports(ROOT / "tests") - CORE - EXTRAS["lab"] - EXTRAS["test"] == set()
    assert imports(ROOT / "benchmarks") - CORE - EXTRAS["test"] - EXTRAS["peers"] == set()


# Rooms of the library: each imports itself and those before it.
ROOMS = ("strict", "files", "model", "data", "metrics", "train")
ROOMS += ("sample", "prior", "codec", "evaluate", "cli")


def test_imports_run_one_way():
    for path in sorted((ROOT / "sitlib").rglob("*.py")):
        room = path.relative_to(ROOT / "sitlib").parts[0].removesuffix(".py")
        below = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
        for package, *inside in (name.split(".") for name in names_imported(path)):
            assert package != "workbook", path
            assert package != "sitlib" or not inside or inside[0] in below, (path, inside)


def test_dvc_reads_its_files_with_a_compiled_parser():
    # Several seconds at the start of every stage otherwise: dvc.lock has ten thousand lines.
    assert import_module("ruamel.yaml.main").CParser is not None


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder_with_space(tmp_path) -> Path:
    """A copy of what `make` reads, in a folder whose name has a space."""
    (folder := tmp_path / "my project").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_make_alone_lists_its_targets():
    done = make(ROOT)
    assert done.returncode == 0
    targets = "help repro tokenizer test lab study lint lock clean"
    assert re.findall(r"make (\w+) ", done.stdout) == targets.split()


def test_make_says_when_python_is_too_old(folder_with_space):
    old = script(folder_with_space / "old python", "exit 1")
    done = make(folder_with_space, "repro", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"{old} is not Python 3.11 or newer" in done.stderr
    assert not (folder_with_space / ".venv").exists()


def test_make_installs_once_and_then_runs_the_stages_with_the_project_python(folder_with_space):
    log = folder_with_space / "log"
    create = 'if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi'
    fake = script(folder_with_space / "fake python", f'echo "$@" >> log\n{create}')
    first, second = (make(folder_with_space, "repro", f"PYTHON={fake}") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    said = log.read_text()
    calls = ("-m venv", "pip install", "-m workbook.run_stages dvc.yaml")
    assert [said.count(call) for call in calls] == [1, 1, 2]
    assert "-c requirements.lock -e .[lab,test]" in said
    assert "versions of requirements.lock" in first.stdout
    (folder_with_space / ".venv/installed").unlink()
    newest = make(folder_with_space, "repro", f"PYTHON={fake}", "LOCK=")
    assert "the newest releases" in newest.stdout
    assert "-c requirements.lock" not in log.read_text().removeprefix(said)


def test_the_lock_names_every_listed_package_at_one_version_and_no_machine():
    lines = (ROOT / "requirements.lock").read_text().splitlines()[1:]
    locked = [Requirement(line) for line in lines]
    assert all(str(each.specifier).startswith("==") and each.url is None for each in locked)
    here = {canonicalize_name(e.name): e for e in locked if not e.marker or e.marker.evaluate()}
    optional = PROJECT["optional-dependencies"]
    for listed in map(Requirement, PROJECT["dependencies"] + optional["lab"] + optional["test"]):
        version = str(here[canonicalize_name(listed.name)].specifier).removeprefix("==")
        assert version in listed.specifier, listed
    assert re.fullmatch(r"[0-9a-f]{12}", lock_hash() or "0" * 12)


def test_make_forgets_a_failed_installation(folder_with_space):
    install = '*"pip install"*) exit 1;;'
    create = '*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;'
    fake = script(folder_with_space / "fake", f'case "$*" in {install} {create} esac')
    done = make(folder_with_space, "test", f"PYTHON={fake}")
    assert done.returncode != 0 and not (folder_with_space / ".venv" / "installed").exists()


# -- what Git and DVC see ----------------------------------------------------------------------


def ignored(tool: list[str], names: list[str]) -> set[str]:
    done = subprocess.run([*tool, *names], cwd=ROOT, capture_output=True, text=True)
    return {line.strip().strip('"') for line in done.stdout.splitlines()}


MADE = ".venv/x weights/a models/a codes/a build/a .ckpt/a reports/failed/a.ipynb"
KEPT = "metrics/results.json reports/index.html reports/01.ipynb data/landscapes/a.tar dvc.lock"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_keeps_results_and_ignores_what_can_be_made_again():
    names = [*MADE.split(), *KEPT.split()]
    assert ignored(["git", "check-ignore", "--no-index"], names) == set(MADE.split())


def test_dvc_sees_no_cache_folders():
    hidden = ["sitlib/__pycache__/a.pyc", "notebooks/.ipynb_checkpoints/a.ipynb", ".ckpt/a"]
    seen = ["sitlib/model/wavelets.py", "notebooks/01_x.ipynb", "models/a", "build/a.ipynb"]
    assert ignored([sys.executable, "-m", "dvc", "check-ignore"], hidden + seen) == set(hidden)
