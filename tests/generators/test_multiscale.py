"""The mask-conditional generator (eq. 1 and 2 of Ann, 2021) and the layers it is made of."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from carim_aug.generators.blocks import ImageHead, Joint, Residual, Stem, Up, conv3x3, soften
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator
from carim_aug.ops.boxes import boxes_to_masks

LEAN = ARCHITECTURES["tiny"]
JOINT = GeneratorConfig(32, 16, 32, (24, 16, 8), (1, 1, 0), 2, joint=True)  # the scheme of Ann (2021), small
BOTH = pytest.mark.parametrize("config", [LEAN, JOINT], ids=["lean", "joint"])


def make(config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiScaleGenerator(config)


def inputs(config, batch=2):
    noise = torch.randn(batch, config.noise_dim, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(batch, 1, config.image_size, config.image_size)
    masks[:, :, :4, :4] = 1
    return noise, masks


def on_meta(name):
    # Shapes and counts need no values, and spectral norm changes neither.
    config = replace(ARCHITECTURES[name], spectral_norm=False)
    with torch.device("meta"):
        size = config.image_size
        return MultiScaleGenerator(config).eval(), torch.empty(1, config.noise_dim), torch.empty(1, 1, size, size)


# --- The network ---
@BOTH
def test_images_lie_in_the_value_range_and_are_the_last_of_the_pyramid(config):
    generator = make(config)
    images = generator(*inputs(config))
    assert torch.equal(images, make(config)(*inputs(config)))  # of the same seed
    assert (images - make(config, seed=4)(*inputs(config))).abs().max() > 1e-3
    assert images.shape == (2, 1, 32, 32) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert (generator.image_size, generator.noise_dim) == (32, 16)
    pyramid = generator.eval().pyramid(*inputs(config))
    assert [tuple(image.shape) for image in pyramid] == [(2, 1, 16, 16), (2, 1, 32, 32)]
    assert torch.equal(generator(*inputs(config)), pyramid[-1])
    (first,) = generator.pyramid(*inputs(config), scales=1)
    assert torch.equal(first, pyramid[0])


@BOTH
@torch.no_grad()
def test_same_noise_with_and_without_a_mask_is_a_matched_pair(config):
    generator, (noise, masks) = make(config).eval(), inputs(config, batch=3)
    nodule, normal = generator(noise, masks), generator(noise, torch.zeros_like(masks))
    change = (nodule - normal).abs()
    assert change[:, :, :4, :4].amax(dim=(1, 2, 3)).min() > 1e-4  # the mask acts where it is, in each pair
    if not config.joint:  # 4 px of mask, 8 + 4 + 2 px of reach of the doublings, 1 px of the head's
        assert change[:, :, 20:].max() == 0 and change[:, :, :, 20:].max() == 0
    torch.testing.assert_close(normal, generator(noise, torch.zeros_like(masks, dtype=torch.float64)))
    torch.testing.assert_close(normal[:1], generator(noise[:1], torch.zeros_like(masks[:1])), rtol=0, atol=1e-5)
    masks[1] = 0  # its own image of the batch changes, and no other
    expected = torch.stack([nodule[0], normal[1], nodule[2]])
    torch.testing.assert_close(generator(noise, masks), expected, rtol=0, atol=1e-6)


@BOTH
def test_gradients_reach_the_noise_and_every_weight(config):
    generator, (noise, masks) = make(config), inputs(config)
    noise.requires_grad_()
    sum(image.square().mean() for image in generator.pyramid(noise, masks)).backward()
    assert noise.grad.isfinite().all() and noise.grad.abs().max() > 0
    assert [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_thesis256_has_the_maps_scales_and_parameters_of_ann_2021():
    generator, noise, masks = on_meta("thesis256")
    shapes = []
    for module in (generator.stem, *generator.ups, *(joint for joint in generator.joints if isinstance(joint, Joint))):
        module.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    images = generator.pyramid(noise, masks)
    assert [tuple(image.shape) for image in images] == [(1, 1, 64, 64), (1, 1, 128, 128), (1, 1, 256, 256)]
    ups = [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64)]
    assert shapes == [*ups, (64, 64, 64), (32, 128, 128), (32, 128, 128), (16, 256, 256)]
    assert [len(blocks) for blocks in generator.residuals] == [0, 0, 0, 2, 2, 0]
    assert sum(p.numel() for p in generator.parameters()) == pytest.approx(16.4e6, rel=0.01)


@pytest.mark.parametrize(("name", "most"), [("fast128", 1.0), ("fast256", 1.0), ("thesis256", 6.4)])
def test_published_architectures_keep_within_their_multiply_adds(name, most):
    generator, noise, masks = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        generator(noise, masks)
    assert 0.5 * most < counter.get_total_flops() / 2e9 <= most
    assert (
        name.endswith(str(masks.shape[-1])) and GeneratorConfig(**ARCHITECTURES[name].to_dict()) == ARCHITECTURES[name]
    )


# --- Bad input ---
@pytest.mark.parametrize(
    ("noise", "masks", "scales", "rule"),
    [
        ((2, 15), (2, 1, 32, 32), 1, r"noise must be \(B, 16\), got \(2, 15\)"),
        ((16,), (2, 1, 32, 32), 1, r"noise must be \(B, 16\), got \(16,\)"),
        ((2, 16), (2, 32, 32), 2, r"masks must be \(B, 1, 32, 32\) with B = 2, got \(2, 32, 32\)"),
        ((2, 16), (3, 1, 32, 32), 2, r"masks must be .* got \(3, 1, 32, 32\)"),
        ((2, 16), (2, 1, 16, 16), None, r"masks must be .* got \(2, 1, 16, 16\)"),
        ((2, 16), (2, 1, 32, 32), 0, r"scales must be in \[1, 2\], got 0"),
        ((2, 16), (2, 1, 32, 32), 3, r"scales must be in \[1, 2\], got 3"),
    ],
)
def test_inputs_of_a_wrong_shape_and_scales_out_of_range_are_named(noise, masks, scales, rule):
    with pytest.raises(ValueError, match=rule):
        make(LEAN).pyramid(torch.zeros(noise), torch.zeros(masks), scales=scales)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"image_size": 100}, r"image_size must be 4 \* 2 \*\* len\(channels\) = 256, got 100"),
        ({"residuals": (0, 0)}, r"residuals must have one entry per channels entry \(6\), got 2"),
        ({"branches": 7}, r"branches must be in \[1, 6\], got 7"),
        ({"branches": 0}, r"branches must be in \[1, 6\], got 0"),
        ({"residuals": (0, 0, 0, 2, 2, 1)}, "residuals must end with 0 when joint is True"),
        ({"channels": (512, 256, 128, 64, 32, 0)}, "channels must be positive"),
        ({"noise_dim": 0}, "noise_dim"),
        ({"residuals": (0, 0, 0, -1, 2, 0)}, "residuals >= 0"),
    ],
)
def test_configs_that_do_not_fit_together_are_refused(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        GeneratorConfig(**wrong)


# --- Layers ---
def with_one_tap(block, channel):
    """The block with a batch norm that changes nothing, whose convolution hands on the middle pixel of a channel."""
    block.norm.eval().eps = 1e-12  # torch 2.11 refuses 0
    nn.init.ones_(block.norm.weight)
    nn.init.zeros_(block.conv.weight)
    with torch.no_grad():
        block.conv.weight[0, channel, 1, 1] = 1  # a = that channel, b = 0, so a * sigmoid(b) is half of it
    return block


def test_up_repeats_each_pixel_and_with_joint_takes_the_mask_as_its_last_channel():
    small = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    big = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(with_one_tap(Up(1, 1, masked=False, spectral=False), 0)(small), big / 2)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1, 2] = 1
    torch.testing.assert_close(with_one_tap(Up(1, 1, masked=True, spectral=False), 1)(small, mask), mask / 2)
    torch.testing.assert_close(with_one_tap(Joint(1, spectral=False), 1)(big, mask), mask / 2)


def test_residual_without_its_second_convolution_changes_nothing():
    block, hidden = Residual(3, spectral=False).eval(), torch.arange(48.0).view(1, 3, 4, 4)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(hidden), hidden)


def test_image_head_is_the_tanh_of_a_convolution():
    head = ImageHead(2, spectral=False)
    nn.init.constant_(head.conv.weight, 0.1)
    image = head(torch.ones(1, 2, 3, 3))
    assert image.shape == (1, 1, 3, 3)
    assert image[0, 0, 1, 1].item() == pytest.approx(0.9468060)  # tanh(2 * 9 * 0.1)
    assert image[0, 0, 0, 0].item() == pytest.approx(0.6640368)  # tanh(2 * 4 * 0.1): the border is padded with zeros


def test_stem_gates_one_half_of_its_projection_with_the_other():
    stem = Stem(1, 2, spectral=False).eval()
    stem.norm.eps = 1e-12
    nn.init.ones_(stem.norm.weight)
    nn.init.zeros_(stem.linear.weight)
    with torch.no_grad():
        stem.linear.weight[:32, 0] = torch.arange(32.0)
    torch.testing.assert_close(stem(torch.tensor([[2.0]])), torch.arange(32.0).view(1, 2, 4, 4))  # 2 * w * sigmoid(0)


def test_spectral_norm_brings_the_largest_singular_value_to_one():
    layer = conv3x3(3, 4, spectral=True).eval()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(5)
    assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2).item() == pytest.approx(1.0, abs=1e-3)
    assert torch.linalg.matrix_norm(conv3x3(3, 4, spectral=False).weight.detach().flatten(1), 2).item() > 0.9


# --- Soft masks ---
@given(st.integers(0, 98), st.integers(0, 98), st.integers(2, 30), st.integers(2, 30))
def test_a_softened_box_peaks_at_one_and_is_zero_outside(x, y, width, height):
    mask = boxes_to_masks([torch.tensor([[x, y, x + width, y + height]])], 128)
    dome = soften(mask)
    away_from_the_border = min(x, y, 128 - x - width, 128 - y - height) >= 16
    assert dome.max().item() == pytest.approx(1, abs=1e-5 if away_from_the_border else 0.3)
    assert dome.min() >= 0 and dome.max() <= 1 + 1e-6 and dome[mask == 0].abs().max() == 0


def test_every_region_gets_a_dome_that_falls_evenly_to_its_edges_and_further_to_its_corners():
    mask = boxes_to_masks([torch.tensor([[50, 50, 66, 66], [10, 10, 14, 14]])], 128)
    before, dome = mask.clone(), soften(mask)[0, 0]
    assert dome[58, 58] > 0.95 and 0.1 < dome[58, 50] < 0.5 and dome[50, 50] < dome[58, 50] / 2
    assert (dome[58, 50:58].diff() >= -1e-6).all() and dome[10:14, 10:14].max().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(dome[50:66, 50:66], dome[50:66, 50:66].flip(0, 1))
    assert torch.equal(mask, before) and soften(torch.zeros(2, 1, 64, 64)).abs().max() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soften(mask)[0, 0], dome)


@torch.no_grad()
def test_a_soft_mask_is_what_a_generator_that_wants_it_sees():
    hard = GeneratorConfig(64, 5, 6, (5, 4, 3, 2), (0, 0, 0, 0), 1, joint=False)
    generator, soft, (noise, masks) = make(hard).eval(), make(replace(hard, soft_mask=True)).eval(), inputs(hard)
    assert torch.equal(soft(noise, masks), generator(noise, soften(masks)))
    assert (soft(noise, masks) - generator(noise, masks)).abs().max() > 1e-5
