"""Whole images and twin differences from masks and seeds: pure functions of each row, in any batch."""

import copy
import io
import pickle

import pytest
import torch
from tiny import generator, global_states_untouched
from torch.nn.utils import parametrize

from carim_aug import WholeImageGenerator, WorkerDeviceError
from carim_aug.generators import base
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import noise

SMALL = GeneratorConfig(16, 4, 4, (3, 3), (1, 0), 2, joint=True)


def masks_of(n):
    """n masks with a box each, but every third without."""
    return boxes_to_masks([torch.tensor([[2.0 + i, 3, 12 + i, 15]])[: int(i % 3 < 2)] for i in range(n)], 32)


def test_an_image_is_the_networks_for_the_noise_of_its_seed():
    masks, seeds = masks_of(5), [3, 1, 2**63 - 1, 1, 0]
    images = generator().images(masks, seeds)
    assert images.shape == (5, 1, 32, 32) and images.dtype == torch.float32 and images.abs().max() <= 1
    torch.testing.assert_close(images, generator().network(noise(seeds, 16), masks), rtol=0, atol=1e-5)
    for dtype in (torch.bool, torch.uint8, torch.float64):
        assert torch.equal(images, generator().images(masks.to(dtype), seeds)) and not images.requires_grad
    assert (images[1] - images[3]).abs().max() > 1e-4  # the same seed, another mask
    assert generator().images(masks[:0], []).shape == (0, 1, 32, 32)


def test_a_residual_is_nodule_less_normal_of_the_same_seed_whatever_the_region():
    masks, seeds = masks_of(4), [5, 6, 7, 8]
    twins = generator().images(masks, seeds) - generator().images(torch.zeros_like(masks), seeds)
    residuals = generator().residuals(torch.rand(4, 1, 32, 32), masks, seeds)
    torch.testing.assert_close(residuals, twins, rtol=0, atol=1e-5)
    assert residuals[:2].abs().max() > 1e-3 and residuals[2].abs().max() == 0  # the third mask is empty
    assert torch.equal(residuals, generator().residuals(torch.zeros(4, 1, 32, 32), masks, seeds))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_no_row_depends_on_its_batch(batch_size):
    masks, seeds, parts = masks_of(7), list(range(7)), generator().configure(batch_size=batch_size)
    for make in (lambda g, *a: g.images(*a), lambda g, *a: g.residuals(a[0], *a)):
        every = make(generator(), masks, seeds)
        torch.testing.assert_close(make(parts, masks, seeds), every, rtol=0, atol=1e-5)
        torch.testing.assert_close(make(parts, masks[-1:], seeds[-1:]), every[-1:], rtol=0, atol=1e-5)


def test_generating_touches_neither_random_states_nor_weights_nor_inputs():
    masks, digest, fresh = masks_of(3), generator().weights_hash, generator().configure()
    before = masks.clone()
    with global_states_untouched():
        images = copy.deepcopy(generator()).images(masks, [1, 2, 3])
    assert torch.equal(masks, before) and generator().weights_hash == digest
    with torch.inference_mode():
        inferred = fresh.images(masks, [1, 2, 3]).clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fresh.images(masks, [1, 2, 3])
    assert torch.is_grad_enabled() and torch.equal(images, inferred) and torch.equal(images, cast)
    weight = torch.ones(1, requires_grad=True)
    (cast * weight).sum().backward()  # a classifier can train on them
    assert weight.grad.isfinite().all()


def test_configure_shares_the_weights_and_changes_the_arithmetic():
    plain = generator()
    other = plain.configure(dtype=torch.bfloat16, batch_size=2)
    assert other.network is plain.network and other.weights_hash == plain.weights_hash and other is not plain
    images = other.images(masks_of(4), range(4))
    assert images.dtype == torch.float32
    assert 0 < (images - plain.images(masks_of(4), range(4))).abs().mean() < 0.02
    for batch_size in (0, -3, 2.0, "32", True, None):
        with pytest.raises(ValueError, match="render_batch_size must be an integer of at least 1, got"):
            plain.configure(batch_size=batch_size)
    with pytest.raises(ValueError, match="dtype must be torch.float32, torch.bfloat16 or 'auto', got torch.float16"):
        plain.configure(dtype=torch.float16)


@pytest.mark.parametrize(
    ("masks", "seeds", "rule"),
    [
        (torch.zeros(64, 1, 32, 32), range(32), r"masks must be .* with B = 32, got \(64, 1, 32, 32\)"),
        (torch.full((1, 1, 32, 32), 0.5), [1], r"masks must be 0 or 1 everywhere, got 0.5 at \(0, 0, 0, 0\)"),
        (torch.full((1, 1, 32, 32), torch.nan), [1], "masks must be finite, got nan"),
        (torch.zeros(1, 1, 32, 32), [-1], "must be from 0 to .* got -1"),
        (torch.zeros(1, 1, 32, 32), [0.5], "must be integers, got 0.5"),
    ],
)
def test_masks_and_seeds_that_do_not_fit_are_named(masks, seeds, rule):
    for make in (generator().images, lambda *args: generator().residuals(masks, *args)):
        with pytest.raises((ValueError, TypeError), match=rule):
            make(masks, seeds)


def test_a_network_may_be_a_name_numbers_or_itself():
    tiny = ARCHITECTURES["tiny"]
    network = MultiScaleGenerator(tiny)
    made = [WholeImageGenerator(n) for n in ("tiny", tiny.to_dict(), tiny, network)]
    assert [(g.config, g.image_size, g.noise_dim, g.provenance) for g in made] == [(tiny, 32, 16, {})] * 4
    assert made[3].network is network and not any(m.training for g in made for m in g.network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    for wrong, error, rule in (
        ("huge512", ValueError, r"network must be one of \[.*'tiny'\], got 'huge512'"),
        ({"image_size": 32, "depth": 3}, ValueError, "architecture must hold GeneratorConfig's fields, got .*depth"),
        (256, TypeError, "network must be a MultiScaleGenerator, got int"),
    ):
        with pytest.raises(error, match=rule):
            WholeImageGenerator(wrong)


# --- Copies and devices ---
def torch_saved(made):
    torch.save(made, buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), torch_saved])
def test_a_copy_makes_the_same_and_shares_nothing(again):
    original = WholeImageGenerator(SMALL).configure(batch_size=3)
    original.provenance = {"training_data": "a phantom"}
    masks, seeds = torch.zeros(2, 1, 16, 16), [1, 2]
    images, digest = original.images(masks, seeds), original.weights_hash
    with global_states_untouched():
        other = again(original)
    assert type(other) is WholeImageGenerator and not other._fused and other._batch_size == 3
    assert (other.config, other.provenance, other.weights_hash) == (SMALL, original.provenance, digest)
    assert torch.equal(other.images(masks, seeds), images)
    assert not any(p.requires_grad for p in other.network.parameters())
    for module in other.network.modules():
        assert not module.training
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    for tensor in (*other.network.parameters(), *other.network.buffers()):
        tensor.data.zero_()
    assert original.weights_hash == digest and torch.equal(original.configure().images(masks, seeds), images)


def test_a_device_is_checked_where_the_masks_are(monkeypatch):
    masks = torch.zeros(1, 1, 32, 32, device="meta")
    with pytest.raises(ValueError, match="device must be one that this machine has, got 'meta'"):
        generator().images(masks, [1])
    monkeypatch.setattr(base, "get_worker_info", lambda: "a worker")
    with pytest.raises(WorkerDeviceError, match="got 'meta'"):
        generator().images(masks, [1])
    assert torch.device("meta") not in generator()._fused
