"""The training loop, once: images counted, the rate's schedule, forgiven updates, the log, the clock; and one update.

`for seen in loop` gives the images seen before the step; `loop.update` counts and logs it, `loop.due` and
`loop.try_save` take snapshots, `loop.close` ends. `train.classifier.finetune` shows it all.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from tqdm import tqdm

from train.common.distributed import Part, broadcast, peak_memory
from train.common.run import Run, TrainingError

PATIENCE = 10  # updates in a row that may be skipped for not being finite
ASK_EVERY = 8  # steps after which several processes ask the first one's clock: clocks differ, and asking costs time


class Loop:
    """Count images, schedule the rate, forgive updates that are not finite, log, and stop in time."""

    def __init__(
        self,
        run: Run | None,
        *,
        images: int,  # to show in all
        batch: int,  # images a step, of all processes
        name: str,  # of the progress bar
        images_seen: int = 0,  # so far
        skipped: int = 0,  # updates so far that were not finite
        minutes: float = math.inf,  # to stop after
        log_images: int = 320,  # a line of the log every so many images, from the first step on
        fabric: Fabric | None = None,  # of the processes, where there may be several
    ) -> None:
        self.run, self.images, self.batch, self.fabric = run, images, batch, fabric
        self.images_seen, self.skipped = images_seen, skipped
        self._log_steps, self._minutes = math.ceil(log_images / batch), minutes
        self._failed = 0  # updates in a row
        self._unsaved: OSError | None = None
        self._started = time.monotonic()
        self._logged = self._started, images_seen  # when the last line was written, and at how many images
        self._over = images_seen >= images or self._out_of_time()
        hidden = {"disable": True} if fabric is not None and not fabric.is_global_zero else {}
        self._bar = tqdm(total=images, initial=images_seen, unit="image", desc=name, **hidden)

    def __iter__(self) -> Iterator[int]:
        while not self._over:
            seen = self.images_seen
            yield seen
            if self.images_seen == seen:
                self._advance()

    @property
    def step(self) -> int:
        """The number of the step at hand, from 0, counted over all starts; after `update`, that of the next one."""
        return self.images_seen // self.batch

    @property
    def logs(self) -> bool:
        """Whether the step at hand will be logged, for what is measured then only."""
        return self.step % self._log_steps == 0

    def stop(self) -> None:
        """Make no further step."""
        self._over = True

    def set_rate(self, optimizer: Optimizer, largest: float, *, warm_up: float = 0.05) -> None:
        """Set the optimizer's learning rate for the step at hand; see `rate_factor`."""
        for group in optimizer.param_groups:
            group["lr"] = largest * rate_factor(self.images_seen / self.images, warm_up)

    def update(self, losses: dict[str, Tensor], finite: bool, **facts: Any) -> None:
        """Count the step that was just made, and log losses (scalars, four digits) and facts every `log_images`.

        An update that was not finite, and changed nothing, is skipped; `PATIENCE` of them in a row: TrainingError.
        """
        logs = self.logs
        self._failed = 0 if finite else self._failed + 1
        if not finite:
            self.skipped += 1
            broken = sorted(k for k, v in losses.items() if not math.isfinite(v)) or ["a gradient"]
            if self.run is not None:
                self.run.event("update skipped", images=self.images_seen, not_finite=broken, in_all=self.skipped)
            if self._failed >= PATIENCE:
                raise TrainingError(
                    f"{broken} not finite in {self._failed} updates in a row, after {self.images_seen} images; the "
                    "last checkpoint is intact"
                )
        self._advance()
        if logs and self.run is not None:
            now, (then, seen) = time.monotonic(), self._logged
            speed = round((self.images_seen - seen) / max(now - then, 1e-9), 2)
            facts = {"images_per_s": speed, "memory_mb": peak_memory(), "skipped": self.skipped, **facts}
            self.run.log(images=self.images_seen, **facts, **{k: float(f"{float(v):.4g}") for k, v in losses.items()})
            self._logged = now, self.images_seen

    def due(self, every: int) -> bool:
        """Return whether the step just made crossed a multiple of `every` images, or was the last."""
        return self._over or self.images_seen % every < self.batch

    def try_save(self, save: Callable[[], Any]) -> None:
        """Save in the first process, while the others wait; an OSError (a full disk) is logged, for a later try."""
        if self.run is not None:
            try:
                save()
                self._unsaved = None
            except OSError as error:
                self._unsaved = error
                self.run.event("nothing saved", images=self.images_seen, error=str(error))
        if self.fabric is not None:
            self.fabric.barrier()

    def close(self) -> None:
        """Close the bar and the run's files, or raise TrainingError if the last snapshot could not be saved."""
        self._bar.close()
        if self.run is not None:
            self.run.close()
        if self.run is not None and self._unsaved is not None:
            raise TrainingError(
                f"after {self.images_seen} images nothing could be saved in {self.run.folder} ({self._unsaved}); the "
                "last checkpoint is intact: make room and give the same command again"
            ) from self._unsaved

    def _advance(self) -> None:
        self.images_seen += self.batch
        self._bar.update(self.batch)
        self._over = self._over or self.images_seen >= self.images or self._out_of_time()

    def _out_of_time(self) -> bool:
        several = self.fabric is not None and self.fabric.world_size > 1
        if math.isinf(self._minutes) or (several and self.step % ASK_EVERY):
            return False
        return broadcast(self.fabric, time.monotonic() - self._started >= 60 * self._minutes)


def rate_factor(part: float, warm_up: float = 0.05) -> float:
    """Return the rate over its largest value after a part of the images: a linear rise from 1e-3, then a cosine."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * part)
    return min(part / warm_up + 1e-3, cosine) if warm_up > 0 else cosine


class Buffers:
    """A copy of what forward passes move, batch norm's statistics and spectral norm's vectors, to be put back."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        every = [b for net in networks for b in net.buffers()]
        kinds = [[b for b in every if b.is_floating_point() is kind] for kind in (True, False)]
        self.pairs = [(kind, torch._foreach_add(kind, 0)) for kind in kinds if kind]  # few kernels

    def restore(self) -> None:
        """Put the copies back."""
        with torch.no_grad():
            for buffers, copies in self.pairs:
                torch._foreach_copy_(buffers, copies)


def descend(
    losses: Mapping[str, Tensor],
    optimizer: Any,  # torch's, or Fabric's where that wraps the networks
    *,
    fabric: Fabric | None = None,
    part: Part | None = None,  # of several processes: all of them make the update or none does
    before: Buffers | None = None,  # put back if no update is made
) -> bool:
    """Make one update by the sum of the losses, in one backward pass; none, and return False, if it is not finite."""
    optimizer.zero_grad(set_to_none=True)
    total = torch.stack(list(losses.values())).sum()
    if fabric is None:
        total.backward()
    else:
        fabric.backward(total)
    slopes = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    size = total.detach() if fabric is None or part is None else part.sum(total.detach(), fabric)
    finite = math.isfinite(float(get_total_norm(slopes) + size))
    if finite:
        optimizer.step()
    elif before is not None:
        before.restore()
    return finite


@contextlib.contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep the modules' parameters without gradient inside the block."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
