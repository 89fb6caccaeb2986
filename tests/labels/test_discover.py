"""What a data set says of its labels: class names through wrappers, labels without images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from carim_aug import LabelError, LabelPolicy
from carim_aug.labels.discover import check_order, labels_without_images, name_classes, same_label
from carim_aug.ops.findings import FINDINGS

ROW, PAIR = torch.zeros(14), ("nodule", "normal")
SORTED = tuple(sorted(FINDINGS))
COCO = SimpleNamespace(coco=SimpleNamespace(cats={1: {"name": "mass"}, 4: {"name": "nodule"}}))


class Named(Dataset):
    """Three samples, whose names are attributes."""

    def __init__(self, **names):
        self.__dict__.update(names)

    def __len__(self):
        return 3


def inside(dataset):
    return Subset(Named(dataset=Subset(dataset, [0, 1])), [0])


@pytest.mark.parametrize(
    ("dataset", "label", "classes"),
    [
        (Named(classes=PAIR), 1, PAIR),
        (inside(Named(classes=list(PAIR))), None, PAIR),
        (Subset(ConcatDataset([Named(classes=PAIR), inside(Named(classes=PAIR))]), [0]), 1, PAIR),
        (Named(pathologies=SORTED), ROW, SORTED),
        (Named(pathologies=SORTED), torch.zeros(2), None),  # as many names as columns
        (Named(pathologies=SORTED), 1, None),  # pathologies name columns, never indices
        (Named(pathologies=SORTED, classes=PAIR), 1, PAIR),
        (Named(pathologies=SORTED, classes=PAIR), ROW, SORTED),
        (inside(COCO), [], ("__background__", "mass", "", "", "nodule")),
        (Named(classes=PAIR), [], None),  # detection counts from the background
        (Named(classes=("__background__", "nodule")), [], ("__background__", "nodule")),
        (Named(), 1, None),
    ],
)
def test_class_names_come_from_the_data_set(dataset, label, classes):
    assert name_classes(LabelPolicy(), dataset, label).classes == classes
    given = LabelPolicy(classes=("Nodule", "No Finding"))
    assert name_classes(given, dataset, label) is given


def test_names_that_do_not_fit_are_named():
    with pytest.raises(LabelError, match="nodule must be one of the classes .*'cat'"):
        name_classes(LabelPolicy(), Named(classes=["cat", "dog"]))
    parts = ConcatDataset([Named(classes=PAIR), Named(classes=PAIR[::-1])])
    with pytest.raises(LabelError, match="labels must be of one list of classes in all parts of a ConcatDataset, got"):
        name_classes(LabelPolicy(), parts, 1)
    with pytest.raises(LabelError, match=r"named columns .*'lab'.* got shape \(2, 14\)"):
        check_order(LabelPolicy(), "lab", np.zeros((2, 14)))
    for key, label in (("lab", np.zeros(18)), (1, ROW), ("lab", 1)):
        check_order(LabelPolicy(), key, label)
    check_order(LabelPolicy(classes=SORTED), "lab", ROW)


def test_labels_are_read_without_images_through_wrappers_and_compared_with_nan_and_boxes():
    listed, tensor = Named(targets=[5, 6, 7]), Named(labels=torch.arange(3))
    assert labels_without_images(Subset(ConcatDataset([listed, tensor]), [2, 0, 4])) == [7, 5, 1]
    assert labels_without_images(Subset(tensor, [2, 0])).tolist() == [2, 0]
    for none in (Named(), Named(targets=[1]), Subset(Named(), [0]), ConcatDataset([listed, Named()])):
        assert labels_without_images(none) is None
    target = {"boxes": torch.ones(1, 4), "labels": torch.tensor([1])}
    assert same_label(target, {**target, "other": 3}) and not same_label(target, {**target, "boxes": torch.zeros(1, 4)})
    assert same_label(torch.tensor([1, torch.nan]), np.array([1, np.nan])) and same_label(1, torch.tensor(1.0))
    assert not same_label(1, [1]) and not same_label("a", 1) and not same_label(target, 1)
