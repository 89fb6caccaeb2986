import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carim_aug.labels.names import CHESTXRAY14, TORCHXRAYVISION18
from carim_aug.labels.policy import LabelError, LabelPolicy

NAN = float("nan")
NODULE14 = CHESTXRAY14.index("Nodule")
entries = st.sampled_from([0.0, 1.0, 0.0, 0.3, 0.8, NAN])


def as_type(values, kind):
    return {
        "torch": lambda: torch.tensor(values, dtype=torch.float32),
        "half": lambda: torch.tensor(values, dtype=torch.bfloat16),
        "numpy": lambda: np.array(values, dtype=np.float32),
        "double": lambda: np.array(values, dtype=np.float64),
    }[kind]()


def same(a, b) -> bool:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    return a == b


def rows(columns: int):
    return st.lists(st.lists(entries, min_size=columns, max_size=columns), min_size=1, max_size=5)


kinds = st.sampled_from(["torch", "half", "numpy", "double"])


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([1, 14, 18]).flatmap(rows), kinds)
def test_multilabel_rows_gain_a_nodule_and_nothing_else(values, kind):
    batch = as_type(values, kind)
    before = batch.clone() if isinstance(batch, torch.Tensor) else batch.copy()
    policy = LabelPolicy().resolve(batch, batch=True)
    policy.check(batch)
    nodule = policy.classes.index("Nodule")
    made = policy.add_nodule(batch)
    assert same(batch, before) and made is not batch
    assert policy.classes_of(made) == ["Nodule"] * len(values)
    assert same(policy.add_nodule(batch[0]), made[0])
    expected = [[1.0 if c == nodule else v for c, v in enumerate(row)] for row in values]
    assert same(made, as_type(expected, kind))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([1, 14, 18]).flatmap(rows), kinds, st.sampled_from(["Nodule", "No Finding"]))
def test_synthetic_multilabel_rows_keep_only_what_the_dataset_does_not_annotate(values, kind, name):
    batch = as_type(values, kind)
    before = batch.clone() if isinstance(batch, torch.Tensor) else batch.copy()
    policy = LabelPolicy().resolve(batch, batch=True)
    nodule = policy.classes.index("Nodule")
    expected = [
        [float(name == "Nodule") if c == nodule else NAN if v != v else 0.0 for c, v in enumerate(row)]
        for row in values
    ]
    made = policy.synthetic(batch, name)
    assert same(made, as_type(expected, kind)) and same(batch, before)
    assert policy.classes_of(made) == [name] * len(values)
    assert same(policy.synthetic(batch[0], name), made[0])


def class_by_hand(row, nodule):
    if row[nodule] >= 0.5:
        return "Nodule"
    if row[nodule] != row[nodule]:
        return "unknown"
    return "other" if any(v >= 0.5 for v in row) else "No Finding"


@settings(deadline=None, max_examples=150)
@given(rows(14), kinds)
def test_classes_of_a_batch_are_those_of_its_rows(values, kind):
    batch = as_type(values, kind)
    policy = LabelPolicy().resolve(batch, batch=True)
    expected = [class_by_hand(row, NODULE14) for row in values]
    assert policy.classes_of(batch) == expected == [policy.class_of(row) for row in batch]
    counts = policy.counts(list(batch))
    assert counts == policy.counts(batch)
    assert sum(counts.values()) == len(values) and counts["Nodule"] == expected.count("Nodule")


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.sampled_from([torch.int64, torch.int32, torch.uint8, np.int64, np.int16, int]),
)
def test_integer_labels_keep_their_type(values, dtype):
    policy = LabelPolicy(classes=("Mass", "No Finding", "Nodule", "Hernia"))
    names = [policy.classes[v] for v in values]
    if dtype is int:
        settled = policy.resolve(values[0], batch=False)
        assert settled.kind == "integer"
        assert [settled.class_of(v) for v in values] == names
        assert type(settled.add_nodule(values[0])) is int and settled.add_nodule(values[0]) == 2
        assert settled.counts(values) == {name: names.count(name) for name in policy.classes}
        return
    batch = torch.tensor(values, dtype=dtype) if isinstance(dtype, torch.dtype) else np.array(values, dtype=dtype)
    settled = policy.resolve(batch, batch=True)
    settled.check(batch)
    assert settled.kind == "integer" and settled.classes_of(batch) == names
    for item in (batch, batch[0]):
        made = settled.synthetic(item, "No Finding")
        assert type(made) is type(item) and made.dtype == item.dtype and (made == 1).all()
        made = settled.add_nodule(item)
        assert type(made) is type(item) and made.dtype == item.dtype and (made == 2).all()
    assert batch.tolist() == values


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=6), kinds)
def test_soft_rows_of_two_become_hard(shares, kind):
    batch = as_type([[1 - s, s] for s in shares], kind)
    policy = LabelPolicy().resolve(batch, batch=True)
    assert (policy.kind, policy.classes) == ("onehot", ("No Finding", "Nodule"))
    policy.check(batch)
    assert same(policy.add_nodule(batch), as_type([[0.0, 1.0]] * len(shares), kind))
    assert same(policy.synthetic(batch[0], "No Finding"), as_type([1.0, 0.0], kind))
    expected = ["Nodule" if row[1] > row[0] else "No Finding" for row in batch.tolist()]
    assert policy.classes_of(batch) == expected


@settings(deadline=None, max_examples=100)
@given(rows(14), st.integers(0, 13), st.sampled_from([-1.0, 1.5, 2.0, -0.01, float("inf"), -float("inf")]), kinds)
def test_values_outside_zero_to_one_are_refused(values, column, wrong, kind):
    values[-1][column] = wrong
    batch = as_type(values, kind)
    with pytest.raises(LabelError, match="labels must be from 0 to 1, or NaN for unknown"):
        LabelPolicy().check(batch)


@pytest.mark.parametrize(
    ("label", "batch", "kind", "classes"),
    [
        (1, None, "integer", 2),
        (True, None, "integer", 2),
        (np.int64(0), False, "integer", 2),
        (torch.tensor(1), False, "integer", 2),
        (torch.tensor([0, 1, 1]), True, "integer", 2),
        (torch.tensor([0, 1, 1]), None, "integer", 2),
        (torch.tensor([0.0, 1.0]), False, "onehot", 2),
        (torch.tensor([[0, 1], [1, 0]]), True, "onehot", 2),
        (torch.zeros(14), False, "multilabel", 14),
        (torch.zeros(14, dtype=torch.int64), False, "multilabel", 14),
        (np.zeros((3, 18), dtype=np.float32), True, "multilabel", 18),
        (torch.zeros(5, 1), True, "multilabel", 1),
        (torch.zeros(5), True, "multilabel", 1),
        (0.0, False, "multilabel", 1),
    ],
)
def test_kind_and_classes_come_from_an_example(label, batch, kind, classes):
    policy = LabelPolicy().resolve(label, batch=batch)
    assert (policy.kind, len(policy.classes)) == (kind, classes)
    assert policy.resolve(label) is policy
    if batch is not None:
        policy.check(label, batch=batch)


def test_default_columns_are_the_fields_own():
    assert LabelPolicy().resolve(torch.zeros(14), batch=False).classes[5] == "Nodule"
    assert LabelPolicy().resolve(torch.zeros(18), batch=False).classes == TORCHXRAYVISION18
    assert TORCHXRAYVISION18[11] == "Nodule" and TORCHXRAYVISION18[14] == "Lung Lesion"
    assert len(CHESTXRAY14) == 14 and len(TORCHXRAYVISION18) == 18


def test_class_of_multilabel_rows_by_hand():
    policy = LabelPolicy(kind="multilabel", classes=("Mass", "Nodule"))
    rows = {(0, 1): "Nodule", (1, 1): "Nodule", (NAN, 1): "Nodule", (0, 0): "No Finding", (NAN, 0): "No Finding"}
    rows |= {(1, 0): "other", (0, NAN): "unknown", (1, NAN): "unknown", (NAN, NAN): "unknown"}
    assert [policy.class_of(torch.tensor(row, dtype=torch.float32)) for row in rows] == list(rows.values())


def test_a_no_finding_column_is_believed():
    policy = LabelPolicy(kind="multilabel", classes=("No Finding", "Mass", "Nodule"))
    rows = {(1, 0, 0): "No Finding", (1, NAN, NAN): "No Finding", (0, 0, 0): "other", (NAN, 0, 0): "No Finding"}
    assert [policy.class_of(np.array(row, dtype=np.float32)) for row in rows] == list(rows.values())
    assert policy.add_nodule(torch.tensor([1.0, NAN, 0.0])).nan_to_num(7).tolist() == [0, 7, 1]
    assert policy.synthetic(torch.tensor([NAN, 1.0, NAN]), "No Finding").tolist() == [1, 0, 0]
    assert policy.synthetic(torch.tensor([1.0, 1.0, 0.0]), "Nodule").tolist() == [0, 0, 1]


def test_single_column_labels_may_be_bare_floats():
    batch = torch.tensor([0.0, 1.0, NAN])
    policy = LabelPolicy().resolve(batch, batch=True)
    policy.check(batch)
    assert policy.classes_of(batch) == ["No Finding", "Nodule", "unknown"]
    assert policy.add_nodule(batch).tolist() == [1, 1, 1] and policy.synthetic(batch, "normal").tolist() == [0, 0, 0]
    assert policy.add_nodule(0.0) == 1.0 and type(policy.add_nodule(0.0)) is float


def test_booleans_stay_booleans():
    assert LabelPolicy().add_nodule(False) is True
    row = torch.zeros(14, dtype=torch.bool)
    made = LabelPolicy().resolve(row, batch=False).add_nodule(row)
    assert made.dtype == torch.bool and made.nonzero().tolist() == [[NODULE14]]


def test_integer_rows_of_findings_are_multilabel():
    batch = torch.zeros(2, 14, dtype=torch.int64)
    assert LabelPolicy().add_nodule(batch).sum(1).tolist() == [1, 1]
    assert LabelPolicy().synthetic(batch + 1, "No Finding").sum() == 0


def test_onehot_of_more_classes_is_asked_for_by_kind():
    policy = LabelPolicy(kind="onehot", classes=("normal", "nodule", "mass"))
    label = torch.tensor([0.2, 0.1, 0.7])
    policy.check(label, batch=False)
    assert policy.class_of(label) == "mass" and policy.add_nodule(label).tolist() == [0, 1, 0]


def test_two_columns_without_a_normal_class_are_not_onehot():
    policy = LabelPolicy(classes=("Nodule", "Mass")).resolve(torch.tensor([[1.0, 0.0]]), batch=True)
    assert policy.kind == "multilabel"
    assert policy.class_of(torch.tensor([0.0, 1.0])) == "other"


def test_names_are_found_however_they_are_spelled():
    policy = LabelPolicy(classes=("nodule", "normal"))
    assert (policy.nodule, policy.normal) == ("nodule", "normal")
    assert policy.add_nodule(1) == 0 and policy.class_of(1) == "normal"
    assert [policy.name_of(n) for n in ("Nodule", "No Finding", "no_finding", "healthy")] == ["nodule"] + ["normal"] * 3
    assert policy.synthetic(0, "No Finding") == 1


def test_class_names_come_from_the_dataset():
    folders = SimpleNamespace(dataset=SimpleNamespace(classes=["nodule", "normal"]))
    assert LabelPolicy().named_by(folders).resolve(0).add_nodule(1) == 0
    sorted14 = SimpleNamespace(pathologies=sorted(CHESTXRAY14))
    policy = LabelPolicy().named_by(sorted14).resolve(np.zeros(14, dtype=np.float32), batch=False)
    assert policy.add_nodule(np.zeros(14, dtype=np.float32)).argmax() == 10
    assert LabelPolicy().named_by(SimpleNamespace()) == LabelPolicy()
    given_names = LabelPolicy(classes=("Nodule", "No Finding"))
    assert given_names.named_by(sorted14) is given_names
    with pytest.raises(LabelError, match="nodule must be one of the classes"):
        LabelPolicy().named_by(SimpleNamespace(classes=["cat", "dog"]))


def test_can_make_only_nodules_and_normals():
    policy = LabelPolicy(classes=("No Finding", "Nodule", "Mass"), kind="integer")
    assert policy.can_make("Nodule") and policy.can_make("no finding") and not policy.can_make("Mass")
    assert not LabelPolicy(classes=("Mass", "Nodule"), kind="integer").can_make("No Finding")
    multi = LabelPolicy().resolve(torch.zeros(14), batch=False)
    assert multi.can_make("No Finding") and not multi.can_make("Mass") and not multi.can_make("other")
    with pytest.raises(LabelError, match=r"class must be one of \[.*'Mass'.*\], got 'Flu'"):
        policy.can_make("Flu")
    with pytest.raises(LabelError, match="class must be one that can be made"):
        policy.synthetic(0, "Mass")
    with pytest.raises(LabelError, match="class must be one of"):
        policy.synthetic(0, 3)


def test_counts_name_classes_that_are_empty():
    assert LabelPolicy().counts([0, 0, 0]) == {"No Finding": 3, "Nodule": 0}
    assert LabelPolicy().counts(iter([])) == {"No Finding": 0, "Nodule": 0}
    rows = [np.eye(14)[5], np.eye(14)[0], np.zeros(14), np.full(14, NAN)]
    assert LabelPolicy().counts(rows) == {"No Finding": 1, "Nodule": 1, "other": 1, "unknown": 1}


@pytest.mark.parametrize(
    ("policy", "labels", "message"),
    [
        (LabelPolicy(), torch.tensor([0, 2]), "labels must be from 0 to 1 for the classes .* got 2"),
        (LabelPolicy(), torch.tensor([0, -1]), "labels must be from 0 to 1 for the classes .* got -1"),
        (LabelPolicy(kind="integer"), torch.tensor([0.0, 1.0]), "labels must be integers"),
        (LabelPolicy(kind="integer"), torch.tensor([[0], [1]]), r"labels must be \(B,\)"),
        (LabelPolicy(), torch.zeros(2, 3, 14), r"labels must be \(B,\) or \(B, C\), got \(2, 3, 14\)"),
        (LabelPolicy(), torch.zeros(2, 7), "columns whose names are known"),
        (LabelPolicy(), torch.zeros(2, 2), "columns whose names are known"),
        (LabelPolicy(kind="onehot"), torch.tensor([0, 1]), "columns whose names are known"),
        (LabelPolicy(kind="onehot"), torch.tensor([[0.0, 0.4]]), "rows that sum to 1"),
        (LabelPolicy(kind="onehot"), torch.tensor([[NAN, 1.0]]), "labels must be from 0 to 1"),
        (LabelPolicy(kind="multilabel", classes=("Nodule", "Mass")), torch.zeros(2, 3), r"labels must be \(B, 2\)"),
        (LabelPolicy(), torch.full((2, 14), -1.0), "uncertain findings are NaN here"),
        (LabelPolicy(), torch.zeros(0, dtype=torch.int64), "at least one item"),
        (LabelPolicy(), torch.tensor(1), "must be a batch"),
        (LabelPolicy(), ["a", "b"], "numbers, arrays or tensors"),
        (LabelPolicy(), "Nodule", "numbers, arrays or tensors"),
        (LabelPolicy(), torch.zeros(2, dtype=torch.complex64), "integers or floating point"),
    ],
)
def test_labels_that_do_not_fit_are_named(policy, labels, message):
    with pytest.raises(LabelError, match=message):
        policy.check(labels)


def test_classes_of_labels_that_do_not_fit_are_errors():
    with pytest.raises(LabelError, match="from 0 to 1"):
        LabelPolicy().class_of(5)
    with pytest.raises(LabelError, match="labels must have 14 columns"):
        LabelPolicy(kind="multilabel", classes=CHESTXRAY14).classes_of(torch.zeros(2, 18))
    with pytest.raises(LabelError, match="labels must have 14 columns"):
        LabelPolicy(kind="multilabel", classes=CHESTXRAY14).add_nodule(torch.zeros(18))
    with pytest.raises(LabelError, match="labels must have 2 columns"):
        LabelPolicy(kind="onehot", classes=("No Finding", "Nodule")).add_nodule(1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "soft"},
        {"classes": ("No Finding", "Mass")},
        {"classes": "Nodule"},
        {"classes": ("Nodule", "nodule")},
        {"classes": ("Nodule", 1)},
        {"classes": 2},
        {"nodule": 1},
        {"classes": ("Nodule", "Mass"), "normal": "Nodule"},
    ],
)
def test_policies_that_make_no_sense_are_named(arguments):
    with pytest.raises(LabelError, match="must be"):
        LabelPolicy(**arguments)


def test_policies_are_values():
    policy = LabelPolicy().resolve(0)
    policy.add_nodule(0)
    assert pickle.loads(pickle.dumps(policy)) == policy == LabelPolicy(kind="integer", classes=["No Finding", "Nodule"])


@pytest.mark.gpu
def test_cuda_labels_stay_on_cuda():
    batch = torch.full((4, 14), NAN, device="cuda")
    policy = LabelPolicy().resolve(batch, batch=True)
    policy.check(batch)
    assert policy.add_nodule(batch).is_cuda and policy.synthetic(batch, "Nodule").is_cuda
    assert policy.classes_of(batch) == ["unknown"] * 4


def test_pathologies_name_columns_and_never_integers():
    class Data:
        pathologies = CHESTXRAY14

    assert LabelPolicy().named_by(Data(), 1).classes is None
    assert LabelPolicy().named_by(Data(), torch.zeros(14)).classes == CHESTXRAY14
    assert LabelPolicy().named_by(Data(), torch.zeros(2)).classes is None
    Data.classes = ("No Finding", "Nodule")
    assert LabelPolicy().named_by(Data(), 1).classes == ("No Finding", "Nodule")
