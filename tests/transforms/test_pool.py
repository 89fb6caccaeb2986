"""Nodules rendered ahead: one copy for all workers, keyed, bounded, renewed; and a mix that is fed from them."""

import pickle
import time

import pytest
import torch
from tiny import generator, make_mix, prior
from torch.utils.data import DataLoader, Dataset

from carim_aug import NarrowedPrior, PoolError, SyntheticNoduleMix, SyntheticPool
from carim_aug.transforms import pool as module


def make_pool(size=24, **options):
    return SyntheticPool(generator(), prior(), size=size, **options)


class Grey(Dataset):
    """Films without lungs to be seen."""

    targets = [0] * 40

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.full((1, 64, 64), 0.5), 0


class Draws(Dataset):
    """What a worker draws from a pool."""

    def __init__(self, pool):
        self.pool = pool

    def __len__(self):
        return 30

    def __getitem__(self, i):
        nodule = self.pool.draw((1, 2, i))
        return torch.tensor(nodule.key), nodule.difference


def test_a_key_draws_the_same_entry_and_an_entry_can_be_made_from_its_key():
    pool, other = make_pool(seed=3), make_pool(seed=3)
    nodules = [pool.draw((9, 0, i)) for i in range(40)]
    for i, nodule in enumerate(nodules):
        again = other.draw((9, 0, i))
        assert nodule.key == again.key and torch.allclose(nodule.difference, again.difference, atol=1e-6)
        made = pool.regenerate(nodule.key)
        assert made.noise_seed == nodule.noise_seed and (made.boxes == nodule.boxes).all()
        assert torch.allclose(made.difference, nodule.difference, atol=1e-5)
    assert len({n.key for n in nodules}) > 12 and make_pool(seed=4).draw((9, 0, 0)).noise_seed != nodules[0].noise_seed


def test_uses_are_counted_and_entries_that_are_due_are_rendered_anew():
    pool = make_pool(4, reuse=5)
    for i in range(40):
        pool.draw((0, 0, i))
    uses = pool.uses.clone()
    assert int(uses.sum()) == 40
    due = int((uses >= 5).sum())
    before = {i: pool.regenerate((0, 0, i)).noise_seed for i in range(4)}
    assert pool.refresh() == due > 0
    told = pool.statistics()
    assert told["generation"] == 1 and told["rendered"] == 4 + due and told["given"] == 40 and told["distinct"] == 4
    assert told["most_uses"] == int(uses.max()) and told["mean_uses"] == 10 and told["share_distinct"] == 0.1
    assert (pool.uses == torch.where(uses >= 5, 0, uses)).all()
    seen = {pool.look((0, 1, i)).key: pool.look((0, 1, i)).noise_seed for i in range(60)}
    assert {key[1] for key in seen} == ({0, 1} if due < 4 else {1})
    assert all(seed != before[key[2]] for key, seed in seen.items() if key[1] == 1)
    assert pool.refresh(0) == 0 and pool.refresh(2) <= 2


def test_the_share_of_distinct_nodules_falls_with_reuse():
    shares = []
    for reuse in (1, 4):
        pool = make_pool(16, reuse=reuse)
        for step in range(16):
            for i in range(16):
                pool.draw((0, step, i))
            pool.refresh()
        shares.append(pool.statistics()["share_distinct"])
    assert shares[0] > shares[1] > 0.1


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_draw_from_one_copy_and_their_uses_are_counted(context):
    pool = make_pool()
    loader = DataLoader(Draws(pool), batch_size=5, num_workers=2, multiprocessing_context=context)
    keys, differences = zip(*loader, strict=True)
    assert int(pool.uses.sum()) == 30
    expected = [pool.look((1, 2, i)) for i in range(30)]
    assert torch.cat(keys).tolist() == [list(n.key) for n in expected]
    assert torch.equal(torch.cat(differences), torch.stack([n.difference for n in expected]))


def test_persistent_workers_see_what_was_rendered_meanwhile():
    pool = make_pool(4, reuse=1)
    loader = DataLoader(Draws(pool), batch_size=30, num_workers=1, persistent_workers=True)
    (first, _), refreshed, (second, _) = next(iter(loader)), pool.refresh(), next(iter(loader))
    assert refreshed == 4 and set(first[:, 1].tolist()) == {0} and set(second[:, 1].tolist()) == {1}


def test_a_thread_renders_used_entries_at_about_the_stated_rate():
    pool = make_pool(32, batch_size=8)
    for i in range(100):
        pool.draw((0, 0, i))
    with pool.start(40):
        deadline = time.monotonic() + 30
        while pool.statistics()["rendered"] < 48 and time.monotonic() < deadline:
            time.sleep(0.01)
    rendered = pool.statistics()["rendered"]
    assert 48 <= rendered <= 64
    time.sleep(0.3)
    assert pool.statistics()["rendered"] == rendered
    nodule = pool.look((0, 0, 5))
    assert torch.allclose(nodule.difference, pool.regenerate(nodule.key).difference, atol=1e-5)


def test_a_reader_never_sees_half_an_entry():
    pool = make_pool(2, batch_size=2)
    with pool.start(1000):
        for i in range(300):
            nodule = pool.draw((0, 0, i))
            if i % 30 == 0:
                made = pool.regenerate(nodule.key)
                assert made.noise_seed == nodule.noise_seed and (made.boxes == nodule.boxes).all()
                assert torch.allclose(nodule.difference, made.difference, atol=1e-5)
    assert pool.statistics()["rendered"] > 4


def test_a_copy_draws_and_does_not_render():
    copy = pickle.loads(pickle.dumps(make_pool()))
    assert copy.draw((0, 0, 0)).key == make_pool().draw((0, 0, 0)).key
    for act in (copy.refresh, lambda: copy.start(1)):
        with pytest.raises(PoolError, match="in the process that made it"):
            act()


# --- A mix fed from a pool ---
def test_grafts_of_a_mix_come_from_its_pool():
    pool = make_pool(8)
    mix = SyntheticNoduleMix.from_pretrained(pool=pool, insertion="graft", p=0.8)
    data, seen = Grey(), 0
    for images, labels in mix.loader(data, batch_size=10, num_workers=2):
        params = mix.last_params
        assert torch.equal(labels, params.synthetic.long())
        changed = (images != 0.5).flatten(1).any(1)
        assert torch.equal(changed, params.synthetic)
        for slot, key in zip(params.slots, params.keys, strict=True):
            if slot.synthetic:
                seen += 1
                assert slot.entry == key and (pool.regenerate(key).boxes == slot.boxes).all()
    assert pool.statistics()["given"] == seen > 20
    wrapped = mix.wrap(data)
    assert wrapped.slot(3).noise_seed in {0, *(pool.look((0, 0, i)).noise_seed for i in range(200))}


def test_pixels_are_those_of_a_mix_without_a_pool():
    pool = make_pool(4)
    mix = SyntheticNoduleMix.from_pretrained(pool=pool, insertion="graft", p=1.0)
    images, labels = torch.full((6, 1, 64, 64), 0.5), torch.zeros(6, dtype=torch.int64)
    mixed, _ = mix(images, labels)
    params = mix.last_params
    again, _ = make_mix(insertion="graft")(images, labels, params=params)
    assert torch.allclose(mixed, again, atol=1e-5)
    for i in range(40):
        pool.draw((5, 5, i))
    pool.refresh(4)
    assert torch.allclose(mix(images, labels, params=params)[0], mixed, atol=1e-5)  # the entries are gone: rendered


def test_a_gate_and_the_users_masks_hold_for_pooled_nodules():
    def left(candidates):
        return torch.tensor([float(b[:, 0].mean()) for b in candidates.boxes]) < 40

    mix = SyntheticNoduleMix.from_pretrained(pool=make_pool(64), insertion="graft", p=1.0, gate=left)
    mix(torch.full((20, 1, 64, 64), 0.5), torch.zeros(20, dtype=torch.int64))
    boxes = [b for b in mix.last_params.boxes if len(b)]
    assert len(boxes) > 10 and all(float(b[:, 0].mean()) < 40 for b in boxes)


def test_bad_pools_are_named(monkeypatch):
    with pytest.raises(
        PoolError, match=r"size must be at most \d+ entries for max_bytes .*got 24 .*make the pool small"
    ):
        make_pool(max_bytes=10_000)
    with pytest.raises(PoolError, match="entries for the memory that is free"):
        module.check_memory(2**60, 10**9, None)
    for options, words in (({"size": 0}, "size must be"), ({"reuse": 1.5}, "reuse must be")):
        with pytest.raises(ValueError, match=words):
            make_pool(**options)
    with pytest.raises(ValueError, match="per_second must be above 0"):
        make_pool(2).start(0)
    pool = make_pool(2)
    with pytest.raises(ValueError, match="insertion='graft'"):
        SyntheticNoduleMix.from_pretrained(pool=pool)
    with pytest.raises(TypeError, match="pool must be a SyntheticPool, got int"):
        make_mix(pool=3)


def test_memory_that_caches_files_counts_as_free(monkeypatch, tmp_path):
    told = tmp_path / "meminfo"
    monkeypatch.setattr(module, "Path", lambda name: told)
    monkeypatch.setattr(module.os, "sysconf", lambda name: 3)
    told.write_text("MemTotal:       9000 kB\nMemFree:         10 kB\nMemAvailable:   7000 kB\n")
    assert module.free_memory() == 7000 * 1024
    told.unlink()
    assert module.free_memory() == 9  # a system without this file


def test_a_narrowed_priors_counts_fit_the_pool():
    pool = SyntheticPool(generator(), NarrowedPrior(count=6, sizes=(0.015, 0.03)), size=3)
    assert len(pool.draw((0, 0, 0)).boxes) == 6 and pool.bytes > 3 * 4 * 32 * 32
