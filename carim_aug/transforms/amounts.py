"""How many slots become synthetic: chances by class and epoch, and counts added to a data set (DESIGN 2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from carim_aug.labels.policy import LabelPolicy

NUMBERS = (int, float, np.integer, np.floating)
STRATEGIES = ("auto", "minority", "not minority", "not majority", "all")

Chances = Mapping[str, float] | Callable[[int], Mapping[str, float]]
"""Class to chance for slots that may be replaced, together at most 1; or a function of the epoch that gives such."""


def added_counts(
    counts: Mapping[str, int],
    policy: LabelPolicy,
    *,
    n_synthetic: Mapping[str, int] | None = None,
    sampling_strategy: str | float | Mapping[str, int] | Callable[[Mapping[str, int]], Mapping[str, int]] | None = None,
) -> dict[str, int]:
    """Gives how many synthetic images of each class are added.

    Args:
        counts: real images per class.
        policy: names the nodule and the normal class, the two that can be made.
        n_synthetic: class to number added (DS3 and DS4 of the source).
        sampling_strategy: imbalanced-learn's words, over the classes that can be made: "minority", "not minority",
            "not majority" (= "auto"), "all": raise these classes to the majority's count; a number: nodule images per
            normal image afterwards; a dict: TOTAL per class afterwards; a callable from counts to such a dict.

    Returns:
        Class to number, zero numbers left out.

    Raises:
        ValueError: a word, number or class that does not fit.
    """
    if n_synthetic is not None:
        return {name: n for name, n in check_counts("n_synthetic", n_synthetic, policy).items() if n}
    if sampling_strategy is None:
        return {}
    pair = {name: int(counts.get(name, 0)) for name in (policy.normal, policy.nodule)}
    if callable(sampling_strategy):
        sampling_strategy = sampling_strategy(dict(counts))
    if isinstance(sampling_strategy, Mapping):
        totals = check_counts("sampling_strategy", sampling_strategy, policy)
        for name, total in totals.items():
            if total < pair[name]:
                raise ValueError(
                    f"sampling_strategy must not be below the real count of {name!r} ({pair[name]}), got {total}"
                )
        return {name: total - pair[name] for name, total in totals.items() if total > pair[name]}
    largest, smallest = max(pair.values()), min(pair.values())
    if isinstance(sampling_strategy, str):
        if sampling_strategy not in STRATEGIES:
            raise ValueError(
                f"sampling_strategy must be one of {STRATEGIES}, a number, a dict or a callable, "
                f"got {sampling_strategy!r}"
            )
        chosen = {
            "minority": [name for name, n in pair.items() if n == smallest][-1:],
            "not minority": [name for name, n in pair.items() if n != smallest],
        }.get(sampling_strategy, list(pair))
        return {name: largest - pair[name] for name in chosen if largest > pair[name]}
    if isinstance(sampling_strategy, bool) or not isinstance(sampling_strategy, NUMBERS):
        raise TypeError(
            f"sampling_strategy must be a word, a number, a dict or a callable, got {type(sampling_strategy).__name__}"
        )
    if not 0 < sampling_strategy <= 1:
        raise ValueError(f"sampling_strategy as a number must be in (0, 1], got {sampling_strategy}")
    wanted = round(sampling_strategy * pair[policy.normal])
    if wanted < pair[policy.nodule]:
        raise ValueError(
            f"sampling_strategy must not be below the real ratio of {policy.nodule!r} to {policy.normal!r}, "
            f"{pair[policy.nodule]} / {pair[policy.normal]}, got {sampling_strategy}"
        )
    return {policy.nodule: wanted - pair[policy.nodule]} if wanted > pair[policy.nodule] else {}


def check_counts(argument: str, counts: Any, policy: LabelPolicy) -> dict[str, int]:
    """Gives class counts under the policy's names.

    Raises:
        TypeError: no mapping.
        ValueError: a class that is unknown or cannot be made, or a number that is no count.
    """
    if not isinstance(counts, Mapping):
        raise TypeError(f"{argument} must be a dict from class to number, got {type(counts).__name__}")
    checked: dict[str, int] = {}
    for name, n in counts.items():
        spelled = makeable(argument, name, policy)
        if spelled in checked:
            raise ValueError(f"{argument} must name each class once, got {spelled!r} twice")
        checked[spelled] = _count(argument, name, n)
    return checked


def check_chances(p: Any, policy: LabelPolicy) -> dict[str, float]:
    """Gives class chances under the policy's names, from a number (all nodule) or a dict.

    Raises:
        TypeError: neither a number nor a dict of numbers.
        ValueError: a chance outside [0, 1], or more than 1 together, or an unknown class.
    """
    pairs = p.items() if isinstance(p, Mapping) else [(policy.nodule, p)]
    chances: dict[str, float] = {}
    for name, chance in pairs:
        if isinstance(chance, bool) or not isinstance(chance, NUMBERS):
            raise TypeError(f"p must be a number in [0, 1] or a dict of them, got {chance!r}")
        if not 0 <= chance <= 1:
            raise ValueError(f"p must be in [0, 1], got {chance}")
        spelled = makeable("p", name, policy)
        if spelled in chances:
            raise ValueError(f"p must name each class once, got {spelled!r} twice")
        chances[spelled] = float(chance)
    if sum(chances.values()) > 1 + 1e-9:
        raise ValueError(f"p must not exceed 1 over all classes together, got {sum(chances.values())}")
    return chances


def chances_of(p: Any, policy: LabelPolicy) -> Chances:
    """Gives class chances under the policy's names from what `SyntheticNoduleMix` takes as p.

    Args:
        p: a number, a dict, a function from the epoch to one of these, or None for no chance at all.
        policy: names the classes.

    Raises:
        TypeError: none of these.
        ValueError: a chance or class that breaks its rule; of a function, that of epoch 0 is checked here.
    """
    if p is None:
        return {}
    if not callable(p):
        return check_chances(p, policy)
    check_chances(p(0), policy)
    return Scheduled(p, policy)


@dataclass(frozen=True)
class Scheduled:
    """Chances by epoch; a class, so that spawned workers can have it.

    Attributes:
        p: from the epoch, from 0, to a chance or a dict of them.
        policy: names the classes.
    """

    p: Callable[[int], Any]
    policy: LabelPolicy

    def __call__(self, epoch: int) -> dict[str, float]:
        """Gives class to chance of an epoch."""
        return check_chances(self.p(epoch), self.policy)


def makeable(argument: str, name: Any, policy: LabelPolicy) -> str:
    """Gives the policy's spelling of a class that the generator makes, or raises ValueError naming the argument."""
    known = [policy.nodule, policy.normal]
    try:
        spelled = policy.name_of(name)
        fits = policy.can_make(spelled)
    except ValueError as error:
        raise ValueError(f"{argument} has an unknown class {name!r}: {error}") from None
    if not fits:
        raise ValueError(f"{argument} must name classes that the generator makes {known}, got {name!r}")
    return spelled


def _count(argument: str, name: Any, n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"{argument}[{name!r}] must be an integer, got {n!r}")
    if n < 0:
        raise ValueError(f"{argument}[{name!r}] must be at least 0, got {n}")
    return int(n)
