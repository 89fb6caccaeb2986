"""Labels that are numbers: how each kind is read, and what a nodule does to it."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carim_aug import LabelError, LabelPolicy
from carim_aug.labels.base import KINDS, Change
from carim_aug.labels.policy import FORMATS
from carim_aug.ops.findings import FINDINGS, TORCHXRAYVISION18

NAN = float("nan")
TWO = ("No Finding", "Nodule")
MULTI14, ONEHOT, INTEGER = LabelPolicy("multilabel", FINDINGS), LabelPolicy("onehot", TWO), LabelPolicy("integer")
types = st.sampled_from(["float32", "float64", "torch.float32", "torch.bfloat16"])
entries = st.sampled_from([0.0, 1.0, 0.0, 0.3, 0.8, NAN])


def rows(columns: int):
    return st.lists(st.lists(entries, min_size=columns, max_size=columns), min_size=1, max_size=5)


def as_type(values, name):
    dtype = name.removeprefix("torch.")
    return np.array(values, dtype=dtype) if dtype == name else torch.tensor(values, dtype=getattr(torch, dtype))


def same(a, b) -> bool:
    assert type(a) is type(b) and a.dtype == b.dtype
    return torch.as_tensor(a).float().nan_to_num(7).equal(torch.as_tensor(b).float().nan_to_num(7))


@given(st.sampled_from([1, 14, 18]).flatmap(rows), types, st.sampled_from(TWO))
def test_a_multilabel_row_gains_a_nodule_or_becomes_that_of_a_generated_image(values, name, made):
    batch, before = as_type(values, name), as_type(values, name)
    names = {14: FINDINGS, 18: TORCHXRAYVISION18}.get(len(values[0]))
    policy = LabelPolicy(classes=names).resolve(batch, batch=True)
    policy.check(batch)
    grafted, whole = np.array(values), np.array(values)
    grafted[:, policy.classes.index("Nodule")] = 1
    whole[whole == whole] = 0  # the generator makes no other findings; what is not annotated stays NaN
    whole[:, policy.classes.index("Nodule")] = made == "Nodule"
    with_nodule, generated = policy.add_nodule(batch), policy.synthetic(batch, made)
    assert same(with_nodule, as_type(grafted, name)) and same(generated, as_type(whole, name)) and same(batch, before)
    assert same(policy.add_nodule(batch[0]), with_nodule[0]) and same(policy.synthetic(batch[0], made), generated[0])
    assert policy.classes_of(with_nodule) == ["Nodule"] * len(values)
    assert policy.classes_of(generated) == [made] * len(values)


@given(st.lists(st.integers(0, 3), min_size=1), st.sampled_from(["torch.int64", "torch.uint8", "int64", "int16"]))
def test_integer_labels_keep_their_type(values, name):
    policy = LabelPolicy(classes=("Mass", "No Finding", "Nodule", "Hernia"))
    batch = as_type(values, name)
    policy.check(batch)
    names = [policy.classes[v] for v in values]
    assert policy.classes_of(batch) == [policy.class_of(v) for v in values] == names
    for item in (batch, batch[0]):
        for made, number in ((policy.synthetic(item, "No Finding"), 1), (policy.add_nodule(item), 2)):
            assert type(made) is type(item) and made.dtype == item.dtype and (made == number).all()
    assert batch.tolist() == values and policy.add_nodule(values[0]) == 2 and type(policy.add_nodule(values[0])) is int


@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=6), types)
def test_soft_rows_of_two_become_hard(shares, name):
    batch = as_type([[1 - s, s] for s in shares], name)
    policy = LabelPolicy(classes=TWO).resolve(batch, batch=True)
    policy.check(batch)
    assert (policy.kind, policy.classes) == ("onehot", TWO)
    assert same(policy.add_nodule(batch), as_type([[0.0, 1.0]] * len(shares), name))
    assert same(policy.synthetic(batch[0], "No Finding"), as_type([1.0, 0.0], name))
    assert policy.classes_of(batch) == ["Nodule" if row[1] > row[0] else "No Finding" for row in batch.tolist()]


BOXED = {"boxes": torch.tensor([[8.0, 8.0, 20.0, 22.0]]), "labels": torch.tensor([1])}
EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
BATCHES = {
    "integer": torch.tensor([0, 1, 0, 0]),
    "onehot": np.eye(2)[[0, 1, 0, 0]],
    "multilabel": torch.tensor([[0, 1.0] + [0] * 11 + [NAN]]).repeat(4, 1),
    "detection": [EMPTY, BOXED, BOXED, EMPTY],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_changes_as_its_labels_do_one_by_one(kind):
    labels, before = BATCHES[kind], pickle.dumps(BATCHES[kind])
    policy = LabelPolicy(kind, FINDINGS if kind == "multilabel" else None).resolve(labels, batch=True)
    assert isinstance(policy.format, FORMATS[kind]) and policy.format.nodule_number == policy.classes.index("Nodule")
    box = torch.tensor([[4.0, 6.0, 12.0, 20.0]])
    cases = [(0, "Nodule", box, False), (1, "No Finding", box[:0], True), (3, "Nodule", box, True)]
    changes = [Change(row, name, boxes, (32, 40), whole) for row, name, boxes, whole in cases]
    changed = policy.change(labels, changes)
    assert type(changed) is type(labels) and pickle.dumps(labels) == before and policy.change(labels, []) is labels
    assert [policy.classes_of(changed)[change.row] for change in changes] == [change.class_name for change in changes]
    ones = {change.row: policy.format.change_one(labels[change.row], change) for change in changes} | {2: labels[2]}
    for row, one in ones.items():
        pairs = [(one[n], changed[row][n]) for n in EMPTY] if kind == "detection" else [(one, changed[row])]
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize(
    ("columns", "dtype", "kind", "classes"),
    [
        ((), "int64", "integer", TWO),
        ((1,), "float32", "multilabel", ("Nodule",)),
        ((), "float32", "multilabel", ("Nodule",)),
    ],
)
def test_kind_and_classes_come_from_an_example(lead, columns, dtype, kind, classes):
    array = (np.ones((*lead, *columns)) / (columns or (1,))[0]).astype(dtype)
    for label in (array, torch.tensor(array), *([] if array.ndim else [array.item()])):
        policy = LabelPolicy().resolve(label, batch=bool(lead))
        assert (policy.kind, policy.classes) == (kind, classes) and policy.resolve(label) is policy
        policy.check(label, batch=bool(lead))
        if array.ndim != 1 or bool(lead) == (dtype == "int64"):  # one axis of integers is a batch, of floats a row
            assert LabelPolicy().resolve(label) == policy


@pytest.mark.parametrize("columns", [2, 3, 5, 7, 14, 15, 18])
def test_columns_without_names_are_refused_with_the_line_to_write(columns):
    label = torch.zeros(4, columns)
    label[:, 0] = 1
    with pytest.raises(
        LabelError, match=r"columns whose names are known.*pass labels=LabelPolicy\('multilabel', classes"
    ):
        LabelPolicy().resolve(label)
    assert FINDINGS[5] == TORCHXRAYVISION18[11] == "Nodule" and TORCHXRAYVISION18[14] == "Lung Lesion"
    assert LabelPolicy("onehot").resolve(label[:, :2]).classes == TWO


@given(rows(14), types, st.integers(0, 13), st.sampled_from([-1.0, 1.5, -0.01, float("inf"), -float("inf")]))
def test_classes_of_a_batch_are_those_of_its_rows_whose_values_are_from_zero_to_one(values, name, column, wrong):
    def by_hand(row):
        if row[5] != row[5]:
            return "unknown"
        return "Nodule" if row[5] >= 0.5 else "other" if any(v >= 0.5 for v in row) else "No Finding"

    batch = as_type(values, name)
    assert MULTI14.classes_of(batch) == [by_hand(row) for row in values] == [MULTI14.class_of(row) for row in batch]
    values[-1][column] = wrong
    with pytest.raises(LabelError, match="labels must be from 0 to 1, or NaN for unknown"):
        LabelPolicy(classes=FINDINGS).check(as_type(values, name))


def test_a_no_finding_column_is_believed_and_floats_and_booleans_stay_what_they_are():
    policy = LabelPolicy(kind="multilabel", classes=("No Finding", "Mass", "Nodule"))
    rows = {(1, 0, 0): "No Finding", (1, NAN, NAN): "No Finding", (0, 0, 0): "other", (NAN, 0, 0): "No Finding"}
    assert [policy.class_of(np.array(row, dtype=np.float32)) for row in rows] == list(rows.values())
    assert policy.add_nodule(torch.tensor([1.0, NAN, 0.0])).nan_to_num(7).tolist() == [0, 7, 1]
    assert policy.synthetic(torch.tensor([NAN, 1.0, NAN]), "No Finding").tolist() == [1, 0, 0]
    assert policy.synthetic(torch.tensor([1.0, 1.0, 0.0]), "Nodule").tolist() == [0, 0, 1]
    batch = torch.tensor([0.0, 1.0, NAN])
    policy = LabelPolicy().resolve(batch, batch=True)
    assert policy.classes_of(batch) == ["No Finding", "Nodule", "unknown"]
    assert policy.add_nodule(batch).tolist() == [1, 1, 1] and policy.synthetic(batch, "normal").tolist() == [0, 0, 0]
    assert type(policy.add_nodule(0.0)) is float and LabelPolicy().add_nodule(False) is True
    made = MULTI14.add_nodule(torch.zeros(14, dtype=torch.bool))
    assert made.dtype == torch.bool and made.nonzero().tolist() == [[5]]
    # One-hot of more classes than two is asked for by kind.
    policy, label = LabelPolicy("onehot", ("normal", "nodule", "mass")), torch.tensor([0.2, 0.1, 0.7])
    policy.check(label, batch=False)
    assert policy.class_of(label) == "mass" and policy.add_nodule(label).tolist() == [0, 1, 0]
    two = LabelPolicy(classes=("Nodule", "Mass")).resolve(torch.tensor([[1.0, 0.0]]), batch=True)
    assert two.kind == "multilabel" and two.class_of(torch.tensor([0.0, 1.0])) == "other"  # no normal class: no one-hot


def test_names_are_found_however_they_are_spelled_and_only_nodules_and_normals_can_be_made():
    policy = LabelPolicy(classes=("nodule", "normal"))
    assert policy.add_nodule(1) == 0 and policy.class_of(1) == "normal" and policy.synthetic(0, "No Finding") == 1
    assert [policy.name_of(n) for n in ("Nodule", "No Finding", "no_finding", "healthy")] == ["nodule"] + ["normal"] * 3
    policy = INTEGER.resolve(0)
    policy.add_nodule(0)
    assert pickle.loads(pickle.dumps(policy)) == policy == LabelPolicy("integer", list(TWO))  # a policy is a value
    policy = LabelPolicy("integer", (*TWO, "Mass"))
    assert policy.can_make("Nodule") and policy.can_make("no finding") and not policy.can_make("Mass")
    assert not LabelPolicy("integer", ("Mass", "Nodule")).can_make("No Finding")
    assert MULTI14.can_make("No Finding") and not MULTI14.can_make("Mass") and not MULTI14.can_make("other")
    with pytest.raises(LabelError, match=r"class must be one of \[.*'Mass'.*\], got 'Flu'"):
        policy.can_make("Flu")
    for name, rule in (("Mass", "one that can be made.* got 'Mass'"), (3, "one of .*got 3")):
        with pytest.raises(LabelError, match=f"class must be {rule}"):
            policy.synthetic(0, name)


@pytest.mark.parametrize(
    ("call", "labels", "message"),
    [
        (LabelPolicy().check, torch.tensor([0, 2]), "labels must be from 0 to 1 for the classes .* got 2"),
        (LabelPolicy().class_of, -1, "from 0 to 1 .* got -1"),
        *[(call, torch.tensor([0.0, 1.0]), "labels must be integers") for call in (INTEGER.check, INTEGER.classes_of)],
        *[(call, torch.tensor([[0], [1]]), r"must be \(B,\)") for call in (INTEGER.check, INTEGER.classes_of)],
        (LabelPolicy().class_of, torch.zeros(2, 14), r"labels must be a number or \(C,\), got \(2, 14\)"),
        (MULTI14.class_of, torch.zeros(2, 14), r"label must be one label .*got \(2, 14\)"),
        (LabelPolicy().check, torch.zeros(2, 3, 14), r"labels must be \(B,\) or \(B, C\), got \(2, 3, 14\)"),
        (LabelPolicy().check, torch.zeros(2, 2), "columns whose names are known"),
        (ONEHOT.check, torch.tensor([[0.0, 0.4]]), "rows that sum to 1"),
        (ONEHOT.check, torch.tensor([[NAN, 1.0]]), "labels must be from 0 to 1"),
        (ONEHOT.add_nodule, 1.0, "labels must have 2 columns"),
        (MULTI14.check, torch.zeros(2, 3), r"labels must be \(B, 14\).* got \(2, 3\)"),
        (MULTI14.add_nodule, torch.zeros(18), "labels must have 14 columns"),
        (MULTI14.check, torch.full((2, 14), -1.0), "uncertain findings are NaN here"),
        (LabelPolicy().check, torch.zeros(0, dtype=torch.int64), "at least one item"),
        (LabelPolicy().check, torch.tensor(1), "must be a batch"),
        (LabelPolicy().check, ["a", "b"], "numbers, arrays or tensors"),
        (LabelPolicy().check, torch.zeros(2, dtype=torch.complex64), "integers or floating point"),
        (LabelPolicy().add_nodule, BOXED, "'detection' change with their boxes"),
        (lambda label: LabelPolicy().synthetic(label, "Nodule"), BOXED, "'detection' change with their boxes"),
    ],
)
def test_labels_that_do_not_fit_are_named(call, labels, message):
    with pytest.raises(LabelError, match=message):
        call(labels)


def test_policies_that_make_no_sense_are_named():
    classes = [{"classes": c} for c in (("No Finding", "Mass"), "Nodule", ("Nodule", "nodule"), ("Nodule", 1), 2)]
    for arguments in (*classes, {"kind": "soft"}, {"nodule": 1}, {"classes": TWO, "normal": "Nodule"}):
        with pytest.raises(LabelError, match="must be"):
            LabelPolicy(**arguments)


@pytest.mark.gpu
def test_cuda_labels_stay_on_cuda():
    batch = torch.full((4, 14), NAN, device="cuda")
    MULTI14.check(batch)
    assert MULTI14.add_nodule(batch).is_cuda and MULTI14.synthetic(batch, "Nodule").is_cuda
    assert MULTI14.classes_of(batch) == ["unknown"] * 4


def test_every_column_that_means_normal_falls_when_a_nodule_comes_in():
    policy = LabelPolicy(classes=("No Finding", "no_nodule", "Nodule", "Mass"))
    row = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert policy.classes_of(row) == ["No Finding", "other"]
    assert policy.add_nodule(row).tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert policy.synthetic(row, "normal")[0].tolist() == [1, 1, 0, 0]
