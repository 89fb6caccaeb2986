"""DCGAN (Radford et al. 2016), the oldest baseline of Table 1 of Ann (2021): a network for each class, no mask.

Ann (2021) asks for 256 px; deeper stacks of the same layers give it.
"""

from typing import Any

from torch import Tensor, nn


def _init(layer: nn.Module) -> nn.Module:
    """Start a layer as the paper does: weights N(0, 0.02), batch norms N(1, 0.02)."""
    nn.init.normal_(layer.get_parameter("weight"), 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0, 0.02)
    return layer


def _conv(kind: Any, before: int, after: int, **options: int) -> nn.Module:
    return _init(kind(before, after, 4, bias=False, **options))


def _widths(image_size: int, width: int, most: int) -> list[int]:
    """Return the maps at half the image's side, a quarter, and so on to 4x4."""
    if image_size < 16 or image_size & (image_size - 1):
        raise ValueError(f"image_size must be a power of two, at least 16, got {image_size}")
    return [min(most, width * 2**step) for step in range(image_size.bit_length() - 3)]


class DCGANGenerator(nn.Module):
    """Noise to an image by transposed convolutions, batch norm and ReLU.

    It has `width` maps at half the image's side, twice as many at a quarter, and so on to `most`.
    """

    def __init__(self, image_size: int = 256, *, noise_dim: int = 100, width: int = 32, most: int = 1024) -> None:
        super().__init__()
        widths = _widths(image_size, width, most)[::-1]
        layers = [_conv(nn.ConvTranspose2d, noise_dim, widths[0])]
        for before, after in zip(widths, [*widths[1:], 1], strict=True):
            layers += [_init(nn.BatchNorm2d(before)), nn.ReLU()]
            layers += [_conv(nn.ConvTranspose2d, before, after, stride=2, padding=1)]
        self.net = nn.Sequential(*layers, nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        """Return images (B, 1, S, S) in [-1, 1] of noise (B, noise_dim)."""
        return self.net(noise[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """An image to one logit, real above 0, by strided convolutions, batch norm and LeakyReLU."""

    def __init__(self, image_size: int = 256, *, width: int = 32, most: int = 1024) -> None:
        super().__init__()
        widths = _widths(image_size, width, most)
        self.image_size = image_size
        layers: list[nn.Module] = []
        for step, (before, after) in enumerate(zip([1, *widths[:-1]], widths, strict=True)):
            layers += [_conv(nn.Conv2d, before, after, stride=2, padding=1)]
            layers += [_init(nn.BatchNorm2d(after))] if step else []
            layers += [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, _conv(nn.Conv2d, widths[-1], 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B,) of images (B, 1, S, S) in [-1, 1]."""
        if tuple(images.shape[1:]) != (1, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 1, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        return self.net(images).flatten()
