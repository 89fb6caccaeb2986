"""Which generated nodules are good enough: rejected ones are drawn again, a bounded number of times.

A gate sees one candidate after the other, from the key (seed, epoch, index, ..., try), so what passes depends on
nothing but that key and the background.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from carim_aug.ops.boxes import boxes_to_masks, dilate_boxes
from carim_aug.ops.cam import activation_map, enlarge

ROWS = 65
"""Rows of the counts: the main process and up to 64 workers have one each, so that none overwrites another."""

HOPELESS = 256
"""Candidates after which a gate that has accepted none is an error."""


class GateError(RuntimeError):
    """A gate that accepts nothing, or returns no verdict."""


@dataclass(frozen=True)
class Candidates:
    """What a gate looks at."""

    images: Tensor  # (n, 1, H, W) float32, [-1, 1]: as they would come into the batch; channels averaged
    boxes: list[Tensor]  # n of (k, 4), XYXY in pixels, k >= 1
    backgrounds: Tensor | None  # (n, 1, H, W), without the nodule; None where the whole image is generated
    contrasts: Tensor  # (n,), as `MixParams.contrasts`; NaN for whole images

    @property
    def masks(self) -> Tensor:
        """(n, 1, H, W) float32 in {0, 1}: the boxes as masks."""
        height, width = self.images.shape[-2:]
        return boxes_to_masks(self.boxes, (height, width)).to(self.images.device)


class Gate:
    """Accepts candidates whose score lies in a window.

    Args:
        score: from `Candidates` to scores (n,), or to verdicts (n,) bool.
        low, high: of the scores that are accepted.
        tries: candidates of an image; after the last one it stays real (an added sample shows its background).
        name: in the report.

    Raises:
        TypeError: no function.
        ValueError: an empty window, or a number of tries outside [1, 256].
    """

    def __init__(
        self,
        score: Callable[[Candidates], Tensor],
        *,
        low: float = -math.inf,
        high: float = math.inf,
        tries: int = 8,
        name: str = "",
    ) -> None:
        if not callable(score):
            raise TypeError(f"gate must be a function of Candidates, a Gate or a list of them, got {score!r}")
        if not low <= high:
            raise ValueError(f"gate must have low <= high, got low {low} and high {high}")
        if isinstance(tries, bool) or not isinstance(tries, int) or not 1 <= tries <= 256:
            raise ValueError(f"tries must be an integer in [1, 256], got {tries!r}")
        self.score, self.low, self.high, self.tries = score, float(low), float(high), tries
        self.name = name or getattr(score, "__name__", type(score).__name__).strip("<>")
        self.reasons = tuple(
            f"{self.name}: {why}" for why in ("rejected", "not finite", f"below {low:g}", f"above {high:g}")
        )

    def judge(self, candidates: Candidates) -> tuple[Tensor, list[str]]:
        """Return scores (n,) float32 and the reason to reject each one, "" for none.

        Raises:
            GateError: the function returned something else than n scores or verdicts.
        """
        scores = torch.as_tensor(self.score(candidates))
        n = len(candidates.images)
        if scores.numel() != n:
            raise GateError(f"gate {self.name!r} must give {n} scores or verdicts, got shape {tuple(scores.shape)}")
        scores = scores.detach().reshape(n).cpu()
        rejected, not_finite, below, above = self.reasons
        if scores.dtype == torch.bool:
            return scores.float(), ["" if good else rejected for good in scores.tolist()]
        reasons = []
        for value in scores.double().tolist():
            if not math.isfinite(value):
                reasons.append(not_finite)
            else:
                reasons.append(below if value < self.low else above if value > self.high else "")
        return scores.float(), reasons


def contrast_gate(low: float = 0.02, high: float = math.inf, *, tries: int = 8) -> Gate:
    """Return a gate for nodules that a graft makes too faint, or too bright, in units of the [-1, 1] image."""
    return Gate(_contrasts, low=low, high=high, tries=tries, name="contrast")


def probability_gate(
    classifier: nn.Module, target: int, *, low: float = 0.0, high: float = 1.0, tries: int = 8, logits: bool = True
) -> Gate:
    """Return a gate by a classifier's probability of a nodule: neither hopeless (below low) nor trivial (above high).

    Args:
        classifier: images (n, 1, H, W) in [-1, 1] to outputs (n, C).
        target: the nodule's column.
        low, high, tries: see `Gate`.
        logits: whether the outputs are logits; else probabilities.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low and high must be probabilities with low <= high, got {low} and {high}")
    return Gate(_Probability(classifier, target, logits), low=low, high=high, tries=tries, name="probability")


def cam_gate(
    classifier: nn.Module,
    target: int,
    *,
    layer: nn.Module | None = None,
    method: str = "grad-cam",
    low: float = 0.3,
    grow: float = 0.25,
    tries: int = 8,
) -> Gate:
    """Return a gate by where a classifier sees the nodule: the share of its activation map inside the boxes.

    Args:
        classifier: as in `probability_gate`.
        target: the nodule's logit.
        layer: whose output the map is of; None: `classifier.activation`.
        method: of `carim_aug.ops.cam.METHODS`.
        low: least share of the positive map inside the boxes, in [0, 1].
        grow: part of its width and height by which a box is larger on every side.
        tries: see `Gate`.
    """
    if not 0 <= low <= 1:
        raise ValueError(f"low must be a share in [0, 1], got {low}")
    chosen = layer if layer is not None else getattr(classifier, "activation", None)
    if not isinstance(chosen, nn.Module):
        raise TypeError(f"layer must be a module of the classifier that gives maps, got {chosen!r}")
    return Gate(_MapInside(classifier, target, chosen, method, grow), low=low, tries=tries, name="CAM inside the mask")


# Classes and a function at the top of the module, so that spawned workers can have them.
def _contrasts(candidates: Candidates) -> Tensor:
    return candidates.contrasts


@dataclass(frozen=True)
class _Probability:
    classifier: nn.Module
    target: int
    logits: bool

    def __call__(self, candidates: Candidates) -> Tensor:
        with torch.no_grad(), _evaluating(self.classifier):
            outputs = self.classifier(candidates.images.to(_device(self.classifier)))[:, self.target].float()
        return outputs.sigmoid() if self.logits else outputs


@dataclass(frozen=True)
class _MapInside:
    classifier: nn.Module
    target: int
    layer: nn.Module
    method: str
    grow: float

    def __call__(self, candidates: Candidates) -> Tensor:
        size = (int(candidates.images.shape[-2]), int(candidates.images.shape[-1]))
        images = candidates.images.to(_device(self.classifier))
        with _evaluating(self.classifier):
            found = activation_map(
                self.classifier, images, self.target, layer=self.layer, method=self.method, relu=True
            )
        # A classifier squares its images, and so its maps: masks are made square in the same way.
        side = max(size)
        maps = enlarge(found.maps.float(), side)
        larger = [dilate_boxes(boxes, self.grow, size) for boxes in candidates.boxes]
        masks = nn.functional.interpolate(boxes_to_masks(larger, size), size=(side, side), mode="nearest")
        return (maps * masks.to(maps.device)).sum(dim=(1, 2, 3)) / maps.sum(dim=(1, 2, 3)).clamp(min=1e-12)


class Gates:
    """Gates (or functions), all of which must accept, with the counts of what they did, shared with workers."""

    def __init__(self, gates: Any) -> None:
        many = list(gates) if isinstance(gates, Sequence) else [gates]
        if not many:
            raise ValueError("gate must be a function of Candidates, a Gate or a list of them, got an empty list")
        self.gates = [gate if isinstance(gate, Gate) else Gate(gate) for gate in many]
        self.tries = max(gate.tries for gate in self.gates)
        self.reasons = tuple(dict.fromkeys(reason for gate in self.gates for reason in gate.reasons))
        # Of each process: candidates, accepted, exhausted, then rejected by reason.
        self._counts = torch.zeros(ROWS, 3 + len(self.reasons), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()

    def judge(self, candidates: Candidates) -> tuple[Tensor, list[bool]]:
        """Return the last gate's scores (n,) and whether each candidate passes all gates; count them.

        Raises:
            GateError: so many candidates, and none accepted.
        """
        rejected = [""] * len(candidates.images)
        scores = torch.full((len(rejected),), math.nan)
        for gate in self.gates:
            scores, reasons = gate.judge(candidates)
            rejected = [old or new for old, new in zip(rejected, reasons, strict=True)]
        row = self._row
        row[0] += len(rejected)
        row[1] += rejected.count("")
        for reason in filter(None, rejected):
            row[3 + self.reasons.index(reason)] += 1
        if int(row[1]) == 0 and int(row[0]) >= HOPELESS * len(self.gates):
            why = ", ".join(f"{name} {int(n)}" for name, n in zip(self.reasons, row[3:], strict=True) if n)
            raise GateError(
                f"gate accepted none of {int(row[0])} candidates ({why}): widen its window, or judge some candidates "
                "by hand first (mix.regenerate)"
            )
        return scores, [not reason for reason in rejected]

    def exhaust(self) -> None:
        """Count an image for which no candidate passed."""
        self._row[2] += 1

    def report(self) -> dict[str, Any]:
        """Return candidates, accepted, rate, exhausted (images left real) and reasons, over a machine's processes."""
        total = self._counts.sum(dim=0)
        candidates, accepted, exhausted = total[:3].tolist()
        return {
            "candidates": candidates,
            "accepted": accepted,
            "rate": accepted / candidates if candidates else math.nan,
            "exhausted": exhausted,
            "reasons": {name: int(n) for name, n in zip(self.reasons, total[3:], strict=True) if n},
        }

    @property
    def _row(self) -> Tensor:
        worker = get_worker_info()
        return self._counts[0 if worker is None else 1 + worker.id % (ROWS - 1)]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode for a while; every part has its own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
