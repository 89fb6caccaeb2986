"""Layers of the multi-scale networks: StackGAN-v2's blocks, a mask, spectral norm (docs/method.md, Backbone numbers).

Every block is made of one convolution, a norm and an activation, so that `carim_aug.generators.fused` can fold it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as _spectral_norm


def spectral_layer(layer: nn.Module, spectral: bool) -> nn.Module:
    """Return the layer under spectral normalisation (Miyato et al. 2018), or as it is."""
    return _spectral_norm(layer) if spectral else layer


def conv3x3(in_channels: int, out_channels: int, *, spectral: bool, bias: bool = False) -> nn.Module:
    """Return a 3x3 convolution that keeps height and width, with orthogonal weights."""
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_layer(layer, spectral)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm whose scale starts near 1 (N(1, 0.02), StackGAN-v2)."""
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight, 1.0, 0.02)
    return norm


def soften(masks: Tensor) -> Tensor:
    """Return masks (B, 1, S, S) in {0, 1} as domes in [0, 1]: 1 in the middle of each region, 0 outside.

    Our own extension: a generator that sees a hard edge draws it. The dome is the product of the mask blurred at
    S / 32, S / 16 and S / 8 pixels, each over its largest value nearby: a blur much wider than a region is flat in it
    and changes nothing, so regions of any size get a dome of their size, and boxes a roundish one.
    """
    masks = dome = masks.float()
    for part in (32, 16, 8):
        reach = masks.shape[-1] // part // 2
        blurred = masks
        for _ in range(4):  # twice along each axis
            blurred = _sum_nearby(blurred, reach).mT
        blurred = blurred * masks
        largest = _largest_nearby(_largest_nearby(blurred, reach).mT, reach).mT
        dome = dome * blurred / largest.clamp(min=1)
    return dome


def _sum_nearby(maps: Tensor, reach: int) -> Tensor:
    # The running sum along the last axis: a blur but for its scale. Sums of a mask's 0 and 1 are exact in float32.
    sums = F.pad(maps, (reach + 1, reach)).cumsum(dim=-1)
    return sums[..., 2 * reach + 1 :] - sums[..., : -2 * reach - 1]


def _largest_nearby(maps: Tensor, reach: int) -> Tensor:
    # The running maximum along the last axis, in steps that double: a tenth of max_pool2d's time on a CPU.
    maps, done = F.pad(maps, (reach, reach)), 1
    while done < 2 * reach + 1:
        step = min(done, 2 * reach + 1 - done)
        maps = torch.maximum(maps[..., :-step], maps[..., step:])
        done += step
    return maps


class Stem(nn.Module):
    """Noise (B, noise_dim) to the first hidden maps (B, channels, 4, 4): linear, batch norm, GLU."""

    def __init__(self, noise_dim: int, channels: int, *, spectral: bool) -> None:
        super().__init__()
        self.channels = channels
        linear = nn.Linear(noise_dim, channels * 2 * 16, bias=False)
        nn.init.orthogonal_(linear.weight)
        self.linear = spectral_layer(linear, spectral)
        self.norm = nn.BatchNorm1d(channels * 2 * 16)
        nn.init.normal_(self.norm.weight, 1.0, 0.02)

    def forward(self, noise: Tensor) -> Tensor:
        """Return (B, channels, 4, 4)."""
        return F.glu(self.norm(self.linear(noise)), dim=1).unflatten(1, (self.channels, 4, 4))


class Up(nn.Module):
    """Twice the size: nearest up-sampling, 3x3 convolution, batch norm, GLU.

    With `masked`, the mask at the larger size joins the convolution's input (lean presets; in Ann (2021): `Joint`).
    """

    def __init__(self, in_channels: int, out_channels: int, *, masked: bool, spectral: bool) -> None:
        super().__init__()
        self.masked = masked
        self.conv = conv3x3(in_channels + int(masked), 2 * out_channels, spectral=spectral)
        self.norm = batch_norm(2 * out_channels)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, out_channels, 2H, 2W) from (B, in_channels, H, W) and the mask (B, 1, 2H, 2W)."""
        hidden = F.interpolate(hidden, scale_factor=2, mode="nearest")
        if self.masked:
            assert mask is not None
            hidden = torch.cat([hidden, mask.to(hidden.dtype)], dim=1)
        return F.glu(self.norm(self.conv(hidden)), dim=1)


class Joint(nn.Module):
    """The mask joins the hidden maps between two branches: concatenate, 3x3 convolution, batch norm, GLU (eq. 1)."""

    def __init__(self, channels: int, *, spectral: bool) -> None:
        super().__init__()
        self.conv = conv3x3(channels + 1, 2 * channels, spectral=spectral)
        self.norm = batch_norm(2 * channels)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return (B, C, H, W) from (B, C, H, W) and the mask (B, 1, H, W)."""
        return F.glu(self.norm(self.conv(torch.cat([hidden, mask.to(hidden.dtype)], dim=1))), dim=1)


class Residual(nn.Module):
    """Hidden maps plus what two convolutions make of them: conv to 2C, norm, GLU, conv to C, norm, add."""

    def __init__(self, channels: int, *, spectral: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 2 * channels, spectral=spectral)
        self.norm1 = batch_norm(2 * channels)
        self.conv2 = conv3x3(channels, channels, spectral=spectral)
        self.norm2 = batch_norm(channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, C, H, W) from (B, C, H, W)."""
        inner = F.glu(self.norm1(self.conv1(hidden)), dim=1)
        return hidden + self.norm2(self.conv2(inner))


class ImageHead(nn.Module):
    """Hidden maps to a one-channel image in [-1, 1]: 3x3 convolution, tanh (eq. 2)."""

    def __init__(self, channels: int, *, spectral: bool) -> None:
        super().__init__()
        self.conv = conv3x3(channels, 1, spectral=spectral)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return images (B, 1, H, W), float, [-1, 1]."""
        return torch.tanh(self.conv(hidden))
