"""What becomes of each slot of a batch: a pure function of (seed, epoch, index), without weights or GPU (DESIGN 1)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.keys import stream
from carim_aug.labels import LabelPolicy
from carim_aug.masks import boxes_to_masks
from carim_aug.prior import LocationPrior

INSERTIONS = ("whole", "graft")
NUMBERS = (int, float, np.integer, np.floating)
STRATEGIES = ("auto", "minority", "not minority", "not majority", "all")


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One slot of a batch.

    Attributes:
        key: (seed, epoch, index, ...): what everything random in the slot is drawn from.
        class_name: the class of the synthetic image, or None where the real sample stays.
        noise_seed: of the noise vector z, 0 to 2**63 - 1.
        boxes: (k, 4) float32 XYXY as parts of the image's width and height; none for a normal image.
        host: place in the data set of the real sample that is replaced, or into which the nodule is grafted.
        strength: of a graft: its difference is multiplied by this.
        score: that the gate gave the slot; NaN without a gate.
    """

    key: tuple[int, ...]
    class_name: str | None
    noise_seed: int
    boxes: np.ndarray
    host: int
    strength: float = 1.0
    score: float = math.nan

    @property
    def synthetic(self) -> bool:
        """Whether anything in the slot is generated."""
        return self.class_name is not None

    def boxes_at(self, height: int, width: int) -> Tensor:
        """Gives the boxes (k, 4) float32, XYXY in pixels of an image of this size."""
        return torch.tensor(self.boxes * np.array([width, height, width, height], dtype=np.float32))

    def real(self) -> "Slot":
        """Gives the slot with the real sample left in it."""
        return Slot(self.key, None, 0, NO_BOXES, self.host)

    def __eq__(self, other: object) -> bool:
        """Says whether two slots are the same decision, boxes bit for bit; a gate's score is none."""
        return isinstance(other, Slot) and self._parts() == other._parts()

    def __hash__(self) -> int:
        """Gives equal numbers for equal slots."""
        return hash(self._parts())

    def _parts(self) -> tuple[Any, ...]:
        return self.key, self.class_name, self.noise_seed, self.boxes.tobytes(), self.host, self.strength


@dataclass(frozen=True)
class MixParams:
    """What was decided for one batch; `mix(images, labels, params=...)` does it again.

    Attributes:
        slots: one for each image.
        insertion: "whole" or "graft".
        size: height and width of the batch's images, in pixels.
        weights_hash: SHA-256 of the generator's tensors.
        contrasts: (B,) float32: how much brighter each graft made its ellipses than the rings about them, in units of
            the [-1, 1] image, mean over the slot's nodules; NaN where nothing was grafted.
        sizes: height and width of each image where they differ within the batch (detection).
    """

    slots: tuple[Slot, ...]
    insertion: str
    size: tuple[int, int]
    weights_hash: str
    contrasts: Tensor | None = field(default=None, compare=False)
    sizes: tuple[tuple[int, int], ...] | None = None

    @property
    def synthetic(self) -> Tensor:
        """(B,) bool: which slots hold anything generated."""
        return torch.tensor([s.synthetic for s in self.slots], dtype=torch.bool)

    @property
    def noise_seeds(self) -> list[int]:
        """B seeds of the noise vectors; meaningless for real slots."""
        return [s.noise_seed for s in self.slots]

    @property
    def keys(self) -> list[tuple[int, ...]]:
        """B keys (seed, epoch, index, ...), enough to generate a slot again (`SyntheticNoduleMix.regenerate`)."""
        return [s.key for s in self.slots]

    @property
    def gate_scores(self) -> Tensor:
        """(B,) float32 scores of the gate; NaN where it judged nothing."""
        return torch.tensor([s.score for s in self.slots], dtype=torch.float32)

    @property
    def strengths(self) -> Tensor:
        """(B,) float32: what each graft's difference was multiplied by."""
        return torch.tensor([s.strength for s in self.slots], dtype=torch.float32)

    @property
    def classes(self) -> list[str | None]:
        """B class names, None for real slots."""
        return [s.class_name for s in self.slots]

    @property
    def boxes(self) -> list[Tensor]:
        """B tensors (k, 4) float32: inserted boxes, XYXY in pixels of their image; (0, 4) for real and normal slots."""
        sizes = self.sizes or (self.size,) * len(self.slots)
        return [slot.boxes_at(*size) for slot, size in zip(self.slots, sizes, strict=True)]

    @property
    def masks(self) -> Tensor:
        """(B, 1, H, W) float32 in {0, 1}: the inserted boxes as masks.

        Raises:
            ValueError: images of several sizes.
        """
        if self.sizes is not None and len(set(self.sizes)) > 1:
            raise ValueError(f"images must be of one size to have masks in one tensor, got {sorted(set(self.sizes))}")
        return boxes_to_masks(self.boxes, self.sizes[0] if self.sizes else self.size)


NO_BOXES = np.zeros((0, 4), dtype=np.float32)
NO_BOXES.setflags(write=False)


Chances = Mapping[str, float] | Callable[[int], Mapping[str, float]]
"""Class to chance for slots that may be replaced, together at most 1; or a function of the epoch that gives such."""


class Planner:
    """Decides slots.

    Args:
        prior: where nodules are drawn.
        seed: of all decisions.
        nodule: the nodule class's name.
        chances: of each class.
        strength: least and most strength of a graft.
    """

    def __init__(
        self,
        prior: LocationPrior,
        *,
        seed: int,
        nodule: str,
        chances: Chances,
        strength: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Keeps the numbers; draws nothing."""
        self.prior, self.seed, self.nodule, self.strength = prior, seed, nodule, strength
        self.chances = chances
        self._steps: dict[int, list[tuple[float, str]]] = {}

    @property
    def active(self) -> bool:
        """Whether any real slot can be replaced, in some epoch."""
        return callable(self.chances) or bool(self.chances)

    def steps(self, epoch: int) -> list[tuple[float, str]]:
        """Gives the running sums of the chances of an epoch, with their classes."""
        epoch = epoch if callable(self.chances) else 0
        if epoch not in self._steps:
            total, steps = 0.0, []
            for name, chance in (self.chances(epoch) if callable(self.chances) else self.chances).items():
                total += chance
                steps.append((total, name))
            self._steps = {epoch: steps}  # the last one only: epochs come one after the other
        return self._steps[epoch]

    def decide(self, key: tuple[int, ...], host: int, *, eligible: bool) -> Slot:
        """Gives the fate of a real sample.

        Args:
            key: (seed, epoch, index, ...).
            host: its place in the data set.
            eligible: whether it may be replaced.
        """
        steps = self.steps(key[1]) if eligible else ()
        if steps:
            rng = stream(*key)
            u, _ = rng.random(2).tolist()
            for limit, name in steps:
                if u < limit:
                    return self.draw(key, name, host, rng)
        return Slot(key, None, 0, NO_BOXES, host)

    def add(self, key: tuple[int, ...], class_name: str, hosts: Sequence[int] | np.ndarray) -> Slot:
        """Gives a slot that is added to the data set.

        Args:
            key: (seed, epoch, index, ...).
            class_name: of the synthetic image.
            hosts: real samples to choose the host from.
        """
        rng = stream(*key)
        _, v = rng.random(2)
        host = int(hosts[int(v * len(hosts))])
        return self.draw(key, class_name, host, rng)

    def draw(self, key: tuple[int, ...], class_name: str, host: int, rng: np.random.Generator) -> Slot:
        """Gives a synthetic slot: noise seed first, then boxes if it is of the nodule class, then strength."""
        noise_seed = rng.bit_generator.random_raw() >> 1  # 63 bits
        boxes = self.prior.draw(rng) if class_name == self.nodule else NO_BOXES
        low, high = self.strength
        strength = low if low == high else low + (high - low) * rng.random()
        return Slot(key, class_name, noise_seed, boxes, host, strength)

    def regenerate(self, key: tuple[int, ...], class_name: str) -> Slot:
        """Gives the synthetic slot of a key again, with no data set at hand (host -1).

        Args:
            key: (seed, epoch, index, ...).
            class_name: of the slot.
        """
        rng = stream(*key)
        rng.random(2)
        return self.draw(key, class_name, -1, rng)


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


def check_strength(strength: Any) -> tuple[float, float]:
    """Gives least and most strength from a number or a pair of them.

    Raises:
        ValueError: not 0 < least <= most <= 4.
    """
    pair = (strength, strength) if isinstance(strength, NUMBERS) else strength
    fits = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(s, NUMBERS) for s in pair)
    if not fits or isinstance(strength, bool) or not 0 < pair[0] <= pair[1] <= 4:
        raise ValueError(f"strength must be a number in (0, 4] or (least, most), got {strength!r}")
    return float(pair[0]), float(pair[1])


def check_epoch(epoch: Any) -> int:
    """Gives the epoch as an int, or raises ValueError: it must be an integer in [0, 2**63 - 1]."""
    if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or not 0 <= epoch < 2**63:
        raise ValueError(f"epoch must be an integer in [0, 2**63 - 1], got {epoch!r}")
    return int(epoch)


def check_state(state: Any, seed: int) -> tuple[int, int]:
    """Gives epoch and step of a saved state.

    Raises:
        TypeError: no mapping.
        ValueError: no seed, epoch and step in it, or another seed.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict with seed, epoch and step, got {type(state).__name__}")
    if set(state) != {"seed", "epoch", "step"}:
        raise ValueError(f"state must have seed, epoch and step, got {sorted(map(str, state))}")
    if state["seed"] != seed:
        raise ValueError(f"state must be of this mix's seed {seed}, got {state['seed']!r}")
    step = state["step"]
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, got {step!r}")
    return check_epoch(state["epoch"]), int(step)


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
