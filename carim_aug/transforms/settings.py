"""What a `SyntheticNoduleMix` is told once, and what travels from it to data sets, loaders and pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from carim_aug.labels.base import LabelError
from carim_aug.labels.policy import LabelPolicy
from carim_aug.labels.sample import layout_of
from carim_aug.location.placement import Placement, check_placement
from carim_aug.ops.random import LIMIT
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.amounts import NUMBERS, Amount
from carim_aug.transforms.gate import Gates
from carim_aug.transforms.left_real import LeftReal
from carim_aug.transforms.plan import Planner

INSERTIONS = ("graft", "whole")


@dataclass(frozen=True)
class Graft:
    """How nodules come into real images."""

    placement: Placement = "lungs"
    strength: float | tuple[float, float] = 1.0  # residuals are multiplied by it: (0, 4], or (least, largest)
    gates: Gates | None = None  # which nodules are good enough; None: all
    left_real: LeftReal = field(default_factory=LeftReal, compare=False)  # counts images that get none

    def __post_init__(self) -> None:
        object.__setattr__(self, "placement", check_placement(self.placement))
        given = self.strength
        pair = (given, given) if isinstance(given, NUMBERS) else given
        fits = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(s, NUMBERS) for s in pair)
        if not fits or isinstance(given, bool) or not 0 < pair[0] <= pair[1] <= 4:
            raise ValueError(f"strength must be a number in (0, 4] or (least, most), got {given!r}")
        object.__setattr__(self, "strength", (float(pair[0]), float(pair[1])))


@dataclass(frozen=True)
class MixSettings:
    """All that decides, but for the data; each is checked here. `SyntheticNoduleMix` says what they mean."""

    prior: Any
    seed: int = 0
    amount: Amount = field(default_factory=Amount)
    insertion: str = "graft"
    graft: Graft = field(default_factory=Graft)
    labels: LabelPolicy = field(default_factory=LabelPolicy)
    layout: Any = "auto"
    labels_getter: Callable[[Any], Any] | str | None = None
    value_range: ValueRange = field(default_factory=ValueRange)
    eligible: Callable[[Any], bool] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prior, type) or not all(hasattr(self.prior, name) for name in ("draw", "field")):
            raise TypeError(f"prior must be a LocationPrior, got {type(self.prior).__name__}")
        if self.insertion not in INSERTIONS:
            raise ValueError(f"insertion must be one of {INSERTIONS}, got {self.insertion!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < LIMIT:
            raise ValueError(f"seed must be an integer in [0, 2**64 - 1], got {self.seed!r}")
        if self.eligible is not None and not callable(self.eligible):
            raise TypeError(f"eligible must be callable, got {type(self.eligible).__name__}")
        self.amount.check(self.labels, self.insertion)

    def planner(self, policy: LabelPolicy) -> Planner:
        """Return what decides, for labels of a policy."""
        strength: Any = self.graft.strength
        chances = self.amount.chances(policy)
        return Planner(self.prior, seed=self.seed, nodule=policy.nodule, chances=chances, strength=strength)

    def layout_of(self, sample: Any) -> Any:
        """Return the layout of a sample."""
        return layout_of(sample, self.layout, self.labels_getter)

    def check_normal(self, policy: LabelPolicy) -> None:
        """Raise LabelError for classes of which none is known to be without a nodule."""
        if policy.kind in ("integer", "onehot") and policy.normal not in (policy.classes or ()) and not self.eligible:
            rule = f"one of the classes {list(policy.classes or ())}, which images without a nodule have"
            raise LabelError(f"normal must be {rule}, got {policy.normal!r}: pass labels=LabelPolicy(normal=...)")

    def takes_anything(self, policy: LabelPolicy) -> bool:
        """Return whether any sample may be a background: a graft adds a box to whatever boxes there are."""
        return policy.kind == "detection" and self.insertion == "graft"
