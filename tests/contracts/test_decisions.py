"""Decisions are a pure function of (seed, epoch, index): DESIGN 1. Bytes are compared, not closeness."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Films, decisions, global_states_untouched, make_mix
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

N = 70
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def run(loader):
    return decisions(loader, lambda: loader.last_params)


def mixes():
    return {
        "whole": dict(p=0.5, seed=5),
        "graft": dict(p=0.5, seed=5, insertion="graft"),
        "added": dict(n_synthetic={"Nodule": 20, "No Finding": 9}, seed=5),
    }


def reference(options, epoch=0):
    loader = make_mix(**options).loader(Films(N), batch_size=N)
    loader.set_epoch(epoch)
    return sorted(run(loader))


@pytest.fixture(params=mixes())
def options(request):
    return mixes()[request.param]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batch_size_and_order_change_no_decision(options, batch_size, shuffle):
    loader = make_mix(**options).loader(Films(N), batch_size=batch_size, shuffle=shuffle)
    rows = run(loader)
    assert sorted(rows) == reference(options)
    assert (rows == sorted(rows)) is not shuffle


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_number_of_workers_changes_no_decision(options, num_workers):
    alone = run(make_mix(**options).loader(Films(N), batch_size=7, shuffle=True))
    loader = make_mix(**options).loader(
        Films(N), batch_size=7, shuffle=True, num_workers=num_workers, multiprocessing_context="fork"
    )
    assert run(loader) == alone


def test_spawned_workers_decide_as_forked_ones():
    options = mixes()["added"]
    loader = make_mix(**options).loader(Films(N), batch_size=7, num_workers=1, multiprocessing_context="spawn")
    assert run(loader) == reference(options)


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_ranks_share_out_the_decisions_of_one(options, shuffle):
    rows = []
    for rank in (0, 1):
        wrapped = make_mix(**options).wrap(Films(N))
        sampler = DistributedSampler(wrapped, num_replicas=2, rank=rank, shuffle=shuffle, seed=3)
        rows.append(run(make_mix(**options).loader(wrapped, batch_size=8, sampler=sampler)))
    assert sorted({*rows[0], *rows[1]}) == reference(options)
    assert len({*rows[0]} & {*rows[1]}) <= 1  # one sample is repeated if they do not divide


def test_a_distributed_sampler_is_told_the_epoch():
    sampler = DistributedSampler(Films(N), num_replicas=2, rank=1)
    loader = make_mix().loader(Films(N), batch_size=8, sampler=sampler)
    first, second = run(loader), run(loader)
    assert sampler.epoch == 1 and [r[0][2] for r in first] != [r[0][2] for r in second]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [(0, 3), (1, 1), (1, 4), (2, 0)])
def test_a_resume_in_mid_epoch_goes_on_with_the_same_decisions(shuffle, num_workers, stop):
    def fresh():
        return make_mix(p=0.5, seed=9).loader(
            Films(30), batch_size=7, shuffle=shuffle, num_workers=num_workers, persistent_workers=num_workers > 0
        )

    straight = fresh()
    whole = [run(straight) for _ in range(3)]

    first = fresh()
    for _ in range(stop[0]):
        run(first)
    seen = []
    if stop[1]:
        for k, (_, labels) in enumerate(first, start=1):
            seen += decisions([(None, labels)], lambda: first.last_params)
            if k == stop[1]:
                state = first.state_dict()
                break
    else:
        state = first.state_dict()
    assert state == {"seed": 9, "epoch": stop[0], "step": stop[1]}

    second = fresh()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert [seen + run(second), *(run(second) for _ in range(2 - stop[0]))] == whole[stop[0] :]


def test_a_state_taken_at_the_last_batch_is_the_next_epochs_start():
    loader = make_mix().loader(Films(10), batch_size=4)
    for _ in loader:
        state = loader.state_dict()
    assert state == {"seed": 0, "epoch": 1, "step": 0} == loader.state_dict()


def test_set_epoch_of_the_loaded_epoch_keeps_the_loaded_step_and_another_epoch_starts_at_its_beginning():
    loader = make_mix().loader(Films(10), batch_size=4)
    loader.load_state_dict({"seed": 0, "epoch": 3, "step": 2})
    loader.set_epoch(3)
    assert len(list(loader)) == 1
    loader.load_state_dict({"seed": 0, "epoch": 3, "step": 2})
    loader.set_epoch(4)
    assert loader.state_dict() == {"seed": 0, "epoch": 4, "step": 0} and len(list(loader)) == 3


def test_persistent_workers_decide_as_none_over_three_epochs():
    options = dict(batch_size=7, shuffle=True)
    alone = make_mix(seed=2).loader(Films(N), **options)
    loader = make_mix(seed=2).loader(Films(N), **options, num_workers=2, persistent_workers=True)
    epochs = [run(loader) for _ in range(3)]
    assert epochs == [run(alone) for _ in range(3)]
    assert all(r[0][1] == e for e, rows in enumerate(epochs) for r in rows)


def test_loader_and_wrap_decide_and_generate_alike(options):
    mix = make_mix(**options)
    wrapped = mix.wrap(Films(N))
    loader = mix.loader(Films(N), batch_size=16)
    for epoch in (0, 1):
        mix.set_epoch(epoch)
        images, labels = zip(*[wrapped[i] for i in range(len(wrapped))], strict=True)
        slots = [wrapped.slot(i) for i in range(len(wrapped))]
        pairs = [(x, y, loader.last_params.slots) for x, y in loader]
        assert slots == [slot for _, _, batch in pairs for slot in batch]
        assert list(labels) == torch.cat([y for _, y, _ in pairs]).tolist()
        assert torch.allclose(torch.stack(images), torch.cat([x for x, _, _ in pairs]), atol=1e-5)


def test_wrap_in_persistent_workers_sees_the_epoch():
    mix = make_mix(p=0.5)
    wrapped = mix.wrap(Films(N))
    loader = DataLoader(wrapped, batch_size=N, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2):
        mix.set_epoch(epoch)
        ((images, labels),) = loader
        assert labels.tolist() == [wrapped[i][1] for i in range(N)]
        assert torch.allclose(images, torch.stack([wrapped[i][0] for i in range(N)]), atol=1e-5)


def test_epochs_and_seeds_differ(options):
    def of(rows):
        return {(key[2], *rest) for key, *rest in rows}

    first = of(reference(options))
    assert first != of(reference(options, epoch=1))
    assert first != of(reference({**options, "seed": 6}))
    assert first == of(reference(options))


def test_batches_of_the_transform_decide_by_images_seen():
    mix = make_mix(seed=4)
    whole = mix(torch.zeros(12, 1, 32, 32), torch.zeros(12, dtype=torch.long))
    slots = mix.last_params.slots
    again, parts = make_mix(seed=4), []
    for start in (0, 5, 8):
        again(whole[0][start : start + {0: 5, 5: 3, 8: 4}[start]], torch.zeros({0: 5, 5: 3, 8: 4}[start]).long())
        parts += again.last_params.slots
    assert [(s.key, s.class_name, s.noise_seed, s.boxes.tobytes()) for s in slots] == [
        (s.key, s.class_name, s.noise_seed, s.boxes.tobytes()) for s in parts
    ]


class Flipped(Films):
    """As a user's data set with random transforms."""

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        if torch.rand(()) + np.random.rand() + random.random() > 1.5:
            image = image.flip(-1)
        return image, label


def test_no_call_moves_a_global_random_state_and_none_matters():
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        with global_states_untouched():
            mix = make_mix(p=0.5, insertion="graft")
            for dataset in (Films(20), Films(20, targets=False)):
                loader = mix.loader(dataset, batch_size=8, shuffle=True)
                counts = loader.class_counts()
                rows = run(loader)
                wrapped = mix.wrap(dataset)
                items = [wrapped[i] for i in range(len(wrapped))]
            workers = run(mix.loader(Films(20), batch_size=8, shuffle=True, num_workers=2))
            out = mix(torch.zeros(8, 1, 40, 32), torch.zeros(8, dtype=torch.long))
            key = mix.last_params.keys[0]
            pictures = [*mix.regenerate(key), out[0], out[1], *(image for image, _ in items)]
            mix.loader(Flipped(20, targets=False), batch_size=4).class_counts()
        seen.append((counts, rows, workers, mix.last_params, pictures))
    assert seen[0][:4] == seen[1][:4]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][4], seen[1][4], strict=True))


def test_a_users_own_random_transforms_draw_as_they_would_without_the_mix():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    plain = [image for image, _ in DataLoader(Flipped(20, labels=[1] * 20), batch_size=5, generator=torch.Generator())]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    loader = make_mix(eligible=lambda label: False).loader(Flipped(20, labels=[1] * 20), batch_size=5)
    assert all(torch.equal(a, b) for a, (b, _) in zip(plain, loader, strict=True))


def test_two_loaders_of_one_mix_are_independent():
    mix = make_mix(p=0.5)
    alone = [run(make_mix(p=0.5).loader(Films(20), batch_size=4)) for _ in range(1)][0]
    one, two = mix.loader(Films(20), batch_size=4), mix.loader(Films(20), batch_size=4)
    two.set_epoch(5)
    rows = []
    for (_, labels), (_, _) in zip(one, two, strict=True):
        rows += decisions([(None, labels)], lambda: one.last_params)
        assert one.last_params.keys[0][1] == 0 and two.last_params.keys[0][1] == 5
    assert rows == alone


def test_a_class_count_in_the_middle_of_an_epoch_changes_nothing():
    loader = make_mix().loader(Films(N), batch_size=2, num_workers=2)
    rows = []
    for _, labels in loader:
        loader.class_counts()
        rows += decisions([(None, labels)], lambda: loader.last_params)
    assert rows == run(make_mix().loader(Films(N), batch_size=2))


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    epoch=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    p=st.floats(0, 1),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    added=st.integers(0, 9),
    insertion=st.sampled_from(["whole", "graft"]),
)
def test_any_loader_yields_its_length_and_only_its_own_decisions(
    n, batch_size, epoch, seed, p, shuffle, drop_last, added, insertion
):
    how = {"n_synthetic": {"Nodule": added}} if added else {"p": p}
    mix = make_mix(seed=seed, insertion=insertion, **how)
    loader = mix.loader(Films(n, size=(17, 33)), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    loader.set_epoch(epoch)
    rows, sizes = [], []
    for images, labels in loader:
        assert images.shape[1:] == (1, 17, 33) and 0 <= images.min() <= images.max() <= 1
        sizes.append(len(images))
        rows += decisions([(None, labels)], lambda: loader.last_params)
    assert len(sizes) == len(loader)
    total = n + added
    assert sum(sizes) == (total // batch_size * batch_size if drop_last else total)
    mix.set_epoch(epoch)
    wrapped = mix.wrap(Films(n, size=(17, 33)))
    for key, class_name, noise_seed, boxes, host, label in rows:
        slot = wrapped.slot(key[2])
        assert (slot.key, slot.class_name, slot.noise_seed) == (key, class_name, noise_seed)
        assert (slot.boxes.tobytes(), slot.host) == (boxes, host)
        assert label == (1 if class_name else int(key[2] % 4 == 3))


def test_the_order_of_a_shuffled_epoch_is_the_same_whatever_was_iterated_before():
    def order(loader):
        return [key[2] for key, *_ in run(loader)]

    straight = make_mix().loader(Films(N), batch_size=8, shuffle=True)
    epochs = [order(straight) for _ in range(3)]
    jumped = make_mix().loader(Films(N), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
    jumped.set_epoch(2)
    assert order(jumped) == epochs[2] and epochs[0] != epochs[1] != epochs[2]


def test_images_pass_by_a_v2_pipeline_after_the_mix():
    mix = v2.Compose([make_mix(p=1.0), v2.Normalize([0.5], [0.5])])
    images, labels = mix(tv_tensors.Image(torch.zeros(2, 1, 32, 32)), torch.tensor([0, 0]))
    assert isinstance(images, tv_tensors.Image) and labels.tolist() == [1, 1] and images.max() > -1
