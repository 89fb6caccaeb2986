"""The boxes that masks C are unions of (METHOD 2), for controls that put something into each.

The way back from `carim_aug.ops.boxes.boxes_to_masks`.
"""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from carim_aug.ops.boxes import check_masks

MOST_EDGES = 64
"""Rows, and columns, at which a mask of a few boxes may change."""


def boxes_of_masks(masks: Tensor) -> list[Tensor]:
    """Gives the boxes that masks are unions of.

    Boxes that do not touch come back as they are. Of others, the largest rectangle inside the mask is taken first, and
    then the one that covers most of the rest, until nothing is left.

    Args:
        masks: (B, 1, H, W) in {0, 1}, unions of a few filled boxes.

    Returns:
        B of (k, 4) float32 XYXY in pixels, on the CPU, ordered by x1, y1, x2, y2; k is 0 for an empty mask.

    Raises:
        ValueError: masks are not in {0, 1}, or have more edges than a few boxes can have.

    >>> from carim_aug.ops.boxes import boxes_to_masks
    >>> boxes_of_masks(boxes_to_masks([torch.tensor([[1.0, 0.0, 3.0, 2.0]])], (3, 4)))[0].tolist()
    [[1.0, 0.0, 3.0, 2.0]]
    """
    check_masks(masks)
    films = masks[:, 0].detach().cpu().numpy() > 0
    return [torch.from_numpy(_boxes_of(film)) if film.any() else torch.zeros(0, 4) for film in films]


def _boxes_of(film: np.ndarray) -> np.ndarray:
    """Boxes (k, 4) of one mask (H, W) bool that is not empty, on the grid of the rows and columns where it changes."""
    rows, columns = (
        np.concatenate([[0], np.flatnonzero(np.diff(film, axis=i).any(axis=1 - i)) + 1, [film.shape[i]]])
        for i in (0, 1)
    )
    if max(len(rows), len(columns)) > MOST_EDGES:
        raise ValueError(
            f"masks must be unions of a few boxes, with up to {MOST_EDGES} edges each way, got one with {len(rows)} "
            f"rows and {len(columns)} columns where it changes"
        )
    cells = film[np.ix_(rows[:-1], columns[:-1])]

    # Between any two rows, the rectangles inside the mask that are as wide as can be.
    inside = []
    for top, bottom in combinations(range(len(rows)), 2):
        full = cells[top:bottom].all(axis=0)
        if full.any():
            turns = np.flatnonzero(np.diff(full, prepend=False, append=False))
            inside += [(top, bottom, left, right) for left, right in turns.reshape(-1, 2)]

    left_over, boxes = np.outer(np.diff(rows), np.diff(columns)) * cells, []
    while left_over.any():
        top, bottom, left, right = max(inside, key=lambda r: left_over[r[0] : r[1], r[2] : r[3]].sum())
        left_over[top:bottom, left:right] = 0
        boxes.append((columns[left], rows[top], columns[right], rows[bottom]))
    return np.array(sorted(boxes), np.float32)
