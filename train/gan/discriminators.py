"""Discriminators: one a scale with two heads (eq. 3 of Ann 2021), and one of crops at the mask."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from carim_aug.generators.blocks import conv3x3, spectral_layer


def _conv4x4(
    in_channels: int, out_channels: int, *, spectral: bool, stride: int = 2, padding: int = 1, bias: bool = False
) -> nn.Module:
    layer = nn.Conv2d(in_channels, out_channels, 4, stride, padding, bias=bias)
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_layer(layer, spectral)


def _block(layer: nn.Module, channels: int, batch_norm: bool) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(channels) if batch_norm else nn.Identity(), nn.LeakyReLU(0.2)]


Scores = tuple[Tensor, Tensor]  # unconditional and conditional, (B,) each


class ScaleDiscriminator(nn.Module):
    """Score images of one scale: is it real, and does it fit its class (eq. 3).

    Without batch norm every convolution has a bias and the two heads have no spectral norm. A bias-free stack gives
    twice the score to twice the image, so that stronger blacks and whites look more real. And spectral norm takes the
    features' norm from 60 at the image to 3 at the heads, which at norm 1 cannot tell anything: with it, real and
    generated images both scored 0.5 +- 0.1 at 64 px, and the generator's brightness strayed.
    """

    def __init__(
        self,
        image_size: int,  # side of the images in pixels, a power of two, at least 16
        *,
        width: int = 64,  # maps after the first convolution
        max_channels: int = 512,  # maps that the trunk has at 4x4
        condition_dim: int = 128,  # length of the class embedding, tiled and concatenated for the conditional head
        batch_norm: bool = True,  # after all trunk convolutions but the first
        grow: bool = True,  # maps double to 4x4, and 3x3 convolutions bring them back (StackGAN-v2); else at most max
        spectral_norm: bool = True,  # of all convolutions; of the heads with batch norm only
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two, at least 16, got {image_size}")
        self.image_size, self.batch_norm = image_size, batch_norm
        halvings, bias = image_size.bit_length() - 3, not batch_norm
        widths = [1] + [width * 2**i for i in range(halvings)]
        if not grow:
            widths = [min(w, max_channels) for w in widths]
        layers: list[nn.Module] = []
        for step, (before, after) in enumerate(pairwise(widths)):
            conv = _conv4x4(before, after, spectral=spectral_norm, bias=bias)
            layers += _block(conv, after, batch_norm and step > 0)
        last = widths[-1]
        while last > max_channels:
            layers += _block(conv3x3(last, last // 2, spectral=spectral_norm, bias=bias), last // 2, batch_norm)
            last //= 2
        self.trunk = nn.Sequential(*layers)

        self.embedding = nn.Embedding(2, condition_dim)
        joint = conv3x3(last + condition_dim, last, spectral=spectral_norm, bias=bias)
        self.joint = nn.Sequential(*_block(joint, last, batch_norm))
        self.conditional = _conv4x4(last, 1, spectral=spectral_norm and batch_norm, stride=4, padding=0, bias=bias)
        self.unconditional = _conv4x4(last, 1, spectral=spectral_norm and batch_norm, stride=4, padding=0, bias=bias)

    def features(self, images: Tensor) -> Tensor:
        """Return the trunk's maps (B, C, 4, 4) of images (B, 1, S, S) in [-1, 1]."""
        if tuple(images.shape[1:]) != (1, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 1, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        return self.trunk(images)

    def heads(self, features: Tensor, classes: Tensor) -> Scores:
        """Return both heads' scores (B,) from the trunk's maps and classes C_hat (B,): one pass serves several."""
        condition = self.embedding(classes)[:, :, None, None].expand(-1, -1, *features.shape[2:])
        joint = self.joint(torch.cat([features, condition.to(features.dtype)], dim=1))
        return self.unconditional(features).flatten(), self.conditional(joint).flatten()

    def forward(self, images: Tensor, classes: Tensor) -> Scores:
        """Return scores of images (B, 1, S, S) and classes (B,) int64, 1 nodule; 1 is what real images should get."""
        return self.heads(self.features(images), classes)

    def compare(self, real: Tensor, fake: Tensor, classes: Tensor) -> tuple[Scores, Scores, Tensor]:
        """Return scores of real and of generated images (B, 1, S, S) of the same classes, and mismatched ones (B,).

        Real, generated and mismatched images share one pass of the trunk and one of the heads, so that one backward
        serves all; with batch norm, whose statistics are of one kind of images each, only real and mismatched ones do.
        """
        n = len(real)
        if not self.batch_norm:
            maps = self.features(torch.cat([real, fake]))
            plain, fitting = self.heads(torch.cat([maps, maps[:n]]), torch.cat([classes, classes, 1 - classes]))
            (on_real, on_fake, _), (real_fits, fake_fits, mismatched) = plain.split(n), fitting.split(n)
            return (on_real, real_fits), (on_fake, fake_fits), mismatched
        maps = self.features(real)
        return self.heads(maps, classes), self(fake, classes), self.heads(maps, 1 - classes)[1]


class CropDiscriminator(nn.Module):
    """Score small crops at the mask: several maps (image or difference, and mask) to one score a patch.

    Our own extension: a nodule is a few pixels of an image, so the discriminators of whole images hardly see it. No
    norm but the spectral one, so that it works with any number of crops; none at the head, for the reason that
    `ScaleDiscriminator` gives.
    """

    def __init__(self, in_channels: int = 2, *, width: int = 32) -> None:
        super().__init__()
        layers = [conv3x3(in_channels, width, spectral=True, bias=True), nn.LeakyReLU(0.2)]
        layers += [_conv4x4(width, 2 * width, spectral=True, bias=True), nn.LeakyReLU(0.2)]
        layers += [_conv4x4(2 * width, 4 * width, spectral=True, bias=True), nn.LeakyReLU(0.2)]
        layers += [conv3x3(4 * width, 4 * width, spectral=True, bias=True), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, conv3x3(4 * width, 1, spectral=False, bias=True))

    def forward(self, crops: Tensor) -> Tensor:
        """Return patch scores (B, 1, s/4, s/4) of crops (B, in_channels, s, s)."""
        return self.net(crops)
