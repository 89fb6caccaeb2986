"""A trained generator rebuilt for inference: the same function of noise and mask (METHOD 2 and 10) in fewer operations.

What changes, exactly and at no loss: spectral norm is evaluated once; batch norms are folded into the weights; nearest
up-sampling and its 3x3 convolution become one 4x4 transposed convolution of stride 2 (the first, of few positions and
many channels, four matrix products), which the mask enters as its four half-size phases; only the last image is made,
sixteen pixels of it per output position of one strided convolution.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from carim_aug.generators.blocks import Joint, soften
from carim_aug.generators.multiscale import GeneratorConfig, MultiScaleGenerator, check_inputs
from carim_aug.ops.boxes import check_masks

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


def compile_generator(
    generator: MultiScaleGenerator,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    compile: bool = False,
) -> "CompiledGenerator":
    """Gives the generator's eval-mode function as a faster module that cannot be trained; the generator stays as it is.

    Args:
        generator: a `MultiScaleGenerator` on any device, in train or eval mode.
        dtype: torch.float32 (equal to the generator to 1e-5) or torch.bfloat16 (near it, not equal).
        channels_last: keep maps with channels innermost, which convolutions run faster on.
        compile: run through `torch.compile`. The first call at each batch size (on CPUs, at each up to
            8) then takes seconds to a minute.

    Returns:
        A `CompiledGenerator` on the generator's device.

    Raises:
        TypeError: generator is no `MultiScaleGenerator`.
        ValueError: dtype is neither float32 nor bfloat16.
    """
    if not isinstance(generator, MultiScaleGenerator):
        raise TypeError(f"generator must be a MultiScaleGenerator, got {type(generator).__name__}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    with torch.no_grad():
        return CompiledGenerator(generator, dtype=dtype, channels_last=channels_last, compile=compile).eval()


class CompiledGenerator(nn.Module):
    """Noise and mask to the last scale's images, without gradients. Make one with `compile_generator`."""

    value_range: tuple[float, float] = MultiScaleGenerator.value_range
    stem_weight: Tensor
    stem_bias: Tensor
    head_weight: Tensor

    def __init__(
        self, generator: MultiScaleGenerator, *, dtype: torch.dtype, channels_last: bool, compile: bool
    ) -> None:
        """Folds the generator's weights; see `compile_generator`."""
        super().__init__()
        config = generator.config
        self.config: GeneratorConfig = config
        self.channels_last = channels_last
        self.compiles = compile
        self._compiled: Any = None
        split = 0 if compile else _SPLIT_CHANNELS[dtype]

        # The stem's rows go from (half, channel, position) to (position, half, channel): channels innermost for free.
        weight, bias = _folded(generator.stem.linear, generator.stem.norm)
        channels = config.stem_channels
        self.register_buffer("stem_weight", weight.view(2, channels, 16, -1).permute(2, 0, 1, 3).flatten(0, 2))
        self.register_buffer("stem_bias", bias.view(2, channels, 16).permute(2, 0, 1).flatten())

        ups: list[Any] = list(generator.ups)
        joints: list[Any] = list(generator.joints)
        residuals: list[Any] = list(generator.residuals)
        self.ups, self.joints, self.residuals = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for up, joint, blocks in zip(ups, joints, residuals, strict=True):
            weight, bias = _folded(up.conv, up.norm)
            kernel = _up_kernel(weight, masked=up.masked)
            first = len(self.ups) == 0
            self.ups.append(_GatedProducts(kernel, bias) if first else _Gated(kernel, bias, up=True, split=split))
            self.residuals.append(nn.Sequential(*(_Residual(block, split=split) for block in blocks)))
            if isinstance(joint, Joint):
                self.joints.append(_Gated(*_folded(joint.conv, joint.norm), up=False, split=split))
            else:
                self.joints.append(nn.Identity())

        head: Any = generator.heads[str(len(config.channels) - 1)]
        self.register_buffer("head_weight", _head_kernel(_weight(head.conv).double()))
        self.to(dtype=dtype)
        self.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.config.image_size

    @property
    def noise_dim(self) -> int:
        """Length of the noise vector z."""
        return self.config.noise_dim

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and maps; images are float32 whatever it is."""
        return self.stem_weight.dtype

    def train(self, mode: bool = True) -> "CompiledGenerator":
        """Gives the module itself, in eval mode for any `mode`: there is nothing to train."""
        return super().train(False)

    def forward(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Gives images, the same as the generator's in eval mode.

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            masks: (B, 1, S, S) in {0, 1}, S = image_size; all zeros gives a normal image.

        Returns:
            (B, 1, S, S) float32, [-1, 1], without a graph.

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
            part = _CPU_COMPILED_BATCH if noise.device.type == "cpu" else max(1, len(noise))
            parts = zip(noise.split(part), masks.split(part), strict=True)
            return torch.cat([self._compiled(z, c) for z, c in parts])

    def __getstate__(self) -> dict[str, Any]:
        """Gives what copies and pickles hold: all but the compiled code, which their first call makes again."""
        return {**self.__dict__, "_compiled": None}

    def _images(self, noise: Tensor, masks: Tensor) -> Tensor:
        # Masks of all sizes as their four half-size phases: phases[i] is (B, 4, s, s), s = 4 * 2 ** i.
        small = (soften(masks.float()) if self.config.soft_mask else masks).to(self.dtype)
        phases: list[Tensor] = []
        for _ in self.ups:
            phases.insert(0, F.pixel_unshuffle(small, 2))
            small = phases[0].mean(dim=1, keepdim=True)

        hidden = F.linear(noise.to(self.dtype), self.stem_weight, self.stem_bias)
        hidden = F.glu(hidden.unflatten(1, (4, 4, -1)), dim=3).permute(0, 3, 1, 2)
        return self._from_step(0, hidden, phases)

    def _from_step(self, step: int, hidden: Tensor, phases: list[Tensor]) -> Tensor:
        # Images from the maps that enter doubling number `step`; in parts, from where the maps are large.
        while step < len(self.ups):
            part = self._part(step, hidden)
            if part < hidden.shape[0]:
                parts = zip(hidden.split(part), *(p.split(part) for p in phases), strict=True)
                return torch.cat([self._from_step(step, h, p) for h, *p in parts])

            if not self.config.joint:
                hidden = self._joined(hidden, phases[step])
            elif step == 0:
                hidden = self._joined(hidden, phases[0].mean(dim=1, keepdim=True))
            hidden = self.ups[step](hidden)
            if step == 0 and not self.channels_last:
                hidden = hidden.contiguous()
            if isinstance(self.joints[step], _Gated):
                hidden = self.joints[step](self._joined(hidden, phases[step + 1].mean(dim=1, keepdim=True)))
            hidden = self.residuals[step](hidden)
            step += 1
        blocks = F.conv2d(hidden, self.head_weight, stride=_HEAD_BLOCK, padding=1)
        return torch.tanh(F.pixel_shuffle(blocks, _HEAD_BLOCK).float())

    def _joined(self, hidden: Tensor, mask: Tensor) -> Tensor:
        # Concatenated; of maps with channels innermost and a mask without, torch.cat would make maps without.
        if not self.channels_last:
            return torch.cat([hidden, mask], dim=1)
        return torch.cat([hidden.permute(0, 2, 3, 1), mask.permute(0, 2, 3, 1)], dim=3).permute(0, 3, 1, 2)

    def _part(self, step: int, hidden: Tensor) -> int:
        # How many images to take through this doubling at once.
        if self.compiles or hidden.device.type != "cpu":
            return hidden.shape[0]
        size = 8 * 2**step
        return max(1, _CPU_BYTES // (2 * self.config.channels[step] * size * size * hidden.element_size()))


class _Gated(nn.Module):
    """Convolution to 2C maps (a, b), then the GLU a * sigmoid(b); `up` for the transposed one that doubles the size."""

    def __init__(self, weight: Tensor, bias: Tensor, *, up: bool, split: int) -> None:
        super().__init__()
        self.up = up
        self.halves = 2 if len(bias) // 2 <= split else 1
        weights, biases = weight.chunk(self.halves, dim=1 if up else 0), bias.chunk(self.halves)
        for half in range(self.halves):
            self.register_buffer(f"weight{half}", weights[half].clone())
            self.register_buffer(f"bias{half}", biases[half].clone())

    def forward(self, hidden: Tensor) -> Tensor:
        if self.halves == 1:
            return F.glu(self._convolution(hidden, self.weight0, self.bias0), dim=1)
        gate = self._convolution(hidden, self.weight1, self.bias1).sigmoid_()
        return gate.mul_(self._convolution(hidden, self.weight0, self.bias0))

    def _convolution(self, hidden: Tensor, weight: Any, bias: Any) -> Tensor:
        if self.up:
            return F.conv_transpose2d(hidden, weight, bias, stride=2, padding=1)
        return F.conv2d(hidden, weight, bias, padding=1)


class _GatedProducts(nn.Module):
    """What `_Gated` does with `up`, as a matrix product for each phase of the result; maps with channels innermost."""

    weight: Tensor
    bias: Tensor

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        # Phase 0 of the result sees the pixel before (tap 3) and its own (tap 1), phase 1 its own (2) and the next (0).
        taps = ((3, 1), (2, 0))
        phases = [
            torch.cat([kernel[:, :, k, m] for k in tall for m in wide]).t().contiguous()
            for tall in taps
            for wide in taps
        ]
        self.register_buffer("weight", torch.stack(phases))
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.shape[2]
        padded = F.pad(hidden.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        corners = [padded[:, i : i + size + 1, j : j + size + 1] for i in (0, 1) for j in (0, 1)]
        windows = torch.cat(corners, dim=3)
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

    weight: Tensor
    bias: Tensor

    def __init__(self, block: Any, *, split: int) -> None:
        super().__init__()
        self.gated = _Gated(*_folded(block.conv1, block.norm1), up=False, split=split)
        weight, bias = _folded(block.conv2, block.norm2)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.conv2d(self.gated(hidden), self.weight, self.bias, padding=1).add_(hidden)


def _weight(layer: Any) -> Tensor:
    # A copy of the eval-mode weight of a layer that may be spectrally normalised and in train mode. In train mode,
    # reading `layer.weight` would move u and v: so the parametrisation alone is put in eval mode for the moment.
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.weight.detach().clone()
    chain = layer.parametrizations.weight
    modes = [(module, module.training) for module in chain.modules()]
    try:
        chain.eval()
        return chain().detach().clone()
    finally:
        for module, mode in modes:
            module.training = mode


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    # Weight and bias, float64, of the one layer that does what `layer` (without bias) and then the batch norm do.
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = _weight(layer).double()
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), norm.bias.double() - norm.running_mean.double() * scale


def _up_kernel(weight: Tensor, *, masked: bool) -> Tensor:
    # The transposed convolution's (in, out, 4, 4) kernel from the (out, in, 3, 3) one at the larger size. In one
    # dimension, large pixel o = 2r - 1 + k gets from small pixel r through tap k; phase p of r is large pixel 2r + p,
    # which is tap p + 2 - k of the 3-tap kernel. Nearest up-sampling makes both phases equal, so their taps add (a box
    # filter). A mask (the last input channel) is not up-sampled: each of its four phases is a channel of its own.
    taps = weight.new_zeros(2, 4, 3)
    for phase in range(2):
        for k in range(4):
            if 0 <= phase + 2 - k < 3:
                taps[phase, k, phase + 2 - k] = 1
    both = taps.sum(0)
    hidden = weight[:, :-1] if masked else weight
    kernels = [torch.einsum("oiyx,ky,lx->iokl", hidden, both, both)]
    if masked:
        kernels += [torch.einsum("oiyx,ky,lx->iokl", weight[:, -1:], tall, wide) for tall in taps for wide in taps]
    return torch.cat(kernels)


def _head_kernel(weight: Tensor) -> Tensor:
    # The (f * f, C, f + 2, f + 2) kernel that gives f x f pixels at once where the (1, C, 3, 3) one gives a pixel.
    f = _HEAD_BLOCK
    kernel = weight.new_zeros(f * f, weight.shape[1], f + 2, f + 2)
    for row in range(f):
        for column in range(f):
            kernel[row * f + column, :, row : row + 3, column : column + 3] = weight[0]
    return kernel
