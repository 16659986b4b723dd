"""The look of every figure, and the figures that several notebooks draw."""

import base64
import io
import math
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from workbook.names import SEED, label

DPI = 110
MAX_SVG_BYTES = 150_000  # scatter plots of thousands of points are smaller as pixels
PNG = b"\x89PNG"  # what such a file begins with
LARGE = 60_000  # bytes
PAGE_WIDTH = 1140  # px of a report's text column; browsers shrink wider figures

# Okabe & Ito's palette: distinguishable with every common colour-vision deficiency.
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

# A model keeps its colour in every figure; a generator has that of its tokenizer.
COLOURS = {
    "vit_vqgan": ORANGE,
    "sit4": BLUE,
    "sit4_ours": SKY,
    "sit4_ours_lifted": "#661100",
    "sit4_scd": "#117733",
    "sit5": GREEN,
    "sit5_sc": PURPLE,
    "sit5_sc_second": "#332288",
    "sit6": "#AA4499",
    "captioned_vit_vqgan": ORANGE,
    "captioned_sit4_sc": "#44AA99",
    "approximation": VERMILLION,
    "details": SKY,
}
SPARE_COLOURS = ("#999933", "#DDCC77", "#661100")  # for names that are not listed


def style() -> None:
    """Set the workbook's look for all figures that follow."""
    plt.style.use(Path(__file__).with_name("look.mplstyle"))


def colour(name: str) -> str:
    """Hex colour of a model or series, the same in every figure and for every seed."""
    name = SEED.sub("", name).removeprefix("ar_")
    name = "details" if name.startswith("details_") else name
    return COLOURS.get(name) or SPARE_COLOURS[zlib.crc32(name.encode()) % len(SPARE_COLOURS)]


def png(figure: Figure) -> bytes:
    """PNG bytes that depend on the drawing alone (no version or date inside)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    return buffer.getvalue()


def small_picture(data: bytes) -> bytes:
    """The smallest of the PNG `data`, its best lossless encoding, 256 colors where nobody would see
    it, and for a large picture of photographs a JPEG of quality 92.

    Lines and text survive a palette, photographs do not: it is taken only if it changes the color
    values, 0 to 255, by less than 0.5 on average and by at most 16 in all but one of a thousand.
    A JPEG is taken where it saves half of more than `LARGE` bytes.
    """
    with Image.open(io.BytesIO(data)) as source:
        image = source.convert("RGBA")
    if cast(tuple[tuple[int, int], ...], image.getextrema())[3] != (255, 255):
        return data  # transparent: left as it is
    image = image.convert("RGB")
    palette = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    before, after = (np.asarray(each, dtype=np.int16) for each in (image, palette.convert("RGB")))
    difference = np.abs(after - before)
    is_close = difference.mean() < 0.5 and np.quantile(difference, 0.999) <= 16
    lossless, jpeg = io.BytesIO(), io.BytesIO()
    (palette if is_close else image).save(lossless, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=92, subsampling=0, optimize=True)
    smallest = min(data, lossless.getvalue(), key=len)
    return jpeg.getvalue() if len(smallest) > max(LARGE, 2 * len(jpeg.getvalue())) else smallest


def svg(figure: Figure) -> str | None:
    """SVG that depends on the drawing alone; None for figures with pixels or too many points."""
    artists = (artist for axes in figure.axes for artist in axes.get_children())
    if any(isinstance(artist, AxesImage | QuadMesh) for artist in artists) or figure.images:
        return None
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sitlib"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Text stays text; Verdana, which most machines without DejaVu Sans have, is as wide.
    text = re.sub("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif", buffer.getvalue())
    return text if len(text) <= MAX_SVG_BYTES else None


def show(figure: Figure, alt: str, caption: str = "", name: str = "") -> None:
    """Display a figure and close it.

    Args:
        alt: text alternative: what a reader who cannot see the figure must know.
        caption: Markdown-free sentence below the figure: how to read it and what to look for.
        name: identifies the figure inside its notebook, for the front page of the site.

    Raises:
        ValueError: `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("show(figure, alt) needs a sentence that says what the figure shows.")
    about = {"alt": alt, "caption": caption, "name": name}
    about = {key: " ".join(text.split()) for key, text in about.items() if text}
    kind, picture = _encoded(png(figure))
    data = {kind: picture, "text/plain": about.get("caption", about["alt"])}
    if vectors := svg(figure):
        data["image/svg+xml"] = vectors
    plt.close(figure)  # or the inline backend draws it again at the end of the cell
    display(data, raw=True, metadata={kind: about for kind in data if kind.startswith("image/")})
    if caption:  # below the figure in JupyterLab; the site has it in the figure's frame
        data = {"text/markdown": f"*{about['caption']}*", "text/plain": ""}
        display(data, raw=True, metadata={"text/markdown": {"caption": True}})


def say(*paragraphs: str) -> None:
    """Show paragraphs of Markdown, whose numbers come from results."""
    display(Markdown("\n\n".join(paragraphs)))


def as_pixels(images: Any) -> np.ndarray:
    """Images in [0, 1] (clipped), [B, C, H, W] -> uint8 [B, H, W, 3]; one channel is grey."""
    if isinstance(images, list | tuple):
        images = np.stack([np.asarray(image) for image in images])
    x = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images, np.float32)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(f"images must be [B, 3 or 1, H, W] with B >= 1, not {list(x.shape)}.")
    x = np.broadcast_to(x, (len(x), 3, *x.shape[2:])).transpose(0, 2, 3, 1)
    return (np.clip(np.nan_to_num(x), 0, 1) * 255 + 0.5).astype(np.uint8)


def picture_uri(image: Any, scale: int = 1) -> str:
    """Address of an image [3, H, W] in [0, 1] that is its own content, enlarged `scale` times."""
    pixels = as_pixels(image[None])[0].repeat(scale, 0).repeat(scale, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:{};base64,{}".format(*_encoded(buffer.getvalue()))


def _encoded(data: bytes) -> tuple[str, str]:
    """The media type of `small_picture` of a PNG, and its bytes in base64."""
    picture = small_picture(data)
    kind = "image/png" if picture.startswith(PNG) else "image/jpeg"
    return kind, base64.b64encode(picture).decode()


def image_grid(
    images: Any,
    titles: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    columns: int | None = None,
    scale: int | None = None,
) -> Figure:
    """Images side by side, every pixel an exact square of screen pixels, so nothing is resampled.

    Args:
        images: float in [0, 1] (clipped), [B, 3, H, W] or [B, 1, H, W], or a list of [3, H, W].
        titles: one above each image, or one above each column.
        row_labels: left of each row; their number sets `columns` if that is not given.
        columns: images in a row; default: all, at most 8.
        scale: screen pixels for an image pixel; default: images of about 128 px that fit a page.
    """
    pixels = as_pixels(images)
    count, height, width, _ = pixels.shape
    columns = columns or (math.ceil(count / len(row_labels)) if row_labels else min(count, 8))
    rows = math.ceil(count / columns)
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows of {columns} images.")
    if titles and len(titles) not in (count, columns):
        raise ValueError(f"give {count} titles (one an image) or {columns} (one a column).")

    # Layout in whole pixels: a layout engine would resize the axes and blur the images.
    gap, letter, line = 3, 8, 17  # px
    labels = [textwrap.fill(str(text), 18) for text in row_labels]
    left = max((len(part) for text in labels for part in text.split("\n")), default=-1) * letter + 8
    if scale is None:
        room = PAGE_WIDTH - left - gap * columns
        scale = max(1, min(round(128 / height), room // (columns * width)))
    tile_h, tile_w = height * scale, width * scale
    wrapped = [textwrap.fill(str(text), max(4, tile_w // letter)) for text in titles]
    title_h = max((text.count("\n") + 1 for text in wrapped), default=0) * line
    title_each = len(wrapped) == count and rows > 1
    step, top = tile_h + gap + title_h * title_each, title_h + 2
    total_w, total_h = left + columns * (tile_w + gap), top + (rows - 1) * step + tile_h

    figure = plt.figure(figsize=(total_w / DPI, total_h / DPI), dpi=DPI, layout="none")

    def write(x: float, y: float, text: str, **look: Any) -> None:
        figure.text(x / total_w, 1 - y / total_h, text, fontsize=8.5, **look)

    for i, image in enumerate(pixels.repeat(scale, axis=1).repeat(scale, axis=2)):
        row, column = divmod(i, columns)
        x, y = left + column * (tile_w + gap), top + row * step
        figure.figimage(image, xo=x, yo=total_h - y - tile_h, origin="upper", resize=False)
        if wrapped and (title_each or row == 0):
            text = wrapped[i if title_each else column]
            write(x + tile_w / 2, y - 3, text, ha="center", va="bottom", linespacing=1.1)
        if labels and column == 0:
            write(left - 6, y + tile_h / 2, labels[row], ha="right", va="center")
    return figure


def panels(
    titles: Sequence[str], width: float = 3.7, height: float = 3.3, sharey: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with one titled panel beside the other; width and height of a panel in inches."""
    size = (width * len(titles) + 0.4, height)
    figure, axes = plt.subplots(1, len(titles), figsize=size, sharey=sharey, squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(textwrap.fill(title, int(width * 9)))
    return figure, list(axes[0])


def bars_of(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[list[float]]:
    """Matplotlib's lengths of error bars from intervals (low, high)."""
    pairs = list(zip(values, intervals, strict=True))
    return [[abs(bounds[side] - value) for value, bounds in pairs] for side in (0, 1)]


def forest(found: Mapping[str, Mapping[str, Any]], zero: str) -> Figure:
    """Estimates of LPIPS-VGG and PSNR with their intervals, a row each: name -> metric -> estimate.

    Blue: better than 0, red: worse, grey: not told apart. `zero` says what 0 means.
    """
    titles = ["LPIPS-VGG (left is better)", "PSNR, dB (right is better)"]
    figure, axes = panels(titles, width=4.6, height=0.34 * len(found) + 1.1, sharey=True)
    for axis, metric, better in zip(axes, ("lpips_vgg", "psnr"), (-1, 1), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for row, estimate in enumerate(of[metric] for of in found.values()):
            is_told = estimate.low > 0 or estimate.high < 0
            tone = (BLUE if better * estimate.value > 0 else VERMILLION) if is_told else "#7A7A7A"
            axis.plot([estimate.low, estimate.high], [row, row], color=tone, linewidth=2)
            axis.plot(estimate.value, row, "o", color=tone, markersize=6)
        axis.set_xlabel(f"difference; 0 = {zero}")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    return figure


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values, shorter at both ends."""
    if not len(values):
        return values
    ones = np.ones(max(window, 1))
    count = np.convolve(np.ones(len(values)), ones, "same")
    return np.convolve(values, ones, "same") / count


def curves(
    name: str, run: Mapping[str, Sequence[float]], columns: Mapping[str, str], per_row: int = 2
) -> Figure:
    """Training curves of a run: a panel a column {name: title}, raw values under their average."""
    wide = min(per_row, len(columns))
    tall = math.ceil(len(columns) / wide)
    figure, axes = plt.subplots(tall, wide, figsize=(4.4 * wide + 0.4, 2.9 * tall), squeeze=False)
    for axis, (column, title) in zip(axes.flat, columns.items(), strict=False):
        steps, values = np.asarray(run["step"], float), np.asarray(run[column], float)
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if len(values) > 20:
            axis.plot(steps, values, color=colour(name), alpha=0.18, linewidth=0.8)
        average = smoothed(values, round(len(values) / 20))
        axis.plot(steps, average, "-", color=colour(name))
        axis.set(xlabel="step", ylabel=title)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    return figure


def nats_by_scale(models: Mapping[str, Sequence[float]], uniform: float) -> Figure:
    """Held-out nats per token of every scale beside those of a uniform guess."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for name, values in models.items():
        if len(values) == 1:
            axis.axhline(values[0], color=colour(name), label=f"{label(name)} (one scale)")
        else:
            x = range(1, len(values) + 1)
            axis.plot(x, values, "o-", color=colour(name), label=label(name))
    axis.axhline(uniform, color="0.5", linestyle=":", label="uniform guess")
    axis.set_xticks(range(1, max(map(len, models.values())) + 1))
    axis.set(xlabel="scale (1 = approximation, then coarse to fine)", ylabel="nats per token")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def sweep_curves(
    sweeps: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    setting: str,
    title: str,
    metrics: Mapping[str, str],
) -> Figure:
    """A panel a metric {name: title} against a sampler's setting: line of means, dots of seeds.

    Args:
        sweeps: model -> its seeds -> rows with the setting and the metrics.
    """
    figure, axes = panels([""] * len(metrics), height=3.2)
    for axis, (metric, text) in zip(axes, metrics.items(), strict=True):
        for name, seeds in sweeps.items():
            x = [row[setting] for row in seeds[0]]
            values = np.array([[row[metric] for row in rows] for rows in seeds])
            axis.plot(x, values.mean(0), "-", color=colour(name), label=label(name))
            for one in values:
                axis.plot(x, one, "o", color=colour(name), markersize=4, alpha=0.6)
            axis.set_xticks(x)
        axis.set(xlabel=title, ylabel=text)
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=min(4, len(sweeps)))
    return figure
