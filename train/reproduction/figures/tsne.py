"""t-SNE of real and synthetic films and of crops about their nodules, the source's Fig. 4 and Fig. 5 (METHOD 8).

A scatter proves nothing: beside it stands, in the pixels and in the map, how many of each point's nearest neighbours
are of the other set, and how many there would be if the two sets were one (Schilling 1986; Henze 1988).
"""

from collections.abc import Mapping, Sequence
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

from carim_aug.generators.base import Generator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.images import resize
from carim_aug.ops.random import fold
from train.metrics.generator_quality import MOST_BOXES, average, one_each
from train.reproduction.figures.same_noise import as_picture, draw_boxes, draw_noise, renderer
from train.reproduction.sources import SIZE, Patients, scaled

CROP = 50
"""Side of the crops in pixels of a film of `SIZE`."""
SIDE = 64
"""Films larger than this are reduced to it before they are embedded."""
SETS = ("real normal", "real nodule", "synthetic normal", "synthetic nodule")
"""The sets of both figures, in the source's order (a) to (d)."""
CONTROL = "real normal at boxes"
"""A set that the source lacks: crops of real normal films at the real nodules' boxes, so that places are alike."""
QUESTIONS = (
    ("synthetic normal", "real normal"),
    ("synthetic nodule", "real nodule"),
    ("real nodule", "real normal"),
    ("real nodule", CONTROL),
    ("synthetic nodule", "synthetic normal"),
)
"""Of whose neighbours it is asked how many are of which other set: alike within a class? apart between classes?"""
_COLOURS = ("#1f4e9c", "#d62728", "#2aa876", "#ff8c1a", "#9467bd", "#8c564b", "#e377c2", "#333333")
_FEW = 200  # points of a set that are drawn large


class Sets(NamedTuple):
    """Films (n, 1, S, S) of `SETS`, and crops (n, 1, CROP, CROP) of these and of `CONTROL`, float in [-1, 1]."""

    films: dict[str, Tensor]
    crops: dict[str, Tensor]


@dataclass(frozen=True)
class Points:
    """Images as points.

    Attributes:
        names: of the sets.
        sets: (N,) int64, each point's set.
        pixels: (N, d) float32.
        map: (N, 2) float32, t-SNE's.
        about: plain JSON types: numbers of the sets and settings of the embedding, the share of the variance that the
            components keep, t-SNE's divergence.
    """

    names: tuple[str, ...]
    sets: Tensor
    pixels: Tensor
    map: Tensor
    about: dict[str, Any]


def film_sets(
    generator: Generator, prior: LocationPrior, real: Patients, *, n: int = 1000, seed: int = 0, batch: int = 50
) -> Sets:
    """Gives the sets of Fig. 4 (films) and Fig. 5 (crops) for one generator.

    Real normal films: one of each patient, n at most. Real nodules: every boxed film once, at its first box (the
    official one, if it has one); films of more than `MOST_BOXES` boxes are left out. Synthetic ones: n of a class, each
    with its own z. Real films come at the generator's size, lest their finer pixels alone tell them apart. Crops of
    nodules are about the box or the mask, those of synthetic normal films about a mask that was not given, those of
    real normal films anywhere in the prior's lung field, and again, as `CONTROL`, about the boxes of real nodules.
    A model that places no nodules is cropped about the mask all the same, as the source does where none was seen.

    Args:
        generator: see `carim_aug.generators.base`.
        prior: of masks, and of the lung field.
        real: real films at 256 pixels.
        n: synthetic films of a class.
        seed: of all draws.
        batch: images at once.
    """
    size, render = generator.image_size, renderer(generator, batch=batch)
    chance = torch.Generator().manual_seed(fold(seed, 40))
    films, centres = {}, {}

    def films_at(rows: Tensor) -> Tensor:
        return torch.cat([resize(scaled(part), (size, size)) for part in rows.split(256)])

    # Real films.
    rows = one_each(real.normal_patients, chance)[:n]
    films["real normal"] = films_at(real.normal[rows])
    cells = prior.field.nonzero().flip(1)  # x, y
    drawn = cells[torch.randint(len(cells), (len(rows),), generator=chance)]
    centres["real normal"] = (drawn + torch.rand(len(rows), 2, generator=chance)) / torch.tensor(prior.field.shape)
    few = real.films.bincount()[real.films] <= MOST_BOXES
    first = torch.cat([torch.tensor([True]), real.films[1:] != real.films[:-1]])
    films["real nodule"] = films_at(real.nodule[few & first])
    centres["real nodule"] = _centres(real.boxes[few & first] / SIZE)

    # Synthetic ones.
    for number, name in enumerate(SETS[2:]):
        boxes = draw_boxes(prior, n, seed=fold(seed, 41, number))
        noise = draw_noise(generator, n, seed=fold(seed, 42, number))
        films[name] = render(noise, boxes * size if name == "synthetic nodule" else None)
        centres[name] = _centres(boxes)
    cut = {name: crops(films[name], centres[name]) for name in SETS}
    normal, boxed = films["real normal"], centres["real nodule"]
    cut[CONTROL] = crops(normal, boxed[torch.arange(len(normal)) % len(boxed)])
    return Sets(films, cut)


def crops(films: Tensor, centres: Tensor, *, side: int = CROP) -> Tensor:
    """Gives windows of films that are enlarged to 256 pixels first, if they are smaller.

    Args:
        films: (n, 1, S, S) float.
        centres: (n, 2) of the windows, x and y in [0, 1]; a window that would pass the edge is moved inside.
        side: of a window in pixels.

    Returns:
        (n, 1, side, side).
    """
    if len(centres) != len(films):
        raise ValueError(f"centres must be of {len(films)} films, got {len(centres)}")
    at = max(SIZE, films.shape[-1])
    corners = (centres * at - side / 2).round().long().clamp(0, at - side).tolist()
    cut = []
    for film, (x, y) in zip(films, corners, strict=True):
        cut.append(resize(film[None], (at, at))[0, :, y : y + side, x : x + side])
    return torch.stack(cut)


def embed(
    sets: Mapping[str, Tensor], *, seed: int = 0, perplexity: float = 30, components: int = 50, side: int = SIDE
) -> Points:
    """Gives images as points: pixels, their principal components, t-SNE of these in two dimensions.

    Args:
        sets: names and images (n, 1, S, S) float, S the same for all.
        seed: of PCA and t-SNE.
        perplexity: of t-SNE, at least 1 and less than the number of images.
        components: of PCA, at most.
        side: images larger than this are reduced to it first.

    Raises:
        ValueError: sets or numbers that break their rules.
    """
    if not sets or len({tuple(images.shape[1:]) for images in sets.values()}) != 1:
        raise ValueError(
            f"sets must be images of one shape, got { {name: tuple(images.shape) for name, images in sets.items()} }"
        )
    counts = {name: len(images) for name, images in sets.items()}
    total = sum(counts.values())
    if min(counts.values()) < 1:
        raise ValueError(f"sets must have at least one image each, got {counts}")
    if not 1 <= perplexity < total:
        raise ValueError(f"perplexity must be at least 1 and less than the {total} images, got {perplexity}")
    first = next(iter(sets.values()))
    if first.ndim != 4 or not all(images.is_floating_point() for images in sets.values()):
        raise ValueError(f"sets must be (n, 1, S, S) float, got {tuple(first.shape)} {first.dtype}")

    small = (side, side) if first.shape[-1] > side else first.shape[-2:]
    parts = [resize(part, small).flatten(1) for images in sets.values() for part in images.split(256)]
    pixels = torch.cat(parts).float().cpu()
    state = fold(seed, 43) % 2**32
    pca = PCA(min(components, *pixels.shape), svd_solver="randomized", random_state=state)
    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=state)
    with threadpool_limits(1):  # sums do not depend on how many cores there are
        place = torch.from_numpy(tsne.fit_transform(pca.fit_transform(pixels.numpy()))).float()
    about = {
        "n": counts,
        "side": int(small[0]),
        "components": int(pca.n_components_),
        "variance_kept": float(pca.explained_variance_ratio_.sum()),
        "perplexity": float(perplexity),
        "divergence": float(tsne.kl_divergence_),
    }
    return Points(tuple(sets), torch.arange(len(sets)).repeat_interleave(_counts(counts)), pixels, place, about)


def embedding_figures(
    points: Points,
    *,
    questions: Sequence[tuple[str, str]] | None = None,
    k: int = 10,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Gives what the scatter seems to show in numbers.

    Args:
        points: of `embed`.
        questions: pairs of sets (first, second); None: those of `QUESTIONS` whose sets are there.
        k: neighbours.
        draws: of the permutation test.
        seed: of the permutations.

    Returns:
        `points.about` and "neighbours": "first | second" to "pixels" and "map", each as `mixing` gives it.

    Raises:
        ValueError: a set that is not there, or too many neighbours.
    """
    if questions is None:
        questions = [pair for pair in QUESTIONS if set(pair) <= set(points.names)]
    rows: dict[str, Any] = {}
    for number, (first, second) in enumerate(questions):
        for name in (first, second):
            if name not in points.names:
                raise ValueError(f"questions must be about sets {points.names}, got {name!r}")
        of = [(points.sets == points.names.index(name)).nonzero()[:, 0] for name in (first, second)]
        rows[f"{first} | {second}"] = {
            space: mixing(places[of[0]], places[of[1]], k=k, draws=draws, seed=fold(seed, 44, number))
            for space, places in (("pixels", points.pixels), ("map", points.map))
        }
    return {**points.about, "k": k, "neighbours": rows}


def mixing(first: Tensor, second: Tensor, *, k: int = 10, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Gives the share of the first set's k nearest neighbours, among both sets, that are of the second.

    Args:
        first: (n, d).
        second: (m, d).
        k: neighbours, less than n + m.
        draws: permutations of which point is of which set.
        seed: of the permutations.

    Returns:
        "value" with "low" and "high", its 95 % interval over the first set's points; "expected", m / (n + m - 1), the
        share if the sets were one; "ratio", value / expected; "mixed", the middle 95 % of the permuted shares; "p", how
        often these are as small: 1 / (draws + 1) at least. Points are taken to be independent.

    Raises:
        ValueError: shapes that do not fit, or numbers out of their range.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise ValueError(f"first and second must be (n, d) and (m, d), got {tuple(first.shape)}, {tuple(second.shape)}")
    n, total = len(first), len(first) + len(second)
    if not 1 <= k < total:
        raise ValueError(f"k must be at least 1 and less than the {total} points, got {k}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    points = torch.cat([first, second]).double()
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    nearest = distances.topk(k, largest=False).indices  # (n + m, k)

    def shares(is_second: Tensor) -> Tensor:
        return is_second[nearest[~is_second]].double().mean(dim=1)

    is_second = torch.arange(total) >= n
    found = shares(is_second)
    chance = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(total, generator=chance) for _ in range(draws))
    mixed = torch.stack([shares(is_second[order]).mean() for order in orders])
    value, expected = float(found.mean()), len(second) / (total - 1)
    low, high = mixed.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        **average(found),
        "expected": expected,
        "ratio": value / expected,
        "mixed": {"low": low, "high": high},
        "p": (1 + int((mixed <= value).sum())) / (draws + 1),
    }


def scatter(points: Points, *, title: str) -> Image.Image:
    """Gives the map as a picture: all sets together, smaller ones on top, and each alone before the others in grey.

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
    text += f" {about['side']} x {about['side']} pixels ({about['variance_kept']:.0%} of the variance)"
    together.set(title=title, xticks=[], yticks=[])
    together.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, markerscale=1.5)
    for number, name in enumerate(points.names):
        alone = figure.add_subplot(grid[number % 2, 2 + number // 2])
        x, y = points.map.T.numpy()
        alone.scatter(x, y, s=2, color="#d9d9d9", edgecolors="none")
        _draw(alone, points, name)
        alone.set(title=name, xticks=[], yticks=[])
    figure.supxlabel(text, fontsize="medium")
    return as_picture(figure, f"{title}; {text}; carim_aug")


def _draw(axes: Axes, points: Points, name: str, *, label: str | None = None) -> None:
    number = points.names.index(name)
    x, y = points.map[points.sets == number].T.numpy()
    few = len(x) < _FEW
    axes.scatter(
        x,
        y,
        s=24 if few else 7,
        marker="^" if "nodule" in name else "o",
        color=_COLOURS[number % len(_COLOURS)],
        alpha=1.0 if few else 0.55,
        edgecolors="black" if few else "none",
        linewidths=0.5 if few else 0,
        label=label,
    )


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _counts(counts: Mapping[str, int]) -> Tensor:
    return torch.tensor(list(counts.values()))
