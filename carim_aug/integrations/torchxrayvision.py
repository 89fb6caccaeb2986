"""torchxrayvision: data sets with synthetic samples in them, and its DenseNets as gates (`pip install carim-aug[xrv]`).

import torchxrayvision as xrv
from carim_aug import SyntheticNoduleMix
from carim_aug.integrations.torchxrayvision import MixDataset

mix = SyntheticNoduleMix.from_pretrained(p=0.3, insertion="graft")
data = MixDataset(xrv.datasets.NIH_Dataset(imgpath), mix)
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.dataset import random_states_kept
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import Slot

try:
    import pandas as pd
    import torchxrayvision as xrv
except ImportError as error:
    raise ImportError("this module needs torchxrayvision: pip install carim-aug[xrv]") from error


class MixDataset(xrv.datasets.Dataset):
    """A torchxrayvision data set in which some samples are synthetic, and whose tables say so.

    torchxrayvision copies `.labels` when data sets are merged, filtered or made a subset of, and never looks again. So
    which samples are synthetic, and who hosts the added ones, is chosen here, for the mix's epoch of this moment, and
    holds from then on; the nodules in them, their places and strengths are drawn anew in every epoch. For another
    choice make another `MixDataset` after `mix.set_epoch`; `mix.loader(dataset)` and `mix.wrap(dataset)` choose anew by
    themselves, but keep no tables. Read this one with a DataLoader: `mix.loader` of it would mix a second time.

    A `transform` and `data_aug` of the data set's run before the mix, which sees what they give: boxes and masks are of
    that image.

    Attributes:
        dataset: the one that was mixed.
        labels: (n, columns): what the samples show, the synthetic ones too; NaN stays.
        pathologies: names of the columns.
        csv: n rows, with the columns "synthetic" (bool), "synthetic_seed" and "synthetic_index": with the epoch, the
            key of `SyntheticNoduleMix.regenerate`. The row of a graft, and of an added one, tells of its host's film,
            with a nodule among "Finding Labels". A whole synthetic image has no patient: numbers and texts are missing,
            "patientid" is "synthetic-SEED-INDEX".

    Args:
        dataset: any of torchxrayvision's; its images are (1 or 3, H, W).
        mix: decides and generates; a `value_range` of "auto" is [-1024, 1024] here. A nodule that no candidate of its
            gate is good enough for is put in without the gate, for the label promises one; the gate's report counts it.

    Raises:
        TypeError: a data set without `.labels` and `.pathologies`, or no mix.
        LabelError: no column for nodules among the pathologies.
    """

    def __init__(self, dataset: Any, mix: SyntheticNoduleMix) -> None:
        """Chooses the samples that are synthetic; generates nothing."""
        if not isinstance(mix, SyntheticNoduleMix):
            raise TypeError(f"mix must be a SyntheticNoduleMix, got {type(mix).__name__}")
        if not hasattr(dataset, "labels") or not hasattr(dataset, "pathologies"):
            raise TypeError(f"dataset must have .labels and .pathologies, got {type(dataset).__name__}")
        self.dataset = dataset
        self._mixed = mix.wrap(dataset)
        planned, filler = self._mixed.planned, self._mixed.filler
        if filler.value_range.name == "auto":
            filler.value_range = ValueRange.of("xrv")
        self._ungated = copy.copy(filler)
        self._ungated.gates = None
        self._enabled = bool(planned.enabled)
        slots = [planned.slot(i, planned.eligible(row)) for i, row in enumerate(dataset.labels)]
        slots += [planned.slot(i, False) for i in range(len(slots), len(planned))]
        self._classes = [slot.class_name for slot in slots]
        self._hosts = np.array([slot.host for slot in slots], dtype=np.int64)
        self.pathologies = list(dataset.pathologies)
        self.labels = self._mixed_labels()
        self.csv = self._mixed_csv()
        if hasattr(dataset, "which_dataset"):
            self.which_dataset = dataset.which_dataset[self._hosts]

    def string(self) -> str:
        """Gives the data set in words, as torchxrayvision's have it."""
        made = sum(name is not None for name in self._classes)
        inner = self.dataset.string() if hasattr(self.dataset, "string") else repr(self.dataset)
        return f"{type(self).__name__} num_samples={len(self)} synthetic={made}\n└ of " + inner.replace("\n", "\n  ")

    def __len__(self) -> int:
        """Real samples and added ones."""
        return len(self._hosts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Gives the samples in order."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Gives a sample of the data set's own structure and types; "idx" is its place here.

        Raises:
            RuntimeError: the mix has been switched on or off since the tables were made.
            ValueError: the mix's `placement` leaves no room for a nodule that `.labels` has.
        """
        index = self._checked(idx)
        sample = dict(self.dataset[int(self._hosts[index])])
        slot = self._planned_slot(index)
        if slot.synthetic:
            slot, pixels = self._filled(sample, slot)
            sample = self._mixed.planned.layout.put(sample, pixels, sample["lab"])
        sample["lab"] = self.labels[index].copy()
        if "idx" in sample:
            sample["idx"] = index
        if "pathology_masks" in sample:
            sample["pathology_masks"] = self._masks(sample, slot)
        if slot.synthetic and self._mixed.filler.insertion == "whole" and "semantic_masks" in sample:
            sample["semantic_masks"] = {}  # they are of the film that is no longer there
        return sample

    def slot(self, idx: int) -> Slot:
        """Gives the decision for a sample in the current epoch, with its full key and boxes (loads the host)."""
        index = self._checked(idx)
        slot = self._planned_slot(index)
        if not slot.synthetic:
            return slot
        with random_states_kept():  # looking must not move what the next sample's transforms draw from
            return self._filled(self.dataset[slot.host], slot)[0]

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose nodules are drawn, in all that the mix has wrapped; workers that are alive see it."""
        self._mixed.set_epoch(epoch)

    def _checked(self, idx: int) -> int:
        index = int(idx) + len(self) if idx < 0 else int(idx)
        if not 0 <= index < len(self):
            raise IndexError(f"idx must be in [0, {len(self)}), got {idx}")
        if bool(self._mixed.planned.enabled) != self._enabled:
            raise RuntimeError(
                f"mix.enabled must be {self._enabled}, as when this data set's labels were made, got "
                f"{not self._enabled}: make another MixDataset, or take the data set inside it"
            )
        return index

    def _planned_slot(self, index: int) -> Slot:
        planned, name, host = self._mixed.planned, self._classes[index], int(self._hosts[index])
        key = (planned.planner.seed, int(planned.epoch), index)
        if name is None:
            return planned.planner.decide(key, host, eligible=False)
        return replace(planned.planner.regenerate(key, name), host=host)

    def _filled(self, sample: dict[str, Any], slot: Slot) -> tuple[Slot, Tensor]:
        """A synthetic slot as host and gate want it, and its image (C, H, W)."""
        planner, layout = self._mixed.planned.planner, self._mixed.planned.layout
        image = torch.as_tensor(layout.get(sample)[0])[None]
        self._mixed.filler.value_range.check(image, "img")
        for filler in (self._mixed.filler, self._ungated):
            settled = filler.settle(image, [slot], planner)
            if settled.slots[0].synthetic:
                return settled.slots[0], filler.pixels(image, settled)[0][0]
        raise ValueError(
            f"placement must leave room for a nodule in every sample, got none in the host {slot.host}: widen its "
            "masks, or leave such samples out with eligible=..."
        )

    def _masks(self, sample: dict[str, Any], slot: Slot) -> dict[int, Any]:
        """The sample's masks by column of `.pathologies`, with the slot's nodules."""
        names, inner = list(self.pathologies), list(self.dataset.pathologies)
        whole = slot.synthetic and self._mixed.filler.insertion == "whole"
        old = {} if whole else {inner[column]: mask for column, mask in sample["pathology_masks"].items()}
        masks = {names.index(name): mask for name, mask in old.items() if name in names}
        nodule = self._mixed.planned.policy.nodule
        if len(slot.boxes) and nodule in names:
            size = sample["img"].shape[-2:]
            mask = boxes_to_masks([slot.boxes_at(*size)], (int(size[0]), int(size[1])))[0]
            like = masks.get(names.index(nodule), sample["img"])
            new = mask.to(like) if isinstance(like, Tensor) else mask.numpy().astype(like.dtype)
            masks[names.index(nodule)] = (like + new).clip(max=1) if nodule in old else new
        return masks

    def _rows(self, name: str) -> np.ndarray:
        """Places of the synthetic samples of a class."""
        return np.flatnonzero([own == name for own in self._classes])

    def _mixed_labels(self) -> np.ndarray:
        policy, graft = self._mixed.planned.policy, self._mixed.filler.insertion == "graft"
        labels = np.array(self.dataset.labels[self._hosts])
        for name in {name for name in self._classes if name is not None}:
            rows = self._rows(name)
            labels[rows] = policy.add_nodule(labels[rows]) if graft else policy.synthetic(labels[rows], name)
        return labels

    def _mixed_csv(self) -> pd.DataFrame:
        policy, seed = self._mixed.planned.policy, self._mixed.planned.planner.seed
        host = getattr(self.dataset, "csv", None)
        if host is None:
            host = pd.DataFrame(index=range(len(self.dataset)))
        csv = host.iloc[self._hosts].reset_index(drop=True)
        made = pd.Series([name is not None for name in self._classes], dtype=bool)
        nodules = self._rows(policy.nodule)
        if self._mixed.filler.insertion == "whole" and made.any():
            for name in csv.columns:
                csv[name] = csv[name].mask(made, False if csv[name].dtype == bool else None)
            if "view" in csv:
                csv.loc[made, "view"] = "UNKNOWN"  # torchxrayvision's word
            if "patientid" in csv:
                csv.loc[made, "patientid"] = [f"synthetic-{seed}-{i}" for i in np.flatnonzero(made)]
            if "Finding Labels" in csv:
                csv.loc[made, "Finding Labels"] = [name for name in self._classes if name is not None]
        elif "Finding Labels" in csv:
            csv.loc[nodules, "Finding Labels"] = [
                _with_finding(text, policy.nodule, policy.normal) for text in csv["Finding Labels"].iloc[nodules]
            ]
        if "has_masks" in csv:
            csv.loc[nodules, "has_masks"] = True
        csv["synthetic"] = made
        csv["synthetic_seed"] = pd.array([seed if own else None for own in made], dtype="UInt64")
        csv["synthetic_index"] = pd.array([i if own else None for i, own in enumerate(made)], dtype="Int64")
        return csv


class GateClassifier(nn.Module):
    """A torchxrayvision DenseNet as `probability_gate` and `cam_gate` want it: images in [-1, 1] to logits.

    The sigmoid of a logit is what the network itself gives: calibrated so that 0.5 is its operating point where it has
    `op_threshs`, and a plain probability where it has none. So `probability_gate(classifier, target)` needs no more.

    Args:
        model: with any weights.

    Raises:
        TypeError: another network.
    """

    def __init__(self, model: nn.Module) -> None:
        """Keeps the network, which is not changed."""
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
        """Gives the place of a finding among the logits: "Nodule", or "Lung Lesion" where the weights know that only.

        Raises:
            ValueError: the weights were not trained for it.
        """
        if not finding or finding not in self.findings:
            raise ValueError(f"finding must be one of {[f for f in self.findings if f]}, got {finding!r}")
        return self.findings.index(finding)

    def forward(self, images: Tensor) -> Tensor:
        """Gives logits (n, len(findings)) of images (n, 1, H, W) float in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
            raise ValueError(f"images must be float (n, 1, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        maps = self.activation(self.model.features(images * 1024))
        logits = self.model.classifier(maps.mean(dim=(2, 3)))
        if self.model.op_threshs is None:
            return logits
        return xrv.models.op_norm(logits.sigmoid(), self.model.op_threshs).logit(eps=1e-6)


def _with_finding(text: str, finding: str, normal: str) -> str:
    """ChestX-ray14's list of findings with one more, and no longer the normal class."""
    findings = [name for name in str(text).split("|") if name not in ("", normal, finding)]
    return "|".join([*findings, finding])
