"""One look for every figure: style, a fixed colour for each model, image grids, training curves and tables.

Every figure leaves through `show(fig, alt)`, which attaches a text alternative for readers who cannot see it.
"""

import base64
import io
import math
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.textpath import text_to_path

from workbook.reporting.names import SEED, label
from workbook.reporting.tables import html_table, text_table

DPI = 110
SVG_BYTES = 150_000  # scatters of thousands of points are smaller as pixels
PAGE_WIDTH = 1140  # px, the text column of a report: a wider figure would be shrunk by the browser

# Okabe & Ito's palette: distinguishable with every common colour-vision deficiency.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

# A model keeps its colour in every figure; an autoregressive model has that of its tokenizer.
COLOURS = {
    "original": BLACK,
    "vit_vqgan": ORANGE,
    "sit4": BLUE,
    "sit4_two": "#5E9BCB",
    "sit4_plain": SKY,
    "sit5": GREEN,
    "sit5_sc": PURPLE,
    "sit5_sc_second": "#332288",
    "sit6": "#AA4499",
    "sit3": "#882255",
    "approximation": VERMILLION,
    "details": SKY,
    "gaussian": "#7A7A7A",
    "laplace": VERMILLION,
}
COLOURS |= {"sit4_scd": "#117733", "captioned_vit_vqgan": ORANGE, "captioned_sit4_sc": "#44AA99"}
COLOURS |= {f"ar_{name}": tone for name, tone in COLOURS.items() if "vit" in name or "sit" in name}

# For names without a place above: further tones that stay apart from the ones that have an owner.
SPARE = ("#999933", "#DDCC77", "#661100")


def style() -> None:
    """Set the workbook's look for all figures that follow (call it once, in a notebook's first cell)."""
    mpl.rcParams.update(
        {
            "figure.dpi": DPI,
            "savefig.dpi": DPI,
            "figure.figsize": (7.0, 3.6),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.labelsize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": mpl.cycler(  # pyrefly: ignore[missing-attribute]
                color=[BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, BLACK, YELLOW]
            ),
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "image.interpolation": "none",
            "image.cmap": "cividis",
        }
    )


def colour(name: str) -> str:
    """Hex colour of a model or series, the same in every figure and for every seed ("sit4-seed1", "sit4-1").

    A name that has none of its own gets one that follows from its letters.
    """
    name = SEED.sub("", name)
    name = "details" if name.startswith("details_") else name
    return COLOURS.get(name) or SPARE[zlib.crc32(name.encode()) % len(SPARE)]


def png(fig: Figure) -> bytes:
    """`fig` as PNG bytes that depend on nothing but the drawing (no version or date inside)."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=fig.dpi, metadata={"Software": None})
    return buffer.getvalue()


def svg(fig: Figure) -> str | None:
    """`fig` as SVG that depends on nothing but the drawing; None where it shows pixels, or would be larger than is worth it."""
    drawn = (part for axes in fig.axes for part in axes.get_children())
    if any(isinstance(part, AxesImage | QuadMesh) for part in drawn):
        return None
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sitlib"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Text stays text. Verdana, which most machines without DejaVu Sans have, is as wide.
    text = re.sub(r"'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif", buffer.getvalue())
    return text if len(text) <= SVG_BYTES else None


def show(fig: Figure, alt: str) -> None:
    """Display `fig` with the text alternative `alt` (what one who cannot see it must know) and close it.

    It becomes a PNG and, if lines and text are all it has, an SVG, which the report site prefers.

    Raises ValueError if `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("show(fig, alt) needs a sentence that says what the figure shows.")
    alt = " ".join(alt.split())
    data = {"image/png": base64.b64encode(png(fig)).decode("ascii"), "text/plain": alt}
    if vectors := svg(fig):
        data["image/svg+xml"] = vectors
    plt.close(fig)  # or the inline backend draws it a second time at the end of the cell
    display(
        data, raw=True, metadata={kind: {"alt": alt} for kind in data if kind.startswith("image/")}
    )


def _as_images(images: Any) -> np.ndarray:
    """Tensor, array or list of images to a float array [B, H, W, 3] in [0, 1]; one channel counts as grey."""
    if isinstance(images, list | tuple):
        images = np.stack([_as_array(image) for image in images])
    array = _as_array(images)
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not len(array):
        raise ValueError(
            f"image_grid takes images [B, 3 or 1, H, W] with B >= 1, not {list(array.shape)}."
        )
    array = np.broadcast_to(array, (len(array), 3, *array.shape[2:]))
    return np.clip(np.nan_to_num(array), 0, 1).transpose(0, 2, 3, 1)


def _as_array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, dtype=np.float32)


def _text_width(text: str, size: float) -> int:
    """Width of `text` in pixels, in the font of the figures at `size` points."""
    font = FontProperties(family=mpl.rcParams["font.family"], size=size)
    return math.ceil(
        text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] * DPI / 72
    )


def image_grid(
    images: Any,
    titles: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
) -> Figure:
    """Images side by side, each pixel an exact square of screen pixels: no resampling blurs a comparison.

    images: float in [0, 1] (clipped), [B, 3, H, W] or [B, 1, H, W], tensor or array, or a list of [3, H, W].
    titles: above each image if there are B of them, above the columns if there are as many as columns.
    row_labels: left of each row; their number sets the number of columns if `columns` is not given.
    columns: images in a row (all in one row, at most 8, by default).
    scale: screen pixels per image pixel; by default images are about 128 px high, the figure fits a page.
    """
    pictures = _as_images(images)
    count, height, width, _ = pictures.shape
    if columns is None:
        columns = math.ceil(count / len(row_labels)) if row_labels else min(count, 8)
    if columns < 1:
        raise ValueError(f"image_grid needs at least one column, not {columns}.")
    rows = math.ceil(count / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(
            f"image_grid: {len(row_labels)} row labels for {count} images in {columns} columns, {rows} rows."
        )
    if titles is not None and len(titles) not in (count, columns):
        raise ValueError(
            f"image_grid: {len(titles)} titles; give one for each of the {count} images or {columns} columns."
        )
    every_image = titles is not None and len(titles) == count and rows > 1

    # Layout in whole pixels by hand: a layout engine would resize the axes and break the pixel-exact scale.
    gap, font = 3, 8.5
    labels = [textwrap.fill(str(text), 18) for text in row_labels or ()]
    left = (
        max(_text_width(line, font) for text in labels for line in text.split("\n")) + 10
        if labels
        else 0
    )
    if scale is None:
        room = PAGE_WIDTH - left - gap * (columns - 1)
        scale = max(1, min(round(128 / height), room // (columns * width)))
    tile_width, tile_height = width * scale, height * scale
    letters = max(4, tile_width // _text_width("n", font))
    wrapped = [textwrap.fill(str(title), letters) for title in titles or ()]
    line_height = font * DPI / 72 * 1.25
    title_height = (
        int(max(text.count("\n") + 1 for text in wrapped) * line_height) + 4 if wrapped else 0
    )
    step = tile_height + gap + (title_height if every_image else 0)
    top = title_height
    total_width = left + columns * (tile_width + gap) - gap
    total_height = top + (rows - 1) * step + tile_height
    inches = total_width / DPI, total_height / DPI
    fig = plt.figure(figsize=inches, dpi=DPI, layout="none", facecolor="white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        x, y = left + column * (tile_width + gap), top + row * step
        big = (picture * 255 + 0.5).astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
        fig.figimage(big, xo=x, yo=total_height - y - tile_height, origin="upper", resize=False)
        if wrapped and (every_image or row == 0):
            text = wrapped[index if every_image else column]
            place = (x + tile_width / 2) / total_width, 1 - (y - 3) / total_height
            fig.text(*place, text, ha="center", va="bottom", fontsize=font, linespacing=1.1)
        if labels and column == 0:
            place = (left - 6) / total_width, 1 - (y + tile_height / 2) / total_height
            fig.text(*place, labels[row], ha="right", va="center", fontsize=font, linespacing=1.1)
    return fig


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values, shorter at both ends (no invented values, no shift)."""
    if window <= 1 or len(values) < 2:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = (
        np.maximum(index - window // 2, 0),
        np.minimum(index + (window - 1) // 2 + 1, len(values)),
    )
    return (sums[high] - sums[low]) / (high - low)


def curves(
    runs: Mapping[str, Mapping[str, Sequence[float]]],
    columns: Sequence[str] | Mapping[str, str],
    *,
    x: str = "step",
    xlabel: str | None = None,
    window: float = 0.05,
    logy: bool = False,
    per_row: int = 2,
) -> Figure:
    """Training curves: one panel a column, one line a run; raw values faint, their moving average on top.

    runs: name (gives colour and label; the seeds of a model share a colour) -> columns of its curve.
    columns: names of columns, or {column: axis label with unit}.
    x: column of the horizontal axis. window: width of the average as a fraction of the run.
    """
    titles = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    if not runs or not titles:
        raise ValueError("curves needs at least one run and one column.")
    wide = min(per_row, len(titles))
    tall = math.ceil(len(titles) / wide)
    fig, axes = plt.subplots(tall, wide, figsize=(4.4 * wide + 0.4, 2.9 * tall), squeeze=False)
    for axis, (column, title) in zip(axes.flat, titles.items(), strict=False):
        for name, run in runs.items():
            missing = [key for key in (x, column) if key not in run]
            if missing:
                raise ValueError(
                    f"The curves of {name} lack {missing[0]!r}; they have {', '.join(run)}."
                )
            steps, values = np.asarray(run[x], dtype=float), np.asarray(run[column], dtype=float)
            keep = np.isfinite(values) & np.isfinite(steps)
            steps, values = steps[keep], values[keep]
            dash = ("-", "--", ":", "-.")[_seed_index(name, runs) % 4]
            average = smoothed(values, round(window * len(values)))
            if len(values) > 20:
                axis.plot(steps, values, color=colour(name), alpha=0.18, linewidth=0.8)
            text = (
                label(name) if axis is axes.flat[0] else None
            )  # once in the legend, not once a panel
            axis.plot(steps, average, dash, color=colour(name), label=text)
        axis.set_xlabel(xlabel or x)
        axis.set_ylabel(title)
        if logy:
            axis.set_yscale("log")
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        fig.legend(loc="outside upper center", ncols=min(4, len(runs)))
    return fig


def _seed_index(name: str, names: Mapping[str, Any]) -> int:
    """Which of the runs of one model `name` is: the seeds share a colour and differ in the line's dashes."""
    same = [other for other in names if SEED.sub("", other) == SEED.sub("", name)]
    return same.index(name)


def table(
    rows: Sequence[Mapping[str, Any]],
    caption: str,
    *,
    digits: int | Mapping[str, int] = 3,
    best: Mapping[str, str] | None = None,
) -> None:
    """Display `rows` (one mapping a row, same keys) as a table with a caption, in HTML and as text.

    `{"mean", "std"}` reads "mean ± std"; `best={"PSNR, dB": "max"}` sets the best of a column in bold.
    """
    options = {"digits": digits, "best": best}
    html, text = html_table(rows, caption, **options), text_table(rows, caption, **options)
    display({"text/html": html, "text/plain": text}, raw=True)
