import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Films, Records, make_mix
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, WeightedRandomSampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug import ImageError, LabelError, MixLoader, RangeError


class TVFilms(Films):
    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return tv_tensors.Image(image), label


def to_dict(items):
    images, labels = default_collate(items)
    return {"pixel_values": images, "labels": labels}


def one_hot(items):
    images, labels = default_collate(items)
    return images, torch.eye(2)[labels]


# --- Length and batches ---
@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 25), batch_size=st.integers(1, 30), drop_last=st.booleans(), added=st.integers(0, 8))
def test_the_length_is_the_number_of_batches_and_only_the_last_is_odd(n, batch_size, drop_last, added):
    mix = make_mix(n_synthetic={"Nodule": added})
    loader = mix.loader(Films(n), batch_size=batch_size, drop_last=drop_last)
    sizes = [len(images) for images, _ in loader]
    assert len(sizes) == len(loader) and all(size == batch_size for size in sizes[:-1])
    assert len(loader.dataset) == n + added and sum(sizes) == (
        (n + added) // batch_size * batch_size if drop_last else n + added
    )


def test_each_iteration_is_the_next_epoch_and_set_epoch_overrides():
    loader = make_mix().loader(Films(8), batch_size=8)
    epochs = []
    for _ in range(2):
        list(loader)
        epochs.append(loader.last_params.keys[0][1])
    loader.set_epoch(9)
    list(loader)
    epochs.append(loader.last_params.keys[0][1])
    list(loader)
    assert [*epochs, loader.epoch] == [0, 1, 9, 10]


def test_last_params_are_those_of_the_batch_in_hand():
    mix = make_mix(p=0.5)
    loader = mix.loader(Films(40, labels=[0] * 40), batch_size=8, num_workers=2)
    for _, labels in loader:
        assert loader.last_params is mix.last_params
        assert labels.tolist() == loader.last_params.synthetic.int().tolist()


def test_batches_are_as_a_data_loader_makes_them():
    ((images, labels),) = make_mix(p=1.0).loader(TVFilms(8), batch_size=8)
    assert type(images) is torch.Tensor and labels.dtype == torch.int64
    (record,) = make_mix(p=1.0, value_range="xrv").loader(Records(8), batch_size=8)
    assert isinstance(record, dict) and record["idx"].tolist() == list(range(8))
    assert record["lab"].shape == (8, 18) and record["lab"][:, 14:].isnan().all() and (record["lab"][:, 11] == 1).all()
    assert isinstance(record["img"], torch.Tensor) and record["img"].dtype == torch.float32


def test_a_batch_with_nothing_selected_is_the_collated_one():
    loader = make_mix(p=0.0).loader(Films(8), batch_size=4)
    for (images, labels), start in zip(loader, (0, 4), strict=True):
        assert images[:, 0, 0, 0].tolist() == pytest.approx([(start + i) / 8 for i in range(4)])
        assert labels.tolist() == [0, 0, 0, 1]


def test_a_collate_fn_may_move_image_and_label():
    (batch,) = make_mix(p=1.0).loader(Films(8), batch_size=8, collate_fn=to_dict)
    assert set(batch) == {"pixel_values", "labels"} and batch["labels"].tolist() == [1] * 8


def test_a_collate_fn_that_makes_other_labels_or_drops_samples_is_refused():
    with pytest.raises(LabelError, match="labels must be"):
        list(make_mix(p=1.0).loader(Films(8), batch_size=8, collate_fn=one_hot))
    loader = make_mix(p=1.0).loader(Films(8), batch_size=8, collate_fn=lambda items: default_collate(items[:5]))
    with pytest.raises(ValueError, match="collate_fn must keep all 8 samples of a batch, got 5 images"):
        list(loader)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_pinned_memory_is_taken():
    loader = make_mix(p=1.0).loader(Films(8), batch_size=8, num_workers=1, pin_memory=True)
    ((_, labels),) = loader
    assert labels.tolist() == [1] * 8 and isinstance(loader.last_params.slots, tuple)


# --- Samplers ---
def test_samplers_of_the_users_are_taken():
    films = Films(16)
    weights = [1.0 + 3 * y for y in films._labels]
    sampler = WeightedRandomSampler(weights, 12, generator=torch.Generator().manual_seed(0))
    loader = make_mix().loader(films, batch_size=5, sampler=sampler)
    assert len(loader) == 3 and sum(len(x) for x, _ in loader) == 12
    batches = BatchSampler(SequentialSampler(films), 6, True)
    loader = make_mix().loader(films, batch_sampler=batches)
    assert len(loader) == 2 and [len(x) for x, _ in loader] == [6, 6]


def test_a_sampler_inside_a_batch_sampler_is_told_the_epoch():
    class Told(SequentialSampler):
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    films = Films(8)
    loader = make_mix().loader(films, batch_sampler=BatchSampler(Told(films), 4, False))
    list(loader), list(loader)
    assert Told.epochs == [0, 1]


def test_a_data_set_that_wrap_gave_is_planned_once_more_and_not_mixed_twice():
    mix = make_mix(n_synthetic={"Nodule": 4})
    films = Films(12)
    wrapped = mix.wrap(films)
    loader = mix.loader(wrapped, batch_size=16)
    ((images, _),) = loader
    assert loader.dataset.dataset is films and len(images) == 16
    assert list(loader.last_params.slots) == [wrapped.slot(i) for i in range(16)]
    loader.set_epoch(4)
    list(loader)
    assert wrapped.slot(14).key[1] == 0  # epochs of their own
    assert make_mix(p=0.5).loader(wrapped, batch_size=4).dataset.dataset is films


def test_two_iterations_of_one_loader_at_a_time_are_refused():
    loader = make_mix().loader(Films(12), batch_size=4)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="make one loader for each loop"):
        next(first)
    assert len(list(second)) == 2


def test_a_broken_off_epoch_is_followed_by_the_next():
    for workers in (0, 1):
        loader = make_mix().loader(Films(40), batch_size=4, num_workers=workers, persistent_workers=workers > 0)
        for _ in loader:
            break
        assert loader.state_dict() == {"seed": 0, "epoch": 0, "step": 1}
        keys = []
        for _ in loader:
            keys += loader.last_params.keys
        assert keys == [(0, 1, i) for i in range(40)]


def test_set_epoch_in_a_loop_is_for_the_next_loop():
    loader = make_mix().loader(Films(12), batch_size=4)
    epochs = []
    for _ in loader:
        loader.set_epoch(7)
        epochs.append(loader.last_params.keys[0][1])
    assert epochs == [0, 0, 0] and loader.state_dict() == {"seed": 0, "epoch": 7, "step": 0}


def test_enabled_is_seen_by_workers_that_are_alive():
    mix = make_mix(p=1.0)
    loader = mix.loader(Films(16, labels=[0] * 16), batch_size=4, num_workers=1, persistent_workers=True)
    sums = []
    for enabled in (True, False, True):
        mix.enabled = enabled
        sums.append(sum(int(y.sum()) for _, y in loader))
    assert sums == [16, 0, 16]


# --- Bad arguments ---
@pytest.mark.parametrize("batch_size", [0, -1, None, 2.5, "4", True])
def test_a_bad_batch_size_is_named(batch_size):
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got"):
        make_mix().loader(Films(4), batch_size=batch_size)


def test_arguments_that_exclude_each_other_are_refused():
    films, mix = Films(8), make_mix()
    batches = BatchSampler(SequentialSampler(films), 4, False)
    for more in ({"batch_size": 4}, {"shuffle": True}, {"drop_last": True}, {"sampler": RandomSampler(films)}):
        with pytest.raises(ValueError, match="batch_sampler must be given without"):
            mix.loader(films, batch_sampler=batches, **more)
    with pytest.raises(ValueError, match="shuffle must be False with a sampler"):
        mix.loader(films, batch_size=4, shuffle=True, sampler=RandomSampler(films))
    with pytest.raises(TypeError, match="generator is not taken"):
        mix.loader(films, batch_size=4, generator=torch.Generator())


@pytest.mark.parametrize(
    ("state", "kind", "match"),
    [
        (None, TypeError, "state must be a dict"),
        ({"seed": 0, "epoch": 0}, ValueError, "state must have seed, epoch and step"),
        ({"seed": 4, "epoch": 0, "step": 0}, ValueError, "this mix's seed 0, got 4"),
        ({"seed": 0, "epoch": 0, "step": 3}, ValueError, r"step must be in \[0, 2\], got 3"),
    ],
)
def test_a_bad_state_is_named(state, kind, match):
    with pytest.raises(kind, match=match):
        make_mix().loader(Films(8), batch_size=4).load_state_dict(state)


def test_a_bad_image_in_a_worker_is_named_with_its_rule():
    class Bright(Films):
        def __getitem__(self, i):
            return torch.full((1, 32, 32), 200.0 if i == 5 else 0.5), 0

    for workers in (0, 1):
        with pytest.raises(RangeError, match=r"images must lie in \[0, 1\].*got values from 0.5 to 200.*'uint8'"):
            list(make_mix().loader(Bright(8), batch_size=4, num_workers=workers))


def test_a_bad_label_in_a_worker_is_named_with_its_rule():
    for workers in (0, 1):
        loader = make_mix().loader(
            Films(8, labels=[0, 1, 0, 1, 0, 7, 0, 0], targets=False), batch_size=4, num_workers=workers
        )
        with pytest.raises(LabelError, match="labels must be from 0 to 1 .*got 7"):
            list(loader)


def test_it_is_the_class_that_the_package_names():
    assert isinstance(make_mix().loader(Films(4)), MixLoader)
    assert np.isclose(len(make_mix().loader(Films(4))), 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_named():
    loader = make_mix(p=1.0, device="cuda").loader(Films(4), batch_size=2)
    with pytest.raises(ValueError, match="device must be one that this machine has, got 'cuda'"):
        next(iter(loader))


def test_its_batch_size_is_told():
    mix, films = make_mix(), Films(8)
    assert mix.loader(films, batch_size=3).batch_size == 3
    assert mix.loader(films, batch_sampler=BatchSampler(SequentialSampler(films), 5, False)).batch_size == 5
    assert mix.loader(films, batch_sampler=[[0, 1], [2]]).batch_size is None


class Growing(Films):
    """Each image a row higher than the one before."""

    def __getitem__(self, i):
        _, label = super().__getitem__(i)
        return torch.zeros(1, 32 + i, 32), label


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_sizes_in_a_batch_are_named(workers):
    loader = make_mix().loader(Growing(4), batch_size=4, num_workers=workers)
    with pytest.raises(ImageError, match=r"one shape within a batch, got \(1, 32, 32\) and \(1, 35, 32\)"):
        next(iter(loader))


def test_an_error_of_the_users_collate_fn_stays_as_it_is():
    def collate(items):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        next(iter(make_mix().loader(Films(4), batch_size=4, collate_fn=collate)))


def test_training_scripts_find_the_attributes_of_a_dataloader():
    data = Films(12)
    loader = make_mix(p=0.5).loader(data, batch_size=5, shuffle=True, drop_last=True, num_workers=2)
    assert len(loader.sampler) == 12 and loader.num_workers == 2 and loader.drop_last and loader.batch_size == 5
    assert loader.dataset.dataset is data and loader.collate_fn is default_collate and not loader.pin_memory
    assert len(loader.batch_sampler) == 2 == len(loader)


def test_a_sampler_of_the_real_samples_alone_is_refused_where_samples_are_added():
    data, mix = Films(12), make_mix(n_synthetic={"Nodule": 5})
    wrapped = mix.wrap(data)
    for sampler in (RandomSampler(data), WeightedRandomSampler([1.0] * 12, 20)):
        for options in ({"sampler": sampler}, {"batch_sampler": BatchSampler(sampler, 4, False)}):
            with pytest.raises(ValueError, match="over all 17 samples, the 5 synthetic ones too.*mix.wrap"):
                mix.loader(data, **options)
    assert sum(len(labels) for _, labels in mix.loader(wrapped, batch_size=4, sampler=RandomSampler(wrapped))) == 17
    assert len(make_mix(p=0.5).loader(data, batch_size=4, sampler=RandomSampler(data))) == 3


def test_a_collate_fn_that_mixes_labels_is_told_the_way():
    cutmix = v2.CutMix(num_classes=2)
    loader = make_mix(p=1.0).loader(Films(8), batch_size=8, collate_fn=lambda b: cutmix(*default_collate(b)))
    with pytest.raises(LabelError, match="collate_fn must leave labels.*DataLoader\\(mix.wrap"):
        list(loader)


def test_classes_are_passed_on_and_labels_are_told_apart():
    data = Films(8, classes=["No Finding", "Nodule"])
    for mixed in (make_mix(p=0.5).wrap(data), make_mix(p=0.5).loader(data, batch_size=2).dataset):
        assert mixed.classes == ["No Finding", "Nodule"]
        assert not hasattr(mixed, "targets") and not hasattr(mixed, "colour")
        with pytest.raises(AttributeError, match="those of the data set inside"):
            _ = mixed.labels
