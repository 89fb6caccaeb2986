"""The generator rebuilt for inference equals the training graph in eval mode, and leaves it as it was."""

import copy
import shutil
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from carim_aug.generators import fused
from carim_aug.generators.fused import FusedGenerator, fuse
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator

LEAN = GeneratorConfig(16, 5, 6, (5, 4), (1, 1), 2, joint=False, soft_mask=True)
JOINT = GeneratorConfig(32, 5, 6, (5, 4, 3), (0, 1, 0), 2, joint=True)
CUDA = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
BOTH = pytest.mark.parametrize("config", [LEAN, JOINT], ids=["lean", "joint"])


def trained(config, seed=0):
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


def inputs(config, batch=3, seed=1):
    stream = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, config.noise_dim, generator=stream)
    masks = (torch.rand(batch, 1, config.image_size, config.image_size, generator=stream) < 0.3).float()
    masks[0] = 0
    return noise, masks


def contents(module):
    """All that must stay: names, bytes and addresses of tensors, gradients wanted and had, modes."""
    tensors = [
        (name, t.data_ptr(), t.requires_grad, t.grad, t.detach().contiguous().numpy().tobytes())
        for name, t in (*module.named_parameters(), *module.named_buffers())
    ]
    return [*tensors, *((name, type(m).__name__, m.training) for name, m in module.named_modules())]


@st.composite
def configs(draw):
    steps, joint = draw(st.integers(1, 4)), draw(st.booleans())
    residuals = draw(st.lists(st.integers(0, 2), min_size=steps, max_size=steps))
    channels = draw(st.lists(st.integers(1, 40 if steps < 3 else 9), min_size=steps, max_size=steps))
    noise_dim, stem, branches = (draw(st.integers(1, most)) for most in (9, 9, steps))
    residuals[-1] *= not joint
    flags = dict(joint=joint, spectral_norm=draw(st.booleans()), soft_mask=draw(st.booleans()))
    return GeneratorConfig(4 * 2**steps, noise_dim, stem, channels, residuals, branches, **flags)


@given(
    config=configs(),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
    most=st.sampled_from([1, 4096, 2**24]),  # bytes of a map: from one image at a time to all in one part
    split=st.sampled_from([0, 16, 100]),  # channels up to which a gate is two convolutions: of none to all
)
def test_any_generator_is_equal_to_its_training_graph(config, seed, batch, most, split):
    generator = trained(config, seed)
    before, (noise, masks) = contents(generator), inputs(config, batch, seed)
    with mock.patch.multiple(fused, _CPU_BYTES=most, _SPLIT_CHANNELS={torch.float32: split}):
        images = fuse(generator)(noise, masks)
    assert contents(generator) == before
    torch.testing.assert_close(images, generator.eval()(noise, masks).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "device", "atol"),
    [
        (GeneratorConfig(128, 100, 64, (64, 48, 40, 24, 16), (0, 0, 2, 2, 0), 3, joint=True), "cpu", 1e-5),
        (GeneratorConfig(128, 100, 64, (64, 48, 40, 24, 16), (0, 0, 2, 2, 0), 3, joint=False), "cpu", 1e-5),
        *(pytest.param(ARCHITECTURES[name], "cuda", 5e-3, marks=CUDA) for name in ("fast128", "thesis256")),  # TF32
    ],
)
def test_generators_of_the_published_kinds_are_equal_to_their_training_graph(config, device, atol):
    generator, (noise, masks) = trained(config).eval(), inputs(config)
    expected = generator(noise, masks).detach()
    assert expected.std() > 0.02  # not all one value, nor all at the ends
    images = fuse(generator).to(device)(noise.to(device), masks.to(device)).cpu()
    torch.testing.assert_close(images, expected, rtol=0, atol=atol)


@BOTH
def test_the_original_goes_on_training_and_what_comes_later_is_not_in_the_copy(config):
    generator, twin = trained(config), trained(config)
    fast = fuse(generator)
    images = fast(*inputs(config))
    for network in (generator, twin):
        optimizer = torch.optim.SGD(network.parameters(), 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            sum(image.square().mean() for image in network.pyramid(*inputs(config))).backward()
            optimizer.step()
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in generator.state_dict().items())
    assert torch.equal(fast(*inputs(config)), images)
    assert (fuse(generator)(*inputs(config)) - images).abs().max() > 1e-3


@BOTH
def test_bfloat16_is_near_and_in_either_type_there_is_nothing_to_train(config):
    generator, (noise, masks) = trained(config).eval(), inputs(config)
    expected = generator(noise, masks).detach()
    for dtype, least, most in ((torch.float32, 0, 1e-6), (torch.bfloat16, 1e-6, 0.02)):
        fast = fuse(generator, dtype=dtype).train()
        images = fast(noise.requires_grad_(), masks)
        assert images.dtype == torch.float32 and images.abs().max() <= 1 and not images.requires_grad
        assert least <= (images - expected).abs().mean() < most
        assert {t.dtype for t in fast.buffers()} == {dtype} and list(fast.parameters()) == []
        assert isinstance(fast, FusedGenerator) and fast.config == config


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"noise must be \(B, 5\), got \(3, 4\)"):
        fuse(trained(LEAN))(torch.zeros(3, 4), torch.zeros(3, 1, 16, 16))
    with pytest.raises(TypeError, match="generator must be a MultiScaleGenerator, got Linear"):
        fuse(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"dtype must be torch.float32, torch.bfloat16 .*, got torch.float16"):
        fuse(trained(LEAN), dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPUs needs a C++ compiler")
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_gives_the_same_images(config, dtype):
    generator = trained(config)
    plain, fast = fuse(generator, dtype=dtype), fuse(generator, dtype=dtype, compile=True)
    noise, masks = inputs(config, batch=10)  # in parts of 8 and 2
    images = fast(noise, masks)
    error = (images - plain(noise, masks)).abs()
    assert error.max() <= 1e-5 if dtype == torch.float32 else error.mean() < 0.02
    again = copy.deepcopy(fast)  # the compiled code is not part of it
    torch.testing.assert_close(again(noise[:8], masks[:8]), images[:8], rtol=0, atol=1e-5)
