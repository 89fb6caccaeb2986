"""What an export is to hold, image by image, before any is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from carim_aug.ops.random import fold, stream
from carim_aug.tools.export_backgrounds import (
    Background,
    find_backgrounds,
    find_validation,
    hash_backgrounds,
    hold_out,
)

NODULE, NORMAL = "Nodule", "No Finding"
# Patients of whole synthetic images have sixteen digits: 1, six of (weights, seed), nine of the index. Those of
# ChestX-ray14 have five, of MIMIC-CXR eight. All are below 2**53, so a table read as floats keeps them.
FIRST_PATIENT = 10**15


@dataclass(frozen=True)
class Item:
    """What is known of an image before it is made."""

    name: str  # of its file in its folder
    key: tuple[int, ...]  # (seed, epoch, index)
    class_name: str
    patient: int  # whose image it is; of a whole synthetic image, nobody's
    insertion: str = "whole"  # as in its `Provenance`
    background: Background | None = None
    folder: str = "images"  # or that of the validation set

    def stay_real(self) -> "Item":
        """Return this graft's image without it."""
        return replace(self, class_name=NORMAL, insertion="none")


def plan_whole(weights_hash: str, seed: int, n: int, negatives: int) -> list[Item]:
    """Return whole images: n with nodules, then normal ones."""
    first = FIRST_PATIENT + fold(int(weights_hash[:15], 16), seed) % 10**6 * 10**9
    classes = [NODULE] * n + [NORMAL] * negatives
    return [Item(f"{first + i}_000.png", (seed, 0, i), name, first + i) for i, name in enumerate(classes)]


def plan_grafts(
    seed: int,
    folder: str | Path,
    split: str,
    normal: Sequence[str],
    *,
    n: int | None,
    negatives: int,
    validate: bool,
) -> tuple[list[Item], str]:
    """Return nodules in n backgrounds of a folder, negatives, then real images to validate on; and all real ones' hash.

    Each of the three is in the order of the files' names. ValueError for more images than there are.
    """
    found = find_backgrounds(folder, split, normal)
    validation = find_validation(folder, normal) if validate else []
    held_out = hold_out(found) if validate and not validation else set()

    # To train on: an image's index is its place among all backgrounds, so its graft is the same for any choice.
    order = stream(seed, 0, 0, len(found)).permutation(len(found)).tolist()
    order = [i for i in order if found[i].patient not in held_out]
    n = len(order) - negatives if n is None else n
    if not 1 <= n <= len(order) - negatives:
        left = f" besides {len(found) - len(order)} held out for validation, unless val is given" if held_out else ""
        rule = f"n must be at least 1, and with negatives at most the number of backgrounds ({len(order)}{left})"
        raise ValueError(f"{rule}, got n={n} and negatives={negatives}: export another seed too")
    items = [
        Item(f"{found[i].path.stem}_graft_{seed}.png", (seed, 0, i), NODULE, found[i].patient, "graft", found[i])
        for i in sorted(order[:n])
    ]
    items += [_plan_real(seed, i, found[i]) for i in sorted(order[n : n + negatives])]

    # To validate on: all images with boxes, and a tenth as many normal ones as to train on, the same for any seed.
    validation = validation or [own for own in found if own.patient in held_out]
    empty = [i for i, own in enumerate(validation) if not own.boxes]
    some = stream(0, 0, 0, len(validation)).permutation(len(empty))[: max(1, len(items) // 10)]
    chosen = {empty[i] for i in some.tolist()}
    real = [_plan_real(seed, i, own) for i, own in enumerate(validation) if own.boxes or i in chosen]
    return items + [replace(item, folder="val/images") for item in real], hash_backgrounds([*found, *validation])


def _plan_real(seed: int, i: int, own: Background) -> Item:
    """Return a real image that stays as it is."""
    name = NODULE if own.boxes else NORMAL
    return Item(f"{own.path.stem}_real.png", (seed, 0, i), name, own.patient, "none", own)
