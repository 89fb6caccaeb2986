"""albumentations: grafts with their boxes and masks, keyed per worker and epoch, serialisable, replayable."""

import copy
import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

A = pytest.importorskip("albumentations")

from tiny import FirstBoxes, make_mix  # noqa: E402

from carim_aug import SyntheticNoduleMix  # noqa: E402
from carim_aug.integrations.albumentations import GraftNodule  # noqa: E402
from carim_aug.ops.boxes import boxes_to_masks, feather  # noqa: E402

WHOLE = np.array([120, 96, 120, 96], dtype=np.float32)
FORMATS = {
    "pascal_voc": lambda b: b,
    "coco": lambda b: np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]),
    "albumentations": lambda b: b / WHOLE,
    "yolo": lambda b: np.hstack([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]]) / WHOLE,
}
OLD = np.array([[10.0, 12.0, 30.0, 40.0], [50.0, 20.0, 80.0, 60.0]])
IMAGE = np.random.default_rng(0).integers(60, 190, (96, 120, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def graft(tmp_path_factory):
    """Makes a GraftNodule of tiny weights, by default with a nodule in every image."""
    folder = tmp_path_factory.mktemp("weights")
    make_mix().save_pretrained(folder)
    return lambda **options: GraftNodule(**{"weights": str(folder), "p": 1.0, "placement": "prior", **options})


def pipeline(step, fmt="pascal_voc", fields=("labels",), more=(), **limits):
    return A.Compose([step, *more], bbox_params=A.BboxParams(format=fmt, label_fields=list(fields), **limits))


# --- What a graft does ---
@pytest.mark.parametrize("image", [IMAGE, IMAGE[..., 0], IMAGE.repeat(3, 2), (IMAGE / 255).astype(np.float32)])
def test_it_does_what_the_mix_does_to_a_data_set(graft, image):
    channels_first = image.reshape(96, 120, -1).transpose(2, 0, 1)
    data, options = (
        [(torch.from_numpy(channels_first), 0)] * 8,
        {"p": 0.6, "seed": 3, "strength": (0.5, 2.0), "placement": "prior"},
    )
    step = graft(**options)
    wrapped = SyntheticNoduleMix.from_pretrained(step.weights, **options).wrap(data)
    step.set_epoch(2)
    wrapped.set_epoch(2)
    grafted = 0
    for index in range(8):
        done = pipeline(step)(image=image, bboxes=[], labels=[], index=index)
        ours = done["image"].reshape(96, 120, -1).transpose(2, 0, 1)
        assert np.array_equal(ours, wrapped[index][0].numpy())
        assert done["image"].dtype == image.dtype and done["image"].shape == image.shape
        boxes = wrapped.decision(index).boxes_at(96, 120)
        assert np.allclose(np.reshape(done["bboxes"], (-1, 4)), boxes, atol=1e-4)
        assert not (ours != channels_first).any(0)[feather([boxes], (96, 120))[0, 0].numpy() == 0].any()
        grafted += len(boxes) > 0
    assert 0 < grafted < 8


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_a_box_comes_in_with_its_label_in_every_format(graft, fmt):
    options = {"image": IMAGE, "bboxes": FORMATS[fmt](OLD).tolist(), "index": 3}
    done = pipeline(graft(label="nodule"), fmt)(labels=["mass", "heart"], **options)
    n = len(done["bboxes"])
    assert n > 2 and done["labels"] == ["mass", "heart"] + ["nodule"] * (n - 2)
    assert np.allclose(done["bboxes"][:2], FORMATS[fmt](OLD), atol=1e-4)
    plain = pipeline(graft())(image=IMAGE, bboxes=OLD, labels=[7, 8], index=3)
    assert np.allclose(done["bboxes"][2:], FORMATS[fmt](np.array(plain["bboxes"])[2:]), atol=1e-4)
    assert np.array(plain["labels"]).tolist() == [7, 8] + [1] * (n - 2) and (plain["image"] == done["image"]).all()


def test_masks_get_the_nodules_ellipses_and_channels_of_a_mask_a_value_each(graft):
    one, several = np.zeros((96, 120), np.uint8), [np.zeros((96, 120), np.uint8)]
    done = pipeline(graft(mask_value=5))(image=IMAGE, mask=one, masks=several, bboxes=[], labels=[], index=1)
    boxes = torch.tensor(np.array(done["bboxes"]), dtype=torch.float32)
    ellipses = boxes_to_masks(list(boxes[:, None]), (96, 120), shape="ellipse")[:, 0].numpy()
    assert isinstance(done["masks"], list) and len(done["masks"]) == 1 + len(boxes)
    assert (np.stack(done["masks"][1:]) == ellipses).all() and (done["mask"] == 5 * ellipses.max(0)).all()
    assert one.sum() == 0
    assert len(A.Compose([graft()])(image=IMAGE, masks=[], index=1)["masks"]) == len(boxes)
    mask = np.full((96, 120, 3), 7, np.uint8)
    strict = A.Compose([graft(mask_value=[None, 0, 9])], strict=True)  # which knows the index
    colours = np.unique(strict(image=IMAGE, mask=mask, index=3)["mask"].reshape(-1, 3), axis=0)
    assert colours.tolist() == [[7, 0, 9], [7, 7, 7]]
    with pytest.raises(ValueError, match="each of a mask's 3 channels, got 1"):
        A.Compose([graft()])(image=IMAGE, mask=mask)


def test_boxes_follow_the_transforms_that_come_after_and_keypoints_stay(graft):
    options, step = {"image": IMAGE, "bboxes": [], "labels": [], "index": 2}, graft()
    flip, plain = pipeline(step, more=[A.HorizontalFlip(p=1.0)])(**options), pipeline(graft())(**options)
    a, b = np.array(flip["bboxes"]), np.array(plain["bboxes"])
    assert np.allclose(a[:, [0, 2]], 120 - b[:, [2, 0]], atol=1e-3) and (flip["image"] == plain["image"][:, ::-1]).all()
    points = A.Compose([step], keypoint_params=A.KeypointParams("xy"))(image=IMAGE, keypoints=[(3.0, 4.0)], index=2)
    assert np.array(points["keypoints"]).tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("limits", [{"min_area": 40.0}, {"min_width": 9.0}, {"min_area": 5000.0}])
def test_an_image_never_changes_without_its_boxes(graft, limits):
    grafted, boxed = 0, pipeline(graft(), **limits)
    for index in range(10):
        done = boxed(image=IMAGE, bboxes=[], labels=[], index=index)
        changed = bool((done["image"] != IMAGE).any())
        assert changed == bool(len(done["bboxes"])) == bool(len(done["labels"]))
        grafted += changed
    assert grafted == 0 if limits.get("min_area") == 5000.0 else grafted > 3


# --- What the labels become ---
def test_several_label_fields_get_a_value_each_and_the_chance_decides(graft):
    step = pipeline(graft(label={"labels": "nodule", "reader": -1}, p=0.5), fields=("labels", "reader"))
    grafted = 0
    for index in range(30):
        done = step(image=IMAGE, bboxes=OLD.tolist(), labels=["a", "b"], reader=[3, 4], index=index)
        new = len(done["bboxes"]) - 2
        grafted += new > 0
        assert done["labels"] == ["a", "b"] + ["nodule"] * new and list(done["reader"]) == [3, 4] + [-1] * new
        assert (new > 0) == bool((done["image"] != IMAGE).any())
    assert 6 < grafted < 24


@pytest.mark.parametrize(
    ("label", "samples"),
    [
        ("nodule", [["mass", "mass"]]),
        ("nodule", [[], ["consolidation", "mass"]]),  # longer ones are not cut off
        (2, [[], [7, 8]]),
    ],
)
def test_labels_in_arrays_stay_arrays_of_their_type(graft, label, samples):
    step = pipeline(graft(label=label))
    for old in samples:
        labels = np.array(old, dtype=np.int64 if label == 2 else None if old else "<U1")
        done = step(image=IMAGE, bboxes=OLD[: len(old)].reshape(-1, 4), labels=labels, index=3)["labels"]
        assert isinstance(done, np.ndarray) and (label != 2 or done.dtype == np.int64)
        assert done[: len(old)].tolist() == old and len(done) > len(old) and set(done[len(old) :].tolist()) == {label}


def test_boxes_may_have_their_label_as_fifth_entry(graft):
    step = A.Compose([graft(label=4)], bbox_params=A.BboxParams("pascal_voc"))
    for boxes, old in ((np.hstack([OLD, [[7], [8]]]), [7, 8]), (np.zeros((0, 5)), []), ([], [])):
        done = np.array(step(image=IMAGE, bboxes=boxes, index=3)["bboxes"])
        assert done[: len(old), 4].tolist() == old and len(done) > len(old) and set(done[len(old) :, 4]) == {4}


# --- Keys, copies and files ---
def test_it_survives_a_round_trip_as_json_and_a_replay(graft):
    step = graft(strength=(0.5, 0.9), label="n", seed=4)
    again = A.from_dict(json.loads(json.dumps(A.to_dict(pipeline(step)))))
    options = {"image": IMAGE, "bboxes": [], "labels": []}
    first, second = pipeline(step)(**options, index=9), again(**options, index=9)
    assert (first["image"] == second["image"]).all() and np.allclose(first["bboxes"], second["bboxes"])
    assert second["labels"] == first["labels"] and "n" in first["labels"]
    replay = A.ReplayCompose([step], bbox_params=A.BboxParams("pascal_voc", ["labels"]))
    done = replay(**options)
    assert (done["image"] != replay(**options)["image"]).any()  # the next one is another
    repeated = A.ReplayCompose.replay(json.loads(json.dumps(done["replay"], default=str)), **options)
    assert (repeated["image"] == done["image"]).all() and np.allclose(repeated["bboxes"], done["bboxes"])


def test_transforms_of_the_same_weights_share_one_generator_and_a_deep_copy_counts_with_the_first(graft, monkeypatch):
    step = graft()
    assert graft(seed=1)._applier.source is step._applier.source
    twin = copy.deepcopy(pipeline(step)).transforms[0]
    step.set_epoch(7)
    assert twin is not step and twin._applier is step._applier
    images = [A.Compose([each])(image=IMAGE, index=1)["image"] for each in (step, twin)]
    assert (images[0] == images[1]).all()
    images = {each(image=IMAGE)["image"].tobytes() for each in (step, twin)}
    monkeypatch.setenv("RANK", "1")
    images |= {graft()(image=IMAGE)["image"].tobytes() for _ in range(2)}
    assert len(images) == 3  # the copy does not repeat the first, nor does another rank


@pytest.mark.train
@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_no_worker_and_no_epoch_repeats_another_and_our_seed_alone_decides(graft, context):
    options = {"num_workers": 1 if context == "spawn" else 2, "persistent_workers": True}
    workers = options | {"multiprocessing_context": context} if context else {}
    found = []
    for torch_seed in (0, 9):
        step = graft(seed=5)
        order = torch.Generator().manual_seed(torch_seed)
        data = FirstBoxes(pipeline(step), IMAGE, indexed=False)
        loader, epochs = DataLoader(data, batch_size=6, generator=order, **workers), []
        for epoch in (0, None, 1, 0):  # None: not set, so the counts go on
            if epoch is not None:
                step.set_epoch(epoch)
            epochs.append(torch.cat(list(loader)))
        assert torch.equal(epochs[0], epochs[3]) and len(torch.cat(epochs[:3]).unique(dim=0)) == 72
        found.append(torch.stack(epochs))
    assert torch.equal(*found)
    data = FirstBoxes(pipeline(step), IMAGE, indexed=True)
    step.set_epoch(1)
    read = torch.cat(list(DataLoader(data, batch_size=6, **workers)))
    assert torch.equal(read, torch.stack([data[i] for i in range(24)]))


# --- What it refuses ---
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"placement": "heart"}, ValueError, "placement must be one of .* got 'heart'"),
        ({"placement": lambda image: image}, ValueError, "placement must be one of .* got <function"),
        ({"strength": 9.0}, ValueError, "strength must be .* got 9.0"),
        ({"seed": -1}, ValueError, "seed must be .* got -1"),
        ({"label": None}, ValueError, "label must be a string, a number .* got None"),
        ({"size": 512}, TypeError, "size"),
    ],
)
def test_bad_options_are_named(graft, options, error, words):
    with pytest.raises(error, match=words):
        graft(**options)


@pytest.mark.parametrize(
    ("label", "params", "sample", "words"),
    [
        (1, None, {"image": IMAGE.astype(np.float64)}, "image must be uint8, or float32 .* got float64"),
        (1, None, {"image": IMAGE.astype(np.float32)}, r"must lie in \[0, 1\] .* before A.Normalize"),
        (1, None, {"image": np.zeros((96, 120, 4), np.uint8)}, r"\(H, W, 3\), got \(96, 120, 4\)"),
        (1, None, {"bboxes": OLD}, r"bboxes must come with A.Compose\(\.\.\., bbox_params"),
        (1, None, {"image": None, "images": IMAGE[None]}, r"image must be given .* got \['images'\]"),
        (1, None, {"index": 2.5}, "index must be an integer, got 2.5"),
        (1, {}, {"bboxes": np.hstack([OLD, [[7], [8]]]), "labels": [1, 2]}, "bboxes must have 4 entries where"),
        (1, {"fields": ()}, {"bboxes": OLD}, "bboxes must come with labels"),
        ({"x": 1}, {}, {"bboxes": OLD, "labels": [1, 2]}, "value for each .* got none for 'labels'"),
        (1, {}, {"bboxes": OLD, "labels": ["mass", "heart"]}, "'labels', which holds strings, got 1"),
        ("nodule", {}, {"bboxes": OLD, "labels": [1, 2]}, "'labels', which holds numbers, got 'nodule'"),
        (1, {"fmt": "albumentations"}, {"bboxes": OLD, "labels": [1, 2]}, r"\[0.0, 1.0\]|x_max"),  # given in pixels
    ],
)
def test_bad_samples_are_named_and_labels_never_recoded(graft, label, params, sample, words):
    sample = {name: value for name, value in {"image": IMAGE, **sample}.items() if value is not None}
    with pytest.raises((ValueError, TypeError), match=words):
        (A.Compose([graft(label=label)]) if params is None else pipeline(graft(label=label), **params))(**sample)


def test_a_first_sample_without_boxes_leaves_the_kind_of_labels_to_ours(graft):
    step = pipeline(graft(label="nodule"))
    step(image=IMAGE, bboxes=[], labels=[])
    with pytest.raises(ValueError, match="which holds numbers, got 'nodule'"):
        step(image=IMAGE, bboxes=OLD, labels=[7, 8])
