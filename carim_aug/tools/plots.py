"""Pictures of what a generator and a prior make, and of a mixed batch (METHOD 2; Fig. 6 of the source)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

from carim_aug.generators.base import Generator, is_generator
from carim_aug.generators.render import Renderer
from carim_aug.location.placement import placed
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import as_size, boxes_to_masks, check_boxes
from carim_aug.ops.images import resize
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.graft import graft
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import NO_BOXES, MixParams, Planner, Slot

COLOUR = (255, 190, 0)
"""Of outlines and frames."""
GAINS = (1, 2, 4, 8, 16, 32)
"""By which differences may be amplified."""
ZOOM = 3
"""Of the magnified crops: a nodule is about 5 pixels wide at 128."""
_GAP, _LINE, _FONT = 4, 18, 13  # pixels between panels, of a line of text, of its letters
_SYMMETRIC = ValueRange.of("symmetric")


def contact_sheet(
    source: SyntheticNoduleMix | tuple[Generator, LocationPrior],
    real: Tensor | None = None,
    *,
    n: int = 6,
    seed: int = 0,
    size: int = 192,
) -> Image.Image:
    """A row per sample: host, mask, normal and nodule image of one noise, their difference, the graft, and close-ups.

    Args:
        source: a mix, or a generator and a prior.
        real: hosts of the grafts, (m, 1, H, W) or (m, H, W) float in [-1, 1], m >= 1, taken in turn; None: synthetic
            normal images are the hosts, and the headings say so.
        n: rows, at least 1.
        seed: of noise and boxes, 0 to 2**64 - 1.
        size: side of a panel in pixels, at least 32.

    Returns:
        An RGB picture; its last line says that it is synthetic, of which weights and seed. `info["carim_aug"]` too.

    Raises:
        TypeError: another source, or hosts that are no tensor.
        ValueError: numbers or hosts that break their rules.
    """
    generator, prior = _parts(source)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if size < 32:
        raise ValueError(f"size must be at least 32, got {size}")
    if real is not None:
        real = _hosts(real)

    # Hosts: real ones, or other normal images. Then plan for them and render, with the box and without it.
    planner, render = Planner(prior, seed=seed, nodule="Nodule", chances={}), Renderer(generator).whole
    if real is None:
        others = [planner.regenerate((seed, 1, i), "No Finding") for i in range(n)]
        hosts = render(others, torch.device("cpu"))
    else:
        hosts = real[[i % len(real) for i in range(n)]]
    slots = placed(hosts, [planner.regenerate((seed, 0, i), "Nodule") for i in range(n)], planner)
    bare = [replace(slot, boxes=NO_BOXES) for slot in slots]
    nodule, normal = render([*slots, *bare], torch.device("cpu")).chunk(2)
    differences = nodule - normal
    grafts = graft(hosts, differences, slots, _SYMMETRIC)
    gain = _gain(differences)

    # Panels, column by column.
    side = generator.image_size
    masks = F.interpolate(boxes_to_masks(_boxes(slots, side), side), (size, size))  # nearest: pixels as they are
    columns = {
        "host: synthetic normal" if real is None else "real": _panels(hosts, size),
        "mask C": _panels(masks * 2 - 1, size),
        "synthetic normal G(z,0)": _panels(normal, size),
        "synthetic nodule G(z,C)": _outlined(_panels(nodule, size), slots),
        f"the same, x{ZOOM}": _close_ups(nodule, slots, size),
        f"difference x{gain}": _panels(differences * gain, size),
        "graft into the host" if real is None else "graft into the real one": _panels(grafts, size),
        "the same, outlined": _outlined(_panels(grafts, size), slots),
        f"graft, x{ZOOM}": _close_ups(grafts, slots, size),
    }
    rows = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    kind = "All synthetic" if real is None else "All synthetic but the column 'real' and what surrounds the grafts"
    about = f"{kind}; carim_aug, weights {generator.weights_hash[:12]}, seed {seed}. Difference: grey is 0."
    return _sheet(rows, len(columns), headings=list(columns), footer=about)


def batch_sheet(
    images: Tensor, params: MixParams, *, value_range: Any = "auto", size: int = 128, per_row: int = 8
) -> Image.Image:
    """A mixed batch: synthetic slots framed and named, inserted boxes outlined.

    Args:
        images: (B, C, H, W), C 1 or 3, in `value_range`.
        params: what was decided for the batch, such as `mix.last_params`.
        value_range: of the images, as `SyntheticNoduleMix` takes it.
        size: side of a panel in pixels, at least 32.
        per_row: panels in a row, at least 1.

    Raises:
        ValueError: images and params of different batches, or a size that is too small.
    """
    if len(images) != len(params.slots):
        raise ValueError(f"params must be of {len(images)} slots, as the images are, got {len(params.slots)}")
    if size < 32 or per_row < 1:
        raise ValueError(f"size must be at least 32 and per_row at least 1, got {size} and {per_row}")
    grey = ValueRange.of(value_range).to_symmetric(images.detach().cpu()).float()
    panels = _outlined(_panels(grey, size), params.slots)
    for panel, slot in zip(panels, params.slots, strict=True):
        if slot.synthetic:
            frame = torch.tensor(COLOUR, dtype=torch.uint8)[:, None, None]
            panel[:, :3], panel[:, -3:], panel[:, :, :3], panel[:, :, -3:] = frame, frame, frame, frame
    names = [f"synthetic {slot.class_name}" if slot.synthetic else "as it came" for slot in params.slots]
    about = f"Framed: synthetic ({params.insertion}); carim_aug, weights {params.weights_hash[:12]}"
    return _sheet(panels, min(per_row, len(panels)), names=names, footer=about)


def outline(image: Tensor, boxes: Tensor, *, margin: int = 2) -> Tensor:
    """The image with a line one pixel wide around each box, `margin` pixels away from it; what is inside stays.

    Args:
        image: (1 or 3, H, W) uint8; not changed.
        boxes: (k, 4) XYXY in pixels of the image; k may be 0.
        margin: pixels between box and line, at least 0.

    Returns:
        (3, H, W) uint8.

    Raises:
        TypeError: boxes that are no tensor.
        ValueError: an image or boxes that break their rules.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise ValueError(f"image must be (1 or 3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    if margin < 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    height, width = image.shape[-2:]
    check_boxes(boxes, (height, width))
    colour = image.expand(3, -1, -1).clone()
    if len(boxes) == 0:
        return colour
    # The last pixel inside a box that ends at x2 is ceil(x2) - 1; the line goes margin + 1 pixels beyond.
    low = boxes[:, :2].floor() - margin - 1
    high = boxes[:, 2:].ceil() + margin
    line = torch.cat([low.clamp(min=0), high.minimum(boxes.new_tensor([width - 1, height - 1]))], dim=1)
    return draw_bounding_boxes(colour, line, colors=COLOUR, width=1)


def stacked(*sheets: Image.Image) -> Image.Image:
    """Pictures one below the other, left-aligned; `info` is that of the first."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    whole.info.update(sheets[0].info)
    return whole


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture as PNG, with a text chunk "carim_aug" that says what it is.

    Raises:
        ValueError: the path does not end with .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end with .png, got {str(path)!r}")
    chunks = PngInfo()
    chunks.add_text("carim_aug", str(picture.info.get("carim_aug", "")))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=chunks)


def _parts(source: Any) -> tuple[Generator, LocationPrior]:
    if isinstance(source, SyntheticNoduleMix):
        return source.generator, source.prior
    if isinstance(source, tuple) and len(source) == 2:
        generator, prior = source
        if is_generator(generator) and isinstance(prior, LocationPrior):
            return generator, prior
    raise TypeError(
        f"source must be a SyntheticNoduleMix or a pair of a generator and a LocationPrior, got {type(source).__name__}"
    )


def _hosts(real: Any) -> Tensor:
    if not isinstance(real, Tensor):
        raise TypeError(f"real must be a tensor (m, 1, H, W) or (m, H, W), got {type(real).__name__}")
    hosts = real[:, None] if real.ndim == 3 else real
    if hosts.ndim != 4 or hosts.shape[1] != 1 or len(hosts) == 0:
        raise ValueError(f"real must be (m, 1, H, W) or (m, H, W) with m >= 1, got {tuple(real.shape)}")
    if not hosts.is_floating_point():
        raise ValueError(f"real must be floating point in [-1, 1], got {real.dtype}")
    _SYMMETRIC.check(hosts, "real")
    return hosts.detach().cpu().float()


def _boxes(slots: Sequence[Slot], size: int | tuple[int, int]) -> list[Tensor]:
    height, width = as_size(size)
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    return [torch.tensor(slot.boxes) * scale for slot in slots]


def _gain(differences: Tensor) -> int:
    """The largest gain that keeps all differences in [-1, 1], so that none is cut off."""
    most = float(differences.abs().max())
    return max((gain for gain in GAINS if gain * most <= 1), default=1)


def _panels(images: Tensor, size: int) -> Tensor:
    """Images (n, 1, H, W) in [-1, 1] as (n, 3, size, size) uint8."""
    square = resize(images, (size, size)).clamp(-1, 1)
    return ((square + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)


def _outlined(panels: Tensor, slots: Sequence[Slot]) -> Tensor:
    boxes = _boxes(slots, panels.shape[-1])
    return torch.stack([outline(panel, of) for panel, of in zip(panels, boxes, strict=True)])


def _close_ups(images: Tensor, slots: Sequence[Slot], size: int) -> Tensor:
    """A window around each sample's largest box, 1 / ZOOM of the image wide and high, kept inside the image."""
    height, width = images.shape[-2:]
    high, wide = max(1, height // ZOOM), max(1, width // ZOOM)
    crops = []
    for image, slot in zip(images, slots, strict=True):
        x1, y1, x2, y2 = max(slot.boxes.tolist(), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        left = min(max(round((x1 + x2) / 2 * width - wide / 2), 0), width - wide)
        top = min(max(round((y1 + y2) / 2 * height - high / 2), 0), height - high)
        crops.append(image[:, top : top + high, left : left + wide])
    return _panels(torch.stack(crops), size)


def _sheet(
    panels: Tensor, columns: int, *, headings: Sequence[str] = (), names: Sequence[str] = (), footer: str
) -> Image.Image:
    """Panels (n, 3, s, s) in rows; headings above the columns or names in the panels' corners; a line below."""
    grid = make_grid(panels, nrow=columns, padding=_GAP, pad_value=255)
    top = _LINE if headings else 0
    sheet = Image.new("RGB", (grid.shape[2], grid.shape[1] + top + _LINE), "white")
    sheet.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (0, top))
    pen, font, step = ImageDraw.Draw(sheet), _font(), panels.shape[-1] + _GAP
    for i, heading in enumerate(headings):
        pen.text((_GAP + i * step, 2), heading, fill="black", font=font)
    for i, name in enumerate(names):
        place = (2 * _GAP + i % columns * step, 2 * _GAP + i // columns * step)
        pen.text(place, name, fill="white", font=font, stroke_width=1, stroke_fill="black")
    pen.text((_GAP, sheet.height - _LINE + 2), footer, fill="black", font=font)
    sheet.info["carim_aug"] = footer
    return sheet


def _font() -> Any:
    try:
        return ImageFont.load_default(_FONT)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1 or without FreeType has one size
        return ImageFont.load_default()
