"""A classifier's answer at a place: high-passed patches and the small network that looks at them, the pointing game.

Patches are high-passed, or ribs and heart border are all that a small network sees.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.ops.boxes import boxes_to_masks

PATCH = 48  # side of a patch in pixels of a 256-pixel image
SIGMA = 8.0  # standard deviation in pixels of the blur that is taken away
_REACH = 24  # pixels of the image that the blur needs on each side


def patches_at(images: Tensor, centres: Tensor) -> Tensor:
    """Return patches (B, 1, PATCH, PATCH) of images (B, 1, 256, 256) minus their blur about x, y (B, 2), or inside."""
    start = (centres - PATCH / 2).round().clamp(0, images.shape[-1] - PATCH).long()
    padded = F.pad(images, (_REACH,) * 4, mode="replicate")
    span = PATCH + 2 * _REACH
    windows = torch.stack([m[:, y : y + span, x : x + span] for m, (x, y) in zip(padded, start.tolist(), strict=True)])
    kernel = torch.exp(-0.5 * (torch.arange(-_REACH, _REACH + 1, device=images.device) / SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype)
    blurred = F.conv2d(F.conv2d(windows, kernel[None, None, :, None]), kernel[None, None, None, :])
    return windows[..., _REACH:-_REACH, _REACH:-_REACH] - blurred


class PatchNet(nn.Module):
    """Four convolutions with batch norm, then the largest response anywhere: a logit for "nodule"."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for after in (width, 2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            before = after
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (B,) of high-passed patches (B, 1, PATCH, PATCH)."""
        return self.head(self.features(patches * 4).amax(dim=(2, 3)))[:, 0]


def pointing_hit(maps: Tensor, boxes: list[Tensor]) -> Tensor:
    """Return whether each map's (B, 1, S, S) largest value lies in one of its boxes, B of (k, 4) in pixels: (B,) bool.

    Reference:
        Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016.
    """
    inside = boxes_to_masks(boxes, maps.shape[-1]).to(maps.device)
    return inside.flatten(1).gather(1, maps.flatten(1).argmax(dim=1, keepdim=True))[:, 0] > 0


def pointing_chance(boxes: list[Tensor], field: Tensor) -> Tensor:
    """Return the chance (B,) that a place drawn from a field (S, S) bool lies in an image's boxes, B of (k, 4)."""
    inside = boxes_to_masks(boxes, field.shape[-1])[:, 0] > 0
    return (inside & field.to(inside.device)).sum(dim=(1, 2)) / field.sum()
