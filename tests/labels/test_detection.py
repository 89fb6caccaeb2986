"""Detection targets: what is there stays, what comes in is boxed, labelled and masked; alike in all three uses."""

from collections import UserDict

import numpy as np
import pytest
import torch
from tiny import make_mix
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.transforms import v2

from carim_aug import LabelError, LabelPolicy, LayoutError, SyntheticNoduleMix
from carim_aug.data import ChestXray14, PhantomChest
from carim_aug.labels.detection import check_target, instances, is_target, is_targets, with_nodules
from carim_aug.ops.boxes import boxes_to_masks, feather

NEW = torch.tensor([[4.0, 6.0, 12.0, 20.0]])
OLD = torch.tensor([[1.0, 2.0, 9.0, 12.0], [20.0, 20.0, 30.0, 28.0]])
SIZE = (40, 48)


def boxes_as(name, boxes=OLD):
    plain = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=SIZE)
    return v2.functional.convert_bounding_box_format(plain, new_format=tv_tensors.BoundingBoxFormat[name])


class Boxed(Dataset):
    """Films of several sizes; every third has a nodule (1), every sixth something else too (2)."""

    classes = ("__background__", "Nodule", "Mass")

    def __init__(self, n=24, *, one_size=False, form="dict"):
        self.n, self.one_size, self.form = n, one_size, form

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        height, width = (64, 64) if self.one_size else (48 + 8 * (i % 3), 64 + 8 * (i % 2))
        image = tv_tensors.Image(torch.full((1, height, width), (i + 1) / (2 * self.n)))
        numbers = [1] * (i % 3 == 2) + [2] * (i % 6 == 5)
        rows = torch.tensor([[8.0 + 4 * k, 8.0, 20.0 + 4 * k, 22.0] for k in range(len(numbers))]).reshape(-1, 4)
        if self.form == "coco":
            return image, [
                {"id": k, "image_id": i, "bbox": [*r[:2], r[2] - r[0], r[3] - r[1]], "category_id": c, "iscrowd": 0}
                for k, (r, c) in enumerate(zip(rows.tolist(), numbers, strict=True))
            ]
        boxes = tv_tensors.BoundingBoxes(rows, format="XYXY", canvas_size=(height, width))
        target = {"boxes": boxes, "labels": torch.tensor(numbers, dtype=torch.int64), "image_id": i}
        if self.form == "flat":
            return {"image": image, **target}
        return (image, target) if self.form == "dict" else {"img": image, "target": target}


# --- One target ---
@pytest.mark.parametrize("name", ["XYXY", "XYWH", "CXCYWH"])
def test_a_box_comes_in_in_the_targets_own_format(name):
    before = boxes_as(name)
    target = {"boxes": before, "labels": torch.tensor([1, 2])}
    after = with_nodules(target, NEW, 1, SIZE)
    assert isinstance(after["boxes"], tv_tensors.BoundingBoxes) and after["boxes"].format.name == name
    assert after["boxes"].canvas_size == SIZE and torch.equal(after["boxes"][:2], before[:2])
    assert torch.allclose(instances(after)[0], torch.cat([OLD, NEW])) and after["labels"].tolist() == [1, 2, 1]
    assert torch.equal(target["boxes"], before) and target["labels"].tolist() == [1, 2]


def test_every_field_follows_its_rule():
    masks = torch.zeros(2, *SIZE, dtype=torch.uint8)
    target = {
        "boxes": OLD.clone(),
        "labels": torch.tensor([1, 2]),
        "masks": tv_tensors.Mask(masks),
        "area": torch.tensor([80.0, 80.0]),
        "iscrowd": torch.tensor([0, 1]),
        "image_id": torch.tensor([5, 6]),
        "score": torch.tensor([0.5, 0.25]),
        "difficult": torch.tensor([True, False]),
        "readers": ["a", "b"],
        "points": np.ones((2, 3, 2)),
        "patient": 17,
        "note": "film",
    }
    after = with_nodules(target, NEW, 1, SIZE, fill={"score": 1.0, "readers": None})
    assert list(after) == list(target)
    assert isinstance(after["masks"], tv_tensors.Mask) and after["masks"].dtype == torch.uint8
    assert torch.equal(after["masks"][2], boxes_to_masks([NEW], SIZE, shape="ellipse")[0, 0].to(torch.uint8))
    assert after["area"].tolist() == [80, 80, 112] and after["iscrowd"].tolist() == [0, 1, 0]
    assert after["image_id"] is target["image_id"] and after["readers"] is target["readers"]
    assert after["score"].tolist() == [0.5, 0.25, 1.0] and after["difficult"].tolist() == [True, False, False]
    assert after["points"].shape == (3, 3, 2) and after["points"][2].sum() == 0
    assert after["patient"] == 17 and after["note"] == "film"

    gone = with_nodules(target, NEW[:0], 1, SIZE, replace=True)
    assert gone["boxes"].shape == (0, 4) and gone["masks"].shape == (0, *SIZE) and gone["readers"] == []
    assert [len(gone[name]) for name in ("labels", "area", "iscrowd", "score", "difficult", "points")] == [0] * 6
    assert gone["image_id"] is target["image_id"] and gone["note"] == "film"
    alone = with_nodules(target, NEW, 1, SIZE, replace=True)
    assert alone["labels"].tolist() == [1] and torch.equal(alone["boxes"], NEW) and alone["readers"] == [""]


@pytest.mark.parametrize(
    "boxes", [torch.zeros(0, 4), torch.zeros(0), np.zeros((0, 4), np.float64), torch.zeros(0, 4, dtype=torch.int64), []]
)
def test_a_target_without_boxes_gets_its_first_one(boxes):
    labels = torch.zeros(0) if isinstance(boxes, torch.Tensor) else np.zeros(0, np.int64)
    after = with_nodules(UserDict(boxes=boxes, labels=labels), NEW, 3, SIZE)
    assert isinstance(after, UserDict) and type(after["boxes"]) is type(boxes)
    assert instances(after)[0].tolist() == NEW.tolist() and instances(after)[1] == [3]
    assert "int64" in str(after["labels"].dtype)


def test_coco_annotations_get_one_more_in_their_own_manner():
    row = {"id": 7, "image_id": 3, "bbox": [1.0, 2.0, 8.0, 10.0], "category_id": 2, "iscrowd": 0, "reader": "a"}
    (first, new) = with_nodules([row], NEW, 1, SIZE)
    assert first is row and new["bbox"] == [4.0, 6.0, 8.0, 14.0] and new["category_id"] == 1 and new["area"] == 112
    assert new["image_id"] == 3 and new["reader"] == "" and new["id"] < 0
    x, y = np.array(new["segmentation"][0]).reshape(-1, 2).T
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((4, 12, 6, 20))
    wrapped = {"image_id": 9, "annotations": [row]}
    after = with_nodules(wrapped, NEW, 1, SIZE, replace=True)
    assert [r["image_id"] for r in after["annotations"]] == [9] and len(wrapped["annotations"]) == 1
    assert with_nodules([], NEW, 1, SIZE)[0]["bbox"] == [4.0, 6.0, 8.0, 14.0]


def test_targets_are_told_from_other_labels():
    target = {"boxes": OLD, "labels": torch.tensor([1, 1])}
    assert (
        is_target(target) and is_target([]) and is_target([{"bbox": [0, 0, 1, 1]}]) and is_target({"annotations": []})
    )
    assert is_targets([target, target]) and is_targets(([], [{"bbox": [0, 0, 1, 1]}]))
    assert not any(is_target(x) for x in (torch.zeros(2), 1, [0, 1], "x", None, {"name": "a"}))
    assert not is_targets([{"bbox": [0, 0, 1, 1]}]) and not is_targets([]) and not is_targets(target)


@pytest.mark.parametrize(
    "target, words",
    [
        ({"labels": torch.tensor([1])}, "targets must have boxes and labels, got .*labels"),
        ({"boxes": OLD}, "targets must have boxes and labels"),
        ({"boxes": OLD, "labels": torch.tensor([1])}, r"boxes \(k, 4\) and labels \(k,\), got \(2, 4\) and \(1,\)"),
        ({"boxes": OLD, "labels": torch.tensor([1.0, 1.0])}, "labels must be integers"),
        ({"boxes": OLD, "labels": torch.tensor([1, 2])}, "labels must be from 0 to 1 .*got 2: pass labels=LabelPolicy"),
        ({"boxes": OLD / 48, "labels": torch.tensor([1, 1])}, "in pixels of the 40 x 48 image.*BoundingBoxes"),
        ({"boxes": OLD[:, [2, 3, 0, 1]], "labels": torch.tensor([1, 1])}, "XYXY with x1 <= x2.*BoundingBoxes"),
        ({"boxes": OLD * 2, "labels": torch.tensor([1, 1])}, "inside the image of height 40 and width 48"),
        ({"boxes": OLD * float("nan"), "labels": torch.tensor([1, 1])}, "boxes must be finite"),
        ([{"bbox": [0, 0, 1, 1]}], "got one without category_id"),
        ([{"bbox": [0, 0, 1], "category_id": 1}], "bbox must be four numbers XYWH"),
        ([{"bbox": [30, 30, 40, 40], "category_id": 1}], "inside the image.*got .*: bbox must be XYWH in pixels"),
        ({"boxes": "x", "labels": [1]}, "boxes must be numbers"),
        ({"boxes": [[1, 2, 3], [1, 2]], "labels": [1, 1]}, "boxes must be numbers, as many"),
    ],
)
def test_bad_targets_are_named(target, words):
    with pytest.raises(LabelError, match=words):
        check_target(target, ("__background__", "Nodule"), SIZE)


def test_a_policy_reads_classes_of_targets():
    policy = LabelPolicy("detection", classes=Boxed.classes)
    targets = [Boxed()[i][1] for i in range(6)]
    assert policy.classes_of(targets) == ["No Finding", "No Finding", "Nodule"] * 2
    other = {"boxes": OLD[:1], "labels": torch.tensor([2])}
    assert policy.class_of(other) == "other" and policy.class_of([]) == "No Finding"
    assert LabelPolicy().resolve(targets[0], batch=False).classes == ("__background__", "Nodule")
    with pytest.raises(LabelError, match="nodule must be one of the classes"):
        LabelPolicy("detection", classes=("__background__", "Mass"))
    with pytest.raises(LabelError, match="with_nodules"):
        policy.add_nodule(other)


# --- The three uses ---
def mixed_items(mix, dataset):
    wrapped = mix.wrap(dataset)
    return [(wrapped[i], wrapped.slot(i)) for i in range(len(wrapped))]


def unpack(sample):
    if isinstance(sample, tuple):
        return sample
    return sample.get("image", sample.get("img")), sample.get("target", sample)


@pytest.mark.parametrize("form", ["dict", "coco", "flat", "nested"])
@pytest.mark.parametrize("insertion", ["graft", "whole"])
def test_image_changes_if_and_only_if_boxes_and_labels_do(form, insertion):
    data = Boxed(24, form=form)
    mix = make_mix(p=0.5, insertion=insertion, labels=LabelPolicy("detection", classes=Boxed.classes))
    changed = 0
    for i, (sample, slot) in enumerate(mixed_items(mix, data)):
        (image, target), (real, was) = unpack(sample), unpack(data[i])
        (boxes, numbers), (old, known) = instances(target), instances(was)
        assert type(image) is type(real) and type(target) is type(was)
        if not slot.synthetic:
            assert torch.equal(image, real) and torch.equal(boxes, old) and numbers == known
            continue
        changed += 1
        stay = len(known) if insertion == "graft" else 0
        assert numbers == known[:stay] + [1] * len(slot.boxes) and (insertion == "graft" or known == [])
        assert torch.allclose(boxes[stay:], slot.boxes_at(*image.shape[-2:]), atol=1e-4)
        differs = (image != real).as_subclass(torch.Tensor)
        assert bool(differs.any())
        if insertion == "graft":
            weight = feather([slot.boxes_at(*image.shape[-2:])], image.shape[-2:])[0]
            assert not bool(differs[weight == 0].any())
    assert 4 < changed < 18


def test_the_loader_the_wrapped_data_set_and_the_transform_give_the_same():
    data, options = Boxed(18), {"p": 0.6, "insertion": "graft"}
    items = mixed_items(make_mix(**options), data)
    for workers, collate in ((0, None), (2, lambda batch: tuple(zip(*batch, strict=True)))):
        mix, seen = make_mix(**options), 0
        for images, targets in mix.loader(data, batch_size=5, num_workers=workers, collate_fn=collate):
            params = mix.last_params
            for k in range(len(images)):
                (image, target), slot = items[seen]
                assert params.slots[k] == slot and isinstance(images[k], tv_tensors.Image)
                assert torch.allclose(images[k], image, atol=1e-5) and torch.equal(target["boxes"], targets[k]["boxes"])
                assert torch.equal(params.boxes[k], slot.boxes_at(*image.shape[-2:]))
                seen += 1
        assert seen == 18
    mix = make_mix(**options, labels=LabelPolicy("detection", classes=Boxed.classes))
    images, targets = zip(*[data[i] for i in range(18)], strict=True)
    after, marked = mix(images, targets)
    assert isinstance(after, tuple) and isinstance(marked, tuple)
    for k, ((image, target), slot) in enumerate(items):
        assert mix.last_params.slots[k].noise_seed == slot.noise_seed
        assert torch.allclose(after[k], image, atol=1e-5) and torch.equal(marked[k]["boxes"], target["boxes"])
    again = make_mix(labels=LabelPolicy("detection", classes=Boxed.classes))(images, targets, params=mix.last_params)
    assert all(torch.equal(a, b) for a, b in zip(again[0], after, strict=True))
    with pytest.raises(ValueError, match="one size to have masks"):
        _ = mix.last_params.masks


def test_images_of_one_size_may_be_a_tensor():
    data = Boxed(12, one_size=True)
    mix = make_mix(p=1.0, insertion="graft", labels=LabelPolicy("detection", classes=Boxed.classes))
    images, targets = torch.stack([data[i][0] for i in range(12)]), [data[i][1] for i in range(12)]
    after, marked = mix(images, targets)
    assert after.shape == images.shape and isinstance(marked, list)
    assert [len(t["labels"]) > len(old["labels"]) for t, old in zip(marked, targets, strict=True)] == (
        mix.last_params.synthetic.tolist()
    )


def test_flat_samples_are_collated_and_put_back_field_by_field():
    mix = make_mix(p=1.0, insertion="graft", labels=LabelPolicy("detection", classes=Boxed.classes))
    batch = next(iter(mix.loader(Boxed(6, form="flat"), batch_size=6)))
    assert set(batch) == {"image", "boxes", "labels", "image_id"} and batch["image_id"] == list(range(6))
    assert [len(b) for b in batch["boxes"]] == [len(n) for n in batch["labels"]]
    assert sum(len(b) for b in batch["boxes"]) > 4


def test_added_samples_and_counts():
    mix = make_mix(n_synthetic={"Nodule": 7, "No Finding": 3})
    data = Boxed(12)
    assert mix.class_counts(data) == {
        "No Finding": {"real": 8, "synthetic": 3, "total": 11},
        "Nodule": {"real": 4, "synthetic": 7, "total": 11},
    }
    wrapped = mix.wrap(data)
    classes = [LabelPolicy("detection", classes=Boxed.classes).class_of(wrapped[i][1]) for i in range(12, 22)]
    assert classes.count("Nodule") == 7 and classes.count("No Finding") == 3


def test_the_data_sets_own_classes_say_which_number_nodules_have(phantom_data):
    data = ChestXray14(phantom_data, split="train", target="detection")
    assert data.classes[0] == "__background__" and data.classes[6] == "Nodule"
    wrapped = make_mix(p=1.0, insertion="graft").wrap(data)
    found = [wrapped[i][1]["labels"].tolist() for i in range(len(data))]
    assert {n for numbers in found for n in numbers} == {6} and all(found[1] + found[2])
    alone = make_mix(p=1.0, insertion="graft").wrap(PhantomChest(6, size=64, nodule_fraction=0.3, target="detection"))
    assert all((alone[i][1]["labels"] == 1).all() for i in range(6))


def test_a_box_of_odd_width_in_whole_pixels_keeps_its_half_pixels():
    box = tv_tensors.BoundingBoxes(torch.tensor([[10, 12, 5, 3]]), format="CXCYWH", canvas_size=SIZE)
    assert instances({"boxes": box, "labels": [1]})[0].tolist() == [[7.5, 10.5, 12.5, 13.5]]


def test_rotated_boxes_and_segmentation_masks_are_refused_by_name():
    if "CXCYWHR" in tv_tensors.BoundingBoxFormat.__members__:  # torchvision 0.23 and later
        box = tv_tensors.BoundingBoxes(torch.tensor([[9.0, 9, 4, 4, 30]]), format="CXCYWHR", canvas_size=SIZE)
        with pytest.raises(LabelError, match="boxes must be of one of the formats .*got CXCYWHR"):
            instances({"boxes": box, "labels": [1]})
    mask = tv_tensors.Mask(torch.zeros(1, 32, 32, dtype=torch.uint8))
    with pytest.raises(LayoutError, match="must be no segmentation mask.*give a detection target"):
        make_mix().wrap([(torch.rand(1, 32, 32), mask)] * 2)


def test_over_2000_draws_an_image_changes_if_and_only_if_its_label_and_boxes_do():
    mix = make_mix(p=0.5, insertion="graft", placement="prior", labels=LabelPolicy("detection"))
    changed = 0
    for number in range(4):
        images = torch.rand(500, 1, 32, 32, generator=torch.Generator().manual_seed(number)) * 0.5 + 0.25
        targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in range(500)]
        mixed, marked = mix(images, targets)
        differs = (mixed != images).flatten(1).any(1)
        assert differs.tolist() == [len(t["boxes"]) > 0 for t in marked] == [1 in t["labels"] for t in marked]
        outside = feather(mix.last_params.boxes, 32) == 0
        assert torch.equal(mixed[outside], images[outside])
        changed += int(differs.sum())
    assert 900 < changed < 1100


def test_boxes_hold_99_percent_of_what_the_bundled_weights_change():
    mix = SyntheticNoduleMix.from_pretrained(p=1.0, insertion="graft", labels=LabelPolicy("detection"))
    data = PhantomChest(16, size=256, nodule_fraction=0.0, target="detection")
    images, targets = zip(*[data[i] for i in range(16)], strict=True)
    grafted, marked = mix([image.float() / 255 for image in images], list(targets))
    shares = []
    for before, after, target in zip(images, grafted, marked, strict=True):
        difference = (after - before.float() / 255).abs().as_subclass(torch.Tensor)
        inside = boxes_to_masks([instances(target)[0]], 256)[0]
        shares.append(float((difference * inside).sum() / difference.sum()))
    assert sum(shares) / len(shares) >= 0.99 and min(shares) > 0.95


def test_a_loader_of_detection_batches_goes_on_in_mid_epoch():
    mix = make_mix(p=0.6, insertion="graft")
    options = {"batch_size": 4, "shuffle": True, "num_workers": 2}
    whole = [targets for _, targets in mix.loader(Boxed(20), **options)]
    first = mix.loader(Boxed(20), **options)
    batches = iter(first)
    next(batches), next(batches)
    resumed = mix.loader(Boxed(20), **options)
    resumed.load_state_dict(first.state_dict())
    rest = [targets for _, targets in resumed]
    assert len(rest) == 3
    for was, now in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(was, now, strict=True))


# --- Transforms ---
def outside_share(before, after, boxes, size):
    """Share of |after - before| outside the boxes and the pixel about them into which resampling blurs it."""
    height, width = size
    boxes = (boxes + torch.tensor([-1.0, -1.0, 1.0, 1.0])).clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
    difference = (after.float() - before.float()).abs().as_subclass(torch.Tensor)
    inside = boxes_to_masks([boxes], size)[0]
    return float((difference * (1 - inside)).sum() / difference.sum())


TRANSFORMS = {
    "flip": v2.RandomHorizontalFlip(1.0),
    "affine": v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1)),
    "resize": v2.Resize((160, 96)),
    "crop": v2.Compose([v2.RandomResizedCrop(96, scale=(0.6, 0.9)), v2.SanitizeBoundingBoxes()]),
    "pad": v2.Pad((10, 20)),
}


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_boxes_stay_on_their_nodules_through_geometric_transforms(name):
    mix = SyntheticNoduleMix.from_pretrained(p=1.0, insertion="graft")
    data = PhantomChest(8, size=128, nodule_fraction=0.0, target="detection")
    wrapped, checked = mix.wrap(data), 0
    for i in range(8):
        (image, target), real = wrapped[i], data[i][0]
        torch.manual_seed(i)
        moved, after = TRANSFORMS[name](image, target)
        torch.manual_seed(i)
        plain, _ = TRANSFORMS[name](real, {**target})
        assert isinstance(moved, tv_tensors.Image) and isinstance(after["boxes"], tv_tensors.BoundingBoxes)
        if len(after["labels"]) == len(target["labels"]):
            size = tuple(moved.shape[-2:])
            assert outside_share(plain, moved, after["boxes"].as_subclass(torch.Tensor), size) < 0.05
            checked += 1
    assert checked >= 4


def test_boxes_lie_on_their_nodules_when_the_transform_comes_before():
    mix = SyntheticNoduleMix.from_pretrained(p=1.0, insertion="graft")
    turn = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Resize((140, 120)), v2.ToDtype(torch.float32, scale=True)])
    data = PhantomChest(8, size=128, nodule_fraction=0.0, target="detection", transform=turn)
    wrapped = mix.wrap(data)
    shares = []
    for i in range(8):
        (image, target), real = wrapped[i], data[i][0]
        shares.append(outside_share(real, image, target["boxes"].as_subclass(torch.Tensor), (140, 120)))
    assert max(shares) < 0.05 and sum(shares) / 8 < 0.01


# --- A detector, and bad input ---
def test_a_faster_rcnn_trains_on_mixed_batches():
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=8, padding=1), torch.nn.ReLU())
    body.out_channels = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        anchors = AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),))
        net = FasterRCNN(body, num_classes=3, rpn_anchor_generator=anchors, min_size=64, max_size=96)
        images, targets = next(iter(make_mix(p=0.7, insertion="graft").loader(Boxed(8), batch_size=8)))
        losses = net([image.expand(3, -1, -1) for image in images], targets)
        sum(losses.values()).backward()
    assert all(bool(loss.isfinite()) for loss in losses.values()) and len(losses) == 4


def test_a_collate_function_that_drops_fields_is_named():
    def bare(batch):
        return [s[0] for s in batch], [{"labels": s[1]["labels"]} for s in batch]

    with pytest.raises(LabelError, match="targets must have boxes and labels, got .*a collate_fn or transform"):
        list(make_mix(p=1.0, insertion="graft").loader(Boxed(6), batch_size=6, collate_fn=bare))
    with pytest.raises(ValueError, match="must keep all 6 samples"):
        list(make_mix(p=1.0).loader(Boxed(6), batch_size=6, collate_fn=lambda b: tuple(zip(*b[:2], strict=True))))


def test_targets_that_do_not_fit_the_batch_are_named():
    data = Boxed(4)
    images, targets = zip(*[data[i] for i in range(4)], strict=True)
    mix = make_mix(p=1.0, labels=LabelPolicy("detection", classes=Boxed.classes))
    with pytest.raises(ValueError, match=r"as many as images \(4\), got 3"):
        mix(images, targets[:3])
    with pytest.raises(LabelError, match="list or tuple of detection targets"):
        mix(images, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(LabelError, match="got 2: pass labels=LabelPolicy"):
        make_mix(p=1.0)([data[5][0]], [data[5][1]])
    with pytest.raises(LayoutError):
        mix(images, "targets")


def test_items_of_wrapped_data_go_through_a_plain_dataloader():
    mix = make_mix(p=0.5, insertion="graft")
    loader = DataLoader(
        mix.wrap(Boxed(8)), batch_size=4, num_workers=2, collate_fn=lambda b: tuple(zip(*b, strict=True))
    )
    counts = [len(t["labels"]) for _, targets in loader for t in targets]
    assert len(counts) == 8


class OnlyBoxed(Boxed):
    """As torchvision's reference leaves a training set: no film without a box."""

    def __getitem__(self, i):
        return super().__getitem__(3 * i + 2)

    def __len__(self):
        return 8


def test_films_with_boxes_host_grafts_too():
    mix = make_mix(p=0.5, insertion="graft")
    assert mix.class_counts(OnlyBoxed())["Nodule"]["synthetic"] > 0
    seen = 0
    for _, targets in mix.loader(OnlyBoxed(), batch_size=4):
        seen += int(mix.last_params.synthetic.sum())
        assert all(len(t["boxes"]) >= 1 for t in targets)
    assert seen == mix.class_counts(OnlyBoxed())["Nodule"]["synthetic"]
    assert make_mix(n_synthetic={"Nodule": 3}, insertion="graft").wrap(OnlyBoxed())[9][1]["labels"][0] == 1
    assert make_mix(p=1.0, insertion="graft", eligible=lambda t: False).wrap(OnlyBoxed()).slot(0).synthetic is False


def test_cocos_own_names_say_which_number_nodules_have():
    class Coco(Boxed):
        classes = None
        coco = type("Index", (), {"cats": {1: {"name": "mass"}, 4: {"name": "nodule"}}})()

    policy = LabelPolicy().named_by(Coco(form="coco"), [])
    assert policy.classes == ("__background__", "mass", "", "", "nodule")
    new = make_mix(p=1.0, insertion="graft").wrap(torch.utils.data.Subset(Coco(form="coco"), [0, 1]))[0][1]
    assert {row["category_id"] for row in new} == {4}
