"""Normal films on disk that nodules are grafted into, with the patient of each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.errors import DataError
from carim_aug.data.images import IMAGE_SUFFIXES, read_grey
from carim_aug.data.tables import read_rows

_NAMED = 2 * 10**15  # patients without a number: their name's hash is added


@dataclass(frozen=True)
class Film:
    """A normal film.

    Attributes:
        path: of the file.
        patient: a number of the patient.
        row: of ChestX-ray14's main table, column to text; empty without a table.
    """

    path: str
    patient: int
    row: dict[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return Path(self.path).stem


def find_films(folder: str | Path, split: str) -> list[Film]:
    """Gives the normal films of a folder, by file name.

    Args:
        folder: in ChestX-ray14's layout: its images without a finding in the split; or of images at any depth, which
            are all taken for normal. There the patient is the number before the first underscore of the file's name;
            for a name that is none, its hash, 2 * 10**15 to 3 * 10**15.
        split: "train" or "val"; means nothing in a plain folder.

    Raises:
        DataError: no such folder, no such film, a bad table, or two files of one name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    listed = sorted(root.glob("Data_Entry_2017*.csv"))
    if listed:
        rows = {row["Image Index"]: row for _, row in read_rows(listed[-1], ("Image Index",))}
        films = ChestXray14(root, split=split, findings=["No Finding"], missing="skip")
        pairs = zip(films.filenames, films.paths, films.patients.tolist(), strict=True)
        found = [Film(path, patient, rows[name]) for name, path, patient in pairs]
    else:
        paths = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
        found = [Film(str(path), _patient(path.stem)) for path in paths]
    if not found:
        raise DataError(f"{root}: no normal film of split {split!r}" if listed else f"{root}: no image in this folder")
    found.sort(key=lambda film: film.stem)
    for one, other in zip(found, found[1:], strict=False):
        if one.stem == other.stem:
            raise DataError(f"{root}: files must differ in name, got {one.path} and {other.path}")
    return found


class Hosts(Dataset[tuple[Tensor, int]]):
    """Films as a data set of normal images, label 0 of ("No Finding", "Nodule").

    Args:
        films: at least one.
        size: width and height in pixels to which they are resized; None: as they are.
    """

    classes = ("No Finding", "Nodule")

    def __init__(self, films: Sequence[Film], *, size: int | None = None) -> None:
        """Keeps the list; reads no image."""
        self.films, self.size = list(films), size
        self.targets = [0] * len(self.films)
        self._last: tuple[int, Tensor] | None = None  # decision and graft read a film one after the other

    def __len__(self) -> int:
        """Number of films."""
        return len(self.films)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Gives the image (1, H, W) float32, [0, 1], and label 0.

        Raises:
            DataError: an unreadable file.
        """
        if self._last is None or self._last[0] != i:
            self._last = i, self._read(i)
        return self._last[1], 0

    def digest(self) -> str:
        """Gives a hash of the films' names and file sizes, in order."""
        told = blake2b(digest_size=16)
        for film in self.films:
            told.update(f"{film.stem!r} {film.patient} {os.path.getsize(film.path)}\n".encode())
        return told.hexdigest()

    def _read(self, i: int) -> Tensor:
        image = read_grey(self.films[i].path).as_subclass(Tensor).to(torch.float32) / 255
        if self.size is None or tuple(image.shape[-2:]) == (self.size, self.size):
            return image
        return functional.resize(image, [self.size, self.size], antialias=True).clamp(0, 1)


def _patient(stem: str) -> int:
    name = stem.partition("_")[0]
    if name.isascii() and name.isdigit() and len(name) <= 15:
        return int(name)
    return _NAMED + int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % 10**15
