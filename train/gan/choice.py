"""How near generated films are to real ones, on a schedule: KID and FID per class on val, never on test (METHOD 6).

By an encoder of `train.classifier.encoders`, which is not the classifier that CARIM used. The lowest KID is kept.
"""

from pathlib import Path

import torch
from torch import Tensor

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.common.labelled import read_labelled
from train.common.run import RunError
from train.metrics.fid import frechet_distance, kernel_distance


class Choice:
    """Real features of val's normal and nodule films, taken once, and distances to them.

    Args:
        encoder: a file of `train.classifier.encoders`.
        data: ChestX-ray14's layout with a val split.
        prior: of the masks.
        seed: of noise and masks, the same at each snapshot.
        images: generated films of each class, and at most so many real ones.
        device: where the encoder works.
        any_size: see `train.gan.batch.read_films`.

    Raises:
        RunError: val lacks films of a class.
    """

    def __init__(
        self,
        encoder: str | Path,
        data: str | Path,
        prior: LocationPrior,
        *,
        seed: int,
        images: int = 500,
        device: torch.device | str = "cpu",
        any_size: bool = False,
    ) -> None:
        """Reads val and takes its features."""
        from train.classifier.encoders import features_of, load_encoder

        self.encoder, self.prior, self.seed, self.images = load_encoder(encoder).to(device), prior, seed, images
        films = read_labelled(data, "val", self.encoder.size, any_size=any_size)
        nodule, normal = films.labels[:, FINDINGS.index("Nodule")] > 0, ~films.labels.any(dim=1)
        self.real: dict[str, Tensor] = {}
        for name, rows in (("normal", normal), ("nodule", nodule)):
            chosen = films.images[rows][:images]
            if len(chosen) < 2:
                raise RunError(f"{data}: the val split needs at least 2 {name} films for --encoder, got {len(chosen)}")
            self.real[name] = features_of(self.encoder, chosen)

    @torch.no_grad()
    def figures(self, generator: NoduleGenerator, *, batch: int = 32) -> dict[str, float]:
        """Gives "kid", the mean over the classes, and "kid_normal", "kid_nodule", "fid_normal", "fid_nodule".

        Args:
            generator: in eval mode.
            batch: images at once.
        """
        from train.classifier.encoders import features_of

        stream, size = torch.Generator().manual_seed(fold(self.seed, 6)), generator.image_size
        device = next(generator.parameters()).device
        told: dict[str, float] = {}
        for name, real in self.real.items():
            parts = []
            for start in range(0, self.images, batch):
                n = min(batch, self.images - start)
                noise = torch.randn(n, generator.noise_dim, generator=stream).to(device)
                masks = self.prior.sample(n, generator=stream, image_size=size).masks.to(device)
                images = generator(noise, masks if name == "nodule" else torch.zeros_like(masks))
                parts.append(features_of(self.encoder, images.float()))
            made = torch.cat(parts)
            told[f"kid_{name}"] = float(kernel_distance(real, made))
            told[f"fid_{name}"] = float(frechet_distance(real, made))
        return {"kid": (told["kid_normal"] + told["kid_nodule"]) / 2, **told}
