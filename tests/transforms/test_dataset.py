from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Images, Records, Samples, generator, make_mix, named
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate
from torchvision import tv_tensors

from carim_aug import LabelError, LabelPolicy
from carim_aug.data import ChestXray14, PhantomChest
from carim_aug.labels.discover import labels_without_images, same_label
from carim_aug.ops.findings import FINDINGS

Named = namedtuple("Named", ["image", "label", "path"])
insertions = pytest.mark.parametrize("insertion", ["whole", "graft"])


def image(i, size=(32, 40)):
    return torch.full((1, *size), i / 20)


STRUCTURES = {
    "tuple": lambda i: (image(i), 0),
    "list": lambda i: [image(i), 0, f"{i}.png"],
    "named tuple": lambda i: Named(image(i), 0, f"{i}.png"),
    "dict": lambda i: {"image": image(i), "label": 0, "id": i},
    "numpy": lambda i: (image(i).numpy(), np.int64(0)),
    "tensor label": lambda i: (image(i), torch.tensor(0)),
    "tv_tensor": lambda i: (tv_tensors.Image(image(i)), 0),
    "uint8": lambda i: ((image(i) * 255).to(torch.uint8), 0),
    "one-hot": lambda i: (image(i), torch.tensor([1.0, 0.0])),
    "multi-label": lambda i: (image(i), torch.zeros(14)),
    "three channels": lambda i: (image(i).repeat(3, 1, 1), 0),
}


@insertions
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_item_keeps_its_structure_types_and_extra_fields(structure, insertion):
    data = [STRUCTURES[structure](i) for i in range(4)]
    before = [STRUCTURES[structure](i) for i in range(4)]
    labels = named({"one-hot": 2, "multi-label": 14}.get(structure))
    wrapped = make_mix(p=1.0, insertion=insertion, labels=labels).wrap(data)
    for real, mixed, copied in zip(data, wrapped, before, strict=True):
        assert type(mixed) is type(real) and len(mixed) == len(real)
        keys = list(real) if isinstance(real, dict) else range(len(real))
        for k, key in enumerate(keys):
            assert type(mixed[key]) is type(real[key]) and np.array_equal(real[key], copied[key])
            if hasattr(real[key], "shape"):
                assert mixed[key].shape == real[key].shape and mixed[key].dtype == real[key].dtype
            assert np.array_equal(mixed[key], real[key]) is (k > 1)
        label = np.asarray(mixed[keys[1]], dtype=float)
        assert label.tolist() == {0: 1.0, 2: [0, 1], 14: [0.0] * 5 + [1] + [0] * 8}[label.size if label.ndim else 0]


def test_torchxrayvision_records_keep_their_nan_and_range():
    wrapped = make_mix(p=1.0, value_range="xrv").wrap(Records(8, size=(40, 40)))
    for i, item in enumerate(wrapped):
        assert item["idx"] == i and isinstance(item["img"], np.ndarray) and item["img"].dtype == np.float32
        assert wrapped.decision(i).synthetic is (i % 4 != 3) is bool(item["img"].min() < item["img"].max())
        assert -1024 <= item["img"].min() and item["img"].max() <= 1024
        assert item["lab"][11] == 1 and np.isnan(item["lab"][14:]).all() and np.nansum(item["lab"]) == 1


def test_a_labels_getter_finds_the_label_of_samples_and_of_batches():
    def sample(i):
        return {"id": f"{i}.png", "truth": {"age": 60, "nodule": int(i % 4 == 3)}, "scan": (image(i), "PA")}

    options = dict(p=1.0, labels_getter=lambda sample: sample["truth"]["nodule"])
    wrapped = make_mix(**options).wrap(Samples(sample, 8))
    loader = make_mix(**options).loader(Samples(sample, 8), batch_size=8)
    items, (batch,) = list(wrapped), loader
    assert batch["truth"]["nodule"].tolist() == [item["truth"]["nodule"] for item in items] == [1] * 8
    assert [item["id"] for item in items] == batch["id"] == [f"{i}.png" for i in range(8)]
    assert torch.allclose(batch["scan"][0], torch.stack([item["scan"][0] for item in items]), atol=1e-5)
    assert loader.last_params.synthetic.tolist() == [i % 4 != 3 for i in range(8)]
    assert wrapped.class_counts() == loader.class_counts() and wrapped.class_counts()["Nodule"]["total"] == 8


def test_tensors_and_phantoms_are_data_sets():
    data = TensorDataset(torch.full((6, 1, 32, 32), 0.5), torch.zeros(6).long())
    assert [int(label) for _, label in make_mix(p=1.0).wrap(data)] == [1] * 6
    for target in ("integer", "multilabel"):
        data = PhantomChest(8, size=48, target=target)
        assert all(type(new) is type(old) for (_, new), (_, old) in zip(make_mix(p=1.0).wrap(data), data, strict=True))


# --- Which samples ---
def synthetic(wrapped):
    return [wrapped.decision(i).synthetic for i in range(len(wrapped))]


def test_only_the_larger_class_is_replaced_or_what_eligible_allows():
    every_fourth = [i % 4 == 3 for i in range(12)]
    others = [not fourth for fourth in every_fourth]
    assert synthetic(make_mix(p=1.0).wrap(Images(12))) == others
    nodule_rich = make_mix(p={"No Finding": 1.0}, insertion="whole").wrap(Images(12, labels=map(int, others)))
    assert synthetic(nodule_rich) == others and [label for _, label in nodule_rich] == [0] * 12
    assert synthetic(make_mix(p=1.0, eligible=lambda label: label == 1).wrap(Images(12))) == every_fourth

    rows = torch.zeros(4, 14)  # normal, another finding, unknown, a nodule
    rows[1, 2], rows[2, 5], rows[3, 5] = 1, torch.nan, 1
    data = [(image(i), row) for i, row in enumerate(rows)]
    assert synthetic(make_mix(p=1.0, labels=named(14)).wrap(data)) == [True] + [False] * 3


def test_a_real_item_is_the_users_own_object_and_needs_no_generator(monkeypatch):
    samples = [(image(i), i % 2) for i in range(6)]
    monkeypatch.setattr(type(generator()), "_generate", None)
    assert all(mixed is real for mixed, real in zip(make_mix(p=0.0).wrap(samples), samples, strict=True))


# --- How many ---
@given(
    normal=st.integers(1, 15),
    nodule=st.integers(0, 15),
    more=st.integers(0, 12),
    fewer=st.integers(0, 12),
    insertion=st.sampled_from(["whole", "graft"]),
)
def test_n_synthetic_adds_exactly_that_many(normal, nodule, more, fewer, insertion):
    real, labels = normal + nodule, [0] * normal + [1] * nodule
    extra = {"Nodule": more} | ({"No Finding": fewer} if insertion == "whole" else {})
    wrapped = make_mix(n_synthetic=extra, insertion=insertion).wrap(Images(real, labels=labels))
    assert len(wrapped) == real + sum(extra.values())
    assert wrapped.class_counts()["Nodule"] == {"real": nodule, "synthetic": more, "total": nodule + more}
    each = [wrapped.planned[i][1] for i in range(len(wrapped))]
    assert [(one.class_name, one.background) for one in each[:real]] == [(None, i) for i in range(real)]
    new = [one.class_name for one in each[real:]]
    assert {name: new.count(name) for name in extra} == extra
    with pytest.raises(IndexError, match=f"index must be in .* got {len(wrapped)}"):
        wrapped[len(wrapped)]
    assert wrapped[-1][1] == wrapped[len(wrapped) - 1][1]


@insertions
@pytest.mark.parametrize(
    ("how", "total"),
    [
        ({"p": 0.5}, None),
        ({"n_synthetic": {"Nodule": 13}}, 18),
        ({"sampling_strategy": "minority"}, 15),
        ({"sampling_strategy": 0.8}, 12),
        ({"sampling_strategy": {"Nodule": 11}}, 11),
        ({"sampling_strategy": lambda counts: {"Nodule": counts["No Finding"]}}, 15),
    ],
)
def test_class_counts_are_what_one_pass_has(how, total, insertion):
    for targets in (True, False):
        mix = make_mix(insertion=insertion, placement="prior", seed=3, **how)
        loader = mix.loader(Images(20, targets=targets), batch_size=7)
        for _ in range(2):
            counts = loader.class_counts()
            rows = [(label, made) for _, y in loader for label, made in zip(y, mix.last_params.classes, strict=True)]
            for index, name in enumerate(("No Finding", "Nodule")):
                new, labelled = sum(made == name for _, made in rows), sum(int(label) == index for label, _ in rows)
                assert counts[name] == {"real": labelled - new, "synthetic": new, "total": labelled}
            assert total in (None, counts["Nodule"]["total"])


def test_added_nodules_are_grafted_into_images_that_may_be_backgrounds():
    wrapped = make_mix(n_synthetic={"Nodule": 10}).wrap(Images(12))
    for i in range(12, 22):
        background, (mixed, label) = wrapped.decision(i).background, wrapped[i]
        assert background % 4 != 3 and label == 1
        assert (mixed == background / 12).float().mean() > 0.5  # the image is its background's but for the nodule
    with pytest.raises(ValueError, match="dataset must have samples that may be backgrounds, got classes .*Nodule"):
        make_mix(n_synthetic={"Nodule": 2}).wrap(Images(8, labels=[1] * 8))


@insertions
def test_a_disabled_mix_has_the_real_data_set_in_mid_epoch_too(insertion):
    mix, images, seen = make_mix(n_synthetic={"Nodule": 5}, insertion=insertion), Images(8), []
    wrapped = mix.wrap(images)
    assert len(wrapped) == 13
    for batch, labels in mix.loader(images, batch_size=4):
        mix.enabled = False
        seen += [(float(one.mean()), int(label)) for one, label in zip(batch, labels, strict=True)]
    assert len(seen) == 13 and set(seen[8:]) <= {(float(images[i][0].mean()), images[i][1]) for i in range(8)}
    assert len(wrapped) == 8 and [label for _, label in wrapped] == images.targets
    assert wrapped.class_counts()["Nodule"]["synthetic"] == 0
    mix.enabled = True
    assert len(wrapped) == 13


# --- Labels beside the images ---
def test_labels_are_found_without_loading_all_images():
    images = Images(400)
    for data in (images, Subset(images, range(100, 400)), ConcatDataset([images, Subset(images, range(50))])):
        images.reads = 0
        counts = make_mix(n_synthetic={"Nodule": 5}).wrap(data).class_counts()
        assert images.reads <= 4  # the first sample, and one of each class
        assert counts["Nodule"]["real"] == sum(data[i][1] for i in range(len(data)))
    images.targets = torch.tensor(images.targets)
    assert labels_without_images(Subset(images, [3, 0])).tolist() == [1, 0]
    images.targets = [1]  # of another length
    assert labels_without_images(images) is None
    row = torch.tensor([0.0, torch.nan])
    assert same_label(row, row.numpy()) and same_label(1, torch.tensor(1)) and not same_label(1, 0)
    assert not same_label(row, 0) and not same_label({"boxes": 1}, 0)


def test_labels_nowhere_else_are_read_once():
    images = Images(30, targets=False)
    mix = make_mix(n_synthetic={"Nodule": 5})
    wrapped = mix.wrap(images)
    wrapped.class_counts(), mix.class_counts(wrapped)
    mix.loader(wrapped, batch_size=8).class_counts()
    assert images.reads <= 32
    images.reads = 0
    make_mix(p=0.5).wrap(images)
    assert images.reads == 1  # a chance needs no counts


@pytest.mark.parametrize("targets", [[0, 2, 1, 2] * 3, [0, 0, 1] + [0] * 9], ids=["of three classes", "wrong later on"])
def test_targets_that_samples_contradict_are_not_trusted(targets):
    data = Images(12)
    data.targets = targets
    assert make_mix(n_synthetic={"Nodule": 1}).class_counts(data)["Nodule"]["real"] == 3


# --- Class names ---
def test_class_names_of_the_data_set_are_followed_unless_the_labels_may_not():
    labels = [int(i % 4 != 3) for i in range(12)]  # the first class is the nodule, as of folders by name
    data = Images(12, labels=labels, classes=["nodule", "normal"])
    for whole in (data, Subset(data, range(12)), ConcatDataset([data, data])):
        mix = make_mix(p=1.0)
        loader = mix.loader(whole, batch_size=64)
        ((_, marked),) = loader
        params, n = mix.last_params, len(whole)
        assert (marked == 0).all() and params.synthetic.tolist() == [bool(y) for _, y in whole]
        assert all(len(boxes) >= 1 for boxes, made in zip(params.boxes, params.synthetic, strict=True) if made)
        assert loader.class_counts()["nodule"] == {"real": n // 4, "synthetic": n * 3 // 4, "total": n}
    other, policy = Images(12, classes=["normal", "nodule"]), LabelPolicy(classes=("normal", "nodule"))
    with pytest.raises(LabelError, match="one list of classes in all data sets inside"):
        make_mix().wrap(ConcatDataset([data, other]))
    data.targets = other.targets
    with pytest.raises(LabelError, match="pass labels=LabelPolicy"):
        make_mix().wrap(data)
    assert make_mix(labels=policy).wrap(ConcatDataset([data, other])) and make_mix(labels=policy).wrap(data)


def test_nodule_targets_of_chestxray14_are_not_taken_for_columns(real_data):
    wrapped = make_mix(p=1.0, eligible=lambda label: True).wrap(ChestXray14(real_data, split="val", target="nodule"))
    assert set(wrapped.class_counts()) == {"No Finding", "Nodule"} and wrapped[0][1] == 1


def test_fourteen_columns_of_torchxrayvision_are_not_taken_for_the_official_order():
    def sample(i):  # its own ChestX-ray14: columns sorted by name, the nodule's the eleventh
        return {"img": np.zeros((1, 32, 32), dtype=np.float32), "lab": np.eye(14, dtype=np.float32)[10] * (i == 7)}

    options, names, data = {"p": 1.0, "value_range": "xrv"}, sorted(FINDINGS), Samples(sample, 8)
    batch = default_collate([sample(i) for i in range(8)])
    for call in (make_mix(**options).wrap, lambda data: make_mix(**options)(batch)):
        with pytest.raises(
            LabelError, match=r"columns whose names are known .*dataset.pathologies in torchxrayvision's"
        ):
            call(data)
    named = make_mix(**options, labels=LabelPolicy("multilabel", classes=names))
    assert named(batch)["lab"][:, 10].tolist() == [1] * 8
    data.pathologies = names
    assert make_mix(**options).wrap(data)[0]["lab"].tolist() == [0] * 10 + [1] + [0] * 3
