"""CSV tables as rows of named columns, with errors that name file, row and column."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from carim_aug.data.errors import DataError


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and columns of each row that is not blank.

    Args:
        path: CSV file, UTF-8 with or without byte-order mark, any line ends; further columns are passed on.
        columns: Names that the header must hold.

    Yields:
        Line number (the header is line 1) and a dict from column to value, both stripped of blanks.

    Raises:
        DataError: The file is missing or unreadable, a column is missing, or a row is too short.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                found = ", ".join(repr(name) for name in header) or "none"
                raise DataError(f"{path}: no column {missing[0]!r}; columns found: {found}")
            needed = max(header.index(name) for name in columns)
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) <= needed:
                    raise DataError(f"{path}, line {reader.line_num}: {len(row)} cells, needs {needed + 1}: {row}")
                yield reader.line_num, dict(zip(header, (cell.strip() for cell in row), strict=False))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: unreadable table ({error})") from error


def number(path: str | Path, line: int, column: str, text: str) -> float:
    """The finite number in a cell.

    Raises:
        DataError: The text is not a finite number.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataError(f"{path}, line {line}: {column} must be a number, got {text!r}")
    return value


def clip_box(
    path: str | Path, line: int, box: tuple[float, float, float, float], size: tuple[float, float], slack: float
) -> tuple[float, float, float, float]:
    """The box within the image: rounding errors are cut off, worse is refused.

    Args:
        path: The table, for the message.
        line: The row, for the message.
        box: XYXY.
        size: Width and height of the image.
        slack: How far a box may overhang.

    Returns:
        XYXY within the image.

    Raises:
        DataError: The box is inverted, empty, or overhangs by more than `slack`.
    """
    x1, y1, x2, y2 = box
    width, height = size
    if not (x1 < x2 and y1 < y2):
        raise DataError(f"{path}, line {line}: box must have x1 < x2 and y1 < y2, got {box}")
    if min(x1, y1) < -slack or x2 > width + slack or y2 > height + slack:
        raise DataError(f"{path}, line {line}: box must lie in the image of {width:g} x {height:g} px, got {box}")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if not (x1 < x2 and y1 < y2):
        raise DataError(f"{path}, line {line}: box must lie in the image of {width:g} x {height:g} px, got {box}")
    return x1, y1, x2, y2
