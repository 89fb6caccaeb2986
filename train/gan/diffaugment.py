"""Differentiable augmentation of GAN batches: the same change for image and mask (Zhao et al. 2020)."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from train.common.distributed import Part

BRIGHTNESS, CONTRAST, SHIFT = 0.05, 0.1, 0.125  # largest; with a brightness of 0.3 images came out all black or white


@dataclass(frozen=True)
class DiffAugment:
    """One draw of brightness, contrast, shift, zoom and cut-out for a batch, to be applied at any scale.

    Brightness and contrast leave masks alone; geometry moves image and mask alike. No flips: left and right differ in
    a chest.
    """

    brightness: Tensor  # (B,) added, in units of the [-1, 1] image
    contrast: Tensor  # (B,) factor about the image's mean
    theta: Tensor  # (B, 2, 3) affine maps as `torch.nn.functional.affine_grid` takes them
    cutout: Tensor  # (B, 4) box (x1, y1, x2, y2) in [0, 1] that is set to 0

    @classmethod
    def draw(cls, n: int, *, generator: torch.Generator, cutout: float = 0.3) -> "DiffAugment":
        """Draw for a batch of n from a stream on the CPU; `cutout`: side of what is cut out, as a part of the side."""
        u = torch.rand((7, n), generator=generator)
        zoom = 1 + (u[2] - 0.5) * 0.2
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom
        theta[:, 0, 2] = (u[3] * 2 - 1) * 2 * SHIFT
        theta[:, 1, 2] = (u[4] * 2 - 1) * 2 * SHIFT
        x, y = u[5] * (1 + cutout) - cutout, u[6] * (1 + cutout) - cutout
        box = torch.stack([x, y, x + cutout, y + cutout], dim=1)
        return cls((u[0] * 2 - 1) * BRIGHTNESS, 1 + (u[1] * 2 - 1) * CONTRAST, theta, box)

    def to(self, device: torch.device | str) -> "DiffAugment":
        """Return the same draw on another device."""
        return DiffAugment(*(getattr(self, f.name).to(device) for f in fields(self)))

    def part(self, part: Part) -> "DiffAugment":
        """Return one process's rows of what was drawn for the whole batch."""
        return DiffAugment(*(part.halves(getattr(self, f.name)) for f in fields(self)))

    def geometry(self, images: Tensor) -> Tensor:
        """Move and cut images or masks (B, C, H, W); what comes in from outside is the border's value."""
        n, _, height, width = images.shape
        grid = F.affine_grid(self.theta, [n, 1, height, width], align_corners=False)
        moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        ys = (torch.arange(height, device=images.device) + 0.5) / height
        xs = (torch.arange(width, device=images.device) + 0.5) / width
        x1, y1, x2, y2 = self.cutout.T[:, :, None]
        inside = ((ys >= y1) & (ys < y2))[:, :, None] & ((xs >= x1) & (xs < x2))[:, None, :]
        return moved * ~inside[:, None]

    def __call__(self, images: Tensor) -> Tensor:
        """Return images (B, 1, H, W), [-1, 1] before, changed in colour and geometry; gradients pass."""
        contrast, brightness = (t[:, None, None, None] for t in (self.contrast, self.brightness))
        mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
        return self.geometry((images.float() - mean) * contrast + mean + brightness)
