"""The classifier's pre-task on the drawn phantom."""

import json

import pytest
import torch

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.prior import LocationPrior
from train.classifier.densenet import ChestClassifier
from train.classifier.pretask import PRESETS, draw_patches, train_pretask
from train.common.labelled import read_labelled

TINY = PRESETS["tiny"]


def test_patches_come_with_and_without_a_nodule_and_are_keyed(phantom_data, templates):
    films, ct, prior = read_labelled(phantom_data, "train", 64), CTNodules(templates), LocationPrior.bundled()

    def drawn(seed):
        stream = torch.Generator().manual_seed(seed)
        return draw_patches(films, prior, ct, TINY, stream=stream, n=8, real=False)

    patches = drawn(0)
    assert patches.shape == (16, 1, 32, 32) and patches.abs().max() <= 1
    assert torch.equal(patches, drawn(0)) and not torch.equal(patches, drawn(1))


def test_half_of_the_negatives_are_the_positives_places_without_the_nodule(phantom_data, templates, monkeypatch):
    films, ct, prior = read_labelled(phantom_data, "train", 64), CTNodules(templates), LocationPrior.bundled()
    monkeypatch.setattr(
        ct, "superimpose", lambda images, boxes, generator, contrast: (images, torch.zeros_like(images))
    )
    monkeypatch.setattr("train.classifier.pretask.torch.rand", lambda *shape, generator=None: torch.full(shape, 0.5))
    patches = draw_patches(films, prior, ct, TINY, stream=torch.Generator().manual_seed(0), n=8, real=False)
    assert torch.equal(patches[:4], patches[8:12]) and not torch.equal(patches[4:8], patches[12:])


def test_the_pretask_trains_resumes_and_saves_a_classifier_for_whole_films(phantom_data, templates, tmp_path):
    options = {"data": phantom_data, "ct_nodules": templates}
    file = train_pretask(TINY, out=tmp_path / "a", **options)
    net = ChestClassifier.load(file)
    assert net.findings == FINDINGS and net.size == 64
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 32 and 0 <= lines[-1]["superimposed_auc"] <= 1 and 0 <= lines[-1]["real_auc"] <= 1
    newest = sorted((tmp_path / "a").glob("checkpoint-*.pt"))[-1]
    newest.unlink()
    again = ChestClassifier.load(train_pretask(TINY, out=tmp_path / "a", **options))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_split_without_normal_films_is_refused(phantom_data, templates, tmp_path):
    for name in ("images", "BBox_List_2017.csv", "split.csv"):
        (tmp_path / name).symlink_to(phantom_data / name)
    text = (phantom_data / "Data_Entry_2017_v2020.csv").read_text().replace(",No Finding,", ",Nodule,")
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text(text)
    with pytest.raises(ValueError, match="the train split needs normal films"):
        train_pretask(TINY, data=tmp_path, ct_nodules=templates, out=tmp_path / "out")
