"""What stage 2 adds: the map of a frozen classifier, maximised inside the mask (METHOD 4, eq. 6 and 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from carim_aug.ops.cam import activation_map
from train.classifier.densenet import ChestClassifier
from train.gan.losses import CARIMLoss, carim_loss


@dataclass(frozen=True)
class Influence:
    """The CARIM loss with its classifier and numbers.

    Attributes:
        classifier: in eval mode, its parameters without gradient; never changed.
        weight: lambda of eq. 7.
        form: of `train.gan.losses.CARIM_FORMS`.
        every: only each so many steps, with so many times the weight (lazily, as StyleGAN2 regularises).
        finding: whose map is maximised.
    """

    classifier: ChestClassifier
    weight: float
    form: str
    every: int = 1
    finding: str = "Nodule"

    def __post_init__(self) -> None:
        """Checks that the classifier knows the finding and cannot be trained by accident."""
        self.classifier.target(self.finding)
        if self.classifier.training or any(p.requires_grad for p in self.classifier.parameters()):
            raise ValueError("classifier must be in eval mode and without gradients: ChestClassifier.load gives it so")

    def loss(self, images: Tensor, masks: Tensor) -> CARIMLoss:
        """Gives eq. 6 with gradients to the images, weighted for this step, and the share of dead samples.

        Args:
            images: (B, 1, S, S), [-1, 1], nodule samples of the last scale.
            masks: (B, 1, S, S) in {0, 1}.
        """
        maps = activation_map(
            self.classifier,
            images,
            self.classifier.target(self.finding),
            layer=self.classifier.activation,
            method="closed-form",  # equals eq. 5 before a global average pool, at half its cost (DESIGN 4)
            create_graph=True,
        ).maps
        loss, dead = carim_loss(maps, masks, form=self.form)
        return CARIMLoss(self.weight * self.every * loss, dead)


def gradient_ratio(loss: Tensor, adversarial: Tensor, images: Tensor) -> float:
    """Gives |d loss / d images| over |d adversarial / d images|; the graph stays.

    Args:
        loss: scalar.
        adversarial: scalar.
        images: (B, 1, S, S) of which both are functions.
    """
    norms = [torch.autograd.grad(term, images, retain_graph=True, allow_unused=True)[0] for term in (loss, adversarial)]
    top, bottom = (0.0 if g is None else float(g.float().norm()) for g in norms)
    return top / bottom if bottom > 0 else float("inf") if top > 0 else 0.0
