"""Tables of exported images in the forms that others read: COCO, ChestX-ray14, YOLO, and where each image comes from.

All are written from the same records, so they agree. COCO has XYWH in pixels of the image, ChestX-ray14 XYWH in pixels
of a 1024-pixel image, YOLO the centre and size as parts of the image.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from carim_aug.data.chestxray14_tables import BOX_SIZE
from carim_aug.data.provenance import Provenance
from carim_aug.tools.export_plan import NODULE, Item

NOTICE = "Synthetic images made with carim_aug: for training only, never for evaluation. Research use."

_ENTRIES = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
_ENTRIES += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
_BOXES = "Image Index,Finding Label,Bbox [x,y,w,h]"
_PROVENANCE = "Image Index,synthetic,seed,epoch,index,try,weights_hash,class,insertion,background,width,height,bits,"
_PROVENANCE += "boxes"


def write_tables(
    images: Sequence[tuple[Item, Provenance]], *, split: str, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Return all tables of an export, file name to text; its settings go into COCO's info.

    Real images of the validation set have YOLO's labels alone.
    """
    labels = {f"{item.folder.replace('images', 'labels')}/{_stem(item)}.txt": _yolo(made) for item, made in images}
    validation = [item for item, _ in images if item.folder != "images"]
    images = [image for image in images if image[0].folder == "images"]
    boxes = [
        (item.name, NODULE, x1, y1, x2 - x1, y2 - y1)
        for item, made in images
        for x1, y1, x2, y2 in made.boxes_in(BOX_SIZE, BOX_SIZE)
    ]
    tables = {
        "annotations.json": json.dumps(_coco(images, settings), indent=1) + "\n",
        "Data_Entry_2017.csv": _csv(_ENTRIES, (_entry(*image) for image in images)),
        "BBox_List_2017.csv": _csv(_BOXES, boxes),
        "split.csv": _csv("Image Index,split", ((item.name, split) for item, _ in images)),
        "provenance.csv": _csv(_PROVENANCE, (_provenance_row(*image) for image in images)),
    }
    if split == "train":  # synthetic images are no validation set
        tables["data.yaml"] = _yaml(settings["val"], validation)
    return tables | labels


def _yaml(val: str | None, validation: Sequence[Item]) -> str:
    """Return what Ultralytics trains on: synthetic images and negatives, and validates on: real images alone."""
    boxed = sum(bool(item.background and item.background.boxes) for item in validation)
    about = f"real images as they are: {len(validation)}, with nodules: {boxed}"
    if val is not None:
        about = "your real images"
    elif not validation:
        about = "MISSING: put real images there, their labels into val/labels, or export with --val FOLDER"
    elif not boxed:
        about += "; no mAP without, so export with --val FOLDER"
    folder = "val/images" if val is None else json.dumps(val)
    return f"""\
# {NOTICE}
path:  # empty: the folder that this file is in
train: images
val: {folder}  # {about}
names:
  0: {NODULE}
"""


def _coco(images: Sequence[tuple[Item, Provenance]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return COCO's detection format; `file_name` is relative to images/, ids count from 1, a polygon is its box."""
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (item, made) in enumerate(images, start=1):
        size = {"width": made.width, "height": made.height}
        pictures.append(
            {"id": number, "file_name": item.name, **size, "synthetic": made.synthetic, "key": list(made.key)}
        )
        for x1, y1, x2, y2 in made.boxes_in(made.width, made.height):
            box: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
            box |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            annotations.append(box | {"segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]], "iscrowd": 0})
    return {
        "info": {"description": NOTICE, "synthetic": True, "settings": dict(settings)},
        "licenses": [],
        "images": pictures,
        "annotations": annotations,
        "categories": [{"id": 1, "name": NODULE, "supercategory": "finding"}],
    }


def _yolo(made: Provenance) -> str:
    """Return a line per nodule: class 0, centre x, centre y, width, height as parts of the image."""
    return "".join(
        f"0 {(x1 + x2) / 2:.8f} {(y1 + y2) / 2:.8f} {x2 - x1:.8f} {y2 - y1:.8f}\n" for x1, y1, x2, y2 in made.boxes
    )


def _entry(item: Item, made: Provenance) -> list[Any]:
    """Return a row of ChestX-ray14's main table: the background's, where it has one, but for what is another now."""
    row: dict[str, Any] = {"Follow-up #": "0", "OriginalImage[Width": made.width, "Height]": made.height}
    row |= {} if item.background is None else item.background.row
    row |= {"Image Index": item.name, "Finding Labels": made.class_name, "Patient ID": item.patient}
    return [row.get(column, "") for column in _ENTRIES.split(",")]


def _provenance_row(item: Item, made: Provenance) -> tuple[Any, ...]:
    key = (*made.key[:3], " ".join(map(str, made.key[3:])))
    what = (made.weights_hash, made.class_name, made.insertion, made.background or "")
    boxes = json.dumps(made.boxes_in(made.width, made.height))
    return (item.name, int(made.synthetic), *key, *what, made.width, made.height, made.bits, boxes)


def _stem(item: Item) -> str:
    return item.name.rpartition(".")[0]


def _csv(header: str, rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    text.write(header + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
