"""Value ranges of a user's images, and the affine way between each and the generator's [-1, 1].

With s an image in [-1, 1], every range is ``scale * s + offset`` with one scale and one offset per channel.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.15
"""Share of the span by which images may leave their range: v2's bicubic resize overshoots up to 0.135 at a corner."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
NARROW = 0.1
"""Share of its range below which an image's values are surely those of another range, such as 12 bits in 16."""


class RangeError(ValueError):
    """A value range that is not one, or images that are not in theirs."""


@dataclass(frozen=True)
class Normalization:
    """What ``v2.Normalize(mean, std)`` does to an image in [0, 1]; a number each, or one per channel (1 or 3)."""

    mean: float | Sequence[float]
    std: float | Sequence[float]


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMED: dict[str, tuple[float, ...]] = {"auto": (), "uint8": (0.0, 255.0), "unit": (0.0, 1.0)}
NAMED |= {"uint16": (0.0, 65535.0)}
NAMED |= {"symmetric": (-1.0, 1.0), "xrv": (-1024.0, 1024.0)}


@dataclass(frozen=True)
class ValueRange:
    """The values between which a user's images lie, one pair for all channels or one per channel.

    Make one with ``ValueRange.of``. Without ends it is "auto": what the dtype says, as in torchvision's v2 (uint8:
    [0, 255]; uint16: [0, 65535]; floating point: [0, 1]). Every method raises RangeError where the channels do not fit
    the range or the dtype cannot hold it.
    """

    name: str = "auto"  # in errors
    low: tuple[float, ...] = ()  # ends (black), 1 or 3 numbers; empty for "auto"
    high: tuple[float, ...] = ()  # ends (white), as many

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or len(self.low) not in (0, 1, 3):
            raise RangeError(f"value_range must have 1 or 3 low and high ends, got low={self.low}, high={self.high}")
        for low, high in zip(self.low, self.high, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise RangeError(f"value_range must have finite ends with low < high, got ({low}, {high})")

    @classmethod
    def of(cls, spec: Any = "auto") -> "ValueRange":
        """Return the range that a user's words mean.

        They are "auto" (by dtype), "uint8" [0, 255], "uint16" [0, 65535], "unit" [0, 1], "symmetric" [-1, 1], "xrv"
        [-1024, 1024] (torchxrayvision), "imagenet" (ImageNet's mean and std taken from [0, 1]), a pair (low, high), a
        dict ``{"mean": ..., "std": ...}``, anything with a mean and a std such as ``v2.Normalize`` or a
        ``Normalization``, or a ``ValueRange``. All else is a RangeError.

        >>> ValueRange.of({"mean": 0.5, "std": 0.25}).high
        (2.0,)
        """
        if isinstance(spec, ValueRange):
            return spec
        if isinstance(spec, str):
            if spec == "imagenet":
                return _from_normalization("imagenet", IMAGENET.mean, IMAGENET.std)
            if spec not in NAMED:
                raise RangeError(f"value_range must be one of {[*NAMED, 'imagenet']} if a word, got {spec!r}")
            return cls(spec, NAMED[spec][:1], NAMED[spec][1:])
        if isinstance(spec, Mapping):
            if set(spec) != {"mean", "std"}:
                raise RangeError(f"value_range must have the keys 'mean' and 'std' if a dict, got {list(spec)}")
            return _from_normalization("mean and std", spec["mean"], spec["std"])
        if hasattr(spec, "mean") and hasattr(spec, "std") and not callable(spec.mean):
            return _from_normalization("mean and std", spec.mean, spec.std)
        if isinstance(spec, tuple | list) and len(spec) == 2:
            return cls("given", _numbers(spec[0], "low"), _numbers(spec[1], "high"))
        forms = "a word, (low, high), {'mean': ..., 'std': ...} or a Normalization"
        raise RangeError(f"value_range must be {forms}, got {spec!r} ({type(spec).__name__})")

    def resolve(self, dtype: torch.dtype) -> "ValueRange":
        """Return the range with ends that images of this dtype have; raise RangeError where they can have none."""
        if dtype not in FLOATS + INTEGERS:
            raise RangeError(f"images must be uint8, int8, uint16, int16, int32 or floating point, got {dtype}")
        if not self.low:
            if dtype not in (torch.uint8, torch.uint16, *FLOATS):
                knows = "uint8 ([0, 255]), uint16 ([0, 65535]) and floating point ([0, 1])"
                raise RangeError(f"value_range='auto' knows {knows}, got {dtype}: pass value_range=(low, high)")
            return ValueRange.of({torch.uint8: "uint8", torch.uint16: "uint16"}.get(dtype, "unit"))
        if dtype in INTEGERS:
            limits = torch.iinfo(dtype)
            for low, high in zip(self.low, self.high, strict=True):
                whole = float(low).is_integer() and float(high).is_integer()
                if not whole or low < limits.min or high > limits.max or high - low < 15:  # 16 greys show a chest
                    rule = f"whole ends from {limits.min} to {limits.max}, 15 or more apart, for {dtype} images"
                    got = f"[{low:g}, {high:g}] ({self._quote()})"
                    raise RangeError(f"value_range must have {rule}, got {got}: pass float images")
        return self

    def check(self, images: Tensor, name: str = "images") -> None:
        """Raise RangeError where images (..., C, H, W) leave the range by over ``TOLERANCE``, or are not finite.

        One pass over the images. Ends that differ between channels are taken together: lowest low to highest high. The
        error calls the images by ``name``, says what was seen and which range would fit. Images that use less than
        ``NARROW`` of their range are a warning.
        """
        resolved = self.resolve(images.dtype)
        if images.dim() >= 3:
            resolved._ends(images.shape[-3])
        low, high = min(resolved.low), max(resolved.high)
        if images.numel() == 0 or (images.dtype == torch.uint8 and low <= 0 and high >= 255):
            return
        smallest, largest = torch.stack(torch.aminmax(_wide(images.detach()))).tolist()
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise RangeError(f"{name} must be finite, got values from {smallest} to {largest}")
        slack = TOLERANCE * (high - low)
        if smallest < low - slack or largest > high + slack:
            here = f", here '{resolved.name}'" if self.name == "auto" else ""
            rule = f"lie in [{low:g}, {high:g}] (value_range={self._quote()}{here})"
            got = f"values from {smallest:g} to {largest:g}"
            raise RangeError(f"{name} must {rule}, got {got}: {_remedy(smallest, largest)}")
        if images.dim() == 4:  # the narrowest image of a batch
            each = _wide(images.detach()).flatten(1)
            lows, highs = each.amin(1).double(), each.amax(1).double()
            spreads = torch.where(highs > lows, highs - lows, math.inf)
            i = int(spreads.argmin())
            smallest, largest = float(lows[i]), float(highs[i])
        if 0 < largest - smallest < NARROW * (high - low):
            used = f"{name} use {(largest - smallest) / (high - low):.0%} of their range [{low:g}, {high:g}]"
            top = next((2**bits - 1 for bits in (8, 10, 12, 14) if largest < 2**bits), None)
            given = (0, top) if resolved.name == "uint16" and top else (f"{smallest:g}", f"{largest:g}")
            remedy = f"pass value_range=({given[0]}, {given[1]}) if these are black and white"
            warnings.warn(f"{used}, from {smallest:g} to {largest:g}: {remedy}", stacklevel=2)

    def shares(self, images: Tensor) -> list[float]:
        """Return the share of the range that each image (B, C, H, W) uses where it is below ``NARROW``, else 1.

        A graft follows it: what is added to an image of a sixteenth of its range is a sixteenth as much.
        """
        low, high = self.bounds(images.shape[1], like=images)
        if images.dtype == torch.uint8:
            return [1.0] * len(images)
        flat = _wide(images.detach()).flatten(1).double()
        shares = (flat.amax(1) - flat.amin(1)) / float((high - low).max())
        return [share if 0 < share < NARROW else 1.0 for share in shares.tolist()]

    def check_each(self, images: Tensor | Sequence[Tensor], name: str = "images") -> None:
        """Check one tensor, or each of several."""
        for one in [images] if isinstance(images, Tensor) else images:
            self.check(one, name)

    def from_symmetric(self, images: Tensor, *, channels: int, dtype: torch.dtype) -> Tensor:
        """Convert generated images (B, 1, H, W) in [-1, 1] to a user's, (B, channels, H, W) of a dtype.

        They are a new tensor, clamped to the range; integers are rounded half to even.
        """
        low, high = self.bounds(channels, like=images, dtype=dtype)
        wide = images.to(low.dtype).expand(-1, channels, -1, -1)
        moved = torch.addcmul((high + low) / 2, wide, (high - low) / 2)
        if dtype in INTEGERS:
            moved.round_()
        return moved.clamp_(low, high).to(dtype)

    def to_symmetric(self, images: Tensor) -> Tensor:
        """Convert a user's images (B, 1 or 3, H, W) to [-1, 1] in one channel, the mean of three; a new tensor.

        Values that overshoot the range overshoot [-1, 1] as much; nothing is clamped. float64 and int32 become float64,
        others float32.
        """
        low, high = self.bounds(images.shape[-3], like=images)
        plain = (images.to(low.dtype) - (high + low) / 2) / ((high - low) / 2)
        return plain.mean(dim=-3, keepdim=True) if images.shape[-3] > 1 else plain

    def scale_difference(
        self, difference: Tensor, *, channels: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Convert a difference of two generated images to the user's units: scaled, never shifted or rounded.

        Channels and dtype, by default the difference's own, are the user's images'; the result is float64 if either
        dtype is float64 or int32, else float32.
        """
        channels = difference.shape[-3] if channels is None else channels
        low, high = self.bounds(channels, like=difference, dtype=dtype)
        return difference.to(low.dtype) * ((high - low) / 2)

    def bounds(self, channels: int, *, like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the lower and upper ends, each (channels, 1, 1) on the device of ``like``, to clamp with.

        They are float64 if ``like`` or ``dtype``, that of the user's images, is float64 or int32, else float32.
        """
        dtype = like.dtype if dtype is None else dtype
        work = torch.float64 if torch.float64 in (like.dtype, dtype) or dtype == torch.int32 else torch.float32
        low, high = self.resolve(dtype)._ends(channels)
        pair = torch.tensor([low, high], dtype=work, device=like.device)
        return pair[0].view(-1, 1, 1), pair[1].view(-1, 1, 1)

    def _ends(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if channels not in (1, 3):
            raise RangeError(f"images must have 1 or 3 channels, got {channels}")
        if len(self.low) == channels:
            return self.low, self.high
        if len(self.low) != 1:
            has = f"value_range={self._quote()} has {len(self.low)} channels"
            raise RangeError(f"{has}, images have {channels}: pass one mean and one std")
        return self.low * channels, self.high * channels

    def _quote(self) -> str:
        """Return the range as a user would write it."""
        ends = ", ".join(f"{end:g}" for end in (*self.low, *self.high))
        return f"({ends})" if self.name == "given" else f"'{self.name}'"


def _wide(images: Tensor) -> Tensor:
    """Return images in a dtype that torch can compare: it cannot with uint16."""
    return images.int() if images.dtype == torch.uint16 else images


def _from_normalization(name: str, mean: Any, std: Any) -> ValueRange:
    """Return the range of an image in [0, 1] less its mean, over its std."""
    means, stds = _numbers(mean, "mean"), _numbers(std, "std")
    n = max(len(means), len(stds))
    means, stds = (v * n if len(v) == 1 else v for v in (means, stds))
    if len(means) != len(stds) or n not in (1, 3):
        raise RangeError(f"mean and std must have 1 or 3 numbers, got {mean!r} and {std!r}")
    if not all(math.isfinite(m) for m in means) or not all(math.isfinite(s) and s > 0 for s in stds):
        raise RangeError(f"mean must be finite and std finite and above 0, got mean={mean!r}, std={std!r}")
    low, high = (tuple((end - m) / s for m, s in zip(means, stds, strict=True)) for end in (0, 1))
    return ValueRange(name, low, high)


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    try:
        if hasattr(value, "tolist"):
            value = value.tolist()
        return tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)
    except (TypeError, ValueError):
        raise RangeError(f"{name} must be a number or a sequence of numbers, got {value!r}") from None


def _remedy(smallest: float, largest: float) -> str:
    """Return which range the values look like, in the words to pass."""
    for word in ("unit", "symmetric", "imagenet", "uint8", "xrv"):
        likely = ValueRange.of(word)
        if word == "xrv" and smallest > -64:  # a few standard deviations, rather
            continue
        if smallest >= min(likely.low) - 1e-2 and largest <= max(likely.high) + 1e-2:
            looks = "ImageNet-normalised" if word == "imagenet" else f"like [{likely.low[0]:g}, {likely.high[0]:g}]"
            return f"they look {looks}: pass value_range='{word}'"
    top = next((t for t in (1023, 4095, 16383, 65535) if largest <= t), None)
    if smallest >= 0 and top is not None:
        return f"they look like [0, {top}]: pass value_range=(0, {top})"
    return "pass value_range=(low, high) or {'mean': ..., 'std': ...}"
