"""How many images become synthetic: chances by class and epoch, and numbers added to a data set."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from carim_aug.labels.policy import LabelPolicy

NUMBERS = (int, float, np.integer, np.floating)
STRATEGIES = ("auto", "minority", "not minority", "not majority", "all")

Chances = Mapping[str, float] | Callable[[int], Mapping[str, float]]
"""Class to chance for images that may be replaced, together at most 1; or a function of the epoch that gives such."""


@dataclass(frozen=True)
class Amount:
    """How many images become synthetic, in one of three ways; by default with p = 0.5.

    Attributes:
        p: chance that an eligible image becomes a synthetic nodule, in [0, 1]; or a dict from class to chance; or a
            function from the epoch, counted from 0, to either (`LinearSchedule`, `CosineSchedule`).
        n_synthetic: class to number of samples ADDED to the data set.
        sampling_strategy: imbalanced-learn's words, a ratio, a dict of TOTALS or a callable; see `added`.
    """

    p: float | Mapping[str, float] | Callable[[int], Any] | None = None
    n_synthetic: Mapping[str, int] | None = None
    sampling_strategy: str | float | Mapping[str, int] | Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        given = list(self.given)
        if len(given) > 1:
            raise ValueError(f"give one of p, n_synthetic and sampling_strategy, got {given}")
        if not given:
            object.__setattr__(self, "p", 0.5)

    @property
    def given(self) -> dict[str, Any]:
        """The one of the three that is given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def adds(self) -> bool:
        """Whether samples are added to a data set, which a batch alone cannot do."""
        return self.p is None

    def chances(self, policy: LabelPolicy) -> Chances:
        """Return class chances under the policy's names, or a function of the epoch, which is tried at epoch 0."""
        if self.p is None:
            return {}
        if not callable(self.p):
            return check_chances(self.p, policy)
        check_chances(self.p(0), policy)
        return _Scheduled(self.p, policy)

    def check(self, policy: LabelPolicy, insertion: str) -> None:
        """Raise what is wrong with numbers, words and classes before there is a data set."""
        chances = self.chances(policy)
        first = chances(0) if callable(chances) else chances
        if insertion == "graft" and first.get(policy.normal, 0) > 0:
            raise ValueError(f"p must not name {policy.normal!r} with insertion='graft', which adds nodules only")
        if not callable(self.sampling_strategy):
            self.added({}, policy)

    def added(self, counts: Mapping[str, int], policy: LabelPolicy) -> dict[str, int]:
        """Return how many synthetic images of each class are added, zero numbers left out.

        `sampling_strategy` is over the classes that can be made: "minority", "not minority", "not majority" (= "auto"),
        "all" raise these classes to the majority's count; a number is nodule images per normal image afterwards; a dict
        the TOTAL per class afterwards; a callable goes from counts to such a dict.

        Args:
            counts: real images per class.
            policy: names the nodule and the normal class, the two that can be made.

        Raises:
            TypeError, ValueError: a word, number or class that does not fit.
        """
        if self.n_synthetic is not None:
            return {name: n for name, n in check_counts("n_synthetic", self.n_synthetic, policy).items() if n}
        strategy = self.sampling_strategy
        if strategy is None:
            return {}
        pair = {name: int(counts.get(name, 0)) for name in (policy.normal, policy.nodule)}
        if callable(strategy):
            strategy = strategy(dict(counts))
        if isinstance(strategy, Mapping):
            totals = check_counts("sampling_strategy", strategy, policy)
            for name, total in totals.items():
                if total < pair[name]:
                    least = f"the real count of {name!r} ({pair[name]})"
                    raise ValueError(f"sampling_strategy must not be below {least}, got {total}")
        elif isinstance(strategy, str):
            if strategy not in STRATEGIES:
                raise ValueError(
                    f"sampling_strategy must be one of {STRATEGIES}, a number, a dict or a callable, got {strategy!r}"
                )
            largest, smallest = max(pair.values()), min(pair.values())
            chosen = {
                "minority": [name for name, n in pair.items() if n == smallest][-1:],
                "not minority": [name for name, n in pair.items() if n != smallest],
            }.get(strategy, list(pair))
            totals = dict.fromkeys(chosen, largest)
        else:
            totals = {policy.nodule: self._total_by_ratio(strategy, pair, policy)}
        return {name: total - pair[name] for name, total in totals.items() if total > pair[name]}

    @staticmethod
    def _total_by_ratio(ratio: Any, pair: Mapping[str, int], policy: LabelPolicy) -> int:
        if isinstance(ratio, bool) or not isinstance(ratio, NUMBERS):
            kind = type(ratio).__name__
            raise TypeError(f"sampling_strategy must be a word, a number, a dict or a callable, got {kind}")
        if not 0 < ratio <= 1:
            raise ValueError(f"sampling_strategy as a number must be in (0, 1], got {ratio}")
        total = round(ratio * pair[policy.normal])
        if total < pair[policy.nodule]:
            raise ValueError(
                f"sampling_strategy must not be below the real ratio of {policy.nodule!r} to {policy.normal!r}, "
                f"{pair[policy.nodule]} / {pair[policy.normal]}, got {ratio}"
            )
        return total


@dataclass(frozen=True)
class _Scheduled:
    """Chances by epoch; a class, so that spawned workers can have it."""

    p: Callable[[int], Any]
    policy: LabelPolicy

    def __call__(self, epoch: int) -> dict[str, float]:
        return check_chances(self.p(epoch), self.policy)


@dataclass(frozen=True)
class _Ramp:
    """A value in [0, 1] that goes from one number to another over the epochs."""

    start: float  # at epoch 0
    end: float  # from epoch `epochs - 1` on
    epochs: int  # at least 2

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 2:
            raise ValueError(f"epochs must be an integer of at least 2, got {self.epochs!r}")

    def _part(self, epoch: int) -> float:
        return min(max(epoch, 0) / (self.epochs - 1), 1.0)


class LinearSchedule(_Ramp):
    """A straight line from start to end.

    >>> [LinearSchedule(0.5, 0.0, epochs=3)(epoch) for epoch in range(4)]
    [0.5, 0.25, 0.0, 0.0]
    """

    def __call__(self, epoch: int) -> float:
        """Return the value of an epoch."""
        return self.start + (self.end - self.start) * self._part(epoch)


class CosineSchedule(_Ramp):
    """Half a cosine from start to end: slow, fast, slow (Loshchilov and Hutter 2017, without restarts).

    >>> [round(CosineSchedule(0.0, 0.4, epochs=3)(epoch), 3) for epoch in range(4)]
    [0.0, 0.2, 0.4, 0.4]
    """

    def __call__(self, epoch: int) -> float:
        """Return the value of an epoch."""
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * self._part(epoch))) / 2


def check_chances(p: Any, policy: LabelPolicy) -> dict[str, float]:
    """Return class chances under the policy's names, from a number (all nodule) or a dict; see `Amount.chances`."""
    chances: dict[str, float] = {}
    for name, chance in p.items() if isinstance(p, Mapping) else [(policy.nodule, p)]:
        if isinstance(chance, bool) or not isinstance(chance, NUMBERS):
            raise TypeError(f"p must be a number in [0, 1] or a dict of them, got {chance!r}")
        if not 0 <= chance <= 1:
            raise ValueError(f"p must be in [0, 1], got {chance}")
        chances[_makeable("p", name, policy, chances)] = float(chance)
    if sum(chances.values()) > 1 + 1e-9:
        raise ValueError(f"p must not exceed 1 over all classes together, got {sum(chances.values())}")
    return chances


def check_counts(argument: str, counts: Any, policy: LabelPolicy) -> dict[str, int]:
    """Return class counts under the policy's names, or raise what is wrong with them."""
    if not isinstance(counts, Mapping):
        raise TypeError(f"{argument} must be a dict from class to number, got {type(counts).__name__}")
    checked: dict[str, int] = {}
    for name, n in counts.items():
        spelled = _makeable(argument, name, policy, checked)
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise TypeError(f"{argument}[{name!r}] must be an integer, got {n!r}")
        if n < 0:
            raise ValueError(f"{argument}[{name!r}] must be at least 0, got {n}")
        checked[spelled] = int(n)
    return checked


def _makeable(argument: str, name: Any, policy: LabelPolicy, others: Mapping[str, Any]) -> str:
    """Return the policy's spelling of a class that can be made and is not among the others, or raise ValueError."""
    try:
        spelled = policy.name_of(name)
        fits = policy.can_make(spelled)
    except ValueError as error:
        raise ValueError(f"{argument} has an unknown class {name!r}: {error}") from None
    if not fits:
        known = [policy.nodule, policy.normal]
        raise ValueError(f"{argument} must name classes that the generator makes {known}, got {name!r}")
    if spelled in others:
        raise ValueError(f"{argument} must name each class once, got {spelled!r} twice")
    return spelled
