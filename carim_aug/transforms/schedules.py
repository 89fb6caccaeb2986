"""How often nodules come in over the epochs: what `SyntheticNoduleMix` takes as p besides numbers.

Any function from the epoch, counted from 0, will do; these two are classes, so that spawned workers can have them.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class _Ramp:
    """A chance that goes from one value to another.

    Attributes:
        start: chance at epoch 0, in [0, 1].
        end: chance from epoch `epochs - 1` on.
        epochs: at least 2.
    """

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        """Checks the numbers."""
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
        """Gives the chance of an epoch."""
        return self.start + (self.end - self.start) * self._part(epoch)


class CosineSchedule(_Ramp):
    """Half a cosine from start to end: slow, fast, slow (Loshchilov and Hutter 2017, without restarts).

    >>> [round(CosineSchedule(0.0, 0.4, epochs=3)(epoch), 3) for epoch in range(4)]
    [0.0, 0.2, 0.4, 0.4]
    """

    def __call__(self, epoch: int) -> float:
        """Gives the chance of an epoch."""
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * self._part(epoch))) / 2
