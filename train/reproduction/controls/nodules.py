"""Controls: a drawn blob, copies of real nodules, CT nodules superimposed. What a generator brings must beat these."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.ops.boxes import boxes_to_masks, check_boxes
from train.common.images import LARGEST_BOX, to_symmetric
from train.reproduction.controls.base import Control, check_images
from train.reproduction.controls.poisson import poisson_blend

PEAKS = (0.05, 0.2)  # least and largest brightness of a drawn blob's middle, in units of the [-1, 1] image
ROUGHEST = 0.2  # largest standard deviation along the rim of a real nodule that is copied, in the same units
NEIGHBOURS = 16  # real nodules next in size that a box chooses from
CONTRAST, FILL = (0.07, 0.27), (0.9, 1.0)  # of CT nodules, as `CTNodules.superimpose` has them


class DrawnNodules(Control):
    """A drawn Gaussian blob in each box, exp(-1.5 r^2), less its value at r = 1, the ellipse inscribed in the box."""

    def __init__(self, image_size: int = 256) -> None:
        super().__init__(image_size, {}, {"peaks": PEAKS})

    def _residual(self, region: Tensor, box: Tensor, rng: np.random.Generator) -> Tensor:
        centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
        x, y = (torch.arange(self.image_size) + 0.5 - centre[:, None]) / half[:, None]
        rim = math.exp(-1.5)
        shape = ((torch.exp(-1.5 * (x**2 + y[:, None] ** 2)) - rim) / (1 - rim)).clamp(min=0).to(region)
        return torch.minimum(rng.uniform(*PEAKS) * shape, (1 - region).clamp(min=0))  # an image saturates


class CopiedNodules(Control):
    """Real boxed nodules copied into each box, blended by their gradients (Perez et al. 2003).

    Nodules are images (K, 1, S, S) uint8, one row a box (K, 4) XYXY in pixels. A copy is scaled to the mask's box, so
    that the box stays true; to keep the scaling small and the texture sharp, it is one of the real nodules whose boxes
    are nearest in width and height. The ellipse inscribed in the mask's box is blended; outside it nothing changes.
    Left out are boxes wider or higher than 0.16 of the side, and real nodules that do not survive the blend: those
    whose rim crosses a bright edge (heart, diaphragm, pleura), which would show as a scar, and those that darken a flat
    image.
    """

    def __init__(self, nodules: Tensor, boxes: Tensor) -> None:
        nodules, size = check_images(nodules, "nodules"), int(nodules.shape[-1])
        check_boxes(boxes, size)
        if len(boxes) != len(nodules):
            raise ValueError(f"boxes must be as many as nodules ({len(nodules)}), got {len(boxes)}")
        boxes = boxes.detach().cpu().float()
        usable = (boxes[:, 2:] - boxes[:, :2] <= LARGEST_BOX * size).all(dim=1).nonzero()[:, 0]
        if len(usable):
            usable = usable[_survives_blend(to_symmetric(nodules[usable]), boxes[usable])]
        if not len(usable):
            raise ValueError(
                f"boxes must hold a bright nodule of at most {LARGEST_BOX} of the side with a rim no rougher than "
                f"{ROUGHEST}, got none in {len(boxes)}"
            )
        self.nodules, self.boxes = nodules[usable], boxes[usable]
        super().__init__(size, {"nodules": self.nodules, "boxes": self.boxes}, {"neighbours": NEIGHBOURS})

    def _residual(self, region: Tensor, box: Tensor, rng: np.random.Generator) -> Tensor:
        size = self.image_size
        x1, y1, x2, y2 = (int(edge) for edge in box)
        wanted = box[2:] - box[:2]
        unlike = ((self.boxes[:, 2:] - self.boxes[:, :2]).log() - wanted.log()).norm(dim=1)
        nearest = unlike.argsort(stable=True)[:NEIGHBOURS]
        chosen = int(nearest[rng.integers(len(nearest))])

        # What is copied, with the ring of one pixel that the blend reads.
        real = self.boxes[chosen]
        half = (real[2:] - real[:2]) / 2 * (1 + 2 / wanted)
        centre = (real[:2] + real[2:]) / 2
        low = (centre - half).round().clamp(0, size - 2).long()
        (left, top), (right, bottom) = low.tolist(), torch.maximum((centre + half).round().long(), low + 2).tolist()
        crop = to_symmetric(self.nodules[chosen : chosen + 1, :, top:bottom, left:right]).to(region.device)
        ring = (y2 - y1 + 2, x2 - x1 + 2)
        crop = F.interpolate(crop, size=ring, mode="bicubic", align_corners=False, antialias=True)

        copied = F.pad(torch.zeros_like(region), (1, 1, 1, 1))
        copied[:, :, y1 : y2 + 2, x1 : x2 + 2] = crop
        inside = boxes_to_masks([box[None]], size, shape="ellipse").to(region.device) > 0
        steps = max(int(wanted.max()) ** 2, 16)
        return poisson_blend(region, copied[:, :, 1:-1, 1:-1], inside, steps=steps) - region


class SuperimposedNodules(Control):
    """Real CT nodules in projection, superimposed in each box (Litjens et al. 2010)."""

    def __init__(self, templates: CTNodules, image_size: int = 256) -> None:
        if not isinstance(templates, CTNodules):
            raise TypeError(f"templates must be CTNodules, got {type(templates).__name__}")
        self.templates = templates
        arrays = {"templates": templates.templates, "extents": templates.extents_mm}
        super().__init__(image_size, arrays, {"contrast": CONTRAST, "fill": FILL, "field_mm": templates.field_mm})

    def _residual(self, region: Tensor, box: Tensor, rng: np.random.Generator) -> Tensor:
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return self.templates.superimpose(region, box[None], generator, CONTRAST, fill=FILL)[1]


def _survives_blend(images: Tensor, boxes: Tensor) -> Tensor:
    """Return which real nodules (K,) have a smooth rim and are, blended into a flat image, brighter than it."""
    inside = boxes_to_masks(list(boxes[:, None]), images.shape[-1], shape="ellipse") > 0
    rim = (F.max_pool2d(inside.float(), 3, 1, 1) > 0) & ~inside
    steps = int((boxes[:, 2:] - boxes[:, :2]).max()) ** 2
    added = poisson_blend(torch.zeros_like(images), images / 2, inside, steps=steps)  # half as bright: none saturates
    rough = torch.stack([image[where].std() for image, where in zip(images, rim, strict=True)])
    return (rough <= ROUGHEST) & (added.sum(dim=(1, 2, 3)) > 0)
