"""The tables of ChestX-ray14: entries, boxes and splits; no image needs to be there."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from carim_aug.data.io import DataError, clip_box, number, read_rows
from carim_aug.ops.findings import FINDINGS

SPLITS: tuple[str, ...] = ("train", "val", "test")

BOX_SIZE = 1024
"""Width and height, in pixels, of the images that the tables' boxes refer to."""

_OTHER_NAMES = {"Infiltrate": "Infiltration", "Pleural Thickening": "Pleural_Thickening"}
_SLACK = 2.0  # pixels of 1024 by which a box may overhang; no published box does


class Entry(NamedTuple):
    """One row of the main table: Image Index, findings (none for a normal image), patient and view position."""

    name: str
    findings: frozenset[str]
    patient: int
    view: str


class NamedBox(NamedTuple):
    """A finding with its box, XYXY in pixels of the 1024-pixel image."""

    finding: str
    x1: float
    y1: float
    x2: float
    y2: float


def read_entries(root: str | Path) -> list[Entry]:
    """Read the main table of a folder, the last `Data_Entry_2017*.csv` in it; DataError if it breaks its rules."""
    tables = sorted(Path(root).glob("Data_Entry_2017*.csv"))
    if not tables:
        raise DataError(f"{root}: no Data_Entry_2017*.csv in this folder")
    path = tables[-1]
    entries = []
    for line, row in read_rows(path, ("Image Index", "Finding Labels", "Patient ID", "View Position")):
        findings = frozenset(_OTHER_NAMES.get(name, name) for name in row["Finding Labels"].split("|")) - {"No Finding"}
        if unknown := findings.difference(FINDINGS):
            raise DataError(f"{path}, line {line}: unknown finding {sorted(unknown)[0]!r}")
        patient = int(number(path, line, "Patient ID", row["Patient ID"]))
        entries.append(Entry(row["Image Index"], findings, patient, row["View Position"]))
    return entries


def read_boxes(path: str | Path) -> dict[str, list[NamedBox]]:
    """Read the boxes of a CSV in either published style, from Image Index to its boxes.

    The styles are that of `BBox_List_2017.csv`, `Image Index,Finding Label,Bbox [x,y,w,h]`, which makes columns
    `Bbox [x`, `y`, `w`, `h]`, and one with the columns x, y, w, h. "Infiltrate" is read as Infiltration.

    Raises:
        DataError: the file is missing or unreadable, a column is missing, or a box is inverted or outside the image.
    """
    boxes: dict[str, list[NamedBox]] = {}
    columns = ("Image Index", "Finding Label", "x", "y", "w", "h")
    for line, row in read_rows(path, columns, aliases={"Bbox [x": "x", "h]": "h"}):
        x, y, w, h = (number(path, line, column, row[column]) for column in columns[2:])
        box = clip_box(path, line, (x, y, x + w, y + h), (BOX_SIZE, BOX_SIZE), _SLACK)
        finding = row["Finding Label"]
        boxes.setdefault(row["Image Index"], []).append(NamedBox(_OTHER_NAMES.get(finding, finding), *box))
    return boxes


def split_by_patient(
    patient_ids: Sequence[int] | np.ndarray, fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[str]:
    """Return "train", "val" or "test" for each of N images, such that a patient's stay together.

    Each patient's split is a hash of seed and patient alone: it does not change when other patients come or go. The
    fractions, of train, val and test, hold for patients, in expectation.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be three shares summing to 1, got {tuple(fractions)}")
    first, second = fractions[0], fractions[0] + fractions[1]
    of: dict[int, str] = {}
    for patient in {int(p) for p in patient_ids}:
        digest = blake2b(f"{seed}:{patient}".encode(), digest_size=8).digest()
        share = (int.from_bytes(digest, "big") >> 11) / 2**53
        of[patient] = "train" if share < first else "val" if share < second else "test"
    return [of[int(p)] for p in patient_ids]


def splits(root: str | Path, entries: Sequence[Entry]) -> dict[str, str]:
    """Return the split of each entry of a folder, by Image Index, as `ChestXray14` says.

    Raises:
        DataError: a list is unreadable, leaves an entry out, or has a patient in two splits.
    """
    own, fit, test = (Path(root) / name for name in ("split.csv", "train_val_list.txt", "test_list.txt"))
    patients = [entry.patient for entry in entries]
    if own.exists():
        source, given = own, {}
        for line, row in read_rows(own, ("Image Index", "split")):
            if row["split"] not in SPLITS:
                raise DataError(f"{own}, line {line}: split must be one of {', '.join(SPLITS)}, got {row['split']!r}")
            given[stem(row["Image Index"])] = row["split"]
    elif fit.exists() and test.exists():
        source, given = fit, dict.fromkeys(_read_list(test), "test")
        by_hash = split_by_patient(patients, (0.875, 0.125, 0.0))
        of_stem = {stem(entry.name): split for entry, split in zip(entries, by_hash, strict=True)}
        given |= {name: of_stem[name] for name in _read_list(fit) if name in of_stem}
    else:
        return dict(zip((entry.name for entry in entries), split_by_patient(patients), strict=True))

    found: dict[str, str] = {}
    of_patient: dict[int, str] = {}
    for name, _, patient, _ in entries:
        if stem(name) not in given:
            raise DataError(f"{source}: no split for {name}")
        found[name] = given[stem(name)]
        if of_patient.setdefault(patient, found[name]) != found[name]:
            raise DataError(f"{source}: patient {patient} is in both {of_patient[patient]} and {found[name]} ({name})")
    return found


def stem(name: str) -> str:
    """Return an Image Index without its suffix, which differs between copies of the data."""
    return os.path.splitext(name)[0]


def _read_list(path: Path) -> list[str]:
    try:
        return [stem(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable list ({error})") from error
