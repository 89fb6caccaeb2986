"""Where an exported image comes from: a record in the PNG file itself, so that the two cannot part."""

import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

MARKER = "synthetic.json"
"""A file of this name stands in every folder of exported images, before the first image does."""

Box = tuple[float, float, float, float]

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, AttributeError, struct.error)


@dataclass(frozen=True)
class Provenance:
    """What makes one image of an export again, and what is in it."""

    key: tuple[int, ...]  # (seed, epoch, index[, try]), as `SyntheticNoduleMix.regenerate` takes it
    weights_hash: str  # SHA-256 of the generator's tensors, as hex
    class_name: str  # "Nodule" or "No Finding"
    insertion: str  # "whole", "graft", or "none" of a real image that was left as it is
    background: str | None  # file name of the real image that it is or lies in; None for a whole image
    boxes: tuple[Box, ...]  # of the nodules, XYXY as parts of the image's width and height
    width: int  # in pixels
    height: int
    bits: int  # of a pixel, 8 or 16

    @property
    def synthetic(self) -> bool:
        """Whether anything in the image is generated."""
        return self.insertion != "none"

    def boxes_in(self, width: float, height: float) -> list[Box]:
        """Return the boxes XYXY in pixels of an image of this width and height."""
        return [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in self.boxes]

    def png_info(self) -> PngInfo:
        """Return tEXt chunks: "synthetic" = "1" or "0", "key", "weights_hash", and all of it as JSON in "carim_aug"."""
        info = PngInfo()
        texts = {"synthetic": str(int(self.synthetic)), "key": json.dumps(self.key), "weights_hash": self.weights_hash}
        for name, text in {**texts, "carim_aug": json.dumps(asdict(self))}.items():
            info.add_text(name, text)
        return info

    @classmethod
    def read(cls, path: str | Path) -> "Provenance | None":
        """Read the record in a PNG file, or None if there is no such file, or no whole one, or none with a record.

        The checksums of all its chunks are looked at, its pixels are not decoded.
        """
        try:
            with Image.open(path) as picture:
                if not isinstance(picture, PngImageFile):
                    return None
                record = json.loads(picture.info["carim_aug"])
                picture.verify()
            if "host" in record:  # carim-aug 0.1
                record["background"] = record.pop("host")
            boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in record.pop("boxes"))
            return cls(key=tuple(record.pop("key")), boxes=boxes, **record)
        except _BROKEN:
            return None


def is_synthetic(path: str | Path) -> bool:
    """Return whether an image's file says that it is synthetic; its header alone is read."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("synthetic") == "1"
    except _BROKEN:
        return False


def export_over(folders: Iterable[str | Path]) -> Path | None:
    """Return the first export that one of these folders is, or lies right in; None if there is none."""
    for folder in dict.fromkeys(Path(folder).absolute() for folder in folders):
        for place in (folder, folder.parent):
            if (place / MARKER).is_file():
                return place
    return None
