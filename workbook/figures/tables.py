"""Result tables in HTML and as text. GitHub removes styles, so the HTML consists of plain elements."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from IPython.display import display

Rows = Sequence[Mapping[str, Any]]
Digits = int | Mapping[str, int]


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


def _number(value: Any) -> float | None:
    """The number that a cell is ranked by; None where there is none."""
    value = value.get("mean") if isinstance(value, Mapping) else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _cells(
    rows: Rows, digits: Digits, best: Mapping[str, str]
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Column names, and for each row (text, is best of its column)."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    winners = {}
    for name, direction in best.items():
        numbers = [n for row in rows if (n := _number(row.get(name))) is not None]
        if len(set(numbers)) > 1:
            winners[name] = (min if direction == "min" else max)(numbers)
    body = []
    for row in rows:
        cells = []
        for name in columns:
            precision = digits if isinstance(digits, int) else digits.get(name, 3)
            text = format_value(row[name], precision) if name in row else ""
            is_best = name in winners and _number(row.get(name)) == winners[name]
            cells.append((text, is_best))
        body.append(cells)
    return columns, body


def html_table(
    rows: Rows, caption: str, *, digits: Digits = 3, best: Mapping[str, str] | None = None
) -> str:
    """`<table>` with one mapping a row; `best={column: "min" | "max"}` sets a column's best bold."""
    columns, body = _cells(rows or [{"": "no rows yet"}], digits, best or {})
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for cells in body:
        texts = [f"<strong>{escape(t)}</strong>" if b else escape(t) for t, b in cells]
        first, *others = texts
        line = f'<th scope="row">{first}</th>' + "".join(f"<td>{text}</td>" for text in others)
        lines.append(f"<tr>{line}</tr>")
    return (
        f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>"
    )


def text_table(
    rows: Rows, caption: str, *, digits: Digits = 3, best: Mapping[str, str] | None = None
) -> str:
    """The same table for a terminal; the best cell of a column carries a star."""
    columns, body = _cells(rows or [{"": "no rows yet"}], digits, best or {})
    grid = [columns] + [[text + "*" * is_best for text, is_best in cells] for cells in body]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    lines = []
    for first, *others in grid:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join([caption, *lines])


def table(
    rows: Rows, caption: str, *, digits: Digits = 3, best: Mapping[str, str] | None = None
) -> None:
    """Display rows as a table in a notebook."""
    html, text = (
        form(rows, caption, digits=digits, best=best) for form in (html_table, text_table)
    )
    display({"text/html": html, "text/plain": text}, raw=True)
