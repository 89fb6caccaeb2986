"""What a data set says of its labels: class names through wrappers, labels without images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from carim_aug import LabelError, LabelPolicy
from carim_aug.labels.discover import labels_without_images, name_classes, same_label
from carim_aug.ops.findings import FINDINGS

ROW, PAIR = torch.zeros(14), ("nodule", "normal")
SORTED = tuple(sorted(FINDINGS))


class Named(Dataset):
    """Three samples, whose names are attributes."""

    def __init__(self, **names):
        self.__dict__.update(names)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError("no image is loaded to find names or labels")


COCO = Named(coco=SimpleNamespace(cats={1: {"name": "mass"}, 4: {"name": "nodule"}}))


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
        (Named(classes=("__background__", "nodule")), [], ("__background__", "nodule")),
        (Named(), 1, None),
        (Named(class_names=list(PAIR)), 1, PAIR),
        (Named(label_names=PAIR), 0, PAIR),
        (Named(labels=list(SORTED)), ROW, SORTED),  # CheXpert's readers name their columns so
        (Named(labels=[0, 1, 1]), 1, None),
        (Named(features={"image": object(), "label": SimpleNamespace(names=list(PAIR))}), 1, PAIR),
        (Named(features={"a": SimpleNamespace(names=["x"]), "label": SimpleNamespace(names=list(PAIR))}), 1, PAIR),
        (Named(_anything=Named(classes=PAIR)), 1, PAIR),
        (Named(parts=[Named(classes=PAIR), Named(classes=PAIR)]), 1, PAIR),
        (Named(class_to_idx={"normal": 1, "nodule": 0}), 1, PAIR),
        (Named(class_names=np.array(PAIR)), 1, PAIR),
        (Named(classes={1: "normal", 0: "nodule"}), 1, PAIR),
        (Named(id2label={"0": "nodule", "1": "normal"}), 1, PAIR),
        (Named(METAINFO={"classes": PAIR}), 1, PAIR),
        (Named(parts={"train": Named(classes=PAIR)}), 1, PAIR),
        (ConcatDataset([Named(classes=PAIR)] * 12), 1, PAIR),
        (Named(classes="nodule"), 1, None),
    ],
)
def test_class_names_come_from_the_data_set(dataset, label, classes):
    assert name_classes(LabelPolicy(), dataset, label, "label").classes == classes
    given = LabelPolicy(classes=("Nodule", "No Finding"))
    assert name_classes(given, dataset, label) is given


def test_names_that_do_not_fit_are_named():
    with pytest.raises(LabelError, match="nodule must be one of the classes .*'cat'"):
        name_classes(LabelPolicy(), Named(classes=["cat", "dog"]))
    parts = ConcatDataset([Named(classes=PAIR), Named(classes=PAIR[::-1])])
    with pytest.raises(LabelError, match="labels must be of one list of classes in all data sets inside, got"):
        name_classes(LabelPolicy(), parts, 1)
    with pytest.raises(LabelError, match="counted from '__background__', 0, where targets have boxes.*classes="):
        name_classes(LabelPolicy(), Named(classes=PAIR), [])
    with pytest.raises(LabelError, match=r"integers, or 1.0 for a nodule, .*\['nodule', 'normal'\], got 1.0: return"):
        LabelPolicy(classes=PAIR).resolve(1.0, batch=False)
    assert LabelPolicy(classes=PAIR[::-1]).resolve(1.0, batch=False).classes == ("nodule",)


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
