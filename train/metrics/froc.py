"""FROC: how many nodules a detector finds at how many false positives an image (Bunch et al. 1977).

A box finds a nodule if its centre lies in the nodule's box, which is first enlarged to a least side: readers' boxes
differ in width by more than half, so an overlap would measure the readers. Boxes with their centre in no nodule's box
are false positives; further boxes on one nodule are neither.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.metrics.statistics import resample_patients

RATES: tuple[float, ...] = (0.25, 1.0, 4.0)  # false positives an image at which sensitivities are given


class Marks(NamedTuple):
    """What a detector made of a set of images."""

    found: Tensor  # (K,) best score of the boxes on each nodule, -inf where there is none
    found_images: Tensor  # (K,) int64, place of the nodule's image
    false: Tensor  # (M,) scores of false positives
    false_images: Tensor  # (M,) int64, place of each one's image
    images: int  # how many there are, those without nodules or boxes too


def mark(boxes: Tensor, scores: Tensor, nodules: Tensor, *, least: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return the best score (k,) on each nodule of one image, -inf without a box, and those of the false positives.

    Of predicted boxes (n, 4) XYXY in pixels with scores (n,), and true ones (k, 4), which are enlarged about their
    centres to `least` pixels each way. A box in several nodules counts for the one whose centre is nearest.
    """
    n, k = len(boxes), len(nodules)
    if boxes.shape != (n, 4) or scores.shape != (n,) or nodules.shape != (k, 4):
        raise ValueError(
            "boxes, scores and nodules must be (n, 4), (n,) and (k, 4), "
            f"got {tuple(boxes.shape)}, {tuple(scores.shape)} and {tuple(nodules.shape)}"
        )
    found = scores.new_full((k,), -torch.inf)
    if not n or not k:
        return found, scores
    centres, middles = (boxes[:, :2] + boxes[:, 2:]) / 2, (nodules[:, :2] + nodules[:, 2:]) / 2
    half = ((nodules[:, 2:] - nodules[:, :2]) / 2).clamp(min=least / 2)
    apart = centres[:, None] - middles
    distance = apart.norm(dim=2).masked_fill((apart.abs() > half).any(dim=2), torch.inf)
    nearest = distance.min(dim=1)
    hit = nearest.values.isfinite()
    return found.scatter_reduce(0, nearest.indices[hit], scores[hit], "amax"), scores[~hit]


def mark_images(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], nodules: Sequence[Tensor], *, least: float = 10.0
) -> Marks:
    """Return the marks of N >= 1 images; `mark` says what of each."""
    if not len(boxes) or len(boxes) != len(scores) or len(boxes) != len(nodules):
        raise ValueError(
            "boxes, scores and nodules must be of the same images, at least one, "
            f"got {len(boxes)}, {len(scores)} and {len(nodules)}"
        )
    found, false = zip(*(mark(*image, least=least) for image in zip(boxes, scores, nodules, strict=True)), strict=True)

    def places(parts: Sequence[Tensor]) -> Tensor:
        return torch.repeat_interleave(torch.tensor([len(part) for part in parts]))

    return Marks(torch.cat(found), places(found), torch.cat(false), places(false), len(boxes))


def sensitivity(marks: Marks, rates: Sequence[float] = RATES, *, weights: Tensor | None = None) -> Tensor:
    """Return the share of nodules found at false positives an image: TP(t) / K for the lowest t with FP(t) <= rate N.

    A score counts if it is above t; a nodule that ties with the first false positive too many is not found. A detector
    that gives too few boxes to reach a rate is measured by all it gives. For R rates (R,) float64 in [0, 1], or (D, R)
    with weights (D, N) >= 0, how often each image counts in each of D draws; NaN in a draw without nodules.

    >>> three = torch.tensor([0.9, 0.5, 0.2])
    >>> place = torch.zeros(3, dtype=torch.int64)  # three nodules in the first of two images
    >>> sensitivity(Marks(three, place, torch.tensor([0.7, 0.3]), torch.tensor([0, 1]), 2), (0, 0.5, 1))
    tensor([0.3333, 0.6667, 1.0000], dtype=torch.float64)
    """
    if not len(marks.found):
        raise ValueError("marks must hold at least one nodule, got none")
    if min(rates) < 0:
        raise ValueError(f"rates must be at least 0, got {min(rates)}")
    if weights is not None and (weights.ndim != 2 or weights.shape[1] != marks.images):
        raise ValueError(f"weights must be (draws, {marks.images}), got {tuple(weights.shape)}")
    times = torch.ones(1, marks.images, dtype=torch.float64) if weights is None else weights.double()
    order = marks.false.argsort(descending=True)
    false = torch.cat([marks.false[order].double(), marks.false.new_full((1,), -torch.inf, dtype=torch.float64)])
    so_far = times[:, marks.false_images[order]].cumsum(dim=1)
    allowed = times.sum(dim=1, keepdim=True) * torch.tensor(rates, dtype=torch.float64)
    # The first false positive that is one too many: only what scores above it counts.
    limits = false[torch.searchsorted(so_far, allowed + 1e-9, right=True)]
    count = times[:, marks.found_images]
    above = marks.found.double() > limits[:, :, None]
    share = (above * count[:, None]).sum(dim=2) / count.sum(dim=1, keepdim=True)
    return share[0] if weights is None else share


def patient_weights(patients: Tensor, boxed: Tensor, *, generator: torch.Generator, draws: int = 2000) -> Tensor:
    """Return how often each image counts (D, N) in draws of patients (N,), those with a nodule drawn apart."""
    if patients.ndim != 1 or boxed.shape != patients.shape:
        raise ValueError(f"patients and boxed must be (N,) each, got {tuple(patients.shape)} and {tuple(boxed.shape)}")
    with_nodule, times = torch.isin(patients, patients[boxed]), torch.zeros(draws, len(patients), dtype=torch.float64)
    for group in (with_nodule, ~with_nodule):
        if bool(group.any()):
            times[:, group] = resample_patients(patients[group], draws, generator=generator)
    return times
