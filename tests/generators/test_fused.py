"""The generator rebuilt for inference equals the training graph in eval mode, and leaves it as it was."""

import copy
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from carim_aug.generators import fused as compiled
from carim_aug.generators.fused import CompiledGenerator, compile_generator
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator

LEAN = GeneratorConfig(16, 5, 6, (5, 4), (1, 1), 2, joint=False, soft_mask=True)
SOURCE = GeneratorConfig(32, 5, 6, (5, 4, 3), (0, 1, 0), 2, joint=True)
BOTH = pytest.mark.parametrize("config", [LEAN, SOURCE], ids=["lean", "source"])


def trained(config: GeneratorConfig, seed: int = 0) -> MultiScaleGenerator:
    """A generator with weights, spectral-norm vectors and batch statistics as if from training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = MultiScaleGenerator(config)
        for module in generator.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.2, 3.0)
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return generator


def inputs(config: GeneratorConfig, batch: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, config.noise_dim, generator=stream)
    size = config.image_size
    masks = (torch.rand(batch, 1, size, size, generator=stream) < 0.3).float()
    masks[0] = 0
    return noise, masks


def training_graph(generator: MultiScaleGenerator, noise: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(generator).eval()(noise, masks)


def contents(module: nn.Module) -> list[tuple]:
    """All that must stay: names, bytes and addresses of tensors, gradients wanted and had, modes."""
    tensors = [
        (name, t.data_ptr(), t.requires_grad, t.grad, t.detach().contiguous().numpy().tobytes())
        for name, t in (*module.named_parameters(), *module.named_buffers())
    ]
    return [*tensors, *((name, type(m).__name__, m.training) for name, m in module.named_modules())]


@st.composite
def configs(draw: st.DrawFn) -> GeneratorConfig:
    steps = draw(st.integers(1, 4))
    joint = draw(st.booleans())
    residuals = draw(st.lists(st.integers(0, 2), min_size=steps, max_size=steps))
    if joint:
        residuals[-1] = 0
    return GeneratorConfig(
        image_size=4 * 2**steps,
        noise_dim=draw(st.integers(1, 9)),
        stem_channels=draw(st.integers(1, 9)),
        channels=tuple(draw(st.lists(st.integers(1, 40 if steps < 3 else 9), min_size=steps, max_size=steps))),
        residuals=tuple(residuals),
        branches=draw(st.integers(1, steps)),
        joint=joint,
        spectral_norm=draw(st.booleans()),
        soft_mask=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=20)
@given(config=configs(), seed=st.integers(0, 2**31), channels_last=st.booleans(), batch=st.integers(1, 4))
def test_any_generator_is_equal_to_its_training_graph(config, seed, channels_last, batch):
    generator = trained(config, seed)
    before = contents(generator)
    fast = compile_generator(generator, channels_last=channels_last)
    noise, masks = inputs(config, batch, seed)
    images = fast(noise, masks)
    assert contents(generator) == before
    torch.testing.assert_close(images, generator.eval()(noise, masks).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("joint", [True, False])
def test_generators_of_the_published_kinds_are_equal_to_their_training_graph(joint):
    config = GeneratorConfig(128, 100, 64, (64, 48, 40, 24, 16), (0, 0, 2, 2, 0), 3, joint=joint, soft_mask=not joint)
    generator = trained(config)
    noise, masks = inputs(config, batch=2)
    expected = training_graph(generator, noise, masks)
    assert expected.std() > 0.02  # not all one value, nor all at the ends
    torch.testing.assert_close(compile_generator(generator)(noise, masks), expected, rtol=0, atol=1e-5)


@BOTH
def test_working_through_the_batch_in_parts_changes_nothing(config, monkeypatch):
    fast = compile_generator(trained(config))
    noise, masks = inputs(config, batch=5)
    whole = fast(noise, masks)
    last_map = 2 * config.channels[-1] * config.image_size**2 * 4
    for most in (1, 2 * last_map):  # one image at a time from the first step on; two at the last step
        monkeypatch.setattr(compiled, "_CPU_BYTES", most)
        torch.testing.assert_close(fast(noise, masks), whole, rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("split", [0, 100])
def test_one_or_two_convolutions_for_a_gate_give_the_same(config, split, monkeypatch):
    generator = trained(config)
    monkeypatch.setattr(compiled, "_SPLIT_CHANNELS", {torch.float32: split})
    noise, masks = inputs(config)
    expected = training_graph(generator, noise, masks)
    torch.testing.assert_close(compile_generator(generator)(noise, masks), expected, rtol=0, atol=1e-5)


def test_image_without_head_weights_is_grey():
    generator = trained(replace(LEAN, spectral_norm=False))  # under it, zero weights are 0 / 0
    nn.init.zeros_(generator.heads["1"].conv.weight)
    assert compile_generator(generator)(*inputs(LEAN)).abs().max() == 0


@BOTH
def test_the_original_in_train_mode_is_untouched_and_goes_on_training(config):
    generator, twin = trained(config), trained(config)
    frozen = next(generator.parameters())
    frozen.requires_grad_(False)
    next(twin.parameters()).requires_grad_(False)
    before = contents(generator)
    fast = compile_generator(generator.train())
    images = fast(*inputs(config))
    assert contents(generator) == before

    # Two training steps of the original end where those of a twin that was never compiled do, bit for bit.
    for network in (generator, twin.train()):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            sum(image.square().mean() for image in network.pyramid(*inputs(config))).backward()
            optimizer.step()
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in generator.state_dict().items())
    assert [c[-1] for c in contents(generator)] != [c[-1] for c in before]
    torch.testing.assert_close(fast(*inputs(config)), images, rtol=0, atol=0)  # a copy: what came later is not in it


@BOTH
def test_bfloat16_is_near_and_its_images_are_float32(config):
    generator = trained(config)
    noise, masks = inputs(config)
    fast = compile_generator(generator, dtype=torch.bfloat16)
    images = fast(noise, masks)
    assert fast.dtype == torch.bfloat16 and images.dtype == torch.float32
    assert {t.dtype for t in fast.state_dict().values()} == {torch.bfloat16}
    difference = (images - training_graph(generator, noise, masks)).abs()
    assert 0 < difference.mean() < 0.02
    assert images.abs().max() <= 1


def test_it_says_what_it_is():
    fast = compile_generator(trained(SOURCE))
    assert isinstance(fast, CompiledGenerator)
    assert (fast.config, fast.image_size, fast.noise_dim) == (SOURCE, 32, 5)
    assert (fast.value_range, fast.dtype) == ((-1.0, 1.0), torch.float32)


def test_there_is_nothing_to_train():
    fast = compile_generator(trained(LEAN)).train()
    assert not any(module.training for module in fast.modules())
    assert list(fast.parameters()) == []
    noise, masks = inputs(LEAN)
    images = fast(noise.requires_grad_(), masks)
    assert not images.requires_grad
    # Not an inference-mode tensor either: a classifier can train on it.
    weight = torch.ones(1, requires_grad=True)
    (images * weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_autocast_around_it_changes_nothing():
    fast = compile_generator(trained(LEAN))
    noise, masks = inputs(LEAN)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fast(noise, masks)
    torch.testing.assert_close(inside, fast(noise, masks), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float64])
def test_masks_of_any_type_are_taken(kind):
    fast = compile_generator(trained(SOURCE))
    noise, masks = inputs(SOURCE)
    torch.testing.assert_close(fast(noise, masks.to(kind)), fast(noise, masks), rtol=0, atol=0)


def test_inputs_and_the_global_random_state_stay_as_they_were():
    noise, masks = inputs(LEAN)
    noise_before, masks_before, generator = noise.clone(), masks.clone(), trained(LEAN)
    state = torch.get_rng_state()
    compile_generator(generator)(noise, masks)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise, noise_before) and torch.equal(masks, masks_before)


def test_an_empty_batch_gives_no_images():
    assert compile_generator(trained(LEAN))(torch.zeros(0, 5), torch.zeros(0, 1, 16, 16)).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_give_the_same_images(again):
    fast = compile_generator(trained(SOURCE))
    torch.testing.assert_close(again(fast)(*inputs(SOURCE)), fast(*inputs(SOURCE)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("noise", "masks", "rule"),
    [
        ((3, 4), (3, 1, 16, 16), r"noise must be \(B, 5\), got \(3, 4\)"),
        ((3, 5), (3, 1, 8, 8), r"masks must be \(B, 1, 16, 16\) with B = 3, got \(3, 1, 8, 8\)"),
    ],
)
def test_inputs_of_a_wrong_shape_are_named(noise, masks, rule):
    with pytest.raises(ValueError, match=rule):
        compile_generator(trained(LEAN))(torch.zeros(noise), torch.zeros(masks))


def test_what_is_no_generator_is_refused():
    with pytest.raises(TypeError, match="generator must be a MultiScaleGenerator, got Linear"):
        compile_generator(nn.Linear(1, 1))


def test_a_dtype_without_support_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        compile_generator(trained(LEAN), dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPUs needs a C++ compiler")
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_gives_the_same_images(config, dtype):
    generator = trained(config)
    plain, fast = compile_generator(generator, dtype=dtype), compile_generator(generator, dtype=dtype, compile=True)
    noise, masks = inputs(config, batch=10)  # in parts of 8 and 2
    images = fast(noise, masks)
    assert images.shape == masks.shape
    error = (images - plain(noise, masks)).abs()
    assert error.max() <= 1e-5 if dtype == torch.float32 else error.mean() < 0.02
    again = copy.deepcopy(fast)  # the compiled code is not part of it
    torch.testing.assert_close(again(noise[:8], masks[:8]), images[:8], rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fast128", "thesis256"])
def test_cuda_gives_the_images_of_the_cpu(name):
    config = ARCHITECTURES[name]
    generator = trained(config)
    noise, masks = inputs(config)
    expected = compile_generator(generator)(noise, masks)
    fast = compile_generator(generator).cuda()
    torch.testing.assert_close(fast(noise.cuda(), masks.cuda()).cpu(), expected, rtol=0, atol=5e-3)  # TF32


@pytest.mark.parametrize("value", [0.5, torch.nan, 255.0])
def test_a_mask_that_is_not_binary_is_refused(value):
    noise, masks = inputs(LEAN)
    masks[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"masks must be (0 or 1 everywhere|finite), got"):
        compile_generator(trained(LEAN))(noise, masks)
