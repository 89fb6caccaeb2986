"""albumentations: generated nodules grafted into images, boxes and masks (`pip install carim-aug[albumentations]`).

A.Compose([GraftNodule(p=0.3, label="Nodule")], bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]))
"""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from numbers import Real
from operator import index as as_index
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from carim_aug.location.placement import PLACEMENTS, TRIES, candidates
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.value_range import RangeError, ValueRange
from carim_aug.transforms.amounts import Amount
from carim_aug.transforms.apply import Applier, Placed
from carim_aug.transforms.gate import ROWS
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import Decision, Planner, check_epoch
from carim_aug.transforms.settings import Graft, MixSettings

try:
    import albumentations as A
    from albumentations.core.type_definitions import Targets
except ImportError as error:
    raise ImportError("this module needs albumentations: pip install carim-aug[albumentations]") from error

NODULE = "Nodule"
_LOADED: WeakValueDictionary[str | None, SyntheticNoduleMix] = WeakValueDictionary()  # one for all of the same weights


class GraftNodule(A.DualTransform):
    """Grafts nodules into a chest X-ray, as `SyntheticNoduleMix` does: x + strength * feather * residual.

    Adds a box for each nodule, in the format of `bbox_params`, with its label in each of the `label_fields`; draws it
    as an ellipse into `mask`, and adds that ellipse to `masks` as one more. Keypoints stay. Nothing outside the
    feathered boxes changes. A nodule whose box `bbox_params` would drop for its size is drawn again, or not grafted.

    What becomes of a sample is keyed by (seed, epoch, the sample's `index`) where the call has an `index`, and is then
    what `SyntheticNoduleMix(p=..., seed=...).wrap(dataset)` does to that image. Else the key is the count of samples
    since `set_epoch`, kept in shared memory, with the worker and the rank: different in every rank, worker and epoch,
    unlike what albumentations' own seeds give. The generator runs on the CPU, one image at a time, in the workers.

    Args:
        weights: folder or hub id of the generator and its prior; None: the bundled ones.
        seed: of all decisions, 0 to 2**64 - 1.
        label: of new boxes: a string or a number as the label fields hold, or a dict from label field to value.
        mask_value: of a nodule's pixels in `mask`; of one (H, W, C), a list of C values, None for a channel that stays.
        strength: of the residual, in (0, 4], or (least, most).
        placement: "lungs": about as real nodules lie in the image's own lungs; "prior": unseen.

    Targets: image ((H, W), (H, W, 1) or (H, W, 3); uint8, or float32 in [0, 1]), mask, masks, bboxes, keypoints. An
    option, image or box that breaks its rule is a ValueError.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES, Targets.KEYPOINTS)

    def __init__(
        self,
        weights: str | None = None,
        seed: int = 0,
        label: Any = 1,
        mask_value: float | list[float | None] = 1,
        strength: float | tuple[float, float] = 1.0,
        placement: str = "lungs",
        p: float = 0.5,
    ) -> None:
        super().__init__(p=p)
        self._available_keys |= {"index"}
        if not isinstance(placement, str):  # a function cannot be serialised
            raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
        for value in label.values() if isinstance(label, dict) else [label]:
            if not isinstance(value, str | Real):
                raise ValueError(f"label must be a string, a number or a dict of these, got {value!r}")
        self.weights, self.label, self.mask_value = weights, label, mask_value
        self.strength, self.placement, self._seed = strength, placement, seed
        graft, name = Graft(placement, strength), None if weights is None else str(weights)
        self._mix = _LOADED.get(name) or SyntheticNoduleMix.from_pretrained(weights)
        _LOADED[name] = self._mix
        self._applier = Applier(MixSettings(self._mix.prior, seed=seed, graft=graft), self._mix.generator, "cpu")
        # The epoch; then the samples that the main process and each worker have seen in it.
        self._counts = torch.zeros(1 + ROWS, dtype=torch.int64).share_memory_()

    @property
    def targets(self) -> dict[str, Callable[..., Any]]:
        """What is changed: no volumes, and no batches of images."""
        names = ("image", "mask", "masks", "bboxes", "keypoints")
        return {name: function for name, function in super().targets.items() if name in names}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which workers that are alive see; counts start anew."""
        check_epoch(epoch)
        self._counts.zero_()
        self._counts[0] = epoch

    def __call__(self, *args: Any, force_apply: bool = False, **kwargs: Any) -> Any:
        """Return the sample, with nodules or as it was; a bad one is refused whether it would get any or not."""
        if "image" not in kwargs:
            raise ValueError(f"image must be given for a nodule to be grafted into, got {sorted(kwargs)}")
        if kwargs.get("bboxes") is not None:
            self._label_columns(0, kwargs)
        return super().__call__(*args, force_apply=force_apply, **kwargs)

    def get_transform_init_args(self) -> dict[str, Any]:
        """Return what `A.to_dict` stores; the seed too, which albumentations would leave out."""
        return {**super().get_transform_init_args(), "seed": self._seed}

    def should_apply(self, force_apply: bool = False) -> bool:
        """Return whether to decide at all: the decision itself is keyed, see the class."""
        self._forced = force_apply
        return force_apply or self.p > 0

    # --- Decide ---
    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Return the key of an image's graft, which makes it again; None for no graft."""
        key, planner, image = self._key(data), self._planner(), _as_tensor(data["image"])
        first = planner.regenerate(key, NODULE, 0) if self._forced else planner.decide(key, 0, eligible=True)
        if first.synthetic:
            (area,) = self._applier.areas(list(image), self._mix.prior.field)
            if isinstance(area, str):
                self._applier.settings.graft.left_real.count(area)
                return {"key": None}
            if data.get("bboxes") is not None and len(data["bboxes"]):
                area = replace(area, taken=np.asarray(data["bboxes"])[:, :4].astype(np.float64))
            processor = None if data.get("bboxes") is None else self.get_processor("bboxes")
            size = dict(zip(("height", "width"), data["image"].shape, strict=False))
            for decision in islice(candidates(partial(planner.redraw, first), area), TRIES):
                # An image must not change without its boxes, of which `bbox_params` may drop some.
                if processor is None or len(processor.filter(decision.boxes, size)) == len(decision.boxes):
                    return {"key": list(decision.key)}
        return {"key": None}

    def _key(self, data: dict[str, Any]) -> tuple[int, ...]:
        epoch, index = int(self._counts[0]), data.get("index")
        if index is not None:
            try:
                return (self._seed, epoch, as_index(index))
            except TypeError:
                raise TypeError(f"index must be an integer, got {index!r}") from None
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id
        count = self._counts[1 + row % ROWS].add_(1)
        return (self._seed, epoch, int(count), row, int(os.environ.get("RANK", 0)))

    def _planner(self) -> Planner:
        settings = replace(self._applier.settings, amount=Amount(float(self.p)))
        return settings.planner(settings.labels)

    # --- Apply ---
    def apply_with_params(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Apply the graft to all targets; new boxes get their label fields, an empty list of masks the ellipses too."""
        if params.get("key") is None:
            return kwargs
        decision = self._planner().regenerate(tuple(int(part) for part in params["key"]), NODULE)
        more: dict[str, Any] = {"decision": decision}
        if kwargs.get("bboxes") is not None:
            more["new"] = np.hstack([decision.boxes, self._label_columns(len(decision.boxes), kwargs)])
        result = super().apply_with_params({**params, **more}, *args, **kwargs)
        if isinstance(kwargs.get("masks"), list | tuple) and not kwargs["masks"]:
            result["masks"] = list(_ellipses(decision, *kwargs["image"].shape[:2]).astype(np.uint8))
        return result

    def apply(self, img: np.ndarray, decision: Decision, **params: Any) -> np.ndarray:
        """Return the image with the nodules in it."""
        mixed, _ = self._applier.pixels(_as_tensor(img), Placed((decision,), {}))
        return mixed[0].permute(1, 2, 0).numpy().reshape(img.shape)

    def apply_to_mask(self, mask: np.ndarray, decision: Decision, **params: Any) -> np.ndarray:
        """Return the mask with the nodules' ellipses set."""
        inside = _ellipses(decision, *mask.shape[:2]).any(axis=0)
        changed = mask.copy()
        channels = changed if changed.ndim == 3 else changed[..., None]
        values = self.mask_value if isinstance(self.mask_value, list) else [self.mask_value]
        if len(values) != channels.shape[2]:
            rule = f"a list with a value, or None, for each of a mask's {channels.shape[2]} channels"
            raise ValueError(f"mask_value must be {rule}, got {self.mask_value!r}")
        for channel, value in enumerate(values):
            if value is not None:
                channels[inside, channel] = value
        return changed

    def apply_to_masks(self, masks: np.ndarray, decision: Decision, **params: Any) -> np.ndarray:
        """Return the masks (N, H, W), and one more for each nodule."""
        ellipses = _ellipses(decision, *masks.shape[1:3])
        more = np.zeros((len(ellipses), *masks.shape[1:]), dtype=masks.dtype)
        more[ellipses] = 1
        return np.concatenate([masks, more])

    def apply_to_keypoints(self, keypoints: np.ndarray, **params: Any) -> np.ndarray:
        """Return the keypoints as they are."""
        return keypoints

    def apply_to_bboxes(self, bboxes: np.ndarray, new: np.ndarray, **params: Any) -> np.ndarray:
        """Return the boxes, (N, 4 + labels) with sides in [0, 1], and one more for each nodule."""
        new = new.astype(bboxes.dtype)
        return np.concatenate([bboxes, new]) if len(bboxes) else new

    # --- Copies and labels ---
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()  # a copy's memory is its own: its workers must see it again

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraftNodule":
        # A copy counts with the original, so that it does not repeat it, and has the same weights.
        for shared in (self._mix, self._applier, self._counts):
            memo[id(shared)] = shared
        twin = memo[id(self)] = copy.copy(self)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def _label_columns(self, n: int, data: dict[str, Any]) -> np.ndarray:
        """Return the label columns of n new boxes of a sample, as albumentations encodes them."""
        processor = self.get_processor("bboxes")
        if processor is None:
            raise ValueError("bboxes must come with A.Compose(..., bbox_params=A.BboxParams(...)), got none")
        names, bboxes = list(processor.params.label_fields or ()), data["bboxes"]
        # Label fields are columns already, unless there are no boxes; then the number of columns may be unknown, 0.
        more = max(0, bboxes.shape[-1] - 4 - len(names)) if len(bboxes) or bboxes.ndim == 2 else 0
        if not names:
            if (len(bboxes) and more != 1) or more > 1 or not isinstance(self.label, Real):
                raise ValueError(
                    "bboxes must come with labels for a box to be added: give BboxParams(label_fields=[...]), or a "
                    f"number as the fifth entry of each box and as label, got {more} more entries and {self.label!r}"
                )
            return np.full((n, 1), self.label, dtype=np.float32)
        if more:
            raise ValueError(f"bboxes must have 4 entries where BboxParams has label_fields {names}, got {4 + more}")
        values = self.label if isinstance(self.label, dict) else dict.fromkeys(names, self.label)
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"label must have a value for each of label_fields {names}, got none for {missing[0]!r}")
        manager = processor.label_manager
        return np.hstack([_encode(manager, name, values[name], n, data.get(name)) for name in names])


def _encode(manager: Any, name: str, value: Any, n: int, field: Any) -> np.ndarray:
    """Return a value n times in a label field's column, (n, 1); `field` is what the sample has in it."""
    if name not in manager.metadata["bboxes"]:
        if not n:
            return np.zeros((0, 1))
        # The first sample has no box: the field's own container, so that what comes back is as it went in. Arrays of
        # objects, for one of strings would cut longer ones off.
        first: Any = [value]
        if isinstance(field, np.ndarray):
            numbers = isinstance(value, Real) and field.dtype.kind in "biuf"
            first = np.array([value], dtype=field.dtype if numbers else object)
        manager.process_field("bboxes", name, first)
    known = manager.metadata["bboxes"][name]
    of_numbers = bool(known.is_numerical or (known.encoder.is_numerical and known.encoder.num_classes))
    if of_numbers != isinstance(value, Real):
        kind = "numbers" if of_numbers else "strings"
        raise ValueError(f"label must be of the kind of the field {name!r}, which holds {kind}, got {value!r}")
    if known.dtype is not None and known.dtype.kind == "U":
        known.dtype = np.promote_types(known.dtype, np.array([value]).dtype)
    return manager.process_field("bboxes", name, [value] * n) if n else np.zeros((0, 1))


def _ellipses(decision: Decision, height: int, width: int) -> np.ndarray:
    """Return the nodules' ellipses (k, H, W) bool."""
    boxes = decision.boxes_at(height, width)
    return boxes_to_masks(list(boxes[:, None]), (height, width), shape="ellipse")[:, 0].numpy() > 0


def _as_tensor(image: Any) -> Tensor:
    """Return an image (H, W) or (H, W, C) as (1, C, H, W), or raise ValueError for what is none."""
    shape = image.shape if isinstance(image, np.ndarray) else ()
    if len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"image must be an array (H, W), (H, W, 1) or (H, W, 3), got {shape or type(image).__name__}")
    if image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"image must be uint8, or float32 in [0, 1], got {image.dtype}")
    with_channels = image if len(shape) == 3 else image[..., None]
    tensor = torch.from_numpy(np.ascontiguousarray(with_channels)).permute(2, 0, 1)[None]
    try:
        ValueRange().check(tensor, "image")
    except RangeError as error:
        got = f"{float(image.min()):g} to {float(image.max()):g}"
        rule = "in [0, 1] if float32"
        raise ValueError(f"image must lie {rule}, got values from {got}: put GraftNodule before A.Normalize") from error
    return tensor
