"""DCGAN: noise to a chest X-ray of one class (Radford et al. 2016), the oldest baseline of Table 1 (METHOD 7).

It knows no class and no mask: one network is trained for each class. The source asks for 256 px; deeper stacks of the
same layers give it.
"""

import torch
from torch import Tensor, nn


def _started(layer: nn.Module) -> nn.Module:
    """The layer with the weights that the paper starts from: N(0, 0.02), batch norms N(1, 0.02)."""
    weight = layer.get_parameter("weight")
    nn.init.normal_(weight, 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0, 0.02)
    return layer


def _widths(image_size: int, width: int, most: int) -> list[int]:
    """Maps at half the image's side, a quarter, and so on to 4x4."""
    if image_size < 16 or image_size & (image_size - 1):
        raise ValueError(f"image_size must be a power of two, at least 16, got {image_size}")
    return [min(most, width * 2**step) for step in range(image_size.bit_length() - 3)]


class DCGANGenerator(nn.Module):
    """Noise to an image by transposed convolutions, batch norm and ReLU.

    Args:
        image_size: side in pixels, a power of two, at least 16.
        noise_dim: length of z.
        width: maps at half the image's side; they double with each halving of the side.
        most: but never exceed this.
    """

    def __init__(self, image_size: int = 256, *, noise_dim: int = 100, width: int = 32, most: int = 1024) -> None:
        """Makes an untrained generator."""
        super().__init__()
        widths = _widths(image_size, width, most)[::-1]
        self.image_size, self.noise_dim = image_size, noise_dim
        layers = [_started(nn.ConvTranspose2d(noise_dim, widths[0], 4, bias=False))]
        for before, after in zip(widths, [*widths[1:], 1], strict=True):
            layers += [_started(nn.BatchNorm2d(before)), nn.ReLU()]
            layers += [_started(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False))]
        self.net = nn.Sequential(*layers, nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        """Gives images (B, 1, S, S) in [-1, 1] of noise (B, noise_dim)."""
        return self.net(noise[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """An image to one logit, real above 0, by strided convolutions, batch norm and LeakyReLU.

    Args:
        image_size: side in pixels, a power of two, at least 16.
        width: maps at half the image's side.
        most: the largest number of maps.
    """

    def __init__(self, image_size: int = 256, *, width: int = 32, most: int = 1024) -> None:
        """Makes an untrained discriminator."""
        super().__init__()
        widths = _widths(image_size, width, most)
        self.image_size = image_size
        layers: list[nn.Module] = []
        for step, (before, after) in enumerate(zip([1, *widths[:-1]], widths, strict=True)):
            layers += [_started(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False))]
            layers += [_started(nn.BatchNorm2d(after))] if step else []
            layers += [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, _started(nn.Conv2d(widths[-1], 1, 4, bias=False)))

    def forward(self, images: Tensor) -> Tensor:
        """Gives logits (B,) of images (B, 1, S, S) in [-1, 1]."""
        if tuple(images.shape[1:]) != (1, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 1, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        return torch.flatten(self.net(images))
