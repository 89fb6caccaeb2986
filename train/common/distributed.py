"""Devices of one training, and which part of a batch is whose: one GPU, several, several nodes, or the CPU."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor

from train.common.run import RunError
from train.gan.batch import Batch
from train.gan.diffaugment import DiffAugment

PRECISIONS: tuple[str, ...] = ("bf16-mixed", "32-true")
"""bfloat16 where autocast finds it safe, or float32 throughout."""

Told = TypeVar("Told")


def launched(
    device: str = "cpu", *, devices: int = 1, nodes: int = 1, precision: str = "bf16-mixed", unused: bool = False
) -> Fabric:
    """Gives Fabric with its processes running; each of them runs the caller's program from the start.

    Args:
        device: "cpu" or "cuda".
        devices: on each node; processes, on the CPU.
        nodes: machines; each is given the same command by its launcher (torchrun or SLURM).
        precision: of `PRECISIONS`.
        unused: some parameters have no gradient in some steps.

    Raises:
        RunError: no such precision or device, or fewer devices than asked for.
    """
    if precision not in PRECISIONS:
        raise RunError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if device not in ("cpu", "cuda"):
        raise RunError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and torch.cuda.device_count() < devices:
        raise RunError(f"devices must be at most the {torch.cuda.device_count()} CUDA devices here, got {devices}")
    several = devices * nodes > 1
    strategy: Any = DDPStrategy(find_unused_parameters=unused) if several else "auto"
    fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def agreed(fabric: Fabric, value: Told) -> Told:
    """Gives the first process's value in all of them."""
    return fabric.broadcast(value) if fabric.world_size > 1 else value


def in_first(fabric: Fabric, do: Callable[[], Told]) -> Told | None:
    """Gives what the first process alone does, and None in the others; errors are raised in all."""
    if fabric.world_size == 1:
        return do()
    done, problem = None, None
    if fabric.is_global_zero:
        try:
            done = do()
        except (ValueError, OSError) as error:
            problem = error
    problem = fabric.broadcast(problem)
    if problem is not None:
        raise problem
    return done


@dataclass(frozen=True)
class Part:
    """Which rows of a batch are this process's: every `ranks`-th, so that all kinds of rows are shared out evenly.

    Attributes:
        rank: of this process.
        ranks: processes in all.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Gives this process's rows of any tensor."""
        return rows if self.ranks == 1 else rows[self.rank :: self.ranks]

    def halves(self, rows: Tensor) -> Tensor:
        """Gives this process's rows of a tensor whose halves are of two kinds: the same rows of each."""
        return rows if self.ranks == 1 else torch.cat([self.of(half) for half in rows.chunk(2)])

    def batch(self, batch: Batch) -> Batch:
        """Gives this process's part of a batch of real films and requests."""
        if self.ranks == 1:
            return batch
        parts = {f.name: self.of(getattr(batch, f.name)) for f in fields(batch)}
        return replace(batch, **parts | {k: self.halves(getattr(batch, k)) for k in ("images", "classes")})

    def changes(self, change: DiffAugment) -> DiffAugment:
        """Gives this process's rows of an augmentation that was drawn for the whole batch."""
        return DiffAugment(*(self.halves(getattr(change, f.name)) for f in fields(change)))

    def gathered(self, rows: Tensor, fabric: Fabric) -> Tensor:
        """Gives all processes' rows, with gradient to this one's."""
        return rows if self.ranks == 1 else fabric.all_gather(rows, sync_grads=True).flatten(0, 1)

    def summed(self, value: Tensor, fabric: Fabric) -> Tensor:
        """Gives the sum over all processes."""
        return value if self.ranks == 1 else fabric.all_reduce(value, reduce_op="sum")
