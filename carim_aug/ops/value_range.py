"""Value ranges of a user's images, and the affine way between each and the generator's [-1, 1].

DESIGN section 2 ("output follows the input"); [-1, 1] is the tanh of METHOD section 10. With s an image in [-1, 1],
every range is ``scale * s + offset`` with one scale and one offset per channel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = 0.15
"""Share of the span by which images may leave their range: v2's bicubic resize overshoots up to 0.135 at a corner."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


class RangeError(ValueError):
    """A value range that is not one, or images that are not in theirs."""


@dataclass(frozen=True)
class Normalization:
    """What ``v2.Normalize(mean, std)`` does to an image in [0, 1].

    Attributes:
        mean: a number, or one per channel (1 or 3), in units of [0, 1].
        std: the same, above 0.
    """

    mean: float | Sequence[float]
    std: float | Sequence[float]


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMED = {"uint8": (0.0, 255.0), "unit": (0.0, 1.0), "symmetric": (-1.0, 1.0), "xrv": (-1024.0, 1024.0)}


@dataclass(frozen=True)
class ValueRange:
    """The values between which a user's images lie, one pair for all channels or one per channel.

    Make one with ``ValueRange.of``. Constructed with no ends it is "auto": what the dtype says, as in torchvision's v2
    (uint8: [0, 255]; floating point: [0, 1]).

    Attributes:
        name: how it is called in errors.
        low: lower ends (black), 1 or 3 numbers; empty for "auto".
        high: upper ends (white), as many.
    """

    name: str = "auto"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the ends."""
        if len(self.low) != len(self.high) or len(self.low) not in (0, 1, 3):
            raise RangeError(f"value_range must have 1 or 3 low and high ends, got low={self.low}, high={self.high}")
        for low, high in zip(self.low, self.high, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise RangeError(f"value_range must have finite ends with low < high, got ({low}, {high})")

    @classmethod
    def of(cls, spec: Any = "auto") -> "ValueRange":
        """The range that a user's words mean.

        Args:
            spec: "auto" (by dtype), "uint8" [0, 255], "unit" [0, 1], "symmetric" [-1, 1], "xrv" [-1024, 1024]
                (torchxrayvision), "imagenet" (ImageNet's mean and std taken from [0, 1]), a pair (low, high), a dict
                ``{"mean": ..., "std": ...}``, a ``Normalization``, anything else with a mean and a std such as
                ``v2.Normalize``, or a ``ValueRange``.

        Returns:
            The range.

        Raises:
            RangeError: the words mean no range.

        >>> ValueRange.of({"mean": 0.5, "std": 0.25}).high
        (2.0,)
        """
        if isinstance(spec, ValueRange):
            return spec
        if isinstance(spec, str):
            if spec == "auto":
                return cls()
            if spec == "imagenet":
                return _normalized("imagenet", IMAGENET.mean, IMAGENET.std)
            if spec in NAMED:
                return cls(spec, (NAMED[spec][0],), (NAMED[spec][1],))
            raise RangeError(f"value_range must be one of {['auto', *NAMED, 'imagenet']} if a word, got {spec!r}")
        if isinstance(spec, Mapping):
            if set(spec) != {"mean", "std"}:
                raise RangeError(f"value_range must have the keys 'mean' and 'std' if a dict, got {list(spec)}")
            return _normalized("mean and std", spec["mean"], spec["std"])
        if hasattr(spec, "mean") and hasattr(spec, "std") and not callable(spec.mean):
            return _normalized("mean and std", spec.mean, spec.std)
        if isinstance(spec, tuple | list) and len(spec) == 2:
            low, high = _numbers(spec[0], "low"), _numbers(spec[1], "high")
            return cls("given", low, high)
        raise RangeError(
            "value_range must be a word, (low, high), {'mean': ..., 'std': ...} or a Normalization, "
            f"got {spec!r} ({type(spec).__name__})"
        )

    def resolve(self, dtype: torch.dtype) -> "ValueRange":
        """The same range with "auto" settled for images of this dtype.

        Args:
            dtype: of the user's images.

        Returns:
            A range with ends.

        Raises:
            RangeError: the dtype cannot hold the range, is none that images have here, or says nothing about a range.
        """
        if dtype not in FLOATS + INTEGERS:
            raise RangeError(f"images must be uint8, int8, int16, int32 or floating point, got {dtype}")
        if self.low:
            if dtype in INTEGERS:
                self._check_integers(dtype)
            return self
        if dtype == torch.uint8:
            return UINT8
        if dtype in FLOATS:
            return UNIT
        raise RangeError(
            f"value_range='auto' knows uint8 ([0, 255]) and floating point ([0, 1]), got {dtype}: "
            "pass value_range=(low, high)"
        )

    def check(self, images: torch.Tensor, name: str = "images") -> None:
        """Nothing if the images lie in this range, give or take 15 % of its span (``TOLERANCE``).

        One pass over the images. Ends that differ between channels are taken together: lowest low to highest high.

        Args:
            images: (..., C, H, W), any dtype that ``resolve`` takes.
            name: what the images are called in the error.

        Raises:
            RangeError: NaN, infinite or outside; it says what was seen and which range would fit.
        """
        ranged = self.resolve(images.dtype)
        if images.dim() >= 3:
            ranged._ends(images.shape[-3])
        low, high = min(ranged.low), max(ranged.high)
        if images.numel() == 0 or (images.dtype == torch.uint8 and low <= 0 and high >= 255):
            return
        smallest, largest = torch.stack(torch.aminmax(images.detach())).tolist()
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise RangeError(f"{name} must be finite, got values from {smallest} to {largest}")
        slack = TOLERANCE * (high - low)
        if smallest < low - slack or largest > high + slack:
            raise RangeError(
                f"{name} must lie in [{low:g}, {high:g}] (value_range={ranged._called(self.name)}), "
                f"got values from {smallest:g} to {largest:g}: {_remedy(smallest, largest)}"
            )

    def check_each(self, images: Any, name: str = "images") -> None:
        """As `check`, of one tensor or of each of a list of them."""
        for one in [images] if isinstance(images, torch.Tensor) else images:
            self.check(one, name)

    def from_symmetric(self, images: torch.Tensor, *, channels: int, dtype: torch.dtype) -> torch.Tensor:
        """Generated images as images of the user's.

        Args:
            images: (B, 1, H, W) float, [-1, 1].
            channels: 1 or 3.
            dtype: of the result; integer ones are rounded half to even.

        Returns:
            (B, channels, H, W), a new tensor, clamped to the range (then rounded to the dtype).

        Raises:
            RangeError: the channels do not fit the range, or the dtype cannot hold it.
        """
        ranged = self.resolve(dtype)
        low, high = ranged.bounds(channels, like=images, dtype=dtype)
        wide = images.to(low.dtype).expand(-1, channels, -1, -1)
        moved = torch.addcmul((high + low) / 2, wide, (high - low) / 2)
        if dtype in INTEGERS:
            moved.round_()
        return moved.clamp_(low, high).to(dtype)

    def to_symmetric(self, images: torch.Tensor) -> torch.Tensor:
        """A user's images as the generator's: [-1, 1] in one channel, the mean of three.

        Values that overshoot the range overshoot [-1, 1] as much; nothing is clamped.

        Args:
            images: (B, 1 or 3, H, W), in this range.

        Returns:
            (B, 1, H, W), float64 for float64 and int32 and float32 otherwise, a new tensor.

        Raises:
            RangeError: the channels do not fit the range, or the dtype cannot hold it.
        """
        ranged = self.resolve(images.dtype)
        low, high = ranged.bounds(images.shape[-3], like=images, dtype=images.dtype)
        plain = (images.to(low.dtype) - (high + low) / 2) / ((high - low) / 2)
        return plain.mean(dim=-3, keepdim=True) if images.shape[-3] > 1 else plain

    def scale_difference(
        self, difference: torch.Tensor, *, channels: int | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A difference of two generated images in the user's units: scaled per channel, never shifted or rounded.

        Args:
            difference: (B, 1 or channels, H, W) float, [-2, 2].
            channels: of the user's images, 1 or 3; the difference's own by default.
            dtype: of the user's images, which settles "auto"; the difference's own by default.

        Returns:
            (B, channels, H, W), float64 if either dtype is float64 or int32 and float32 otherwise; 0 stays 0.

        Raises:
            RangeError: the channels do not fit the range, or the dtype cannot hold it.
        """
        dtype = difference.dtype if dtype is None else dtype
        channels = difference.shape[-3] if channels is None else channels
        low, high = self.resolve(dtype).bounds(channels, like=difference, dtype=dtype)
        return difference.to(low.dtype) * ((high - low) / 2)

    def bounds(
        self, channels: int, *, like: torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The lower and upper ends per channel, to clamp with.

        Args:
            channels: 1 or 3.
            like: a tensor on the device wanted.
            dtype: of the user's images, which settles "auto"; the dtype of ``like`` by default.

        Returns:
            Low and high, each (channels, 1, 1); float64 if either dtype is float64 or int32 and float32 otherwise.

        Raises:
            RangeError: the channels do not fit the range, or the dtype cannot hold it.
        """
        dtype = like.dtype if dtype is None else dtype
        work = torch.float64 if torch.float64 in (like.dtype, dtype) or dtype == torch.int32 else torch.float32
        low, high = self.resolve(dtype)._ends(channels)
        pair = torch.tensor([low, high], dtype=work, device=like.device)
        return pair[0].view(-1, 1, 1), pair[1].view(-1, 1, 1)

    def _ends(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Low and high, ``channels`` numbers each."""
        if channels not in (1, 3):
            raise RangeError(f"images must have 1 or 3 channels, got {channels}")
        if len(self.low) == channels:
            return self.low, self.high
        if len(self.low) != 1:
            raise RangeError(
                f"value_range={self._called(self.name)} has {len(self.low)} channels, images have {channels}: "
                "pass one mean and one std"
            )
        return self.low * channels, self.high * channels

    def _check_integers(self, dtype: torch.dtype) -> None:
        """That an integer dtype can hold the range, and grey levels enough to show a chest."""
        limits = torch.iinfo(dtype)
        for low, high in zip(self.low, self.high, strict=True):
            whole = float(low).is_integer() and float(high).is_integer()
            if not whole or low < limits.min or high > limits.max or high - low < 15:
                raise RangeError(
                    f"value_range must have whole ends from {limits.min} to {limits.max}, 15 or more apart, for "
                    f"{dtype} images, got [{low:g}, {high:g}] ({self._called(self.name)}): pass float images"
                )

    def _called(self, asked: str) -> str:
        """The range as a user would write it; with what "auto" came to."""
        if asked == "auto":
            return f"'auto', here '{self.name}'" if self.low else "'auto'"
        if asked == "given":
            return f"({', '.join(f'{v:g}' for v in (*self.low, *self.high))})"
        return f"'{asked}'"


UINT8 = ValueRange.of("uint8")
UNIT = ValueRange.of("unit")


def _normalized(name: str, mean: Any, std: Any) -> ValueRange:
    """The range of an image in [0, 1] less its mean, over its std."""
    means, stds = _numbers(mean, "mean"), _numbers(std, "std")
    if len(means) != len(stds) and 1 in (len(means), len(stds)):
        means, stds = means * (len(stds) if len(means) == 1 else 1), stds * (len(means) if len(stds) == 1 else 1)
    if len(means) != len(stds) or len(means) not in (1, 3):
        raise RangeError(f"mean and std must have 1 or 3 numbers, got {mean!r} and {std!r}")
    if not all(math.isfinite(m) for m in means) or not all(math.isfinite(s) and s > 0 for s in stds):
        raise RangeError(f"mean must be finite and std finite and above 0, got mean={mean!r}, std={std!r}")
    low = tuple((0 - m) / s for m, s in zip(means, stds, strict=True))
    return ValueRange(name, low, tuple((1 - m) / s for m, s in zip(means, stds, strict=True)))


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    """One number or several as a tuple of floats."""
    try:
        if hasattr(value, "tolist"):
            value = value.tolist()
        return tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)
    except (TypeError, ValueError):
        raise RangeError(f"{name} must be a number or a sequence of numbers, got {value!r}") from None


def _remedy(smallest: float, largest: float) -> str:
    """Which range the values look like, in the words to pass."""
    for word in ("unit", "symmetric", "imagenet", "uint8", "xrv"):
        ranged = ValueRange.of(word)
        if word == "xrv" and smallest > -64:  # a few standard deviations, rather
            continue
        if smallest >= min(ranged.low) - 1e-2 and largest <= max(ranged.high) + 1e-2:
            looks = "ImageNet-normalised" if word == "imagenet" else f"[{ranged.low[0]:g}, {ranged.high[0]:g}]"
            return f"they look {'' if word == 'imagenet' else 'like '}{looks}: pass value_range='{word}'"
    if smallest >= 0 and largest <= 65535:
        top = next(t for t in (1023, 4095, 16383, 65535) if largest <= t)
        return f"they look like [0, {top}]: pass value_range=(0, {top})"
    return "pass value_range=(low, high) or {'mean': ..., 'std': ...}"
