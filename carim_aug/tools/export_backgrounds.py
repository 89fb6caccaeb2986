"""Real images on disk: the normal ones that nodules are grafted into, and those of the validation set."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.io import Box, DataError, images_below, read_grey, read_rows
from carim_aug.data.provenance import export_over, is_synthetic
from carim_aug.ops.findings import NORMAL_WORDS, TORCHXRAYVISION18
from carim_aug.ops.images import resize

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLIT_WORDS |= {"test": "test", "testing": "test"}
"""Names of folders of one split, in lower case."""

HELD_OUT = 0.1  # of the patients, where the data have no validation split
_FINDINGS = {name.lower().replace("_", " ") for name in TORCHXRAYVISION18} | {"abnormal"}  # surely not normal
_NAMED = 2 * 10**15  # patients without a number: their name's hash is added


@dataclass(frozen=True)
class Background:
    """A real image."""

    path: Path
    patient: int
    row: dict[str, str] = field(default_factory=dict)  # of ChestX-ray14's main table, column to text; or empty
    boxes: tuple[Box, ...] = ()  # of real nodules, XYXY as parts of the image

    def read(self, size: int | None = None) -> Tensor:
        """Return the image (1, H, W) float32, [0, 1], at this width and height or as it is; DataError if unreadable."""
        if is_synthetic(self.path):
            raise DataError(f"{self.path}: images must be real, got a synthetic one: take it out of the folder")
        image = read_grey(self.path).as_subclass(Tensor).to(torch.float32) / 255
        return image if size is None else resize(image[None], (size, size))[0].clamp(0, 1)


def check_split(split: str) -> None:
    """Raise ValueError unless images of a split may be grafted into."""
    if split not in ("train", "val"):
        reason = "the test split is for evaluation on real images alone"
        raise ValueError(f"split must be train or val, got {split!r}: {reason}")


def find_backgrounds(folder: str | Path, split: str, normal: Sequence[str] = ()) -> list[Background]:
    """Return the normal images of a split of a folder ("train" or "val"), by file name.

    In ChestX-ray14's layout they are the images without a finding. Else folders' names tell, at any depth: those called
    as a split (`SPLIT_WORDS`) hold its images, and others are left out where there are any; "normal", "healthy" or "No
    Finding" (`carim_aug.ops.findings.NORMAL_WORDS`) holds normal ones, and others are left out. Images that lie in no
    class folder are all taken, for such a folder is a choice.

    Args:
        folder: the data.
        split: of the images.
        normal: names of the folders of normal images, where they have another; "." for all.

    Raises:
        DataError: no such folder, no such image, a bad table, two files of one name, or folders of which none can be
            known to be normal.
        ValueError: another split, images of an export, or `normal` beside a table.
    """
    check_split(split)
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    tables = _tables(root)
    if tables and normal:
        raise ValueError(f"normal must not be given where a table says what is normal, got {normal} and {tables[-1]}")
    found = _find_in_table(root, split, normal=True) if tables else _find_in_folders(root, split, normal)
    if not found:
        raise DataError(f"{root}: no normal image of split {split!r}")
    return _check(root, found)


def find_validation(folder: str | Path, normal: Sequence[str] = ()) -> list[Background]:
    """Return the images of a folder's own validation split, by file name; none if it has no such split.

    In ChestX-ray14's layout they are its normal images, and those with boxes of nodules; else normal ones alone.
    """
    root = Path(folder)
    if _tables(root):
        return _check(root, _find_in_table(root, "val", normal=False))
    if all(_split_of(root, path) != "val" for path in _folders(root)):
        return []
    return _check(root, _find_in_folders(root, "val", normal))


def hold_out(backgrounds: Sequence[Background]) -> set[int]:
    """Return one in ten patients, one at least, if there are two: those whose hash is lowest, whatever the seed."""
    by_hash = sorted({own.patient for own in backgrounds}, key=lambda patient: _hash(str(patient)))
    return set(by_hash[: max(1, round(HELD_OUT * len(by_hash)))]) if len(by_hash) > 1 else set()


def find_labelled(folder: str | Path) -> Path:
    """Return the folder of real images with YOLO's labels that is, or is `images` in, a folder.

    Raises:
        DataError: no image in it, or one without a label file where Ultralytics looks for it: in its path, the last
            folder `images` is `labels` there.
        ValueError: the images are an export's.
    """
    root = Path(folder).resolve()
    images = root / "images" if (root / "images").is_dir() else root
    paths = list(map(Path, images_below(images)))
    if not paths:
        raise DataError(f"{images}: no image in this folder")
    for path in paths:
        label = Path("/labels/".join(path.as_posix().rsplit("/images/", 1))).with_suffix(".txt")
        if "images" not in path.parts or not label.is_file():
            remedy = "lay them out as FOLDER/images/NAME.png and FOLDER/labels/NAME.txt, empty where there is no nodule"
            raise DataError(f"{path}: val images must have YOLO's labels, got no file {label}: {remedy}")
    _check_real(paths, "val")
    return images


def describe_backgrounds(folder: str | Path, backgrounds: Sequence[Background]) -> str:
    """Return how many backgrounds there are, and in which folders, in words."""
    names = sorted({own.path.parent.relative_to(folder).as_posix() for own in backgrounds})
    return f"{len(backgrounds)} normal images in {folder}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}"


def hash_backgrounds(backgrounds: Iterable[Background]) -> str:
    """Return a hash of names, patients, file sizes and boxes, in order."""
    digest = blake2b(digest_size=16)
    for own in backgrounds:
        boxes = f" {own.boxes}" if own.boxes else ""
        digest.update(f"{own.path.stem!r} {own.patient} {own.path.stat().st_size}{boxes}\n".encode())
    return digest.hexdigest()


def _tables(root: Path) -> list[Path]:
    return sorted(root.glob("Data_Entry_2017*.csv"))


def _find_in_table(root: Path, split: str, *, normal: bool) -> list[Background]:
    """Return the normal images of a split of ChestX-ray14's layout, or these and those with boxes of nodules."""
    rows = {row["Image Index"]: row for _, row in read_rows(_tables(root)[-1], ("Image Index",))}
    findings = ("No Finding",) if normal else None
    more: Any = {"only_normal_or_nodule": True, "only_normal_or_boxed": True}
    data = ChestXray14(root, split=split, findings=findings, missing="skip", **more)
    found = zip(data.filenames, data.paths, data.patients.tolist(), strict=True)
    boxes = [tuple(map(tuple, data.boxes_relative(i).tolist())) for i in range(len(data))]
    return [Background(Path(path), who, rows[name], boxes[i]) for i, (name, path, who) in enumerate(found)]


def _find_in_folders(root: Path, split: str, normal: Sequence[str]) -> list[Background]:
    """Return the normal images of a split where folders' names tell; DataError where they do not."""
    folders = _folders(root)
    if not folders:
        raise DataError(f"{root}: no image in this folder")
    names = {path: _class_names(root, path) for path in folders}
    known = sorted({name for own in names.values() for name in own})
    shown = ", ".join(known[:8]) + ", ..." * (len(known) > 8) or "none"
    if unknown := [name for name in normal if name not in (*known, ".")]:
        raise DataError(f"{root}: normal must be names of folders in it, got {unknown[0]!r}; there are: {shown}")

    # The split, where some folders name one.
    splits = {_split_of(root, path) for path in folders} - {""}
    chosen = [path for path in folders if not splits or _split_of(root, path) == split]
    if not chosen:
        there = ", ".join(sorted(splits))
        raise DataError(f"{root}: images must be of split {split!r}, got {there}: --split is train or val")

    # Normal ones.
    if normal:
        kept = [path for path in chosen if "." in normal or set(normal) & set(names[path])]
    else:
        plain = {path: set(map(_plain, names[path])) for path in chosen}
        kept = [path for path in chosen if plain[path] & set(NORMAL_WORDS) and not plain[path] & _FINDINGS]
        kept = kept or [path for path in chosen if not any(plain.values())]
    if not kept:
        remedy = f"write --data {root} --normal NAME (or several), or --normal . if all of them are"
        raise DataError(f"{root}: folders of {split} images must say which are normal, got {shown}: {remedy}")
    return [Background(path, _patient_of(path.stem)) for own in kept for path in folders[own]]


def _folders(root: Path) -> dict[Path, list[Path]]:
    """Return the images of each folder below a folder, and in itself."""
    found: dict[Path, list[Path]] = {}
    for path in map(Path, images_below(root)):
        found.setdefault(path.parent, []).append(path)
    return found


def _split_of(root: Path, folder: Path) -> str:
    """Return the split that folders' names say, "" for none; of several, the one that is not trained on."""
    for names in (folder.relative_to(root).parts, (root.resolve().name,)):
        named = {SPLIT_WORDS.get(_plain(name)) for name in names}
        if found := [split for split in ("test", "val", "train") if split in named]:
            return found[0]
    return ""


def _class_names(root: Path, folder: Path) -> list[str]:
    """Return names of folders that may be classes; the root's own only if it surely is one."""
    own = root.resolve().name
    names = folder.relative_to(root).parts
    names = (own, *names) if _plain(own) in {*NORMAL_WORDS, *_FINDINGS} else names
    return [name for name in names if _plain(name) not in {*SPLIT_WORDS, "images"}]


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").strip()


def _check(root: Path, found: list[Background]) -> list[Background]:
    """Return real images in the order of their names, which must differ."""
    found.sort(key=lambda background: background.path.stem)
    for one, other in zip(found, found[1:], strict=False):
        if one.path.stem == other.path.stem:
            raise DataError(f"{root}: files must differ in name, got {one.path} and {other.path}")
    _check_real([background.path for background in found], "backgrounds")
    return found


def _check_real(paths: list[Path], name: str) -> None:
    synthetic = export_over(path.parent for path in paths)
    if synthetic is not None:
        raise ValueError(f"{name} must be real images, got the synthetic ones of {synthetic}")


def _patient_of(stem: str) -> int:
    """Return the patient that a file's name begins with: up to the first underscore after a digit, or at all."""
    name = (re.match(r"\D*\d[^_]*", stem) or re.match(r"[^_]*", stem))[0]  # type: ignore[index]
    if name.isascii() and name.isdigit() and len(name) <= 15:
        return int(name)
    return _NAMED + _hash(name) % 10**15


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
