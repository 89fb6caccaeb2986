"""t-SNE of real and synthetic images and of crops about their nodules: Fig. 4 and Fig. 5 of Ann (2021).

A scatter proves nothing: beside it stands, in the pixels and in the map, how many of each point's nearest neighbours
are of the other set, and how many there would be if the two sets were one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchvision.ops import box_convert

from carim_aug.ops.images import resize
from carim_aug.ops.random import fold
from train.common.images import ImageSet
from train.gan.batch import crop_at
from train.metrics.generator_quality import MOST_BOXES, one_each
from train.metrics.statistics import neighbour_mixing
from train.reproduction.figures.samples import as_picture, draw_boxes, generate

CROP, ENLARGED = 50, 256  # side of the crops, in pixels of an image of the second side
SIDE = 64  # images larger than this are reduced to it before they are embedded
COMPONENTS = 50  # of PCA, at most
SETS = ("real normal", "real nodule", "synthetic normal", "synthetic nodule")
"""The sets of both figures, in the order (a) to (d) of Ann (2021)."""
CONTROL = "real normal at boxes"
"""A set that Ann (2021) lacks: crops of real normal images at real nodules' boxes, so that places are alike."""
QUESTIONS = (
    ("synthetic normal", "real normal"),
    ("synthetic nodule", "real nodule"),
    ("real nodule", "real normal"),
    ("real nodule", CONTROL),
    ("synthetic nodule", "synthetic normal"),
)
"""Of whose neighbours it is asked how many are of which other set: alike within a class? apart between classes?"""
_COLOURS = ("#1f4e9c", "#d62728", "#2aa876", "#ff8c1a", "#9467bd", "#8c564b", "#e377c2", "#333333")
_FEW = 200  # points of a set below which they are large


class Sets(NamedTuple):
    """Images (n, 1, S, S) of `SETS`, and crops (n, 1, CROP, CROP) of these and of `CONTROL`, float in [-1, 1]."""

    images: dict[str, Tensor]
    crops: dict[str, Tensor]


@dataclass(frozen=True)
class Points:
    """Images as points."""

    names: tuple[str, ...]  # of the sets
    sets: Tensor  # (N,) int64, each point's set
    pixels: Tensor  # (N, d) float32
    map: Tensor  # (N, 2) float32, t-SNE's
    about: dict[str, Any]  # JSON types: counts, settings, share of variance in the components, t-SNE's divergence


def image_sets(source: Any, prior: Any, real: ImageSet, *, n: int = 1000, seed: int = 0) -> Sets:
    """Return the sets of Fig. 4 (images) and Fig. 5 (crops) for one generator, from real images at 256 pixels.

    Real normal images: one of each patient, n at most. Real nodules: every boxed image once, at its first box (the
    official one, if it has one); images of more than `MOST_BOXES` boxes are left out. Synthetic ones: n of a class,
    each with its own z. Real images come at the generator's size, lest finer pixels alone tell them apart. Crops of
    nodules are about the box or the mask, those of synthetic normal images about a mask that was not given, those of
    real normal images anywhere in the prior's lung field, and again, as `CONTROL`, about the boxes of real nodules.
    A model that knows no place is cropped about the mask all the same, as in Ann (2021) where none was seen.
    """
    real.check("real images", normal=1, boxed=1)
    size, generator = source.image_size, torch.Generator().manual_seed(fold(seed, 40))
    images, centres = {}, {}

    def real_images(rows: Tensor) -> Tensor:
        return torch.cat([resize(real.symmetric(part), (size, size)) for part in rows.split(256)])

    # Real images.
    normal = real.normal[one_each(real.patients[real.normal], generator)[:n]]
    images["real normal"] = real_images(normal)
    cells = prior.field.nonzero().flip(1)  # x, y
    corners = cells[torch.randint(len(cells), (len(normal),), generator=generator)]
    centres["real normal"] = (corners + torch.rand(len(normal), 2, generator=generator)) / len(prior.field)
    nodule = [i for i in real.boxed.tolist() if len(real.boxes[i]) <= MOST_BOXES]
    images["real nodule"] = real_images(torch.tensor(nodule))
    centres["real nodule"] = torch.stack([box_convert(real.boxes[i][0], "xyxy", "cxcywh")[:2] for i in nodule])

    # Synthetic ones.
    for number, name in enumerate(SETS[2:]):
        boxes = draw_boxes(prior, n, seed=fold(seed, 41, number))
        seeds = [fold(seed, 42, number, i) for i in range(n)]
        images[name] = generate(source, boxes if name == "synthetic nodule" else None, seeds)
        centres[name] = box_convert(boxes, "xyxy", "cxcywh")[:, :2]
    cut = {name: crops(images[name], centres[name]) for name in SETS}
    again = torch.arange(len(normal)) % len(nodule)
    cut[CONTROL] = crops(images["real normal"], centres["real nodule"][again])
    return Sets(images, cut)


def crops(images: Tensor, centres: Tensor) -> Tensor:
    """Return windows (n, 1, CROP, CROP) of images (n, 1, S, S), enlarged to 256 pixels first, if they are smaller.

    Centres are (n, 2), x and y in [0, 1]; a window that would pass the edge is moved inside.
    """
    if len(centres) != len(images):
        raise ValueError(f"centres must be of {len(images)} images, got {len(centres)}")
    large = max(ENLARGED, images.shape[-1])
    cut = []
    for some, places in zip(images.split(64), (centres * large).split(64), strict=True):
        cut.append(crop_at(resize(some, (large, large)), places.repeat(1, 2), CROP, torch.zeros(2)))
    return torch.cat(cut)


def embed(sets: Mapping[str, Tensor], *, seed: int = 0, perplexity: float = 30, side: int = SIDE) -> Points:
    """Return images (n, 1, S, S) float of each set as points: pixels, and t-SNE of their principal components in 2-D.

    Images larger than `side` are reduced to it first; the perplexity is at least 1 and less than their number.
    """
    shapes = {name: tuple(images.shape) for name, images in sets.items()}
    if len({shape[1:] for shape in shapes.values()}) != 1:
        raise ValueError(f"sets must be images of one shape, got {shapes}")
    counts = {name: len(images) for name, images in sets.items()}
    total, first = sum(counts.values()), next(iter(sets.values()))
    if min(counts.values()) < 1:
        raise ValueError(f"sets must have at least one image each, got {counts}")
    if not 1 <= perplexity < total:
        raise ValueError(f"perplexity must be at least 1 and less than the {total} images, got {perplexity}")
    if first.ndim != 4 or not all(images.is_floating_point() for images in sets.values()):
        raise ValueError(f"sets must be (n, 1, S, S) float, got {tuple(first.shape)} {first.dtype}")

    small = (side, side) if first.shape[-1] > side else first.shape[-2:]
    parts = [resize(part, small).flatten(1) for images in sets.values() for part in images.split(256)]
    pixels = torch.cat(parts).float().cpu()
    state = fold(seed, 43) % 2**32
    pca = PCA(min(COMPONENTS, *pixels.shape), svd_solver="randomized", random_state=state)
    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=state)
    with threadpool_limits(1):  # sums do not depend on how many cores there are
        place = torch.from_numpy(tsne.fit_transform(pca.fit_transform(pixels.numpy()))).float()
    about = {
        "n": counts,
        "side": int(small[0]),
        "components": int(pca.n_components_),
        "variance": float(pca.explained_variance_ratio_.sum()),
        "perplexity": float(perplexity),
        "divergence": float(tsne.kl_divergence_),
    }
    numbers = torch.arange(len(sets)).repeat_interleave(torch.tensor(list(counts.values())))
    return Points(tuple(sets), numbers, pixels, place, about)


def embedding_figures(points: Points, *, k: int = 10, draws: int = 1000) -> dict[str, Any]:
    """Return what the scatter seems to show in numbers: `neighbour_mixing` of those of `QUESTIONS` that are there.

    It is asked in the pixels and on the map; draws are of the permutation test.
    """
    rows: dict[str, Any] = {}
    for number, pair in enumerate(pair for pair in QUESTIONS if set(pair) <= set(points.names)):
        first, second = (points.sets == points.names.index(name) for name in pair)
        rows[" | ".join(pair)] = {
            space: neighbour_mixing(places[first], places[second], k=k, draws=draws, seed=fold(0, 44, number))
            for space, places in (("pixels", points.pixels), ("map", points.map))
        }
    return {**points.about, "k": k, "neighbours": rows}


def scatter(points: Points, *, title: str) -> Image.Image:
    """Draw the map: all sets together, smaller ones on top, and each alone before the others in grey.

    The axes of t-SNE have no unit and no meaning.
    """
    about, counts = points.about, points.about["n"]
    columns = 1 + (len(points.names) + 1) // 2
    figure = Figure(figsize=(5.8 + 2.6 * (columns - 1), 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 1 + columns)
    together = figure.add_subplot(grid[:, :2])
    for name in sorted(points.names, key=lambda name: -counts[name]):
        _draw(together, points, name, label=f"{name} ({counts[name]})")
    text = f"t-SNE, perplexity {about['perplexity']:g}, of {about['components']} principal components of"
    text += f" {about['side']} x {about['side']} pixels ({about['variance']:.0%} of the variance)"
    together.set(title=title, xticks=[], yticks=[])
    together.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, markerscale=1.5)
    for number, name in enumerate(points.names):
        alone = figure.add_subplot(grid[number % 2, 2 + number // 2])
        alone.scatter(points.map[:, 0].numpy(), points.map[:, 1].numpy(), s=2, color="#d9d9d9", edgecolors="none")
        _draw(alone, points, name)
        alone.set(title=name, xticks=[], yticks=[])
    figure.supxlabel(text, fontsize="medium")
    return as_picture(figure, f"{title}; {text}; carim_aug")


def _draw(axes: Axes, points: Points, name: str, *, label: str | None = None) -> None:
    number = points.names.index(name)
    x, y = points.map[points.sets == number].T.numpy()
    few = len(x) < _FEW
    look: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "marker": "^" if "nodule" in name else "o"}
    look |= {"edgecolors": "black", "linewidths": 0.5} if few else {"edgecolors": "none", "linewidths": 0}
    axes.scatter(x, y, s=24 if few else 7, alpha=1.0 if few else 0.55, label=label, **look)
