"""What a GAN run leaves behind every so many images: pictures, the averaged generator's export, the best, a checkpoint.

The checkpoint comes last: a run killed before it goes on from the one before and writes the same files again.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import fold
from train.common.run import Run, folder_whole, git_commit, write_whole
from train.gan.batch import Films
from train.gan.choice import Choice
from train.gan.networks import Networks, retake_statistics
from train.gan.presets import GANPreset


class Snapshots:
    """Snapshots of one run, with the same 8 noises and masks in every picture.

    Args:
        run: where they go.
        preset: of the run.
        films: told of in the weights.
        prior: of the masks; goes beside the weights.
        device: of the networks.
        choice: says how good a snapshot is; the best is kept in best/ and best.pt.
        told: is given the export's folder and nothing, or that of the best and its figures, after each snapshot.
    """

    def __init__(
        self,
        run: Run,
        preset: GANPreset,
        films: Films,
        prior: LocationPrior,
        *,
        device: torch.device,
        choice: Choice | None = None,
        told: Callable[[Path, dict[str, Any]], None] | None = None,
    ) -> None:
        """Draws the noises and masks."""
        self.run, self.preset, self.prior, self.choice, self.told = run, preset, prior, choice, told
        config, seed = ARCHITECTURES[preset.architecture], run.recipe["seed"]
        fixed = torch.Generator().manual_seed(fold(seed, 1))
        self.noise = torch.randn(8, config.noise_dim, generator=fixed).to(device)
        boxes = prior.sample(8, generator=fixed, image_size=config.image_size).boxes
        self.masks = boxes_to_masks(boxes, config.image_size).to(device)
        self.data = f"{run.recipe['data']}, train split: {len(films.normal)} normal films, {len(films.nodule)} with a "
        self.data += f"nodule ({len(films.boxed)} boxed)"
        if run.recipe["ct_nodules"]:
            self.data += "; CT nodules in projection (LUNA16 / LIDC-IDRI) superimposed on normal films"

    def take(self, networks: Networks, state: dict[str, Any], *, scales: int) -> Path:
        """Writes everything of one snapshot; gives the export's folder.

        Args:
            networks: as they are.
            state: of the checkpoint: "images_seen", "networks", "optimizers", "best" (changed here) and more.
            scales: branches that are trained so far.

        Raises:
            TrainingError: a tensor is not finite.
            OSError: as the disk has it; the checkpoints from before are intact.
        """
        images, best = state["images_seen"], False
        self._picture(networks, images, scales)
        generator = self._exported(networks)
        folder = self._export(generator, images)
        if self.choice is not None and scales == generator.config.branches:
            figures = self.choice.figures(generator.to(self.noise.device))
            self.run.log(images=images, **{k: float(f"{v:.4g}") for k, v in figures.items()})
            best = figures["kid"] < state["best"].get("kid", float("inf"))
            if best:
                state["best"] = {"images": images, **figures}
                with folder_whole(self.run.folder, "best") as part:
                    shutil.copytree(folder, part, dirs_exist_ok=True)
        self.run.save(state, images, best=best)
        if self.told is not None:
            chosen = self.run.folder / "best"
            self.told(chosen if state["best"] and chosen.exists() else folder, state["best"])
        return folder

    def _picture(self, networks: Networks, images: int, scales: int) -> None:
        averaged = networks.average.module
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
        self.run.picture("samples", grid, images)

    def _exported(self, networks: Networks) -> NoduleGenerator:
        generator = NoduleGenerator(ARCHITECTURES[self.preset.architecture]).to(self.noise.device)
        generator.load_state_dict(networks.average.module.state_dict())
        retake_statistics(generator, self.prior, self.preset, seed=self.run.recipe["seed"])
        return generator

    def _export(self, generator: NoduleGenerator, images: int) -> Path:
        recipe = {**self.run.recipe, "images_seen": images, "stage": 2 if "stage_2_from" in self.run.recipe else 1}
        with folder_whole(self.run.folder, "export") as folder:
            facts = {"training_data": self.data, "recipe": recipe, "git_commit": git_commit()}
            generator.save_pretrained(folder, prior=self.prior, **facts)
        return self.run.folder / "export"
