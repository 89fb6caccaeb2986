"""Discriminators: one per scale with two heads (METHOD 3 and 10), and one for crops at the mask."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from carim_aug.generators.blocks import conv3x3, normalised


def _conv4x4(
    in_channels: int, out_channels: int, *, spectral: bool, stride: int = 2, padding: int = 1, bias: bool = False
) -> nn.Module:
    layer = nn.Conv2d(in_channels, out_channels, 4, stride, padding, bias=bias)
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return normalised(layer, spectral)


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


class ScaleDiscriminator(nn.Module):
    """Judges images of one scale: is it real, and does it fit its class (eq. 3).

    Without batch norm every convolution has a bias and the two heads have no spectral norm. A bias-free stack gives
    twice the score to twice the image, so that stronger blacks and whites look more real. And spectral norm takes the
    features' norm from 60 at the image to 3 at the heads, which at norm 1 cannot tell anything: with it, real and
    generated films both scored 0.5 +- 0.1 at 64 px, and the generator's brightness strayed.

    Args:
        image_size: side of the images in pixels, a power of two, at least 16.
        width: maps after the first convolution.
        max_channels: maps that the trunk has at 4x4. Larger images need more halvings; with `grow` the maps go on
            doubling there and 3x3 convolutions bring them back (StackGAN-v2), else they stay at max_channels.
        condition_dim: length of the class embedding that is tiled and concatenated for the conditional head.
        batch_norm: batch norm after all trunk convolutions but the first.
        grow: see `max_channels`.
        spectral_norm: spectral normalisation of all convolutions; of the heads with batch norm only.
    """

    def __init__(
        self,
        image_size: int,
        *,
        width: int = 64,
        max_channels: int = 512,
        condition_dim: int = 128,
        batch_norm: bool = True,
        grow: bool = True,
        spectral_norm: bool = True,
    ) -> None:
        """Makes an untrained discriminator."""
        super().__init__()
        if image_size < 16 or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two, at least 16, got {image_size}")
        self.image_size = image_size
        halvings, bias = image_size.bit_length() - 3, not batch_norm
        widths = [1] + [width * 2**i for i in range(halvings)]
        if not grow:
            widths = [min(w, max_channels) for w in widths]
        layers: list[nn.Module] = []
        for step, (before, after) in enumerate(pairwise(widths)):
            layers += [_conv4x4(before, after, spectral=spectral_norm, bias=bias)]
            layers += [_norm(after, batch_norm and step > 0), nn.LeakyReLU(0.2)]
        last = widths[-1]
        while last > max_channels:
            layers += [conv3x3(last, last // 2, spectral=spectral_norm, bias=bias), _norm(last // 2, batch_norm)]
            layers += [nn.LeakyReLU(0.2)]
            last //= 2
        self.trunk = nn.Sequential(*layers)

        self.embedding = nn.Embedding(2, condition_dim)
        self.joint = nn.Sequential(
            conv3x3(last + condition_dim, last, spectral=spectral_norm, bias=bias),
            _norm(last, batch_norm),
            nn.LeakyReLU(0.2),
        )
        self.conditional = _conv4x4(last, 1, spectral=spectral_norm and batch_norm, stride=4, padding=0, bias=bias)
        self.unconditional = _conv4x4(last, 1, spectral=spectral_norm and batch_norm, stride=4, padding=0, bias=bias)

    def features(self, images: Tensor) -> Tensor:
        """Gives the trunk's maps (B, C, 4, 4) of images (B, 1, S, S) in [-1, 1]."""
        if tuple(images.shape[1:]) != (1, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 1, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        return self.trunk(images)

    def judge(self, features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Gives both heads' scores from the trunk's maps, so that one trunk pass serves several conditions.

        Args:
            features: (B, C, 4, 4).
            classes: (B,) int64, 0 normal, 1 nodule (C_hat).

        Returns:
            Unconditional and conditional scores, (B,) each; 1 is what real images should get.
        """
        condition = self.embedding(classes)[:, :, None, None].expand(-1, -1, *features.shape[2:])
        joint = self.joint(torch.cat([features, condition.to(features.dtype)], dim=1))
        return self.unconditional(features).flatten(), self.conditional(joint).flatten()

    def forward(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Gives (unconditional, conditional) scores, (B,) each, of images (B, 1, S, S) and classes (B,)."""
        return self.judge(self.features(images), classes)


class CropDiscriminator(nn.Module):
    """Judges small crops at the mask: several maps (image or difference, and mask) to one score.

    Our own extension (EVIDENCE, Quality): a nodule is a few pixels of an image, so the discriminators of whole images
    hardly see it. No norm but the spectral one, so that it works with any number of crops; none at the head, for the
    reason that `ScaleDiscriminator` gives.

    Args:
        in_channels: maps of a crop.
        width: maps after the first convolution; doubles twice.
    """

    def __init__(self, in_channels: int = 2, *, width: int = 32) -> None:
        """Makes an untrained discriminator."""
        super().__init__()
        self.net = nn.Sequential(
            conv3x3(in_channels, width, spectral=True, bias=True),
            nn.LeakyReLU(0.2),
            _conv4x4(width, 2 * width, spectral=True, bias=True),
            nn.LeakyReLU(0.2),
            _conv4x4(2 * width, 4 * width, spectral=True, bias=True),
            nn.LeakyReLU(0.2),
            conv3x3(4 * width, 4 * width, spectral=True, bias=True),
            nn.LeakyReLU(0.2),
            conv3x3(4 * width, 1, spectral=False, bias=True),
        )

    def forward(self, crops: Tensor) -> Tensor:
        """Gives patch scores (B, 1, s/4, s/4) of crops (B, in_channels, s, s)."""
        return self.net(crops)
