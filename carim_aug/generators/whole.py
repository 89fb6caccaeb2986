"""The CARIM-cGAN's generator as a source of whole images, and of grafts: the difference of twins (Fig. 6, Ann 2021)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from carim_aug.generators.base import check_device
from carim_aug.generators.fused import fuse
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator, check_inputs
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.ops.precision import compute_dtype
from carim_aug.ops.random import noise


class WholeImageGenerator(NoduleGenerator):
    """Mask and seed to a chest X-ray.

    Args:
        network: a `MultiScaleGenerator`, or an architecture to make an untrained one of: a `GeneratorConfig`, its
            numbers as a dict, or a name of `ARCHITECTURES`. It is fused at the first call on a device: when its weights
            have changed since, `configure` returns a generator that fuses them anew.
    """

    format = "carim_aug.generator"
    network: MultiScaleGenerator

    def __init__(self, network: MultiScaleGenerator | GeneratorConfig | Mapping[str, Any] | str = "fast256") -> None:
        if isinstance(network, str):
            if network not in ARCHITECTURES:
                raise ValueError(f"network must be one of {sorted(ARCHITECTURES)}, got {network!r}")
            network = ARCHITECTURES[network]
        if isinstance(network, Mapping):
            network = self.build(network)
        if isinstance(network, GeneratorConfig):
            network = MultiScaleGenerator(network)
        if not isinstance(network, MultiScaleGenerator):
            raise TypeError(f"network must be a MultiScaleGenerator, got {type(network).__name__}")
        super().__init__(network)
        self.config, self.image_size, self.noise_dim = network.config, network.image_size, network.noise_dim
        self._dtype: torch.dtype | str | None = None
        self._batch_size, self._compile = 32, False

    @staticmethod
    def build(architecture: Mapping[str, Any]) -> MultiScaleGenerator:
        """Return an untrained network of these numbers."""
        try:
            return MultiScaleGenerator(GeneratorConfig(**architecture))
        except TypeError as error:
            raise ValueError(f"architecture must hold GeneratorConfig's fields, got {architecture}: {error}") from error

    @property
    def architecture(self) -> dict[str, Any]:
        """The numbers of `config`."""
        return self.config.to_dict()

    def configure(
        self, *, dtype: torch.dtype | str | None = None, batch_size: int = 32, compile: bool = False
    ) -> "WholeImageGenerator":
        """Return the same generator with other settings of its arithmetic; the weights are shared.

        Args:
            dtype: torch.float32 (default), torch.bfloat16, or "auto": bfloat16 where the hardware has it.
            batch_size: images of one call. On CUDA, and when compiled, calls are padded to it, to be of one shape.
            compile: whether to use `torch.compile` (6 to 45 s at the first batch).
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"render_batch_size must be an integer of at least 1, got {batch_size!r}")
        compute_dtype(dtype, "cpu")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._dtype, other._batch_size, other._compile, other._fused = dtype, batch_size, compile, {}
        return other

    def images(self, masks: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return whole images; see `carim_aug.generators.base.ImageSource`."""
        return self._generate(masks, seeds, twins=False)

    def residuals(self, regions: Tensor, masks: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return G(z, C) - G(z, 0), whatever the regions; see `carim_aug.generators.base.ResidualSource`."""
        images = self._generate(masks, seeds, twins=True)
        return images[0::2] - images[1::2]

    @torch.no_grad()
    def _generate(self, masks: Tensor, seeds: Sequence[int], *, twins: bool) -> Tensor:
        noises, device = noise(seeds, self.noise_dim), masks.device
        check_inputs(noises, masks, self.config)
        if twins:  # side by side, so that both of a pair are in one call
            noises = noises.repeat_interleave(2, dim=0)
            masks = torch.stack([masks, torch.zeros_like(masks)], dim=1).flatten(0, 1)
        if device not in self._fused:
            check_device(device)
            dtype = compute_dtype(self._dtype, device)
            self._fused[device] = fuse(self.network, dtype=dtype, compile=self._compile).to(device)
        step = self._batch_size + self._batch_size % 2
        images = []
        for z, c in zip(noises.split(step), masks.split(step), strict=True):
            n = len(z)
            if n < step and (self._compile or device.type == "cuda"):
                z = torch.cat([z, z.new_zeros(step - n, z.shape[1])])
                c = torch.cat([c, c.new_zeros(step - n, *c.shape[1:])])
            images.append(self._fused[device](z.to(device, non_blocking=True), c)[:n])
        return torch.cat(images)
