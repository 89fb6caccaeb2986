"""Devices of one training, and which part of a batch is whose: one GPU, several, several nodes, or the CPU."""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor

from carim_aug.ops.precision import compute_dtype
from train.common.run import RunError

# bfloat16 where the hardware has it, bfloat16 where autocast finds it safe, float32 throughout
PRECISIONS: tuple[str, ...] = ("auto", "bf16-mixed", "32-true")

Value = TypeVar("Value")


def launch(
    device: str = "cpu", *, devices: int = 1, nodes: int = 1, precision: str = "auto", unused: bool = False
) -> Fabric:
    """Return Fabric with its processes running, `devices` on each node, each in the caller's program from the start.

    Every node is given the same command by its launcher (torchrun or SLURM). With `unused`, some parameters have no
    gradient in some steps.
    """
    options: dict[str, Any] = {"precision": resolve_precision(precision, device, devices)}
    if devices * nodes > 1:
        options["strategy"] = DDPStrategy(find_unused_parameters=unused)
    fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, **options)
    fabric.launch()
    return fabric


def resolve_precision(precision: str, device: str, devices: int = 1) -> str:
    """Return what one of `PRECISIONS` comes to on a device, "bf16-mixed" or "32-true"; RunError without the devices."""
    if device not in ("cpu", "cuda"):
        raise RunError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and torch.cuda.device_count() < devices:
        raise RunError(f"devices must be at most the {torch.cuda.device_count()} CUDA devices here, got {devices}")
    if precision not in PRECISIONS:
        raise RunError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if precision != "auto":
        return precision
    return "bf16-mixed" if compute_dtype("auto", device) == torch.bfloat16 else "32-true"


def broadcast(fabric: Fabric | None, value: Value) -> Value:
    """Return the first process's value in all of them."""
    return fabric.broadcast(value) if fabric is not None and fabric.world_size > 1 else value


def in_first(fabric: Fabric, do: Callable[[], Value]) -> Value | None:
    """Return what the first process alone does, and None in the others; errors are raised in all."""
    done, problem = None, None
    if fabric.is_global_zero:
        try:
            done = do()
        except (ValueError, OSError) as error:
            problem = error
    problem = broadcast(fabric, problem)
    if problem is not None:
        raise problem
    return done


def peak_memory() -> int:
    """Return the most memory used so far, in MiB: of this process's GPU, or resident where it uses none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@dataclass(frozen=True)
class Part:
    """Which rows of a batch are this process's: every `ranks`-th, so that all kinds of rows are shared out evenly."""

    rank: int = 0  # of this process
    ranks: int = 1  # processes in all

    def of(self, rows: Tensor) -> Tensor:
        """Return this process's rows of any tensor."""
        return rows[self.rank :: self.ranks]

    def halves(self, rows: Tensor) -> Tensor:
        """Return this process's rows of a tensor whose halves are of two kinds: the same rows of each."""
        return rows if self.ranks == 1 else torch.cat([self.of(half) for half in rows.chunk(2)])

    def gather(self, rows: Tensor, fabric: Fabric) -> Tensor:
        """Return all processes' rows, with gradient to this one's."""
        return rows if self.ranks == 1 else torch.as_tensor(fabric.all_gather(rows, sync_grads=True)).flatten(0, 1)

    def sum(self, value: Tensor, fabric: Fabric) -> Tensor:
        """Return the sum over all processes."""
        return value if self.ranks == 1 else torch.as_tensor(fabric.all_reduce(value, reduce_op="sum"))
