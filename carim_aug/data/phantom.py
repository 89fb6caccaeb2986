"""A drawn, chest-like phantom for tests and the demo: never evidence for a claim about real X-rays."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from carim_aug.data.items import Items, check_choice, detection_target, targets_of
from carim_aug.ops.findings import FINDINGS

_NODULE = FINDINGS.index("Nodule")
CLASSES = {"integer": ("No Finding", "Nodule"), "multilabel": FINDINGS, "detection": ("__background__", "Nodule")}
"""What the columns or numbers of each kind of target mean."""


def phantom_chest(size: int = 256, *, nodule_box: Sequence[float] | Tensor | None = None, seed: int = 0) -> Tensor:
    """Draw a chest: body, two dark lungs with ribs, heart, spine, diaphragm, noise.

    It is (1, size, size) float32 in [0, 1], of at least 16 pixels; a soft, round, bright blob fills the box XYXY where
    one is given. The same seed without a box gives the same chest without the nodule, to the bit outside the box.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16, got {size}")
    image = _chest(size, seed)
    if nodule_box is not None:
        image = image + _blob(size, nodule_box, _random(seed, 1).uniform(0.15, 0.3))
    return torch.from_numpy(np.clip(image, 0, 1, dtype=np.float32))[None]


class PhantomChest(Items):
    """Drawn chests, (1, size, size) uint8, some with a nodule in a lung; `targets` and `labels` as of `ChestXray14`.

    Args:
        n: number of images.
        size: width and height in pixels, at least 16.
        nodule_fraction: share of the images with a nodule, rounded to whole images.
        seed: varies everything, at least 0.
        target: "integer": 1 with a nodule; "multilabel": (14,) float32 as in ChestX-ray14; "detection": `{"boxes",
            "labels"}` with XYXY pixels and label 1.
        transform: torchvision v2 transform, called with the image alone, or with (image, target) for "detection".
    """

    def __init__(
        self,
        n: int,
        *,
        size: int = 128,
        nodule_fraction: float = 0.1,
        seed: int = 0,
        target: Literal["integer", "multilabel", "detection"] = "integer",
        transform: Callable[..., Any] | None = None,
    ) -> None:
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        if size < 16:
            raise ValueError(f"size must be at least 16, got {size}")
        if not 0 <= nodule_fraction <= 1:
            raise ValueError(f"nodule_fraction must be in [0, 1], got {nodule_fraction}")
        check_choice("target", target, ("integer", "multilabel", "detection"))
        self.n, self.size, self.seed, self.target, self.transform = n, size, seed, target, transform
        chosen = _random(seed, 2).permutation(n)[: round(n * nodule_fraction)]
        self.labels = np.zeros((n, len(FINDINGS)), np.float32)
        self.labels[chosen, _NODULE] = 1
        self.targets = targets_of(self.labels, target)
        self.classes = CLASSES[target]

    def _image(self, i: int) -> tv_tensors.Image:
        box = next(iter(self.boxes(i)), None)
        chest = phantom_chest(self.size, nodule_box=box, seed=self._seed(self._position(i)))
        return tv_tensors.Image((chest * 255).round().to(torch.uint8))

    def _target(self, i: int, height: int, width: int) -> Any:
        if self.target != "detection":
            return super()._target(i, height, width)
        return detection_target(self.boxes(i), [1] * len(self.boxes(i)), height, width)

    def boxes(self, i: int) -> Tensor:
        """Return the box of the nodule, (1, 4) float32 XYXY in pixels, or (0, 4) where there is none."""
        i = self._position(i)
        if not self.labels[i, _NODULE]:
            return torch.zeros(0, 4)
        draw = _random(self._seed(i), 3)
        side = max(draw.uniform(0.05, 0.11), 3 / self.size)
        lung = _anatomy(self._seed(i))["lungs"][draw.integers(2)]
        angle, radius = draw.uniform(0, 2 * np.pi), 0.5 * np.sqrt(draw.uniform())
        x, y = lung[0] + radius * lung[2] * np.cos(angle), lung[1] + radius * lung[3] * np.sin(angle)
        width, height = side * draw.uniform(0.85, 1.15), side
        box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2], np.float32) * self.size
        return torch.from_numpy(box)[None]

    def _position(self, i: int) -> int:
        if not -self.n <= i < self.n:
            raise IndexError(f"index {i} is out of range for {self.n} images")
        return i % self.n

    def _seed(self, i: int) -> int:
        return int(np.random.SeedSequence((self.seed, i)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _random(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed, purpose)))


def _anatomy(seed: int) -> dict[str, Any]:
    """Return where the organs are: centre x, centre y, half width, half height, in parts of the image."""
    draw = _random(seed, 0)
    x, y, scale = 0.5 + draw.normal(0, 0.01), 0.5 + draw.normal(0, 0.015), draw.uniform(0.92, 1.06)
    gap, tall = draw.uniform(0.19, 0.22) * scale, draw.uniform(0.31, 0.36) * scale
    left = (x - gap, y - 0.03, draw.uniform(0.14, 0.165) * scale, tall)
    right = (x + gap, y - 0.03, draw.uniform(0.14, 0.165) * scale, tall)
    return {
        "body": (x, y + 0.1, draw.uniform(0.44, 0.5) * scale, 0.62 * scale),
        "lungs": (left, right),
        "heart": (x + 0.05 * scale, y + 0.14 * scale, draw.uniform(0.11, 0.15) * scale, 0.15 * scale),
        "spine": x,
        "diaphragm": (y + draw.uniform(0.22, 0.26) * scale, draw.uniform(0.0, 0.03)),
        "ribs": (draw.uniform(8.5, 10.5), draw.uniform(0, 1), draw.uniform(0.6, 1.0)),
        "lung_grey": draw.uniform(0.2, 0.32),
        "body_grey": draw.uniform(0.6, 0.72),
    }


def _chest(size: int, seed: int) -> np.ndarray:
    """Draw the chest without a nodule, (size, size) float32, not yet clipped."""
    organs = _anatomy(seed)
    draw = _random(seed, 4)
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x, y = axis[None, :], axis[:, None]

    # Body and lungs; the domes of the diaphragm cut the lungs off from below.
    body = _soft_ellipse(x, y, organs["body"], 0.04)
    low, uneven = organs["diaphragm"]
    lungs = np.zeros((size, size), np.float32)
    ribs = np.zeros((size, size), np.float32)
    count, phase, strength = organs["ribs"]
    for sign, lung in zip((-1, 1), organs["lungs"], strict=True):
        dome = low + sign * uneven / 2 + 1.6 * (x - lung[0]) ** 2
        inside = _soft_ellipse(x, y, lung, 0.06) * _soft_step((dome - y) / 0.015)
        lungs += inside
        # Ribs run down and outwards; a narrow crest of a cosine is a rib.
        outward = sign * (x - organs["spine"])
        wave = np.cos(2 * np.pi * (count * (y - 0.5 * outward - 1.4 * (outward - 0.12) ** 2) + phase))
        ribs += inside * np.clip(wave - 0.3, 0, None)
    image = body * organs["body_grey"] + 0.03
    image -= (organs["body_grey"] - organs["lung_grey"]) * lungs
    image += 0.12 * strength * ribs

    # Heart, spine, and vessels that fade away from the hila.
    image += 0.28 * _soft_ellipse(x, y, organs["heart"], 0.08) * lungs
    image += 0.13 * body * np.exp(-(((x - organs["spine"]) / 0.035) ** 2))
    hila = sum(
        np.exp(-(((x - organs["spine"] - sign * 0.09) / 0.05) ** 2) - ((y - lung[1]) / 0.09) ** 2)
        for sign, lung in zip((-1, 1), organs["lungs"], strict=True)
    )
    image += 0.14 * hila * lungs

    # Noise: coarse texture of the lung, fine grain of the detector.
    coarse = torch.from_numpy(draw.standard_normal((1, 1, 24, 24), dtype=np.float32))
    texture = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)[0, 0].numpy()
    image += 0.025 * texture * (0.3 + lungs)
    image += 0.012 * draw.standard_normal((size, size), dtype=np.float32)
    return image.astype(np.float32)


def _blob(size: int, box: Sequence[float] | Tensor, contrast: float) -> np.ndarray:
    """Draw a soft ellipse that reaches 0 at the box's edges, (size, size) float32."""
    x1, y1, x2, y2 = (float(value) for value in box)
    if not (0 <= x1 < x2 <= size and 0 <= y1 < y2 <= size):
        raise ValueError(f"nodule_box must be XYXY in [0, {size}] with x1 < x2 and y1 < y2, got {(x1, y1, x2, y2)}")
    axis = np.arange(size, dtype=np.float32) + 0.5
    across = (axis - (x1 + x2) / 2) / ((x2 - x1) / 2)
    down = (axis - (y1 + y2) / 2) / ((y2 - y1) / 2)
    square = across[None, :] ** 2 + down[:, None] ** 2
    return (contrast * np.clip(1 - square, 0, None)).astype(np.float32)


def _soft_ellipse(x: np.ndarray, y: np.ndarray, organ: tuple[float, float, float, float], edge: float) -> np.ndarray:
    """Return 1 inside, 0 outside, with an edge of relative width `edge`."""
    across, down = (x - organ[0]) / organ[2], (y - organ[1]) / organ[3]
    return _soft_step((1 - np.sqrt(across**2 + down**2)) / edge)


def _soft_step(value: np.ndarray) -> np.ndarray:
    return (0.5 + 0.5 * np.tanh(value)).astype(np.float32)
