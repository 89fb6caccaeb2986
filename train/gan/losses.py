"""Losses of the GAN: least squares on two heads (eq. 3 and 4 of Ann 2021), the CARIM loss (eq. 6), matched pairs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.ops.cam import activation_map, enlarge, normalize_map
from train.classifier.densenet import ChestClassifier

CARIM_FORMS: tuple[str, ...] = ("relu", "softplus")  # of the CARIM loss; see `carim_loss`


def lsgan_loss(scores: Tensor, wanted: float) -> Tensor:
    """Return mean (D - wanted)^2, a scalar, of scores of any shape; wanted is 1 for real, 0 for fake."""
    return (scores.float() - wanted).square().mean()


def discriminator_loss(
    real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], mismatched: Tensor | None = None
) -> Tensor:
    """Return L_Di, eq. 3 of Ann (2021), from unconditional and conditional scores of real and generated images.

    Mismatched, conditional scores of real images with the other class, count as fake beside the generated ones (Zhang
    et al., StackGAN++, 2018); without them it is eq. 3 to the letter.
    """
    conditional_fake = lsgan_loss(fake[1], 0)
    if mismatched is not None:
        conditional_fake = 0.5 * (conditional_fake + lsgan_loss(mismatched, 0))
    return 0.5 * (lsgan_loss(real[0], 1) + lsgan_loss(fake[0], 0) + lsgan_loss(real[1], 1) + conditional_fake)


def generator_loss(fake: tuple[Tensor, Tensor]) -> Tensor:
    """Return L_Gi, a scalar, from the two heads' scores of generated images: eq. 4 of Ann (2021)."""
    return 0.5 * (lsgan_loss(fake[0], 1) + lsgan_loss(fake[1], 1))


# --- Our own extensions ---
def outside_loss(difference: Tensor, allowed: Tensor) -> Tensor:
    """Return the mean |difference| (B, 1, S, S) where `allowed` is not 1: masks must change images at the mask only."""
    return (difference.float().abs() * (1 - allowed)).mean()


def level_loss(
    fake: Tensor, real: Tensor, *, generator: torch.Generator, cells: int = 8, directions: int = 64
) -> Tensor:
    """Return the squared sliced Wasserstein distance of two batches' (B, 1, S, S) coarse brightness.

    Discriminators under spectral norm hardly notice an image that is too dark or too bright as a whole. An image's mean
    and mean square in each of cells x cells squares are projected on random directions (the generator's, on the CPU);
    along each, the batch's sorted values are compared (Deshpande et al. 2018).
    """

    def features(images: Tensor) -> Tensor:
        images = images.float()
        return torch.cat([F.adaptive_avg_pool2d(x, cells).flatten(1) for x in (images, images.square())], dim=1)

    a, b = features(fake), features(real)
    axes = torch.randn(a.shape[1], directions, generator=generator).to(a)
    axes = axes / axes.norm(dim=0)
    return spread_loss(a @ axes, b @ axes)


def spread_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Return Wasserstein-2, squared, of two batches' values (B, ...): nodules are to be as unequal as real ones."""
    return (fake.float().sort(dim=0).values - real.float().sort(dim=0).values).square().mean()


# --- CARIM ---
class CARIMLoss(NamedTuple):
    """The loss, a scalar with gradient, and the share of nodule samples that give it none, a scalar in [0, 1]."""

    loss: Tensor
    dead: Tensor


def carim_loss(maps: Tensor, masks: Tensor, *, form: str = "relu") -> CARIMLoss:
    """Return L_CARIM, eq. 6 of Ann (2021): the mean of (1 - M_norm)^2 in a mask, then over the samples with a mask.

    M = ReLU(maps), enlarged to the image and divided by its largest value. A sample whose map is nowhere positive
    counts as M_norm = 0, adds 1 and has no gradient: it is dead. With "softplus", our own form, M is
    softplus(maps / mean |maps|): positive everywhere, so that no sample is dead, and the maps' scale means nothing.
    Maps (B, 1, h, w) are signed, of the target class; masks (B, 1, S, S) in {0, 1}; empty ones do not count.
    """
    if form not in CARIM_FORMS:
        raise ValueError(f"form must be one of {CARIM_FORMS}, got {form!r}")
    if maps.ndim != 4 or maps.shape[1] != 1 or masks.ndim != 4 or masks.shape[:2] != maps.shape[:2]:
        raise ValueError(f"maps and masks must be (B, 1, h, w), got {tuple(maps.shape)} and {tuple(masks.shape)}")
    maps, masks = maps.float(), masks.float()
    if form == "relu":
        positive = maps.relu()
    else:
        scale = maps.detach().abs().mean(dim=(2, 3), keepdim=True)
        positive = F.softplus(maps / scale.clamp(min=torch.finfo(maps.dtype).tiny))
    normalized = normalize_map(enlarge(positive, masks.shape[-1]))
    pixels = masks.sum(dim=(1, 2, 3))
    each = ((1 - normalized).square() * masks).sum(dim=(1, 2, 3)) / pixels.clamp(min=1)
    has_mask = pixels > 0
    count = has_mask.sum().clamp(min=1)
    dead = has_mask & (normalized.detach().amax(dim=(1, 2, 3)) <= 0)
    return CARIMLoss((each * has_mask).sum() / count, dead.sum() / count)


@dataclass(frozen=True)
class CARIMRegularizer:
    """What stage 2 adds to the generator's loss: a frozen classifier's map, maximised inside the mask (eq. 7)."""

    classifier: ChestClassifier  # in eval mode, its parameters without gradient; never changed
    weight: float  # lambda of eq. 7
    form: str  # of `CARIM_FORMS`
    every: int = 1  # only each so many steps, with so many times the weight (lazily, as StyleGAN2 regularises)
    finding: str = "Nodule"  # whose map is maximised

    def __post_init__(self) -> None:
        self.classifier.target(self.finding)
        if self.classifier.training or any(p.requires_grad for p in self.classifier.parameters()):
            raise ValueError("classifier must be in eval mode and without gradients: ChestClassifier.load gives it so")

    def loss(self, images: Tensor, masks: Tensor) -> CARIMLoss:
        """Return eq. 6, weighted for this step, of the last scale's nodule samples (B, 1, S, S) and their masks."""
        target, layer = self.classifier.target(self.finding), self.classifier.activation
        # The closed form equals eq. 5 before a global average pool, at half its cost.
        found = activation_map(self.classifier, images, target, layer=layer, method="closed-form", create_graph=True)
        loss, dead = carim_loss(found.maps, masks, form=self.form)
        return CARIMLoss(self.weight * self.every * loss, dead)


def gradient_ratio(loss: Tensor, adversarial: Tensor, images: Tensor) -> float:
    """Return |d loss / d images| over |d adversarial / d images| of two scalars; the graph stays."""
    norms = [torch.autograd.grad(term, images, retain_graph=True, allow_unused=True)[0] for term in (loss, adversarial)]
    top, bottom = (0.0 if g is None else float(g.float().norm()) for g in norms)
    return top / bottom if bottom > 0 else float("inf") if top > 0 else 0.0
