"""Where bfloat16 pays: asked here and nowhere else.

A processor without bfloat16 instructions emulates them: a convolutional network's forward and backward pass took 12.7 s
in bfloat16 autocast on an AMD Zen 3, 1.1 s in float32. AVX-512 alone is not enough: it takes its BF16 extension or AMX.
"""

from typing import Any, NamedTuple

import torch

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
"""What networks compute in."""


class Precision(NamedTuple):
    """What "auto" comes to on a device: float32 or bfloat16, and why in a few words."""

    dtype: torch.dtype
    reason: str


def precision_of(device: torch.device | str) -> Precision:
    """Return bfloat16 where the hardware of a device has it, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision(torch.bfloat16 if has else torch.float32, f"{name} has {'' if has else 'no '}bfloat16 units")
    if device.type != "cpu":
        return Precision(torch.float32, f"not known for devices of type {device.type!r}")
    if not torch.backends.mkldnn.is_available():
        return Precision(torch.float32, "this torch has no oneDNN")
    if torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT", "NO AVX")):
        asks = {name: getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")}
        found = [name for name, ask in asks.items() if ask is not None and ask()]
    else:  # ARM and others: oneDNN knows
        found = ["bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    if found:
        return Precision(torch.bfloat16, f"the processor has {' and '.join(found)}")
    return Precision(torch.float32, "the processor would emulate bfloat16, ten times slower")


def compute_dtype(dtype: torch.dtype | str | None, device: torch.device | str) -> torch.dtype:
    """Return what a network on a device computes in: "auto" is `precision_of`, None is float32.

    Raises:
        ValueError: dtype is neither of these, nor torch.float32, torch.bfloat16 or their names.
    """
    if dtype == "auto":
        return precision_of(device).dtype
    names: dict[Any, torch.dtype] = {None: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    chosen: Any = names.get(dtype, dtype)
    if chosen not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or 'auto', got {dtype!r}")
    return chosen


def autocast(device: torch.device | str, dtype: torch.dtype | str | None = "auto") -> torch.autocast:
    """Return autocast on a device: bfloat16 where `compute_dtype` says so, else switched off."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(dtype, device) == torch.bfloat16)
