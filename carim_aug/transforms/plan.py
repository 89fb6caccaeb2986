"""What becomes of each image: a pure function of (seed, epoch, index), without weights or GPU."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import stream
from carim_aug.transforms.amounts import Chances

NO_BOXES = np.zeros((0, 4), dtype=np.float32)
NO_BOXES.setflags(write=False)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What becomes of one image."""

    key: tuple[int, ...]  # (seed, epoch, index, ...): what everything random in it is drawn from
    class_name: str | None  # of the synthetic image; None where the real sample stays
    noise_seed: int  # of the generator's noise, 0 to 2**63 - 1
    boxes: np.ndarray  # (k, 4) float32 XYXY as parts of width and height; none for a normal image
    background: int  # place in the data set of the real sample that is replaced, or grafted into
    strength: float = 1.0  # a graft's residual is multiplied by it
    score: float = math.nan  # of the gate; NaN without one

    @property
    def synthetic(self) -> bool:
        """Whether anything in the image is generated."""
        return self.class_name is not None

    def boxes_at(self, height: int, width: int) -> Tensor:
        """Return the boxes (k, 4) float32, XYXY in pixels of an image of this size."""
        return torch.tensor(self.boxes * np.array([width, height, width, height], dtype=np.float32))

    def real(self) -> "Decision":
        """Return the decision to leave the real sample as it is."""
        return Decision(self.key, None, 0, NO_BOXES, self.background)

    # Equal decisions have equal boxes bit for bit; a gate's score decides nothing.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def _parts(self) -> tuple[Any, ...]:
        return self.key, self.class_name, self.noise_seed, self.boxes.tobytes(), self.background, self.strength


@dataclass(frozen=True)
class MixParams:
    """What was decided for one batch; `mix(images, labels, params=...)` does it again.

    `contrasts` is how much brighter each graft made its ellipses than the rings about them, in units of the [-1, 1]
    image, mean over the image's nodules; NaN where nothing was grafted.
    """

    decisions: tuple[Decision, ...]  # one for each image
    insertion: str  # "graft" or "whole"
    sizes: tuple[tuple[int, int], ...]  # height and width of each image
    weights_hash: str  # SHA-256 of the generator's tensors
    placed: bool = True  # placement and gate have looked at the images; else `transform` has them look
    contrasts: Tensor | None = field(default=None, compare=False)  # (B,) float32

    @property
    def synthetic(self) -> Tensor:
        """(B,) bool: which images hold anything generated."""
        return torch.tensor([d.synthetic for d in self.decisions], dtype=torch.bool)

    @property
    def noise_seeds(self) -> list[int]:
        """B seeds of the noise; meaningless for real images."""
        return [d.noise_seed for d in self.decisions]

    @property
    def keys(self) -> list[tuple[int, ...]]:
        """B keys (seed, epoch, index, ...), enough to generate again (`SyntheticNoduleMix.regenerate`)."""
        return [d.key for d in self.decisions]

    @property
    def gate_scores(self) -> Tensor:
        """(B,) float32 scores of the gate; NaN where it saw nothing."""
        return torch.tensor([d.score for d in self.decisions], dtype=torch.float32)

    @property
    def strengths(self) -> Tensor:
        """(B,) float32: what each graft's residual was multiplied by."""
        return torch.tensor([d.strength for d in self.decisions], dtype=torch.float32)

    @property
    def classes(self) -> list[str | None]:
        """B class names, None for real images."""
        return [d.class_name for d in self.decisions]

    @property
    def boxes(self) -> list[Tensor]:
        """B tensors (k, 4) float32: inserted boxes, XYXY in pixels of their image; (0, 4) for real and normal ones."""
        return [d.boxes_at(*size) for d, size in zip(self.decisions, self.sizes, strict=True)]

    @property
    def masks(self) -> Tensor:
        """(B, 1, H, W) float32 in {0, 1}: the inserted boxes as masks; ValueError for images of several sizes."""
        if len(set(self.sizes)) > 1:
            raise ValueError(f"images must be of one size to have masks in one tensor, got {sorted(set(self.sizes))}")
        return boxes_to_masks(self.boxes, self.sizes[0])


class Planner:
    """Decides, image by image."""

    def __init__(
        self, prior: Any, *, seed: int, nodule: str, chances: Chances, strength: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        self.prior, self.seed, self.nodule, self.strength, self.chances = prior, seed, nodule, strength, chances
        self._steps: dict[int, list[tuple[float, str]]] = {}

    @property
    def active(self) -> bool:
        """Whether any real image can be replaced, in some epoch."""
        return callable(self.chances) or bool(self.chances)

    def decide(self, key: tuple[int, ...], background: int, *, eligible: bool) -> Decision:
        """Return what becomes of a real sample, `background` its place in the data set."""
        steps = self._chance_steps(key[1]) if eligible else ()
        if steps:
            rng = stream(*key)
            u, _ = rng.random(2).tolist()
            for limit, name in steps:
                if u < limit:
                    return self._draw(key, name, background, rng)
        return Decision(key, None, 0, NO_BOXES, background)

    def add(self, key: tuple[int, ...], class_name: str, backgrounds: Sequence[int] | np.ndarray) -> Decision:
        """Return the decision of a sample that is added to the data set, from real `backgrounds` to choose from."""
        rng = stream(*key)
        _, v = rng.random(2)
        return self._draw(key, class_name, int(backgrounds[int(v * len(backgrounds))]), rng)

    def regenerate(self, key: tuple[int, ...], class_name: str, background: int = -1) -> Decision:
        """Return the synthetic decision of a key again, with no data set at hand."""
        rng = stream(*key)
        rng.random(2)
        return self._draw(key, class_name, background, rng)

    def redraw(self, decision: Decision, number: int) -> Decision:
        """Return the n-th draw of a synthetic decision: itself for 0, else that of the key (..., number)."""
        if not number:
            return decision
        return self.regenerate((*decision.key, number), str(decision.class_name), decision.background)

    def _draw(self, key: tuple[int, ...], class_name: str, background: int, rng: np.random.Generator) -> Decision:
        """Draw the noise seed first, then boxes if it is of the nodule class, then the strength."""
        noise_seed = rng.bit_generator.random_raw() >> 1  # 63 bits
        boxes = self.prior.draw(rng) if class_name == self.nodule else NO_BOXES
        low, high = self.strength
        strength = low if low == high else low + (high - low) * rng.random()
        return Decision(key, class_name, noise_seed, boxes, background, strength)

    def _chance_steps(self, epoch: int) -> list[tuple[float, str]]:
        """Return the running sums of the chances of an epoch, with their classes."""
        epoch = epoch if callable(self.chances) else 0
        if epoch not in self._steps:
            total, steps = 0.0, []
            for name, chance in (self.chances(epoch) if callable(self.chances) else self.chances).items():
                total += chance
                steps.append((total, name))
            self._steps = {epoch: steps}  # the last one only: epochs come one after the other
        return self._steps[epoch]


def check_epoch(epoch: Any) -> int:
    """Return the epoch as an int, or raise ValueError: it must be an integer in [0, 2**63 - 1]."""
    if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or not 0 <= epoch < 2**63:
        raise ValueError(f"epoch must be an integer in [0, 2**63 - 1], got {epoch!r}")
    return int(epoch)


def check_state(state: Any, seed: int) -> tuple[int, int]:
    """Return epoch and step of a saved state, or raise what is wrong with it."""
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
