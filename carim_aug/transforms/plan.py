"""What becomes of each slot of a batch: a pure function of (seed, epoch, index), without weights or GPU (DESIGN 1)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import stream
from carim_aug.transforms.amounts import NUMBERS, Chances

INSERTIONS = ("whole", "graft")


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
        entry: key of the pool's entry that the nodules come from; None without a pool.
    """

    key: tuple[int, ...]
    class_name: str | None
    noise_seed: int
    boxes: np.ndarray
    host: int
    strength: float = 1.0
    score: float = math.nan
    entry: tuple[int, ...] | None = None

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
        return self.key, self.class_name, self.noise_seed, self.boxes.tobytes(), self.host, self.strength, self.entry


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
        """B keys (seed, epoch, index, ...), enough to generate a slot again (`SyntheticNoduleMix.regenerate`).

        Of slots from a pool, the keys of its entries: `SyntheticPool.regenerate` makes them.
        """
        return [s.entry or s.key for s in self.slots]

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
