"""Image files as grey 8-bit tensors, CSV tables as rows of named columns; each error names the file."""

import csv
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""File name endings that count as images, in lower case."""

Box = tuple[float, float, float, float]

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataError(ValueError):
    """A table, image or archive on disk is missing, unreadable, or breaks the rule its message states."""


@contextmanager
def _open_image(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: unreadable image ({error})") from error


def read_grey(path: str | Path, *, channels: int = 1) -> tv_tensors.Image:
    """Read an image as grey, (channels, H, W) uint8; DataError if it is missing, unreadable or of another depth.

    Args:
        path: an 8-bit image file in any mode (some files of ChestX-ray14 are RGBA), or a 16-bit grey PNG or TIFF, whose
            0 to 65535 become 0 to 255.
        channels: 1, or 3 equal ones.
    """
    with _open_image(path) as file:
        mode, pixels = file.mode, None
        if mode.startswith("I;16") or (mode == "I" and file.format == "PNG"):  # older Pillow's name for it
            pixels = np.rint(np.array(file) / 257).astype(np.uint8)
        elif mode[0] not in "IF":
            pixels = np.array(file.convert("L"))
    if pixels is None:
        raise DataError(f"{path}: images must be of 8 bits, or grey of 16, got mode {mode}")
    image = torch.from_numpy(pixels)[None]
    return tv_tensors.Image(image if channels == 1 else image.repeat(channels, 1, 1))


def read_size(path: str | Path) -> tuple[int, int]:
    """Read height and width of an image from its header alone; DataError if it is missing or unreadable."""
    with _open_image(path) as file:
        return file.height, file.width


def images_below(folder: str | Path) -> list[str]:
    """Return the paths of all images in a folder, at any depth, sorted; hidden files and folders are left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        shown = (name for name in files if name[0] != "." and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
        found += [os.path.join(where, name) for name in shown]
    return sorted(found)


def read_header(path: str | Path) -> list[str]:
    """Read the names of a CSV's columns; DataError as for `read_rows`."""
    with _open_table(path) as (_, names):
        return names


def read_rows(
    path: str | Path, columns: Sequence[str], *, aliases: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV that are not blank: line number (the header is 1) and a dict from column to value.

    The file is UTF-8 with or without byte-order mark, of any line ends; blanks about names and values are stripped. The
    header must hold `columns`, some of which may have `aliases` in the file; further ones are passed on. DataError if
    the file is missing or unreadable, a column is missing, or a row is too short.
    """
    with _open_table(path) as (reader, names):
        header = [(aliases or {}).get(name, name) for name in names]
        if missing := [name for name in columns if name not in header]:
            found = ", ".join(map(repr, names)) or "none"
            raise DataError(f"{path}: no column {missing[0]!r}; columns found: {found}")
        needed = max(header.index(name) for name in columns)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) <= needed:
                raise DataError(f"{path}, line {reader.line_num}: {len(row)} cells, needs {needed + 1}: {row}")
            yield reader.line_num, dict(zip(header, (cell.strip() for cell in row), strict=False))


@contextmanager
def _open_table(path: str | Path) -> Iterator[tuple[Any, list[str]]]:
    """Yield a CSV's reader, after its header, and the names in that; DataError for what is wrong while it is read."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            yield reader, [name.strip() for name in next(reader, [])]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: unreadable table ({error})") from error


def number(path: str | Path, line: int, column: str, text: str) -> float:
    """Return the finite number in a table's cell; DataError if there is none."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataError(f"{path}, line {line}: {column} must be a number, got {text!r}")
    return value


def clip_box(
    path: str | Path, line: int, box: Box, size: tuple[float, float], slack: float, *, remedy: str = ""
) -> Box:
    """Clip a table's box XYXY to its image (width, height): rounding errors are cut off, worse is refused.

    DataError names table and line where the box is inverted, empty, or overhangs by more than `slack`; it ends with the
    remedy, if there is one.
    """
    x1, y1, x2, y2 = box
    width, height = size
    if not (x1 < x2 and y1 < y2):
        raise DataError(f"{path}, line {line}: box must have x1 < x2 and y1 < y2, got {box}")
    overhangs = min(x1, y1) < -slack or x2 > width + slack or y2 > height + slack
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if overhangs or not (x1 < x2 and y1 < y2):
        got = f"{width:g} x {height:g} px, got {box}" + (f": {remedy}" if remedy else "")
        raise DataError(f"{path}, line {line}: box must lie in the image of {got}")
    return x1, y1, x2, y2
