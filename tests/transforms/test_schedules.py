"""Chances that change over the epochs."""

import pytest
import torch
from tiny import Films, make_mix

from carim_aug import CosineSchedule, LinearSchedule
from carim_aug.transforms.amounts import chances_of


def synthetic(mix, epoch):
    wrapped = mix.wrap(Films(200, labels=[0] * 200))
    mix.set_epoch(epoch)
    return sum(wrapped.planned.slot(i, True).synthetic for i in range(200))


def test_schedules_go_from_start_to_end_and_stay_there():
    linear, cosine = LinearSchedule(0.0, 0.8, epochs=5), CosineSchedule(0.8, 0.0, epochs=5)
    assert [linear(e) for e in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert cosine(0) == 0.8 and cosine(4) == cosine(9) == pytest.approx(0) and cosine(2) == pytest.approx(0.4)
    assert cosine(1) > 0.6


@pytest.mark.parametrize("values", [(1.5, 0.0, 3), (0.0, -0.1, 3), (0.0, 1.0, 1), (0.0, 1.0, 2.5)])
def test_bad_schedules_are_named(values):
    with pytest.raises(ValueError, match="must be"):
        LinearSchedule(*values)


def test_the_mix_follows_its_schedule_by_epoch_in_wrap_loader_and_class_counts():
    mix = make_mix(p=LinearSchedule(0.0, 1.0, epochs=3))
    assert [synthetic(mix, e) for e in (0, 2)] == [0, 200] and 60 < synthetic(mix, 1) < 140
    films = Films(64, labels=[0] * 64)
    loader = mix.loader(films, batch_size=16, num_workers=2)
    counts = []
    for _ in range(3):
        told = loader.class_counts()["Nodule"]["synthetic"]
        found = sum(int(labels.sum()) for _, labels in loader)
        assert told == found
        counts.append(found)
    assert counts[0] == 0 and counts[2] == 64 and 16 < counts[1] < 48


def test_any_function_of_the_epoch_will_do_and_a_dict_as_its_value():
    mix = make_mix(p=lambda epoch: {"Nodule": 0.5, "No Finding": 0.5} if epoch else 0.0)
    images, labels = torch.rand(32, 1, 32, 32), torch.zeros(32, dtype=torch.int64)
    assert mix(images, labels)[0] is images
    mix.set_epoch(1)
    mix(images, labels)
    assert bool(mix.last_params.synthetic.all()) and set(mix.last_params.classes) == {"Nodule", "No Finding"}


def test_a_function_that_gives_no_chance_is_refused_at_once():
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got 2"):
        make_mix(p=lambda epoch: 2.0)
    with pytest.raises(TypeError, match="p must be a number"):
        make_mix(p=lambda epoch: "often")
    assert chances_of(None, make_mix()._policy) == {}
