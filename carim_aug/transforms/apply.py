"""What fills the planned slots of a batch: a place in the host, a verdict of the gate, pixels, labels.

One way for all three uses of the mix: `mix(images, labels)`, `mix.loader(...)` and `mix.wrap(...)`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from carim_aug.generators.render import Renderer
from carim_aug.labels.policy import LabelPolicy
from carim_aug.location.placement import Placement, again, candidates, grounds
from carim_aug.ops.images import resize
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.gate import Candidates, Gates
from carim_aug.transforms.graft import contrasts, graft, put_in, relabel, render
from carim_aug.transforms.plan import MixParams, Planner, Slot
from carim_aug.transforms.pool import SyntheticPool

Images = Tensor | Sequence[Tensor]
"""(B, C, H, W), or B images (C, H, W) of any sizes."""


@dataclass(frozen=True)
class Settled:
    """Slots that are decided for good.

    Attributes:
        slots: B.
        rendered: by place, what the generator gave for those that the gate has seen.
    """

    slots: tuple[Slot, ...]
    rendered: dict[int, Tensor]


class Filler:
    """Settles and fills the slots of batches.

    Args:
        renderer: generates.
        value_range: of the images.
        insertion: "whole" or "graft".
        placement: of grafts, see `carim_aug.location.placement`.
        gates: that judge nodules; None: all pass.
        pool: whose nodules come in place of those that the slots were planned with; None: they are rendered.
        weights_hash: of the generator.
    """

    def __init__(
        self,
        renderer: Renderer,
        value_range: ValueRange,
        *,
        insertion: str,
        placement: Placement,
        gates: Gates | None,
        weights_hash: str,
        pool: SyntheticPool | None = None,
    ) -> None:
        """Keeps the parts."""
        self.pool = pool
        self.renderer, self.value_range, self.insertion = renderer, value_range, insertion
        self.placement, self.gates, self.weights_hash = placement, gates, weights_hash

    def settle(self, images: Images, slots: Sequence[Slot], planner: Planner) -> Settled:
        """Gives the slots as their hosts and the gate want them, from their keys and hosts alone.

        Args:
            images: B hosts (C, H, W) in `value_range`.
            slots: B decisions.
            planner: that made them.

        Raises:
            GateError: a gate that accepts nothing.
        """
        places = [i for i, slot in enumerate(slots) if len(slot.boxes)]
        if not places or (self.gates is None and self.insertion == "whole"):
            return Settled(tuple(slots), {})
        where = self.placement if self.insertion == "graft" else "prior"
        found = grounds([images[i] for i in places], where, planner)
        waiting = {i: candidates(self._draws(slots[i], planner), g) for i, g in zip(places, found, strict=True)}
        chosen = list(slots)
        rendered: dict[int, Tensor] = {}
        for _ in range(self.gates.tries if self.gates is not None else 1):
            drawn = {i: draw for i, draws in waiting.items() if (draw := next(draws, None)) is not None}
            if self.gates is None:
                for i in waiting:
                    chosen[i] = drawn.get(i, slots[i].real())
                return self._taken(chosen, rendered)
            # On the CPU one by one, so that no verdict depends on a batch, not by a rounding.
            device = self.renderer.device or images[places[0]].device
            groups = [[i] for i in drawn] if device.type == "cpu" else self._of_one_size(list(drawn), images)
            for group in groups:
                for i, slot, pixels in self._passed(images, group, drawn):
                    chosen[i], rendered[i] = slot, pixels
                    del waiting[i]
            if not waiting:
                break
        for i in waiting:
            chosen[i] = slots[i].real()
            if self.gates is not None:
                self.gates.exhausted()
        return self._taken(chosen, rendered)

    def pixels(self, images: Images, settled: Settled) -> tuple[Images, Tensor]:
        """Gives the images with the synthetic slots filled, and the contrasts of grafts (`MixParams.contrasts`).

        Args:
            images: (B, C, H, W), or B images (C, H, W) of any sizes, in `value_range`. Never changed.
            settled: of these images.
        """
        slots, added = settled.slots, torch.full((len(images),), math.nan)
        places = [i for i, slot in enumerate(slots) if slot.synthetic]
        if not places:
            return images, added
        known, missing = settled.rendered, [i for i in places if i not in settled.rendered]
        if missing:
            device = images[missing[0]].device
            parts = self._rendered([slots[i] for i in missing], device, [images[i] for i in missing])
            known = {**known, **dict(zip(missing, parts, strict=True))}
        if self.insertion == "graft":
            added[places] = contrasts(torch.stack([known[i] for i in places]), [slots[i] for i in places])
        if isinstance(images, Tensor):
            return self._put_in(images, slots, [known[i] for i in places]), added
        filled = list(images)
        for group in self._of_one_size(places, images):
            stacked = torch.stack([images[i] for i in group])
            new = self._put_in(stacked, [slots[i] for i in group], [known[i] for i in group])
            for i, image in zip(group, new, strict=True):
                filled[i] = image
        return filled, added

    def fill(self, images: Images, labels: Any, settled: Settled, policy: LabelPolicy) -> tuple[Images, Any, MixParams]:
        """Gives images and labels with the synthetic slots filled, and what was done.

        Args:
            images: as for `pixels`. Never changed.
            labels: B. Never changed.
            settled: of these images.
            policy: of the labels, resolved.
        """
        sizes = sizes_of(images)
        mixed, added = self.pixels(images, settled)
        params = MixParams(settled.slots, self.insertion, sizes[0], self.weights_hash, added)
        if not isinstance(images, Tensor):
            params = replace(params, sizes=sizes)
        return mixed, relabel(labels, settled.slots, insertion=self.insertion, policy=policy, sizes=sizes), params

    def _draws(self, slot: Slot, planner: Planner) -> Callable[[int], Slot]:
        pool = self.pool
        if pool is None:
            return again(slot, planner)
        return lambda number: pool.slot(slot, (*slot.key, number))

    def _taken(self, slots: Sequence[Slot], rendered: dict[int, Tensor]) -> Settled:
        """Settled slots; those from a pool with its pixels, for it may change."""
        for i, slot in enumerate(slots):
            if self.pool is not None and slot.entry is not None:
                rendered[i] = self.pool.take(slot)
        return Settled(tuple(slots), rendered)

    def _rendered(self, slots: Sequence[Slot], device: torch.device, images: Sequence[Tensor]) -> Tensor:
        if self.pool is not None and all(slot.entry is not None for slot in slots):
            return torch.stack([self.pool.difference(slot) for slot in slots]).to(device)
        hosts = None
        if self.insertion == "graft" and self.renderer.sees_hosts:
            size = (self.renderer.generator.image_size,) * 2
            hosts = torch.cat([resize(self._grey(image[None]), size) for image in images])
        return render(slots, device, insertion=self.insertion, renderer=self.renderer, hosts=hosts)

    def _put_in(self, images: Tensor, slots: Sequence[Slot], pixels: list[Tensor]) -> Tensor:
        made = torch.stack(pixels).to(images.device)
        return put_in(images, slots, made, insertion=self.insertion, value_range=self.value_range)

    def _passed(self, images: Images, places: list[int], drawn: dict[int, Slot]) -> list[tuple[int, Slot, Tensor]]:
        """Places, slots and pixels of the candidates that the gates accept; their hosts are of one size."""
        assert self.gates is not None, "asked only where there is a gate"
        chosen = [drawn[i] for i in places]
        device = images[places[0]].device
        pixels = self._rendered(chosen, device, [images[i] for i in places])
        hosts, contrast = None, torch.full((len(chosen),), math.nan)
        if self.insertion == "graft":
            real = torch.stack([images[i] for i in places])
            hosts, contrast = self._grey(real), contrasts(pixels, chosen)
            shown = self._grey(graft(real, pixels, chosen, self.value_range))
        else:
            shown = resize(pixels, images[places[0]].shape[-2:])
        height, width = shown.shape[-2:]
        boxes = [slot.boxes_at(height, width) for slot in chosen]
        scores, passed = self.gates.verdicts(Candidates(shown, boxes, hosts, contrast))
        return [
            (i, replace(slot, score=float(score)), own)
            for i, slot, score, good, own in zip(places, chosen, scores, passed, pixels, strict=True)
            if good
        ]

    def _grey(self, images: Tensor) -> Tensor:
        return self.value_range.to_symmetric(images).float().mean(dim=1, keepdim=True)

    @staticmethod
    def _of_one_size(places: list[int], images: Images) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in places:
            groups.setdefault(tuple(images[i].shape), []).append(i)
        return list(groups.values())


def sizes_of(images: Images) -> tuple[tuple[int, int], ...]:
    """Gives the height and width of each image."""
    return tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
