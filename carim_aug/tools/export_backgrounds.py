"""Normal images on disk that nodules are grafted into, with the patient of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.io import IMAGE_SUFFIXES, DataError, read_grey, read_rows
from carim_aug.data.provenance import export_over
from carim_aug.ops.images import resize

_NAMED = 2 * 10**15  # patients without a number: their name's hash is added


@dataclass(frozen=True)
class Background:
    """A normal image."""

    path: Path
    patient: int
    row: dict[str, str] = field(default_factory=dict)  # of ChestX-ray14's main table, column to text; or empty

    def read(self, size: int | None = None) -> Tensor:
        """Return the image (1, H, W) float32, [0, 1], at this width and height or as it is; DataError if unreadable."""
        image = read_grey(self.path).as_subclass(Tensor).to(torch.float32) / 255
        return image if size is None else resize(image[None], (size, size))[0].clamp(0, 1)


def find_backgrounds(folder: str | Path, split: str) -> list[Background]:
    """Return the normal images of a folder, by file name.

    They are the images without a finding of a split ("train" or "val") of a folder in ChestX-ray14's layout, or all
    images of a plain folder, at any depth. There the patient is the number before the first underscore of the file's
    name; for a name that is none, its hash, 2 * 10**15 to 3 * 10**15.

    Raises:
        DataError: no such folder, no such image, a bad table, or two files of one name.
        ValueError: the images are an export's.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    tables = sorted(root.glob("Data_Entry_2017*.csv"))
    if tables:
        rows = {row["Image Index"]: row for _, row in read_rows(tables[-1], ("Image Index",))}
        data = ChestXray14(root, split=split, findings=["No Finding"], missing="skip")
        entries = zip(data.filenames, data.paths, data.patients.tolist(), strict=True)
        found = [Background(Path(path), patient, rows[name]) for name, path, patient in entries]
    else:
        paths = (path for path in root.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)
        found = [Background(path, _patient_of(path.stem)) for path in paths]
    if not found:
        raise DataError(f"{root}: no normal image of split {split!r}" if tables else f"{root}: no image in this folder")
    found.sort(key=lambda background: background.path.stem)
    for one, other in zip(found, found[1:], strict=False):
        if one.path.stem == other.path.stem:
            raise DataError(f"{root}: files must differ in name, got {one.path} and {other.path}")
    synthetic = export_over(background.path.parent for background in found)
    if synthetic is not None:
        raise ValueError(f"backgrounds must be real images, got the synthetic ones of {synthetic}")
    return found


def hash_backgrounds(backgrounds: Sequence[Background]) -> str:
    """Return a hash of names, patients and file sizes, in order."""
    digest = blake2b(digest_size=16)
    for background in backgrounds:
        size = background.path.stat().st_size
        digest.update(f"{background.path.stem!r} {background.patient} {size}\n".encode())
    return digest.hexdigest()


def _patient_of(stem: str) -> int:
    name = stem.partition("_")[0]
    if name.isascii() and name.isdigit() and len(name) <= 15:
        return int(name)
    return _NAMED + int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % 10**15
