"""From decisions to pixels and labels: place, gate, generate, graft, relabel.

One way for all three uses of the mix: `mix(images, labels)`, `mix.loader(...)` and `mix.wrap(...)`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from carim_aug.generators.base import check_device, check_source
from carim_aug.labels.base import Change
from carim_aug.labels.policy import LabelPolicy
from carim_aug.location.placement import Area, candidates, find_areas
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.images import resize
from carim_aug.ops.orientation import usual_view
from carim_aug.ops.random import fold
from carim_aug.transforms.gate import Candidates
from carim_aug.transforms.graft import contrasts, graft
from carim_aug.transforms.left_real import GATE, NO_LUNGS, NO_ROOM
from carim_aug.transforms.plan import Decision, MixParams, Planner
from carim_aug.transforms.settings import MixSettings

Images = Tensor | Sequence[Tensor]
"""(B, C, H, W), or B images (C, H, W) of any sizes."""


@dataclass(frozen=True)
class Placed:
    """Decisions that placement and gate have looked at."""

    decisions: tuple[Decision, ...]
    generated: dict[int, Tensor]  # by row, what a gate has seen: an image (1, S, S), or residuals (k, 1, S, S)


class Applier:
    """Places nodules, generates them with a source on a device (None: the images'), and puts them into batches."""

    def __init__(self, settings: MixSettings, source: Any, device: torch.device | str | None = None) -> None:
        self.settings, self.source = settings, check_source(source, settings.insertion)
        try:
            self.device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be a torch.device or its name, got {device!r}: {error}") from None
        self._checked: set[torch.device] = set()

    def on(self, device: torch.device | str | None) -> "Applier":
        """Return this applier, or where it has no device of its own one on this device."""
        return self if self.device is not None or device is None else Applier(self.settings, self.source, device)

    def check_labels(self, policy: LabelPolicy) -> None:
        """Raise ValueError for boxes with a source that does not put nodules where they are."""
        if policy.kind == "detection" and not (hasattr(self.source, "images") or hasattr(self.source, "residuals")):
            raise ValueError(
                f"labels must have no boxes with a {type(self.source).__name__}, which does not put the nodule where "
                "the mask is, got detection targets"
            )

    # --- Place ---
    def place(
        self, images: Images, decisions: Sequence[Decision], planner: Planner, taken: Sequence[Tensor] | None = None
    ) -> Placed:
        """Return decisions as their backgrounds and the gate want them, from keys and backgrounds alone.

        Args:
            images: B backgrounds (C, H, W) in the settings' value range.
            decisions: B, made by the planner.
            planner: draws again.
            taken: B of (k, 4) XYXY in pixels, the real boxes: no graft touches them. An image without room stays real.
        """
        rows = [i for i, decision in enumerate(decisions) if len(decision.boxes)]
        grafts, gates, left_real = self.settings.insertion == "graft", self.settings.graft.gates, self._left_real
        if not rows or (gates is None and not grafts):
            return Placed(tuple(decisions), {})
        chosen, draws = list(decisions), {}
        areas = self.areas([images[i] for i in rows], planner.prior.field) if grafts else [Area()] * len(rows)
        for i, area in zip(rows, areas, strict=True):
            if isinstance(area, str):
                chosen[i] = left_real(decisions[i], area)
                continue
            if grafts and taken is not None:
                area = replace(area, taken=to_parts(taken[i], sizes_of([images[i]])[0]))
            draws[i] = candidates(partial(planner.redraw, decisions[i]), area)
        if gates is None:
            for i, own in draws.items():
                chosen[i] = next(own, None) or left_real(decisions[i], NO_ROOM)
            return Placed(tuple(chosen), {})
        generated: dict[int, Tensor] = {}
        for _ in range(gates.tries):
            candidate = {i: draw for i, own in draws.items() if (draw := next(own, None)) is not None}
            # On the CPU one by one, so that no verdict depends on a batch, not by a rounding.
            device = self.device or images[rows[0]].device
            groups = [[i] for i in candidate] if device.type == "cpu" else _of_one_size(list(candidate), images)
            for group in groups:
                for i, decision, pixels in self._pass_gates(images, group, candidate):
                    chosen[i], generated[i] = decision, pixels
                    del draws[i]
            if not draws:
                break
        for i in draws:
            chosen[i] = left_real(decisions[i], GATE)
            gates.exhaust()
        return Placed(tuple(chosen), generated)

    def areas(self, images: Sequence[Tensor], field: Tensor) -> list[Area | str]:
        """Return where nodules may lie in each image (C, H, W), or why it stays real; `field` (64, 64) bounds lungs."""
        placement = self.settings.graft.placement
        # One by one: no verdict may depend on a batch, not by a rounding.
        views = [usual_view(self._grey(image[None]))[0] if placement == "lungs" else None for image in images]
        usual = [image for image, view in zip(images, views, strict=True) if view is None]
        found = iter(find_areas(usual, placement, field))
        return [(next(found) or NO_LUNGS) if view is None else view for view in views]

    def _left_real(self, decision: Decision, reason: str) -> Decision:
        """Count an image that stays real, and return that decision."""
        self.settings.graft.left_real.count(reason)
        return decision.real()

    def _pass_gates(
        self, images: Images, rows: list[int], candidate: dict[int, Decision]
    ) -> Iterator[tuple[int, Decision, Tensor]]:
        """Yield row, decision and generated pixels of the candidates that the gates accept; images of one size."""
        gates = self.settings.graft.gates
        assert gates is not None, "asked only where there is a gate"
        decisions, real = [candidate[i] for i in rows], torch.stack([images[i] for i in rows])
        generated = self._generate(decisions, list(real))
        height, width = real.shape[-2:]
        boxes = [decision.boxes_at(height, width) for decision in decisions]
        if self.settings.insertion == "graft":
            shown = self._grey(self._graft(real, decisions, generated))
            seen = Candidates(shown, boxes, self._grey(real), self._contrasts(list(real), decisions, generated))
        else:
            shown = resize(torch.stack(generated), (height, width))
            seen = Candidates(shown, boxes, None, torch.full((len(decisions),), math.nan))
        scores, passed = gates.judge(seen)
        for i, decision, score, good, pixels in zip(rows, decisions, scores, passed, generated, strict=True):
            if good:
                yield i, replace(decision, score=float(score)), pixels

    # --- Pixels ---
    def pixels(self, images: Images, placed: Placed) -> tuple[Images, Tensor]:
        """Return the images with what is synthetic in them, and the contrasts of grafts (`MixParams.contrasts`).

        Args:
            images: (B, C, H, W), or B images (C, H, W) of any sizes, in the settings' value range. Never changed.
            placed: decisions for these images.
        """
        decisions, added = placed.decisions, torch.full((len(images),), math.nan)
        rows = [i for i, decision in enumerate(decisions) if decision.synthetic]
        if not rows:
            return images, added
        generated, missing = dict(placed.generated), [i for i in rows if i not in placed.generated]
        if missing:
            more = self._generate([decisions[i] for i in missing], [images[i] for i in missing])
            generated.update(zip(missing, more, strict=True))
        if self.settings.insertion == "graft":
            real = [images[i] for i in rows]
            added[rows] = self._contrasts(real, [decisions[i] for i in rows], [generated[i] for i in rows])
        mixed = images.clone() if isinstance(images, Tensor) else list(images)
        for group in [rows] if isinstance(images, Tensor) else _of_one_size(rows, images):
            old = images[group] if isinstance(images, Tensor) else torch.stack([images[i] for i in group])
            new = self._insert(old, [decisions[i] for i in group], [generated[i] for i in group])
            for i, image in zip(group, new, strict=True):
                mixed[i] = image
        return mixed, added

    def apply(
        self, images: Images, labels: Any, placed: Placed, policy: LabelPolicy, weights_hash: str
    ) -> tuple[Images, Any, MixParams]:
        """Return images and labels (both never changed in place) with what is synthetic in them, and what was done."""
        sizes = sizes_of(images)
        mixed, added = self.pixels(images, placed)
        params = MixParams(placed.decisions, self.settings.insertion, sizes, weights_hash, contrasts=added)
        changes = [self.change(i, decision, sizes[i]) for i, decision in enumerate(placed.decisions)]
        return mixed, policy.change(labels, [change for change in changes if change is not None]), params

    def change(self, row: int, decision: Decision, size: tuple[int, int]) -> Change | None:
        """Return what a decision does to the label of an image of a size; None for a real one."""
        if decision.class_name is None:
            return None
        whole = self.settings.insertion == "whole"
        return Change(row, decision.class_name, decision.boxes_at(*size), size, whole)

    def _insert(self, images: Tensor, decisions: Sequence[Decision], generated: Sequence[Tensor]) -> Tensor:
        if self.settings.insertion == "graft":
            return self._graft(images, decisions, generated)
        resized = resize(torch.stack(list(generated)).to(images.device), images.shape[-2:])
        return self.settings.value_range.from_symmetric(resized, channels=images.shape[1], dtype=images.dtype)

    def _graft(self, images: Tensor, decisions: Sequence[Decision], residuals: Sequence[Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        boxes = [decision.boxes_at(height, width) for decision in decisions]
        every = torch.cat(list(residuals)).to(images.device)
        return graft(images, every, boxes, self._strengths(images, decisions), self.settings.value_range)

    def _contrasts(
        self, images: Sequence[Tensor], decisions: Sequence[Decision], residuals: Sequence[Tensor]
    ) -> Tensor:
        size = self.source.image_size
        boxes = [decision.boxes_at(size, size) for decision in decisions]
        return contrasts(torch.cat(list(residuals)), boxes, self._strengths(images, decisions))

    def _strengths(self, images: Sequence[Tensor] | Tensor, decisions: Sequence[Decision]) -> list[float]:
        """Return by what each image's residuals are multiplied: less where it uses a small part of its range."""
        shares = [self.settings.value_range.shares(image[None])[0] for image in images]
        return [decision.strength * share for decision, share in zip(decisions, shares, strict=True)]

    @torch.no_grad()
    def _generate(self, decisions: Sequence[Decision], images: Sequence[Tensor]) -> list[Tensor]:
        """Return what is generated for each decision, in one call: see `Placed.generated`."""
        size, device = self.source.image_size, self.device or images[0].device
        if self.settings.insertion == "whole":
            return list(self.whole_images(decisions, device))
        self._check_device(device)
        boxes = [decision.boxes_at(size, size) for decision in decisions]
        counts = [len(own) for own in boxes]
        masks = boxes_to_masks(list(torch.cat(boxes)[:, None]), size).to(device)
        regions = torch.cat([resize(self._grey(image[None]), (size, size)) for image in images])
        regions = regions.to(device).repeat_interleave(torch.tensor(counts, device=device), dim=0)
        seeds = [d.noise_seed if j == 0 else fold(d.noise_seed, j) for d in decisions for j in range(len(d.boxes))]
        return list(self._check(self.source.residuals(regions, masks, seeds), len(masks), 2).split(counts))

    @torch.no_grad()
    def whole_images(self, decisions: Sequence[Decision], device: torch.device) -> Tensor:
        """Return generated images (n, 1, S, S) float32, [-1, 1], on the device where they are generated."""
        self._check_device(device)
        size = self.source.image_size
        boxes, seeds = [d.boxes_at(size, size) for d in decisions], [d.noise_seed for d in decisions]
        masks = boxes_to_masks(boxes, size).to(device)
        if hasattr(self.source, "images"):
            made = self.source.images(masks, seeds)
        else:
            made = self.source.class_images(masks.flatten(1).any(dim=1), seeds)
        return self._check(made, len(masks), 1)

    def _check_device(self, device: torch.device) -> None:
        if device not in self._checked or get_worker_info() is not None:  # once: on CUDA it waits for the device
            check_device(device)
            self._checked.add(device)

    def _check(self, made: Tensor, n: int, largest: float) -> Tensor:
        """Return what a source made, if it keeps to its protocol; values are looked at on the CPU only."""
        name, size = type(self.source).__name__, self.source.image_size
        shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        if shape != (n, 1, size, size):
            raise ValueError(f"{name} must give images ({n}, 1, {size}, {size}), got {shape}")
        if made.device.type == "cpu" and not bool((made.abs() <= largest + 1e-3).all()):
            low, high = float(made.min()), float(made.max())
            raise ValueError(f"{name} must give images in [-{largest}, {largest}], got {low:g} to {high:g}")
        return made

    def _grey(self, images: Tensor) -> Tensor:
        return self.settings.value_range.to_symmetric(images).float()


def sizes_of(images: Images) -> tuple[tuple[int, int], ...]:
    """Return the height and width of each image."""
    return tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)


def to_parts(boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return boxes (k, 4), XYXY in pixels of an image of this height and width and a pixel wider, as parts of it."""
    height, width = size
    return (boxes.numpy() + [-1, -1, 1, 1]) / np.array([width, height, width, height])


def _of_one_size(rows: list[int], images: Images) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in rows:
        groups.setdefault(tuple(images[i].shape), []).append(i)
    return list(groups.values())
