"""Detection targets: what is there stays, what comes in is boxed, labelled and masked; alike in all three uses."""

from collections import UserDict

import numpy as np
import pytest
import torch
from tiny import make_mix
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug import LabelError, LabelPolicy, LayoutError, SyntheticNoduleMix
from carim_aug.data import ChestXray14, PhantomChest
from carim_aug.labels.base import Change
from carim_aug.labels.detection import add_nodules, check_target, instances, is_target, is_targets
from carim_aug.ops.boxes import boxes_to_masks, feather

NEW = torch.tensor([[4.0, 6.0, 12.0, 20.0]])
OLD = torch.tensor([[1.0, 2.0, 9.0, 12.0], [20.0, 20.0, 30.0, 28.0]])
ONES, SIZE = torch.tensor([1, 1]), (40, 48)
CLASSES = ("__background__", "Nodule", "Mass")
POLICY = LabelPolicy("detection", classes=CLASSES)


class Boxed(Dataset):
    """Images of several sizes; every third has a nodule (1), every sixth something else too (2)."""

    classes = CLASSES

    def __init__(self, n=24, *, form="dict"):
        self.n, self.form = n, form

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        size = 48 + 8 * (i % 3), 64 + 8 * (i % 2)
        image, numbers = tv_tensors.Image(torch.full((1, *size), (i + 1) / 50)), [1] * (i % 3 == 2) + [2] * (i % 6 == 5)
        rows = [[8.0 + 4 * k, 8.0, 20.0 + 4 * k, 22.0] for k in range(len(numbers))]
        if self.form == "coco":
            return image, [{"bbox": [r[0], 8, 12, 14], "category_id": c} for r, c in zip(rows, numbers, strict=True)]
        boxes = tv_tensors.BoundingBoxes(torch.tensor(rows).reshape(-1, 4), format="XYXY", canvas_size=size)
        target = {"boxes": boxes, "labels": torch.tensor(numbers, dtype=torch.int64), "image_id": i}
        forms = {
            "dict": (image, target),
            "flat": {"image": image, **target},
            "nested": {"img": image, "target": target},
        }
        return forms[self.form]


def unpack(sample):
    if isinstance(sample, tuple):
        return sample
    return sample.get("image", sample.get("img")), sample.get("target", sample)


def as_tuples(batch):
    return tuple(zip(*batch, strict=True))


@pytest.mark.parametrize("name", ["XYXY", "XYWH", "CXCYWH"])
def test_a_box_comes_in_in_the_targets_own_format(name):
    corners = tv_tensors.BoundingBoxes(OLD, format="XYXY", canvas_size=SIZE)
    before = v2.functional.convert_bounding_box_format(corners, new_format=tv_tensors.BoundingBoxFormat[name])
    target = {"boxes": before, "labels": torch.tensor([1, 2])}
    after = add_nodules(target, NEW, 1, SIZE)
    assert isinstance(after["boxes"], tv_tensors.BoundingBoxes) and after["boxes"].format.name == name
    assert after["boxes"].canvas_size == SIZE and torch.equal(after["boxes"][:2], before[:2])
    assert torch.allclose(instances(after)[0], torch.cat([OLD, NEW])) and after["labels"].tolist() == [1, 2, 1]
    assert target["boxes"] is before and target["labels"].tolist() == [1, 2]
    odd = tv_tensors.BoundingBoxes(torch.tensor([[10, 12, 5, 3]]), format="CXCYWH", canvas_size=SIZE)
    assert instances({"boxes": odd, "labels": [1]})[0].tolist() == [[7.5, 10.5, 12.5, 13.5]]  # half pixels stay


def test_every_field_follows_its_rule():
    masks = tv_tensors.Mask(torch.zeros(2, *SIZE, dtype=torch.uint8))
    target = {"boxes": OLD.clone(), "labels": torch.tensor([1, 2]), "masks": masks, "area": torch.tensor([80.0, 80.0])}
    target |= {"iscrowd": torch.tensor([0, 1]), "score": torch.tensor([0.5, 0.25]), "points": np.ones((2, 3, 2))}
    target |= {"difficult": torch.tensor([True, False]), "readers": ["a", "b"]}
    target |= {"image_id": torch.tensor([5, 6]), "patient": 17, "note": "PA"}
    after = add_nodules(target, NEW, 1, SIZE, fill={"score": 1.0, "readers": None})
    assert list(after) == list(target)
    assert isinstance(after["masks"], tv_tensors.Mask) and after["masks"].dtype == torch.uint8
    assert torch.equal(after["masks"][2], boxes_to_masks([NEW], SIZE, shape="ellipse")[0, 0].to(torch.uint8))
    assert after["area"].tolist() == [80, 80, 112] and after["iscrowd"].tolist() == [0, 1, 0]
    assert after["score"].tolist() == [0.5, 0.25, 1.0] and after["difficult"].tolist() == [True, False, False]
    assert after["points"].shape == (3, 3, 2) and after["points"][2].sum() == 0
    assert all(after[name] is target[name] for name in ("image_id", "readers", "patient", "note"))
    gone = add_nodules(target, NEW[:0], 1, SIZE, replace=True)
    assert gone["boxes"].shape == (0, 4) and gone["masks"].shape == (0, *SIZE) and gone["readers"] == []
    assert not any(len(gone[name]) for name in ("labels", "area", "iscrowd", "score", "difficult", "points"))
    assert gone["image_id"] is target["image_id"] and gone["note"] == "PA"
    alone = add_nodules(target, NEW, 1, SIZE, replace=True)
    assert alone["labels"].tolist() == [1] and torch.equal(alone["boxes"], NEW) and alone["readers"] == [""]


def test_a_target_without_boxes_gets_its_first_one():
    none = torch.zeros(0, 4)
    for boxes in (none, none[:, 0], none.double().numpy(), none.long(), []):
        labels = torch.zeros(0) if isinstance(boxes, torch.Tensor) else np.zeros(0, np.int64)
        after = add_nodules(UserDict(boxes=boxes, labels=labels), NEW, 3, SIZE)
        assert isinstance(after, UserDict) and type(after["boxes"]) is type(boxes)
        assert instances(after)[0].tolist() == NEW.tolist() and instances(after)[1] == [3]
        assert "int64" in str(after["labels"].dtype)


def test_coco_annotations_get_one_more_in_their_own_manner():
    row = {"id": 7, "image_id": 3, "bbox": [1.0, 2.0, 8.0, 10.0], "category_id": 2, "iscrowd": 0, "reader": "a"}
    (first, new) = add_nodules([row], NEW, 1, SIZE)
    assert first is row and new["bbox"] == [4.0, 6.0, 8.0, 14.0] and new["category_id"] == 1 and new["area"] == 112
    assert new["image_id"] == 3 and new["reader"] == "" and new["id"] < 0
    x, y = np.array(new["segmentation"][0]).reshape(-1, 2).T
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((4, 12, 6, 20))
    wrapped = {"image_id": 9, "annotations": [row]}
    after = add_nodules(wrapped, NEW, 1, SIZE, replace=True)
    assert [r["image_id"] for r in after["annotations"]] == [9] and len(wrapped["annotations"]) == 1
    assert add_nodules([], NEW, 1, SIZE)[0]["bbox"] == [4.0, 6.0, 8.0, 14.0]


def test_targets_are_told_from_other_labels_and_have_classes():
    target, row = {"boxes": OLD, "labels": ONES}, {"bbox": [0, 0, 1, 1]}
    assert all(is_target(label) for label in (target, [], [row], {"annotations": []}))
    assert not any(is_target(label) for label in (torch.zeros(2), 1, [0, 1], "x", None, {"name": "a"}))
    assert is_targets([target, target]) and is_targets(([], [row]))
    assert not is_targets([row]) and not is_targets([]) and not is_targets(target)
    targets = [Boxed()[i][1] for i in range(6)]
    assert POLICY.classes_of(targets) == ["No Finding", "No Finding", "Nodule"] * 2
    other = {"boxes": OLD[:1], "labels": torch.tensor([2])}
    assert POLICY.class_of(other) == "other" and POLICY.class_of([]) == "No Finding"
    assert LabelPolicy().resolve(targets[0], batch=False).classes == ("__background__", "Nodule")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (3, "targets must have boxes and labels, got int"),
        ({"labels": ONES}, "targets must have boxes and labels, got .*labels"),
        ({"boxes": OLD, "labels": ONES[:1]}, r"boxes \(k, 4\) and labels \(k,\), got \(2, 4\) and \(1,\)"),
        ({"boxes": OLD, "labels": ONES.float()}, "labels must be integers"),
        ({"boxes": OLD, "labels": ONES + 2}, "from 0 to 2 .*got 3: pass labels=LabelPolicy"),
        ({"boxes": OLD / 48, "labels": ONES}, "in pixels of the 40 x 48 image.*BoundingBoxes"),
        ({"boxes": OLD[:, [2, 3, 0, 1]], "labels": ONES}, "XYXY with x1 <= x2.*BoundingBoxes"),
        ({"boxes": OLD * 2, "labels": ONES}, "inside the image of height 40 and width 48"),
        ({"boxes": OLD * float("nan"), "labels": ONES}, "boxes must be finite"),
        ([{"bbox": [0, 0, 1, 1]}], "got one without category_id"),
        ([{"bbox": [0, 0, 1], "category_id": 1}], "bbox must be four numbers XYWH"),
        ([{"bbox": [30, 30, 40, 40], "category_id": 1}], "inside the image.*got .*: bbox must be XYWH in pixels"),
        ({"boxes": [[1, 2, 3], [1, 2]], "labels": [1, 1]}, "boxes must be numbers, as many"),
    ],
)
def test_bad_targets_are_named(target, words):
    with pytest.raises(LabelError, match=words):
        check_target(target, CLASSES, SIZE)


def test_rotated_boxes_are_named():
    if (rotated := getattr(tv_tensors.BoundingBoxFormat, "CXCYWHR", None)) is not None:  # torchvision 0.23 and later
        box = tv_tensors.BoundingBoxes(torch.tensor([[9.0, 9, 4, 4, 30]]), format=rotated, canvas_size=SIZE)
        with pytest.raises(LabelError, match="boxes must be of one of the formats .*got CXCYWHR"):
            instances({"boxes": box, "labels": [1]})


@pytest.mark.parametrize("form", ["dict", "coco", "flat", "nested"])
@pytest.mark.parametrize("insertion", ["graft", "whole"])
def test_image_changes_if_and_only_if_boxes_and_labels_do(form, insertion):
    data, changed = Boxed(form=form), 0
    wrapped = make_mix(insertion=insertion, labels=POLICY).wrap(data)
    for i, sample in enumerate(wrapped):
        (image, target), (real, was), decision = unpack(sample), unpack(data[i]), wrapped.decision(i)
        (boxes, numbers), (old, known) = instances(target), instances(was)
        assert type(image) is type(real) and type(target) is type(was)
        if not decision.synthetic:
            assert torch.equal(image, real) and torch.equal(boxes, old) and numbers == known
            continue
        changed += 1
        stay, new = len(known) if insertion == "graft" else 0, decision.boxes_at(*image.shape[-2:])
        assert numbers == known[:stay] + [1] * len(new) and (insertion == "graft" or known == [])
        assert torch.allclose(boxes[stay:], new, atol=1e-4)
        differs = (image != real).as_subclass(torch.Tensor)
        assert bool(differs.any())
        assert insertion == "whole" or not bool(differs[feather([new], image.shape[-2:])[0] == 0].any())
    assert 4 < changed < 18


@pytest.mark.train
def test_the_loader_the_wrapped_data_set_and_the_transform_do_the_same():
    data, options = Boxed(18), {"batch_size": 5, "num_workers": 2}
    wrapped = make_mix(p=0.6).wrap(data)
    items = [(*item, wrapped.decision(i)) for i, item in enumerate(wrapped)]
    for more in ({"num_workers": 0}, {"collate_fn": as_tuples}):
        mix, seen = make_mix(p=0.6), 0
        for images, targets in mix.loader(data, **options | more):
            for k, (image, target, decision) in enumerate(items[seen : seen + len(images)]):
                assert mix.last_params.decisions[k] == decision and isinstance(images[k], tv_tensors.Image)
                assert torch.allclose(images[k], image, atol=1e-5) and torch.equal(target["boxes"], targets[k]["boxes"])
                assert torch.equal(mix.last_params.boxes[k], decision.boxes_at(*image.shape[-2:]))
            seen += len(images)
        assert seen == 18
    mix, (images, targets) = make_mix(p=0.6, labels=POLICY), as_tuples(wrapped.dataset[i] for i in range(18))
    after, marked = mix(images, targets)
    assert isinstance(after, tuple) and isinstance(marked, tuple)
    for k, (image, target, _) in enumerate(items):
        assert torch.allclose(after[k], image, atol=1e-5) and torch.equal(marked[k]["boxes"], target["boxes"])
    again = make_mix(labels=POLICY)(images, targets, params=mix.last_params)
    assert all(torch.equal(a, b) for a, b in zip(again[0], after, strict=True))
    with pytest.raises(ValueError, match="one size to have masks"):
        _ = mix.last_params.masks
    wrapped.set_epoch(0)
    plain = [t["boxes"] for _, batch in DataLoader(wrapped, collate_fn=as_tuples, **options) for t in batch]
    assert all(torch.equal(boxes, target["boxes"]) for boxes, target in zip(plain, marked, strict=True))
    # A loader goes on in mid epoch.
    whole = [targets for _, targets in mix.loader(data, **options)]
    first, resumed = mix.loader(data, **options), mix.loader(data, **options)
    next(iter(first))
    resumed.load_state_dict(first.state_dict())
    for was, now in zip(whole[1:], [targets for _, targets in resumed], strict=True):
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(was, now, strict=True))


def test_over_400_draws_an_image_changes_if_and_only_if_its_target_does_and_flat_ones_are_collated():
    mix = make_mix(placement="prior", labels=LabelPolicy("detection"))
    images = torch.rand(400, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    mixed, marked = mix(images, [{"boxes": OLD[:0], "labels": ONES[:0]}] * 400)  # of one size: may be one tensor
    differs = (mixed != images).flatten(1).any(1)
    assert isinstance(mixed, torch.Tensor) and isinstance(marked, list)
    assert differs.tolist() == [len(t["boxes"]) > 0 for t in marked] == [1 in t["labels"] for t in marked]
    outside = feather(mix.last_params.boxes, 32) == 0
    assert torch.equal(mixed[outside], images[outside]) and 150 < int(differs.sum()) < 250
    # Flat samples are collated and put back field by field.
    (batch,) = make_mix(p=1.0, labels=POLICY).loader(Boxed(6, form="flat"), batch_size=6)
    assert set(batch) == {"image", "boxes", "labels", "image_id"} and batch["image_id"] == list(range(6))
    counts = [len(boxes) for boxes in batch["boxes"]]
    assert counts == [len(numbers) for numbers in batch["labels"]] and sum(counts) > 4


def test_added_samples_are_counted_and_any_image_is_a_background():
    mix, more = make_mix(n_synthetic={"Nodule": 7, "No Finding": 3}, insertion="whole"), range(12, 22)
    counts, wrapped = mix.class_counts(Boxed(12)), mix.wrap(Boxed(12))
    assert counts["No Finding"] == {"real": 8, "synthetic": 3, "total": 11}
    assert counts["Nodule"] == {"real": 4, "synthetic": 7, "total": 11}
    assert sorted(POLICY.class_of(wrapped[i][1]) for i in more) == ["No Finding"] * 3 + ["Nodule"] * 7
    # As torchvision's reference leaves a training set: no image without a box.
    boxed, mix = Subset(Boxed(), range(2, 24, 3)), make_mix()
    (batch,) = mix.loader(boxed, batch_size=8)
    assert all(len(target["boxes"]) for target in batch[1])
    assert int(mix.last_params.synthetic.sum()) == mix.class_counts(boxed)["Nodule"]["synthetic"] > 0
    assert make_mix(n_synthetic={"Nodule": 3}).wrap(boxed)[9][1]["labels"][0] == 1
    assert not make_mix(p=1.0, eligible=lambda t: False).wrap(boxed).decision(0).synthetic


def test_the_data_sets_own_classes_say_which_number_nodules_have(phantom_data):
    data = ChestXray14(phantom_data, split="train", target="detection")
    assert data.classes[0] == "__background__" and data.classes[6] == "Nodule"
    found = [target["labels"].tolist() for _, target in make_mix(p=1.0).wrap(data)]
    assert {n for numbers in found for n in numbers} == {6} and all(found[1] + found[2])
    alone = make_mix(p=1.0).wrap(PhantomChest(6, size=64, nodule_fraction=0.3, target="detection"))
    assert all((target["labels"] == 1).all() for _, target in alone)
    coco = Boxed(form="coco")
    coco.classes, coco.coco = None, type("Index", (), {"cats": {1: {"name": "mass"}, 4: {"name": "nodule"}}})()
    assert {row["category_id"] for row in make_mix(p=1.0).wrap(Subset(coco, [0, 1]))[0][1]} == {4}


def test_targets_that_do_not_fit_the_batch_are_named():
    def without_boxes(batch):
        return [s[0] for s in batch], [{"labels": s[1]["labels"]} for s in batch]

    mix, images = make_mix(p=1.0, labels=POLICY), [Boxed()[i][0] for i in range(4)]
    for call, error, words in (
        (lambda: list(mix.loader(Boxed(6), batch_size=6, collate_fn=without_boxes)), LabelError, "a collate_fn or"),
        (lambda: mix(images, [{"boxes": OLD, "labels": ONES}] * 3), LabelError, r"as many as images \(4\), got 3"),
        (lambda: mix(images, torch.zeros(4, dtype=torch.int64)), LabelError, "list or tuple of detection targets"),
        (lambda: mix(images, "targets"), LayoutError, "must"),
        (lambda: POLICY.class_of(3), LabelError, "targets must have boxes and labels, got int"),
    ):
        with pytest.raises(error, match=words):
            call()


def outside_share(before, after, boxes):
    """Share of |after - before| outside the boxes and the pixel about them into which resampling blurs it."""
    height, width = after.shape[-2:]
    boxes = boxes.as_subclass(torch.Tensor) + torch.tensor([-1.0, -1.0, 1.0, 1.0])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    difference = (after.float() - before.float()).abs().as_subclass(torch.Tensor)
    return float((difference * (1 - boxes_to_masks([boxes], (height, width))[0])).sum() / difference.sum())


AFTER = {
    "none": v2.Identity(),
    "flip": v2.RandomHorizontalFlip(1.0),
    "affine": v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1)),
    "resize": v2.Resize((160, 96)),
    "crop": v2.Compose([v2.RandomResizedCrop(96, scale=(0.6, 0.9)), v2.SanitizeBoundingBoxes()]),
    "pad": v2.Pad((10, 20)),
}
BEFORE = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Resize((140, 120)), v2.ToDtype(torch.float32, scale=True)])


@pytest.mark.train
@pytest.mark.parametrize("name", [*AFTER, "before"])
def test_boxes_stay_on_their_nodules_through_geometric_transforms(name):
    before, move = (BEFORE, v2.Identity()) if name == "before" else (None, AFTER[name])
    data = PhantomChest(8, size=128, nodule_fraction=0.0, target="detection", transform=before)
    shares = []
    for i, (image, target) in enumerate(SyntheticNoduleMix.from_pretrained(p=1.0).wrap(data)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            moved, after = move(image, target)
            torch.manual_seed(i)
            plain, _ = move(data[i][0], {**target})
        assert isinstance(moved, tv_tensors.Image) and isinstance(after["boxes"], tv_tensors.BoundingBoxes)
        if len(after["labels"]) == len(target["labels"]):
            shares.append(outside_share(plain, moved, after["boxes"]))
    assert len(shares) >= 4 and max(shares) < 0.05 and (name in ("affine", "crop") or sum(shares) / len(shares) < 0.01)


# --- Images without boxes ---
@pytest.mark.parametrize("target", [None, {}, {"image_id": 1}])
def test_what_torchvision_gives_for_an_image_without_boxes_is_one(target):
    policy = LabelPolicy("detection").resolve([target], batch=True)
    assert (
        policy.classes_of([target, {"boxes": torch.zeros(0, 4), "labels": ONES[:0]}]) == ["No Finding"] * 2
        and instances(target)[1] == []
    )
    box = torch.tensor([[4.0, 5.0, 14.0, 17.0]])
    change = Change(0, "Nodule", box, (32, 40), False)
    (alone,) = policy.change([target], [change])
    assert isinstance(alone["boxes"], tv_tensors.BoundingBoxes) and alone["boxes"].canvas_size == (32, 40)
    assert alone["boxes"].tolist() == box.tolist() and alone["labels"].tolist() == [1]
    assert set(alone) == {"boxes", "labels", *(target or {})}
    other = {"boxes": torch.ones(2, 4), "labels": torch.ones(2).long(), "masks": torch.ones(2, 32, 40), "image_id": 7}
    first, second = policy.change([target, other], [change])
    assert second is other and set(first) == {"boxes", "labels", "masks", *(target or {})}
    assert first["masks"].shape == (1, 32, 40) and (target is None or first.get("image_id") == target.get("image_id"))
    with pytest.raises(LabelError, match=r"got None: if it has no boxes, pass labels=LabelPolicy\('detection'\)"):
        LabelPolicy().resolve(None, batch=False)
