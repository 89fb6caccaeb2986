"""Multi-scale class-conditional GAN with self-attention, after Ann et al. 2020 (docs/method.md, "Baselines").

That work is known to us by its abstract only. This is our reconstruction: the CARIM-cGAN's backbone with a class
embedding in place of the mask, and self-attention (Zhang et al. 2019) at 32x32 in generator and discriminators.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.generators.blocks import ImageHead, Residual, Stem, Up, spectral_layer
from carim_aug.generators.multiscale import GeneratorConfig
from train.gan.discriminators import ScaleDiscriminator

ATTENTION_SIDE = 32  # of the maps that attend to themselves, in pixels
CLASS_DIM = 32  # length of the class embedding, which joins the noise


class SelfAttention(nn.Module):
    """Maps plus what each of their places takes from all others, times a factor that starts at 0 and is trained.

    Reference: Zhang et al., "Self-attention generative adversarial networks", 2019.
    """

    def __init__(self, channels: int, *, spectral: bool = True) -> None:
        super().__init__()
        if channels < 8:
            raise ValueError(f"channels must be at least 8, got {channels}")

        def conv(before: int, after: int) -> nn.Module:
            layer = nn.Conv2d(before, after, 1, bias=False)
            nn.init.orthogonal_(layer.weight)
            return spectral_layer(layer, spectral)

        self.query, self.key = conv(channels, channels // 8), conv(channels, channels // 8)
        self.value, self.out = conv(channels, channels // 2), conv(channels // 2, channels)
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, C, H, W) of maps (B, C, H, W), H and W even; keys and values are pooled by 2."""
        query = self.query(maps).flatten(2).mT
        key, value = (F.max_pool2d(layer(maps), 2).flatten(2).mT for layer in (self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return maps + self.factor * self.out(attended.mT.unflatten(2, tuple(maps.shape[2:])))


class AttentionGenerator(nn.Module):
    """Noise and class to chest X-rays at several scales; of its numbers, joint and soft_mask are about masks only."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        spectral, steps = config.spectral_norm, len(config.channels)
        self.embedding = nn.Embedding(2, CLASS_DIM)
        self.stem = Stem(config.noise_dim + CLASS_DIM, config.stem_channels, spectral=spectral)
        self.steps, self.heads = nn.ModuleList(), nn.ModuleDict()
        width = config.stem_channels
        for step, channels in enumerate(config.channels):
            layers: list[nn.Module] = [Up(width, channels, masked=False, spectral=spectral)]
            layers += [Residual(channels, spectral=spectral) for _ in range(config.residuals[step])]
            if 8 * 2**step == ATTENTION_SIDE:
                layers.append(SelfAttention(channels, spectral=spectral))
            self.steps.append(nn.Sequential(*layers))
            if step >= steps - config.branches:
                self.heads[str(step)] = ImageHead(channels, spectral=spectral)
            width = channels

    def forward(self, noise: Tensor, classes: Tensor) -> list[Tensor]:
        """Return images of all scales, smallest first, (B, 1, s, s) in [-1, 1], of noise (B, D) and classes (B,)."""
        hidden = self.stem(torch.cat([noise, self.embedding(classes).to(noise.dtype)], dim=1))
        images = []
        for step, layers in enumerate(self.steps):
            hidden = layers(hidden)
            if str(step) in self.heads:
                images.append(self.heads[str(step)](hidden))
        return images


class AttentionDiscriminator(ScaleDiscriminator):
    """A scale's discriminator that attends to itself where its maps are 32x32: not at all of images below 64 px."""

    def __init__(self, image_size: int, **numbers: int | bool) -> None:
        super().__init__(image_size, **numbers)  # type: ignore[arg-type]
        layers: list[nn.Module] = []
        side, width = image_size, 1
        for layer in self.trunk:
            layers.append(layer)
            if isinstance(layer, nn.Conv2d):
                side, width = side // layer.stride[0], layer.out_channels
            if isinstance(layer, nn.LeakyReLU) and side == ATTENTION_SIDE and image_size > ATTENTION_SIDE:
                layers.append(SelfAttention(width))
        self.trunk = nn.Sequential(*layers)
