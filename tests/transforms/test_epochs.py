"""Epochs that travel with indices, and passes that are counted."""

import pickle

import pytest
import torch
from tiny import Images, make_mix
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
)

from carim_aug import LabelError, MixLoader
from carim_aug.transforms.epochs import EpochSampler, Visit

NORMAL = {"p": 1.0, "placement": "prior"}


def rows(loader):
    """Labels and pixels of one pass."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(a, b):
    return torch.allclose(a[0], b[0], atol=1e-5) and torch.equal(a[1], b[1])


# --- Indices ---
def test_indices_know_epoch_and_repeat_and_pass_through_pickle():
    sampler = EpochSampler([3, 1, 3, 3], seed=5)
    for epoch in range(2):
        visits = pickle.loads(pickle.dumps(list(sampler)))
        assert visits == [3, 1, 3, 3] and all(isinstance(visit, Visit) for visit in visits)
        assert [v.key(5) for v in visits] == [(5, epoch, 3), (5, epoch, 1), (5, epoch, 3, 0, 1), (5, epoch, 3, 0, 2)]
    batches = EpochSampler([[0, 1], torch.tensor([1, 0])])
    assert [[v.key(0) for v in b] for b in batches] == [[(0, 0, 0), (0, 0, 1)], [(0, 0, 1, 0, 1), (0, 0, 0, 0, 1)]]


def test_whoever_sets_the_epoch_of_a_sampler_is_followed():
    images = Images(8)
    inner = DistributedSampler(images, num_replicas=2, rank=0, seed=1)
    for sampler in (EpochSampler(inner), EpochSampler(BatchSampler(inner, 2, False))):
        inner.set_epoch(0)
        epochs = []
        for given in (None, None, 7, None, 3):
            if given is not None:
                inner.set_epoch(given)
            assert sampler.sampler is inner
            list(sampler)
            epochs.append(sampler.epoch)
        assert epochs == [0, 1, 7, 8, 3] and inner.epoch == 3
    inner.set_epoch(4)  # before there was a loader
    sampler = EpochSampler(inner)
    list(sampler)
    assert sampler.epoch == 4


# --- B ---
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.train)])
def test_an_index_asked_for_again_is_in_the_next_epoch_as_in_a_loader(workers):
    images, mix = Images(12), make_mix(p=0.5, placement="prior")
    wrapped, loader = mix.wrap(images), mix.loader(images, batch_size=4)
    plain = DataLoader(wrapped, batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    passes = [rows(loader) for _ in range(4)]
    assert all(same(rows(plain), one) for one in passes[:3]) and not same(passes[0], passes[1])
    wrapped.set_epoch(2)
    assert all(same(rows(plain), one) for one in passes[2:])


def test_schedules_move_without_set_epoch():
    wrapped = make_mix(p=lambda epoch: float(epoch > 1), placement="prior").wrap(Images(4, labels=[0] * 4))
    assert [sum(label for _, label in wrapped) for _ in range(4)] == [0, 0, 4, 4]


def test_an_index_that_a_sampler_repeats_gets_another_nodule():
    images, mix = Images(2, labels=[0, 0]), make_mix(**NORMAL)
    loader = mix.loader(images, batch_size=2, sampler=[0, 0, 0, 1])
    keys = [key for _ in loader for key in loader.last_params.keys]
    assert keys == [(0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 2), (0, 0, 1)]
    (first, _), (again, _) = DataLoader(mix.wrap(images), sampler=[0, 0])
    assert not torch.equal(first, again)
    sampler = WeightedRandomSampler([1.0, 1e-9], 6)
    assert len({key for _ in mix.loader(images, sampler=sampler) for key in mix.last_params.keys}) == 6


# --- Ranks and frameworks ---
def test_on_several_ranks_what_would_repeat_in_silence_is_refused(monkeypatch):
    mix = make_mix(**NORMAL)
    wrapped, loader = mix.wrap(Images(4)), mix.loader(Images(4), batch_size=2, shuffle=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    list(wrapped)
    with pytest.raises(RuntimeError, match=r"call set_epoch\(epoch\) of what mix.wrap returned before each epoch"):
        list(wrapped)
    with pytest.raises(RuntimeError, match=r"mixed = mix.wrap\(dataset\); mix.loader\(mixed, sampler=Distributed"):
        list(loader)
    for epoch in range(2):
        wrapped.set_epoch(epoch)
        list(wrapped)
    shards = [
        mix.loader(wrapped, sampler=DistributedSampler(wrapped, num_replicas=2, rank=rank, shuffle=False))
        for rank in (0, 1)
    ]
    seen = [[shard.last_params.keys[0] for _ in shard] for shard in shards]
    assert seen == [[(0, 0, 0), (0, 0, 2)], [(0, 0, 1), (0, 0, 3)]]


def test_a_framework_may_make_the_loader_anew_or_read_its_data_set():
    mix, images = make_mix(p=0.5, placement="prior"), Images(12)
    loader = mix.loader(images, batch_size=4, shuffle=True)
    first, second = rows(loader), rows(loader)
    anew = mix.loader(images, batch_size=4, shuffle=True)
    read = DataLoader(anew.dataset, batch_sampler=anew.batch_sampler, collate_fn=anew.collate_fn)
    assert isinstance(loader, DataLoader) and same(rows(read), first) and same(rows(read), second)
    remade = MixLoader(loader.dataset, batch_size=4, sampler=mix.loader(images, shuffle=True).sampler)
    assert same(rows(remade), first) and same(rows(remade), second)
    assert iter(remade) is not None and remade.state_dict()["epoch"] == 2  # an epoch begins with its first batch


def test_a_generator_orders_as_in_torch():
    images, mix = Images(12), make_mix(p=0.0)
    for loader, generator in (
        (mix.loader(images, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)), torch.Generator()),
    ):
        plain = DataLoader(images, batch_size=4, shuffle=True, generator=generator.manual_seed(3))
        assert all(torch.equal(a[0], b[0]) for a, b in zip([*loader, *loader], [*plain, *plain], strict=True))


def test_targets_and_names_of_the_data_set_are_the_loaders():
    images = Images(8, classes=["No Finding", "Nodule"])
    loader = make_mix(p=0.5).loader(images)
    assert loader.dataset.targets == images.targets and loader.dataset.classes == images.classes
    more = make_mix(n_synthetic={"Nodule": 3}).loader(images).dataset
    assert more.targets == [*images.targets, 1, 1, 1] and len(more) == len(more.targets)
    images.targets = torch.tensor(images.targets)
    assert make_mix(n_synthetic={"Nodule": 2}).wrap(images).targets.tolist()[-3:] == [1, 1, 1]


# --- A collate_fn that sorts ---
def test_decisions_follow_samples_that_a_collate_fn_moves():
    def backwards(samples):
        return default_collate(samples[::-1])

    def loud_and_backwards(samples):
        return default_collate([(image * 0.5, label) for image, label in samples[::-1]])

    images, mix = Images(8), make_mix(**NORMAL)
    for sampler in (SequentialSampler(images), RandomSampler(images)):
        (batch,) = loader = mix.loader(images, batch_size=8, sampler=sampler, collate_fn=backwards)
        params = loader.last_params
        assert params.synthetic.tolist() == [images.targets[key[2]] == 0 for key in params.keys]
        for image, decision in zip(batch[0], params.decisions, strict=True):
            assert image[0, 0, 0] == images[decision.background][0][0, 0, 0]
    with pytest.raises(LabelError, match="in the order of the samples after collate_fn"):
        list(mix.loader(images, batch_size=8, collate_fn=loud_and_backwards))
