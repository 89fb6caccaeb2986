"""Films of the source's classification task, normal against nodule, split by patient (METHOD 8, Table 2).

`python -m train.common.splits --data FOLDER` writes split.csv by the source's counts into a folder of the full ChestX-ray14,
so that the other recipes never see the films that Table 2 is tested on.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from carim_aug.data.chestxray14 import ChestXray14, read_entries, split_by_patient
from carim_aug.data.errors import DataError
from train.common.labelled import NODULE
from train.common.reading import Reading
from train.common.run import RunError, write_whole

SOURCE_TEST = 633
"""Test films of each class in the source."""


@dataclass
class FilmSet(Dataset[tuple[Tensor, int]]):
    """Decoded films of one split, a data set of (image (1, S, S) uint8, 1 for a nodule).

    Attributes:
        images: (N, 1, S, S) uint8.
        findings: (N, 14) float32.
        boxes: N tensors (k, 4) of nodule boxes, XYXY in [0, 1]; empty where none is known.
        patients: (N,) int64.
        names: N file names.
    """

    images: Tensor
    findings: Tensor
    boxes: list[Tensor]
    patients: Tensor
    names: list[str]
    classes = ("No Finding", "Nodule")

    @property
    def targets(self) -> list[int]:
        """1 with a nodule, else 0."""
        return self.findings[:, NODULE].int().tolist()

    def __len__(self) -> int:
        """Number of films."""
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Film (1, S, S) uint8, and 1 with a nodule."""
        return self.images[i], int(self.findings[i, NODULE])

    def rows(self, chosen: Tensor) -> "FilmSet":
        """Gives some films, (n,) int64 places; one may come several times."""
        places = chosen.tolist()
        boxes, names = [self.boxes[i] for i in places], [self.names[i] for i in places]
        return FilmSet(self.images[chosen], self.findings[chosen], boxes, self.patients[chosen], names)


def source_split(targets: np.ndarray, patients: np.ndarray, *, test: int = SOURCE_TEST, seed: int = 0) -> list[str]:
    """Gives a split with exactly the source's test counts, and no patient on both sides.

    The source does not say which of its 60,361 normal and 6,331 nodule films were its 633 + 633 test films, nor that
    patients were kept apart. Here whole patients are drawn until the counts are met to the film, so that of the full
    data set 59,728 and 5,698 are left to train; which films they are is ours. A tenth of the nodule films but a
    hundredth of the normal ones are tested on, and patients with a nodule bring their normal films: so more of the test
    split's normal films are of such patients than of the train split's.

    Args:
        targets: (N,) 1 nodule, 0 normal; only such films.
        patients: (N,) int64.
        test: films of each class to test on.
        seed: of the draw.

    Returns:
        N of "train" and "test".

    Raises:
        RunError: the counts cannot be met by whole patients.
    """
    numbers, inverse = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(numbers), 2), dtype=np.int64)
    np.add.at(counts, (inverse, targets.astype(np.int64)), 1)
    order = np.random.default_rng(seed).permutation(len(numbers))
    # Patients with a nodule first, for they bring normal films along; then those with normal films only.
    order = order[np.argsort(counts[order, 1] == 0, kind="stable")]
    left, chosen = np.array([test, test]), np.zeros(len(numbers), dtype=bool)
    for patient in order:
        if bool((counts[patient] <= left).all()):
            chosen[patient] = True
            left = left - counts[patient]
    if left.any():
        raise RunError(
            f"test must be met by whole patients, got {test} films of each class of {int(counts[:, 0].sum())} normal "
            f"and {int(counts[:, 1].sum())} nodule ones, {int(left[0])} and {int(left[1])} short"
        )
    return np.where(chosen[inverse], "test", "train").tolist()


def write_split(root: str | Path, *, test: int = SOURCE_TEST, val: float = 0.1) -> Path:
    """Writes split.csv: the patients of `source_split`'s test films to test, of the others a share to val.

    Table 2 trains on train and val, the generators and classifiers on train alone.

    Args:
        root: folder of the official tables; images need not be there.
        test: films of each class to test on.
        val: share of the other patients.

    Returns:
        The file.

    Raises:
        RunError: there is a split.csv already, or the counts cannot be met.
    """
    path = Path(root) / "split.csv"
    if path.exists():
        raise RunError(f"{path} is there already, and is left as it is")
    entries = read_entries(root)
    shown = [entry for entry in entries if not entry[1] or "Nodule" in entry[1]]
    patients = np.array([entry[2] for entry in shown])
    held = np.array(source_split(np.array([bool(entry[1]) for entry in shown]), patients, test=test)) == "test"
    tested, everyone = set(patients[held].tolist()), [entry[2] for entry in entries]
    others = split_by_patient(everyone, (1 - val, val, 0.0))
    parts = ["test" if p in tested else part for p, part in zip(everyone, others, strict=True)]
    lines = [f"{entry[0]},{part}\n" for entry, part in zip(entries, parts, strict=True)]
    write_whole(path, ("Image Index,split\n" + "".join(lines)).encode())
    return path


def counted(root: str | Path, *, split: str = "file", test: int = SOURCE_TEST) -> dict[str, dict[str, int]]:
    """Gives the films and patients of each part, from the tables alone where the split is the source's.

    Args:
        root: the folder of the tables; images need not be there for "source".
        split: as in `read_filmset`.
        test: of `source_split`.

    Returns:
        "train", "test", and "val" where there is one, to "normal", "nodule" and "patients".
    """
    if split == "source":
        rows = [(n, p) for _, n, p, _ in read_entries(root) if not n or "Nodule" in n]
        targets, patients = np.array([bool(n) for n, _ in rows]), np.array([p for _, p in rows])
        parts = np.array(source_split(targets, patients, test=test))
    else:
        kinds = {part: ChestXray14(root, split=part, only_normal_or_nodule=True) for part in ("train", "val", "test")}
        targets = np.concatenate([data.labels[:, NODULE] > 0 for data in kinds.values()])
        patients = np.concatenate([data.patients for data in kinds.values()])
        parts = np.repeat(list(kinds), [len(data) for data in kinds.values()])
    return {
        part: {
            "normal": int((~targets[parts == part]).sum()),
            "nodule": int(targets[parts == part].sum()),
            "patients": len(np.unique(patients[parts == part])),
        }
        for part in ("train", "val", "test")
        if (parts == part).any()
    }


def read_filmset(
    root: str | Path, part: str, size: int, *, split: str = "file", everything: bool = False, test: int = SOURCE_TEST
) -> FilmSet:
    """Reads the films of one part, reduced to `size` (antialiased).

    Args:
        root: ChestX-ray14's layout, and ChestX-Det_boxes.csv if there is one.
        part: "train", "val" or "test"; "source" has no val.
        size: side in pixels.
        split: "file": the folder's own; "source": `source_split`.
        everything: take films with other findings too; else only normal ones and those with a nodule.
        test: of `source_split`.

    Raises:
        RunError: no film of a class, or the source's counts cannot be met.
    """
    extra = Path(root) / "ChestX-Det_boxes.csv"
    boxes = extra if extra.exists() else None
    if split == "file":
        data = ChestXray14(root, split=part, extra_boxes=boxes)
    elif split == "source":
        data = ChestXray14(root, extra_boxes=boxes)
    else:
        raise RunError(f"split must be 'file' or 'source', got {split!r}")
    nodule, normal = data.labels[:, NODULE] > 0, ~data.labels.any(axis=1)
    kept = nodule | normal
    if split == "source":
        held = np.array(source_split(nodule[kept], data.patients[kept], test=test))
        tested = np.isin(data.patients, data.patients[kept][held == "test"])
        if np.isin(ChestXray14(root, split="train").patients, data.patients[tested]).any():
            raise RunError(
                f"{root}: its train split, which generators learn from, must hold no patient that the source's counts "
                "put to test: write split.csv first (python -m train.common.splits --data FOLDER)"
            )
        kept = (tested == (part == "test")) & (kept | everything)
    else:
        kept = kept | everything
    if not (kept & nodule).any() or not (kept & normal).any():
        raise RunError(
            f"{root}: the {part} split needs normal and nodule films, got {int((kept & normal).sum())} and "
            f"{int((kept & nodule).sum())}"
        )
    rows, images = [], []
    for i, image, _ in Reading(data, size, desc=f"films of {part}", rows=kept.nonzero()[0].tolist()):
        rows.append(i)
        images.append(image)
    found = [data.boxes_relative(i, "Nodule") for i in rows]
    labels, patients = torch.from_numpy(data.labels)[rows], torch.from_numpy(data.patients)[rows]
    return FilmSet(torch.stack(images), labels, found, patients, [data.filenames[i] for i in rows])


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the official tables of ChestX-ray14")
    parser.add_argument("--test-films", type=int, default=SOURCE_TEST, help="of each class")
    options = parser.parse_args()
    try:
        print(write_split(options.data, test=options.test_films))
    except (RunError, DataError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
