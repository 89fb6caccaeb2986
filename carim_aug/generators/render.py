"""From planned slots to pixels: one call of the generator for all slots of a batch (DESIGN 1)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from carim_aug.generators.base import Generator, sees_hosts
from carim_aug.generators.fused import compile_generator
from carim_aug.generators.multiscale import MultiScaleGenerator
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import noise
from carim_aug.transforms.plan import Slot


class WorkerDeviceError(RuntimeError):
    """CUDA was asked for inside a DataLoader worker."""


class Renderer:
    """Generates the images of planned slots, on any device, in batches of one fixed size where that helps.

    Args:
        generator: trained; read, never changed. One that is no `MultiScaleGenerator` runs as it is, in its own dtype.
        device: where to generate; None: where the user's images are.
        dtype: of the generator's arithmetic, float32 or bfloat16.
        batch_size: slots of one call. On CUDA, and when compiled, a call is padded to it, so that one shape is seen.
        compile: whether to put the generator through `torch.compile` (6 to 45 s at the first batch).
    """

    def __init__(
        self,
        generator: Generator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        compile: bool = False,
    ) -> None:
        """Keeps the settings; the generator is rebuilt for inference at the first call on a device."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"render_batch_size must be an integer of at least 1, got {batch_size!r}")
        self.generator = generator
        try:
            self.device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be a torch.device or its name, got {device!r}: {error}") from None
        self.dtype = dtype or torch.float32
        self.batch_size, self.compile = batch_size, compile
        self._ready: dict[torch.device, Callable[[Tensor, Tensor], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is rebuilt."""
        return {**self.__dict__, "_ready": {}}

    @property
    def sees_hosts(self) -> bool:
        """Whether `differences` needs the films that grafts come into."""
        return sees_hosts(self.generator)

    def on(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Gives the generator rebuilt for inference on a device.

        Raises:
            WorkerDeviceError: a CUDA device inside a DataLoader worker.
            ValueError: a device that this machine does not have.
        """
        if device.type != "cpu" and get_worker_info() is not None:
            raise WorkerDeviceError(
                f"device must be 'cpu' inside a DataLoader worker, got '{device}': use mix.loader(dataset, ...) or "
                "mix(images, labels) after the loader, which generate in the main process, or "
                "SyntheticNoduleMix(device='cpu')"
            )
        if device not in self._ready:
            self.check_device(device)
            if isinstance(self.generator, MultiScaleGenerator):
                built = compile_generator(self.generator, dtype=self.dtype, compile=self.compile)
                self._ready[device] = built.to(device)
            elif isinstance(self.generator, nn.Module):
                self._ready[device] = copy.deepcopy(self.generator).to(device).eval()
            else:
                self._ready[device] = self.generator
        return self._ready[device]

    @staticmethod
    def check_device(device: torch.device) -> None:
        """Nothing, if tensors can be made on the device; ValueError otherwise."""
        try:
            torch.empty(1, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"device must be one that this machine has, got '{device}': {reason}") from error

    @torch.no_grad()
    def whole(self, slots: Sequence[Slot], device: torch.device) -> Tensor:
        """Gives the synthetic image of each slot.

        Args:
            slots: n synthetic slots.
            device: of the user's images; generated here unless the renderer has a device of its own.

        Returns:
            (n, 1, S, S) float32, [-1, 1], on `device`.
        """
        noises, masks = self._inputs(slots)
        return self._generate(noises, masks, device)

    @torch.no_grad()
    def differences(self, slots: Sequence[Slot], device: torch.device, hosts: Tensor | None = None) -> Tensor:
        """Gives G(z, C) - G(z, 0) for each slot: what the nodule changes (Fig. 6 of the source).

        Args:
            slots: n synthetic slots with boxes.
            device: as in `whole`.
            hosts: (n, 1, S, S) float, [-1, 1], the slots' own films: only a generator that `sees_hosts` needs them.

        Returns:
            (n, 1, S, S) float32, [-2, 2], on `device`.
        """
        noises, masks = self._inputs(slots)
        if self.sees_hosts:
            if hosts is None:
                raise ValueError(f"hosts must be given for grafts of a {type(self.generator).__name__}, got None")
            where = self.device or device
            ready: Any = self.on(where)
            return ready.differences(*(x.to(where) for x in (hosts, noises, masks))).to(device)
        # Twins side by side, so that both of a pair are in one call.
        pairs = torch.stack([masks, torch.zeros_like(masks)], dim=1).flatten(0, 1)
        images = self._generate(noises.repeat_interleave(2, dim=0), pairs, device)
        return images[0::2] - images[1::2]

    def _inputs(self, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
        size = self.generator.image_size
        noises = noise([s.noise_seed for s in slots], self.generator.noise_dim)
        return noises, boxes_to_masks([s.boxes_at(size, size) for s in slots], size)

    def _generate(self, noises: Tensor, masks: Tensor, device: torch.device) -> Tensor:
        where = self.device or device
        generator = self.on(where)
        step = self.batch_size + self.batch_size % 2
        images = []
        for start in range(0, len(noises), step):
            z, c = noises[start : start + step], masks[start : start + step]
            n = len(z)
            if n < step and (self.compile or where.type == "cuda"):
                z = torch.cat([z, z.new_zeros(step - n, z.shape[1])])
                c = torch.cat([c, c.new_zeros(step - n, *c.shape[1:])])
            made = generator(z.to(where, non_blocking=True), c.to(where, non_blocking=True))[:n]
            if not isinstance(self.generator, MultiScaleGenerator):
                self._check(made, n)
            images.append(made)
        return torch.cat(images).to(device)

    def _check(self, images: Tensor, n: int) -> None:
        """Nothing, if another's generator keeps to the protocol."""
        name, size = type(self.generator).__name__, self.generator.image_size
        if tuple(images.shape) != (n, 1, size, size):
            raise ValueError(f"{name} must give images ({n}, 1, {size}, {size}), got {tuple(images.shape)}")
        if not bool((images.abs() <= 1 + 1e-3).all()):
            raise ValueError(f"{name} must give images in [-1, 1], got {images.min():g} to {images.max():g}")
