"""Training of one classifier from a given start, with a network of one layer in place of DenseNet-121."""

import json
from dataclasses import replace

import pytest
import torch

from train.classifier.finetune import FinetunePreset, finetune
from train.common.run import Run, RunError, TrainingError

PRESET = FinetunePreset(size=8, images=40, batch=4, learning_rate=0.1, snapshot_images=8)


def _network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1), torch.nn.BatchNorm1d(1))


def _epochs(epoch, images=14):
    """Three batches of four of 14 images, in an order of the epoch's own."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
    data = torch.randint(256, (images, 1, 8, 8), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    for rows in order.split(4):
        if len(rows) == 4:
            yield data[rows], rows % 2


def _state(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def test_a_cut_run_ends_as_if_it_had_not_been_cut(tmp_path):
    whole = _state(finetune(_network(), _epochs, PRESET, Run(tmp_path / "a", {}), seed=0))
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {line["epoch"] for line in lines} == {0, 1, 2} and all(line["loss"] > 0 for line in lines)

    def cut(epoch):
        for number, batch in enumerate(_epochs(epoch)):
            if (epoch, number) == (2, 1):
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        finetune(_network(), cut, PRESET, Run(tmp_path / "b", {}), seed=0)
    network = finetune(_network(), _epochs, PRESET, Run(tmp_path / "b", {}), seed=0)
    assert not network.training and all(torch.equal(v, whole[k]) for k, v in network.state_dict().items())
    other = _state(finetune(_network(), _epochs, PRESET, Run(tmp_path / "c", {}), seed=1))
    assert not torch.equal(other["1.weight"], whole["1.weight"])


def test_fewer_images_than_a_batch_and_updates_that_are_not_finite_end_the_training_and_change_nothing(tmp_path):
    with pytest.raises(RunError, match="at least a batch of 4 images, got fewer"):
        finetune(_network(), lambda epoch: _epochs(epoch, 3), PRESET, Run(tmp_path / "few", {}), seed=0)
    network = _network()
    with torch.no_grad():
        network[1].bias.fill_(torch.nan)
    before = _state(network)
    with pytest.raises(TrainingError, match="not finite in 10 updates in a row"):
        finetune(network, _epochs, replace(PRESET, snapshot_images=1000), Run(tmp_path / "nan", {}), seed=0)
    assert all(torch.equal(v.nan_to_num(9), before[k].nan_to_num(9)) for k, v in network.state_dict().items())
