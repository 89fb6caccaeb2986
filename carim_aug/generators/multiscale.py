"""The mask-conditional multi-scale generator: METHOD 2 and 10, eq. 1 and 2 of the source, Fig. 1."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.generators.blocks import ImageHead, Joint, Residual, Stem, Up, soften


@dataclass(frozen=True)
class GeneratorConfig:
    """Numbers that fix one generator's architecture.

    Attributes:
        image_size: side of the last scale in pixels, 4 * 2 ** len(channels).
        noise_dim: length of z.
        stem_channels: maps of h0 at 4x4.
        channels: maps after each doubling, from 8x8 to image_size.
        residuals: residual blocks at each of these sizes, after the mask's joint convolution if there is one.
        branches: number of scales M that give an image, the last of them at image_size.
        joint: True: the mask is concatenated to h0 and between branches, through a joint convolution (the source);
            False: it is concatenated at every doubling (the lean presets).
        spectral_norm: spectral normalisation of every layer but the norms.
        soft_mask: the network sees the mask with a soft edge (`carim_aug.generators.blocks.soften`).
    """

    image_size: int = 256
    noise_dim: int = 100
    stem_channels: int = 1024
    channels: tuple[int, ...] = (512, 256, 128, 64, 32, 16)
    residuals: tuple[int, ...] = (0, 0, 0, 2, 2, 0)
    branches: int = 3
    joint: bool = True
    spectral_norm: bool = True
    soft_mask: bool = False

    def __post_init__(self) -> None:
        """Checks that the numbers fit together."""
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
        """Gives the numbers as plain JSON types."""
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

    Args:
        config: the architecture; see `ARCHITECTURES` for the published ones.

    Reference: eq. 1, h_i = F_i(h_{i-1}, C_i), and eq. 2, s_i = G_i(h_i).
    """

    value_range: tuple[float, float] = (-1.0, 1.0)

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        """Makes an untrained generator."""
        super().__init__()
        config = config or GeneratorConfig()
        spectral = config.spectral_norm
        self.config = config
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

    @property
    def image_size(self) -> int:
        """Side of the images of the last scale, in pixels."""
        return self.config.image_size

    @property
    def noise_dim(self) -> int:
        """Length of the noise vector z."""
        return self.config.noise_dim

    def forward(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Gives images of the last scale.

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            masks: (B, 1, S, S) in {0, 1}, S = image_size; all zeros gives a normal image.

        Returns:
            (B, 1, S, S) float, [-1, 1].
        """
        return self._scales(noise, masks, every=False, scales=self.config.branches)[-1]

    def pyramid(self, noise: Tensor, masks: Tensor, *, scales: int | None = None) -> list[Tensor]:
        """Gives images of all scales, smallest first, for training.

        Args:
            noise: (B, noise_dim) float.
            masks: (B, 1, S, S) in {0, 1}.
            scales: stop after this many branches (progressive training); all by default.

        Returns:
            A list of (B, 1, s, s) float, [-1, 1], s = S / 2 ** (branches - 1), ..., S.
        """
        scales = self.config.branches if scales is None else scales
        if not 1 <= scales <= self.config.branches:
            raise ValueError(f"scales must be in [1, {self.config.branches}], got {scales}")
        return self._scales(noise, masks, every=True, scales=scales)

    def _scales(self, noise: Tensor, masks: Tensor, *, every: bool, scales: int) -> list[Tensor]:
        check_inputs(noise, masks, self.config)
        last_step = len(self.config.channels) - 1 - (self.config.branches - scales)

        if self.config.soft_mask:
            masks = soften(masks)
        hidden = self.stem(noise)
        if self.config.joint:
            hidden = torch.cat([hidden, F.adaptive_avg_pool2d(masks, 4).to(hidden.dtype)], dim=1)
        images = []
        for step in range(last_step + 1):
            size = 8 * 2**step
            mask = F.adaptive_avg_pool2d(masks, size)
            hidden = self.ups[step](hidden, mask)
            # The source: image from h_i; then mask, joint convolution, residuals. Lean presets: residuals, then image.
            if not self.config.joint:
                hidden = self.residuals[step](hidden)
            if str(step) in self.heads and (every or step == last_step):
                images.append(self.heads[str(step)](hidden))
            if self.config.joint and step < last_step:
                if isinstance(self.joints[step], Joint):
                    hidden = self.joints[step](hidden, mask)
                hidden = self.residuals[step](hidden)
        return images


def check_inputs(noise: Tensor, masks: Tensor, config: GeneratorConfig) -> None:
    """Raises ValueError unless noise is (B, noise_dim) and masks (B, 1, S, S) for the same B."""
    if noise.ndim != 2 or noise.shape[1] != config.noise_dim:
        raise ValueError(f"noise must be (B, {config.noise_dim}), got {tuple(noise.shape)}")
    size = config.image_size
    if tuple(masks.shape) != (noise.shape[0], 1, size, size):
        raise ValueError(f"masks must be (B, 1, {size}, {size}) with B = {noise.shape[0]}, got {tuple(masks.shape)}")
