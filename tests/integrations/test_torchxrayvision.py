"""torchxrayvision's data sets with synthetic samples, and whether their tables stay true; its networks as gates."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from carim_aug import Gate, LabelError, LabelPolicy, SyntheticDataError, assert_real_only, cam_gate, probability_gate

xrv = pytest.importorskip("torchxrayvision")

from carim_aug.integrations.torchxrayvision import GateClassifier, MixDataset  # noqa: E402

NODULE = "Nodule"
INSERTIONS = pytest.mark.parametrize("insertion", ["graft", "whole"])
SMALL = {"num_init_features": 8, "growth_rate": 4, "block_config": (1, 1, 1, 1)}


def make_mix(**options):
    return tiny.make_mix(**{"placement": "prior", **options})  # looking for lungs takes most of the time


@pytest.fixture
def nih(phantom_data):
    """Makes NIH_Dataset over the phantom chests: 36 images, every third with a nodule, half of those boxed."""
    tables = {"csvpath": "Data_Entry_2017_v2020.csv", "bbox_list_path": "BBox_List_2017.csv"}
    paths = {name: str(phantom_data / file) for name, file in tables.items()}
    return lambda **options: xrv.datasets.NIH_Dataset(str(phantom_data / "images"), **paths, **options)


def image_bytes(sample) -> bytes:
    return np.asarray(sample["img"], dtype=np.float64).tobytes()


def check_true(data, mixed: MixDataset) -> None:
    """Every sample of `data`, which reads `mixed` somehow, is what labels, csv and sample itself say it is."""
    assert len(data) == len(data.labels) == len(data.csv)
    column, inner = list(data.pathologies).index(NODULE), list(mixed.dataset.pathologies).index(NODULE)
    real = {image_bytes(sample): sample["lab"][inner] for sample in mixed.dataset}
    for i in range(len(data)):
        sample, row = data[i], data.csv.iloc[i]
        np.testing.assert_array_equal(sample["lab"], data.labels[i])
        synthetic = row.get("synthetic") == True  # noqa: E712 - missing in the csv of a data set that is not mixed
        assert synthetic == (image_bytes(sample) not in real)
        if synthetic:
            assert data.labels[i][column] == 1 and row["Finding Labels"] == NODULE and row["has_masks"]
            decision = mixed.decision(int(row["synthetic_index"]))
            assert decision.synthetic and decision.key[::2] == (row["synthetic_seed"], row["synthetic_index"])
        else:
            assert data.labels[i][column] == real[image_bytes(sample)]


# --- Tables and samples ---
@INSERTIONS
@pytest.mark.parametrize("amount", [{"p": 0.6}, {"n_synthetic": {NODULE: 9}}, {"sampling_strategy": "minority"}])
def test_tables_say_what_the_samples_are(nih, insertion, amount):
    data = MixDataset(nih(), make_mix(insertion=insertion, seed=4, **amount))
    check_true(data, data)
    made = int(data.csv.synthetic.sum())
    assert len(data) == 36 + (0 if "p" in amount else made) and made > 5
    assert data.totals()[NODULE][1.0] == 12 + made
    assert f"num_samples={len(data)} synthetic={made}\n└ of NIH_Dataset" in repr(data)


@INSERTIONS
def test_what_is_mixed_in_the_epoch_of_making_is_what_wrap_mixes(nih, insertion):
    mix = tiny.make_mix(p=0.5, insertion=insertion, value_range="xrv", seed=2)
    mix.set_epoch(3)
    data, wrapped = MixDataset(nih(), mix), mix.wrap(nih())
    for i in range(0, len(data), 3):
        assert data.decision(i) == wrapped.decision(i)
        np.testing.assert_array_equal(data[i]["img"], wrapped[i]["img"])
        np.testing.assert_array_equal(data[i]["lab"], wrapped[i]["lab"])


@INSERTIONS
def test_samples_are_as_torchxrayvision_has_them_and_unknown_labels_stay(nih, insertion):
    inner = nih()
    xrv.datasets.relabel_dataset(xrv.datasets.default_pathologies, inner, silent=True)
    inner.labels[1] = np.nan
    data = MixDataset(inner, make_mix(p=1.0, insertion=insertion))
    for i, sample in enumerate(data):
        assert sample.keys() == {"idx", "lab", "img"} and sample["idx"] == i
        assert isinstance(sample["img"], np.ndarray) and sample["img"].shape == (1, 64, 64)
        assert sample["img"].dtype == np.float32 and np.abs(sample["img"]).max() <= 1024
        assert isinstance(sample["lab"], np.ndarray) and sample["lab"].dtype == inner.labels.dtype
        sample["lab"][:] = 7
    assert data[-1]["idx"] == 35 and np.nanmax(data.labels) == np.nanmax(data.dataset.labels) == 1
    with pytest.raises(IndexError, match=r"idx must be in \[0, 36\), got 36"):
        data[36]
    np.testing.assert_array_equal(np.isnan(data.labels), np.isnan(inner.labels))
    assert data.labels.shape == (36, 18) and data.csv.synthetic[1:3].tolist() == [False, True]
    assert data.labels[2, 11] == 1 and np.nansum(data.labels[2]) == 1 and np.isnan(data[2]["lab"][14:]).all()


def test_the_row_of_a_graft_is_its_backgrounds_and_a_whole_image_has_no_patient(nih):
    inner = nih(pathology_masks=True)
    inner.csv.loc[2, "Finding Labels"] = "Mass|No Finding"
    options = {"p": 1.0, "eligible": lambda row: not row[list(inner.pathologies).index(NODULE)]}
    graft = MixDataset(inner, make_mix(**options)).csv.iloc[2]
    assert (graft["patientid"], graft["Image Index"], graft["sex_male"]) == ("3", "00000003_000.png", True)
    assert graft["Finding Labels"] == "Mass|Nodule" and graft["synthetic"] and graft["synthetic_index"] == 2
    whole = MixDataset(inner, make_mix(insertion="whole", seed=8, **options)).csv
    row, real = whole.iloc[2], whole.iloc[0]
    assert (row["patientid"], row["view"], row["Finding Labels"]) == ("synthetic-8-2", "UNKNOWN", NODULE)
    assert row[["Image Index", "Patient Age", "age_years"]].isna().all() and not row["sex_male"]
    assert (real["patientid"], real["Image Index"], real["sex_male"]) == ("1", "00000001_000.png", True)
    assert inner.csv.columns.tolist() == [c for c in whole.columns if not c.startswith("synthetic")]

    # Normal images that are added are normal in all tables.
    data = MixDataset(inner, make_mix(n_synthetic={"No Finding": 3, NODULE: 2}, insertion="whole"))
    assert data.csv["Finding Labels"].tolist()[36:] == ["No Finding"] * 3 + [NODULE] * 2
    assert data.csv["has_masks"].tolist()[36:] == [False] * 3 + [True] * 2
    assert data.labels[36:].sum(axis=1).tolist() == [0, 0, 0, 1, 1]
    assert [len(data[i]["pathology_masks"]) for i in range(36, 41)] == [0, 0, 0, 1, 1]


@INSERTIONS
def test_each_epoch_has_other_nodules_in_the_same_samples(nih, insertion):
    mix = make_mix(p=0.6, insertion=insertion)
    data = MixDataset(nih(), mix)
    labels, csv, images = data.labels.copy(), data.csv.copy(), {}
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        stack = np.stack([sample["img"] for sample in data])
        np.testing.assert_array_equal(images.setdefault(epoch, stack), stack)
        assert np.array_equal(data.labels, labels) and data.csv.equals(csv)
    np.testing.assert_array_equal((images[0] != images[1]).any(axis=(1, 2, 3)), data.csv.synthetic)
    mix.set_epoch(5)
    assert MixDataset(nih(), mix).csv.synthetic.tolist() != csv.synthetic.tolist()


# --- torchxrayvision's own tools, on both sides of the mix ---
READERS = {
    "merged": lambda data, real: xrv.datasets.MergeDataset([real, data]),
    "filtered": lambda data, real: xrv.datasets.FilterDataset(data, labels=[NODULE]),
    "synthetic": lambda data, real: xrv.datasets.SubsetDataset(data, np.flatnonzero(data.csv["synthetic"])),
    "real": lambda data, real: xrv.datasets.SubsetDataset(data, np.flatnonzero(~data.csv["synthetic"])),
}


@INSERTIONS
@pytest.mark.parametrize(
    ("reader", "nodules", "made"), [("merged", 31, 7), ("filtered", 19, 7), ("synthetic", 7, 7), ("real", 12, 0)]
)
def test_merged_filtered_or_chosen_labels_and_samples_agree_in_every_epoch(nih, insertion, reader, nodules, made):
    data = MixDataset(nih(), make_mix(n_synthetic={NODULE: 7}, insertion=insertion))
    reading = READERS[reader](data, nih())
    for epoch in (0, 4):
        data.set_epoch(epoch)
        check_true(reading, data)
    assert reading.labels[:, list(reading.pathologies).index(NODULE)].sum() == nodules
    assert (reading.csv["synthetic"] == True).sum() == made  # noqa: E712


def test_a_merged_data_set_and_a_subset_can_be_mixed(nih):
    data = MixDataset(xrv.datasets.MergeDataset([nih(), nih()]), make_mix(n_synthetic={NODULE: 5}))
    check_true(data, data)
    assert data.which_dataset.tolist() == [data[i]["source"] for i in range(len(data))]
    normal = np.flatnonzero(nih().labels.sum(axis=1) == 0)
    data = MixDataset(xrv.datasets.SubsetDataset(nih(), normal), make_mix(p=0.5))
    check_true(data, data)
    assert 0 < data.labels.sum() == data.csv.synthetic.sum() < 24


@pytest.mark.train
@INSERTIONS
def test_relabelled_before_or_after_the_mix_is_the_same(nih, insertion):
    wanted, mix = xrv.datasets.default_pathologies, make_mix(n_synthetic={NODULE: 4}, insertion=insertion)
    inner, after = nih(pathology_masks=True), MixDataset(nih(pathology_masks=True), mix)
    for data in (inner, after):
        xrv.datasets.relabel_dataset(wanted, data, silent=True)
    before = MixDataset(inner, mix)
    assert list(before.pathologies) == list(after.pathologies) == wanted
    np.testing.assert_array_equal(before.labels, after.labels)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one["img"], other["img"])
        np.testing.assert_array_equal(one["lab"], other["lab"])
        assert one["pathology_masks"].keys() == other["pathology_masks"].keys() <= {11}
    for data in (before, after, xrv.datasets.MergeDataset([after, before])):
        check_true(data, after if data is after else before)
    xrv.datasets.relabel_dataset(["Mass", "Effusion"], after, silent=True)
    assert all(sample["pathology_masks"] == {} and sample["lab"].tolist() == [0, 0] for sample in after)


# --- Masks and transforms ---
def lies_in(difference, mask) -> bool:
    """Whether there is a difference, and none a pixel or more beyond the mask (boxes of 2 pixels have a seam)."""
    wider = torch.nn.functional.max_pool2d(torch.as_tensor(mask)[None].float(), 3, 1, 1)[0]
    changed = torch.as_tensor(difference) != 0
    return bool(changed.any()) and not bool((changed & (wider == 0)).any())


def test_masks_lie_where_the_nodules_are_and_real_ones_stay_with_their_image(nih):
    inner, everything = nih(pathology_masks=True), {"p": 1.0, "eligible": lambda row: True}
    data = MixDataset(inner, make_mix(**everything))  # also images with a nodule, and a mask
    column, stayed = data.pathologies.index(NODULE), 0
    for sample, real in zip(data, inner, strict=True):
        mask = sample["pathology_masks"][column]
        old = real["pathology_masks"].get(column, np.zeros_like(mask))
        assert sample["pathology_masks"].keys() == {column} and mask.shape == (1, 64, 64)
        assert set(np.unique(mask)) == {0, 1} and (mask >= old).all() and mask.dtype == old.dtype
        assert lies_in(sample["img"] - real["img"], mask)
        stayed += bool(old.any())
    assert stayed == 6
    data = MixDataset(inner, make_mix(**everything, insertion="whole"))
    for i in range(6):
        boxes = data.decision(i).boxes_at(64, 64).round().int().tolist()
        mask = data[i]["pathology_masks"][column]
        assert any(mask[0, (y1 + y2) // 2, (x1 + x2) // 2] == 1 for x1, y1, x2, y2 in boxes)
        assert 0 < mask.sum() <= sum((x2 - x1 + 2) * (y2 - y1 + 2) for x1, y1, x2, y2 in boxes)


def test_transforms_and_augmentation_of_the_data_set_come_before_the_mix(nih):
    flip = [xrv.datasets.ToPILImage(), transforms.RandomHorizontalFlip(1.0), transforms.ToTensor()]
    resize = transforms.Compose([xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(48)])
    inner = nih(transform=resize, data_aug=transforms.Compose(flip), pathology_masks=True)
    sample = MixDataset(inner, make_mix(p=1.0, seed=3))[1]
    mask = sample["pathology_masks"][list(inner.pathologies).index(NODULE)]
    for part in (sample["img"], mask):
        assert isinstance(part, torch.Tensor) and part.shape == (1, 48, 48) and part.dtype == sample["img"].dtype
    assert lies_in(sample["img"] - inner[1]["img"], mask)


# --- Workers, guard, switch ---
@pytest.mark.train
def test_workers_and_pickled_copies_give_the_same_samples_and_see_epochs(nih):
    data = MixDataset(nih(), make_mix(p=0.6))
    options = {"persistent_workers": True, "multiprocessing_context": "fork", "num_workers": 2}
    loader = DataLoader(data, batch_size=8, generator=torch.Generator(), **options)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        batches = list(loader)
        images = torch.cat([batch["img"] for batch in batches]).numpy()
        data.set_epoch(epoch)  # or these were of the next one
        np.testing.assert_array_equal(images, np.stack([sample["img"] for sample in data]))
        np.testing.assert_array_equal(torch.cat([batch["lab"] for batch in batches]).numpy(), data.labels)
        assert torch.cat([batch["idx"] for batch in batches]).tolist() == list(range(36))
    again = pickle.loads(pickle.dumps(data))
    assert all(np.array_equal(a["img"], b["img"]) for a, b in zip(data, again, strict=True))
    assert again.csv.equals(data.csv)


def test_nothing_random_is_moved_but_by_torchxrayvisions_own_reading(nih):
    inner = nih()
    with tiny.global_states_untouched():
        data = MixDataset(inner, make_mix(p=0.6))
        assert any(data.decision(i).synthetic for i in range(8))
    after = []
    for read in (inner, data):
        np.random.seed(3)  # torchxrayvision draws a seed for its transforms from numpy, even where it has none
        _ = [read[i] for i in range(8)]
        after.append(np.random.get_state()[1:3])
    assert all(np.array_equal(a, b) for a, b in zip(*after, strict=True))


def test_the_guard_sees_it_in_whatever_holds_it_unless_it_was_made_of_a_mix_that_is_off(nih):
    mix = make_mix(p=0.6)
    data = MixDataset(nih(), mix)
    merged, filtered = xrv.datasets.MergeDataset([nih(), data]), xrv.datasets.FilterDataset(data, labels=[NODULE])
    for holder in (data, merged, filtered, DataLoader(xrv.datasets.SubsetDataset(data, [0, 1]))):
        with pytest.raises(SyntheticDataError, match="got synthetic nodules at"):
            assert_real_only(holder)
    assert_real_only(nih())
    mix.enabled = False
    with pytest.raises(RuntimeError, match="mix.enabled must be True, .* got False"):
        data[0]  # its labels would be false
    off = MixDataset(nih(), mix)
    assert_real_only(off)
    assert len(off) == 36 and not off.csv.synthetic.any() and np.array_equal(off.labels, off.dataset.labels)
    np.testing.assert_array_equal(off[5]["img"], off.dataset[5]["img"])


# --- Gates ---
@INSERTIONS
@pytest.mark.parametrize("never", [False, True])
def test_a_gate_redraws_and_never_makes_a_label_false(nih, insertion, never):
    asked = []

    def every_second(candidates):
        asked.append(candidates)
        return torch.tensor([not never and len(asked) % 2 == 0] * len(candidates.images))

    mix = make_mix(p=1.0, insertion=insertion, gate=Gate(every_second, tries=3))
    data = MixDataset(nih(), mix)
    for i in np.flatnonzero(data.csv.synthetic)[:4].tolist():
        sample = data[i]
        assert not np.array_equal(sample["img"], data.dataset[i]["img"])
        assert sample["lab"][data.pathologies.index(NODULE)] == 1
    report = mix.gate_report()
    assert (report["exhausted"], report["accepted"]) == ((4, 0) if never else (0, 4))


@pytest.fixture(scope="module")
def densenet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return xrv.models.DenseNet(**SMALL).eval()


@torch.no_grad()
def test_a_classifier_has_the_networks_own_logits_calibrated_where_it_is(densenet):
    classifier = GateClassifier(densenet)
    images = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(classifier(images), densenet(images * 1024))
    assert classifier(images[..., :150]).shape == (2, 18)  # any size
    assert classifier.target() == 11 and classifier.target("Lung Lesion") == 14
    thresholds = torch.full((18,), 0.3)
    thresholds[14] = torch.nan
    model = xrv.models.DenseNet(op_threshs=thresholds, apply_sigmoid=True, **SMALL).eval()
    model.load_state_dict({**densenet.state_dict(), "op_threshs": thresholds})
    classifier = GateClassifier(model)
    torch.testing.assert_close(classifier(images).sigmoid(), model(images * 1024), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"finding must be one of .*'Nodule'.*, got 'Lung Lesion'"):
        classifier.target("Lung Lesion")
    model.targets = ["", *model.targets[1:]]
    assert classifier.findings[0] == "" and classifier.target() == 11


@pytest.mark.parametrize("make", [probability_gate, cam_gate])
def test_a_torchxrayvision_network_is_a_gate(nih, densenet, make):
    classifier = GateClassifier(densenet)
    mix = make_mix(p=1.0, gate=make(classifier, classifier.target(), low=0.0))
    assert MixDataset(nih(), mix)[1]["lab"].any()
    assert mix.gate_report()["candidates"] == mix.gate_report()["accepted"] == 1
    assert not any(module.training for module in densenet.modules())


# --- What it refuses ---
def test_what_cannot_be_mixed_or_judge_is_named(nih, densenet):
    corner = torch.zeros(1, 1, 64, 64)
    corner[..., :2, :2] = 1
    for error, words, make in (
        (TypeError, "mix must be a SyntheticNoduleMix, got float", lambda: MixDataset(nih(), 0.5)),
        (TypeError, "dataset must have .labels and .* got Images", lambda: MixDataset(tiny.Images(), make_mix())),
        (TypeError, "must be a torchxrayvision.models.DenseNet, got L", lambda: GateClassifier(torch.nn.Linear(2, 2))),
        (ValueError, r"got .*\(1, 3, 64, 64\)", lambda: GateClassifier(densenet)(torch.zeros(1, 3, 64, 64))),
        (
            ValueError,
            "placement must leave room for a nodule .* got none in the background 1",
            lambda: MixDataset(nih(), make_mix(p=1.0, placement=lambda image: corner))[1],
        ),
    ):
        with pytest.raises(error, match=words):
            make()
    data = nih()
    xrv.datasets.relabel_dataset(["Lung Lesion", "Mass", "Effusion"], data, silent=True)
    data.labels[:, 0] = 0
    with pytest.raises(LabelError, match="nodule must be one of the classes"):
        MixDataset(data, make_mix())
    mixed = MixDataset(data, make_mix(p=1.0, labels=LabelPolicy(nodule="Lung Lesion")))
    assert mixed.labels[:, 0].all() and mixed.csv.synthetic.all()


@pytest.mark.train
@pytest.mark.parametrize(("name", "extra"), [("torchxrayvision", "xrv"), ("albumentations", "albumentations")])
def test_the_base_package_imports_neither_library_and_the_extra_is_named(name, extra):
    lines = f"import sys, carim_aug; assert '{name}' not in sys.modules\nsys.modules['{name}'] = None\n"
    command = [sys.executable, "-c", f"{lines}import carim_aug.integrations.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and f"pip install carim-aug[{extra}]" in done.stderr
