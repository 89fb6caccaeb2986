"""torchxrayvision: data sets with synthetic samples in them, and its DenseNets as gates (`pip install carim-aug[xrv]`).

data = MixDataset(xrv.datasets.NIH_Dataset(imgpath), SyntheticNoduleMix.from_pretrained(p=0.3))
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.images import resize
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.apply import Applier
from carim_aug.transforms.dataset import keep_random_states
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import Decision

try:
    import pandas as pd
    import torchxrayvision as xrv
except ImportError as error:
    raise ImportError("this module needs torchxrayvision: pip install carim-aug[xrv]") from error


class MixDataset(xrv.datasets.Dataset):
    """A torchxrayvision data set in which some samples are synthetic, and whose tables say so.

    torchxrayvision copies `.labels` when data sets are merged, filtered or made a subset of, and never looks again. So
    which samples are synthetic, and the backgrounds of the added ones, is chosen here, for the mix's epoch of this
    moment, and holds from then on; the nodules in them, their places and strengths are new in every epoch. For another
    choice make another `MixDataset` after `mix.set_epoch`; `mix.loader(dataset)` and `mix.wrap(dataset)` choose anew by
    themselves, but have no tables. Read this one with a DataLoader: `mix.loader` of it would mix a second time.

    A `transform` and `data_aug` of the data set's run before the mix: boxes and masks are of the image that they make.

    `labels` (n, columns), NaN where it was, and `csv`, of n rows, say what the samples show. `csv` has the columns
    "synthetic" (bool), "synthetic_seed" and "synthetic_index": with the epoch, the key of `mix.regenerate`. The row of
    a graft, and of an added one, is its background's, with a nodule among "Finding Labels". A whole synthetic image has
    no patient: numbers and texts are missing, "patientid" is "synthetic-SEED-INDEX".

    Args:
        dataset: any of torchxrayvision's; its images are (1 or 3, H, W).
        mix: its `value_range` of "auto" is [-1024, 1024] here. A nodule that no candidate of its gate is good enough
            for is put in without the gate, for the label promises one; the gate's report counts it.

    Raises:
        TypeError: a data set without `.labels` and `.pathologies`, or no mix.
        LabelError: no column for nodules among the pathologies.
    """

    def __init__(self, dataset: Any, mix: SyntheticNoduleMix) -> None:
        if not isinstance(mix, SyntheticNoduleMix):
            raise TypeError(f"mix must be a SyntheticNoduleMix, got {type(mix).__name__}")
        if not hasattr(dataset, "labels") or not hasattr(dataset, "pathologies"):
            raise TypeError(f"dataset must have .labels and .pathologies, got {type(dataset).__name__}")
        self.dataset, self._mixed = dataset, mix.wrap(dataset)
        planned, applier, settings = self._mixed.planned, self._mixed.applier, self._mixed.planned.settings
        self._planned, self._policy, self._whole = planned, planned.policy, settings.insertion == "whole"
        if settings.value_range.name == "auto":
            settings = replace(settings, value_range=ValueRange.of("xrv"))
        ungated = replace(settings, graft=replace(settings.graft, gates=None))
        self._appliers = [Applier(each, applier.source, applier.device) for each in (settings, ungated)]
        self._enabled = self._mixed.synthetic_enabled
        start = planned.settings.seed, planned.epoch
        decisions = [planned.decide((*start, i), planned.eligible(row)) for i, row in enumerate(dataset.labels)]
        decisions += [planned.decide((*start, i), False) for i in range(len(decisions), len(planned))]
        self._classes = np.array([decision.class_name for decision in decisions], dtype=object)
        self._backgrounds = np.array([decision.background for decision in decisions], dtype=np.int64)
        self.pathologies = list(dataset.pathologies)
        self.labels, self.csv = self._mix_labels(), self._mix_csv()
        if hasattr(dataset, "which_dataset"):
            self.which_dataset = dataset.which_dataset[self._backgrounds]

    def string(self) -> str:
        """Return the data set in words, as torchxrayvision's have it."""
        made = int(self.csv["synthetic"].sum())
        inner = self.dataset.string() if hasattr(self.dataset, "string") else repr(self.dataset)
        return f"{type(self).__name__} num_samples={len(self)} synthetic={made}\n└ of " + inner.replace("\n", "\n  ")

    def __len__(self) -> int:
        return len(self._backgrounds)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        # RuntimeError: the mix has been switched since the tables were made; ValueError: no room for a nodule that
        # `.labels` has. "idx" of the sample is its place here.
        decision = self._decide(idx, self._planned.passes.enter)
        index, sample = decision.key[2], dict(self.dataset[decision.background])
        if decision.synthetic:
            decision, pixels = self._apply(sample, decision)
            sample = self._planned.layout.put(sample, pixels, sample["lab"])
        sample["lab"] = self.labels[index].copy()
        if "idx" in sample:
            sample["idx"] = index
        if "pathology_masks" in sample:
            sample["pathology_masks"] = self._masks(sample, decision)
        if decision.synthetic and self._whole and "semantic_masks" in sample:
            sample["semantic_masks"] = {}  # they are of the image that is no longer there
        return sample

    def decision(self, idx: int) -> Decision:
        """Return the decision for a sample as it was asked for last, or will be first, with its full key and boxes."""
        decision = self._decide(idx, self._planned.passes.last)
        if not decision.synthetic:
            return decision
        with keep_random_states():  # looking must not move what the next sample's transforms draw from
            return self._apply(self.dataset[decision.background], decision)[0]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose nodules are drawn, in all that the mix has wrapped; workers that are alive see it."""
        self._mixed.set_epoch(epoch)

    def _decide(self, idx: int, epoch_of: Callable[[int], int]) -> Decision:
        """Return the decision of an epoch, before it is placed."""
        index = int(idx) + len(self) if idx < 0 else int(idx)
        if not 0 <= index < len(self):
            raise IndexError(f"idx must be in [0, {len(self)}), got {idx}")
        if self._mixed.synthetic_enabled != self._enabled:
            raise RuntimeError(
                f"mix.enabled must be {self._enabled}, as when this data set's labels were made, got "
                f"{not self._enabled}: make another MixDataset, or take the data set inside it"
            )
        planner, name, background = self._planned.planner, self._classes[index], int(self._backgrounds[index])
        key = (planner.seed, epoch_of(index), index)
        if name is None:
            return planner.decide(key, background, eligible=False)
        return planner.regenerate(key, name, background)

    def _apply(self, sample: dict[str, Any], decision: Decision) -> tuple[Decision, Tensor]:
        """Return a synthetic decision as background and gate want it, and its image (C, H, W)."""
        image = torch.as_tensor(self._planned.layout.get(sample)[0])[None]
        self._appliers[0].settings.value_range.check(image, "img")
        for applier in self._appliers:
            placed = applier.place(image, [decision], self._planned.planner)
            if placed.decisions[0].synthetic:
                return placed.decisions[0], applier.pixels(image, placed)[0][0]
        raise ValueError(
            "placement must leave room for a nodule in every sample, got none in the background "
            f"{decision.background}: widen its masks, or leave such samples out with eligible=..."
        )

    def _masks(self, sample: dict[str, Any], decision: Decision) -> dict[int, Any]:
        """Return the sample's masks by column of `.pathologies`, with the decision's nodules."""
        names, inner = list(self.pathologies), list(self.dataset.pathologies)
        replaced = decision.synthetic and self._whole
        old = {} if replaced else {inner[column]: mask for column, mask in sample["pathology_masks"].items()}
        masks = {names.index(name): mask for name, mask in old.items() if name in names}
        nodule = self._policy.nodule
        if len(decision.boxes) and nodule in names:
            height, width = (int(side) for side in sample["img"].shape[-2:])
            mask = boxes_to_masks([decision.boxes_at(height, width)], (height, width))[0]
            like = masks.get(names.index(nodule), sample["img"])
            new = mask.to(like) if isinstance(like, Tensor) else mask.numpy().astype(like.dtype)
            masks[names.index(nodule)] = (like + new).clip(max=1) if nodule in old else new
        return masks

    # --- Tables ---
    def _mix_labels(self) -> np.ndarray:
        policy, labels = self._policy, np.array(self.dataset.labels[self._backgrounds])
        for name in {name for name in self._classes if name is not None}:
            rows = np.flatnonzero(self._classes == name)
            labels[rows] = policy.synthetic(labels[rows], name) if self._whole else policy.add_nodule(labels[rows])
        return labels

    def _mix_csv(self) -> pd.DataFrame:
        policy, seed = self._policy, self._planned.settings.seed
        real = getattr(self.dataset, "csv", None)
        real = pd.DataFrame(index=range(len(self.dataset))) if real is None else real
        csv = real.iloc[self._backgrounds].reset_index(drop=True)
        nodules = np.flatnonzero(self._classes == policy.nodule)
        made = pd.Series([name is not None for name in self._classes], dtype=bool)
        if self._whole and made.any():
            rows = np.flatnonzero(made)
            new: dict[str, Any] = {"view": "UNKNOWN", "Finding Labels": self._classes[rows]}  # torchxrayvision's word
            new["patientid"] = [f"synthetic-{seed}-{i}" for i in rows]
            for name in csv.columns:
                csv[name] = csv[name].mask(made, False if csv[name].dtype == bool else None)
                if name in new:
                    csv.loc[made, name] = new[name]
        elif "Finding Labels" in csv:
            texts = csv["Finding Labels"].iloc[nodules]
            csv.loc[nodules, "Finding Labels"] = [_add_finding(text, policy.nodule, policy.normal) for text in texts]
        if "has_masks" in csv:
            csv.loc[nodules, "has_masks"] = True
        csv["synthetic"] = made
        csv["synthetic_seed"] = pd.array([seed if own else None for own in made], dtype="UInt64")
        csv["synthetic_index"] = pd.Series(range(len(csv)), dtype="Int64").where(made)
        return csv


class GateClassifier(nn.Module):
    """A torchxrayvision DenseNet as `probability_gate` and `cam_gate` want it: images in [-1, 1] to logits.

    The sigmoid of a logit is what the network itself returns: calibrated so that 0.5 is its operating point where it
    has `op_threshs`, a plain probability where it has none. So `probability_gate(classifier, target)` needs no more.
    Another network is a TypeError.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, xrv.models.DenseNet):
            raise TypeError(f"model must be a torchxrayvision.models.DenseNet, got {type(model).__name__}")
        self.model = model
        self.size = int(getattr(model, "input_resolution", 224))
        self.activation = nn.ReLU()  # the layer whose output Grad-CAM looks at; the network's own works in place

    @property
    def findings(self) -> tuple[str, ...]:
        """What the logits stand for; "" where the weights were not trained for any."""
        names = list(self.model.targets)
        names += [""] * (self.model.classifier.out_features - len(names))
        thresholds = self.model.op_threshs
        trained = [True] * len(names) if thresholds is None else (~thresholds.isnan()).tolist()
        return tuple(name if known else "" for name, known in zip(names, trained, strict=True))

    def target(self, finding: str = "Nodule") -> int:
        """Return the place of a finding among the logits: "Nodule", or "Lung Lesion" where the weights know that only.

        ValueError if the weights were not trained for it.
        """
        if not finding or finding not in self.findings:
            raise ValueError(f"finding must be one of {[f for f in self.findings if f]}, got {finding!r}")
        return self.findings.index(finding)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, len(findings)) of images (n, 1, H, W) float in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
            raise ValueError(f"images must be float (n, 1, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        maps = self.activation(self.model.features(resize(images, (self.size, self.size)) * 1024))
        logits = self.model.classifier(maps.mean(dim=(2, 3)))
        if self.model.op_threshs is None:
            return logits
        return xrv.models.op_norm(logits.sigmoid(), self.model.op_threshs).logit(eps=1e-6)


def _add_finding(text: str, finding: str, normal: str) -> str:
    """Return ChestX-ray14's list of findings with one more, and no longer the normal class."""
    return "|".join([*(name for name in str(text).split("|") if name not in ("", normal, finding)), finding])
