"""Splits by patient: the folder's own, or one with exactly the test counts of Ann (2021), Table 2.

`python -m train.common.splits --data FOLDER` writes split.csv by these counts into a folder of the full ChestX-ray14,
so that the other recipes never see the images that Table 2 is tested on.
"""

from pathlib import Path
from typing import Any

import numpy as np

from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.chestxray14_tables import read_entries, split_by_patient
from train.common.command import named_errors, recipe_parser
from train.common.images import NODULE, ImageSet, read_images
from train.common.run import RunError, write_whole

ANN_TEST = 633  # test images of each class of Ann (2021)
SPLITS: tuple[str, ...] = ("file", "ann2021")  # the folder's train, val and test; or `ann_split`'s train and test


def ann_split(nodule: np.ndarray, patients: np.ndarray, *, test: int = ANN_TEST, seed: int = 0) -> list[str]:
    """Split images (N,), nodule or normal, into "train" and "test" with `test` of each class, patients kept apart.

    Ann (2021) does not say which of 60,361 normal and 6,331 nodule images were the 633 + 633, nor that patients were
    kept apart. Here whole patients are drawn until the counts are met to the image, so that 59,728 and 5,698 are left
    to train. A tenth of the nodule images but a hundredth of the normal ones are tested on, and patients with a nodule
    bring their normal images: so more of the test split's normal images are of such patients than of the train split's.
    """
    numbers, inverse = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(numbers), 2), dtype=np.int64)
    np.add.at(counts, (inverse, nodule.astype(np.int64)), 1)
    order = np.random.default_rng(seed).permutation(len(numbers))
    # Patients with a nodule first, for they bring normal images along; then those with normal images only.
    order = order[np.argsort(counts[order, 1] == 0, kind="stable")]
    left, chosen = np.array([test, test]), np.zeros(len(numbers), dtype=bool)
    for patient in order:
        if bool((counts[patient] <= left).all()):
            chosen[patient] = True
            left = left - counts[patient]
    if left.any():
        raise RunError(
            f"test must be met by whole patients, got {test} images of each class of {int(counts[:, 0].sum())} normal "
            f"and {int(counts[:, 1].sum())} nodule ones, {int(left[0])} and {int(left[1])} short"
        )
    return np.where(chosen[inverse], "test", "train").tolist()


def write_split(root: str | Path, *, test: int = ANN_TEST, val: float = 0.1) -> Path:
    """Write split.csv and return it: patients of `ann_split`'s test images to test, a share of the others to val."""
    path = Path(root) / "split.csv"
    if path.exists():
        raise RunError(f"{path} is there already, and is left as it is")
    entries, tested = read_entries(root), _tested_patients(root, test)
    patients = [entry.patient for entry in entries]
    others = split_by_patient(patients, (1 - val, val, 0.0))
    parts = ["test" if patient in tested else part for patient, part in zip(patients, others, strict=True)]
    lines = [f"{entry.name},{part}\n" for entry, part in zip(entries, parts, strict=True)]
    write_whole(path, ("Image Index,split\n" + "".join(lines)).encode())
    return path


def count_images(root: str | Path, *, split: str = "file", test: int = ANN_TEST) -> dict[str, dict[str, int]]:
    """Return how many "normal" and "nodule" images and "patients" each part has; "ann2021" needs the tables alone."""
    if split == "ann2021":
        nodule, patients = _normal_and_nodule(root)
        parts = np.array(ann_split(nodule, patients, test=test))
    else:
        sets = {part: ChestXray14(root, split=part, only_normal_or_nodule=True) for part in ("train", "val", "test")}
        nodule = np.concatenate([data.labels[:, NODULE] > 0 for data in sets.values()])
        patients = np.concatenate([data.patients for data in sets.values()])
        parts = np.repeat(list(sets), [len(data) for data in sets.values()])
    return {
        part: {
            "normal": int((~nodule[parts == part]).sum()),
            "nodule": int(nodule[parts == part].sum()),
            "patients": len(np.unique(patients[parts == part])),
        }
        for part in ("train", "val", "test")
        if (parts == part).any()
    }


def read_part(
    root: str | Path, part: str, size: int, *, split: str = "file", everything: bool = False, test: int = ANN_TEST
) -> ImageSet:
    """Read the images of "train", "val" or "test" ("ann2021" has no val), boxes of any size.

    Only normal ones and those with a nodule, unless `everything`; RunError if a class has none.
    """
    if split not in SPLITS:
        raise RunError(f"split must be one of {SPLITS}, got {split!r}")
    reading: dict[str, Any] = {"only_normal_or_nodule": not everything, "largest_box": 1.0}
    if split == "file":
        images = read_images(root, part, size, **reading)
    elif part not in ("train", "test"):
        raise RunError(f"part must be 'train' or 'test' with split={split!r}, got {part!r}")
    else:
        tested = _tested_patients(root, test)
        if not tested.isdisjoint(ChestXray14(root, split="train").patients.tolist()):
            raise RunError(
                f"{root}: its train split, which generators learn from, must hold no patient that the counts of Ann "
                "(2021) put to test: write split.csv first (python -m train.common.splits --data FOLDER)"
            )
        names = {entry.name for entry in read_entries(root) if (entry.patient in tested) == (part == "test")}
        images = read_images(root, None, size, only=names, **reading)
    images.check(f"{root}: the {part} split", normal=1, nodule=1)
    return images


def _normal_and_nodule(root: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return, from the table alone, whether each image that is normal or has a nodule has one, and its patient."""
    entries = [entry for entry in read_entries(root) if not entry.findings or "Nodule" in entry.findings]
    return np.array([bool(entry.findings) for entry in entries]), np.array([entry.patient for entry in entries])


def _tested_patients(root: str | Path, test: int) -> set[int]:
    nodule, patients = _normal_and_nodule(root)
    return set(patients[np.array(ann_split(nodule, patients, test=test)) == "test"].tolist())


def main() -> None:
    """Run the command."""
    parser = recipe_parser(__doc__, "--data", data={"help": "folder of the official tables of ChestX-ray14"})
    parser.add_argument("--test-images", type=int, default=ANN_TEST, help="of each class")
    options = parser.parse_args()
    with named_errors():
        print(write_split(options.data, test=options.test_images))


if __name__ == "__main__":
    main()
