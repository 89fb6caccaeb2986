"""Same-noise pictures of any generator: Fig. 3 and Fig. 6 of Ann (2021), and the numbers of the latter."""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from carim_aug.location.prior import Prior
from carim_aug.ops.boxes import boxes_to_masks, dilate_boxes
from carim_aug.ops.images import resize
from carim_aug.ops.random import fold
from carim_aug.tools.plots import ZOOM, outline
from train.common.images import ImageSet
from train.gan.batch import crop_at
from train.metrics.generator_quality import one_each, one_mask
from train.metrics.statistics import average
from train.reproduction.figures.samples import GROW, check_least, knows_place, pairs_of

COLOURS = "RdBu_r"  # of signed differences: red where the nodule's image is brighter, blue where it is darker
_GAP, _LINE, _FONT, _LABEL = 4, 18, 13, 16  # pixels between panels, of a line, of its letters; letters of a label


def same_noise_grid(
    sources: Mapping[str, Any],
    prior: Prior,
    *,
    real: ImageSet | None = None,
    columns: int = 6,
    seed: int = 0,
    size: int = 160,
) -> Image.Image:
    """Draw Fig. 3: two rows a model, without and with a nodule from the same z, a column a sample, `size` px a panel.

    Where the generator knows the place, the mask is outlined and a third row magnifies what is in and around it. (Of
    the other models Ann (2021) outlines what a radiologist or CheXNet took for a nodule; nothing is outlined here.)
    Real images, of other patients each, come above, their boxes outlined and magnified: then it holds X-rays of
    patients. `info["carim_aug"]` says what the picture is.
    """
    if not sources:
        raise ValueError("sources must be at least one, got none")
    check_least(32, size=size)
    rows = {} if real is None else _real_rows(real, columns, seed, size)
    for name, source in sources.items():
        pairs = pairs_of(source, prior, columns, seed=seed)
        rows[f"{name}: normal"] = _grey(pairs.without, size)
        if knows_place(source):
            rows |= _nodule_rows(name, pairs.nodule, pairs.boxes, size)
        else:
            rows[f"{name}: nodule"] = _grey(pairs.nodule, size)
    kind = "Synthetic" if real is None else "Synthetic but the rows of real images"
    outlined = "Outlined: the mask, of models that know it" + ("." if real is None else ", and real boxes.")
    return _sheet(rows, f"{kind}; the rows of a model are of the same z. {outlined} {_hashes(sources)}; seed {seed}.")


def difference_grid(source: Any, prior: Prior, *, columns: int = 6, seed: int = 0, size: int = 160) -> Image.Image:
    """Draw Fig. 6: a normal and a nodule image of the same z, their signed difference in colours, the mask.

    The colours' scale, the same for all, is given below and in `info["carim_aug"]`.
    """
    check_least(32, size=size)
    pairs = pairs_of(source, prior, columns, seed=seed)
    most = max(float(pairs.differences.abs().max()), 1e-6)
    masks = boxes_to_masks(list(pairs.boxes[:, None]), source.image_size)
    shown = matplotlib.colormaps[COLOURS]((resize(pairs.differences / most, (size, size))[:, 0] + 1).numpy() / 2)
    rows = {
        "normal: G(z, 0)": _grey(pairs.without, size),
        "nodule: G(z, C)": _grey(pairs.nodule, size),
        "nodule - normal": (torch.from_numpy(shown[..., :3]).permute(0, 3, 1, 2) * 255).round().to(torch.uint8),
        "mask C": _grey(F.interpolate(masks, (size, size)) * 2 - 1, size),  # nearest: pixels as they are
    }
    about = f"Synthetic. Difference: white 0, darkest red +{most:.2g}, darkest blue -{most:.2g}, of images in [-1, 1]"
    if not knows_place(source):
        about += "; this model takes of the mask only that there is one"
    return _sheet(rows, f"{about}. {_hashes({'': source})}; seed {seed}.")


def difference_figures(
    source: Any, prior: Prior, *, n: int = 300, seed: int = 0, batch: int = 50, device: str = "cpu"
) -> dict[str, Any]:
    """Return Fig. 6 in numbers: how much of the difference, and whether its brightest pixel, lies in the mask.

    "energy" and "hit" are those of `one_mask`; beside them what chance alone would give, the mask's share of the image,
    for "energy" of the mask dilated by `GROW` on every side. "places": whether the generator knows where the mask is.
    """
    pairs, size = pairs_of(source, prior, n, seed=seed, batch=batch, device=device), source.image_size
    dilated = boxes_to_masks(list(dilate_boxes(pairs.boxes, GROW, size)[:, None]), size)
    return {
        "places": knows_place(source),
        **one_mask(pairs.differences, pairs.boxes),
        "energy_chance": average(dilated.mean(dim=(1, 2, 3))),
        "hit_chance": average(boxes_to_masks(list(pairs.boxes[:, None]), size).mean(dim=(1, 2, 3))),
    }


def _real_rows(real: ImageSet, columns: int, seed: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(fold(seed, 32))
    rows, boxes = real.each_box()
    normal = real.normal[one_each(real.patients[real.normal], generator)]
    nodule = one_each(real.patients[rows], generator)[:columns]
    least = min(len(normal), len(nodule))
    if least < columns:
        raise ValueError(f"real must be of at least {columns} patients of each class, got {least}")
    images, own = real.symmetric(rows[nodule]), boxes[nodule] * real.images.shape[-1]
    return {"real: normal": _grey(real.symmetric(normal[:columns]), size), **_nodule_rows("real", images, own, size)}


def _hashes(sources: Mapping[str, Any]) -> str:
    hashes = [f"{name} {source.weights_hash[:12]}".strip() for name, source in sources.items()]
    return "carim_aug, weights " + ", ".join(hashes)


def _grey(images: Tensor, size: int) -> Tensor:
    """Return images (n, 1, S, S) in [-1, 1] as (n, 3, size, size) uint8."""
    square = resize(images, (size, size)).clamp(-1, 1)
    return ((square + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)


def _nodule_rows(name: str, images: Tensor, boxes: Tensor, size: int) -> dict[str, Tensor]:
    """Return images (n, 1, S, S) with their boxes (n, 4) outlined, and windows of S / ZOOM around the boxes."""
    side = images.shape[-1]
    crops = crop_at(images, boxes, max(1, side // ZOOM), torch.zeros(2))
    panels = zip(_grey(images, size), boxes * (size / side), strict=True)
    return {
        f"{name}: nodule": torch.stack([outline(panel, box[None]) for panel, box in panels]),
        f"{name}: nodule, x{ZOOM}": _grey(crops, size),
    }


def _sheet(rows: Mapping[str, Tensor], about: str) -> Image.Image:
    """Draw rows of panels (n, 3, s, s), each with its label at the left, and lines of text below."""
    panels = list(rows.values())
    grid = make_grid(torch.cat(panels), nrow=len(panels[0]), padding=_GAP, pad_value=255)
    step = panels[0].shape[-1] + _GAP
    font = ImageFont.load_default(_FONT)
    labels = [textwrap.fill(label, _LABEL) for label in rows]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    gutter = 2 * _GAP + int(max(pen.multiline_textbbox((0, 0), label, font=font)[2] for label in labels))
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
