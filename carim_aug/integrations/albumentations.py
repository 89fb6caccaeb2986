"""albumentations: grafts of pooled nodules, with their boxes and masks (`pip install carim-aug[albumentations]`).

import albumentations as A
from carim_aug.integrations.albumentations import GraftNodule

pipeline = A.Compose(
    [GraftNodule(p=0.3, label="Nodule"), A.HorizontalFlip()],
    bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"]),
)
"""

from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from carim_aug.insertion import graft
from carim_aug.keys import stream
from carim_aug.masks import boxes_to_masks
from carim_aug.placement import PLACEMENTS, candidates, grounds
from carim_aug.plan import Slot, check_epoch, check_strength
from carim_aug.pool import SyntheticPool
from carim_aug.ranges import ValueRange

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
    feathered boxes changes.

    What comes of a sample is keyed by (seed, epoch, the sample's `index`) where the call has an `index`, and else by
    the worker and the samples it has seen: different in every worker and every epoch, unlike albumentations' own seeds.

    Args:
        weights: folder or hub id of the generator and its prior; None: the bundled ones.
        size: entries of the pool.
        reuse: uses after which `set_epoch` renders an entry anew.
        seed: of the pool and of all decisions.
        label: of new boxes: one value, or a dict from label field to value.
        mask_value: of a nodule's pixels in `mask`.
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
        mask_value: int = 1,
        strength: float | tuple[float, float] = 1.0,
        placement: str = "host",
        p: float = 0.5,
    ) -> None:
        """Renders the pool, or takes the one that another transform of the same settings has."""
        super().__init__(p=p)
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
        check_strength(strength)
        self.weights, self.size, self.reuse, self.label = weights, size, reuse, label
        self.mask_value, self.strength, self.placement = mask_value, strength, placement
        self._seed, self._seen = seed, 0
        key = (weights, size, reuse, seed)
        self._pool = _POOLS.get(key) or SyntheticPool.from_pretrained(weights, size=size, reuse=reuse, seed=seed)
        _POOLS[key] = self._pool
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def pool(self) -> SyntheticPool:
        """The nodules; `with transform.pool.start(20): ...` renders used ones anew while training."""
        return self._pool

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which workers that are alive see, and renders anew what has been used often."""
        self._epoch.fill_(check_epoch(epoch))
        self._pool.refresh()

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
        slot = next(candidates(lambda number: self._pool.slot(planned, (*key, number)), ground))
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
        changed[inside] = self.mask_value
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
        boxes = self._nodules(entry)[0].boxes.astype(np.float32)
        labels = self._labels(len(boxes), bboxes)
        return np.concatenate([bboxes.reshape(-1, 4 + labels.shape[1]), np.hstack([boxes, labels])])

    def apply_with_params(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As albumentations', but an empty list of masks gets the nodules' too."""
        done = super().apply_with_params(params, *args, **kwargs)
        if params.get("entry") is not None and isinstance(kwargs.get("masks"), list | tuple) and not kwargs["masks"]:
            ellipses = self._ellipses(params["entry"], kwargs["image"].shape[:2])
            done["masks"] = list(ellipses.to(torch.uint8).numpy())
        return done

    def __getstate__(self) -> dict[str, Any]:
        """Keeps the pool, whose copy draws and does not render."""
        return dict(self.__dict__)

    def _key(self, data: dict[str, Any]) -> tuple[int, ...]:
        epoch, index = int(self._epoch), data.get("index")
        if index is not None:
            return (self._seed, epoch, int(index))
        self._seen += 1
        worker = get_worker_info()
        more = () if worker is None else (worker.seed % 2**63,)
        return (self._seed, epoch, self._seen, *more)

    def _nodules(self, entry: list[int]) -> tuple[Slot, Tensor]:
        key = (int(entry[0]), int(entry[1]), int(entry[2]))
        slot = self._pool.planner.regenerate(key, "Nodule")
        slot = Slot(key, "Nodule", slot.noise_seed, slot.boxes, -1, entry=key)
        return slot, self._pool.difference(slot)

    def _ellipses(self, entry: list[int], size: Any) -> Tensor:
        height, width = (int(side) for side in size)
        boxes = self._nodules(entry)[0].boxes_at(height, width)
        return boxes_to_masks(list(boxes[:, None]), (height, width), shape="ellipse")[:, 0]

    def _labels(self, n: int, bboxes: np.ndarray) -> np.ndarray:
        """The label columns of n new boxes, as albumentations encodes them."""
        processor = self.get_processor("bboxes")
        names = list(processor.params.label_fields or ()) if processor is not None else []
        values = self.label if isinstance(self.label, dict) else dict.fromkeys(names, self.label)
        if missing := [name for name in names if name not in values]:
            raise ValueError(
                f"label must have a value for each of the label_fields {names}, got none for {missing[0]!r}"
            )
        if not names:
            columns = bboxes.shape[1] - 4 if bboxes.size else 0
            if columns != 1 or isinstance(self.label, str | dict):
                raise ValueError(
                    "bboxes must come with labels for a box to be added: give BboxParams(label_fields=[...]), or a "
                    f"number as the fifth entry of each box and as label, got {columns} more entries and label "
                    f"{self.label!r}"
                )
            return np.full((n, 1), self.label, dtype=np.float32)
        parts = []
        for name in names:
            try:
                parts.append(processor.label_manager.process_field("bboxes", name, [values[name]] * n))
            except ValueError as error:
                raise ValueError(
                    f"label must be of the kind of the field {name!r}, got {values[name]!r}: {error}"
                ) from None
        return np.hstack(parts).astype(np.float32)


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
    ValueRange.of("auto").check(tensor, "image")
    return tensor
