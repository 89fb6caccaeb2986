"""Pictures of grafts, of whole images with and without a mask (Fig. 6 of Ann (2021)), and of mixed batches."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from carim_aug.data.phantom import phantom_chest
from carim_aug.ops.boxes import boxes_to_masks, check_boxes
from carim_aug.ops.images import resize
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.apply import Applier
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import NO_BOXES, Decision, MixParams
from carim_aug.transforms.settings import Graft, MixSettings

COLOUR = (255, 190, 0)  # of outlines and frames
GAINS = (1, 2, 4, 8, 16, 32)  # by which what is added may be amplified
ZOOM = 3  # of the close-ups: a nodule is about 5 pixels wide at 128
PHANTOM_SIZE = 256  # side of a phantom in pixels, where no other background is at hand
_GAP, _LINE, _FONT = 4, 18, 13  # pixels between panels, of a line of text, of its letters
_SYMMETRIC = ValueRange.of("symmetric")


def contact_sheet(
    source: SyntheticNoduleMix | tuple[Any, Any],
    real: Tensor | None = None,
    *,
    n: int = 6,
    seed: int = 0,
    size: int = 192,
    twins: bool = True,
) -> Image.Image:
    """Draw a row per sample: background, graft, its box, close-ups, what was added; mask and whole images of one noise.

    Args:
        source: a mix, whose placement, strength and gate hold here too; or a generator and a prior.
        real: backgrounds, (m, 1, H, W) or (m, H, W) float in [-1, 1], m >= 1, taken in turn; None: synthetic normal
            images, or phantoms if the generator makes no whole images.
        n: rows, at least 1.
        seed: of noise and boxes, 0 to 2**64 - 1.
        size: side of a panel in pixels, at least 32.
        twins: whether to show mask, G(z, 0) and G(z, C), if the generator makes whole images.

    Returns:
        An RGB picture; its last line says what is synthetic, of which weights and seed. `info["carim_aug"]` too.

    Raises:
        TypeError, ValueError: an argument that breaks its rule, or a generator without residuals.
    """
    _check_least(n=(n, 1), size=(size, 32))
    if isinstance(source, SyntheticNoduleMix):
        generator, prior, graft = source.generator, source.prior, source.settings.graft
    elif isinstance(source, tuple) and len(source) == 2:
        generator, prior, graft = *source, Graft()
    else:
        raise TypeError(f"source must be a SyntheticNoduleMix or (generator, prior), got {type(source).__name__}")
    settings = MixSettings(prior, seed=seed, graft=graft, value_range=_SYMMETRIC)
    applier, planner, cpu = Applier(settings, generator, "cpu"), settings.planner(settings.labels), torch.device("cpu")
    whole = hasattr(generator, "images")

    # Backgrounds, and the product's own grafts in them.
    if real is not None:
        backgrounds, kind = _check_real(real), "real"
        backgrounds = backgrounds[[i % len(backgrounds) for i in range(n)]]
    elif whole:
        others = [planner.regenerate((seed, 1, i), "No Finding") for i in range(n)]
        backgrounds, kind = applier.whole_images(others, cpu), "synthetic"
    else:
        phantoms = [phantom_chest(PHANTOM_SIZE, seed=seed + i) for i in range(n)]
        backgrounds, kind = torch.stack(phantoms) * 2 - 1, "phantom"
    placed = applier.place(backgrounds, [planner.regenerate((seed, 0, i), "Nodule") for i in range(n)], planner)
    decisions = placed.decisions
    grafts = torch.as_tensor(applier.pixels(backgrounds, placed)[0])
    added = grafts - backgrounds
    gain = max((gain for gain in GAINS if gain * float(added.abs().max()) <= 1), default=1)

    # Panels, column by column.
    columns = {
        f"background: {kind}": _to_panels(backgrounds, size),
        "synthetic graft": _to_panels(grafts, size),
        "synthetic graft, its box": _outline_all(_to_panels(grafts, size), decisions),
        f"background, x{ZOOM}": _close_ups(backgrounds, decisions, size),
        f"synthetic graft, x{ZOOM}": _close_ups(grafts, decisions, size),
        f"added, x{gain}": _to_panels(added * gain, size),
    }
    if whole and twins:
        boxes = [decision.boxes_at(generator.image_size, generator.image_size) for decision in decisions]
        masks = F.interpolate(boxes_to_masks(boxes, generator.image_size), (size, size))  # nearest: pixels as they are
        without = applier.whole_images([replace(decision, boxes=NO_BOXES) for decision in decisions], cpu)
        nodule = applier.whole_images(decisions, cpu)
        columns |= {
            "mask C": _to_panels(masks * 2 - 1, size),
            "synthetic image G(z, 0)": _to_panels(without, size),
            "synthetic image G(z, C)": _outline_all(_to_panels(nodule, size), decisions),
            f"synthetic G(z, C), x{ZOOM}": _close_ups(nodule, decisions, size),
        }
    said = {"real": "All synthetic but the real backgrounds", "phantom": "Synthetic nodules in phantoms"}
    strengths = " to ".join(dict.fromkeys(f"{strength:g}" for strength in graft.strength))  # type: ignore[union-attr]
    about = f"{said.get(kind, 'All synthetic')}; carim_aug, weights {generator.weights_hash[:12]}, seed {seed}, "
    panels = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    footer = f"{about}strength {strengths}. Added: grey is 0."
    return _lay_out(panels, len(columns), headings=list(columns), footer=footer)


def batch_sheet(
    images: Tensor, params: MixParams, *, value_range: Any = "auto", size: int = 128, per_row: int = 8
) -> Image.Image:
    """Draw a mixed batch in panels of `size` pixels: synthetic images framed and named, inserted boxes outlined.

    Args:
        images: (B, C, H, W), C 1 or 3, in `value_range`, as `SyntheticNoduleMix` takes it.
        params: what was decided for the batch, such as `mix.last_params`; of another one is a ValueError.
    """
    decisions = params.decisions
    if len(images) != len(decisions):
        raise ValueError(f"params must be of {len(images)} images, got {len(decisions)}")
    _check_least(size=(size, 32), per_row=(per_row, 1))
    grey = ValueRange.of(value_range).to_symmetric(images.detach().cpu()).float()
    panels = _outline_all(_to_panels(grey, size), decisions)
    frame = torch.tensor(COLOUR, dtype=torch.uint8)[:, None, None]
    for panel, decision in zip(panels, decisions, strict=True):
        if decision.synthetic:
            panel[:, :3], panel[:, -3:], panel[:, :, :3], panel[:, :, -3:] = frame, frame, frame, frame
    names = [f"synthetic {d.class_name}" if d.synthetic else "as it came" for d in decisions]
    about = f"Framed: synthetic ({params.insertion}); carim_aug, weights {params.weights_hash[:12]}"
    return _lay_out(panels, min(per_row, len(panels)), names=names, footer=about)


def outline(image: Tensor, boxes: Tensor, *, margin: int = 2) -> Tensor:
    """Return an image (3, H, W) uint8 with a line one pixel wide around each box; what is inside stays.

    Args:
        image: (1 or 3, H, W) uint8; not changed.
        boxes: (k, 4) XYXY in pixels of the image; k may be 0.
        margin: pixels between box and line, at least 0.

    Raises:
        TypeError, ValueError: an argument that breaks its rule.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise ValueError(f"image must be (1 or 3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    _check_least(margin=(margin, 0))
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


def stack_pictures(*pictures: Image.Image) -> Image.Image:
    """Put pictures one below the other, left-aligned; `info` is that of the first."""
    both = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for picture, top in zip(pictures, accumulate((p.height for p in pictures), initial=0), strict=False):
        both.paste(picture, (0, top))
    both.info.update(pictures[0].info)
    return both


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture as PNG (another suffix is a ValueError), with a text "carim_aug" that says what it is."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end with .png, got {str(path)!r}")
    chunks = PngInfo()
    chunks.add_text("carim_aug", str(picture.info.get("carim_aug", "")))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=chunks)


def _check_least(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_real(real: Any) -> Tensor:
    """Return real images as (m, 1, H, W) float32 on the CPU, or raise an error that names what they are not."""
    if not isinstance(real, Tensor):
        raise TypeError(f"real must be a tensor (m, 1, H, W) or (m, H, W), got {type(real).__name__}")
    images = real[:, None] if real.ndim == 3 else real
    if images.ndim != 4 or images.shape[1] != 1 or len(images) == 0:
        raise ValueError(f"real must be (m, 1, H, W) or (m, H, W) with m >= 1, got {tuple(real.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"real must be floating point in [-1, 1], got {real.dtype}")
    _SYMMETRIC.check(images, "real")
    return images.detach().cpu().float()


def _to_panels(images: Tensor, size: int) -> Tensor:
    """Return images (n, 1, H, W) in [-1, 1] as (n, 3, size, size) uint8."""
    square = resize(images, (size, size)).clamp(-1, 1)
    return ((square + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)


def _outline_all(panels: Tensor, decisions: Sequence[Decision]) -> Tensor:
    height, width = panels.shape[-2:]
    return torch.stack([outline(p, d.boxes_at(height, width)) for p, d in zip(panels, decisions, strict=True)])


def _close_ups(images: Tensor, decisions: Sequence[Decision], size: int) -> Tensor:
    """Return panels of a window around each largest box, 1 / ZOOM of the image wide and high, kept inside the image."""
    height, width = images.shape[-2:]
    high, wide = max(1, height // ZOOM), max(1, width // ZOOM)
    crops = []
    for image, decision in zip(images, decisions, strict=True):
        boxes = decision.boxes.tolist() or [(0.0, 0.0, 1.0, 1.0)]
        x1, y1, x2, y2 = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        left = min(max(round((x1 + x2) / 2 * width - wide / 2), 0), width - wide)
        top = min(max(round((y1 + y2) / 2 * height - high / 2), 0), height - high)
        crops.append(image[:, top : top + high, left : left + wide])
    return _to_panels(torch.stack(crops), size)


def _lay_out(
    panels: Tensor, columns: int, *, headings: Sequence[str] = (), names: Sequence[str] = (), footer: str
) -> Image.Image:
    """Return panels (n, 3, s, s) in rows; headings above the columns or names in the panels' corners; a line below."""
    grid = make_grid(panels, nrow=columns, padding=_GAP, pad_value=255)
    top = _LINE if headings else 0
    sheet = Image.new("RGB", (grid.shape[2], grid.shape[1] + top + _LINE), "white")
    sheet.paste(to_pil_image(grid), (0, top))
    pen, font, step = ImageDraw.Draw(sheet), _load_font(), panels.shape[-1] + _GAP
    for i, heading in enumerate(headings):
        pen.text((_GAP + i * step, 2), heading, fill="black", font=font)
    for i, name in enumerate(names):
        place = (2 * _GAP + i % columns * step, 2 * _GAP + i // columns * step)
        pen.text(place, name, fill="white", font=font, stroke_width=1, stroke_fill="black")
    pen.text((_GAP, sheet.height - _LINE + 2), footer, fill="black", font=font)
    sheet.info["carim_aug"] = footer
    return sheet


def _load_font() -> Any:
    try:
        return ImageFont.load_default(_FONT)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1 or without FreeType has one size
        return ImageFont.load_default()
