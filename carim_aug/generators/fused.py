"""A trained generator rebuilt for inference: the same function of noise and mask in fewer operations.

Exactly, at no loss: spectral norm is evaluated once, batch norms are folded, nearest up-sampling and its 3x3
convolution become one 4x4 transposed convolution of stride 2 (the first, of few positions and many channels, four
matrix products), and only the last image is made. Maps keep their channels innermost, which convolutions run faster on.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.generators.blocks import Joint, soften
from carim_aug.generators.multiscale import MultiScaleGenerator, check_inputs
from carim_aug.ops.boxes import check_masks
from carim_aug.ops.precision import compute_dtype

# Side of the block of pixels that one output position of the image head gives: 1 output channel alone wastes the
# vector units of a CPU, 16 fill them.
_HEAD_BLOCK = 4
# Eagerly, gates of at most this many channels take two convolutions, one for each half: reading every second run of a
# few channels costs more than the wider convolution saves. Inductor fuses the gate, so compiled ones take one.
_SPLIT_CHANNELS = {torch.float32: 16, torch.bfloat16: 64}
# On CPUs, batches whose widest map exceeds this are worked through in parts: the maps stay in the cache and below the
# size (32 MB) from which the allocator hands memory back to the system at each call. Compiled code takes parts of so
# many images, so that it is made for few batch sizes only.
_CPU_BYTES = 16 * 2**20
_CPU_COMPILED_BATCH = 8


def fuse(
    generator: MultiScaleGenerator, *, dtype: torch.dtype = torch.float32, compile: bool = False
) -> "FusedGenerator":
    """Return the generator's eval-mode function as a faster module that cannot be trained; it stays as it is.

    Args:
        generator: on any device, which the module shares, and in any mode.
        dtype: torch.float32 (equal to the generator to 1e-5) or torch.bfloat16 (near it, not equal).
        compile: run through `torch.compile`: seconds to a minute at each new batch size (on CPUs, each up to 8).

    Raises:
        TypeError: generator is no `MultiScaleGenerator`.
        ValueError: dtype is neither float32 nor bfloat16.
    """
    if not isinstance(generator, MultiScaleGenerator):
        raise TypeError(f"generator must be a MultiScaleGenerator, got {type(generator).__name__}")
    dtype = compute_dtype(dtype, "cpu")
    with torch.no_grad():  # of a copy in eval mode: in train mode, reading a weight under spectral norm moves u and v
        return FusedGenerator(copy.deepcopy(generator).eval(), dtype=dtype, compile=compile)


class FusedGenerator(nn.Module):
    """Noise and mask to the last scale's images, without gradients. Make one with `fuse`."""

    stem_weight: Tensor
    stem_bias: Tensor
    head_weight: Tensor
    _compiled: Any

    def __init__(self, generator: MultiScaleGenerator, *, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        config = self.config = generator.config
        self.compiles, self._compiled = compile, None
        split = 0 if compile else _SPLIT_CHANNELS[dtype]

        # The stem's rows go from (half, channel, position) to (position, half, channel): channels innermost for free.
        weight, bias = _fold(generator.stem.linear, generator.stem.norm)
        channels = config.stem_channels
        self.register_buffer("stem_weight", weight.view(2, channels, 16, -1).permute(2, 0, 1, 3).flatten(0, 2))
        self.register_buffer("stem_bias", bias.view(2, channels, 16).permute(2, 0, 1).flatten())

        self.ups, self.joints, self.residuals = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        layers: Any = zip(generator.ups, generator.joints, generator.residuals, strict=True)
        for step, (up, joint, blocks) in enumerate(layers):
            weight, bias = _fold(up.conv, up.norm)
            kernel = _up_kernel(weight, masked=up.masked)
            self.ups.append(_Gated(kernel, bias, split=split, up=True) if step else _GatedProducts(kernel, bias))
            masked = isinstance(joint, Joint)
            self.joints.append(_Gated(*_fold(joint.conv, joint.norm), split=split) if masked else nn.Identity())
            self.residuals.append(nn.Sequential(*(_Residual(block, split=split) for block in blocks)))

        # Its 3x3 kernel at each place of the block that it gives at once: (f * f, C, f + 2, f + 2).
        head: Any = generator.heads[str(len(config.channels) - 1)]
        shifts = [(x, _HEAD_BLOCK - 1 - x) for x in range(_HEAD_BLOCK)]
        kernels = [F.pad(head.conv.weight[0].double(), (*wide, *tall)) for tall in shifts for wide in shifts]
        self.register_buffer("head_weight", torch.stack(kernels))
        self.to(dtype=dtype).to(memory_format=torch.channels_last)

    def forward(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Return images as `MultiScaleGenerator.forward` does, but float32 and without a graph.

        Raises:
            ValueError: wrong shapes; on the CPU also a mask that is not binary.
        """
        check_inputs(noise, masks, self.config)
        if masks.device.type == "cpu":  # elsewhere, looking at values would wait for the device
            check_masks(masks)
        if len(noise) == 0:
            return masks.float()
        with torch.no_grad(), torch.autocast(noise.device.type, enabled=False):
            if not self.compiles:
                return self._images(noise, masks)
            if self._compiled is None:
                self._compiled = torch.compile(self._images, dynamic=False)
            part = _CPU_COMPILED_BATCH if noise.device.type == "cpu" else len(noise)
            parts = zip(noise.split(part), masks.split(part), strict=True)
            return torch.cat([self._compiled(z, c) for z, c in parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def _images(self, noise: Tensor, masks: Tensor) -> Tensor:
        # Masks of all sizes as their four half-size phases: phases[i] is (B, 4, s, s), s = 4 * 2 ** i.
        dtype = self.stem_weight.dtype
        small = (soften(masks) if self.config.soft_mask else masks).to(dtype)
        phases: list[Tensor] = []
        for _ in self.ups:
            phases.insert(0, F.pixel_unshuffle(small, 2))
            small = phases[0].mean(dim=1, keepdim=True)

        hidden = F.linear(noise.to(dtype), self.stem_weight, self.stem_bias)
        hidden = F.glu(hidden.unflatten(1, (4, 4, -1)), dim=3).permute(0, 3, 1, 2)
        return self._from_step(0, hidden, phases)

    def _from_step(self, step: int, hidden: Tensor, phases: list[Tensor]) -> Tensor:
        """Return the images that maps (B, C, s, s) end in, from a doubling on; in parts, from where maps are large."""
        while step < len(self.ups):
            bytes_each = 2 * self.config.channels[step] * (8 * 2**step) ** 2 * hidden.element_size()
            part = max(1, _CPU_BYTES // bytes_each)
            if part < len(hidden) and hidden.device.type == "cpu" and not self.compiles:
                parts = zip(hidden.split(part), *(p.split(part) for p in phases), strict=True)
                return torch.cat([self._from_step(step, h, p) for h, *p in parts])

            if not self.config.joint:
                hidden = _join(hidden, phases[step])
            elif step == 0:
                hidden = _join(hidden, phases[0].mean(dim=1, keepdim=True))
            hidden = self.ups[step](hidden)
            if isinstance(self.joints[step], _Gated):
                hidden = self.joints[step](_join(hidden, phases[step + 1].mean(dim=1, keepdim=True)))
            hidden = self.residuals[step](hidden)
            step += 1
        blocks = F.conv2d(hidden, self.head_weight, stride=_HEAD_BLOCK, padding=1)
        return torch.tanh(F.pixel_shuffle(blocks, _HEAD_BLOCK).float())


class _Convolution(nn.Module):
    """3x3, or with `up` transposed 4x4 of stride 2."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.up:
            return F.conv_transpose2d(hidden, self.weight, self.bias, stride=2, padding=1)
        return F.conv2d(hidden, self.weight, self.bias, padding=1)


class _Gated(nn.Module):
    """Convolution to 2C maps (a, b), then the GLU a * sigmoid(b)."""

    def __init__(self, weight: Tensor, bias: Tensor, *, split: int, up: bool = False) -> None:
        super().__init__()
        halves = 2 if len(bias) // 2 <= split else 1
        parts = zip(weight.chunk(halves, dim=1 if up else 0), bias.chunk(halves), strict=True)
        self.convs = nn.ModuleList(_Convolution(*part, up=up) for part in parts)

    def forward(self, hidden: Tensor) -> Tensor:
        if len(self.convs) == 1:
            return F.glu(self.convs[0](hidden), dim=1)
        gate = self.convs[1](hidden).sigmoid_()
        return gate.mul_(self.convs[0](hidden))


class _GatedProducts(_Convolution):
    """What `_Gated` does with `up`, as a matrix product for each phase of the result."""

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        # Phase 0 of the result sees the pixel before (tap 3) and its own (tap 1), phase 1 its own (2) and the next (0).
        taps = ((3, 1), (2, 0))
        phases = [torch.cat([kernel[:, :, k, m] for k in tall for m in wide]) for tall in taps for wide in taps]
        super().__init__(torch.stack(phases).mT.contiguous(), bias, up=True)

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.shape[2]
        padded = F.pad(hidden.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = torch.cat([padded[:, i : i + size + 1, j : j + size + 1] for i in (0, 1) for j in (0, 1)], dim=3)
        rows = []
        for i in (0, 1):
            columns = []
            for j in (0, 1):
                seen = windows[:, i : i + size, j : j + size].flatten(0, 2)
                maps = F.glu(F.linear(seen, self.weight[2 * i + j], self.bias), dim=1)
                columns.append(maps.view(-1, size, size, maps.shape[1]))
            rows.append(torch.stack(columns, dim=3).flatten(2, 3))
        return torch.stack(rows, dim=2).flatten(1, 2).permute(0, 3, 1, 2)


class _Residual(nn.Module):
    """`carim_aug.generators.blocks.Residual` with its norms folded."""

    def __init__(self, block: Any, *, split: int) -> None:
        super().__init__()
        self.gated = _Gated(*_fold(block.conv1, block.norm1), split=split)
        self.conv = _Convolution(*_fold(block.conv2, block.norm2))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(self.gated(hidden)).add_(hidden)


def _join(hidden: Tensor, mask: Tensor) -> Tensor:
    # With channels innermost: of maps with and a mask without, torch.cat would make maps without.
    return torch.cat([hidden.permute(0, 2, 3, 1), mask.permute(0, 2, 3, 1)], dim=3).permute(0, 3, 1, 2)


def _fold(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    # Weight and bias, float64, of the one layer that does what `layer` (without bias) and then the batch norm do.
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = layer.weight.double()
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), norm.bias.double() - norm.running_mean.double() * scale


def _up_kernel(weight: Tensor, *, masked: bool) -> Tensor:
    # The transposed convolution's (in, out, 4, 4) kernel from the (out, in, 3, 3) one at the larger size. In one
    # dimension, large pixel o = 2r - 1 + k gets from small pixel r through tap k; phase p of r is large pixel 2r + p,
    # which is tap p + 2 - k of the 3-tap kernel. Nearest up-sampling makes both phases equal, so their taps add (a box
    # filter). A mask (the last input channel) is not up-sampled: each of its four phases is a channel of its own.
    mirror = torch.eye(3, dtype=weight.dtype, device=weight.device).flip(0)
    taps = torch.stack([F.pad(mirror, (0, 0, phase, 1 - phase)) for phase in (0, 1)])
    both, hidden = taps.sum(0), weight[:, :-1] if masked else weight
    kernels = [torch.einsum("oiyx,ky,lx->iokl", hidden, both, both)]
    if masked:
        kernels += [torch.einsum("oiyx,ky,lx->iokl", weight[:, -1:], tall, wide) for tall in taps for wide in taps]
    return torch.cat(kernels)
