"""Result tables in HTML, of plain elements (GitHub removes styles), in Markdown and as text."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from IPython.display import display

from sitlib.metrics import GENERATION_METRICS, METRICS

Rows = Sequence[Mapping[str, Any]]
Digits = int | Mapping[str, int] | None
Best = Mapping[str, str] | bool | None


@dataclass(frozen=True)
class Column:
    """Look of a measured value: title with unit, decimals, which is better, factor."""

    title: str
    digits: int
    best: Literal["max", "min"] | None = None
    factor: float = 1.0

    @property
    def arrow(self) -> str:
        """Title with an arrow to the better values: "PSNR, dB ↑"."""
        return self.title + {"max": " ↑", "min": " ↓", None: ""}[self.best]


COLUMNS = {
    name: Column(m.title, m.digits, "max" if m.higher_is_better else "min", m.factor)
    for name, m in {**METRICS, **GENERATION_METRICS}.items()
} | {
    "usage": Column("codes used, least used codebook, %", 1, "max"),
    "lite0_score": Column("Lite0 score", 2, "max"),
    "bits_per_pixel": Column("bits per pixel", 3),
    "r_precision_seen": Column("seen names, %", 1, "max"),
    "r_precision_held_out": Column("new names, %", 1, "max"),
    "nats_per_token": Column("nats per token", 3),  # codes of two tokenizers do not compare
    "nats_per_image": Column("nats per image", 1),
    "parameters": Column("parameters, M", 2, factor=1e-6),
}
BY_TITLE = {title: c for c in COLUMNS.values() for title in (c.title, c.arrow)}


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation over seeds; None where a value is not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    is_whole = len(finite) == len(values)
    mean = float(f"{statistics.fmean(finite):.6g}") if is_whole else None
    std = float(f"{statistics.stdev(finite):.6g}") if is_whole and len(values) > 1 else None
    return {"mean": mean, "std": std, "seeds": len(values)}


def cells(seeds: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Cells of a table row: title -> `spread` over seeds, of the names that all of them have.

    Whole numbers, which are properties of a model and not measured, have no spread.
    """
    row: dict[str, Any] = {}
    for name in names:
        if all(name in seed for seed in seeds):
            column, values = COLUMNS[name], [seed[name] for seed in seeds]
            shown = [None if value is None else column.factor * value for value in values]
            row[column.title] = shown[0] if isinstance(values[0], int) else spread(shown)
    return row


def format_value(value: Any, digits: int = 3) -> str:
    """One cell: floats to `digits` decimals, {"mean", "std"} as "mean ± std", missing as "n/a"."""
    if isinstance(value, Mapping):
        mean, std = value.get("mean"), value.get("std")
        text = format_value(mean, digits)
        return text if std is None or text == "n/a" else f"{text} ± {format_value(std, digits)}"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{THIN SPACE}") if abs(value) >= 10_000 else str(value)
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{float(value):.{digits}f}"


def _ranked(value: Any) -> float | None:
    """The number that a cell is ranked by; None where there is none."""
    value = value.get("mean") if isinstance(value, Mapping) else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _grid(rows: Rows, digits: Digits, best: Best) -> list[list[tuple[str, bool]]]:
    """The texts of a table, names of columns first; and whether each is its column's best."""
    rows = rows or [{"": "no rows yet"}]
    columns = []
    for name in dict.fromkeys(key for row in rows for key in row):
        known = BY_TITLE.get(name, Column(name, 3))
        precision = digits if isinstance(digits, int) else (digits or {}).get(name, known.digits)
        ranked = [_ranked(row.get(name)) for row in rows]
        numbers = {number for number in ranked if number is not None}
        direction = known.best if best is True else (best or {}).get(name)
        winner = None
        if direction and len(numbers) > 1:
            winner = min(numbers) if direction == "min" else max(numbers)
        column = [(name, False)]
        for row, number in zip(rows, ranked, strict=True):
            text = format_value(row[name], precision) if name in row else ""
            column.append((text, number is not None and number == winner))
        columns.append(column)
    return [list(line) for line in zip(*columns, strict=True)]


def html_table(rows: Rows, caption: str, *, digits: Digits = None, best: Best = None) -> str:
    """`<table>` with one mapping a row; the best of a column in bold.

    Args:
        digits: decimals, of all columns or by column; default: those of `COLUMNS`, or 3.
        best: {column: "min" | "max"}, or True for the directions of `COLUMNS`.
    """
    names, *body = _grid(rows, digits, best)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in names)
    lines = []
    for line in body:
        first, *others = (f"<strong>{escape(t)}</strong>" if b else escape(t) for t, b in line)
        cells = "".join(f"<td>{text}</td>" for text in others)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return "\n".join(
        [
            f"<table>\n<caption>{escape(caption)}</caption>",
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *lines,
            "</tbody>\n</table>",
        ]
    )


def markdown_table(rows: Rows, digits: Digits = None) -> str:
    """The same table in Markdown, without a caption."""
    head, *body = [[text for text, _ in line] for line in _grid(rows, digits, None)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def text_table(rows: Rows, caption: str, *, digits: Digits = None, best: Best = None) -> str:
    """The same table for a terminal; the best cell of a column carries a star."""
    grid = [[text + "*" * is_best for text, is_best in line] for line in _grid(rows, digits, best)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [caption]
    for line in grid:
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def table(rows: Rows, caption: str, *, digits: Digits = None, best: Best = None) -> None:
    """Display rows as a table in a notebook."""
    html, text = (
        form(rows, caption, digits=digits, best=best) for form in (html_table, text_table)
    )
    display({"text/html": html, "text/plain": text}, raw=True)
