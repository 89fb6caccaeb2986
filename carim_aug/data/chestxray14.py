"""ChestX-ray14 (Wang et al., CVPR 2017) in its official layout, at any image size (METHOD section 1)."""

import os
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from carim_aug.data.errors import DataError
from carim_aug.data.images import IMAGE_SUFFIXES, check_channels, read_grey, read_size
from carim_aug.data.tables import clip_box, number, read_rows

FINDINGS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The 14 findings, in the order of the label vector."""

SPLITS: tuple[str, ...] = ("train", "val", "test")
"""Names of the splits."""

BOX_SIZE = 1024
"""Width and height, in pixels, of the images that the tables' boxes refer to."""

NamedBox = tuple[str, float, float, float, float]
"""A finding with its box, XYXY in pixels of the 1024-pixel image."""

Missing = Literal["error", "skip"]
Target = Literal["multilabel", "nodule", "detection"]

_NODULE = FINDINGS.index("Nodule")
_OTHER_NAMES = {"Infiltrate": "Infiltration", "Pleural Thickening": "Pleural_Thickening"}
_SLACK = 2.0  # pixels of 1024 by which a box may overhang; no published box does


class ChestXray14(Dataset[tuple[Any, Any]]):
    """Frontal chest X-rays with 14 labels mined from reports, and radiologists' boxes for some.

    The folder holds `Data_Entry_2017*.csv`; images anywhere below it, of any size and suffix; optionally
    `BBox_List_2017.csv`; and a split: `split.csv` (Image Index, split), or the official `train_val_list.txt` and
    `test_list.txt` (an eighth of the former's patients become "val"), or neither (`split_by_patient`).

    Args:
        root: The folder.
        split: "train", "val", "test", or None for all images.
        views: View positions to keep, such as `("PA",)`; None keeps PA and AP.
        findings: Names of which an image must have at least one ("No Finding" is a name too), or a function from the
            frozen set of an image's names to whether it is kept.
        target: "multilabel": (14,) float32; "nodule": int, 1 with a nodule; "detection": `{"boxes", "labels"}` as
            torchvision's detectors take it, with XYXY pixels and labels 1 + index in `FINDINGS`.
        only_normal_or_nodule: Drop images that have a finding but no nodule.
        only_normal_or_boxed: Drop images that have a finding but no box, which a detector would take for normal. With
            `only_normal_or_nodule`, a box of a nodule is asked for.
        transform: torchvision v2 transform, called with the image alone, or with (image, target) for "detection".
        channels: 1, or 3 equal ones.
        missing: "error" if a listed image has no file, or "skip" such rows.
        extra_boxes: A further CSV of boxes in 1024-pixel coordinates, such as ChestX-Det's under the original names;
            those with their centre in an official box of the same finding are taken for repeats and left out.

    Attributes:
        filenames: Image Index of each image, as the table has it.
        paths: File of each image.
        labels: (N, 14) float32.
        targets: One per image: (14,) float32 tensors for "multilabel", else int, 1 with a nodule.
        patients: (N,) int64.
        views: (N,) "PA" or "AP".
        classes: What the targets' columns or numbers mean: `FINDINGS`, ("No Finding", "Nodule") for "nodule", or
            ("__background__", *FINDINGS) for "detection".
        pathologies: `FINDINGS`, the columns of `labels`.

    Raises:
        DataError: A table or image is missing, unreadable or breaks its rules.
        ValueError: An argument is none of the above.

    Reference:
        Wang et al., "ChestX-ray8: Hospital-scale chest X-ray database and benchmarks on weakly-supervised
        classification and localization of common thorax diseases", CVPR 2017. Data: NIH Clinical Center,
        https://nihcc.app.box.com/v/ChestXray-NIHCC.
    """

    pathologies = FINDINGS

    def __init__(
        self,
        root: str | Path,
        *,
        split: str | None = None,
        views: Sequence[str] | None = None,
        findings: Iterable[str] | Callable[[frozenset[str]], bool] | None = None,
        target: Target = "multilabel",
        only_normal_or_nodule: bool = False,
        only_normal_or_boxed: bool = False,
        transform: Callable[..., Any] | None = None,
        channels: int = 1,
        missing: Missing = "error",
        extra_boxes: str | Path | None = None,
    ) -> None:
        """Read the tables, no images; see the class."""
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r}")
        if target not in ("multilabel", "nodule", "detection"):
            raise ValueError(f"target must be multilabel, nodule or detection, got {target!r}")
        if missing not in ("error", "skip"):
            raise ValueError(f"missing must be error or skip, got {missing!r}")
        check_channels(channels)
        if isinstance(views, str):
            raise TypeError(f"views must be a sequence of names, got the string {views!r}")
        keep = _finding_filter(findings)
        self.root = Path(root)
        self.split, self.target, self.transform, self.channels = split, target, transform, channels
        meanings = {"nodule": ("No Finding", "Nodule"), "detection": ("__background__", *FINDINGS)}
        self.classes: tuple[str, ...] = meanings.get(target, FINDINGS)

        rows = read_entries(self.root)
        known = {"PA", "AP"} | {row[3] for row in rows}
        if views is not None and not known.issuperset(views):
            raise ValueError(f"views must be among {', '.join(sorted(known))}, got {sorted(set(views) - known)[0]!r}")
        splits = _read_splits(self.root, rows) if split is not None else {}
        files = _find_images(self.root)
        self._boxes = _boxes_by_stem(self.root, extra_boxes)
        wanted = ("Nodule",) if only_normal_or_nodule else FINDINGS
        kept = []
        for name, names, patient, view in rows:
            if split is not None and splits[name] != split:
                continue
            if views is not None and view not in views:
                continue
            if only_normal_or_nodule and names and "Nodule" not in names:
                continue
            if not keep(names or frozenset({"No Finding"})):
                continue
            boxed = any(box[0] in wanted for box in self._boxes.get(_stem(name), ()))
            if only_normal_or_boxed and names and not boxed:
                continue
            path = files.get(_stem(name))
            if path is None:
                if missing == "error":
                    raise DataError(f"{self.root}: no image file for {name}; missing='skip' leaves such rows out")
                continue
            kept.append((name, path, names, patient, view))

        self.filenames: list[str] = [row[0] for row in kept]
        self.paths: list[str] = [row[1] for row in kept]
        self.labels = np.array([[f in row[2] for f in FINDINGS] for row in kept], np.float32).reshape(-1, len(FINDINGS))
        self.patients = np.array([row[3] for row in kept], np.int64)
        self.views = np.array([row[4] for row in kept], dtype="<U2")
        self.targets: list[Any] = (
            list(torch.from_numpy(self.labels))
            if target == "multilabel"
            else self.labels[:, _NODULE].astype(int).tolist()
        )

    def __len__(self) -> int:
        """Number of images kept."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        """Image and label.

        Args:
            i: Position, negative from the end.

        Returns:
            image: (channels, H, W) uint8 `tv_tensors.Image`, or what the transform makes of it.
            label: As `target` says.

        Raises:
            DataError: The file is missing or unreadable.
            IndexError: There is no such position.
        """
        image = read_grey(self.paths[i], channels=self.channels)
        if self.target == "detection":
            label = self._detection(i, image.shape[-2], image.shape[-1])
            return (image, label) if self.transform is None else self.transform(image, label)
        label = self.targets[i].clone() if self.target == "multilabel" else self.targets[i]
        return (image if self.transform is None else self.transform(image)), label

    def boxes(self, i: int, finding: str = "Nodule") -> Tensor:
        """Boxes of one finding, (k, 4) float32 XYXY in pixels of the image in its file; reads its header only.

        Raises:
            DataError: The file is missing or unreadable.
        """
        relative = self.boxes_relative(i, finding)
        if not len(relative):
            return relative
        height, width = read_size(self.paths[i])
        return relative * relative.new_tensor([width, height, width, height])

    def boxes_relative(self, i: int, finding: str = "Nodule") -> Tensor:
        """Boxes of one finding, (k, 4) float32 XYXY in [0, 1]; k is 0 where none is known."""
        boxes = [box[1:] for box in self._boxes.get(_stem(self.filenames[i]), ()) if box[0] == finding]
        return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / BOX_SIZE

    def _detection(self, i: int, height: int, width: int) -> dict[str, Tensor]:
        """All boxes of the 14 findings, as torchvision's detectors take them."""
        rows = [box for box in self._boxes.get(_stem(self.filenames[i]), ()) if box[0] in FINDINGS]
        boxes = torch.tensor([row[1:] for row in rows], dtype=torch.float32).reshape(-1, 4) / BOX_SIZE
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
            "labels": torch.tensor([1 + FINDINGS.index(row[0]) for row in rows], dtype=torch.int64),
        }


def read_boxes(path: str | Path) -> dict[str, list[NamedBox]]:
    """Boxes of a CSV in either published style, by Image Index.

    Args:
        path: `BBox_List_2017.csv` (`Image Index,Finding Label,Bbox [x,y,w,h]`, which makes columns `Bbox [x`, `y`, `w`,
            `h]`), or a table with columns Image Index, Finding Label, x, y, w, h. "Infiltrate" is read as Infiltration.

    Returns:
        From Image Index to a list of (finding, x1, y1, x2, y2) in pixels of the 1024-pixel image.

    Raises:
        DataError: The file is missing or unreadable, a column is missing, or a box is inverted or outside the image.
    """
    names = ["Image Index", "Finding Label"]
    official = [*names, "Bbox [x", "y", "w", "h]"]
    plain = [*names, "x", "y", "w", "h"]
    try:
        rows, columns = list(read_rows(path, plain)), plain
    except DataError as error:
        if "no column 'x'" not in str(error):
            raise
        try:
            rows, columns = list(read_rows(path, official)), official
        except DataError as other:
            raise (error if "no column 'Bbox [x'" in str(other) else other) from None
    boxes: dict[str, list[NamedBox]] = {}
    for line, row in rows:
        x, y, w, h = (number(path, line, column, row[column]) for column in columns[2:])
        box = clip_box(path, line, (x, y, x + w, y + h), (BOX_SIZE, BOX_SIZE), _SLACK)
        finding = row["Finding Label"]
        boxes.setdefault(row["Image Index"], []).append((_OTHER_NAMES.get(finding, finding), *box))
    return boxes


def split_by_patient(
    patient_ids: Sequence[int] | np.ndarray, fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[str]:
    """A split for each image such that a patient's images stay together.

    Each patient's split is a hash of seed and patient alone: it does not change when other patients come or go. The
    fractions hold for patients, in expectation.

    Args:
        patient_ids: (N,) integers.
        fractions: Shares of train, val and test, summing to 1.
        seed: Any integer.

    Returns:
        N of "train", "val", "test".

    Raises:
        ValueError: The fractions are negative or do not sum to 1.
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


Entry = tuple[str, frozenset[str], int, str]
"""Image Index, findings, patient and view of one film."""


def read_entries(root: str | Path) -> list[Entry]:
    """The rows of the main table; no image needs to be there.

    Args:
        root: Folder that holds `Data_Entry_2017*.csv`.

    Raises:
        DataError: The table is missing, unreadable or breaks its rules.
    """
    root = Path(root)
    tables = sorted(root.glob("Data_Entry_2017*.csv"))
    if not tables:
        raise DataError(f"{root}: no Data_Entry_2017*.csv in this folder")
    path = tables[-1]
    columns = ("Image Index", "Finding Labels", "Patient ID", "View Position")
    entries: list[Entry] = []
    for line, row in read_rows(path, columns):
        names = frozenset(_OTHER_NAMES.get(name, name) for name in row["Finding Labels"].split("|")) - {"No Finding"}
        unknown = names.difference(FINDINGS)
        if unknown:
            raise DataError(f"{path}, line {line}: unknown finding {sorted(unknown)[0]!r}")
        patient = number(path, line, "Patient ID", row["Patient ID"])
        entries.append((row["Image Index"], names, int(patient), row["View Position"]))
    return entries


def _read_splits(root: Path, entries: list[Entry]) -> dict[str, str]:
    """From Image Index to split."""
    own, fit, test = root / "split.csv", root / "train_val_list.txt", root / "test_list.txt"
    patients = [entry[2] for entry in entries]
    if own.exists():
        given: dict[str, str] = {}
        for line, row in read_rows(own, ("Image Index", "split")):
            if row["split"] not in SPLITS:
                raise DataError(f"{own}, line {line}: split must be one of {', '.join(SPLITS)}, got {row['split']!r}")
            given[_stem(row["Image Index"])] = row["split"]
        source = own
    elif fit.exists() and test.exists():
        drawn = dict(zip(patients, split_by_patient(patients, (0.875, 0.125, 0.0)), strict=True))
        patient_of = {_stem(entry[0]): entry[2] for entry in entries}
        given = {stem: "test" for stem in _read_list(test)}
        given |= {stem: drawn[patient_of[stem]] for stem in _read_list(fit) if stem in patient_of}
        source = fit
    else:
        return dict(zip((entry[0] for entry in entries), split_by_patient(patients), strict=True))

    splits: dict[str, str] = {}
    of_patient: dict[int, str] = {}
    for name, _, patient, _ in entries:
        if _stem(name) not in given:
            raise DataError(f"{source}: no split for {name}")
        splits[name] = given[_stem(name)]
        if of_patient.setdefault(patient, splits[name]) != splits[name]:
            raise DataError(f"{source}: patient {patient} is in both {of_patient[patient]} and {splits[name]} ({name})")
    return splits


def _read_list(path: Path) -> list[str]:
    try:
        return [_stem(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable list ({error})") from error


def _find_images(root: Path) -> dict[str, str]:
    """From file name without suffix to path; the first in alphabetical order where there are several."""
    found: dict[str, str] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(stem, os.path.join(folder, name))
    return found


def _boxes_by_stem(root: Path, extra: str | Path | None) -> dict[str, list[NamedBox]]:
    """Official boxes, then the extra ones that repeat none of them."""
    path = root / "BBox_List_2017.csv"
    official = {_stem(name): rows for name, rows in read_boxes(path).items()} if path.exists() else {}
    boxes = {stem: list(rows) for stem, rows in official.items()}
    for name, rows in (read_boxes(extra) if extra is not None else {}).items():
        known = official.get(_stem(name), [])
        boxes.setdefault(_stem(name), []).extend(row for row in rows if not any(_repeats(row, box) for box in known))
    return boxes


def _repeats(box: NamedBox, known: NamedBox) -> bool:
    """Whether a box names the same finding as a known one and has its centre inside it."""
    x, y = (box[1] + box[3]) / 2, (box[2] + box[4]) / 2
    return box[0] == known[0] and known[1] <= x <= known[3] and known[2] <= y <= known[4]


def _finding_filter(
    findings: Iterable[str] | Callable[[frozenset[str]], bool] | None,
) -> Callable[[frozenset[str]], bool]:
    if findings is None:
        return lambda names: True
    if callable(findings):
        return findings
    if isinstance(findings, str):
        raise TypeError(f"findings must be a function or several names, got the string {findings!r}")
    wanted = frozenset(findings)
    unknown = wanted.difference(FINDINGS, {"No Finding"})
    if unknown:
        raise ValueError(f"findings must be among the 14 findings or 'No Finding', got {sorted(unknown)[0]!r}")
    return lambda names: bool(names & wanted)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
