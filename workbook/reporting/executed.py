"""Make an executed notebook fit for git: same bytes for same results, no progress bars, small figures."""

import base64
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import cast

import numpy as np
from nbformat import NotebookNode
from PIL import Image

from workbook.paths import ROOT
from workbook.reporting.canonical import KERNELSPEC

# A line is progress, not a result, if it is a tqdm bar or gives a time to go.
PROGRESS = re.compile(r"\d+%\|.*\|\s*[\d.]+\w*/[\d.?]+|\d+\w*it \[\d+:\d\d|\bETA\b")
CURSOR = re.compile(r"\x1b\[\d*[A-GJKST]")
ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{6,}")
KERNEL_FILE = re.compile(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py")
WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(notebook: NotebookNode) -> None:
    """Strip what changes from run to run from `notebook`, in place."""
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
    if WIDGET in output.data:
        return (
            False  # a notebook widget is a progress bar here, and cannot be drawn without a kernel
        )
    for kind, value in output.data.items():
        if kind.startswith("text/") and isinstance(value, str):
            output.data[kind] = stable_text(value)
        elif kind == "image/png":
            output.data[kind] = base64.b64encode(smaller_png(base64.b64decode(value))).decode(
                "ascii"
            )
    return True


def without_progress(text: str) -> str:
    """`text` as a terminal leaves it after its carriage returns, without lines that only tell progress."""
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


def smaller_png(data: bytes) -> bytes:
    """The smallest of `data` itself, its best lossless encoding, and 256 colours where nobody would see it.

    Lines and text survive a palette, photographs do not: it is taken only if it changes the colour values,
    of 0 to 255, by less than 0.5 on average and by at most 16 in all but one of a thousand.
    """
    with Image.open(io.BytesIO(data)) as source:
        image = source.convert("RGBA")
    if cast(tuple[tuple[int, int], ...], image.getextrema())[3] != (255, 255):
        return data  # transparent: left as it is
    image = image.convert("RGB")
    palette = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    before, after = (np.asarray(each, dtype=np.int16) for each in (image, palette.convert("RGB")))
    difference = np.abs(after - before)
    same_to_the_eye = difference.mean() < 0.5 and np.quantile(difference, 0.999) <= 16
    encoded = io.BytesIO()
    (palette if same_to_the_eye else image).save(encoded, "PNG", optimize=True)
    return min(data, encoded.getvalue(), key=len)
