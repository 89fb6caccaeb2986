"""Cells and tables of the reproduction, as Markdown: a `Table` is a header, cells split at |, and its rows."""

import math
from collections.abc import Mapping, Sequence

Row = list[str]
Table = tuple[str, list[Row]]


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spanned(figure: Mapping[str, float]) -> str:
    """Return a number with its interval."""
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def quartiles(figure: Mapping[str, float]) -> str:
    """Return a median with its quartiles."""
    return f"{number(figure['value'])} [[{number(figure['q1'])}, {number(figure['q3'])}]]"


def table(header: str, rows: Sequence[Row]) -> str:
    """Return a Markdown table; the header's cells are split at |."""
    cells = header.split("|")
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells, ["---"] * len(cells), *rows])


def titled(tables: Mapping[str, Table]) -> list[str]:
    """Return the blocks of tables, each below its title."""
    return [block for title, (header, rows) in tables.items() for block in (f"### {title}", table(header, rows))]
