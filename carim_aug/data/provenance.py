"""Where a synthetic image on disk comes from: told in the PNG file itself, so that image and record cannot part."""

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

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, struct.error)


@dataclass(frozen=True)
class Provenance:
    """What makes one synthetic image again, and what is in it.

    Attributes:
        key: (seed, epoch, index[, try]), as `SyntheticNoduleMix.regenerate` takes it.
        weights_hash: SHA-256 of the generator's tensors, as hex.
        class_name: "Nodule" or "No Finding".
        insertion: "whole" or "graft".
        host: file name of the real image that a graft lies in; None for a whole image.
        boxes: of the nodules, XYXY as parts of the image's width and height, in [0, 1].
        width: of the image, in pixels.
        height: of the image, in pixels.
        bits: of a pixel, 8 or 16.
    """

    key: tuple[int, ...]
    weights_hash: str
    class_name: str
    insertion: str
    host: str | None
    boxes: tuple[Box, ...]
    width: int
    height: int
    bits: int

    def boxes_in(self, width: float, height: float) -> list[Box]:
        """Gives the boxes XYXY in pixels of an image of this width and height."""
        return [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in self.boxes]

    def png_info(self) -> PngInfo:
        """Gives tEXt chunks: "synthetic" = "1", "key", "weights_hash", and all of it as JSON in "carim_aug"."""
        info = PngInfo()
        info.add_text("synthetic", "1")
        info.add_text("key", json.dumps(self.key))
        info.add_text("weights_hash", self.weights_hash)
        info.add_text("carim_aug", json.dumps(asdict(self)))
        return info

    @classmethod
    def read(cls, path: str | Path) -> "Provenance | None":
        """Gives the record in a PNG file, or None if there is no such file, or no whole one, or none with a record.

        Args:
            path: of the file; the checksums of all its chunks are looked at, its pixels are not decoded.
        """
        try:
            with Image.open(path) as picture:
                if not isinstance(picture, PngImageFile):
                    return None
                told = json.loads(picture.info["carim_aug"])
                picture.verify()
            boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in told.pop("boxes"))
            return cls(key=tuple(told.pop("key")), boxes=boxes, **told)
        except _BROKEN:
            return None


def export_over(folders: Iterable[str | Path]) -> Path | None:
    """Gives the first export that one of these folders is, or lies right in; None if there is none."""
    for folder in dict.fromkeys(Path(folder).absolute() for folder in folders):
        for place in (folder, folder.parent):
            if (place / MARKER).is_file():
                return place
    return None
