"""Run a notebook from top to bottom and keep the result as `<output>.ipynb`, from which `workbook.reporting.site` makes a page.

    python -m workbook.reporting.runner build/notebooks/02a_tokenizer_training.ipynb
        --output reports/02a_tokenizer_training-sit4-0 --stage "tokenizer sit4 seed 0"
        -p variant sit4 -p seed 0 --seconds metrics/seconds/tokenizer-sit4-0.json

What the notebook prints appears as it is printed. The result is written only after the last cell has
passed, and holds the same bytes whenever the results are the same. While it runs, and after a failure, the
notebook as far as it got is in `failed/` beside the output.
"""

import argparse
import ast
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets import default
from traitlets.config import Config

from workbook.paths import ROOT, resolve
from workbook.reporting.canonical import UNREADABLE
from workbook.reporting.executed import clean
from workbook.reporting.machine import machine


class RunError(RuntimeError):
    """A run that did not succeed; `str()` is what the terminal should say."""


class _ThisPython(KernelSpecManager):
    """Knows one kernel: this interpreter. Another kernel of the name python3 cannot get in its way."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        # On a busy machine a kernel that is shut down logs the interrupt that comes first; errors of cells do not go through its log.
        return KernelSpec(**get_kernel_dict(["--log-level=CRITICAL"]))


class _KernelManager(AsyncKernelManager):
    @default("kernel_spec_manager")
    def _this_python(self) -> KernelSpecManager:
        return _ThisPython(parent=self)


@contextmanager
def _kernel_connection() -> Iterator[Config]:
    """Sockets in a folder of this run: of two kernels that start at once, one can take the other's port."""
    if os.name != "posix":
        yield Config(KernelManager={"transport_encryption": "auto"})
        return
    with tempfile.TemporaryDirectory(prefix="kernel-", ignore_cleanup_errors=True) as folder:
        yield Config(KernelManager={"transport": "ipc", "ip": str(Path(folder, "socket"))})


@dataclass
class _Terminal:
    """Passes what the kernel prints to a stream of ours at once, and knows whether a line is still open."""

    stream: TextIO
    open_line: bool = field(default=False, init=False)

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.open_line = bool(text) and not text.endswith("\n")

    def flush(self) -> None:
        self.stream.flush()

    def end_line(self) -> None:
        if self.open_line:
            self.write("\n")
            self.flush()


def parameter(text: str) -> Any:
    """Value of a command-line parameter: YAML (`0` an int, `[a, b]` a list) in which `1e-4` is a float."""
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{text!r} is not a YAML value: quote it.") from error


def defined_parameters(notebook: nbformat.NotebookNode) -> list[str]:
    """Names that the cell tagged `parameters` assigns, in order; empty without such a cell."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            names = []
            for statement in ast.parse(cell.source).body:
                targets = getattr(statement, "targets", None) or [
                    getattr(statement, "target", None)
                ]
                names += [target.id for target in targets if isinstance(target, ast.Name)]
            return names
    return []


def check(path: Path, parameters: Mapping[str, Any]) -> None:
    """Raise RunError unless `path` is a notebook that defines all of `parameters`."""
    try:
        notebook = cast(nbformat.NotebookNode, nbformat.read(path, as_version=4))
        known = defined_parameters(notebook)
    except FileNotFoundError as error:
        raise RunError(f"There is no notebook {shown(path)}.") from error
    except UNREADABLE as error:
        raise RunError(f"{shown(path)} is not a readable notebook; restore it from git.") from error
    except SyntaxError as error:
        raise RunError(
            f"The parameters cell of {shown(path)} is not valid Python: {error.msg}."
        ) from error
    unknown = [name for name in parameters if name not in known]
    if unknown:
        has = f"its parameters cell defines: {', '.join(known) or 'none'}"
        raise RunError(f"{path.stem} has no parameter {', '.join(unknown)}; {has}.")


def run(
    path: Path, output: Path, stage: str, parameters: Mapping[str, Any], seconds: Path | None = None
) -> None:
    """Execute the notebook `path` from the project's root; write `<output>.ipynb`.

    seconds: where to write `{"stage", "report", "seconds", "machine"}`, the wall time of the run and where it was.
    Raises RunError with what the terminal should say; the kernel is gone then, and after Ctrl-C.
    """
    started = time.monotonic()
    check(path, parameters)
    partial = output.parent / "failed" / f"{output.name}.ipynb"
    partial.parent.mkdir(parents=True, exist_ok=True)
    out, err = _Terminal(sys.stdout), _Terminal(sys.stderr)
    kept = f"The partial notebook is at {shown(partial)}"
    try:
        with _kernel_connection() as config:
            notebook = papermill.execute_notebook(
                path,
                partial,
                parameters=dict(parameters),
                kernel_name="python3",
                kernel_manager_class=_KernelManager,
                config=config,
                cwd=ROOT,
                progress_bar=False,
                log_output=False,
                stdout_file=out,
                stderr_file=err,
                coalesce_streams=True,
            )
    except PapermillExecutionError as error:
        what = " ".join(f"{error.ename}: {error.evalue}".split())[:500]
        raise RunError(f"{path.stem} failed in cell {error.exec_count}: {what}\n{kept}") from error
    except DeadKernelError as error:
        what = "the kernel died, often because memory ran out"
        raise RunError(
            f"{path.stem} failed in cell {_last_started(partial)}: {what}\n{kept}"
        ) from error
    finally:
        out.end_line()
        err.end_line()
    clean(notebook)
    write(output.with_name(f"{output.name}.ipynb"), nbformat.writes(notebook) + "\n")
    if seconds is not None:
        took = round(time.monotonic() - started, 1)
        record = {"stage": stage, "report": output.name, "seconds": took, "machine": machine()}
        write(seconds, json.dumps(record, indent=2) + "\n")
    partial.unlink()


def _last_started(partial: Path) -> int:
    """Number, among the code cells, of the last one that began to run."""
    notebook = cast(nbformat.NotebookNode, nbformat.read(partial, as_version=4))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return max(
        (i for i, cell in enumerate(cells, 1) if cell.metadata.papermill.start_time), default=1
    )


def write(path: Path, text: str) -> None:
    """Write `text` to `path` as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"encoding": "utf-8", "dir": path.parent, "prefix": ".", "delete": False}
    with tempfile.NamedTemporaryFile("w", **options) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def shown(path: Path) -> str:
    """`path` as the reader would type it: from the project's root where it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _terminated(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m workbook.reporting.runner", description=about)
    parser.add_argument("notebook")
    parser.add_argument("--output", required=True, help="path of the result without .ipynb")
    parser.add_argument("--stage", required=True, help="name of this run for the reader")
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument(
        "-p", dest="parameters", help="parameter of the notebook; VALUE is YAML", **pair
    )
    parser.add_argument("--seconds", help="JSON file for the wall time")
    options = parser.parse_args(arguments)
    for logger in (
        "papermill",
        "asyncio",
    ):  # of a kernel that died or was stopped, we say what matters
        logging.getLogger(logger).disabled = True
    signal.signal(
        signal.SIGTERM, _terminated
    )  # an exception: the kernel is shut down on the way out
    name = Path(options.notebook).stem
    try:
        parameters = {name: parameter(value) for name, value in options.parameters}
        seconds = resolve(options.seconds) if options.seconds else None
        run(resolve(options.notebook), resolve(options.output), options.stage, parameters, seconds)
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name} was interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
