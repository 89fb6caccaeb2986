"""torchxrayvision's data sets with synthetic samples, and whether their tables stay true; its networks as gates."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import Films, global_states_untouched, make_mix
from torch.utils.data import DataLoader
from torchvision import transforms

from carim_aug import Gate, LabelError, LabelPolicy, SyntheticDataError, assert_real_only, cam_gate, probability_gate

xrv = pytest.importorskip("torchxrayvision")

from carim_aug.integrations.torchxrayvision import GateClassifier, MixDataset  # noqa: E402

NODULE = "Nodule"
INSERTIONS = pytest.mark.parametrize("insertion", ["graft", "whole"])


@pytest.fixture
def nih(phantom_data):
    """Makes NIH_Dataset over the drawn chests: 36 films, every third with a nodule, half of those boxed."""

    def make(**options):
        return xrv.datasets.NIH_Dataset(
            str(phantom_data / "images"),
            csvpath=str(phantom_data / "Data_Entry_2017_v2020.csv"),
            bbox_list_path=str(phantom_data / "BBox_List_2017.csv"),
            **options,
        )

    return make


def as_array(image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def check_true(data, mixed: MixDataset) -> None:
    """Every sample of `data`, which reads `mixed` somehow, is what labels, csv and sample itself say it is."""
    assert len(data) == len(data.labels) == len(data.csv)
    column = list(data.pathologies).index(NODULE)
    real = {}
    for film in mixed.dataset:
        real[as_array(film["img"]).tobytes()] = film["lab"][list(mixed.dataset.pathologies).index(NODULE)]
    for i in range(len(data)):
        sample, row = data[i], data.csv.iloc[i]
        np.testing.assert_array_equal(sample["lab"], data.labels[i])
        unchanged = as_array(sample["img"]).tobytes()
        synthetic = row.get("synthetic") == True  # noqa: E712 - missing in the csv of a data set that is not mixed
        assert synthetic == (unchanged not in real)
        if synthetic:
            assert data.labels[i][column] == 1 and row["Finding Labels"] == NODULE and row["has_masks"]
            slot = mixed.slot(int(row["synthetic_index"]))
            assert slot.key[0] == row["synthetic_seed"] and slot.synthetic
        else:
            assert data.labels[i][column] == real[unchanged]


# Tables and samples


@INSERTIONS
@pytest.mark.parametrize("how", [{"p": 0.6}, {"n_synthetic": {NODULE: 9}}, {"sampling_strategy": "minority"}])
def test_tables_say_what_the_samples_are(nih, insertion, how):
    mix = make_mix(insertion=insertion, seed=4, **how)
    data = MixDataset(nih(), mix)
    check_true(data, data)
    made = int(data.csv.synthetic.sum())
    assert len(data) == 36 + (0 if "p" in how else made) and made > 5
    assert data.totals()[NODULE][1.0] == 12 + made
    assert f"num_samples={len(data)} synthetic={made}\n└ of NIH_Dataset" in repr(data)


@INSERTIONS
def test_what_is_mixed_in_the_epoch_of_making_is_what_wrap_mixes(nih, insertion):
    mix = make_mix(p=0.5, insertion=insertion, value_range="xrv", seed=2)
    mix.set_epoch(3)
    data, wrapped = MixDataset(nih(), mix), mix.wrap(nih())
    for i in range(len(data)):
        ours, theirs = data[i], wrapped[i]
        assert data.slot(i) == wrapped.slot(i)
        np.testing.assert_array_equal(ours["img"], theirs["img"])
        np.testing.assert_array_equal(ours["lab"], theirs["lab"])


def test_samples_are_as_torchxrayvision_has_them(nih):
    data = MixDataset(nih(), make_mix(p=1.0))
    for i, sample in enumerate(data):
        assert sample.keys() == {"idx", "lab", "img"} and sample["idx"] == i
        assert isinstance(sample["img"], np.ndarray) and sample["img"].shape == (1, 64, 64)
        assert sample["img"].dtype == sample["lab"].dtype == np.float32
        assert -1024 <= sample["img"].min() and sample["img"].max() <= 1024
    assert data[-1]["idx"] == 35
    with pytest.raises(IndexError, match=r"idx must be in \[0, 36\), got 36"):
        data[36]


def test_a_label_of_a_sample_is_a_copy(nih):
    data = MixDataset(nih(), make_mix(p=1.0))
    data[0]["lab"][:] = 7
    assert data.labels.max() == 1 and data.dataset.labels.max() == 1


def test_rows_that_are_not_annotated_stay_unknown(nih):
    inner = nih()
    xrv.datasets.relabel_dataset(xrv.datasets.default_pathologies, inner, silent=True)
    inner.labels[1] = np.nan
    for insertion in ("graft", "whole"):
        data = MixDataset(inner, make_mix(p=1.0, insertion=insertion))
        assert data.labels.shape == (36, 18)
        np.testing.assert_array_equal(np.isnan(data.labels), np.isnan(inner.labels))
        assert not data.csv.synthetic[1] and data.csv.synthetic[2]
        assert data.labels[2, 11] == 1 and np.nansum(data.labels[2]) == 1 and np.isnan(data[2]["lab"][14:]).all()


def test_the_row_of_a_graft_tells_of_its_hosts_film_and_that_of_a_whole_image_of_none(nih):
    inner = nih()
    inner.csv.loc[2, "Finding Labels"] = "Mass|No Finding"
    options = {"p": 1.0, "eligible": lambda row: not row[list(inner.pathologies).index(NODULE)]}
    graft = MixDataset(inner, make_mix(insertion="graft", **options)).csv.iloc[2]
    assert (graft["patientid"], graft["Image Index"], graft["sex_male"]) == ("3", "00000003_000.png", True)
    assert graft["Finding Labels"] == "Mass|Nodule" and graft["synthetic"] and graft["synthetic_index"] == 2
    whole = MixDataset(inner, make_mix(insertion="whole", seed=8, **options)).csv
    row = whole.iloc[2]
    assert (row["patientid"], row["view"], row["Finding Labels"]) == ("synthetic-8-2", "UNKNOWN", NODULE)
    assert row[["Image Index", "Patient Age", "age_years"]].isna().all() and not row["sex_male"]
    real = whole.iloc[0]
    assert (real["patientid"], real["Image Index"], real["sex_male"]) == ("1", "00000001_000.png", True)
    assert inner.csv.columns.tolist() == [c for c in whole.columns if not c.startswith("synthetic")]


def test_normal_images_are_normal_in_all_tables(nih):
    data = MixDataset(nih(pathology_masks=True), make_mix(n_synthetic={"No Finding": 3, NODULE: 2}))
    assert data.csv["Finding Labels"].tolist()[36:] == ["No Finding"] * 3 + [NODULE] * 2
    assert data.csv["has_masks"].tolist()[36:] == [False] * 3 + [True] * 2
    assert data.labels[36:].sum(axis=1).tolist() == [0, 0, 0, 1, 1]
    assert [len(data[i]["pathology_masks"]) for i in range(36, 41)] == [0, 0, 0, 1, 1]


# Epochs


@INSERTIONS
def test_each_epoch_has_other_nodules_in_the_same_samples(nih, insertion):
    mix = make_mix(p=0.6, insertion=insertion)
    data = MixDataset(nih(), mix)
    labels, csv, images = data.labels.copy(), data.csv.copy(), {}
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        check_true(data, data)
        np.testing.assert_array_equal(data.labels, labels)
        assert data.csv.equals(csv)
        stack = np.stack([sample["img"] for sample in data])
        np.testing.assert_array_equal(images.setdefault(epoch, stack), stack)
    changed = (images[0] != images[1]).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, data.csv.synthetic)
    again = MixDataset(nih(), make_mix(p=0.6, insertion=insertion))
    mix.set_epoch(5)
    assert MixDataset(nih(), mix).csv.synthetic.tolist() != again.csv.synthetic.tolist() == csv.synthetic.tolist()


def test_a_key_makes_a_whole_image_again(nih):
    mix = make_mix(p=1.0, seed=6)
    data = MixDataset(nih(transform=xrv.datasets.XRayResizer(32)), mix)
    data.set_epoch(2)
    row = data.csv[data.csv.synthetic].iloc[3]
    image, mask, _ = mix.regenerate((int(row["synthetic_seed"]), 2, int(row["synthetic_index"])))
    sample = data[int(row["synthetic_index"])]
    np.testing.assert_allclose(sample["img"], image.numpy() * 1024, atol=0.01)


# torchxrayvision's own tools, on both sides of the mix


@INSERTIONS
def test_merged_with_another_data_set_labels_and_samples_agree_in_every_epoch(nih, insertion):
    plain = nih()
    data = MixDataset(nih(), make_mix(p=0.6, insertion=insertion))
    merged = xrv.datasets.MergeDataset([plain, data])
    for epoch in (0, 4):
        data.set_epoch(epoch)
        check_true(merged, data)
    assert merged[40]["source"] == 1 and merged.labels.sum() == plain.labels.sum() + data.labels.sum()
    assert (merged.csv.synthetic == True).sum() == data.csv.synthetic.sum() > 0  # noqa: E712


def test_a_merged_data_set_can_be_mixed(nih):
    merged = xrv.datasets.MergeDataset([nih(), nih()])
    data = MixDataset(merged, make_mix(n_synthetic={NODULE: 5}, insertion="graft"))
    check_true(data, data)
    assert data.which_dataset.tolist() == [data[i]["source"] for i in range(len(data))]


def test_filtered_for_nodules_every_sample_has_one(nih):
    data = MixDataset(nih(), make_mix(n_synthetic={NODULE: 7}, insertion="graft"))
    filtered = xrv.datasets.FilterDataset(data, labels=[NODULE])
    data.set_epoch(1)
    check_true(filtered, data)
    column = data.pathologies.index(NODULE)
    assert len(filtered) == 19 and all(filtered[i]["lab"][column] == 1 for i in range(19))
    assert filtered.csv["synthetic"].sum() == 7


def test_a_subset_by_the_csv_takes_the_synthetic_or_the_real(nih):
    data = MixDataset(nih(), make_mix(p=0.6))
    flags = data.csv["synthetic"].to_numpy()
    for chosen in (flags, ~flags):
        subset = xrv.datasets.SubsetDataset(data, np.flatnonzero(chosen))
        check_true(subset, data)
        assert subset.csv["synthetic"].nunique() == 1


def test_a_filtered_and_a_subset_data_set_can_be_mixed(nih):
    normal = np.flatnonzero(nih().labels.sum(axis=1) == 0)
    data = MixDataset(xrv.datasets.SubsetDataset(nih(), normal), make_mix(p=0.5, insertion="graft"))
    check_true(data, data)
    assert 0 < data.labels.sum() == data.csv.synthetic.sum() < 24


@INSERTIONS
def test_relabelled_before_or_after_the_mix_is_the_same(nih, insertion):
    wanted = xrv.datasets.default_pathologies
    before = nih(pathology_masks=True)
    xrv.datasets.relabel_dataset(wanted, before, silent=True)
    before = MixDataset(before, make_mix(n_synthetic={NODULE: 4}, insertion=insertion))
    after = MixDataset(nih(pathology_masks=True), make_mix(n_synthetic={NODULE: 4}, insertion=insertion))
    xrv.datasets.relabel_dataset(wanted, after, silent=True)
    assert list(after.pathologies) == list(before.pathologies) == wanted
    np.testing.assert_array_equal(after.labels, before.labels)
    check_true(after, after)
    check_true(before, before)
    for one, other in zip(after, before, strict=True):
        np.testing.assert_array_equal(one["img"], other["img"])
        np.testing.assert_array_equal(one["lab"], other["lab"])
        assert one["pathology_masks"].keys() == other["pathology_masks"].keys() <= {11}
    merged = xrv.datasets.MergeDataset([after, before])
    check_true(merged, after)


def test_relabelled_to_findings_without_nodules_masks_go_too(nih):
    data = MixDataset(nih(pathology_masks=True), make_mix(p=1.0, insertion="graft"))
    xrv.datasets.relabel_dataset(["Mass", "Effusion"], data, silent=True)
    assert all(sample["pathology_masks"] == {} and sample["lab"].tolist() == [0, 0] for sample in data)


# Masks and transforms


def lies_in(difference, mask) -> bool:
    """Whether there is a difference, and none a pixel or more beyond the mask (boxes of 2 pixels have a seam)."""
    grown = torch.nn.functional.max_pool2d(torch.as_tensor(mask)[None].float(), 3, 1, 1)[0]
    changed = torch.as_tensor(difference) > 0
    return bool(changed.any()) and not bool((changed & (grown == 0)).any())


def test_masks_lie_where_the_grafts_are_and_real_ones_stay(nih):
    inner = nih(pathology_masks=True)
    options = {"p": 1.0, "insertion": "graft", "eligible": lambda row: True}  # also films with a nodule, and a mask
    data = MixDataset(inner, make_mix(**options))
    column, kept = data.pathologies.index(NODULE), 0
    for i, sample in enumerate(data):
        real, mask = inner[i], sample["pathology_masks"][column]
        assert sample["pathology_masks"].keys() == {column} and mask.shape == (1, 64, 64)
        assert set(np.unique(mask)) == {0, 1}
        old = real["pathology_masks"].get(column, np.zeros_like(mask))
        assert (mask >= old).all() and mask.any()
        assert lies_in(np.abs(sample["img"] - real["img"]), mask)
        kept += bool(old.any())
        if old.any():
            assert mask.dtype == old.dtype
    assert kept == 6


def test_a_whole_image_has_the_masks_of_its_own_nodules_only(nih):
    inner = nih(pathology_masks=True)
    data = MixDataset(inner, make_mix(p=1.0, eligible=lambda row: True))
    column = data.pathologies.index(NODULE)
    for i in range(6):
        boxes = data.slot(i).boxes_at(64, 64).round().int().tolist()
        mask = data[i]["pathology_masks"][column]
        assert any(mask[0, (y1 + y2) // 2, (x1 + x2) // 2] == 1 for x1, y1, x2, y2 in boxes)
        area = sum((x2 - x1 + 2) * (y2 - y1 + 2) for x1, y1, x2, y2 in boxes)
        assert 0 < mask.sum() <= area


def test_transforms_and_augmentation_of_the_data_set_come_before_the_mix(nih):
    augment = transforms.Compose(
        [xrv.datasets.ToPILImage(), transforms.RandomHorizontalFlip(1.0), transforms.ToTensor()]
    )
    resize = transforms.Compose([xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(48)])
    inner = nih(transform=resize, data_aug=augment, pathology_masks=True)
    data = MixDataset(inner, make_mix(p=1.0, insertion="graft", seed=3))
    column = data.pathologies.index(NODULE)
    for i in (1, 2):
        sample, real = data[i], inner[i]
        assert isinstance(sample["img"], torch.Tensor) and sample["img"].shape == (1, 48, 48)
        mask = sample["pathology_masks"][column]
        assert isinstance(mask, torch.Tensor) and mask.dtype == sample["img"].dtype and mask.shape == (1, 48, 48)
        assert lies_in((sample["img"] - real["img"]).abs(), mask)


# Workers, guard, switch


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_samples_and_see_epochs(nih, workers):
    data = MixDataset(nih(), make_mix(p=0.6, insertion="graft"))
    options = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(data, batch_size=8, num_workers=workers, generator=torch.Generator(), **options)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        batches = list(loader)
        images = torch.cat([batch["img"] for batch in batches]).numpy()
        labels = torch.cat([batch["lab"] for batch in batches]).numpy()
        np.testing.assert_array_equal(images, np.stack([sample["img"] for sample in data]))
        np.testing.assert_array_equal(labels, data.labels)
        assert torch.cat([batch["idx"] for batch in batches]).tolist() == list(range(36))


def test_a_pickled_data_set_gives_the_same_samples(nih):
    data = MixDataset(nih(), make_mix(p=0.6))
    again = pickle.loads(pickle.dumps(data))
    assert all(np.array_equal(a["img"], b["img"]) for a, b in zip(data, again, strict=True))
    assert again.csv.equals(data.csv)


def test_nothing_random_is_moved_but_by_torchxrayvisions_own_reading(nih):
    inner = nih()
    with global_states_untouched():
        data = MixDataset(inner, make_mix(p=0.6, insertion="graft"))
        slots = [data.slot(i) for i in range(8)]
    assert any(slot.synthetic for slot in slots)
    after = []
    for read in (inner, data):
        np.random.seed(3)  # torchxrayvision draws a seed for its transforms from numpy, even where it has none
        _ = [read[i] for i in range(8)]
        after.append(np.random.get_state()[1:3])
    assert all(np.array_equal(a, b) for a, b in zip(*after, strict=True))


def test_the_guard_sees_it_in_whatever_holds_it(nih):
    mix = make_mix(p=0.6)
    data = MixDataset(nih(), mix)
    for held in (
        data,
        xrv.datasets.MergeDataset([nih(), data]),
        xrv.datasets.FilterDataset(data, labels=[NODULE]),
        DataLoader(xrv.datasets.SubsetDataset(data, [0, 1])),
    ):
        with pytest.raises(SyntheticDataError, match="got synthetic nodules at"):
            assert_real_only(held)
    assert_real_only(nih())


def test_switched_off_it_is_the_real_data_set_and_never_one_with_false_labels(nih):
    mix = make_mix(n_synthetic={NODULE: 3})
    data = MixDataset(nih(), mix)
    mix.enabled = False
    with pytest.raises(RuntimeError, match="mix.enabled must be True, as when this data set's labels were made"):
        data[0]
    off = MixDataset(nih(), mix)
    assert_real_only(off)
    assert len(off) == 36 and not off.csv.synthetic.any()
    np.testing.assert_array_equal(off.labels, off.dataset.labels)
    np.testing.assert_array_equal(off[5]["img"], off.dataset[5]["img"])


# Gates


class Chosen:
    """A gate's rule that is met by no first draw, or by none at all."""

    def __init__(self, never: bool) -> None:
        self.never, self.asked = never, 0

    def __call__(self, candidates):
        self.asked += 1
        return torch.tensor([not self.never and self.asked % 2 == 0] * len(candidates.images))


@INSERTIONS
def test_a_gate_redraws_and_never_makes_a_label_false(nih, insertion):
    for never in (False, True):
        gate = Gate(Chosen(never), tries=3)
        mix = make_mix(p=1.0, insertion=insertion, gate=gate)
        data = MixDataset(nih(), mix)
        some = [int(i) for i in np.flatnonzero(data.csv.synthetic)[:4]]
        for i in some:
            assert not np.array_equal(data[i]["img"], data.dataset[i]["img"])
            assert data[i]["lab"][data.pathologies.index(NODULE)] == 1
        report = mix.gate_report()
        assert report["exhausted"] == (8 if never else 0) and report["accepted"] == (0 if never else 8)


def test_masks_of_the_users_that_leave_no_room_are_named(nih):
    def corner(image):
        mask = torch.zeros(1, 1, 64, 64)
        mask[..., :2, :2] = 1
        return mask

    data = MixDataset(nih(), make_mix(p=1.0, insertion="graft", placement=corner))
    with pytest.raises(ValueError, match="placement must leave room for a nodule in every sample, got none in the hos"):
        data[1]


@pytest.fixture(scope="module")
def densenet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = xrv.models.DenseNet(num_init_features=8, growth_rate=4, block_config=(1, 1, 1, 1))
    return model.eval()


def test_a_classifier_gives_the_networks_own_logits(densenet):
    classifier = GateClassifier(densenet)
    images = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        logits = classifier(images)
        torch.testing.assert_close(logits, densenet(images * 1024))
        assert logits.shape == (2, 18)
        assert classifier(images[..., :150]).shape == (2, 18)  # any size
    assert classifier.target() == 11 and classifier.target("Lung Lesion") == 14


def test_the_sigmoid_of_its_logits_is_what_a_calibrated_network_gives(densenet):
    thresholds = torch.full((18,), 0.3)
    thresholds[14] = torch.nan
    model = xrv.models.DenseNet(
        num_init_features=8, growth_rate=4, block_config=(1, 1, 1, 1), op_threshs=thresholds, apply_sigmoid=True
    ).eval()
    model.load_state_dict({**densenet.state_dict(), "op_threshs": thresholds})
    classifier = GateClassifier(model)
    images = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(classifier(images).sigmoid(), model(images * 1024), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"finding must be one of .*'Nodule'.*, got 'Lung Lesion'"):
        classifier.target("Lung Lesion")
    model.targets = ["", *model.targets[1:]]
    assert classifier.findings[0] == "" and classifier.target() == 11


def test_a_torchxrayvision_network_is_a_gate(nih, densenet):
    classifier = GateClassifier(densenet)
    for gate in (
        probability_gate(classifier, classifier.target(), low=0.0, high=1.0),
        cam_gate(classifier, classifier.target(), low=0.0),
    ):
        mix = make_mix(p=1.0, insertion="graft", gate=gate)
        data = MixDataset(nih(), mix)
        data[1], data[2]
        report = mix.gate_report()
        assert report["candidates"] == report["accepted"] == 2
    assert not any(module.training for module in densenet.modules())


def test_a_classifier_refuses_other_networks_and_images(densenet):
    with pytest.raises(TypeError, match="model must be a torchxrayvision.models.DenseNet, got Linear"):
        GateClassifier(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"images must be float \(n, 1, H, W\) in \[-1, 1\], got .*\(1, 3, 64, 64\)"):
        GateClassifier(densenet)(torch.zeros(1, 3, 64, 64))


# What it refuses


def test_what_is_no_data_set_or_mix_is_named(nih):
    with pytest.raises(TypeError, match="mix must be a SyntheticNoduleMix, got float"):
        MixDataset(nih(), 0.5)
    with pytest.raises(TypeError, match="dataset must have .labels and .pathologies, got Films"):
        MixDataset(Films(), make_mix())


def test_a_data_set_without_nodules_is_named_unless_another_finding_is_meant(nih):
    data = nih()
    xrv.datasets.relabel_dataset(["Lung Lesion", "Mass", "Effusion"], data, silent=True)
    data.labels[:, 0] = 0
    with pytest.raises(LabelError, match="nodule must be one of the classes"):
        MixDataset(data, make_mix())
    mixed = MixDataset(data, make_mix(p=1.0, labels=LabelPolicy(nodule="Lung Lesion")))
    assert mixed.labels[:, 0].all() and mixed.csv.synthetic.all()


def test_importing_carim_aug_does_not_import_torchxrayvision_and_without_it_one_is_told_what_to_install():
    code = (
        "import sys, carim_aug\n"
        "assert 'torchxrayvision' not in sys.modules\n"
        "sys.modules['torchxrayvision'] = None\n"
        "try:\n    import carim_aug.integrations.torchxrayvision\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "this module needs torchxrayvision: pip install carim-aug[xrv]"
