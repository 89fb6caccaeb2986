"""albumentations: grafts with their boxes and masks, seeded per worker and epoch, serialisable, replayable."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

A = pytest.importorskip("albumentations")

from tiny import make_mix  # noqa: E402

from carim_aug.integrations.albumentations import GraftNodule  # noqa: E402
from carim_aug.ops.boxes import boxes_to_masks, feather  # noqa: E402

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
        step = transform(weights)
        done = pipeline(step)(image=image, bboxes=[], labels=[], index=index)
        assert done["image"].dtype == image.dtype and done["image"].shape == image.shape
        exact = step.pool.regenerate(tuple(step.get_applied_params()["entry"])).boxes
        boxes = torch.tensor(exact * np.array([120, 96, 120, 96], dtype=np.float32))
        weight = feather([boxes], (96, 120))[0, 0].numpy()
        changed = (done["image"] != image).reshape(96, 120, -1).any(2)
        assert changed.any() and not changed[weight == 0].any()
        assert np.allclose(done["bboxes"], boxes, atol=1e-4)
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


@pytest.mark.parametrize("persistent", [False, True])
def test_draws_without_an_index_depend_on_our_seed_alone(weights, persistent):
    found = []
    for torch_seed in (1, 2):
        step = transform(weights, size=400, seed=5, reuse=1000)  # so that the pool stays as it is
        loader = DataLoader(
            Films(step, indexed=False),
            batch_size=6,
            num_workers=2,
            persistent_workers=persistent,
            generator=torch.Generator().manual_seed(torch_seed),
        )
        epochs = []
        for epoch in (0, 1, 0):
            step.set_epoch(epoch)
            epochs.append(torch.cat(list(loader)))
        assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
        found.append(torch.stack(epochs))
    assert torch.equal(*found)


def test_ranks_draw_different_nodules(weights, monkeypatch):
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        step = transform(weights, size=400, seed=6)
        for _ in range(12):
            A.Compose([step])(image=IMAGE)
            drawn.append(tuple(step.get_applied_params()["entry"]))
    assert len(set(drawn)) > 20  # of 24


def test_spawned_workers_that_stay_alive_see_the_epoch(weights):
    step = transform(weights, reuse=1000)
    loader = DataLoader(
        Films(step, indexed=True),
        batch_size=12,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    first = torch.cat(list(loader))
    step.set_epoch(1)
    second = torch.cat(list(loader))
    assert not torch.equal(first, second)
    other = Films(transform(weights, reuse=1000), indexed=True)
    assert torch.equal(first, torch.stack([other[i] for i in range(24)]))


def test_a_deep_copy_shares_pool_and_epoch(weights):
    step = transform(weights)
    twin = copy.deepcopy(pipeline(step)).transforms[0]
    step.set_epoch(7)
    assert twin is not step and twin.pool is step.pool
    drawn = [A.Compose([s])(image=IMAGE, index=1)["image"] for s in (step, twin)]
    assert (drawn[0] == drawn[1]).all()
    step(image=IMAGE), twin(image=IMAGE)
    assert step._counts[1] == 2  # both have counted


# --- What the user's labels become ---
def test_longer_labels_are_not_cut_off_and_arrays_stay_arrays(weights):
    step = pipeline(transform(weights, label="nodule"))
    done = step(image=IMAGE, bboxes=OLD, labels=np.array(["mass", "mass"]), index=3)
    assert isinstance(done["labels"], np.ndarray) and done["labels"].tolist()[:3] == ["mass", "mass", "nodule"]
    step = pipeline(transform(weights, label="nodule"))
    done = step(image=IMAGE, bboxes=np.zeros((0, 4)), labels=np.array([], dtype="<U1"), index=3)
    assert isinstance(done["labels"], np.ndarray) and set(done["labels"]) == {"nodule"}
    done = step(image=IMAGE, bboxes=OLD, labels=np.array(["consolidation", "mass"]), index=3)
    assert done["labels"].tolist()[:3] == ["consolidation", "mass", "nodule"]
    step = pipeline(transform(weights, label=2))
    for boxes, old in ((np.zeros((0, 4)), []), (OLD, [7, 8])):
        done = step(image=IMAGE, bboxes=boxes, labels=np.array(old, dtype=np.int64), index=3)
        assert done["labels"].dtype == np.int64 and done["labels"].tolist()[: len(old) + 1] == [*old, 2]


def test_labels_of_another_kind_are_refused_and_not_recoded(weights):
    with pytest.raises(ValueError, match="'labels', which holds strings, got 1"):
        pipeline(transform(weights))(image=IMAGE, bboxes=OLD, labels=["mass", "heart"])
    step = pipeline(transform(weights, label="nodule"))
    step(image=IMAGE, bboxes=[], labels=[])
    with pytest.raises(ValueError, match="'labels', which holds numbers, got 'nodule'"):
        step(image=IMAGE, bboxes=OLD, labels=[7, 8])
    with pytest.raises(ValueError, match="label must be a string, a number"):
        transform(weights, label=None)


def test_an_image_never_changes_without_its_boxes(weights):
    step = transform(weights, size=64)
    for limits in ({"min_area": 40.0}, {"min_width": 9.0}, {"min_area": 5000.0}):
        grafted = 0
        boxed = A.Compose([step], bbox_params=A.BboxParams("pascal_voc", ["labels"], **limits))
        for index in range(15):
            done = boxed(image=IMAGE, bboxes=[], labels=[], index=index)
            changed = bool((done["image"] != IMAGE).any())
            assert changed == bool(len(done["bboxes"])) == bool(len(done["labels"]))
            if changed:
                grafted += 1
                weight = feather([torch.tensor(np.array(done["bboxes"]), dtype=torch.float32)], (96, 120))[0, 0]
                assert not (done["image"] != IMAGE)[..., 0][weight.numpy() < 1e-4].any()
        assert grafted > 5 if limits.get("min_area") != 5000.0 else grafted == 0


def test_boxes_contain_99_percent_of_what_is_added(weights):
    image, shares = np.full((256, 256), 0.5, dtype=np.float32), []
    for index in range(40):
        done = pipeline(transform(weights, size=64))(image=image, bboxes=[], labels=[], index=index)
        added = np.abs(done["image"] - image)
        inside = boxes_to_masks([torch.tensor(np.array(done["bboxes"]), dtype=torch.float32)], 256)[0, 0].numpy()
        shares.append((added * inside).sum() / added.sum())
    assert np.mean(shares) > 0.99


def test_boxes_may_have_their_label_as_fifth_entry(weights):
    step = A.Compose([transform(weights, label=4)], bbox_params=A.BboxParams("pascal_voc"))
    for boxes, old in ((np.hstack([OLD, [[7], [8]]]), [7, 8]), (np.zeros((0, 5)), []), ([], [])):
        done = np.array(step(image=IMAGE, bboxes=boxes, index=3)["bboxes"])
        assert done[: len(old), 4].tolist() == old and len(done) > len(old) and set(done[len(old) :, 4]) == {4}


def test_channels_of_a_mask_get_a_value_each_and_strict_pipelines_know_the_index(weights):
    mask = np.full((96, 120, 3), 7, np.uint8)
    step = A.Compose([transform(weights, mask_value=[None, 0, 9])], strict=True)
    done = step(image=IMAGE, mask=mask, index=3)["mask"].reshape(-1, 3)
    assert np.unique(done, axis=0).tolist() == [[7, 0, 9], [7, 7, 7]]
    with pytest.raises(ValueError, match="each of a mask's 3 channels, got 1"):
        A.Compose([transform(weights)])(image=IMAGE, mask=mask)


def test_the_base_package_does_not_import_albumentations_and_the_extra_is_named():
    lines = (
        "import sys; import carim_aug; assert 'albumentations' not in sys.modules",
        "sys.modules['albumentations'] = None",
        "import carim_aug.integrations.albumentations",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install carim-aug[albumentations]" in done.stderr


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
        (IMAGE.astype(np.float32), "must lie in .* before A.Normalize"),
        (np.zeros((96, 120, 4), np.uint8), r"\(H, W, 3\), got \(96, 120, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            A.Compose([step])(image=image)
    for boxes in (OLD, OLD.tolist()):
        with pytest.raises(ValueError, match=r"bboxes must come with A.Compose\(\.\.\., bbox_params"):
            A.Compose([step])(image=IMAGE, bboxes=boxes)
    with pytest.raises(ValueError, match=r"image must be given .* got \['images'\]"):
        A.Compose([step])(images=IMAGE[None])
    with pytest.raises(TypeError, match="index must be an integer, got 2.5"):
        A.Compose([step])(image=IMAGE, index=2.5)
    with pytest.raises(ValueError, match="bboxes must have 4 entries where BboxParams has label_fields"):
        pipeline(step)(image=IMAGE, bboxes=np.hstack([OLD, [[7], [8]]]), labels=[1, 2])
    with pytest.raises(ValueError, match="bboxes must come with labels"):
        A.Compose([step], bbox_params=A.BboxParams("pascal_voc"))(image=IMAGE, bboxes=OLD)
    with pytest.raises(ValueError, match="value for each of the label_fields"):
        pipeline(transform(weights, label={"labels": 1}), fields=("labels", "reader"))(
            image=IMAGE, bboxes=OLD, labels=[1, 2], reader=[1, 2]
        )
    with pytest.raises(ValueError, match="kind of the field 'labels', which holds numbers, got 'nodule'"):
        pipeline(transform(weights, label="nodule"))(image=IMAGE, bboxes=OLD, labels=[1, 2])
    with pytest.raises(ValueError, match=r"\[0.0, 1.0\]|x_max"):  # declared as parts of the image, given in pixels
        pipeline(step, "albumentations")(image=IMAGE, bboxes=OLD, labels=[1, 2])
