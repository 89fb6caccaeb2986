"""Presets of the GAN's training: one row per published or shipped number (METHOD 6 and 10; EVIDENCE, Quality)."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GANPreset:
    """Numbers of one training, both stages.

    Attributes:
        architecture: name in `carim_aug.models.generator.ARCHITECTURES`.
        images: real images to show in all, counted as METHOD 6 does (batch * steps).
        batch: images per step, half normal and half nodule.
        learning_rate: Adam's, for generator and discriminators.
        betas: Adam's.
        discriminator_width: maps after the first convolution of every scale's discriminator.
        discriminator_channels: most maps of a discriminator's trunk (see `ScaleDiscriminator`).
        condition_dim: length of the class embedding in the conditional head.
        discriminator_norm: batch norm in the discriminators (the source) or none (EVIDENCE).
        augment: DiffAugment on image and mask together.
        superimposed: share of the nodule half of a batch that is a CT nodule superimposed on a real normal film.
        crop_weight: weight of the discriminator of (image, mask) crops in the generator's loss; 0 leaves it out.
        difference_weight: the same for (difference, mask) crops.
        outside_weight: weight of the mean |difference| outside the dilated mask.
        level_weight: weight of `carim_aug.losses.level_loss` on the last scale.
        carim_weight: lambda of eq. 7, in stage 2.
        carim_form: of `carim_aug.losses.CARIM_FORMS`.
        carim_every: the CARIM loss each so many steps, with so many times the weight.
        grow_at: images seen at which branch 2, 3, .. joins (progressive training); all from the start if empty.
        warm_up: images that train the discriminators alone when the generator starts from given weights.
        ema_images: half-life of the moving average of the weights, in images.
        snapshot_images: a picture and a checkpoint every so many images.
    """

    architecture: str
    images: int
    batch: int = 16
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    discriminator_width: int = 32
    discriminator_channels: int = 256
    condition_dim: int = 32
    discriminator_norm: bool = False
    augment: bool = True
    superimposed: float = 0.5
    crop_weight: float = 1.0
    difference_weight: float = 3.0
    outside_weight: float = 20.0
    level_weight: float = 20.0
    carim_weight: float = 0.001
    carim_form: str = "softplus"
    carim_every: int = 4
    grow_at: tuple[int, ...] = ()
    warm_up: int = 4_000
    ema_images: int = 3_000
    snapshot_images: int = 4_000

    def to_dict(self) -> dict[str, Any]:
        """Gives the numbers as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# thesis256 is METHOD 6 to the letter: 43 epochs of 59,728 + 5,698 films, batch 24, Adam 2e-5, none of our extensions.
PRESETS: dict[str, GANPreset] = {
    "thesis256": GANPreset(
        "thesis256",
        images=43 * (59_728 + 5_698),
        batch=24,
        learning_rate=2e-5,
        betas=(0.9, 0.999),
        discriminator_width=64,
        discriminator_channels=512,
        condition_dim=128,
        discriminator_norm=True,
        augment=False,
        superimposed=0.0,
        crop_weight=0.0,
        difference_weight=0.0,
        outside_weight=0.0,
        level_weight=0.0,
        carim_form="source",
        carim_every=1,
        snapshot_images=50_000,
    ),
    "fast256": GANPreset("fast256", images=2_000_000, batch=32, grow_at=(100_000, 300_000), snapshot_images=25_000),
    "fast128": GANPreset("fast128", images=400_000, grow_at=(16_000, 40_000)),
    "tiny": GANPreset(
        "tiny", images=256, batch=8, discriminator_width=8, grow_at=(64,), warm_up=32, snapshot_images=128
    ),
}
