"""Same-noise pictures of any generator, the source's Fig. 3 and Fig. 6, and the numbers of the latter (METHOD 8).

Every sample has its own seed: sample i has the same place, relative to the image, and the same first numbers of z
whatever the generator's size and however many samples are asked for.
"""

import io
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

from carim_aug.generators.base import Generator, places_nodules
from carim_aug.generators.render import Renderer
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import MaskShape, boxes_to_masks, dilate_boxes
from carim_aug.ops.images import resize
from carim_aug.ops.random import fold, noise, stream
from carim_aug.tools.plots import ZOOM, outline
from train.metrics.generator_quality import Pairs, average, one_each, one_mask
from train.reproduction.sources import Patients, scaled

Render = Callable[..., Tensor]
"""(noise (n, noise_dim), boxes (n, 4) in pixels or None, shape of the mask) to images (n, 1, S, S) on the CPU."""

COLOURS = "RdBu_r"
"""Of signed differences: red where the nodule's film is brighter, blue where it is darker."""
GROW = 0.25
"""By which part of its width and height the mask is dilated on each side."""
MOST_TRIES = 200
"""Draws for a place apart from another one."""
_GAP, _LINE, _FONT, _LABEL = 4, 18, 13, 16  # pixels between panels, of a line, of its letters; letters of a label


def draw_boxes(prior: LocationPrior, n: int, *, seed: int, apart: Tensor | None = None) -> Tensor:
    """Gives the first box of each of the prior's draws, (n, 4) XYXY in [0, 1].

    Args:
        prior: of the places.
        n: boxes, at least 1.
        seed: of all draws.
        apart: (n, 4) XYXY in [0, 1]; each box is drawn until it does not touch its own, grown by `GROW`.

    Raises:
        ValueError: n below 1, or no place apart from the given one.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    kept = [] if apart is None else dilate_boxes(apart, GROW, 1).tolist()
    if apart is not None and len(kept) != n:
        raise ValueError(f"apart must be of {n} boxes, got {len(kept)}")
    boxes = []
    for i in range(n):
        rng, there = stream(seed, 0, i), kept[i : i + 1]
        for _ in range(MOST_TRIES):
            box = prior.draw(rng)[0]
            if all(box[2] <= x1 or x2 <= box[0] or box[3] <= y1 or y2 <= box[1] for x1, y1, x2, y2 in there):
                break
        else:
            raise ValueError(f"prior must have places apart from {there[0]}, got none in {MOST_TRIES} draws")
        boxes.append(torch.from_numpy(box))
    return torch.stack(boxes)


def draw_noise(generator: Generator, n: int, *, seed: int) -> Tensor:
    """Gives z of n samples, (n, noise_dim) float32."""
    return noise([fold(seed, i) for i in range(n)], generator.noise_dim)


def renderer(generator: Generator, *, batch: int = 50) -> Render:
    """Gives a function from noise and boxes to images, batch by batch, where the generator's weights are."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    size = generator.image_size
    weights = list(generator.parameters()) if isinstance(generator, nn.Module) else []
    where = weights[0].device if weights else torch.device("cpu")
    fast = Renderer(generator).on(where)

    def render(noise: Tensor, boxes: Tensor | None, shape: MaskShape = "box") -> Tensor:
        masks = torch.zeros(len(noise), 1, size, size)
        if boxes is not None:
            masks = boxes_to_masks(list(boxes[:, None]), size, shape=shape)
        parts = zip(noise.split(batch), masks.split(batch), strict=True)
        with torch.inference_mode():
            return torch.cat([fast(z.to(where), m.to(where)).float().cpu() for z, m in parts])

    return render


def pairs_of(generator: Generator, prior: LocationPrior, *, n: int, seed: int = 0, batch: int = 50) -> Pairs:
    """Gives matched pairs of any generator, as `train.metrics.generator_quality` measures them.

    Args:
        generator: see `carim_aug.generators.base`.
        prior: of the places.
        n: pairs.
        seed: of places and noise.
        batch: images at once.
    """
    boxes = draw_boxes(prior, n, seed=fold(seed, 31)) * generator.image_size
    z, render = draw_noise(generator, n, seed=fold(seed, 30)), renderer(generator, batch=batch)
    return Pairs(z, boxes, render(z, None), render(z, boxes), render)


def same_noise_grid(
    generators: Mapping[str, Generator],
    prior: LocationPrior,
    *,
    real: Patients | None = None,
    columns: int = 6,
    seed: int = 0,
    size: int = 160,
) -> Image.Image:
    """Fig. 3: two rows a model, without and with a nodule from the same z, a column a sample.

    Where the generator places nodules, the mask is outlined and a third row magnifies what is in and around it. (Of the
    other models the source outlines what a radiologist or CheXNet took for a nodule; nothing is outlined here.)

    Args:
        generators: names and generators, of any size.
        prior: of the places, which are the same for all.
        real: real films above, boxes outlined and magnified; films of other patients each.
        columns: samples, at least 1.
        seed: of places, noise and real films.
        size: side of a panel in pixels, at least 32.

    Returns:
        An RGB picture; `info["carim_aug"]` says what it is. With `real` it holds X-rays of patients.

    Raises:
        ValueError: no generator, or numbers that break their rules.
    """
    if not generators:
        raise ValueError("generators must be at least one, got none")
    _check_size(size)
    rows: dict[str, Tensor] = {}
    if real is not None:
        rows |= _real_rows(real, columns, seed, size)
    for name, generator in generators.items():
        pairs = pairs_of(generator, prior, n=columns, seed=seed)
        rows[f"{name}: normal"] = _grey(pairs.without, size)
        if places_nodules(generator):
            rows |= _nodule_rows(name, pairs.nodule, pairs.boxes, size)
        else:
            rows[f"{name}: nodule"] = _grey(pairs.nodule, size)
    kind = "Synthetic" if real is None else "Synthetic but the rows of real films"
    outlined = "Outlined: the mask, of models that place nodules" + ("." if real is None else ", and real boxes.")
    about = f"{kind}; the rows of a model are of the same z. {outlined} {_who(generators)}; seed {seed}."
    return _sheet(rows, about)


def difference_grid(
    generator: Generator, prior: LocationPrior, *, columns: int = 6, seed: int = 0, size: int = 160
) -> Image.Image:
    """Fig. 6: a normal and a nodule film of the same z, their signed difference in colours, the mask.

    Args:
        generator: see `carim_aug.generators.base`.
        prior: of the places.
        columns: samples, at least 1.
        seed: of places and noise.
        size: side of a panel in pixels, at least 32.

    Returns:
        An RGB picture; the colours' scale, the same for all, is told below it and in `info["carim_aug"]`.

    Raises:
        ValueError: numbers that break their rules.
    """
    _check_size(size)
    pairs = pairs_of(generator, prior, n=columns, seed=seed)
    most = max(float(pairs.differences.abs().max()), 1e-6)
    masks = boxes_to_masks(list(pairs.boxes[:, None]), generator.image_size)
    shown = matplotlib.colormaps[COLOURS]((resize(pairs.differences / most, (size, size))[:, 0] + 1).numpy() / 2)
    colours = (torch.from_numpy(shown[..., :3]).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
    rows = {
        "normal: G(z, 0)": _grey(pairs.without, size),
        "nodule: G(z, C)": _grey(pairs.nodule, size),
        "nodule - normal": colours,
        "mask C": _grey(F.interpolate(masks, (size, size)) * 2 - 1, size),  # nearest: pixels as they are
    }
    about = f"Synthetic. Difference: white 0, darkest red +{most:.2g}, darkest blue -{most:.2g}, of films in [-1, 1]"
    if not places_nodules(generator):
        about += "; this model takes of the mask only that there is one"
    return _sheet(rows, f"{about}. {_who({'': generator})}; seed {seed}.")


def difference_figures(
    generator: Generator, prior: LocationPrior, *, n: int = 300, seed: int = 0, batch: int = 50
) -> dict[str, Any]:
    """Gives Fig. 6 in numbers: how much of the difference, and whether its brightest pixel, lies in the mask.

    Beside them what chance alone would give, the mask's share of the film; for "energy" both are of the mask dilated by
    `GROW` on every side.

    Args:
        generator: see `carim_aug.generators.base`.
        prior: of the places.
        n: pairs.
        seed: of places and noise.
        batch: images at once.

    Returns:
        Plain JSON types: "places", whether the generator knows where the mask is; "energy" and "hit" with
        "energy_chance" and "hit_chance"; further entries as `train.metrics.generator_quality.one_mask` gives them.
    """
    pairs, size = pairs_of(generator, prior, n=n, seed=seed, batch=batch), generator.image_size
    dilated = boxes_to_masks(list(dilate_boxes(pairs.boxes, GROW, size)[:, None]), size)
    return {
        "places": places_nodules(generator),
        **one_mask(pairs.differences, pairs.boxes),
        "energy_chance": average(dilated.mean(dim=(1, 2, 3))),
        "hit_chance": average(boxes_to_masks(list(pairs.boxes[:, None]), size).mean(dim=(1, 2, 3))),
    }


def as_picture(figure: Figure, about: str) -> Image.Image:
    """Gives a matplotlib figure as an RGB picture whose `info["carim_aug"]` is `about`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    picture = Image.open(file).convert("RGB")
    picture.info["carim_aug"] = about
    return picture


def _real_rows(real: Patients, columns: int, seed: int, size: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(fold(seed, 32))
    normal = one_each(real.normal_patients, chance)
    nodule = one_each(real.nodule_patients, chance)
    least = min(len(normal), len(nodule))
    if least < columns:
        raise ValueError(f"real must be of at least {columns} patients of each class, got {least}")
    nodule = nodule[:columns]
    rows = {"real: normal": _grey(scaled(real.normal[normal[:columns]]), size)}
    return rows | _nodule_rows("real", scaled(real.nodule[nodule]), real.boxes[nodule], size)


def _check_size(size: int) -> None:
    if size < 32:
        raise ValueError(f"size must be at least 32, got {size}")


def _who(generators: Mapping[str, Generator]) -> str:
    hashes = [f"{name} {generator.weights_hash[:12]}".strip() for name, generator in generators.items()]
    return "carim_aug, weights " + ", ".join(hashes)


def _grey(images: Tensor, size: int) -> Tensor:
    """Images (n, 1, S, S) in [-1, 1] as (n, 3, size, size) uint8."""
    square = resize(images, (size, size)).clamp(-1, 1)
    return ((square + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)


def _nodule_rows(name: str, images: Tensor, boxes: Tensor, size: int) -> dict[str, Tensor]:
    """Images (n, 1, S, S) with their boxes (n, 4) outlined, and windows of S / ZOOM around the boxes as they are."""
    side, scale = images.shape[-1], size / images.shape[-1]
    wide = max(1, side // ZOOM)
    corners = ((boxes[:, :2] + boxes[:, 2:] - wide) / 2).round().long().clamp(0, side - wide).tolist()
    crops = [image[:, y : y + wide, x : x + wide] for image, (x, y) in zip(images, corners, strict=True)]
    panels = zip(_grey(images, size), boxes * scale, strict=True)
    return {
        f"{name}: nodule": torch.stack([outline(panel, box[None]) for panel, box in panels]),
        f"{name}: nodule, x{ZOOM}": _grey(torch.stack(crops), size),
    }


def _sheet(rows: Mapping[str, Tensor], about: str) -> Image.Image:
    """Rows of panels (n, 3, s, s), each with its label at the left, and lines of text below."""
    grid = make_grid(torch.cat(list(rows.values())), nrow=len(next(iter(rows.values()))), padding=_GAP, pad_value=255)
    step = next(iter(rows.values())).shape[-1] + _GAP
    font = ImageFont.load_default(_FONT)
    labels = [textwrap.fill(label, _LABEL) for label in rows]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    gutter = _GAP + int(max(pen.multiline_textbbox((0, 0), label, font=font)[2] for label in labels)) + _GAP
    width = gutter + grid.shape[2]
    lines = textwrap.wrap(about, max(20, int(width / (_FONT * 0.55))))

    sheet = Image.new("RGB", (width, grid.shape[1] + _LINE * len(lines)), "white")
    sheet.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (gutter, 0))
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        pen.multiline_text((_GAP, 2 * _GAP + i * step), label, fill="black", font=font)
    for i, line in enumerate(lines):
        pen.text((_GAP, grid.shape[1] + i * _LINE), line, fill="black", font=font)
    sheet.info["carim_aug"] = about
    return sheet
