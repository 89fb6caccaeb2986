"""albumentations: grafts of pooled nodules, with their boxes and masks (`pip install carim-aug[albumentations]`).

import albumentations as A
from carim_aug.integrations.albumentations import GraftNodule

pipeline = A.Compose(
    [GraftNodule(p=0.3, label="Nodule"), A.HorizontalFlip()],
    bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"]),
)
"""

import copy
import os
from collections.abc import Callable
from itertools import islice
from numbers import Real
from operator import index as as_index
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from carim_aug.location.placement import PLACEMENTS, TRIES, candidates, grounds
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import stream
from carim_aug.ops.value_range import RangeError, ValueRange
from carim_aug.transforms.graft import graft
from carim_aug.transforms.plan import Slot, check_epoch, check_strength
from carim_aug.transforms.pool import ROWS, SyntheticPool

try:
    import albumentations as A
    from albumentations.core.type_definitions import Targets
except ImportError as error:
    raise ImportError("this module needs albumentations: pip install carim-aug[albumentations]") from error

_POOLS: WeakValueDictionary[tuple[Any, ...], SyntheticPool] = WeakValueDictionary()


class GraftNodule(A.DualTransform):
    """Grafts nodules into a chest X-ray: x + feather(C) * (G(z, C) - G(z, 0)), as `insertion="graft"` does.

    Adds a box for each nodule, in the format of `bbox_params`, with its label in each of the `label_fields`; draws it
    as an ellipse into `mask`, and adds that ellipse to `masks` as one more. Keypoints stay. Nothing outside the
    feathered boxes changes. A nodule whose box `bbox_params` would drop for its size is drawn again, or not grafted.

    What comes of a sample is keyed by (seed, epoch, the sample's `index`) where the call has an `index`, and else by
    the rank, the worker and the samples it has seen since `set_epoch`, counted in shared memory: different in every
    rank, worker and epoch, set or not, unlike what albumentations' own seeds give. Keys draw from the pool as it is:
    once `set_epoch` or a thread has rendered entries anew, the same key gives another nodule.

    Args:
        weights: folder or hub id of the generator and its prior; None: the bundled ones.
        size: entries of the pool.
        reuse: uses after which `set_epoch` renders an entry anew.
        seed: of the pool and of all decisions.
        label: of new boxes: a string or a number as the label fields hold, or a dict from label field to value.
        mask_value: of a nodule's pixels in `mask`; of one (H, W, C), a list of C values, None for a channel that stays.
        strength: of the difference, in (0, 4], or (least, most).
        placement: "host": about as real nodules lie in the film's own lungs; "prior": unseen.
        p: chance of a graft.

    Targets: image ((H, W), (H, W, 1) or (H, W, 3); uint8, or float32 in [0, 1]), mask, masks, bboxes, keypoints.

    Raises:
        PoolError: a pool larger than the memory.
        ValueError: an option, image or box that breaks its rule.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES, Targets.KEYPOINTS)

    def __init__(
        self,
        weights: str | None = None,
        size: int = 512,
        reuse: int = 4,
        seed: int = 0,
        label: Any = 1,
        mask_value: float | list[float | None] = 1,
        strength: float | tuple[float, float] = 1.0,
        placement: str = "host",
        p: float = 0.5,
    ) -> None:
        """Renders the pool, or takes the one that another transform of the same settings has."""
        super().__init__(p=p)
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
        check_strength(strength)
        for value in label.values() if isinstance(label, dict) else [label]:
            if not isinstance(value, str | Real):
                raise ValueError(f"label must be a string, a number or a dict of these, got {value!r}")
        self.weights, self.size, self.reuse, self.label = weights, size, reuse, label
        self.mask_value, self.strength, self.placement = mask_value, strength, placement
        self._seed = seed
        key = (weights, size, reuse, seed)
        self._pool = _POOLS.get(key) or SyntheticPool.from_pretrained(weights, size=size, reuse=reuse, seed=seed)
        _POOLS[key] = self._pool
        # The epoch; then the samples that the main process and each worker have seen in it.
        self._counts = torch.zeros(1 + ROWS, dtype=torch.int64).share_memory_()

    @property
    def targets(self) -> dict[str, Callable[..., Any]]:
        """What is changed: no volumes, and no batches of images."""
        names = ("image", "mask", "masks", "bboxes", "keypoints")
        return {name: function for name, function in super().targets.items() if name in names}

    @property
    def available_keys(self) -> set[str]:
        """What a call may have, the `index` too."""
        return self._available_keys | {"index"}

    @property
    def pool(self) -> SyntheticPool:
        """The nodules; `with transform.pool.start(20): ...` renders used ones anew while training."""
        return self._pool

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which workers that are alive see, and renders anew what has been used often."""
        check_epoch(epoch)
        self._counts.zero_()
        self._counts[0] = epoch
        self._pool.refresh()

    def __call__(self, *args: Any, force_apply: bool = False, **kwargs: Any) -> Any:
        """Gives the sample, with nodules or as it was; bad samples are named whether they get any or not."""
        if "image" not in kwargs:
            raise ValueError(f"image must be given for a nodule to be grafted into, got {sorted(kwargs)}")
        if kwargs.get("bboxes") is not None:
            self._labels(0, kwargs)
        return super().__call__(*args, force_apply=force_apply, **kwargs)

    def get_transform_init_args(self) -> dict[str, Any]:
        """Gives what `A.to_dict` keeps; the seed too, which albumentations would leave out."""
        return {**super().get_transform_init_args(), "seed": self._seed}

    def should_apply(self, force_apply: bool = False) -> bool:
        """Whether to decide at all: the decision itself is keyed, see the class."""
        self._forced = force_apply
        return force_apply or self.p > 0

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the nodules for an image, or none."""
        key = self._key(data)
        rng = stream(*key)
        if not self._forced and rng.random() >= self.p:
            return {"entry": None, "strength": 1.0}
        low, high = check_strength(self.strength)
        image = _as_tensor(data["image"])
        (ground,) = grounds(image, self.placement, self._pool.planner)
        planned = Slot(key, "Nodule", 0, np.zeros((0, 4), np.float32), -1)
        drawn = candidates(lambda number: self._pool.slot(planned, (*key, number)), ground)
        slot = next((slot for slot in islice(drawn, TRIES) if self._kept(slot, data)), None)
        if slot is None:
            return {"entry": None, "strength": 1.0}
        self._pool.take(slot)
        assert slot.entry is not None, "the pool's"
        return {"entry": list(slot.entry), "strength": low + (high - low) * float(rng.random())}

    def apply(self, img: np.ndarray, entry: list[int] | None, strength: float, **params: Any) -> np.ndarray:
        """Gives the image with the nodules in it."""
        if entry is None:
            return img
        slot, difference = self._nodules(entry)
        slot = Slot(slot.key, "Nodule", slot.noise_seed, slot.boxes, -1, strength)
        mixed = graft(_as_tensor(img), difference[None], [slot], ValueRange.of("auto"))[0]
        return mixed.permute(1, 2, 0).numpy().reshape(img.shape)

    def apply_to_mask(self, mask: np.ndarray, entry: list[int] | None, **params: Any) -> np.ndarray:
        """Gives the mask with the nodules' ellipses set."""
        if entry is None:
            return mask
        inside = self._ellipses(entry, mask.shape[:2]).amax(dim=0).numpy() > 0
        changed = mask.copy()
        channels = changed if changed.ndim == 3 else changed[..., None]
        values = self.mask_value if isinstance(self.mask_value, list) else [self.mask_value]
        if len(values) != channels.shape[2]:
            raise ValueError(
                f"mask_value must be a list with a value, or None, for each of a mask's {channels.shape[2]} channels, "
                f"got {self.mask_value!r}"
            )
        for channel, value in enumerate(values):
            if value is not None:
                channels[inside, channel] = value
        return changed

    def apply_to_masks(self, masks: np.ndarray, entry: list[int] | None, **params: Any) -> np.ndarray:
        """Gives the masks, (N, H, W), and one more for each nodule."""
        if entry is None:
            return masks
        ellipses = self._ellipses(entry, masks.shape[1:3]).numpy()
        more = np.zeros((len(ellipses), *masks.shape[1:]), dtype=masks.dtype)
        more[ellipses > 0] = 1
        return np.concatenate([masks, more])

    def apply_to_keypoints(self, keypoints: np.ndarray, **params: Any) -> np.ndarray:
        """Gives the keypoints as they are."""
        return keypoints

    def apply_to_bboxes(self, bboxes: np.ndarray, entry: list[int] | None, **params: Any) -> np.ndarray:
        """Gives the boxes, (N, 4 + labels) with sides in [0, 1], and one more for each nodule."""
        if entry is None:
            return bboxes
        labels = params["labels"]
        new = np.hstack([self._nodules(entry)[0].boxes, labels]).astype(bboxes.dtype)
        return np.concatenate([bboxes, new]) if len(bboxes) else new

    def apply_with_params(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As albumentations', but new boxes know the label fields, and an empty list of masks gets the nodules' too."""
        if params.get("entry") is None:
            return kwargs
        if kwargs.get("bboxes") is not None:
            boxes = self._nodules(params["entry"])[0].boxes
            params = {**params, "labels": self._labels(len(boxes), kwargs)}
        done = super().apply_with_params(params, *args, **kwargs)
        if isinstance(kwargs.get("masks"), list | tuple) and not kwargs["masks"]:
            ellipses = self._ellipses(params["entry"], kwargs["image"].shape[:2])
            done["masks"] = list(ellipses.to(torch.uint8).numpy())
        return done

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shares the counts again: workers of a copy must see them."""
        self.__dict__.update(state)
        self._counts.share_memory_()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraftNodule":
        """Gives a copy with the same pool, epoch and counts, so that it does not repeat this one."""
        memo[id(self._pool)], memo[id(self._counts)] = self._pool, self._counts
        twin = memo[id(self)] = copy.copy(self)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def _key(self, data: dict[str, Any]) -> tuple[int, ...]:
        epoch, index = int(self._counts[0]), data.get("index")
        if index is not None:
            try:
                return (self._seed, epoch, as_index(index))
            except TypeError:
                raise TypeError(f"index must be an integer, got {index!r}") from None
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id
        place = 1 + row % ROWS
        self._counts[place] += 1
        return (self._seed, epoch, int(self._counts[place]), row, int(os.environ.get("RANK", 0)))

    def _kept(self, slot: Slot, data: dict[str, Any]) -> bool:
        """Whether `bbox_params` keeps all boxes of a slot: an image must not change without its boxes."""
        processor = self.get_processor("bboxes")
        if processor is None or data.get("bboxes") is None:
            return True
        height, width = data["image"].shape[:2]
        return len(processor.filter(slot.boxes, {"height": height, "width": width})) == len(slot.boxes)

    def _nodules(self, entry: list[int]) -> tuple[Slot, Tensor]:
        key = (int(entry[0]), int(entry[1]), int(entry[2]))
        slot = self._pool.planner.regenerate(key, "Nodule")
        slot = Slot(key, "Nodule", slot.noise_seed, slot.boxes, -1, entry=key)
        return slot, self._pool.difference(slot)

    def _ellipses(self, entry: list[int], size: Any) -> Tensor:
        height, width = (int(side) for side in size)
        boxes = self._nodules(entry)[0].boxes_at(height, width)
        return boxes_to_masks(list(boxes[:, None]), (height, width), shape="ellipse")[:, 0]

    def _labels(self, n: int, data: dict[str, Any]) -> np.ndarray:
        """The label columns of n new boxes of a sample, as albumentations encodes them."""
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
                    f"number as the fifth entry of each box and as label, got {more} more entries and label "
                    f"{self.label!r}"
                )
            return np.full((n, 1), self.label, dtype=np.float32)
        if more:
            raise ValueError(f"bboxes must have 4 entries where BboxParams has label_fields {names}, got {4 + more}")
        values = self.label if isinstance(self.label, dict) else dict.fromkeys(names, self.label)
        if missing := [name for name in names if name not in values]:
            raise ValueError(
                f"label must have a value for each of the label_fields {names}, got none for {missing[0]!r}"
            )
        columns = [_encoded(processor.label_manager, name, values[name], n, data.get(name)) for name in names]
        return np.hstack(columns)


def _encoded(manager: Any, name: str, value: Any, n: int, field: Any) -> np.ndarray:
    """(n, 1): a value in a label field's column.

    Args:
        manager: albumentations' encoder of label fields.
        name: of the field.
        value: string or number.
        n: how often.
        field: what the sample has in it, if there were no boxes to encode it with.
    """
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


def _as_tensor(image: np.ndarray) -> Tensor:
    """(1, C, H, W) of an image (H, W) or (H, W, C)."""
    if (
        not isinstance(image, np.ndarray)
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] not in (1, 3))
    ):
        got = image.shape if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be an array (H, W), (H, W, 1) or (H, W, 3), got {got}")
    if image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"image must be uint8, or float32 in [0, 1], got {image.dtype}")
    tensor = torch.from_numpy(np.ascontiguousarray(image if image.ndim == 3 else image[..., None]))
    tensor = tensor.permute(2, 0, 1)[None]
    try:
        ValueRange.of("auto").check(tensor, "image")
    except RangeError as error:
        low, high = float(image.min()), float(image.max())
        raise ValueError(
            f"image must lie in [0, 1] if float32, got values from {low:g} to {high:g}: put GraftNodule before "
            "A.Normalize"
        ) from error
    return tensor
