import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Films, generator, global_states_untouched, make_mix, prior
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug import LabelPolicy, MixParams, SyntheticNoduleMix, ValueRange
from carim_aug.ops.boxes import boxes_to_masks, feather
from carim_aug.transforms.mix import _rank


def batch(n=8, size=(32, 32), channels=1, seed=0):
    images = torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed))
    return images, torch.arange(n) % 4 // 3


# --- What comes out ---
def test_a_chance_of_zero_gives_back_the_very_objects():
    images, labels = batch()
    out = make_mix(p=0.0)(images, labels)
    assert isinstance(out, tuple) and out[0] is images and out[1] is labels


def test_a_chance_of_one_replaces_every_normal_image_and_no_other():
    images, labels = batch()
    mix = make_mix(p=1.0)
    mixed, marked = mix(images, labels)
    assert mix.last_params.synthetic.tolist() == (labels == 0).tolist() and marked.tolist() == [1] * 8
    assert [torch.equal(a, b) for a, b in zip(mixed, images, strict=True)] == (labels == 1).tolist()


def test_a_disabled_mix_gives_back_the_very_objects_and_counts_nothing():
    images, labels = batch()
    mix = make_mix(p=1.0)
    mix.enabled = False
    assert mix(images, labels)[0] is images and mix.state_dict()["step"] == 0 and mix.last_params is None
    mix.enabled = True
    assert mix(images, labels)[0] is not images


def test_nothing_of_the_callers_is_changed():
    images, labels = batch()
    before = images.clone(), labels.clone()
    for insertion in ("whole", "graft"):
        make_mix(p=1.0, insertion=insertion)(images, labels)
        assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


def test_a_grafted_image_is_the_real_one_outside_the_feathered_boxes():
    for dtype in (torch.uint8, torch.float32):
        images, labels = batch(size=(100, 73))
        images = (images * 255).to(torch.uint8) if dtype == torch.uint8 else images
        mix = make_mix(p=1.0, insertion="graft")
        mixed, marked = mix(images, labels)
        weight = feather(mix.last_params.boxes, (100, 73))
        assert torch.equal(mixed[weight == 0], images[weight == 0]) and mixed.dtype == dtype
        for i in (0, 1, 2):
            assert not torch.equal(mixed[i], images[i]) and marked[i] == 1


def structures():
    images, labels = batch()
    pair = default_collate([(image, int(y)) for image, y in zip(images, labels, strict=True)])
    return {
        "arguments": (images, labels),
        "more arguments": (images, labels, ["a"] * 8),
        "a tuple": ((images, labels),),
        "a list": (list(pair),),
        "a dict": ({"id": torch.arange(8), "label": labels, "image": images},),
        "torchxrayvision": ({"idx": torch.arange(8), "lab": torch.zeros(8, 18), "img": images * 2048 - 1024},),
        "tv_tensors": (tv_tensors.Image(images), labels),
        "numpy": (images.numpy(), labels.numpy()),
    }


@pytest.mark.parametrize("name", structures())
def test_the_output_has_the_structure_of_the_input(name):
    inputs = structures()[name]
    out = make_mix(p=1.0, value_range="xrv" if name == "torchxrayvision" else "auto")(*inputs)
    given_ = inputs if len(inputs) > 1 else inputs[0]
    assert type(out) is type(given_) and len(out) == len(given_)
    for key in given_ if isinstance(given_, dict) else range(len(given_)):
        assert type(out[key]) is type(given_[key])
        if key in ("idx", "id", 2):
            assert out[key] is given_[key]


def test_it_stands_among_other_v2_transforms_of_batches():
    images, labels = batch()
    mix = make_mix(p=1.0)
    expected, marked = mix(images, labels)
    other = make_mix(p=1.0)
    mixed, again = v2.Compose([other, v2.Normalize([0.5], [0.5])])(tv_tensors.Image(images), labels)
    assert type(mixed) is tv_tensors.Image and torch.equal(again, marked)
    torch.testing.assert_close(mixed.as_subclass(torch.Tensor), (expected - 0.5) / 0.5)
    cut, soft = v2.Compose([make_mix(p=1.0), v2.CutMix(num_classes=2)])(images, labels)
    assert cut.shape == images.shape and soft.shape == (8, 2)
    assert torch.equal(nn.Sequential(make_mix(p=1.0))((images, labels))[0], expected)


@settings(deadline=None, max_examples=200)
@given(
    n=st.integers(1, 4),
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    channels=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    spec=st.sampled_from(["auto", "xrv", "imagenet", "symmetric", (0.0, 4095.0), {"mean": 0.5, "std": 0.2}]),
    label=st.sampled_from(["integer", "int32", "one-hot", "soft", "14", "18 with NaN", "one column"]),
    insertion=st.sampled_from(["whole", "graft"]),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_good_batch_comes_back_in_its_own_form(n, height, width, channels, dtype, spec, label, insertion, p, seed):
    spec = "auto" if dtype == torch.uint8 else spec
    channels = 3 if spec == "imagenet" else channels
    plain = torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(seed % 2**63)) * 2 - 1
    ranged = ValueRange.of(spec)
    images = ranged.from_symmetric(plain, channels=channels, dtype=dtype)
    labels = {
        "integer": torch.zeros(n, dtype=torch.long),
        "int32": torch.zeros(n, dtype=torch.int32),
        "one-hot": torch.eye(2)[torch.zeros(n, dtype=torch.long)],
        "soft": torch.tensor([[0.9, 0.1]]).repeat(n, 1).double(),
        "14": torch.zeros(n, 14),
        "18 with NaN": torch.zeros(n, 18).index_fill(1, torch.tensor([15, 17]), torch.nan),
        "one column": torch.zeros(n, 1),
    }[label]
    before = images.clone(), labels.clone()
    mix = make_mix(p=p, insertion=insertion, value_range=spec, seed=seed)
    mixed, marked = mix(images, labels)

    assert torch.equal(images, before[0]) and torch.equal(labels.nan_to_num(-1), before[1].nan_to_num(-1))
    assert (mixed.shape, mixed.dtype, mixed.device) == (images.shape, images.dtype, images.device)
    assert (marked.shape, marked.dtype) == (labels.shape, labels.dtype)
    assert torch.equal(marked.isnan(), labels.isnan())
    ranged.check(mixed)
    params = mix.last_params
    assert params.size == (height, width) and len(params.slots) == n
    assert p not in (0.0, 1.0) or params.synthetic.tolist() == [bool(p)] * n
    column = {"one-hot": 1, "soft": 1, "14": 5, "18 with NaN": 11, "one column": 0}.get(label)
    nodule = marked if column is None else marked[:, column]
    assert (nodule >= 0.5).tolist() == params.synthetic.tolist()
    for i, made in enumerate(params.synthetic.tolist()):
        assert made or torch.equal(mixed[i], images[i])
    assert (
        channels == 1
        or spec == "imagenet"
        or insertion == "graft"
        or torch.equal(mixed[params.synthetic][:, 0], mixed[params.synthetic][:, 2])
    )
    assert torch.equal(params.masks, boxes_to_masks(params.boxes, (height, width)))

    again = mix(images, labels, params=params)
    assert torch.equal(again[0], mixed) and torch.equal(again[1].nan_to_num(-1), marked.nan_to_num(-1))


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (100, 73)])
def test_images_of_usual_sizes_are_mixed(size):
    mixed, _ = make_mix(p=1.0)(*batch(2, size=size, channels=3))
    assert mixed.shape == (2, 3, *size)


def test_a_wider_label_policy_is_followed():
    labels = torch.tensor([2, 0, 1, 2])
    mix = make_mix(p=1.0, labels=LabelPolicy(classes=("effusion", "nodule", "normal")))
    assert mix(batch(4)[0], labels)[1].tolist() == [1, 0, 1, 1]
    assert mix.last_params.synthetic.tolist() == [True, False, False, True]


def test_synthetic_normal_images_are_made_where_asked():
    mix = make_mix(p={"No Finding": 1.0}, eligible=lambda label: label == 1)
    assert mix(batch(8)[0], torch.ones(8, dtype=torch.long))[1].tolist() == [0] * 8
    assert all(len(boxes) == 0 for boxes in mix.last_params.boxes) and mix.last_params.synthetic.all()


def test_a_changed_chance_holds_from_the_next_batch_on():
    mix = make_mix(p=0.0)
    mix.p = 1.0
    assert (mix(*batch())[1] == 1).all()


def test_it_is_a_collate_fn_in_workers_and_each_worker_draws_its_own():
    mix = make_mix(p=0.5)
    loader = DataLoader(
        Films(64, labels=[0] * 64),
        batch_size=16,
        num_workers=2,
        collate_fn=lambda items: mix(*default_collate(items)),
        multiprocessing_context="fork",
    )
    labels = [y.tolist() for _, y in loader]
    assert len({tuple(y) for y in labels}) == 4


# --- Provenance and replay ---
def test_a_synthetic_image_is_generated_again_from_its_key():
    images, labels = batch(6)
    mix = make_mix(p=1.0, seed=8)
    mixed, _ = mix(images, labels)
    other = make_mix(seed=1)
    for i, (key, made) in enumerate(zip(mix.last_params.keys, mix.last_params.synthetic.tolist(), strict=True)):
        if made:
            image, mask, boxes = other.regenerate(key)
            assert torch.allclose((image + 1) / 2, mixed[i], atol=1e-5)
            assert torch.equal(mask, mix.last_params.masks[i]) and torch.equal(boxes, mix.last_params.boxes[i])
    assert mix.last_params.weights_hash == other.generator.weights_hash
    image, mask, boxes = other.regenerate((0, 0, 0), "normal")
    assert mask.sum() == 0 and boxes.shape == (0, 4)


def test_params_pickle_and_replay_in_another_mix():
    images, labels = batch()
    mix = make_mix(p=0.5)
    mixed = mix(images, labels)
    params = pickle.loads(pickle.dumps(mix.last_params))
    assert isinstance(params, MixParams) and params == mix.last_params
    again = make_mix(p=0.0, seed=99)(images, labels, params=params)
    assert torch.equal(again[0], mixed[0]) and torch.equal(again[1], mixed[1])


def test_a_replay_at_another_size_has_its_boxes_there():
    mix = make_mix(p=1.0)
    mix(*batch(2))
    params = mix.last_params
    mix(*batch(2, size=(64, 96)), params=params)
    assert mix.last_params.size == (64, 96) and mix.last_params.slots == params.slots


# --- State, copies, places in a user's model ---
def test_a_state_goes_on_where_it_was_taken():
    mix = make_mix(seed=3)
    mix.set_epoch(2)
    mix(*batch())
    state = mix.state_dict()
    assert state == {"seed": 3, "epoch": 2, "step": 8}
    expected = mix(*batch(seed=1))
    other = make_mix(seed=3)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other(*batch(seed=1)), expected, strict=True))
    mix.set_epoch(3)
    assert mix.state_dict() == {"seed": 3, "epoch": 3, "step": 0}


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda mix: pickle.loads(pickle.dumps(mix))])
def test_a_copy_does_the_same_and_stands_alone(copied):
    mix = make_mix(p=0.5, insertion="graft", seed=7)
    mix.set_epoch(1)
    mix(*batch())
    other = copied(mix)
    assert all(torch.equal(a, b) for a, b in zip(mix(*batch(seed=1)), other(*batch(seed=1)), strict=True))
    assert other.state_dict() == mix.state_dict() and other._epoch.is_shared()
    assert repr(other) == repr(mix) == "SyntheticNoduleMix(p=0.5, insertion='graft', seed=7)"
    if copied is not copy.copy:
        other.set_epoch(5)
        other.enabled = False
        assert mix.state_dict()["epoch"] == 1 and mix.enabled


def test_a_model_that_holds_a_mix_has_no_part_of_the_generator():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.mix = make_mix()

    model = Model()
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert len(list(model.parameters())) == 2 and not list(model.mix.buffers())
    model.load_state_dict(model.state_dict(), strict=True)
    model.to(torch.float64).train()
    assert next(model.mix.generator.parameters()).dtype == torch.float32 and not model.mix.generator.training
    assert sum(1 for _ in model.mix.modules()) == 1
    assert torch.equal(copy.deepcopy(model).mix(*batch())[1], model.mix(*batch())[1])


def test_calls_leave_the_generator_and_the_global_random_states_alone():
    digest = generator().weights_hash
    with global_states_untouched():
        mix = SyntheticNoduleMix(generator(), prior(), p=1.0)
        mix(*batch())
    assert generator().weights_hash == digest and mix.generator is generator() and mix.prior is prior()


def test_ranks_of_a_process_group_draw_their_own(monkeypatch):
    assert _rank() == 0
    rows = []
    for rank in (0, 1):
        monkeypatch.setattr("carim_aug.transforms.mix._rank", lambda rank=rank: rank)
        mix = make_mix()
        mix(*batch())
        rows.append(mix.last_params.keys)
    assert rows[0] != rows[1] and rows[0][0] == (0, 0, 0)


def test_pretrained_parts_are_put_together(tmp_path):
    generator().save_pretrained(tmp_path)
    prior().save(tmp_path / "prior.safetensors")
    mix = SyntheticNoduleMix.from_pretrained(tmp_path, p=1.0, seed=4)
    assert mix.generator.weights_hash == generator().weights_hash
    expected = make_mix(p=1.0, seed=4)(*batch())
    assert all(torch.equal(a, b) for a, b in zip(mix(*batch()), expected, strict=True))


def test_bool_rows_stay_bool():
    rows = torch.zeros(4, 14, dtype=torch.bool)
    marked = make_mix(p=1.0)(batch(4)[0], rows)[1]
    assert marked.dtype == torch.bool and marked.sum() == 4


def test_numpy_labels_keep_their_type():
    marked = make_mix(p=1.0)(batch(4)[0], np.zeros(4, dtype=np.int16))[1]
    assert marked.dtype == np.int16 and marked.tolist() == [1] * 4
