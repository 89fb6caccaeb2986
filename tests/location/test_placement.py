"""A graft comes to lie in its host's own lungs as often as a real nodule does; all of it keyed."""

from dataclasses import replace

import pytest
import torch
from tiny import make_mix
from torch.utils.data import Dataset

from carim_aug.data.phantom import phantom_chest
from carim_aug.location.placement import KEPT_OUTSIDE, placed
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import stream
from carim_aug.transforms.plan import Planner

PRIOR = LocationPrior.bundled()


def planner(seed=0):
    return Planner(PRIOR, seed=seed, nodule="Nodule", chances={"Nodule": 1.0})


def slots(n, start=0):
    plan = planner()
    return [plan.decide((0, 0, i), i, eligible=True) for i in range(start, start + n)]


@pytest.fixture
def left_half(monkeypatch):
    """Lungs that are the image's left half, whatever the film."""

    def masks(images, field=None):
        lungs = torch.zeros(len(images), 64, 64, dtype=torch.bool)
        lungs[:, :, :30] = True
        return lungs

    monkeypatch.setattr("carim_aug.location.placement.lung_masks", masks)


def share_inside(chosen):
    centres = [(s.boxes[:, 0] + s.boxes[:, 2]) / 2 for s in chosen]
    return sum(float((c < 0.5).mean()) for c in centres) / len(centres)


def test_draws_outside_are_kept_with_the_stated_chance(left_half):
    before = slots(600)
    after = placed(torch.zeros(600, 1, 32, 32), before, planner())
    share = share_inside(before)
    wanted = share / (share + KEPT_OUTSIDE * (1 - share))
    assert share < 0.6 and share_inside(after) == pytest.approx(wanted, abs=0.05)
    assert all(a.host == b.host and a.class_name == b.class_name for a, b in zip(after, before, strict=True))


def test_a_slot_drawn_again_says_so_in_its_key_and_can_be_made_from_it(left_half):
    before = slots(64)
    after = placed(torch.zeros(64, 1, 32, 32), before, planner())
    again = [(a, b) for a, b in zip(after, before, strict=True) if a != b]
    assert again
    for slot, first in again:
        assert slot.key[:3] == first.key and len(slot.key) == 4 and slot.key[3] >= 1
        assert planner().regenerate(slot.key, "Nodule") == replace(slot, host=-1)
    assert len({slot.noise_seed for slot, _ in again}) == len(again)


def test_the_same_host_and_key_give_the_same_place_in_any_batch():
    films = torch.rand(6, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    films[:, :, 16:48, 8:28], films[:, :, 16:48, 36:56] = 0.05, 0.1
    before = slots(6)
    whole = placed(films, before, planner())
    assert whole == tuple(placed(films[i : i + 1], before[i : i + 1], planner())[0] for i in range(6))
    assert whole == placed(films.expand(-1, 3, -1, -1), before, planner())


def test_real_slots_and_hosts_without_lungs_stay_as_they_are():
    plan = planner()
    real = [plan.decide((0, 0, i), i, eligible=False) for i in range(2)]
    mixed = [*real, *slots(2, 2)]
    assert placed(torch.zeros(4, 1, 64, 64), mixed, plan) == tuple(mixed)
    assert placed(torch.zeros(2, 1, 64, 64), real, plan) == tuple(real)


def test_where_no_draw_suits_the_first_one_stays(monkeypatch):
    def corner(images, field=None):
        lungs = torch.zeros(len(images), 64, 64, dtype=torch.bool)
        lungs[:, 0, 0] = True
        return lungs

    monkeypatch.setattr("carim_aug.location.placement.lung_masks", corner)
    monkeypatch.setattr("carim_aug.location.placement.KEPT_OUTSIDE", 0.0)
    before = slots(3)
    assert placed(torch.zeros(3, 1, 32, 32), before, planner()) == tuple(before)


def test_acceptance_draws_nothing_from_a_slots_own_stream():
    key = (0, 0, 5)
    assert stream(*key).random() != stream(*key, 0).random()


class Chests(Dataset):
    """Phantom chests without a nodule, framed differently."""

    def __init__(self, n=24):
        chests = [phantom_chest(64, seed=i) for i in range(n)]
        self.images = [c.roll((i % 7 - 3, i % 5 - 2), (1, 2)) for i, c in enumerate(chests)]
        self.targets = [0] * n

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def test_grafts_lie_alike_in_any_loader_and_in_the_data_set():
    def rows(batch_size, **options):
        mix = make_mix(p=0.7, insertion="graft")
        loader = mix.loader(Chests(), batch_size=batch_size, **options)
        return [slot for _ in loader for slot in loader.last_params.slots]

    one = rows(1)
    assert any(len(slot.key) == 4 for slot in one)  # some were drawn again
    assert one == rows(7) == rows(24) == rows(5, num_workers=2)
    wrapped = make_mix(p=0.7, insertion="graft").wrap(Chests())
    assert one == [wrapped.slot(i) for i in range(24)]
    unseen = make_mix(p=0.7, insertion="graft", placement="prior").wrap(Chests())
    assert [s.key[:3] for s in one] == [unseen.slot(i).key for i in range(24)] and one != [
        unseen.slot(i) for i in range(24)
    ]


def test_an_unknown_placement_is_refused():
    with pytest.raises(ValueError, match=r"placement must be one of \('host', 'prior'\) or a function.*, got 'lungs'"):
        make_mix(placement="lungs")
