"""Run a notebook from top to bottom by papermill, and keep what is worth keeping of the result.

What the notebook prints appears as it is printed. The result is written only after the last cell
has passed, and holds the same bytes whenever the results are the same. While it runs, and after a
failure, the notebook as far as it got is in `failed/` beside the output.
"""

import ast
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets import Unicode, default
from traitlets.config import Config

from sitlib.files import atomic_write
from workbook.code_hashes import read_notebook
from workbook.paths import ROOT

# A line is progress, not a result, if it is a tqdm bar or gives a time to go.
PROGRESS = re.compile(r"\d+%\|.*\|\s*[\d.]+\w*/[\d.?]+|\d+\w*it \[\d+:\d\d|\bETA\b")
CURSOR = re.compile(r"\x1b\[\d*[A-GJKST]")
ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{6,}")
KERNEL_FILE = re.compile(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py")
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookFailed(RuntimeError):
    """A cell that failed; the message says which, why, and where the partial notebook is."""


# -- running -----------------------------------------------------------------------------------


def run_notebook(path: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute the notebook `path` from the project's root and write `output`, an .ipynb file.

    Raises:
        ValueError: `path` is no notebook, or its parameters cell lacks one of `parameters`.
        NotebookFailed: a cell failed, or the kernel died. The kernel is gone then.
    """
    cell = parameters_cell(read_notebook(path))
    if unknown := [name for name in parameters if name not in cell]:
        raise ValueError(
            f"{path.stem} has no parameter {', '.join(unknown)}; "
            f"its parameters cell defines: {', '.join(cell) or 'none'}."
        )
    partial = output.parent / "failed" / output.name
    partial.parent.mkdir(parents=True, exist_ok=True)
    for logger in ("papermill", "asyncio"):  # of a dead kernel, we say what matters
        logging.getLogger(logger).disabled = True
    # An exception: the kernel is shut down on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    notebook, failure = NotebookNode(), ""
    try:
        with _kernel_connection() as config:
            notebook = papermill.execute_notebook(
                path,
                partial,
                parameters=dict(parameters),
                kernel_name="python3",
                language="python",  # also of notebooks that do not say so
                kernel_manager_class=_KernelManager,
                config=config,
                cwd=ROOT,
                progress_bar=False,
                log_output=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                coalesce_streams=True,  # else a progress bar is a hundred outputs
            )
    except PapermillExecutionError as error:
        reason = " ".join(f"{error.ename}: {error.evalue}".split())[:500]
        failure = f"failed in cell {error.exec_count}: {reason}"
    except DeadKernelError:
        cells = [c for c in read_notebook(partial).cells if c.cell_type == "code"]
        begun = [c.metadata.papermill.start_time for c in cells]
        last = max((i for i, time in enumerate(begun, 1) if time), default=1)
        failure = f"failed in cell {last}: the kernel died, often because memory ran out"
    finally:
        print(flush=True)  # a line may still be open
    if failure:
        where = partial.relative_to(ROOT) if partial.is_relative_to(ROOT) else partial
        raise NotebookFailed(f"{path.stem} {failure}\nThe partial notebook is at {where}")
    clean(notebook)
    with atomic_write(output) as file:
        file.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    partial.unlink()


def parameters_cell(notebook: NotebookNode) -> list[str]:
    """Names that the cell tagged `parameters` assigns, in order; none without such a cell."""
    names = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            for statement in ast.parse(cell.source).body:
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


class _ThisPython(KernelSpecManager):
    """Knows one kernel: this interpreter. No other kernel named python3 can get in its way."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        # A kernel that is shut down logs the interrupt; errors of cells do not go through its log.
        return KernelSpec(**get_kernel_dict(["--log-level=CRITICAL"]))


class _KernelManager(AsyncKernelManager):
    """Keeps apart what a kernel says outside of its cells: sockets may fail while it ends."""

    said = Unicode(config=True)  # path of a file

    @default("kernel_spec_manager")
    def _this_python(self) -> KernelSpecManager:
        return _ThisPython(parent=self)

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        with open(self.said, "w") as file:
            await super()._async_launch_kernel(kernel_cmd, **options, stderr=file)


@contextmanager
def _kernel_connection() -> Iterator[Config]:
    """Sockets in a folder of this run: of two kernels that start at once, one can take the other's
    port."""
    # The path of a socket may have 107 characters.
    where = "/tmp" if os.name == "posix" and len(tempfile.gettempdir()) > 64 else None
    with tempfile.TemporaryDirectory(
        dir=where, prefix="kernel-", ignore_cleanup_errors=True
    ) as folder:
        options = {"transport": "ipc", "ip": str(Path(folder, "socket"))}
        options = options if os.name == "posix" else {"transport_encryption": "auto"}
        said = Path(folder, "said")
        try:
            yield Config(KernelManager={**options, "said": str(said)})
        except DeadKernelError:
            print(said.read_text(errors="replace"), end="", file=sys.stderr)
            raise


# -- the result: the same bytes for the same results, no progress bars ------------------------------


def clean(notebook: NotebookNode) -> None:
    """Strip what changes from run to run from an executed notebook, in place."""
    language = NotebookNode(name="python")
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNELSPEC), language_info=language)
    for index, cell in enumerate(notebook.cells, start=1):
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        cell.id = f"cell-{index:02d}"
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _clean_output(output)]


def _clean_output(output: NotebookNode) -> bool:
    """Clean `output` in place; False if nothing of it is worth keeping."""
    if output.output_type == "stream":
        output.text = stable_text(without_progress(output.text))
        return bool(output.text.strip())
    if output.output_type == "error":
        output.traceback = [stable_text(line) for line in output.traceback]
        return True
    for kind, value in output.data.items():
        if kind.startswith("text/") and isinstance(value, str):
            output.data[kind] = stable_text(value)
    return WIDGET not in output.data  # a progress bar, which cannot be drawn without a kernel


def without_progress(text: str) -> str:
    """`text` as a terminal leaves it after carriage returns, without lines that tell progress."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in CURSOR.sub("", text).split("\n")]
    kept = [line for line in lines if not PROGRESS.search(line)]
    return "\n".join(kept) if len(kept) == len(lines) else "\n".join(kept).strip("\n") + "\n"


def stable_text(text: str) -> str:
    """`text` without memory addresses and without the paths of the machine that ran it."""
    text = KERNEL_FILE.sub("<cell>", ADDRESS.sub("0x…", text))
    for folder, name in ((ROOT, "."), (Path(sys.prefix), "<python>"), (Path.home(), "~")):
        if folder != Path(folder.anchor):
            text = re.sub(re.escape(str(folder)) + r"(?![\w.-])", name, text)
    return text
