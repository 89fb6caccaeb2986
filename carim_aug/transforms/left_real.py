"""Images that were to get a nodule and stay as they are: counted by their reason, over a machine's processes."""

import warnings
from typing import Any

import torch
from torch.utils.data import get_worker_info

from carim_aug.ops.orientation import REASONS as VIEWS

NO_LUNGS, NO_ROOM, GATE = "no lungs found", "no room for a nodule", "no candidate passed the gate"
REASONS = (*VIEWS, NO_LUNGS, NO_ROOM, GATE)
ROWS = 64
"""Processes that count apart: the main one, and workers."""

REMEDIES = {
    "inverted": "invert such images before the mix (MONOCHROME1: air must be dark)",
    "upside down": "turn such images before the mix",
    "rotated": "turn such images before the mix",
    "transposed": "give images (C, H, W), rows before columns; MONAI's readers give (C, W, H)",
    "lateral or no chest": "leave such images out with eligible=..., or pass placement='prior' to graft all the same",
    NO_LUNGS: "pass placement='prior' to graft all the same, or a function from an image to a mask",
}


class LeftReal:
    """Counts of images left real; the first of each reason with a remedy is a warning."""

    def __init__(self) -> None:
        self._counts = torch.zeros(ROWS, len(REASONS), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()

    def count(self, reason: str) -> None:
        """Count an image that stays real for one of `REASONS`."""
        if reason in REMEDIES and not self._counts[:, REASONS.index(reason)].any():
            warnings.warn(
                f"an image stays real, it is {reason}: {REMEDIES[reason]}; mix.left_real() counts", stacklevel=2
            )
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (ROWS - 1)
        self._counts[row, REASONS.index(reason)] += 1

    def report(self) -> dict[str, int]:
        """Return the number of images left real by reason, those that occurred."""
        return {name: n for name, n in zip(REASONS, self._counts.sum(dim=0).tolist(), strict=True) if n}
