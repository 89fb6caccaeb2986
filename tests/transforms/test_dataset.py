from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Films, Records, generator, make_mix
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate
from torchvision import tv_tensors

from carim_aug import LabelError, LabelPolicy
from carim_aug.data.folders import FolderPerClass
from carim_aug.data.phantom import PhantomChest
from carim_aug.labels.names import CHESTXRAY14
from carim_aug.transforms.dataset import labels_without_images, same_label


class Shaped(Dataset):
    """Samples of any structure, made by a function of the index."""

    def __init__(self, make, n=12):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


Named = namedtuple("Named", ["image", "label", "path"])


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


@pytest.mark.parametrize("insertion", ["whole", "graft"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_item_keeps_its_structure_types_and_extra_fields(structure, insertion):
    data = Shaped(STRUCTURES[structure])
    wrapped = make_mix(p=1.0, insertion=insertion).wrap(data)
    changed = 0
    for i in range(len(data)):
        real, mixed = data[i], wrapped[i]
        assert type(mixed) is type(real) and len(mixed) == len(real)
        keys = list(real) if isinstance(real, dict) else range(len(real))
        for k, key in enumerate(keys):
            assert type(mixed[key]) is type(real[key])
            if hasattr(real[key], "shape"):
                assert mixed[key].shape == real[key].shape and mixed[key].dtype == real[key].dtype
            if k > 1:
                assert mixed[key] == real[key]
        changed += not np.array_equal(np.asarray(mixed[keys[0]]), np.asarray(real[keys[0]]))
        label = np.asarray(mixed[keys[1]], dtype=float)
        assert label.tolist() == {0: 1.0, 2: [0, 1], 14: [0.0] * 5 + [1] + [0] * 8}[label.size if label.ndim else 0]
    assert changed == len(data)


def test_torchxrayvision_records_keep_their_nan_and_range():
    wrapped = make_mix(p=1.0, value_range="xrv").wrap(Records(8, size=(40, 40)))
    for i in range(8):
        item = wrapped[i]
        assert item["idx"] == i and isinstance(item["img"], np.ndarray) and item["img"].dtype == np.float32
        assert wrapped.slot(i).synthetic is (i % 4 != 3) is bool(item["img"].min() < item["img"].max())
        assert -1024 <= item["img"].min() and item["img"].max() <= 1024
        assert item["lab"][11] == 1 and np.isnan(item["lab"][14:]).all() and np.nansum(item["lab"]) == 1


def test_only_the_larger_class_is_replaced():
    normal_rich = make_mix(p=1.0).wrap(Films(20))
    assert [normal_rich.slot(i).synthetic for i in range(20)] == [i % 4 != 3 for i in range(20)]
    nodule_rich = make_mix(p={"No Finding": 1.0}).wrap(Films(20, labels=[int(i % 4 != 3) for i in range(20)]))
    assert [nodule_rich[i][1] for i in range(20)] == [0] * 20
    assert [nodule_rich.slot(i).synthetic for i in range(20)] == [i % 4 != 3 for i in range(20)]


def test_eligible_decides_by_label_what_is_replaced():
    wrapped = make_mix(p=1.0, eligible=lambda label: label == 1).wrap(Films(20))
    assert [wrapped.slot(i).synthetic for i in range(20)] == [i % 4 == 3 for i in range(20)]


def test_findings_without_a_nodule_and_unknown_rows_are_not_replaced():
    rows = torch.zeros(4, 14)
    rows[1, 2], rows[2, 5], rows[3, 5] = 1, torch.nan, 1
    wrapped = make_mix(p=1.0).wrap(Shaped(lambda i: (image(i), rows[i]), n=4))
    assert [wrapped.slot(i).synthetic for i in range(4)] == [True, False, False, False]


def test_a_real_item_is_the_users_own_object():
    samples = [(image(i), i % 2) for i in range(6)]
    wrapped = make_mix(p=0.0).wrap(Shaped(samples.__getitem__, n=6))
    assert all(wrapped[i] is samples[i] for i in range(6))


def test_nothing_of_the_users_is_changed_in_place():
    samples = [(image(i), torch.zeros(14)) for i in range(6)]
    before = [(x.clone(), y.clone()) for x, y in samples]
    for insertion in ("whole", "graft"):
        wrapped = make_mix(p=1.0, insertion=insertion).wrap(Shaped(samples.__getitem__, n=6))
        _ = [wrapped[i] for i in range(6)]
        assert all(
            torch.equal(a, b) for one, two in zip(samples, before, strict=True) for a, b in zip(one, two, strict=True)
        )


@settings(deadline=None, max_examples=100)
@given(
    normal=st.integers(1, 15),
    nodule=st.integers(0, 15),
    more=st.integers(0, 12),
    fewer=st.integers(0, 12),
    insertion=st.sampled_from(["whole", "graft"]),
)
def test_n_synthetic_adds_exactly_that_many(normal, nodule, more, fewer, insertion):
    labels = [0] * normal + [1] * nodule
    extra = {"Nodule": more} | ({"No Finding": fewer} if insertion == "whole" else {})
    mix = make_mix(n_synthetic=extra, insertion=insertion)
    wrapped = mix.wrap(Films(len(labels), labels=labels))
    counts = wrapped.class_counts()
    added = sum(extra.values())
    assert len(wrapped) == len(labels) + added
    assert counts["Nodule"] == {"real": nodule, "synthetic": more, "total": nodule + more}
    real = [wrapped.slot(i) for i in range(len(labels))]
    assert not any(s.synthetic for s in real) and [s.host for s in real] == list(range(len(labels)))
    new = [wrapped.slot(i).class_name for i in range(len(labels), len(wrapped))]
    assert {name: new.count(name) for name in extra} == extra
    with pytest.raises(IndexError, match="index must be in"):
        wrapped[len(wrapped)]
    assert wrapped[-1][1] == wrapped[len(wrapped) - 1][1]


@pytest.mark.parametrize("insertion", ["whole", "graft"])
@pytest.mark.parametrize(
    "how",
    [
        {"p": 0.5},
        {"n_synthetic": {"Nodule": 13}},
        {"sampling_strategy": "minority"},
        {"sampling_strategy": 0.8},
        {"sampling_strategy": {"Nodule": 25}},
        {"sampling_strategy": lambda counts: {"Nodule": counts["No Finding"]}},
    ],
)
@pytest.mark.parametrize("targets", [True, False])
def test_class_counts_are_what_one_pass_gives(how, insertion, targets):
    loader = make_mix(insertion=insertion, seed=3, **how).loader(Films(40, targets=targets), batch_size=7)
    for _ in range(2):
        counts = loader.class_counts()
        labels, synthetic = [], []
        for _, batch in loader:
            labels += batch.tolist()
            synthetic += [s.class_name for s in loader.last_params.slots]
        for index, name in enumerate(("No Finding", "Nodule")):
            assert counts[name]["total"] == labels.count(index)
            assert counts[name]["synthetic"] == synthetic.count(name)
            assert counts[name]["real"] == labels.count(index) - synthetic.count(name)


def test_a_total_and_a_ratio_are_met():
    assert make_mix(sampling_strategy={"Nodule": 25}).class_counts(Films(40))["Nodule"]["total"] == 25
    assert make_mix(sampling_strategy=0.5).class_counts(Films(40))["Nodule"]["total"] == 15
    for word in ("minority", "auto", "all", "not majority"):
        assert make_mix(sampling_strategy=word).class_counts(Films(40))["Nodule"]["total"] == 30


def test_added_nodules_are_grafted_into_images_that_may_host_them():
    data = Films(12)
    wrapped = make_mix(n_synthetic={"Nodule": 30}, insertion="graft").wrap(data)
    for i in range(12, 42):
        slot = wrapped.slot(i)
        assert slot.host % 4 != 3
        mixed, label = wrapped[i]
        # The image is its host's but for the nodule.
        assert label == 1 and (mixed == slot.host / 12).float().mean() > 0.5


def test_no_host_at_all_is_an_error():
    with pytest.raises(ValueError, match="dataset has no sample that may host synthetic ones"):
        make_mix(n_synthetic={"Nodule": 2}, eligible=lambda label: False).wrap(Films(8))


def test_a_disabled_mix_gives_the_real_data_set():
    mix = make_mix(n_synthetic={"Nodule": 5})
    wrapped = mix.wrap(Films(8))
    assert len(wrapped) == 13
    mix.enabled = False
    assert len(wrapped) == 8 and [wrapped[i][1] for i in range(8)] == Films(8)._labels
    assert wrapped.class_counts()["Nodule"]["synthetic"] == 0
    assert [label for _, label in wrapped] == Films(8)._labels
    mix.enabled = True
    assert len(wrapped) == 13


def test_a_mix_disabled_in_mid_epoch_goes_on_with_real_samples():
    films = Films(8)
    for mix in (make_mix(n_synthetic={"Nodule": 5}), make_mix(n_synthetic={"Nodule": 5}, insertion="graft")):
        seen = []
        for images, labels in mix.loader(films, batch_size=4):
            mix.enabled = False
            seen += [(float(image.mean()), int(label)) for image, label in zip(images, labels, strict=True)]
        real = [(float(films[i][0].mean()), int(films[i][1])) for i in range(8)]
        assert len(seen) == 13 and set(seen[8:]) <= set(real)


# --- Labels beside the images ---
def test_labels_are_found_without_loading_all_images():
    films = Films(400)
    for data in (films, Subset(films, range(100, 400)), ConcatDataset([films, Subset(films, range(50))])):
        films.reads = 0
        counts = make_mix(n_synthetic={"Nodule": 5}).wrap(data).class_counts()
        assert counts["Nodule"]["real"] == sum(data[i][1] for i in range(len(data)))
        assert films.reads - len(data) <= 4  # the first sample, and one of each class


def test_labels_nowhere_else_are_read_once():
    films = Films(30, targets=False)
    mix = make_mix(n_synthetic={"Nodule": 5})
    wrapped = mix.wrap(films)
    wrapped.class_counts(), mix.class_counts(wrapped)
    loader = mix.loader(wrapped, batch_size=8)
    loader.class_counts()
    assert films.reads <= 32
    films.reads = 0
    make_mix(p=0.5).wrap(films)
    assert films.reads == 1  # a chance needs no counts


class Remapped(Films):
    """targets are of three classes, samples of two, as a target_transform does."""

    def __init__(self):
        super().__init__(12, labels=[0, 1, 0, 1] * 3)
        self.targets = [0, 2, 1, 2] * 3


class Stale(Films):
    """targets that are right at first and wrong for nodules."""

    def __init__(self):
        super().__init__(12)
        self.targets = [0] * 12
        self.targets[2] = 1


@pytest.mark.parametrize("data", [Remapped(), Stale()], ids=["remapped", "stale"])
def test_targets_that_samples_contradict_are_not_trusted(data):
    counts = make_mix(n_synthetic={"Nodule": 1}).class_counts(data)
    assert counts["Nodule"]["real"] == sum(data._labels)


def test_class_names_that_the_labels_may_not_follow_are_refused():
    data = Films(8, classes=["nodule", "normal"])
    data.targets = [1 - y for y in data._labels]
    with pytest.raises(LabelError, match="pass labels=LabelPolicy"):
        make_mix().wrap(data)
    wrapped = make_mix(p=1.0, labels=LabelPolicy(classes=("normal", "nodule"))).wrap(data)
    assert wrapped[0][1] == 1


def test_folders_whose_first_class_is_the_nodule_are_understood(tmp_path):
    from PIL import Image

    for name, n in (("nodule", 3), ("normal", 9)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.fromarray(np.full((40, 40), 20 * i, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    folder = FolderPerClass(tmp_path)
    assert folder.classes == ["nodule", "normal"]
    for data in (folder, Subset(folder, range(12)), ConcatDataset([folder, folder])):
        mix = make_mix(p=1.0)
        loader = mix.loader(data, batch_size=64)
        ((_, labels),) = loader
        params = mix.last_params
        assert (labels == 0).all() and int(params.synthetic.sum()) == sum(y == 1 for _, y in data)
        assert all(len(boxes) >= 1 for boxes, made in zip(params.boxes, params.synthetic, strict=True) if made)
        assert loader.class_counts()["nodule"] == {
            "real": sum(y == 0 for _, y in data),
            "synthetic": sum(y == 1 for _, y in data),
            "total": len(data),
        }


def test_parts_with_other_class_names_are_refused():
    parts = [Films(4, classes=["nodule", "normal"]), Films(4, classes=["normal", "nodule"])]
    with pytest.raises(LabelError, match="one list of classes in all parts"):
        make_mix().wrap(ConcatDataset(parts))
    assert make_mix(labels=LabelPolicy(classes=("normal", "nodule"))).wrap(ConcatDataset(parts))


def test_phantoms_of_every_target_are_mixed():
    for target in ("integer", "multilabel"):
        wrapped = make_mix(p=0.5).wrap(PhantomChest(20, size=48, target=target))
        labels = [wrapped[i][1] for i in range(20)]
        assert any(wrapped.slot(i).synthetic for i in range(20))
        assert all(type(y) is type(PhantomChest(1, size=48, target=target)[0][1]) for y in labels)


def test_a_list_of_samples_is_a_data_set():
    images, labels = (
        DataLoader(make_mix(p=1.0).wrap([(image(i), 0) for i in range(4)]), batch_size=4).__iter__().__next__()
    )
    assert images.shape == (4, 1, 32, 40) and labels.tolist() == [1] * 4


def test_a_tensor_data_set_is_mixed():
    data = TensorDataset(torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(6).long())
    assert [int(make_mix(p=1.0).wrap(data)[i][1]) for i in range(6)] == [1] * 6


def test_labels_without_images_looks_where_data_sets_keep_them():
    films = Films(6)
    assert labels_without_images(films) == films._labels
    assert labels_without_images(Films(6, targets=False)) is None
    assert labels_without_images(Subset(films, [3, 0])) == [1, 0]
    films.targets = torch.tensor(films._labels)
    assert labels_without_images(Subset(films, [3, 0])).tolist() == [1, 0]
    films.targets = [1]  # of another length
    assert labels_without_images(films) is None


def test_labels_are_the_same_with_nan_in_them():
    row = torch.tensor([0.0, torch.nan])
    assert same_label(row, row.numpy()) and same_label(1, torch.tensor(1)) and not same_label(1, 0)
    assert not same_label(row, 0) and not same_label({"boxes": 1}, 0)


def test_the_generator_is_not_asked_for_real_items():
    class Broken(type(generator())):
        def forward(self, *_):
            raise AssertionError("generated")

    wrapped = make_mix(p=0.0).wrap(Films(8))
    wrapped.filler.renderer.generator = Broken("tiny")
    assert [wrapped[i][1] for i in range(8)] == Films(8)._labels


def test_nodule_targets_of_chestxray14_are_not_taken_for_columns(real_data):
    from carim_aug.data.chestxray14 import ChestXray14

    data = ChestXray14(real_data, split="val", target="nodule")
    mix = make_mix(p=1.0, eligible=lambda label: True)
    assert set(mix.wrap(data).class_counts()) == {"No Finding", "Nodule"}
    assert mix.wrap(data)[0][1] == 1


class Sorted(Records):
    """torchxrayvision's own ChestX-ray14: 14 columns, sorted by name, the nodule's the eleventh."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        row = np.zeros(14, dtype=np.float32)
        row[10] = sample["lab"][11]
        return {**sample, "lab": row}


def test_fourteen_columns_of_torchxrayvision_are_not_taken_for_the_official_order():
    options = {"p": 1.0, "value_range": "xrv", "insertion": "graft"}
    batch = default_collate([Sorted(8)[i] for i in range(8)])
    for door in (make_mix(**options).wrap, lambda data: make_mix(**options)(batch)):
        with pytest.raises(LabelError, match=r"labels must have named columns .*classes=dataset.pathologies"):
            door(Sorted(8))
    names = sorted(CHESTXRAY14)
    named = make_mix(**options, labels=LabelPolicy("multilabel", classes=names))
    assert named(batch)["lab"][:, 10].tolist() == [1] * 8
    told = Sorted(8)
    told.pathologies = names
    assert make_mix(**options).wrap(told)[0]["lab"].tolist() == [0] * 10 + [1] + [0] * 3
