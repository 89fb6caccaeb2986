"""A patch classifier, nodule against none: what a source of nodules is worth on real ones (EVIDENCE, Quality).

Patches are high-passed, or ribs and heart border are all that a small network sees.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 48
"""Side of a patch in pixels of a 256-pixel film."""

SIGMA = 8.0
"""Standard deviation in pixels of the blur that is taken away."""

_REACH = 24  # pixels of film that the blur needs on each side


def patches_at(images: Tensor, centres: Tensor) -> Tensor:
    """Gives high-passed patches about given places: the film minus its blur.

    Args:
        images: (B, 1, 256, 256) float, [-1, 1]; a film's border is prolonged.
        centres: (B, 2) x, y in pixels; patches are moved to lie inside the film.

    Returns:
        (B, 1, PATCH, PATCH).
    """
    side = images.shape[-1]
    start = (centres - PATCH / 2).round().clamp(0, side - PATCH).long()
    padded = F.pad(images, (_REACH,) * 4, mode="replicate")
    span = PATCH + 2 * _REACH
    windows = torch.stack([m[:, y : y + span, x : x + span] for m, (x, y) in zip(padded, start.tolist(), strict=True)])
    kernel = torch.exp(-0.5 * (torch.arange(-_REACH, _REACH + 1, device=images.device) / SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype)
    blurred = F.conv2d(F.conv2d(windows, kernel[None, None, :, None]), kernel[None, None, None, :])
    return windows[..., _REACH:-_REACH, _REACH:-_REACH] - blurred


class PatchNet(nn.Module):
    """Four convolutions with batch norm, then the largest response anywhere: a logit for "nodule"."""

    def __init__(self, width: int = 24) -> None:
        """Makes an untrained network; the global random state gives its weights."""
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for after in (width, 2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            before = after
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Gives logits (B,) of high-passed patches (B, 1, PATCH, PATCH)."""
        return self.head(self.features(patches * 4).amax(dim=(2, 3)))[:, 0]


def auc(positive: Tensor, negative: Tensor) -> Tensor:
    """Gives the area under the ROC curve: how often a positive's score beats a negative's, ties counting half.

    Args:
        positive: (P,) scores.
        negative: (N,) scores.

    Returns:
        Scalar in [0, 1].
    """
    negative = negative.sort().values.contiguous()
    positive = positive.contiguous()
    below, up_to = torch.searchsorted(negative, positive), torch.searchsorted(negative, positive, right=True)
    return ((below + up_to).double() / 2 / len(negative)).mean()


def auc_interval(
    positive: Tensor,
    negative: Tensor,
    positive_patients: Tensor,
    negative_patients: Tensor,
    *,
    generator: torch.Generator,
    draws: int = 2000,
) -> tuple[float, float]:
    """Gives a 95 % bootstrap interval of the AUC, resampling patients, nodule and normal ones apart.

    Args:
        positive: (P,) scores.
        negative: (N,) scores.
        positive_patients: (P,) int64, whose nodule it is.
        negative_patients: (N,) int64.
        generator: random stream.
        draws: bootstrap samples.
    """

    def resampled(scores: Tensor, patients: Tensor) -> Tensor:
        names, index = patients.unique(return_inverse=True)
        times = torch.bincount(torch.randint(len(names), (len(names),), generator=generator), minlength=len(names))
        return scores.repeat_interleave(times[index])

    values = torch.stack(
        [auc(resampled(positive, positive_patients), resampled(negative, negative_patients)) for _ in range(draws)]
    )
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
