"""Decisions are a pure function of (seed, epoch, index). Bytes are compared, not closeness."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Images, decisions, global_states_untouched, make_mix
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

N = 24
MIXES = {
    "whole": dict(p=0.5, seed=5, insertion="whole"),
    "graft": dict(p=0.5, seed=5),
    "added": dict(n_synthetic={"Nodule": 8, "No Finding": 3}, seed=5, insertion="whole"),
}
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
every_mix = pytest.mark.parametrize("options", MIXES.values(), ids=MIXES)


def run(loader):
    return decisions(loader, lambda: loader.last_params)


def reference(options, epoch=0):
    loader = make_mix(**options).loader(Images(N), batch_size=N)
    loader.set_epoch(epoch)
    return sorted(run(loader))


# --- However it is loaded ---
@every_mix
@pytest.mark.parametrize(("batch_size", "shuffle"), [(1, False), (7, True), (64, True)])
def test_batch_size_and_order_change_no_decision(options, batch_size, shuffle):
    rows = run(make_mix(**options).loader(Images(N), batch_size=batch_size, shuffle=shuffle))
    assert sorted(rows) == reference(options) and (rows == sorted(rows)) is not shuffle


@every_mix
@pytest.mark.parametrize(
    ("n", "context"),
    [(1, "fork"), (2, "fork"), *(pytest.param(*how, marks=pytest.mark.train) for how in ((4, "fork"), (1, "spawn")))],
)
def test_workers_change_no_decision(options, n, context):
    rows, more = [], dict(batch_size=7, shuffle=True)
    for workers in ({}, {"num_workers": n, "multiprocessing_context": context}):
        rows.append(run(make_mix(**options).loader(Images(N), **more, **workers)))
    assert rows[0] == rows[1]


@every_mix
@pytest.mark.parametrize("shuffle", [False, True])
def test_two_ranks_share_out_the_decisions_of_one(options, shuffle):
    rows = []
    for rank in (0, 1):
        wrapped = make_mix(**options).wrap(Images(N))
        sampler = DistributedSampler(wrapped, num_replicas=2, rank=rank, shuffle=shuffle, seed=3)
        rows.append(run(make_mix(**options).loader(wrapped, batch_size=8, sampler=sampler)))
    assert sorted({*rows[0], *rows[1]}) == reference(options)
    assert len({*rows[0]} & {*rows[1]}) <= 1  # one sample is repeated if they do not divide


def test_a_distributed_sampler_hears_the_epoch():
    for inside in (False, True):
        sampler = DistributedSampler(Images(N), num_replicas=2, rank=1)
        how = {"batch_sampler": BatchSampler(sampler, 8, False)} if inside else {"batch_size": 8, "sampler": sampler}
        loader = make_mix().loader(Images(N), **how)
        first, second = run(loader), run(loader)
        assert sampler.epoch == 1 and [r[0][2] for r in first] != [r[0][2] for r in second]


@every_mix
def test_loader_and_wrap_decide_and_generate_alike(options):
    mix = make_mix(**options)
    wrapped, loader = mix.wrap(Images(N)), mix.loader(Images(N), batch_size=16)
    for epoch in (0, 1):
        mix.set_epoch(epoch)
        images, labels = zip(*wrapped, strict=True)
        batches = [(x, y, loader.last_params.decisions) for x, y in loader]
        assert [wrapped.decision(i) for i in range(len(wrapped))] == [one for _, _, each in batches for one in each]
        assert list(labels) == torch.cat([y for _, y, _ in batches]).tolist()
        assert torch.allclose(torch.stack(images), torch.cat([x for x, _, _ in batches]), atol=1e-5)


def test_batches_of_the_transform_decide_by_images_seen():
    rows = []
    for sizes in ((12,), (5, 3, 4)):
        mix, seen = make_mix(seed=4), []
        for n in sizes:
            mix(torch.zeros(n, 1, 32, 32), torch.zeros(n, dtype=torch.long))
            seen += mix.last_params.decisions
        rows.append([(one.key, one.class_name, one.noise_seed, one.boxes.tobytes()) for one in seen])
    assert rows[0] == rows[1]


# --- Epochs and resuming ---
@every_mix
def test_epochs_and_seeds_differ(options):
    def of(rows):
        return {(key[2], *rest) for key, *rest in rows}

    first = of(reference(options))
    assert first == of(reference(options))
    assert first != of(reference(options, epoch=1)) and first != of(reference({**options, "seed": 6}))


def test_persistent_workers_decide_as_none_and_an_order_is_its_epochs_alone():
    options = dict(batch_size=7, shuffle=True)
    alone = make_mix(seed=2).loader(Images(N), **options)
    straight = [run(alone) for _ in range(3)]
    loader = make_mix(seed=2).loader(Images(N), **options, num_workers=2, persistent_workers=True)
    assert [run(loader) for _ in range(3)] == straight
    assert all(row[0][1] == epoch for epoch, rows in enumerate(straight) for row in rows)
    loader.set_epoch(1)  # whatever was iterated before
    assert run(loader) == straight[1]
    orders = [[row[0][2] for row in rows] for rows in straight]
    assert orders[0] != orders[1] != orders[2]


def test_wrap_in_persistent_workers_sees_the_epoch():
    mix = make_mix(p=0.5)
    wrapped = mix.wrap(Images(N))
    loader = DataLoader(mix.wrap(Images(N)), batch_size=N, num_workers=1, persistent_workers=True)
    for epoch in (0, 3):
        mix.set_epoch(epoch)
        ((images, labels),) = loader
        here, marked = zip(*wrapped, strict=True)
        assert labels.tolist() == list(marked) and torch.allclose(images, torch.stack(here), atol=1e-5)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.train)])
@pytest.mark.parametrize("stop", [(0, 3), (1, 1), (1, 4), (2, 0)])
def test_a_resume_in_mid_epoch_goes_on_with_the_same_decisions(shuffle, workers, stop):
    def fresh():
        options = dict(batch_size=7, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0)
        return make_mix(p=0.5, seed=9, insertion="whole").loader(Images(30), **options)

    straight, first, second, seen = fresh(), fresh(), fresh(), []
    whole = [run(straight) for _ in range(3)]
    for _ in range(stop[0]):
        run(first)
    state = first.state_dict()
    if stop[1]:
        for _, batch in zip(range(stop[1]), first, strict=False):
            seen += decisions([batch], lambda: first.last_params)
        state = first.state_dict()
    assert state == {"seed": 9, "epoch": stop[0], "step": stop[1]}
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert [seen + run(second), *(run(second) for _ in range(2 - stop[0]))] == whole[stop[0] :]


def test_a_state_of_the_last_batch_is_the_next_epochs_start():
    loader = make_mix().loader(Images(10), batch_size=4)
    for _ in loader:
        state = loader.state_dict()
    assert state == {"seed": 0, "epoch": 1, "step": 0} == loader.state_dict()
    for epoch, batches in ((3, 1), (4, 3)):  # set_epoch keeps a loaded step of its own epoch alone
        loader.load_state_dict({"seed": 0, "epoch": 3, "step": 2})
        loader.set_epoch(epoch)
        assert loader.state_dict() == {"seed": 0, "epoch": epoch, "step": 3 - batches} and len(list(loader)) == batches


# --- And nothing else matters ---
class Flipped(Images):
    """As a user's data set with random transforms."""

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        if torch.rand(()) + np.random.rand() + random.random() > 1.5:
            image = image.flip(-1)
        return image, label


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_no_call_moves_a_global_random_state_and_none_matters():
    seen = []
    for seed in (0, 1):
        seed_all(seed)
        with global_states_untouched():
            mix, batch = make_mix(p=0.5), (torch.zeros(8, 1, 40, 32), torch.zeros(8, dtype=torch.long))
            for dataset in (Images(12), Images(12, targets=False)):
                loader = mix.loader(dataset, batch_size=8, shuffle=True)
                counts, rows, items = loader.class_counts(), run(loader), list(mix.wrap(dataset))
            workers = run(mix.loader(Images(12), batch_size=8, shuffle=True, num_workers=2))
            pictures = [*mix(*batch), *mix.regenerate((0, 0, 0)), *(image for image, _ in items)]
            mix.loader(Flipped(12, targets=False), batch_size=4).class_counts()
        seen.append((counts, rows, workers, mix.last_params, pictures))
    assert seen[0][:4] == seen[1][:4]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][4], seen[1][4], strict=True))


def test_a_users_own_random_transforms_draw_as_they_would_without_the_mix():
    data = Flipped(20, labels=[1] * 20)
    seed_all(0)
    plain = [image for image, _ in DataLoader(data, batch_size=5, generator=torch.Generator())]
    seed_all(0)
    loader = make_mix(eligible=lambda label: False).loader(data, batch_size=5)
    assert all(torch.equal(a, b) for a, (b, _) in zip(plain, loader, strict=True))


def test_two_loaders_of_one_mix_and_class_counts_in_mid_epoch_change_nothing():
    mix, rows = make_mix(p=0.5), []
    one, two = mix.loader(Images(20), batch_size=4), mix.loader(Images(20), batch_size=4)
    two.set_epoch(5)
    for batch, _ in zip(one, two, strict=True):
        one.class_counts()
        rows += decisions([batch], lambda: one.last_params)
        assert one.last_params.keys[0][1] == 0 and two.last_params.keys[0][1] == 5
    assert rows == run(make_mix(p=0.5).loader(Images(20), batch_size=4))


@pytest.mark.train
@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    epoch=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    p=st.floats(0, 1),
    shuffle=st.booleans(),
    added=st.integers(0, 9),
    insertion=st.sampled_from(["whole", "graft"]),
)
def test_any_loader_yields_its_own_decisions_only(n, batch_size, epoch, seed, p, shuffle, added, insertion):
    mix = make_mix(seed=seed, insertion=insertion, **({"n_synthetic": {"Nodule": added}} if added else {"p": p}))
    data, rows = Images(n, size=(17, 33)), []
    loader, wrapped = mix.loader(data, batch_size=batch_size, shuffle=shuffle), mix.wrap(data)
    loader.set_epoch(epoch)
    mix.set_epoch(epoch)
    for images, labels in loader:
        assert images.shape[1:] == (1, 17, 33) and 0 <= images.min() <= images.max() <= 1
        rows += decisions([(images, labels)], lambda: loader.last_params)
    assert sorted(key[2] for key, *_ in rows) == list(range(n + added))
    for key, *rest, label in rows:
        one = wrapped.decision(key[2])
        assert (one.key, one.class_name, one.noise_seed, one.boxes.tobytes(), one.background) == (key, *rest)
        assert label == (1 if one.class_name else int(key[2] % 4 == 3))
