"""albumentations: grafts with their boxes and masks, seeded per worker and epoch, serialisable, replayable."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

A = pytest.importorskip("albumentations")

from tiny import make_mix  # noqa: E402

from carim_aug.integrations.albumentations import GraftNodule  # noqa: E402
from carim_aug.masks import boxes_to_masks, feather  # noqa: E402

FORMATS = {
    "pascal_voc": lambda b: b,
    "coco": lambda b: np.stack([b[:, 0], b[:, 1], b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]], 1),
    "albumentations": lambda b: b / [120, 96, 120, 96],
    "yolo": lambda b: (
        np.stack([b[:, 0] + b[:, 2], b[:, 1] + b[:, 3], 2 * (b[:, 2] - b[:, 0]), 2 * (b[:, 3] - b[:, 1])], 1)
        / [240, 192, 240, 192]
    ),
}
OLD = np.array([[10.0, 12.0, 30.0, 40.0], [50.0, 20.0, 80.0, 60.0]])
IMAGE = np.random.default_rng(0).integers(60, 190, (96, 120, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    make_mix().save_pretrained(folder)
    return str(folder)


def transform(weights, **options):
    return GraftNodule(**{"weights": weights, "size": 16, "p": 1.0, **options})


def pipeline(step, fmt="pascal_voc", fields=("labels",), more=()):
    return A.Compose([step, *more], bbox_params=A.BboxParams(format=fmt, label_fields=list(fields)))


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_a_box_comes_in_with_its_label_in_every_format(weights, fmt):
    done = pipeline(transform(weights, label="nodule"), fmt)(
        image=IMAGE, bboxes=FORMATS[fmt](OLD).tolist(), labels=["mass", "heart"], index=3
    )
    n = len(done["bboxes"])
    assert n > 2 and done["labels"] == ["mass", "heart"] + ["nodule"] * (n - 2)
    assert np.allclose(done["bboxes"][:2], FORMATS[fmt](OLD), atol=1e-4)
    plain = pipeline(transform(weights))(image=IMAGE, bboxes=OLD, labels=[7, 8], index=3)
    assert np.allclose(done["bboxes"][2:], FORMATS[fmt](np.array(plain["bboxes"])[2:]), atol=1e-4)
    assert np.array(plain["labels"]).tolist() == [7, 8] + [1] * (n - 2) and (plain["image"] == done["image"]).all()


@pytest.mark.parametrize("image", [IMAGE, IMAGE[..., 0], IMAGE.repeat(3, 2), (IMAGE / 255).astype(np.float32)])
def test_the_image_changes_inside_the_feathered_boxes_alone(weights, image):
    for index in range(5):
        done = pipeline(transform(weights))(image=image, bboxes=[], labels=[], index=index)
        assert done["image"].dtype == image.dtype and done["image"].shape == image.shape
        boxes = [torch.tensor(np.array(done["bboxes"]), dtype=torch.float32)]
        weight = feather(boxes, (96, 120))[0, 0].numpy()
        changed = (done["image"] != image).reshape(96, 120, -1).any(2)
        assert changed.any() and not changed[weight < 1e-4].any()
        assert len(done["labels"]) == len(done["bboxes"]) > 0


def test_masks_get_the_nodules_ellipses(weights):
    one, several = np.zeros((96, 120), np.uint8), [np.zeros((96, 120), np.uint8)]
    done = A.Compose([transform(weights, mask_value=5)], bbox_params=A.BboxParams("pascal_voc", ["labels"]))(
        image=IMAGE, mask=one, masks=several, bboxes=[], labels=[], index=1
    )
    boxes = torch.tensor(np.array(done["bboxes"]), dtype=torch.float32)
    ellipses = boxes_to_masks(list(boxes[:, None]), (96, 120), shape="ellipse")[:, 0].numpy()
    assert isinstance(done["masks"], list) and len(done["masks"]) == 1 + len(boxes)
    assert (np.stack(done["masks"][1:]) == ellipses).all() and (done["mask"] == 5 * ellipses.max(0)).all()
    assert one.sum() == 0
    empty = A.Compose([transform(weights)])(image=IMAGE, masks=[], index=1)
    assert len(empty["masks"]) == len(boxes)


def test_several_label_fields_get_a_value_each_and_the_chance_decides(weights):
    step = transform(weights, label={"labels": "nodule", "reader": -1}, p=0.5)
    grafted = 0
    for index in range(40):
        done = pipeline(step, fields=("labels", "reader"))(
            image=IMAGE, bboxes=OLD.tolist(), labels=["a", "b"], reader=[3, 4], index=index
        )
        new = len(done["bboxes"]) - 2
        grafted += new > 0
        assert done["labels"] == ["a", "b"] + ["nodule"] * new and list(done["reader"]) == [3, 4] + [-1] * new
        assert (new > 0) == bool((done["image"] != IMAGE).any())
    assert 8 < grafted < 32


def test_boxes_follow_the_transforms_that_come_after(weights):
    flip = pipeline(transform(weights), more=[A.HorizontalFlip(p=1.0)])(image=IMAGE, bboxes=[], labels=[], index=2)
    plain = pipeline(transform(weights))(image=IMAGE, bboxes=[], labels=[], index=2)
    a, b = np.array(flip["bboxes"]), np.array(plain["bboxes"])
    assert np.allclose(a[:, [0, 2]], 120 - b[:, [2, 0]], atol=1e-3) and (flip["image"] == plain["image"][:, ::-1]).all()


def test_it_survives_a_round_trip_as_json_and_a_replay(weights):
    step = transform(weights, strength=(0.5, 0.9), label="n", seed=4)
    told = json.loads(json.dumps(A.to_dict(pipeline(step))))
    again = A.from_dict(told)
    options = {"image": IMAGE, "bboxes": [], "labels": [], "index": 9}
    first, second = pipeline(step)(**options), again(**options)
    assert (first["image"] == second["image"]).all() and np.allclose(first["bboxes"], second["bboxes"])
    assert second["labels"] == first["labels"] and "n" in first["labels"]

    replay = A.ReplayCompose([step], bbox_params=A.BboxParams("pascal_voc", ["labels"]))
    done = replay(image=IMAGE, bboxes=[], labels=[])
    for i in range(60):
        step.pool.draw((0, 1, i))
    step.pool.refresh(16)  # what it came from is gone
    repeated = A.ReplayCompose.replay(
        json.loads(json.dumps(done["replay"], default=str)), image=IMAGE, bboxes=[], labels=[]
    )
    assert (repeated["image"] == done["image"]).all() and np.allclose(repeated["bboxes"], done["bboxes"])


class Films(Dataset):
    def __init__(self, step, indexed):
        self.pipeline, self.indexed = pipeline(step), indexed

    def __len__(self):
        return 24

    def __getitem__(self, i):
        more = {"index": i} if self.indexed else {}
        boxes = self.pipeline(image=IMAGE, bboxes=[], labels=[], **more)["bboxes"]
        return torch.tensor(np.array(boxes)).reshape(-1, 4)[0]


def epochs(weights, workers, persistent, indexed, n=2):
    step = transform(weights, size=400)
    data, found = Films(step, indexed), []
    loader = DataLoader(
        data,
        batch_size=6,
        num_workers=workers,
        persistent_workers=persistent,
        generator=torch.Generator().manual_seed(0),
    )
    for epoch in range(n):
        if indexed:
            step.set_epoch(epoch)
        found.append(torch.cat(list(loader)))
    return torch.stack(found)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_no_worker_and_no_epoch_repeats_another(weights, workers, persistent):
    found = epochs(weights, workers, persistent, indexed=False).reshape(-1, 4)
    assert len(found.unique(dim=0)) > 40  # of 48 draws from 400 entries
    assert torch.equal(found, epochs(weights, workers, persistent, indexed=False).reshape(-1, 4))


def test_with_an_index_any_number_of_workers_gives_the_same(weights):
    one = epochs(weights, 0, False, indexed=True)
    assert torch.equal(one, epochs(weights, 2, True, indexed=True)) and not torch.equal(one[0], one[1])


def test_set_epoch_renders_anew_what_was_used_often(weights):
    step = transform(weights, size=3, reuse=2, seed=11)
    for index in range(12):
        A.Compose([step])(image=IMAGE, index=index)
    before = step.pool.statistics()["rendered"]
    step.set_epoch(1)
    assert step.pool.statistics()["rendered"] > before


def test_bad_input_is_named(weights):
    for options, words in (
        ({"placement": "lungs"}, "placement must be one of"),
        ({"strength": 9.0}, "strength must be"),
    ):
        with pytest.raises(ValueError, match=words):
            transform(weights, **options)
    step = transform(weights)
    for image, words in (
        (IMAGE.astype(np.float64), "image must be uint8, or float32"),
        (IMAGE.astype(np.float32), "must lie in"),
        (np.zeros((96, 120, 4), np.uint8), r"\(H, W, 3\), got \(96, 120, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            A.Compose([step])(image=image)
    with pytest.raises(ValueError, match="bboxes must come with labels"):
        A.Compose([step], bbox_params=A.BboxParams("pascal_voc"))(image=IMAGE, bboxes=OLD)
    with pytest.raises(ValueError, match="value for each of the label_fields"):
        pipeline(transform(weights, label={"labels": 1}), fields=("labels", "reader"))(
            image=IMAGE, bboxes=OLD, labels=[1, 2], reader=[1, 2]
        )
    with pytest.raises(ValueError, match="label must be of the kind of the field 'labels', got 'nodule'"):
        pipeline(transform(weights, label="nodule"))(image=IMAGE, bboxes=OLD, labels=[1, 2])
    with pytest.raises(ValueError, match=r"\[0.0, 1.0\]|x_max"):  # declared as parts of the image, given in pixels
        pipeline(step, "albumentations")(image=IMAGE, bboxes=OLD, labels=[1, 2])
