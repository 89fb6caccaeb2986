"""The report as files: Markdown and pictures to one HTML page, tables to CSV."""

import base64
import csv
import html
import io
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from train.reproduction.tables import Table

STYLE = (
    "body{font:15px sans-serif;margin:2em}td,th{border:1px solid #ccc;padding:3px 8px;text-align:left}"
    "table{border-collapse:collapse;margin:1em 0}img{max-width:100%}"
)


def page(text: str, pictures: Mapping[str, Image.Image | Tensor]) -> str:
    """Return one self-contained HTML page of Markdown's headings, paragraphs and tables, and of pictures by title."""
    blocks = [_block(block) for block in text.strip().split("\n\n")]
    for title, picture in pictures.items():
        name, data = html.escape(title), base64.b64encode(_png(picture)).decode()
        blocks.append(f"<h3>{name}</h3><img alt='{name}' src='data:image/png;base64,{data}'>")
    head = f"<!doctype html><meta charset='utf-8'><title>carim_aug: figures</title><style>{STYLE}</style>"
    return head + "\n" + "\n".join(blocks) + "\n"


def write_csvs(tables: Mapping[str, Table], folder: Path) -> list[Path]:
    """Write one CSV file a table, named after the start of its title, and return their paths."""
    paths = []
    for title, (header, rows) in tables.items():
        name = re.sub("[^a-z0-9]+", "-", title.partition(":")[0].lower()).strip("-")
        paths.append(folder / f"{name}.csv")
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header.split("|"), *rows])
    return paths


def _block(block: str) -> str:
    """Return one heading, paragraph or table as HTML."""
    if block.startswith("#"):
        level = len(block) - len(block.lstrip("#"))
        return f"<h{level}>{html.escape(block.lstrip('# '))}</h{level}>"
    if not block.startswith("|"):
        return f"<p>{html.escape(block)}</p>"
    head, _, *rows = [line.strip("| ").split(" | ") for line in block.split("\n")]
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _png(picture: Image.Image | Tensor) -> bytes:
    image = VF.to_pil_image((picture.clamp(-1, 1) + 1) / 2) if isinstance(picture, Tensor) else picture
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
