"""Small result tables as HTML and as aligned text, without a data-frame library.

GitHub's notebook viewer removes `<style>` and most attributes: the HTML says everything with plain elements.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def format_value(value: Any, digits: int = 3) -> str:
    """One cell as text: floats to `digits` decimals, `{"mean", "std"}` as "mean ± std".

    A missing or non-finite value reads "n/a".
    """
    if value is None:
        return "n/a"
    if isinstance(value, Mapping):
        mean, std = value.get("mean"), value.get("std")
        text = format_value(mean, digits)
        return text if std is None or text == "n/a" else f"{text} ± {format_value(std, digits)}"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{THIN SPACE}") if abs(value) >= 10_000 else str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return f"{number:.{digits}f}" if math.isfinite(number) else "n/a"


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of all rows in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _comparable(value: Any) -> float | None:
    """The number that a cell is ranked by, or None where there is none."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    if value is None or isinstance(value, bool | str):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _cells(
    rows: Sequence[Mapping[str, Any]], digits: int | Mapping[str, int], best: Mapping[str, str]
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Column names, and for each row (text, is best of its column)."""
    columns = columns_of(rows)
    unknown = [name for name in best if name not in columns or best[name] not in ("min", "max")]
    if unknown:
        raise ValueError(
            f"`best` maps a column to 'min' or 'max'; {unknown} does not fit: {columns}."
        )
    winners = {}
    for name, direction in best.items():
        numbers = [number for row in rows if (number := _comparable(row.get(name))) is not None]
        if len(set(numbers)) > 1:
            winners[name] = (min if direction == "min" else max)(numbers)
    body = []
    for row in rows:
        line = []
        for name in columns:
            value = row.get(name)
            precision = digits.get(name, 3) if isinstance(digits, Mapping) else digits
            is_best = name in winners and _comparable(value) == winners[name]
            line.append((format_value(value, precision) if name in row else "", is_best))
        body.append(line)
    return columns, body


def html_table(
    rows: Sequence[Mapping[str, Any]],
    caption: str,
    *,
    digits: int | Mapping[str, int] = 3,
    best: Mapping[str, str] | None = None,
) -> str:
    """`<table>` of `rows` (one mapping a row); `best={column: "min" | "max"}` sets a column's best bold."""
    columns, body = _cells(rows or [{"": "no rows yet"}], digits, (best or {}) if rows else {})
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for line in body:
        cells = [
            f"<strong>{escape(text)}</strong>" if is_best else escape(text)
            for text, is_best in line
        ]
        first = f'<th scope="row">{cells[0]}</th>' if cells else ""
        lines.append(f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>")
    newline = "\n"
    return (
        f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{newline.join(lines)}\n</tbody>\n</table>"
    )


def text_table(
    rows: Sequence[Mapping[str, Any]],
    caption: str,
    *,
    digits: int | Mapping[str, int] = 3,
    best: Mapping[str, str] | None = None,
) -> str:
    """The same table for a terminal; the best cell of a column carries a star."""
    if not rows:
        return f"{caption}\n(no rows yet)"
    columns, body = _cells(rows, digits, best or {})
    grid = [columns] + [
        [text + ("*" if is_best else "") for text, is_best in line] for line in body
    ]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]

    def join(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([caption, *(join(line) for line in grid)])
