"""Tables of exported images in the forms that others read: COCO, ChestX-ray14, YOLO, and where each image comes from.

All are written from the same records, so they agree. COCO has XYWH in pixels of the image, ChestX-ray14 XYWH in pixels
of a 1024-pixel image, YOLO the centre and size as parts of the image.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carim_aug.data.chestxray14 import BOX_SIZE
from carim_aug.data.provenance import Provenance

NOTICE = "Synthetic images made with carim_aug: for training only, never for evaluation. Research use."

NODULE = "Nodule"

_ENTRIES = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
_ENTRIES += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
_BOXES = "Image Index,Finding Label,Bbox [x,y,w,h]"
_PROVENANCE = "Image Index,synthetic,seed,epoch,index,try,weights_hash,class,insertion,host,width,height,bits,boxes"


@dataclass(frozen=True)
class Exported:
    """One image on disk.

    Attributes:
        name: of its file in images/.
        patient: whose film it is; of a whole synthetic image, nobody's.
        provenance: where it comes from.
        film: the host's row of ChestX-ray14's main table, column to text; empty if there is none.
    """

    name: str
    patient: int
    provenance: Provenance
    film: Mapping[str, str] = field(default_factory=dict)


def tables(images: Sequence[Exported], *, split: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Gives all tables of an export, file name to text.

    Args:
        images: in order.
        split: that all of them belong to.
        settings: of the export, told in COCO's info.
    """
    texts = {
        "annotations.json": json.dumps(coco(images, settings), indent=1) + "\n",
        "Data_Entry_2017.csv": _csv(_ENTRIES, map(_entry, images)),
        "BBox_List_2017.csv": _csv(_BOXES, (row for image in images for row in _box_rows(image))),
        "split.csv": _csv("Image Index,split", ((image.name, split) for image in images)),
        "provenance.csv": _csv(_PROVENANCE, map(_provenance_row, images)),
        "data.yaml": _yaml(split),
    }
    return texts | {f"labels/{image.name.rpartition('.')[0]}.txt": yolo(image.provenance) for image in images}


def coco(images: Sequence[Exported], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Gives COCO's detection format; `file_name` is relative to images/, a nodule's polygon is its box.

    Args:
        images: in order; their ids count from 1.
        settings: told in "info".
    """
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        told = image.provenance
        pictures.append(
            {
                "id": number,
                "file_name": image.name,
                "width": told.width,
                "height": told.height,
                "synthetic": True,
                "key": list(told.key),
            }
        )
        for x1, y1, x2, y2 in told.boxes_in(told.width, told.height):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": NOTICE, "synthetic": True, "settings": dict(settings)},
        "licenses": [],
        "images": pictures,
        "annotations": annotations,
        "categories": [{"id": 1, "name": NODULE, "supercategory": "finding"}],
    }


def yolo(provenance: Provenance) -> str:
    """Gives a line per nodule: class 0, centre x, centre y, width, height as parts of the image; "" without one."""
    return "".join(
        f"0 {(x1 + x2) / 2:.8f} {(y1 + y2) / 2:.8f} {x2 - x1:.8f} {y2 - y1:.8f}\n"
        for x1, y1, x2, y2 in provenance.boxes
    )


def _entry(image: Exported) -> tuple[Any, ...]:
    told, film = image.provenance, image.film
    return (
        image.name,
        told.class_name,
        film.get("Follow-up #", "0"),
        image.patient,
        *(film.get(column, "") for column in ("Patient Age", "Patient Gender", "View Position")),
        film.get("OriginalImage[Width", told.width),
        film.get("Height]", told.height),
        *(film.get(column, "") for column in ("OriginalImagePixelSpacing[x", "y]")),
    )


def _box_rows(image: Exported) -> list[tuple[Any, ...]]:
    boxes = image.provenance.boxes_in(BOX_SIZE, BOX_SIZE)
    return [(image.name, NODULE, x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]


def _provenance_row(image: Exported) -> tuple[Any, ...]:
    told = image.provenance
    seed, epoch, index, *tries = told.key
    return (
        image.name,
        1,
        seed,
        epoch,
        index,
        " ".join(map(str, tries)),
        told.weights_hash,
        told.class_name,
        told.insertion,
        told.host or "",
        told.width,
        told.height,
        told.bits,
        json.dumps(told.boxes_in(told.width, told.height)),
    )


def _csv(header: str, rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    text.write(header + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _yaml(split: str) -> str:
    other = "val" if split == "train" else "train"
    return (
        f"# {NOTICE}\n# Ultralytics wants a folder of your own real films here too: {other}: .../images\n"
        f"{split}: images\nnames:\n  0: {NODULE}\n"
    )
