import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Images, Records, Samples, make_mix
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, WeightedRandomSampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug import ImageError, LabelError, MixLoader, RangeError


def to_dict(items):
    images, labels = default_collate(items)
    return {"pixel_values": images, "labels": labels}


# --- Length and batches ---
@given(n=st.integers(1, 25), batch_size=st.integers(1, 30), drop_last=st.booleans(), added=st.integers(0, 8))
def test_the_length_is_the_number_of_batches_and_only_the_last_is_odd(n, batch_size, drop_last, added):
    mix, total = make_mix(n_synthetic={"Nodule": added}, placement="prior"), n + added
    loader = mix.loader(Images(n, labels=[0] * n), batch_size=batch_size, drop_last=drop_last)
    sizes = [len(images) for images, _ in loader]
    assert len(sizes) == len(loader) and all(size == batch_size for size in sizes[:-1])
    assert len(loader.dataset) == total
    assert sum(sizes) == (total // batch_size * batch_size if drop_last else total)


def test_each_iteration_is_the_next_epoch_and_set_epoch_overrides():
    loader, epochs = make_mix().loader(Images(8), batch_size=8), []
    for _ in range(2):
        list(loader)
        epochs.append(loader.last_params.keys[0][1])
    loader.set_epoch(9)
    for _ in loader:
        loader.set_epoch(7)  # in a loop: for the next one
        epochs.append(loader.last_params.keys[0][1])
    assert loader.state_dict() == {"seed": 0, "epoch": 7, "step": 0}
    list(loader)
    assert [*epochs, loader.epoch] == [0, 1, 9, 7]


def test_last_params_are_those_of_the_batch_in_hand_and_pinned_memory_is_taken():
    mix = make_mix(p=0.5)
    loader = mix.loader(Images(16, labels=[0] * 16), batch_size=4, num_workers=2, pin_memory=True)
    for _, labels in loader:
        assert loader.last_params is mix.last_params
        assert labels.tolist() == loader.last_params.synthetic.int().tolist()


def test_batches_are_as_a_data_loader_makes_them():
    data = Samples(lambda i: (tv_tensors.Image(torch.full((1, 32, 32), 0.5)), 0), 4)
    ((images, labels),) = make_mix(p=1.0).loader(data, batch_size=4)
    assert type(images) is torch.Tensor and labels.dtype == torch.int64
    (record,) = make_mix(p=1.0, value_range="xrv").loader(Records(8), batch_size=8)
    assert isinstance(record, dict) and record["idx"].tolist() == list(range(8))
    assert record["lab"].shape == (8, 18) and record["lab"][:, 14:].isnan().all() and (record["lab"][:, 11] == 1).all()
    assert isinstance(record["img"], torch.Tensor) and record["img"].dtype == torch.float32
    for (images, labels), start in zip(make_mix(p=0.0).loader(Images(8), batch_size=4), (0, 4), strict=True):
        assert images[:, 0, 0, 0].tolist() == pytest.approx([(start + i) / 8 for i in range(4)])
        assert labels.tolist() == [0, 0, 0, 1]


def test_a_collate_fn_may_move_image_and_label_and_what_more_it_may_do_is_said():
    for layout in ("auto", (0, 1)):
        (batch,) = make_mix(p=1.0, layout=layout).loader(Images(8), batch_size=8, collate_fn=to_dict)
        assert set(batch) == {"pixel_values", "labels"} and batch["labels"].tolist() == [1] * 8

    def broken(items):
        raise RuntimeError("mine")

    for collate_fn, kind, match in (
        (lambda items: v2.CutMix(num_classes=2)(*default_collate(items)), LabelError, r"leave labels.*\(mix.wrap"),
        (lambda items: default_collate(items[:5]), ValueError, "must keep all 8 samples of a batch, got 5 images"),
        (broken, RuntimeError, "^mine$"),
    ):
        with pytest.raises(kind, match=match):
            list(make_mix(p=1.0).loader(Images(8), batch_size=8, collate_fn=collate_fn))


def test_training_scripts_find_the_attributes_of_a_dataloader_and_of_their_data_set():
    data, mix = Images(12, classes=["No Finding", "Nodule"]), make_mix(p=0.5)
    loader = mix.loader(data, batch_size=5, shuffle=True, drop_last=True, num_workers=2)
    assert isinstance(loader, MixLoader) and len(loader.batch_sampler) == 2 == len(loader)
    assert len(loader.sampler) == 12 and loader.num_workers == 2 and loader.drop_last and loader.batch_size == 5
    assert loader.dataset.dataset is data and loader.collate_fn is default_collate and not loader.pin_memory
    assert mix.loader(data, batch_sampler=BatchSampler(SequentialSampler(data), 5, False)).batch_size == 5
    assert mix.loader(data, batch_sampler=[[0, 1], [2]]).batch_size is None
    for mixed in (mix.wrap(data), loader.dataset):
        assert mixed.classes == ["No Finding", "Nodule"]
        assert mixed.targets == data.targets and not hasattr(mixed, "colour") and not hasattr(mixed, "labels")


# --- Samplers ---
def test_samplers_of_the_users_are_taken_if_they_reach_added_samples():
    data, mix = Images(12), make_mix(n_synthetic={"Nodule": 5})
    wrapped, samplers = mix.wrap(data), (RandomSampler(data), WeightedRandomSampler([1.0] * 12, 10))
    for sampler in samplers:
        loader = make_mix(p=0.5).loader(data, batch_size=4, sampler=sampler)
        assert len(loader) == 3 and sum(len(x) for x, _ in loader) == len(sampler)
        for options in ({"sampler": sampler}, {"batch_sampler": BatchSampler(sampler, 4, False)}):
            with pytest.raises(ValueError, match="over all 17 samples, the 5 synthetic ones too.*mix.wrap"):
                mix.loader(data, **options)
    assert sum(len(labels) for _, labels in mix.loader(wrapped, batch_size=4, sampler=RandomSampler(wrapped))) == 17
    loader = make_mix().loader(data, batch_sampler=BatchSampler(SequentialSampler(data), 5, True))
    assert len(loader) == 2 and [len(x) for x, _ in loader] == [5, 5]


def test_a_wrapped_data_set_is_planned_once_more_and_not_mixed_twice():
    mix, images = make_mix(n_synthetic={"Nodule": 4}), Images(12)
    wrapped = mix.wrap(images)
    loader = mix.loader(wrapped, batch_size=16)
    ((batch, _),) = loader
    assert loader.dataset.dataset is images and len(batch) == 16
    assert list(loader.last_params.decisions) == [wrapped.decision(i) for i in range(16)]
    loader.set_epoch(4)
    list(loader)
    assert wrapped.decision(14).key[1] == 0  # epochs of their own
    assert make_mix(p=0.5).loader(wrapped, batch_size=4).dataset.dataset is images


# --- Iterations ---
def test_two_iterations_of_one_loader_at_a_time_are_refused():
    loader = make_mix().loader(Images(12), batch_size=4)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="make one loader for each loop"):
        next(first)
    assert len(list(second)) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_off_epoch_is_followed_by_the_next_and_enabled_is_seen_by_live_workers(workers):
    mix, rows = make_mix(p=1.0, placement="prior"), []
    options = dict(batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    loader = mix.loader(Images(12, labels=[0] * 12), **options)
    for _ in loader:
        break
    assert loader.state_dict() == {"seed": 0, "epoch": 0, "step": 1}
    for enabled in (False, True):
        mix.enabled = enabled
        for _, labels in loader:
            rows += zip(loader.last_params.keys, labels.tolist(), strict=True)
    assert rows == [((0, epoch, i), epoch - 1) for epoch in (1, 2) for i in range(12)]


# --- Bad arguments and samples ---
@pytest.mark.parametrize("batch_size", [0, -1, None, 2.5, "4", True])
def test_a_bad_batch_size_is_named(batch_size):
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got"):
        make_mix().loader(Images(4), batch_size=batch_size)


def test_arguments_that_exclude_each_other_and_states_of_another_loader_are_named():
    images, mix = Images(8), make_mix()
    batches, sampler = BatchSampler(SequentialSampler(images), 4, False), RandomSampler(images)
    for more in ({"batch_size": 4}, {"shuffle": True}, {"drop_last": True}, {"sampler": sampler}):
        with pytest.raises(ValueError, match="batch_sampler must be given without"):
            mix.loader(images, batch_sampler=batches, **more)
    with pytest.raises(ValueError, match="shuffle must be False with a sampler, got True"):
        mix.loader(images, batch_size=4, shuffle=True, sampler=sampler)
    with pytest.raises(TypeError, match="dataset must be what mix.wrap returns, got Images"):
        MixLoader(images, batch_size=4)
    for seed, step, match in ((4, 0, "this mix's seed 0, got 4"), (0, 3, r"step must be in \[0, 2\], got 3")):
        with pytest.raises(ValueError, match=match):
            mix.loader(images, batch_size=4).load_state_dict({"seed": seed, "epoch": 0, "step": step})


BRIGHT = Samples(lambda i: (torch.full((1, 32, 32), 200.0 if i == 5 else 0.5), 0), 8)
GROWING = Samples(lambda i: (torch.zeros(1, 32 + i % 4, 32), 0), 8)  # each image a row higher than the one before
LABELLED = Images(8, labels=[0, 1, 0, 1, 0, 7, 0, 0], targets=False)


@pytest.mark.parametrize(
    ("data", "kind", "match", "workers"),
    [
        (BRIGHT, RangeError, r"images must lie in \[0, 1\].*got values from 0.5 to 200.*'uint8'", 0),
        (LABELLED, LabelError, "labels must be from 0 to 1 .*got 7", 0),
        (GROWING, ImageError, r"one shape within a batch, got \(1, 32, 32\) and \(1, 35, 32\)", 0),
        pytest.param(GROWING, ImageError, "one shape within a batch, got", 1, marks=pytest.mark.train),  # takes 5 s
    ],
    ids=["range", "label", "sizes", "in a worker"],
)
def test_a_bad_sample_is_named_with_its_rule(data, kind, match, workers):
    with pytest.raises(kind, match=match):
        list(make_mix().loader(data, batch_size=4, num_workers=workers))
