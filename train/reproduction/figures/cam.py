"""Class activation maps inside and outside the mask: Fig. 7 of Ann (2021) with its paired t-test.

Ann (2021) asks whether a map is brighter inside the mask than outside. A map that is bright wherever nodules often lie
passes that test too, so the same is asked where no nodule was put: of the same map with the mask moved, and of the
image of the same z without a nodule. A classifier that CARIM maximised shows a training curve, no evidence.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from carim_aug.location.prior import Prior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.cam import activation_map, enlarge, normalize_map
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier
from train.metrics.statistics import average, paired_test, share, spread
from train.reproduction.figures.samples import as_picture, check_least, draw_boxes, generate, knows_place

FINDING = "Nodule"

COMPARISONS: dict[str, tuple[str, str]] = {
    "inside - outside": ("inside", "outside"),
    "inside - inside a moved mask": ("inside", "moved_inside"),
    "inside - the same without a nodule": ("inside", "without_inside"),
    "moved mask: inside - outside": ("moved_inside", "moved_outside"),
    "without a nodule: inside - outside": ("without_inside", "without_outside"),
}
"""The first of Ann (2021), the two that count, and the first where there is no nodule, which should find nothing."""

REGIONS: dict[str, tuple[str, str]] = {
    "inside": ("inside the mask", "#d62728"),
    "outside": ("outside the mask", "#1f4e9c"),
    "moved_inside": ("inside a moved mask", "#7f7f7f"),
    "without_inside": ("inside, image without a nodule", "#2aa876"),
}
"""Of which pixels are counted, and their colour; the first two as in Ann (2021), filled."""
FILLED = ("inside", "outside")
_OVER = (1, 2, 3)


def activation_inside(
    source: Any,
    prior: Prior,
    classifiers: Mapping[str, ChestClassifier],
    *,
    n: int = 2000,
    seed: int = 0,
    bins: int = 50,
    batch: int = 8,
) -> dict[str, Any]:
    """Return the maps of n synthetic nodule images, by Grad-CAM in closed form, inside and outside their masks.

    Every map is M / max(M) of eq. 5, enlarged to the image. One that is nowhere positive is dead: counted ("dead",
    "dead_without" a nodule), and left out of all else. A moved mask is another draw of the prior that does not touch
    the first. Of each classifier, which is in eval mode: "means" over images and "histograms" of each region; "tests"
    as `paired_test` has them; "signed", the same test of the maps' own values before eq. 5's ReLU, inside the mask with
    and without the nodule, in units of the logit (which is the head's bias and their mean over the map); "logit_rise"
    and "rises", what the mask adds to the logit and how often that is above 0. On a CPU small batches are faster.
    """
    if not classifiers:
        raise ValueError("classifiers must be at least one, got none")
    for name, classifier in classifiers.items():
        if classifier.training:
            raise ValueError(f"classifiers must be in eval mode, got {name!r} in training mode")
    check_least(2, n=n, bins=bins)
    check_least(1, batch=batch)
    size = source.image_size
    boxes = draw_boxes(prior, n, seed=fold(seed, 50))
    away = draw_boxes(prior, n, seed=fold(seed, 51), apart=boxes)
    found = {name: _Found(classifier, bins) for name, classifier in classifiers.items()}

    for rows in torch.arange(n).split(batch):
        seeds = [fold(seed, 52, i) for i in rows.tolist()]
        nodule, without = (generate(source, own, seeds, batch=batch) for own in (boxes[rows], None))
        mask, moved = (boxes_to_masks(list(of[rows, None] * size), size) for of in (boxes, away))
        for one in found.values():
            one.add(nodule, without, mask, moved)
    facts = {"n": n, "size": size, "places": knows_place(source), "finding": FINDING, "bins": bins}
    return {**facts, "classifiers": {name: one.figures() for name, one in found.items()}}


class _Found:
    """What one classifier's maps show, batch after batch."""

    def __init__(self, classifier: ChestClassifier, bins: int) -> None:
        self.classifier, self.target, self.bins = classifier, classifier.target(FINDING), bins
        self.map_side = 0
        self.rows: dict[str, list[Tensor]] = {}
        self.counts = {region: torch.zeros(bins, dtype=torch.int64) for region in REGIONS}

    def add(self, nodule: Tensor, without: Tensor, mask: Tensor, moved: Tensor) -> None:
        """Take images (B, 1, S, S) with and without a nodule, the mask that was given, and another."""
        values, logits = self._maps(nodule)
        bare_values, bare_logits = self._maps(without)
        maps, bare = normalize_map(values.relu()), normalize_map(bare_values.relu())
        alive, bare_alive = values.amax(dim=_OVER) > 0, bare_values.amax(dim=_OVER) > 0
        regions = {
            "inside": (maps, mask, alive),
            "outside": (maps, 1 - mask, alive),
            "moved_inside": (maps, moved, alive),
            "moved_outside": (maps, 1 - moved, alive),
            "without_inside": (bare, mask, bare_alive),
            "without_outside": (bare, 1 - mask, bare_alive),
        }
        new = {name: _mean(maps, region) for name, (maps, region, _) in regions.items()}
        new |= {"alive": alive, "bare_alive": bare_alive, "rise": logits - bare_logits}
        new |= {name: _mean(v, mask) * self.map_side**2 for name, v in {"signed": values, "bare": bare_values}.items()}
        for name, part in new.items():
            self.rows.setdefault(name, []).append(part)
        for name, counts in self.counts.items():
            shown, region, living = regions[name]
            counts += torch.histc(shown[living][region[living] > 0], self.bins, 0, 1).long()

    def figures(self) -> dict[str, Any]:
        rows = {name: torch.cat(parts) for name, parts in self.rows.items()}
        alive = {name: rows["bare_alive"] if name.startswith("without") else rows["alive"] for name in rows}
        tests = {}
        for name, (first, second) in COMPARISONS.items():
            both = alive[first] & alive[second]
            tests[name] = paired_test(rows[first][both], rows[second][both])
        nothing = dict.fromkeys(("value", "low", "high"), float("nan"))
        living = {name: rows[name][alive[name]] for name in sorted(set(chain(*COMPARISONS.values())))}
        return {
            "map_side": self.map_side,
            "dead": share(~rows["alive"]),
            "dead_without": share(~rows["bare_alive"]),
            "means": {name: average(means) if len(means) > 1 else nothing for name, means in living.items()},
            "histograms": {name: counts.tolist() for name, counts in self.counts.items()},
            "tests": tests,
            "signed": paired_test(rows["signed"], rows["bare"]),
            "logit_rise": spread(rows["rise"]),
            "rises": share(rows["rise"] > 0),
        }

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signed maps, enlarged, (B, 1, S, S), and the logits (B,)."""
        classifier, target = self.classifier, self.target
        images = images.to(classifier.head.weight.device)
        seen = activation_map(classifier, images, target, layer=classifier.activation, method="closed-form")
        self.map_side = seen.maps.shape[-1]
        return enlarge(seen.maps.float().cpu(), images.shape[-1]), seen.logits[:, target].float().cpu()


def histograms(figures: Mapping[str, Any], *, title: str) -> Image.Image:
    """Draw Fig. 7 from `activation_inside`'s figures: density of the maps' values, a panel a classifier.

    Filled: inside the mask (red) and outside (blue), as in Ann (2021); lines: where there is no nodule. The axis of the
    density is logarithmic, because after eq. 5's ReLU most pixels are 0.
    """
    found, bins = figures["classifiers"], figures["bins"]
    figure = Figure(figsize=(5.6 * len(found), 4.4), layout="constrained")
    edges = np.linspace(0, 1, bins + 1)
    for axes, (name, one) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for region, (meaning, colour) in REGIONS.items():
            counts, filled = np.array(one["histograms"][region], dtype=np.float64), region in FILLED
            label = f"{meaning}, mean {one['means'][region]['value']:.3f}"
            look: dict[str, Any] = {"color": colour, "alpha": 0.45 if filled else 1.0, "linewidth": 1.5}
            axes.stairs(counts / max(counts.sum(), 1) * bins, edges, fill=filled, label=label, **look)
        test = one["tests"]["inside - outside"]
        result = f"{name}: inside - outside {test['value']:+.3f}, t {test['t']:.1f}; {one['dead']['value']:.0%} dead"
        axes.set(title=result, xlabel="map / its maximum", ylabel="density", xlim=(0, 1))
        if any(map(any, one["histograms"].values())):
            axes.set_yscale("log")
        axes.legend(fontsize="small")
    figure.suptitle(title)
    return as_picture(figure, f"{title}; class activation maps of {figures['n']} synthetic images; carim_aug")


def _mean(maps: Tensor, region: Tensor) -> Tensor:
    """Return each map's mean over its region, (B,)."""
    return (maps * region).sum(dim=_OVER) / region.sum(dim=_OVER).clamp(min=1)
