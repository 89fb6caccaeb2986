"""The mask-conditional generator (METHOD 2 and 10) and the layers it is made of."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from carim_aug.generators.blocks import ImageHead, Joint, Residual, Stem, Up, conv3x3, soften
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator

LEAN = ARCHITECTURES["tiny"]
SOURCE = GeneratorConfig(32, 16, 32, (24, 16, 8), (1, 1, 0), 2, joint=True)  # the source's scheme, small


def make(config: GeneratorConfig, seed: int = 0) -> MultiScaleGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiScaleGenerator(config)


def inputs(config: GeneratorConfig, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(batch, config.noise_dim, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(batch, 1, config.image_size, config.image_size)
    masks[:, :, :4, :4] = 1
    return noise, masks


def on_meta(name: str) -> tuple[MultiScaleGenerator, torch.Tensor, torch.Tensor]:
    # Shapes and counts need no values, and spectral norm changes neither.
    config = replace(ARCHITECTURES[name], spectral_norm=False)
    with torch.device("meta"):
        size = config.image_size
        return MultiScaleGenerator(config).eval(), torch.empty(1, config.noise_dim), torch.empty(1, 1, size, size)


@pytest.mark.parametrize("config", [LEAN, SOURCE], ids=["lean", "source"])
def test_images_have_the_last_scale_and_lie_in_the_value_range(config):
    generator = make(config)
    images = generator(*inputs(config))
    assert images.shape == (2, 1, 32, 32)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert (generator.image_size, generator.noise_dim, generator.value_range) == (32, 16, (-1.0, 1.0))


@pytest.mark.parametrize("config", [LEAN, SOURCE], ids=["lean", "source"])
def test_forward_in_eval_mode_is_the_last_of_the_pyramid(config):
    generator = make(config).eval()
    pyramid = generator.pyramid(*inputs(config))
    assert [tuple(image.shape) for image in pyramid] == [(2, 1, 16, 16), (2, 1, 32, 32)]
    torch.testing.assert_close(generator(*inputs(config)), pyramid[-1], rtol=0, atol=0)


@pytest.mark.parametrize("config", [LEAN, SOURCE], ids=["lean", "source"])
def test_fewer_scales_are_the_first_scales_of_the_pyramid(config):
    generator = make(config).eval()
    first = generator.pyramid(*inputs(config), scales=1)
    assert len(first) == 1
    torch.testing.assert_close(first[0], generator.pyramid(*inputs(config))[0], rtol=0, atol=0)


@pytest.mark.parametrize("config", [LEAN, SOURCE], ids=["lean", "source"])
def test_same_noise_with_and_without_a_mask_is_a_matched_pair(config):
    generator = make(config).eval()
    noise, masks = inputs(config)
    with torch.no_grad():
        change = (generator(noise, masks) - generator(noise, torch.zeros_like(masks))).abs()
    assert change[:, :, :4, :4].amax(dim=(1, 2, 3)).min() > 1e-4  # the mask acts where it is, in each pair
    if not config.joint:  # 4 px of mask, 8 + 4 + 2 px of reach of the doublings, 1 px of the head's
        assert change[:, :, 20:].max() == 0 and change[:, :, :, 20:].max() == 0


def test_a_mask_changes_its_own_image_of_a_batch_alone():
    generator = make(LEAN).eval()
    noise, masks = inputs(LEAN, batch=3)
    other = masks.clone()
    other[1] = 0
    with torch.no_grad():
        before, after = generator(noise, masks), generator(noise, other)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=0, atol=1e-6)
    assert (before[1] - after[1]).abs().max() > 1e-4


@pytest.mark.parametrize("config", [LEAN, SOURCE], ids=["lean", "source"])
def test_empty_masks_of_any_type_give_the_same_image(config):
    generator = make(config).eval()
    noise, masks = inputs(config)
    with torch.no_grad():
        images = generator(noise, torch.zeros_like(masks))
        torch.testing.assert_close(images, generator(noise, torch.zeros_like(masks, dtype=torch.float64)))
        torch.testing.assert_close(images[:1], generator(noise[:1], torch.zeros_like(masks[:1])), rtol=0, atol=1e-5)


def test_same_seed_makes_the_same_generator():
    noise, masks = inputs(LEAN)
    with torch.no_grad():
        images = [make(LEAN, seed).eval()(noise, masks) for seed in (3, 3, 4)]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=0)
    assert (images[0] - images[2]).abs().max() > 1e-3


@pytest.mark.parametrize("config", [LEAN, SOURCE], ids=["lean", "source"])
def test_gradients_reach_the_noise_and_every_weight(config):
    generator = make(config)
    noise, masks = inputs(config)
    noise.requires_grad_()
    sum(image.square().mean() for image in generator.pyramid(noise, masks)).backward()
    assert noise.grad.isfinite().all() and noise.grad.abs().max() > 0
    without = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_eval_mode_changes_no_state_and_train_mode_does():
    generator = make(SOURCE)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator.eval()(*inputs(SOURCE))
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())
    generator.train()(*inputs(SOURCE))
    moved = {name.rsplit(".", 1)[1] for name, t in generator.state_dict().items() if not torch.equal(t, before[name])}
    assert {"running_mean", "running_var", "num_batches_tracked", "_u", "_v"} <= moved


def test_thesis256_has_the_sources_maps_and_scales():
    generator, noise, masks = on_meta("thesis256")
    shapes = []
    for module in (generator.stem, *generator.ups, *(joint for joint in generator.joints if isinstance(joint, Joint))):
        module.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    images = generator.pyramid(noise, masks)
    assert [tuple(image.shape) for image in images] == [(1, 1, 64, 64), (1, 1, 128, 128), (1, 1, 256, 256)]
    ups = [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64)]
    joint64, up128, joint128, up256 = (64, 64, 64), (32, 128, 128), (32, 128, 128), (16, 256, 256)
    assert shapes == [*ups, joint64, up128, joint128, up256]
    assert [len(blocks) for blocks in generator.residuals] == [0, 0, 0, 2, 2, 0]


def test_thesis256_has_about_16_point_4_million_parameters():
    generator, _, _ = on_meta("thesis256")
    assert sum(p.numel() for p in generator.parameters()) == pytest.approx(16.4e6, rel=0.01)


@pytest.mark.parametrize(("name", "most"), [("fast128", 1.0), ("fast256", 1.0), ("thesis256", 6.4)])
def test_published_architectures_keep_within_their_multiply_adds(name, most):
    generator, noise, masks = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        generator(noise, masks)
    assert 0.5 * most < counter.get_total_flops() / 2e9 <= most


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_architectures_survive_json(name):
    config = ARCHITECTURES[name]
    assert name == "tiny" or name.endswith(str(config.image_size))
    assert GeneratorConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("noise", "masks", "rule"),
    [
        ((2, 15), (2, 1, 32, 32), r"noise must be \(B, 16\), got \(2, 15\)"),
        ((16,), (2, 1, 32, 32), r"noise must be \(B, 16\), got \(16,\)"),
        ((2, 16), (2, 32, 32), r"masks must be \(B, 1, 32, 32\) with B = 2, got \(2, 32, 32\)"),
        ((2, 16), (3, 1, 32, 32), r"masks must be .* got \(3, 1, 32, 32\)"),
        ((2, 16), (2, 1, 16, 16), r"masks must be .* got \(2, 1, 16, 16\)"),
    ],
)
def test_inputs_of_a_wrong_shape_are_named(noise, masks, rule):
    with pytest.raises(ValueError, match=rule):
        make(LEAN)(torch.zeros(noise), torch.zeros(masks))


@pytest.mark.parametrize("scales", [0, 3])
def test_scales_out_of_range_are_named(scales):
    with pytest.raises(ValueError, match=rf"scales must be in \[1, 2\], got {scales}"):
        make(LEAN).pyramid(*inputs(LEAN), scales=scales)


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


def plain(norm: nn.Module) -> None:
    # A batch norm that changes nothing in eval mode.
    norm.eval()
    norm.eps = 1e-12  # torch 2.11 refuses 0
    nn.init.ones_(norm.weight)


def test_up_repeats_each_pixel_before_its_convolution():
    up = Up(1, 1, masked=False, spectral=False)
    plain(up.norm)
    nn.init.zeros_(up.conv.weight)
    with torch.no_grad():
        up.conv.weight[0, 0, 1, 1] = 1  # a = the up-sampled map, b = 0, so a * sigmoid(b) is half of it
    small = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    big = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]).view(1, 1, 4, 4)
    torch.testing.assert_close(up(small), big / 2)


def test_up_and_joint_take_the_mask_as_their_last_channel():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1, 2] = 1
    for block, hidden in (
        (Up(1, 1, masked=True, spectral=False), torch.zeros(1, 1, 2, 2)),
        (Joint(1, spectral=False), torch.zeros(1, 1, 4, 4)),
    ):
        plain(block.norm)
        nn.init.zeros_(block.conv.weight)
        with torch.no_grad():
            block.conv.weight[0, 1, 1, 1] = 1
        torch.testing.assert_close(block(hidden, mask), mask / 2)


def test_residual_without_its_second_convolution_changes_nothing():
    block = Residual(3, spectral=False)
    plain(block.norm2)
    nn.init.zeros_(block.conv2.weight)
    hidden = torch.arange(48.0).view(1, 3, 4, 4)
    torch.testing.assert_close(block(hidden), hidden, rtol=0, atol=0)


def test_image_head_is_the_tanh_of_a_convolution():
    head = ImageHead(2, spectral=False)
    nn.init.constant_(head.conv.weight, 0.1)
    image = head(torch.ones(1, 2, 3, 3))
    assert image.shape == (1, 1, 3, 3)
    assert image[0, 0, 1, 1].item() == pytest.approx(0.9468060)  # tanh(2 * 9 * 0.1)
    assert image[0, 0, 0, 0].item() == pytest.approx(0.6640368)  # tanh(2 * 4 * 0.1): the border is padded with zeros


def test_stem_gates_one_half_of_its_projection_with_the_other():
    stem = Stem(1, 2, spectral=False).eval()
    stem.norm.eps = 1e-12  # torch 2.11 refuses 0
    nn.init.ones_(stem.norm.weight)
    nn.init.zeros_(stem.linear.weight)
    with torch.no_grad():
        stem.linear.weight[:32, 0] = torch.arange(32.0)
    hidden = stem(torch.tensor([[2.0]]))
    torch.testing.assert_close(hidden, torch.arange(32.0).view(1, 2, 4, 4))  # 2 * w * sigmoid(0)


def test_softened_masks_rise_from_their_edge_and_stay_zero_outside():
    masks = torch.zeros(1, 1, 96, 96)
    masks[:, :, 10:40, 30:60] = 1
    soft = soften(masks)
    assert soft[masks == 0].abs().max() == 0 and soft.min() >= 0 and soft.max() <= 1 + 1e-6
    middle = soft[0, 0, 25, 30:45]
    assert middle[0] < 0.9 * middle[-1] and (middle.diff() >= -1e-6).all()
    torch.testing.assert_close(soft[:, :, 10:40, 30:60], soft[:, :, 10:40, 30:60].flip(2, 3))  # as even as the mask
    assert soften(torch.zeros_like(masks)).abs().max() == 0


def test_a_soft_mask_is_what_a_generator_that_wants_it_sees():
    hard = GeneratorConfig(64, 5, 6, (5, 4, 3, 2), (0, 0, 0, 0), 1, joint=False)
    generator, soft = make(hard).eval(), make(replace(hard, soft_mask=True)).eval()
    noise, masks = inputs(hard)
    with torch.no_grad():
        torch.testing.assert_close(soft(noise, masks), generator(noise, soften(masks)), rtol=0, atol=0)
        assert (soft(noise, masks) - generator(noise, masks)).abs().max() > 1e-5


def test_spectral_norm_brings_the_largest_singular_value_to_one():
    layer = conv3x3(3, 4, spectral=True).eval()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(5)
    assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2).item() == pytest.approx(1.0, abs=1e-3)
    assert torch.linalg.matrix_norm(conv3x3(3, 4, spectral=False).weight.detach().flatten(1), 2).item() > 0.9
