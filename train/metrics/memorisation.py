"""Does a generator repeat its training films? Nearest neighbours, train against held-out (EVIDENCE, Quality).

If it does not, a generated image has its nearest real film among those of training just as often as their number says.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Memorisation(NamedTuple):
    """Result of `memorisation`.

    Attributes:
        share: generated images whose nearest real film was trained on.
        interval: of the share; films (by patient) and generated images resampled.
        expected: the share of training films among the real ones.
        to_train: (G,) distance of each generated image to its nearest training film.
        nearest: (G,) int64, which training film that is.
        to_held_out: (G,) distance to the nearest held-out film.
    """

    share: float
    interval: tuple[float, float]
    expected: float
    to_train: Tensor
    nearest: Tensor
    to_held_out: Tensor

    @property
    def memorises(self) -> bool:
        """Whether training films are nearest more often than chance: the interval lies above what is expected."""
        return self.interval[0] > self.expected


def memorisation(
    generated: Tensor,
    train: Tensor,
    held_out: Tensor,
    train_patients: Tensor,
    held_out_patients: Tensor,
    *,
    generator: torch.Generator,
    draws: int = 400,
    level: float = 0.95,
) -> Memorisation:
    """Gives how often a generated image is nearer to a film of training than to any held-out one.

    Args:
        generated: (G, D) features or pixels.
        train: (N, D) of the films that the generator saw.
        held_out: (M, D) of films of other patients, drawn as those of training were.
        train_patients: (N,) int64; a patient's films are resampled together.
        held_out_patients: (M,) int64.
        generator: random stream on the CPU.
        draws: bootstrap samples.
        level: of the interval, in (0, 1).

    Raises:
        ValueError: shapes that do not fit, empty sets, or a patient on both sides.
    """
    for name, rows in (("generated", generated), ("train", train), ("held_out", held_out)):
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != generated.shape[-1]:
            raise ValueError(f"{name} must be (n, {generated.shape[-1]}) with n >= 1, got {tuple(rows.shape)}")
    if len(train_patients) != len(train) or len(held_out_patients) != len(held_out):
        raise ValueError(
            f"patients must be one a film ({len(train)} and {len(held_out)}), "
            f"got {len(train_patients)} and {len(held_out_patients)}"
        )
    both = torch.isin(train_patients, held_out_patients)
    if bool(both.any()):
        raise ValueError(f"held_out must be of other patients than train, got patient {int(train_patients[both][0])}")
    if draws < 2 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 2 and level in (0, 1), got {draws} and {level}")

    seen, unseen = torch.cdist(generated.double(), train.double()), torch.cdist(generated.double(), held_out.double())
    to_train, nearest = seen.min(dim=1)
    to_held_out = unseen.min(dim=1).values
    share = (to_train < to_held_out).double().mean()

    shares = []
    for _ in range(draws):
        kept = [_kept(patients, generator) for patients in (train_patients, held_out_patients)]
        a, b = seen[:, kept[0]].min(dim=1).values, unseen[:, kept[1]].min(dim=1).values
        rows = torch.randint(len(generated), (len(generated),), generator=generator)
        shares.append((a < b)[rows].double().mean())
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.stack(shares).quantile(ends).tolist()
    expected = len(train) / (len(train) + len(held_out))
    return Memorisation(float(share), (low, high), expected, to_train, nearest, to_held_out)


def low_resolution(images: Tensor, *, size: int = 32) -> Tensor:
    """Gives images as rows of pixels, so that a row's distance to another is the root of the mean squared difference.

    Args:
        images: (N, 1, S, S) float.
        size: side to which they are averaged.

    Returns:
        (N, size * size).
    """
    return F.adaptive_avg_pool2d(images, size).flatten(1) / size


def _kept(patients: Tensor, generator: torch.Generator) -> Tensor:
    """Gives the rows of the patients that a bootstrap sample holds; being there twice brings no film nearer."""
    names, index = patients.unique(return_inverse=True)
    drawn = torch.zeros(len(names), dtype=torch.bool)
    drawn[torch.randint(len(names), (len(names),), generator=generator)] = True
    return drawn[index].nonzero()[:, 0]
