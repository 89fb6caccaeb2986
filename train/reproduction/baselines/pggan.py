"""Class-conditional progressive GAN (Karras et al. 2018), the "PGGAN" of Table 1 of Ann (2021).

Both networks grow from 4x4: a new size is faded in beside the one before. Layers have an equalised learning rate, the
generator normalises each pixel's maps, the discriminator sees how much a batch varies. The class joins the noise; the
discriminator names the class beside its score (an auxiliary classifier, as in the authors' own class-conditional runs).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 2  # normal and nodule


class _Equalised(nn.Module):
    """A layer whose N(0, 1) weights are scaled by He's constant at run time."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, gain: float = math.sqrt(2)) -> None:
        super().__init__()
        nn.init.normal_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        self.layer = layer
        self.scale = gain / math.sqrt(layer.weight[0].numel())

    def forward(self, maps: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(maps, layer.weight * self.scale, layer.bias)
        return F.conv2d(maps, layer.weight * self.scale, layer.bias, padding=layer.padding)


def _conv(before: int, after: int, kernel: int = 3, *, gain: float = math.sqrt(2)) -> _Equalised:
    return _Equalised(nn.Conv2d(before, after, kernel, padding=kernel // 2), gain=gain)


def pixel_norm(maps: Tensor) -> Tensor:
    """Return maps (B, C, ...) with unit mean square over C."""
    return maps * torch.rsqrt(maps.float().square().mean(dim=1, keepdim=True) + 1e-8).to(maps.dtype)


class _Block(nn.Module):
    """Two convolutions of one size, each with LeakyReLU and, in the generator, the pixel norm."""

    def __init__(self, before: int, between: int, after: int, *, norm: bool) -> None:
        super().__init__()
        self.first, self.second, self.norm = _conv(before, between), _conv(between, after), norm

    def forward(self, maps: Tensor) -> Tensor:
        for conv in (self.first, self.second):
            maps = F.leaky_relu(conv(maps), 0.2)
            maps = pixel_norm(maps) if self.norm else maps
        return maps


def batch_deviation(maps: Tensor) -> Tensor:
    """Return maps (B, C + 1, H, W): the last is the standard deviation over the batch, mean over maps and pixels."""
    deviation = (maps.float().var(dim=0, unbiased=False) + 1e-8).sqrt().mean().to(maps.dtype)
    return torch.cat([maps, deviation.expand(len(maps), 1, *maps.shape[2:])], dim=1)


def _widths(image_size: int, width: int, most: int) -> list[int]:
    """Return the maps at 4x4, 8x8 and so on to the image's side."""
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(f"image_size must be a power of two, at least 8, got {image_size}")
    steps = image_size.bit_length() - 2
    return [min(most, width * 2 ** (steps - 1 - step)) for step in range(steps)]


class ProgressiveGenerator(nn.Module):
    """Noise and class to an image, at the size that training has come to.

    It has `width` maps at the final size, twice as many at half of it, and so on to `most`.
    """

    def __init__(self, image_size: int = 256, *, noise_dim: int = 100, width: int = 16, most: int = 512) -> None:
        super().__init__()
        widths = _widths(image_size, width, most)
        self.stem = _Equalised(nn.Linear(noise_dim + CLASSES, widths[0] * 16), gain=math.sqrt(2) / 4)
        self.first = _conv(widths[0], widths[0])
        self.blocks = nn.ModuleList(_Block(before, after, after, norm=True) for before, after in pairwise(widths))
        self.heads = nn.ModuleList(_conv(w, 1, 1, gain=1.0) for w in widths)

    def forward(self, noise: Tensor, classes: Tensor, *, step: int | None = None, alpha: float = 1.0) -> Tensor:
        """Return images (B, 1, s, s) in about [-1, 1], s = 4 * 2 ** step, the final one by default.

        The newest size is faded in as far as alpha, in [0, 1], of noise (B, noise_dim) and classes (B,) int64.
        """
        step = len(self.blocks) if step is None else step
        if not 0 <= step <= len(self.blocks):
            raise ValueError(f"step must be in [0, {len(self.blocks)}], got {step}")
        both = torch.cat([pixel_norm(noise), F.one_hot(classes, CLASSES).to(noise.dtype)], dim=1)
        hidden = pixel_norm(F.leaky_relu(self.stem(both), 0.2).unflatten(1, (-1, 4, 4)))
        before = hidden = pixel_norm(F.leaky_relu(self.first(hidden), 0.2))
        for block in self.blocks[:step]:
            before = hidden
            hidden = block(F.interpolate(hidden, scale_factor=2, mode="nearest"))
        image = self.heads[step](hidden)
        if step and alpha < 1:
            coarse = F.interpolate(self.heads[step - 1](before), scale_factor=2, mode="nearest")
            image = coarse + alpha * (image - coarse)
        return image


class ProgressiveDiscriminator(nn.Module):
    """An image at the size that training has come to, to a score and class logits."""

    def __init__(self, image_size: int = 256, *, width: int = 16, most: int = 512) -> None:
        super().__init__()
        widths = _widths(image_size, width, most)
        self.image_size = image_size
        self.entries = nn.ModuleList(_conv(1, w, 1) for w in widths)
        self.blocks = nn.ModuleList(_Block(after, after, before, norm=False) for before, after in pairwise(widths))
        self.last = _conv(widths[0] + 1, widths[0])
        self.flat = _Equalised(nn.Linear(widths[0] * 16, widths[0]))
        self.head = _Equalised(nn.Linear(widths[0], 1 + CLASSES), gain=1.0)

    def forward(self, images: Tensor, *, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return scores (B,) and class logits (B, 2) of images (B, 1, s, s), s = 4, 8, ..., image_size."""
        side = images.shape[-1]
        if tuple(images.shape[1:]) != (1, side, side) or side & (side - 1) or not 4 <= side <= self.image_size:
            raise ValueError(f"images must be (B, 1, s, s), s = 4, 8, .., {self.image_size}, got {tuple(images.shape)}")
        step = side.bit_length() - 3
        hidden = F.leaky_relu(self.entries[step](images), 0.2)
        for place in range(step - 1, -1, -1):
            hidden = F.avg_pool2d(self.blocks[place](hidden), 2)
            if place == step - 1 and alpha < 1:
                coarse = F.leaky_relu(self.entries[step - 1](F.avg_pool2d(images, 2)), 0.2)
                hidden = coarse + alpha * (hidden - coarse)
        hidden = F.leaky_relu(self.last(batch_deviation(hidden)), 0.2)
        scores = self.head(F.leaky_relu(self.flat(hidden.flatten(1)), 0.2)).float()
        return scores[:, 0], scores[:, 1:]
