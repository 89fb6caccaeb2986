"""ChestX-ray14 (Wang et al., CVPR 2017) in its official layout, at any image size."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from carim_aug.data.chestxray14_tables import BOX_SIZE, SPLITS, Entry, NamedBox, read_boxes, read_entries, splits, stem
from carim_aug.data.io import IMAGE_SUFFIXES, DataError, read_size
from carim_aug.data.items import Items, check_choice, check_names, detection_target, targets_of
from carim_aug.ops.findings import FINDINGS

Filter = Callable[[frozenset[str]], bool]
CLASSES: dict[str, tuple[str, ...]] = {"multilabel": FINDINGS, "nodule": ("No Finding", "Nodule")}
CLASSES |= {"detection": ("__background__", *FINDINGS)}
"""What the columns or numbers of each kind of target mean."""


class ChestXray14(Items):
    """Frontal chest X-rays with 14 labels mined from reports, and radiologists' boxes for some.

    The folder holds `Data_Entry_2017*.csv`; images anywhere below it, of any size and suffix; optionally
    `BBox_List_2017.csv`; and a split: `split.csv` (Image Index, split), or the official `train_val_list.txt` and
    `test_list.txt` (an eighth of the former's patients become "val"), or neither (`split_by_patient`).

    `paths` and `filenames` (Image Index) are those of each image, `patients` (N,) int64, `views` "PA" or "AP", `labels`
    (N, 14) float32, `targets` float32 rows of these for "multilabel" and else 1 with a nodule. `classes` says what the
    targets' columns or numbers mean.

    Args:
        root: the folder.
        split: "train", "val", "test", or None for all images.
        views: view positions to keep, such as `("PA",)`; None keeps PA and AP.
        findings: names of which an image must have at least one ("No Finding" is a name too), or a function from the
            frozen set of an image's names to whether it is kept.
        target: "multilabel": (14,) float32; "nodule": int, 1 with a nodule; "detection": `{"boxes", "labels"}` as
            torchvision's detectors take it, with XYXY pixels and labels 1 + index in `FINDINGS`.
        only_normal_or_nodule: drop images that have a finding but no nodule.
        only_normal_or_boxed: drop images that have a finding but no box, which a detector would take for normal. With
            `only_normal_or_nodule`, a box of a nodule is asked for.
        transform: torchvision v2 transform, called with the image alone, or with (image, target) for "detection".
        channels: of the uint8 `tv_tensors.Image` (channels, H, W): 1, or 3 equal ones.
        missing: "error" if a listed image has no file, or "skip" such rows.
        extra_boxes: a further CSV of boxes in 1024-pixel coordinates, such as ChestX-Det's under the original names;
            those with their centre in an official box of the same finding are taken for repeats and left out.

    Raises:
        DataError: a table or image is missing, unreadable or breaks its rules.
        ValueError: an argument is none of the above.

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
        findings: Iterable[str] | Filter | None = None,
        target: Literal["multilabel", "nodule", "detection"] = "multilabel",
        only_normal_or_nodule: bool = False,
        only_normal_or_boxed: bool = False,
        transform: Callable[..., Any] | None = None,
        channels: int = 1,
        missing: Literal["error", "skip"] = "error",
        extra_boxes: str | Path | None = None,
    ) -> None:
        check_choice("split", split, (*SPLITS, None))
        check_choice("target", target, tuple(CLASSES))
        check_choice("missing", missing, ("error", "skip"))
        check_choice("channels", channels, (1, 3))
        check_names("views", views)
        has_finding = _finding_filter(findings)
        self.root = Path(root)
        self.split, self.target, self.transform, self.channels = split, target, transform, channels
        self.classes = CLASSES[target]

        entries = read_entries(self.root)
        known = {"PA", "AP"} | {entry.view for entry in entries}
        if views is not None and not known.issuperset(views):
            raise ValueError(f"views must be among {', '.join(sorted(known))}, got {sorted(set(views) - known)[0]!r}")
        split_of = splits(self.root, entries) if split is not None else {}
        files = _find_images(self.root)
        boxes = _boxes_by_stem(self.root, extra_boxes)

        def wanted(entry: Entry) -> bool:
            names = entry.findings
            if split is not None and split_of[entry.name] != split or views is not None and entry.view not in views:
                return False
            if only_normal_or_nodule and names and "Nodule" not in names:
                return False
            if only_normal_or_boxed and names:
                boxable = ("Nodule",) if only_normal_or_nodule else FINDINGS
                if not any(box.finding in boxable for box in boxes.get(stem(entry.name), ())):
                    return False
            return has_finding(names or frozenset({"No Finding"}))

        chosen = [entry for entry in entries if wanted(entry)]
        absent = [entry.name for entry in chosen if stem(entry.name) not in files]
        if absent and missing == "error":
            raise DataError(f"{self.root}: no image file for {absent[0]}; missing='skip' leaves such rows out")
        chosen = [entry for entry in chosen if stem(entry.name) in files]

        self.filenames = [entry.name for entry in chosen]
        self.paths = [files[stem(entry.name)] for entry in chosen]
        rows = [[finding in entry.findings for finding in FINDINGS] for entry in chosen]
        self.labels = np.array(rows, np.float32).reshape(-1, len(FINDINGS))
        self.patients = np.array([entry.patient for entry in chosen], np.int64)
        self.views = np.array([entry.view for entry in chosen], dtype="<U2")
        self.targets = targets_of(self.labels, target)
        self._boxes = [boxes.get(stem(entry.name), []) for entry in chosen]

    def _target(self, i: int, height: int, width: int) -> Any:
        if self.target != "detection":
            return super()._target(i, height, width)
        rows = [box for box in self._boxes[i] if box.finding in FINDINGS]
        boxes = _to_parts(rows) * torch.tensor([width, height, width, height])
        return detection_target(boxes, [1 + FINDINGS.index(box.finding) for box in rows], height, width)

    def boxes(self, i: int, finding: str = "Nodule") -> Tensor:
        """Return the boxes of one finding, (k, 4) float32 XYXY in pixels of the image, from its file's header alone."""
        relative = self.boxes_relative(i, finding)
        if not len(relative):
            return relative
        height, width = read_size(self.paths[i])
        return relative * relative.new_tensor([width, height, width, height])

    def boxes_relative(self, i: int, finding: str = "Nodule") -> Tensor:
        """Return the boxes of one finding, (k, 4) float32 XYXY in [0, 1]; k is 0 where none is known."""
        return _to_parts([box for box in self._boxes[i] if box.finding == finding])


def _to_parts(boxes: Sequence[NamedBox]) -> Tensor:
    """Return boxes of the tables as (k, 4) float32 in [0, 1]."""
    return torch.tensor([box[1:] for box in boxes], dtype=torch.float32).reshape(-1, 4) / BOX_SIZE


def _find_images(root: Path) -> dict[str, str]:
    """Return the path of each stem; the first in alphabetical order where there are several."""
    found: dict[str, str] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.setdefault(stem(name), os.path.join(folder, name))
    return found


def _boxes_by_stem(root: Path, extra: str | Path | None) -> dict[str, list[NamedBox]]:
    """Return the official boxes, then the extra ones that repeat none of them."""
    path = root / "BBox_List_2017.csv"
    official = {stem(name): rows for name, rows in read_boxes(path).items()} if path.exists() else {}
    boxes = {name: list(rows) for name, rows in official.items()}
    for name, rows in (read_boxes(extra) if extra is not None else {}).items():
        known = official.get(stem(name), [])
        boxes.setdefault(stem(name), []).extend(row for row in rows if not any(_repeats(row, box) for box in known))
    return boxes


def _repeats(box: NamedBox, known: NamedBox) -> bool:
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return box.finding == known.finding and known.x1 <= x <= known.x2 and known.y1 <= y <= known.y2


def _finding_filter(findings: Iterable[str] | Filter | None) -> Filter:
    if findings is None:
        return lambda names: True
    if callable(findings):
        return findings
    check_names("findings", findings)
    wanted = frozenset(findings)
    if unknown := wanted.difference(FINDINGS, {"No Finding"}):
        raise ValueError(f"findings must be among the 14 findings or 'No Finding', got {sorted(unknown)[0]!r}")
    return lambda names: bool(names & wanted)
