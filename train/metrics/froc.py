"""FROC: how many nodules a detector finds at how many false positives an image (Bunch et al. 1977; METHOD 8).

A box finds a nodule if its centre lies in the nodule's box, which is first grown to a least side: readers' boxes differ
in width by more than half, so an overlap would judge the readers. Boxes with their centre in no nodule's box are false
positives; further boxes on one nodule are neither.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RATES: tuple[float, ...] = (0.25, 1.0, 4.0)
"""False positives an image at which sensitivities are told."""


class Marks(NamedTuple):
    """What a detector made of a set of images.

    Attributes:
        found: (K,) best score of the boxes on each nodule, -inf where there is none.
        found_images: (K,) int64, place of the nodule's image.
        false: (M,) scores of false positives.
        false_images: (M,) int64, place of each one's image.
        images: how many there are, those without nodules or boxes too.
    """

    found: Tensor
    found_images: Tensor
    false: Tensor
    false_images: Tensor
    images: int


def mark(boxes: Tensor, scores: Tensor, nodules: Tensor, *, least: float = 10.0) -> tuple[Tensor, Tensor]:
    """Gives the best score on each nodule of one image, and the scores of the false positives.

    Args:
        boxes: (n, 4) XYXY in pixels, predicted.
        scores: (n,), higher is surer.
        nodules: (k, 4) XYXY in pixels, true.
        least: side in pixels to which a smaller true box is grown about its centre, each way.

    Returns:
        found: (k,), -inf for a nodule without a box. A box in several nodules counts for the one whose centre is
            nearest.
        false: (n - hits,).

    Raises:
        ValueError: shapes that do not fit.
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


def marked(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], nodules: Sequence[Tensor], *, least: float = 10.0
) -> Marks:
    """Gives the marks of a set of images: see `mark` for one.

    Args:
        boxes: N tensors (n, 4), XYXY in pixels, predicted.
        scores: N tensors (n,).
        nodules: N tensors (k, 4), true; empty for an image without.
        least: side in pixels to which smaller true boxes are grown.

    Raises:
        ValueError: shapes or numbers that do not fit, or no image.
    """
    if not len(boxes) or len(boxes) != len(scores) or len(boxes) != len(nodules):
        raise ValueError(
            "boxes, scores and nodules must be of the same images, at least one, "
            f"got {len(boxes)}, {len(scores)} and {len(nodules)}"
        )
    pairs = [mark(*image, least=least) for image in zip(boxes, scores, nodules, strict=True)]
    found, false = ([pair[i] for pair in pairs] for i in (0, 1))

    def places(of: list[Tensor]) -> Tensor:
        return torch.repeat_interleave(torch.tensor([len(part) for part in of]))

    return Marks(torch.cat(found), places(found), torch.cat(false), places(false), len(pairs))


def sensitivity(marks: Marks, rates: Sequence[float] = RATES, *, weights: Tensor | None = None) -> Tensor:
    """Gives the share of nodules found at false positives an image: TP(t) / K for the lowest t with FP(t) <= rate N.

    A score counts if it is above t; a nodule that ties with the first false positive too many is not found. A detector
    that gives too few boxes to reach a rate is judged by all it gives.

    Args:
        marks: of N images with K >= 1 nodules.
        rates: R false positives an image, >= 0.
        weights: (D, N) >= 0, how often each image counts in each of D draws; once by default.

    Returns:
        (R,), or (D, R) with weights, float64 in [0, 1]; NaN in a draw without nodules.

    Raises:
        ValueError: there is no nodule, a rate is negative, or the weights do not fit.

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
    """Gives bootstrap weights over patients: those with a nodule and those without drawn apart, with all their films.

    Args:
        patients: (N,) int64, whose each image is.
        boxed: (N,) bool, whether it has a nodule.
        generator: random stream.
        draws: bootstrap samples D.

    Returns:
        (D, N) float64: how often each image counts. The same weights for two detectors make their difference paired.

    Raises:
        ValueError: shapes that do not fit.
    """
    if patients.ndim != 1 or boxed.shape != patients.shape:
        raise ValueError(f"patients and boxed must be (N,) each, got {tuple(patients.shape)} and {tuple(boxed.shape)}")
    names, index = patients.unique(return_inverse=True)
    with_nodule = torch.zeros(len(names), dtype=torch.bool)
    with_nodule[index[boxed]] = True
    times = torch.zeros(draws, len(names), dtype=torch.float64)
    for group in (with_nodule.nonzero()[:, 0], (~with_nodule).nonzero()[:, 0]):
        if len(group):
            drawn = group[torch.randint(len(group), (draws, len(group)), generator=generator)]
            times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return times[:, index]


def interval(values: Tensor, *, level: float = 0.95) -> Tensor:
    """Gives the middle `level` of bootstrap values (D, ...) as (2, ...): low and high; NaN draws are left out."""
    tail = (1 - level) / 2
    return values.double().nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
