"""Class activation maps inside and outside the mask, the source's Fig. 7 with its paired t-test (METHOD 8).

The source's test asks whether a map is brighter inside the mask than outside. A map that is bright wherever nodules
often lie passes it too, so the same is asked where no nodule was put: of the same map with the mask moved, and of the
film of the same z without a nodule. A classifier that CARIM maximised shows a training curve, no evidence (EVIDENCE).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import ttest_rel, wilcoxon
from torch import Tensor

from carim_aug.generators.base import Generator, places_nodules
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.cam import activation_map, enlarged, normalised
from carim_aug.ops.random import fold
from train.classifier.densenet import ChestClassifier
from train.metrics.generator_quality import average, share, spread
from train.reproduction.figures.same_noise import as_picture, draw_boxes, draw_noise, renderer

COMPARISONS: dict[str, tuple[str, str]] = {
    "inside - outside": ("inside", "outside"),
    "inside - inside a moved mask": ("inside", "moved_inside"),
    "inside - the same without a nodule": ("inside", "without_inside"),
    "moved mask: inside - outside": ("moved_inside", "moved_outside"),
    "without a nodule: inside - outside": ("without_inside", "without_outside"),
}
"""The source's comparison, the two that count, and the source's where there is no nodule, which should find nothing."""

REGIONS: dict[str, str] = {
    "inside": "inside the mask",
    "outside": "outside the mask",
    "moved_inside": "inside a moved mask",
    "without_inside": "inside, film without a nodule",
}
"""Of which pixels are counted."""
_COLOURS = {"inside": "#d62728", "outside": "#1f4e9c", "moved_inside": "#7f7f7f", "without_inside": "#2aa876"}


def activation_inside(
    generator: Generator,
    prior: LocationPrior,
    classifiers: Mapping[str, ChestClassifier],
    *,
    n: int = 2000,
    seed: int = 0,
    finding: str = "Nodule",
    bins: int = 50,
    batch: int = 8,
) -> dict[str, Any]:
    """Gives the maps of n synthetic nodule films, by Grad-CAM in closed form, inside and outside their masks.

    Every map is M / max(M) of eq. 5, enlarged to the film. One that is nowhere positive is dead: counted, and left out
    of all else.

    Args:
        generator: see `carim_aug.generators.base`.
        prior: of the masks; a moved mask is another draw of it that does not touch the first.
        classifiers: names and classifiers in eval mode: the one that CARIM used, ones that training never saw.
        n: films, at least 2.
        seed: of places and noise.
        finding: the class that is looked for.
        bins: of the histograms, on [0, 1].
        batch: films at once; on a CPU few are faster (memory), on a GPU take 100.

    Returns:
        Plain JSON types: "n", "size", "places" (whether the generator knows where the mask is), "classifiers": name to

        - "map_side": of the map before it is enlarged; "dead" and "dead_without": shares of dead maps, of nodule films
          and of those without;
        - "means": each region's mean over films; "histograms": each region's pixels, counted;
        - "tests": `COMPARISONS`, each as `paired` gives it, over films whose maps are alive;
        - "signed": `paired` of the maps' own values before eq. 5's ReLU, inside the mask with and without the nodule,
          of all films, in units of the logit (which is the head's bias and the mean of these values over the map);
        - "logit_rise" and "rises": what the mask adds to the class's logit, and how often that is above 0.

    Raises:
        ValueError: no classifier, one that is in training mode or does not know the finding, or numbers out of range.
    """
    _check(classifiers, n, bins)
    size = generator.image_size
    boxes = draw_boxes(prior, n, seed=fold(seed, 50))
    away = draw_boxes(prior, n, seed=fold(seed, 51), apart=boxes)
    noise, render = draw_noise(generator, n, seed=fold(seed, 52)), renderer(generator, batch=batch)
    targets = {name: classifier.target(finding) for name, classifier in classifiers.items()}
    looks = {name: _Look(bins) for name in classifiers}

    for rows in torch.arange(n).split(batch):
        nodule, without = render(noise[rows], boxes[rows] * size), render(noise[rows], None)
        mask, moved = (boxes_to_masks(list(of[rows, None] * size), size) for of in (boxes, away))
        for name, classifier in classifiers.items():
            looks[name].add(classifier, targets[name], nodule, without, mask, moved)
    return {
        "n": n,
        "size": size,
        "places": places_nodules(generator),
        "finding": finding,
        "bins": bins,
        "classifiers": {name: look.figures() for name, look in looks.items()},
    }


def paired(first: Tensor, second: Tensor) -> dict[str, float]:
    """Gives the paired t-test of two samples (n,), with what it leaves out.

    Returns:
        "n"; "value", the mean of first - second, with "low" and "high", its 95 % interval by Student's t; "t" and "p",
        two-sided (0 where p is below the least float); "cohens_d", the mean over the standard deviation of the
        differences; "above", the share of differences above 0; "rank_p" of Wilcoxon's signed-rank test, two-sided. NaN
        where there are fewer than two pairs or no difference varies.

    Raises:
        ValueError: samples of other shapes.
    """
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"first and second must be (n,) both, got {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = first.double().numpy(), second.double().numpy()
    change = a - b
    names = ("value", "low", "high", "t", "p", "cohens_d", "above", "rank_p")
    if len(change) < 2 or change.std() == 0:
        return {"n": len(change), **dict.fromkeys(names, float("nan"))}
    test = ttest_rel(a, b)
    ends = test.confidence_interval(0.95)
    values = (
        change.mean(),
        ends.low,
        ends.high,
        test.statistic,
        test.pvalue,
        change.mean() / change.std(ddof=1),
        (change > 0).mean(),
        wilcoxon(change).pvalue,
    )
    return {"n": len(change), **{name: float(value) for name, value in zip(names, values, strict=True)}}


def histograms(figures: Mapping[str, Any], *, title: str) -> Image.Image:
    """Gives Fig. 7 of `activation_inside`'s figures: density of the maps' values, a panel a classifier.

    Filled: inside the mask (red) and outside (blue), as in the source; lines: where there is no nodule. The axis of the
    density is logarithmic, because after eq. 5's ReLU most pixels are 0.
    """
    looks, bins = figures["classifiers"], figures["bins"]
    figure = Figure(figsize=(5.6 * len(looks), 4.4), layout="constrained")
    edges = np.linspace(0, 1, bins + 1)
    for axes, (name, look) in zip(figure.subplots(1, len(looks), squeeze=False)[0], looks.items(), strict=True):
        for region, meaning in REGIONS.items():
            counts = np.array(look["histograms"][region], dtype=np.float64)
            density = counts / max(counts.sum(), 1) * bins
            filled = region in ("inside", "outside")
            axes.stairs(
                density,
                edges,
                fill=filled,
                color=_COLOURS[region],
                alpha=0.45 if filled else 1.0,
                linewidth=1.5,
                label=f"{meaning}, mean {look['means'][region]['value']:.3f}",
            )
        test = look["tests"]["inside - outside"]
        told = f"{name}: inside - outside {test['value']:+.3f}, t {test['t']:.1f}; {look['dead']['value']:.0%} dead"
        axes.set(title=told, xlabel="map / its maximum", ylabel="density", xlim=(0, 1))
        if any(map(any, look["histograms"].values())):
            axes.set_yscale("log")
        axes.legend(fontsize="small")
    figure.suptitle(title)
    return as_picture(figure, f"{title}; class activation maps of {figures['n']} synthetic films; carim_aug")


class _Look:
    """What one classifier's maps show, film after film."""

    def __init__(self, bins: int) -> None:
        self.bins, self.map_side = bins, 0
        self.rows: dict[str, list[Tensor]] = {}
        self.counts = {region: torch.zeros(bins, dtype=torch.int64) for region in REGIONS}

    def add(
        self,
        classifier: ChestClassifier,
        target: int,
        nodule: Tensor,
        without: Tensor,
        mask: Tensor,
        moved: Tensor,
    ) -> None:
        """Takes films (B, 1, S, S) with and without a nodule, the mask that was given, and another."""
        seen, alive, values, logit = self._maps(classifier, target, nodule)
        bare, bare_alive, bare_values, bare_logit = self._maps(classifier, target, without)
        regions = {
            "inside": (seen, mask, alive),
            "outside": (seen, 1 - mask, alive),
            "moved_inside": (seen, moved, alive),
            "moved_outside": (seen, 1 - moved, alive),
            "without_inside": (bare, mask, bare_alive),
            "without_outside": (bare, 1 - mask, bare_alive),
        }
        for name, (maps, region, shown) in regions.items():
            self._keep(name, _mean(maps, region))
            if name in self.counts:
                pixels = maps[shown][region[shown] > 0]
                self.counts[name] += torch.histc(pixels, self.bins, 0, 1).long()
        self._keep("alive", alive)
        self._keep("bare_alive", bare_alive)
        cells = self.map_side**2
        self._keep("signed", _mean(values, mask) * cells)
        self._keep("bare_signed", _mean(bare_values, mask) * cells)
        self._keep("rise", logit - bare_logit)

    def figures(self) -> dict[str, Any]:
        rows = {name: torch.cat(parts) for name, parts in self.rows.items()}
        alive = {name: rows["bare_alive"] if name.startswith("without") else rows["alive"] for name in rows}
        tests = {}
        for name, (first, second) in COMPARISONS.items():
            both = alive[first] & alive[second]
            tests[name] = paired(rows[first][both], rows[second][both])
        regions = sorted({region for pair in COMPARISONS.values() for region in pair})
        return {
            "map_side": self.map_side,
            "dead": share(~rows["alive"]),
            "dead_without": share(~rows["bare_alive"]),
            "means": {name: _average(rows[name][alive[name]]) for name in regions},
            "histograms": {name: counts.tolist() for name, counts in self.counts.items()},
            "tests": tests,
            "signed": paired(rows["signed"], rows["bare_signed"]),
            "logit_rise": spread(rows["rise"]),
            "rises": share(rows["rise"] > 0),
        }

    def _maps(self, classifier: ChestClassifier, target: int, films: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """M_norm (B, 1, S, S), whether the map is alive (B,), its signed values (B, 1, S, S), logits (B,)."""
        device = classifier.head.weight.device
        seen = activation_map(classifier, films.to(device), target, layer=classifier.activation, method="closed-form")
        self.map_side = seen.maps.shape[-1]
        values = enlarged(seen.maps.float().cpu(), films.shape[-1])
        positive = values.relu()
        return normalised(positive), positive.amax(dim=(1, 2, 3)) > 0, values, seen.logits[:, target].float().cpu()

    def _keep(self, name: str, values: Tensor) -> None:
        self.rows.setdefault(name, []).append(values)


def _average(values: Tensor) -> dict[str, float]:
    """The mean and its interval; NaN of fewer than two living maps."""
    return average(values) if len(values) > 1 else dict.fromkeys(("value", "low", "high"), float("nan"))


def _mean(maps: Tensor, region: Tensor) -> Tensor:
    """Each map's mean over its region, (B,)."""
    return (maps * region).sum(dim=(1, 2, 3)) / region.sum(dim=(1, 2, 3)).clamp(min=1)


def _check(classifiers: Mapping[str, ChestClassifier], n: int, bins: int) -> None:
    if not classifiers:
        raise ValueError("classifiers must be at least one, got none")
    for name, classifier in classifiers.items():
        if classifier.training:
            raise ValueError(f"classifiers must be in eval mode, got {name!r} in training mode")
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
