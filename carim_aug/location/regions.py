"""Connected regions of class activation maps as boxes: the way of Ann (2021) to places and sizes."""

import math

import torch
from torch import Tensor


def region_boxes(maps: Tensor, threshold: float, largest: float) -> list[Tensor]:
    """Return boxes around the connected regions of maps at or above a threshold, n of (k, 4) float64 in pixels.

    Maps are (n, 1, H, W) in [0, 1]. Regions larger than `largest`, sqrt(width x height) in fractions of the image's
    side, are cut to that, around their centres of mass.
    """
    if not isinstance(maps, Tensor) or maps.ndim != 4 or maps.shape[1] != 1:
        raise ValueError(f"maps must be a tensor (n, 1, H, W), got {tuple(getattr(maps, 'shape', ()))}")
    if maps.numel() and not (maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1):
        raise ValueError(f"maps must be finite and in [0, 1], got {maps.min():g} to {maps.max():g}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("LocationPrior.fit_maps needs scipy: pip install 'carim-aug[eval]'") from error
    found, (height, width) = [], maps.shape[2:]
    for cam in maps[:, 0].detach().cpu().double().numpy():
        labels, count = ndimage.label(cam >= threshold)
        boxes = []
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
            box_height, box_width = rows.stop - rows.start, columns.stop - columns.start
            shrink = largest * 0.999 / math.sqrt(box_height / height * box_width / width)
            if shrink >= 1:
                boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                continue
            y, x = ndimage.center_of_mass(cam, labels, label)
            half_height, half_width = box_height * shrink / 2, box_width * shrink / 2
            y = min(max(y + 0.5, half_height), height - half_height)
            x = min(max(x + 0.5, half_width), width - half_width)
            boxes.append([x - half_width, y - half_height, x + half_width, y + half_height])
        found.append(torch.tensor(boxes, dtype=torch.float64).reshape(count, 4))
    return found
