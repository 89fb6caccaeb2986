"""The mask-conditional multi-scale generator: eq. 1 and 2, Fig. 1 of Ann (2021); numbers in docs/method.md."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.generators.blocks import ImageHead, Joint, Residual, Stem, Up, soften


@dataclass(frozen=True)
class GeneratorConfig:
    """Numbers that fix one generator's architecture."""

    image_size: int = 256  # side of the last scale in pixels, 4 * 2 ** len(channels)
    noise_dim: int = 100  # length of z
    stem_channels: int = 1024  # maps of h0 at 4x4
    channels: tuple[int, ...] = (512, 256, 128, 64, 32, 16)  # maps after each doubling, from 8x8 to image_size
    residuals: tuple[int, ...] = (0, 0, 0, 2, 2, 0)  # residual blocks at each of these sizes, after a joint convolution
    branches: int = 3  # number of scales M that give an image, the last of them at image_size
    joint: bool = True  # the mask joins h0 and between branches (Ann 2021); False: at every doubling (lean presets)
    spectral_norm: bool = True  # of every layer but the norms
    soft_mask: bool = False  # the network sees the mask with a soft edge (`carim_aug.generators.blocks.soften`)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "residuals", tuple(self.residuals))
        steps = len(self.channels)
        if self.image_size != 4 * 2**steps:
            raise ValueError(f"image_size must be 4 * 2 ** len(channels) = {4 * 2**steps}, got {self.image_size}")
        if len(self.residuals) != steps:
            raise ValueError(f"residuals must have one entry per channels entry ({steps}), got {len(self.residuals)}")
        if not 1 <= self.branches <= steps:
            raise ValueError(f"branches must be in [1, {steps}], got {self.branches}")
        if self.joint and self.residuals[-1]:
            raise ValueError(f"residuals must end with 0 when joint is True, got {self.residuals}")
        if min(self.noise_dim, self.stem_channels, *self.channels) < 1 or min(self.residuals) < 0:
            raise ValueError(f"noise_dim, stem_channels and channels must be positive, residuals >= 0, got {self}")

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# One row per architecture that weights are published for.
ARCHITECTURES: dict[str, GeneratorConfig] = {
    "thesis256": GeneratorConfig(),
    "fast256": GeneratorConfig(
        256, 100, 256, (128, 128, 64, 32, 16, 8), (0, 0, 1, 1, 0, 0), 3, joint=False, soft_mask=True
    ),
    "fast128": GeneratorConfig(128, 100, 256, (128, 128, 64, 32, 16), (0, 0, 1, 1, 0), 3, joint=False, soft_mask=True),
    "tiny": GeneratorConfig(32, 16, 32, (24, 16, 8), (0, 0, 0), 2, joint=False, soft_mask=True),
}


class MultiScaleGenerator(nn.Module):
    """Noise and mask to chest X-rays at several scales; one network makes normal (empty mask) and nodule images.

    Reference: eq. 1 of Ann (2021), h_i = F_i(h_{i-1}, C_i), and eq. 2, s_i = G_i(h_i).
    """

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        config = config or GeneratorConfig()
        spectral = config.spectral_norm
        self.config, self.image_size, self.noise_dim = config, config.image_size, config.noise_dim
        self.stem = Stem(config.noise_dim, config.stem_channels, spectral=spectral)

        first_branch = len(config.channels) - config.branches
        self.ups, self.joints, self.residuals = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.heads = nn.ModuleDict()
        width = config.stem_channels
        for step, channels in enumerate(config.channels):
            at_h0 = config.joint and step == 0
            self.ups.append(Up(width + int(at_h0), channels, masked=not config.joint, spectral=spectral))
            blocks = [Residual(channels, spectral=spectral) for _ in range(config.residuals[step])]
            self.residuals.append(nn.Sequential(*blocks))
            is_branch = step >= first_branch
            if is_branch:
                self.heads[str(step)] = ImageHead(channels, spectral=spectral)
            boundary = config.joint and is_branch and step < len(config.channels) - 1
            self.joints.append(Joint(channels, spectral=spectral) if boundary else nn.Identity())
            width = channels

    def forward(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Return images (B, 1, S, S) float, [-1, 1], of the last scale.

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            masks: (B, 1, S, S) in {0, 1}, S = image_size; all zeros gives a normal image.
        """
        return self._images_at([len(self.ups) - 1], noise, masks)[0]

    def pyramid(self, noise: Tensor, masks: Tensor, *, scales: int | None = None) -> list[Tensor]:
        """Return images (B, 1, s, s) of all or the first `scales` branches: s = S / 2 ** (branches - 1), ..., S."""
        branches = self.config.branches
        scales = branches if scales is None else scales
        if not 1 <= scales <= branches:
            raise ValueError(f"scales must be in [1, {branches}], got {scales}")
        first = len(self.ups) - branches
        return self._images_at(range(first, first + scales), noise, masks)

    def _images_at(self, steps: Sequence[int], noise: Tensor, masks: Tensor) -> list[Tensor]:
        check_inputs(noise, masks, self.config)
        if self.config.soft_mask:
            masks = soften(masks)
        hidden = self.stem(noise)
        if self.config.joint:
            hidden = torch.cat([hidden, F.adaptive_avg_pool2d(masks, 4).to(hidden.dtype)], dim=1)
        images = []
        for step in range(steps[-1] + 1):
            mask = F.adaptive_avg_pool2d(masks, 8 * 2**step)
            hidden = self.ups[step](hidden, mask)
            # Ann (2021): image from h_i; then mask, joint convolution, residuals. Lean presets: residuals, then image.
            if not self.config.joint:
                hidden = self.residuals[step](hidden)
            if step in steps:
                images.append(self.heads[str(step)](hidden))
            if self.config.joint and step < steps[-1]:
                if isinstance(self.joints[step], Joint):
                    hidden = self.joints[step](hidden, mask)
                hidden = self.residuals[step](hidden)
        return images


def check_inputs(noise: Tensor, masks: Tensor, config: GeneratorConfig) -> None:
    """Raise ValueError unless noise is (B, noise_dim) and masks (B, 1, S, S) for the same B."""
    if noise.ndim != 2 or noise.shape[1] != config.noise_dim:
        raise ValueError(f"noise must be (B, {config.noise_dim}), got {tuple(noise.shape)}")
    size = config.image_size
    if tuple(masks.shape) != (noise.shape[0], 1, size, size):
        raise ValueError(f"masks must be (B, 1, {size}, {size}) with B = {noise.shape[0]}, got {tuple(masks.shape)}")
