"""What a GAN run leaves behind every so many images: pictures, the averaged generator's export, the best, a checkpoint.

The checkpoint comes last: a run killed before it goes on from the one before and writes the same files again.
"""

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator
from carim_aug.generators.whole import WholeImageGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import fold
from train.classifier.encoders import features_of, load_encoder
from train.common.images import ImageSet, read_images
from train.common.run import Run, folder_whole, git_commit, write_whole
from train.gan.networks import Networks, retake_statistics
from train.gan.presets import GANPreset
from train.metrics.fid import frechet_distance, kernel_distance


class BestByKID:
    """How near generated images are to val's, never test's: KID and FID per class, by another network than CARIM's."""

    def __init__(
        self,
        encoder: str | Path,
        data: str | Path,
        prior: LocationPrior,
        *,
        seed: int,  # of noise and masks, the same at each snapshot
        images: int,  # generated ones of each class, and at most so many real ones
        device: torch.device | str = "cpu",
        any_size: bool = False,
    ) -> None:
        self.encoder, self.prior, self.seed, self.images = load_encoder(encoder).to(device), prior, seed, images
        val = read_images(data, "val", self.encoder.size, only_normal_or_nodule=True, any_size=any_size)
        val.check(f"{data}: for --encoder, the val split", normal=2, nodule=2)
        rows = {"normal": val.normal, "nodule": val.nodule}
        self.real = {name: features_of(self.encoder, val.images[some[:images]]) for name, some in rows.items()}

    @torch.no_grad()
    def figures(self, generator: MultiScaleGenerator, *, batch: int = 32) -> dict[str, float]:
        """Return "kid", the mean over the classes, and "kid_normal", "kid_nodule", "fid_normal", "fid_nodule"."""
        stream, size = torch.Generator().manual_seed(fold(self.seed, 6)), generator.image_size
        device = next(generator.parameters()).device
        figures: dict[str, float] = {}
        for name, real in self.real.items():
            parts = []
            for start in range(0, self.images, batch):
                n = min(batch, self.images - start)
                noise = torch.randn(n, generator.noise_dim, generator=stream).to(device)
                masks = self.prior.sample(n, generator=stream, image_size=size).masks.to(device)
                images = generator(noise, masks if name == "nodule" else torch.zeros_like(masks))
                parts.append(features_of(self.encoder, images.float()))
            generated = torch.cat(parts)
            figures[f"kid_{name}"] = float(kernel_distance(real, generated))
            figures[f"fid_{name}"] = float(frechet_distance(real, generated))
        return {"kid": (figures["kid_normal"] + figures["kid_nodule"]) / 2, **figures}


class Snapshots:
    """Snapshots of one run, with the same 8 noises and masks in every picture.

    `on_snapshot` is called after each with the folder of the best weights and their figures, or with that of the newest
    and no figures where nothing chooses.
    """

    def __init__(
        self,
        run: Run,
        preset: GANPreset,
        images: ImageSet,  # counted in the weights' provenance
        prior: LocationPrior,  # of the masks; goes beside the weights
        *,
        device: torch.device,
        best: BestByKID | None = None,  # the snapshot of the lowest KID is kept in best/ and best.pt
        on_snapshot: Callable[[Path, dict[str, Any]], None] | None = None,
    ) -> None:
        self.run, self.preset, self.prior, self.best, self.on_snapshot = run, preset, prior, best, on_snapshot
        config, seed = ARCHITECTURES[preset.architecture], run.recipe["seed"]
        fixed = torch.Generator().manual_seed(fold(seed, 1))
        self.noise = torch.randn(8, config.noise_dim, generator=fixed).to(device)
        boxes = prior.sample(8, generator=fixed, image_size=config.image_size).boxes
        self.masks = boxes_to_masks(boxes, config.image_size).to(device)
        boxed = sum(len(images.boxes[i]) > 0 for i in images.nodule.tolist())
        self.data = f"{run.recipe['data']}, train split: {len(images.normal)} normal images, {len(images.nodule)} with "
        self.data += f"a nodule ({boxed} boxed)"
        if run.recipe["ct_nodules"]:
            self.data += "; CT nodules in projection (LUNA16 / LIDC-IDRI) superimposed on normal images"

    def take(self, networks: Networks, state: dict[str, Any], *, scales: int) -> None:
        """Write all of one snapshot with so many trained branches; sets the "best" of the checkpoint's `state`."""
        images, is_best = state["images_seen"], False
        export, best = (self.run.folder / name for name in ("export", "best"))
        self._write_picture(networks, images, scales)
        generator = self._export(networks, images)
        if self.best is not None and scales == generator.config.branches:
            figures = self.best.figures(generator)
            self.run.log(images=images, **{k: float(f"{v:.4g}") for k, v in figures.items()})
            is_best = figures["kid"] < state["best"].get("kid", math.inf)
            if is_best:
                state["best"] = {"images": images, **figures}
                with folder_whole(self.run.folder, "best") as part:
                    shutil.copytree(export, part, dirs_exist_ok=True)
        self.run.save(state, images, best=is_best)
        if self.on_snapshot is not None:
            self.on_snapshot(best if state["best"] and best.exists() else export, state["best"])

    def _write_picture(self, networks: Networks, images: int, scales: int) -> None:
        averaged: Any = networks.average.module
        training = averaged.training
        averaged.eval()
        with torch.no_grad():
            nodule = averaged.pyramid(self.noise, self.masks, scales=scales)[-1]
            normal = averaged.pyramid(self.noise, torch.zeros_like(self.masks), scales=scales)[-1]
        averaged.train(training)
        masks = F.adaptive_avg_pool2d(self.masks, nodule.shape[-1]) * 2 - 1
        sheet = torch.cat([normal, nodule, ((nodule - normal) * 4).clamp(-1, 1), masks])
        grid, file = make_grid(sheet, nrow=8, normalize=True, value_range=(-1, 1)), io.BytesIO()
        save_image(grid, file, format="png")
        write_whole(self.run.folder / f"samples-{images:09d}.png", file.getbuffer())

    def _export(self, networks: Networks, images: int) -> MultiScaleGenerator:
        """Write the averaged generator with batch norm statistics of its own, and return it in eval mode."""
        generator = MultiScaleGenerator(ARCHITECTURES[self.preset.architecture]).to(self.noise.device)
        generator.load_state_dict(networks.average.module.state_dict())
        retake_statistics(generator, self.prior, self.preset, seed=self.run.recipe["seed"])
        recipe = {**self.run.recipe, "images_seen": images, "stage": 2 if "stage_2_from" in self.run.recipe else 1}
        facts: dict[str, Any] = {"training_data": self.data, "recipe": recipe, "git_commit": git_commit()}
        with folder_whole(self.run.folder, "export") as folder:
            WholeImageGenerator(generator).save_pretrained(folder, prior=self.prior, **facts)
        return generator
