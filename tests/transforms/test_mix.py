import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Images, batch, generator, make_mix, named, prior
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from carim_aug import MixParams, SyntheticNoduleMix, ValueRange
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.transforms.mix import _rank


# --- What comes out ---
def test_normal_images_change_and_others_are_the_very_objects():
    images, labels = batch()
    mix = make_mix(p=0.0)
    out = mix(images, labels)
    assert isinstance(out, tuple) and out[0] is images and out[1] is labels and mix.state_dict()["step"] == 8
    mix.p = 1.0  # holds from the next batch on
    mixed, marked = mix(images, labels)
    assert mix.last_params.synthetic.tolist() == (labels == 0).tolist() and marked.tolist() == [1] * 8
    assert [torch.equal(a, b) for a, b in zip(mixed, images, strict=True)] == (labels == 1).tolist()
    mix.enabled, state, params = False, mix.state_dict(), mix.last_params
    assert mix(images, labels)[0] is images and mix.state_dict() == state and mix.last_params is params
    mix.enabled = True
    assert mix(images, labels)[0] is not images


def structures():
    images, labels = batch()
    return {
        "more arguments": (images, labels, ["a"] * 8),
        "a tuple": ((images, labels),),
        "a list": ([images, labels],),
        "a dict": ({"id": torch.arange(8), "label": labels, "image": images},),
        "torchxrayvision": ({"idx": torch.arange(8), "lab": torch.zeros(8, 18), "img": images * 2048 - 1024},),
        "tv_tensors": (tv_tensors.Image(images), labels),
        "numpy": (images.numpy(), labels.numpy()),
    }


@pytest.mark.parametrize("name", structures())
def test_the_output_has_the_structure_of_the_input(name):
    inputs = structures()[name]
    xrv = {"value_range": "xrv", "labels": named(18)} if name == "torchxrayvision" else {}
    out = make_mix(p=1.0, **xrv)(*inputs)
    sample = inputs if len(inputs) > 1 else inputs[0]
    assert type(out) is type(sample) and len(out) == len(sample)
    for key in sample if isinstance(sample, dict) else range(len(sample)):
        assert type(out[key]) is type(sample[key])
        assert (out[key] is sample[key]) is (key in ("idx", "id", 2))


def test_a_labels_getter_finds_the_label_at_any_depth():
    images, labels = batch()
    mix = make_mix(p=1.0, labels_getter=lambda sample: sample["findings"]["nodule"])
    sample = {"findings": {"sex": ["F"] * 8, "nodule": labels}, "scan": images}
    mixed, expected = mix(sample), make_mix(p=1.0)(images, labels)
    assert torch.equal(mixed["scan"], expected[0]) and torch.equal(mixed["findings"]["nodule"], expected[1])
    assert mixed["findings"]["sex"] == ["F"] * 8 and sample["scan"] is images and labels.sum() == 2


def test_it_stands_among_other_v2_transforms_of_batches():
    images, labels = batch()
    expected, marked = make_mix(p=1.0)(images, labels)
    mixed, again = v2.Compose([make_mix(p=1.0), v2.Normalize([0.5], [0.5])])(tv_tensors.Image(images), labels)
    assert type(mixed) is tv_tensors.Image and torch.equal(again, marked)
    torch.testing.assert_close(mixed.as_subclass(torch.Tensor), (expected - 0.5) / 0.5)
    cut, soft = v2.Compose([make_mix(p=1.0), v2.CutMix(num_classes=2)])(images, labels)
    assert cut.shape == images.shape and soft.shape == (8, 2)
    assert torch.equal(nn.Sequential(make_mix(p=1.0))((images, labels))[0], expected)


LABELS = {  # n labels without a nodule, and the nodule's column
    "integer": (lambda n: torch.zeros(n, dtype=torch.long), None),
    "int32": (lambda n: torch.zeros(n, dtype=torch.int32), None),
    "numpy": (lambda n: np.zeros(n, dtype=np.int16), None),
    "one-hot": (lambda n: torch.tensor([[1.0, 0.0]]).repeat(n, 1), 1),
    "soft": (lambda n: torch.tensor([[0.9, 0.1]]).repeat(n, 1).double(), 1),
    "14": (lambda n: torch.zeros(n, 14), 5),
    "bool": (lambda n: torch.zeros(n, 14, dtype=torch.bool), 5),
    "18 with NaN": (lambda n: torch.zeros(n, 18).index_fill(1, torch.tensor([15, 17]), torch.nan), 11),
    "one column": (lambda n: torch.zeros(n, 1), 0),
}


@given(
    n=st.integers(1, 4),
    size=st.tuples(st.integers(16, 90), st.integers(16, 90)) | st.sampled_from([(224, 224), (512, 512)]),
    channels=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    spec=st.sampled_from(["auto", "xrv", "imagenet", "symmetric", (0.0, 4095.0), {"mean": 0.5, "std": 0.2}]),
    kind=st.sampled_from(sorted(LABELS)),
    insertion=st.sampled_from(["whole", "graft"]),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_good_batch_comes_back_in_its_own_form(n, size, channels, dtype, spec, kind, insertion, p, seed):
    spec = "auto" if dtype == torch.uint8 else spec
    channels = 3 if spec == "imagenet" else channels
    plain = torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(seed % 2**63)) * 2 - 1
    value_range, (make, column) = ValueRange.of(spec), LABELS[kind]
    images, labels = value_range.from_symmetric(plain, channels=channels, dtype=dtype), make(n)
    before = images.clone()
    names = named(labels.shape[1] if labels.ndim == 2 and labels.shape[1] > 1 else None)
    mix = make_mix(p=p, insertion=insertion, value_range=spec, seed=seed, labels=names)
    mixed, marked = mix(images, labels)

    assert torch.equal(images, before) and np.array_equal(labels, make(n), equal_nan=kind == "18 with NaN")
    assert (mixed.shape, mixed.dtype, mixed.device) == (images.shape, images.dtype, images.device)
    assert (type(marked), marked.shape, marked.dtype) == (type(labels), labels.shape, labels.dtype)
    marked = torch.as_tensor(marked)
    assert torch.equal(marked.isnan(), torch.as_tensor(labels).isnan())
    value_range.check(mixed)
    params = mix.last_params
    assert params.sizes == (size,) * n and len(params.decisions) == n
    assert p not in (0.0, 1.0) or params.synthetic.tolist() == [bool(p)] * n
    assert ((marked if column is None else marked[:, column]) >= 0.5).tolist() == params.synthetic.tolist()
    assert all(made or torch.equal(a, b) for made, a, b in zip(params.synthetic, mixed, images, strict=True))
    assert torch.equal(params.masks, boxes_to_masks(params.boxes, size))
    again = mix(images, labels, params=params)
    assert torch.equal(again[0], mixed) and torch.equal(torch.as_tensor(again[1]).nan_to_num(-1), marked.nan_to_num(-1))


# --- Params, provenance and replay ---
def test_make_params_has_no_effect_and_transform_applies_them():
    images, labels = batch(size=(64, 64))
    options = dict(p=0.7, strength=(0.5, 2.0), gate=lambda seen: torch.tensor([bool(b[0, 0] < 40) for b in seen.boxes]))
    mix, other = make_mix(**options), make_mix(**options)
    params = mix.make_params([images, labels])
    assert params == mix.make_params([images, labels]) and not params.placed
    assert mix.state_dict()["step"] == 0 and mix.last_params is None and mix.gate_report()["candidates"] == 0
    mixed, marked, applied = mix.transform(images, labels, params)
    assert applied.placed and mix.state_dict()["step"] == 0 and mix.gate_report()["candidates"] > 0

    expected = other(images, labels)
    assert torch.equal(mixed, expected[0]) and torch.equal(marked, expected[1]) and applied == other.last_params
    assert other.state_dict()["step"] == 8 and other.make_params([images, labels]) != params
    again = other(images, labels, params=other.last_params)
    assert torch.equal(again[0], mixed) and torch.equal(again[1], marked)
    assert other.state_dict()["step"] == 8 and other.gate_report() == mix.gate_report()


def test_a_synthetic_image_is_generated_again_from_its_key():
    mix, other = make_mix(p=1.0, seed=8, insertion="whole"), make_mix(seed=1)
    mixed, _ = mix(*batch(6))
    params = mix.last_params
    assert params.weights_hash == other.generator.weights_hash
    for i in params.synthetic.nonzero()[:, 0].tolist():
        image, mask, boxes = other.regenerate(params.keys[i])
        assert torch.allclose((image + 1) / 2, mixed[i], atol=1e-5)
        assert torch.equal(mask, params.masks[i]) and torch.equal(boxes, params.boxes[i])
    image, mask, boxes = other.regenerate((0, 0, 0), "normal")
    assert mask.sum() == 0 and boxes.shape == (0, 4)


@pytest.mark.parametrize("insertion", ["graft", "whole"])
def test_params_pickle_and_replay_in_another_mix_and_at_another_size(insertion):
    mix = make_mix(p=0.5, insertion=insertion)
    mixed = mix(*batch())
    params = pickle.loads(pickle.dumps(mix.last_params))
    assert isinstance(params, MixParams) and params == mix.last_params
    for other in (make_mix(p=0.0, seed=99), make_mix(p={"No Finding": 1.0}, insertion="whole")):
        assert all(torch.equal(a, b) for a, b in zip(other(*batch(), params=params), mixed, strict=True))
    mix(*batch(size=(64, 96)), params=params)
    assert mix.last_params.sizes == ((64, 96),) * 8 and mix.last_params.decisions == params.decisions


# --- State, copies, surroundings ---
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda mix: pickle.loads(pickle.dumps(mix))])
def test_a_copy_or_a_mix_with_the_state_goes_on_alike_and_stands_alone(copied):
    mix, fresh = make_mix(p=0.5, seed=7), make_mix(p=0.5, seed=7)
    mix.set_epoch(2)
    mix(*batch())
    other, state = copied(mix), mix.state_dict()
    fresh.load_state_dict(state)
    assert state == other.state_dict() == {"seed": 7, "epoch": 2, "step": 8}
    expected = mix(*batch(seed=1))
    for one in (other, fresh):
        assert all(torch.equal(a, b) for a, b in zip(one(*batch(seed=1)), expected, strict=True))
    assert repr(other) == repr(mix) == "SyntheticNoduleMix(p=0.5, insertion='graft', seed=7)"
    assert other._epoch.is_shared()
    if copied is not copy.copy:
        other.set_epoch(5)
        other.enabled = False
        assert mix.enabled and mix.state_dict()["epoch"] == 2 and other.state_dict()["step"] == 0


def test_a_model_that_holds_a_mix_has_no_part_of_the_generator():
    model = nn.Module()
    model.head, model.mix = nn.Linear(2, 2), make_mix()
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert len(list(model.parameters())) == 2 and not list(model.mix.buffers())
    model.load_state_dict(model.state_dict(), strict=True)
    model.to(torch.float64).train()
    assert model.mix.generator is generator() and model.mix.prior is prior()
    assert next(generator().network.parameters()).dtype == torch.float32 and not generator().network.training
    assert sum(1 for _ in model.mix.modules()) == 1
    assert torch.equal(copy.deepcopy(model).mix(*batch())[1], model.mix(*batch())[1])


def test_ranks_of_a_process_group_and_workers_draw_their_own(monkeypatch):
    mix, images, rows = make_mix(p=0.5), Images(64, labels=[0] * 64), []
    options = dict(collate_fn=lambda items: mix(*default_collate(items)), multiprocessing_context="fork")
    labels = [y.tolist() for _, y in DataLoader(images, batch_size=16, num_workers=2, **options)]
    assert len({tuple(y) for y in labels}) == 4 and _rank() == 0
    for rank in (0, 1):
        monkeypatch.setattr("carim_aug.transforms.mix._rank", lambda rank=rank: rank)
        mix = make_mix()
        mix(*batch())
        rows.append(mix.last_params.keys)
    assert rows[0] != rows[1] and rows[0][0] == (0, 0, 0)


def test_saved_parts_are_put_together(tmp_path):
    make_mix().save_pretrained(tmp_path)
    mix = SyntheticNoduleMix.from_pretrained(tmp_path, p=1.0, seed=4, placement="prior")
    assert mix.generator.weights_hash == generator().weights_hash
    assert all(torch.equal(a, b) for a, b in zip(mix(*batch()), make_mix(p=1.0, seed=4)(*batch()), strict=True))
