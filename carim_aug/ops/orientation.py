"""The usual view: whether an image is a frontal chest X-ray with its head up and its air dark, and what it is if not.

A nodule must not be grafted where that fails: lungs are not where the prior says, or bright where lung is dark. A
network of 5,110 weights tells six classes from 32 x 32 cells. It was fitted on ChestX-ray14's train split under crops,
rotations up to 15 degrees, borders, white-outs and gamma; `weights/views.safetensors` says how.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from carim_aug.ops.sealed import read_sealed

REASONS = ("inverted", "upside down", "rotated", "transposed", "lateral or no chest")
"""What an image can be instead of the usual view, in the order of the columns of `view_chances` after the first."""

WEIGHTS = Path(__file__).parents[1] / "weights" / "views.safetensors"
_CELLS = 32
_LARGE = 256  # pixels; of larger images every second, third ... pixel is enough, and five times as fast


def usual_view(images: Tensor, *, threshold: float = 0.3, weights: Path = WEIGHTS) -> list[str | None]:
    """Return None for each image that shows the usual view, and one of `REASONS` for each that does not.

    Usual is a frontal chest, mirrored or not, head up and air dark. An image is rejected where the chance of that is
    below the threshold, and then has the reason that is likeliest: "inverted" (air bright, whatever its orientation),
    "upside down" (turned by 180 degrees, or mirrored top to bottom), "rotated" (by 90 degrees to either side),
    "transposed" (rows for columns), or "lateral or no chest" (also: a small part of a chest, a flat image, values that
    are not finite). The mirror image of a rotated chest is a transposed one: between these two, the side of the heart
    decides.

    Args:
        images: (B, 1, H, W) real numbers of any range and dtype; B may be 0.
        threshold: chance of the usual view, in [0, 1], below which an image is rejected; 0 rejects none.
        weights: file of the network, by default the bundled one.

    Raises:
        TypeError: images are not a tensor of real numbers.
        ValueError: their shape is another, the threshold is not in [0, 1], or the file is damaged.

    >>> usual_view(torch.zeros(1, 1, 256, 256))
    ['lateral or no chest']
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    chances = view_chances(images, weights=weights)
    likeliest = chances[:, 1:].argmax(1)
    return [
        REASONS[reason] if usual < threshold else None
        for usual, reason in zip(chances[:, 0].tolist(), likeliest.tolist(), strict=True)
    ]


@torch.no_grad()
def view_chances(images: Tensor, *, weights: Path = WEIGHTS) -> Tensor:
    """Return the chances of the usual view and of each of `REASONS`, (B, 6) float32; rows sum to 1.

    Arguments and errors are those of `usual_view`. A flat image, or one with values that are not finite, is "lateral or
    no chest" for certain.
    """
    if not isinstance(images, Tensor) or images.is_complex() or images.dtype == torch.bool:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of real numbers, got {kind}")
    if images.ndim != 4 or images.shape[1] != 1 or 0 in images.shape[1:]:
        raise ValueError(f"images must be (B, 1, H, W), got {tuple(images.shape)}")
    rows, columns = (max(1, side // _LARGE) for side in images.shape[2:])
    parts = images[:, :, ::rows, ::columns].split(64)
    small = torch.cat([F.interpolate(part.float(), (_CELLS, _CELLS), mode="area") for part in parts])
    mean = small.mean((1, 2, 3), keepdim=True)
    deviation = (small - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
    known = deviation.isfinite() & (deviation > 1e-5 * mean.abs())  # neither flat nor with NaN or infinity
    small = torch.where(known, (small - mean) / deviation, 0.0)

    # Three convolutions, each of 3 x 3 cells and stride 2, and a linear layer.
    with torch.autocast(images.device.type, enabled=False):
        *layers, last = _layers(weights, images.device)
        for weight, bias in layers:
            small = F.conv2d(small, weight, bias, stride=2, padding=1).relu()
        chances = F.linear(small.flatten(1), *last).softmax(1)
    nothing = F.one_hot(torch.tensor(len(REASONS), device=images.device), len(REASONS) + 1)
    return torch.where(known.view(-1, 1), chances, nothing)


@cache
def _layers(path: Path, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each layer, float32 on a device; ValueError if the file is damaged."""
    arrays, _, intact = read_sealed(path)
    if not intact:
        raise ValueError(f"{path} must be as it was written, got another digest: install carim-aug again")
    tensors = {name: torch.from_numpy(array).float().to(device) for name, array in arrays.items()}
    return [(tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(len(tensors) // 2)]
