"""Whether a generator repeats its training images: nearest neighbours, train against held-out.

If it does not, a generated image has its nearest real image among those of training just as often as their number says.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.metrics.statistics import check_draws, interval, resample_patients


class Memorisation(NamedTuple):
    """Result of `memorisation`."""

    share: float  # of the generated images, those whose nearest real image was trained on
    interval: tuple[float, float]  # of the share, 95 %; real images (by patient) and generated images resampled
    expected: float  # the share of training images among the real ones
    to_train: Tensor  # (G,) distance of each generated image to its nearest training image
    nearest: Tensor  # (G,) int64, which training image that is
    to_held_out: Tensor  # (G,) distance to the nearest held-out image

    @property
    def memorises(self) -> bool:
        """Whether training images are nearest more often than chance: the interval lies above what is expected."""
        return self.interval[0] > self.expected


def memorisation(
    generated: Tensor,  # (G, D) features or pixels
    train: Tensor,  # (N, D) of the images that the generator saw
    held_out: Tensor,  # (M, D)
    train_patients: Tensor,  # (N,) int64
    held_out_patients: Tensor,  # (M,) int64
    *,
    generator: torch.Generator,  # on the CPU
    draws: int = 400,  # bootstrap samples, at least 2
) -> Memorisation:
    """Return how often a generated image is nearer to an image of training than to any of other patients."""
    for name, rows in (("generated", generated), ("train", train), ("held_out", held_out)):
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != generated.shape[-1]:
            raise ValueError(f"{name} must be (n, {generated.shape[-1]}) with n >= 1, got {tuple(rows.shape)}")
    if len(train_patients) != len(train) or len(held_out_patients) != len(held_out):
        raise ValueError(
            f"patients must be one an image ({len(train)} and {len(held_out)}), "
            f"got {len(train_patients)} and {len(held_out_patients)}"
        )
    both = torch.isin(train_patients, held_out_patients)
    if bool(both.any()):
        raise ValueError(f"held_out must be of other patients than train, got patient {int(train_patients[both][0])}")
    check_draws(draws)

    seen, unseen = torch.cdist(generated.double(), train.double()), torch.cdist(generated.double(), held_out.double())
    to_train, nearest = seen.min(dim=1)
    to_held_out = unseen.min(dim=1).values
    share = (to_train < to_held_out).double().mean()

    # Being in a bootstrap sample twice brings no image nearer.
    shares = []
    for _ in range(draws):
        a, b = (resample_patients(p, 1, generator=generator)[0] > 0 for p in (train_patients, held_out_patients))
        rows = torch.randint(len(generated), (len(generated),), generator=generator)
        shares.append((seen[:, a].min(dim=1).values < unseen[:, b].min(dim=1).values)[rows].double().mean())
    low, high = interval(torch.stack(shares)).tolist()
    expected = len(train) / (len(train) + len(held_out))
    return Memorisation(float(share), (low, high), expected, to_train, nearest, to_held_out)


def low_resolution(images: Tensor, *, size: int = 32) -> Tensor:
    """Return images (N, 1, S, S), averaged to a size, as rows (N, size^2) whose distance is the root mean square."""
    return F.adaptive_avg_pool2d(images, size).flatten(1) / size
