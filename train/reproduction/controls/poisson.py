"""Poisson blending: a piece of one image put into another without a seam, for the copy-paste control.

Reference: Perez, Gangnet and Blake, "Poisson image editing", ACM Transactions on Graphics 22 (2003).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def poisson_blend(target: Tensor, source: Tensor, inside: Tensor, *, steps: int) -> Tensor:
    """Return `source` inside the mask plus the harmonic map that joins it to `target` at the mask's edge.

    Images are (B, 1, S, S) float, [-1, 1], masks bool; the result is clamped inside the mask and `target` outside. The
    source is read one pixel about the mask too. Where the mask reaches the image's border there is nothing to join, and
    the map has no slope across it. Jacobi's iteration begins with the mean difference at the edge; what is left of the
    slowest part of the error after w x w steps in a mask w pixels wide is at most 1 %.
    """
    side, device = target.shape[-1], target.device
    span = min(side, 2 + max(int(inside.any(dim=d).sum(dim=-1).max()) for d in (2, 3)))
    # A window about each sample's mask: all else stays.
    first = [inside.any(dim=d)[:, 0].float().argmax(dim=1) for d in (2, 3)]
    x, y = ((f - 1).clamp(min=0, max=side - span) for f in first)
    ticks = torch.arange(span, device=device)
    rows, columns = y[:, None, None] + ticks[:, None], x[:, None, None] + ticks
    at = (torch.arange(len(target), device=device)[:, None, None], 0, rows, columns)
    gap, within = (target - source)[at][:, None], inside[at][:, None]

    edge = (F.max_pool2d(within.float(), 3, 1, 1) > 0) & ~within
    start = (gap * edge).sum(dim=(1, 2, 3), keepdim=True) / edge.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    harmonic = torch.where(within, start, gap)
    kernel = gap.new_tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])[None, None] / 4
    for _ in range(steps):
        means = F.conv2d(F.pad(harmonic, (1, 1, 1, 1), mode="replicate"), kernel)
        harmonic = torch.where(within, means, gap)
    blended = target.clone()
    joined = (source[at][:, None] + harmonic).clamp(-1, 1)
    blended[at] = torch.where(within, joined, target[at][:, None])[:, 0]
    return blended
