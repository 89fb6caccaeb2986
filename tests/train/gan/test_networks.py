"""The networks of a run: the moving average, statistics taken anew, and the discriminators."""

import dataclasses

import pytest
import torch

from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator
from carim_aug.location.prior import LocationPrior
from train.gan.discriminators import CropDiscriminator, ScaleDiscriminator
from train.gan.networks import Networks, retake_statistics, update_average


def test_the_average_copies_buffers_and_averages_parameters(tiny):
    networks = Networks(tiny)
    with torch.no_grad():
        networks.generator(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1, 32, 32))
        for p in networks.generator.parameters():
            p.add_(1.0)
    averaged = networks.average.module
    before = [p.clone() for p in averaged.parameters()]
    for _ in range(2):
        update_average(networks.average, networks.generator)
    for now, old, goal in zip(averaged.parameters(), before, networks.generator.parameters(), strict=True):
        assert ((now - old) * (goal - old) >= 0).all() and (now - goal).abs().max() < 1
    for mean, now in zip(averaged.buffers(), networks.generator.buffers(), strict=True):
        assert torch.equal(mean, now)


def test_statistics_taken_anew_are_those_of_the_generator_at_hand(tiny):
    torch.manual_seed(0)
    generator = MultiScaleGenerator(ARCHITECTURES["tiny"])
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    retake_statistics(generator, LocationPrior.bundled(), dataclasses.replace(tiny, statistics_batches=15), seed=0)
    after = generator.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert not generator.training and all(m.momentum == 0.1 for m in generator.modules() if hasattr(m, "momentum"))
    # The stem's norm sees z W: |w|^2 is its variance for standard normal noise, times 6 / 7 in a batch of 4 pairs.
    expected = generator.stem.linear.weight.detach().square().sum(dim=1)
    assert (after["stem.norm.running_var"] / expected).mean() == pytest.approx(6 / 7, abs=0.05)


# --- Discriminators ---
def small(batch_norm=False):
    torch.manual_seed(0)
    return ScaleDiscriminator(32, width=8, max_channels=16, condition_dim=4, batch_norm=batch_norm, grow=batch_norm)


@pytest.mark.parametrize(("size", "millions"), [(64, 5.7), (128, 18.8), (256, 71.3)])
def test_the_discriminators_of_stackgan_v2_have_their_number_of_parameters(size, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in ScaleDiscriminator(size, spectral_norm=False).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_only_the_conditional_head_sees_the_class_and_gradients_reach_the_image():
    net = small().eval()
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    features = net.features(images)
    normal, nodule = (net.heads(features, torch.full((3,), c)) for c in (0, 1))
    assert [s.shape for s in normal] == [(3,), (3,)]
    assert torch.equal(normal[0], nodule[0]) and not torch.allclose(normal[1], nodule[1])
    sum(s.sum() for s in nodule).backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("batch_norm", [False, True])
def test_one_forward_gives_what_three_give(batch_norm):
    net, stream = small(batch_norm).eval(), torch.Generator().manual_seed(1)  # fixed statistics and vectors
    real, fake = (torch.rand(4, 1, 32, 32, generator=stream) * 2 - 1 for _ in range(2))
    classes = torch.tensor([1, 1, 0, 0])
    on_real, on_fake, mismatched = net.compare(real, fake, classes)
    wanted = (*net(real, classes), *net(fake, classes), net(real, 1 - classes)[1])
    for got, alone in zip((*on_real, *on_fake, mismatched), wanted, strict=True):
        assert torch.allclose(got, alone, atol=1e-5)


def test_layers_without_batch_norm_have_a_bias_and_images_and_sizes_that_do_not_fit_are_refused():
    for net in (small(), CropDiscriminator(width=4)):  # or the score grows with the contrast, whatever the image shows
        assert all(m.bias is not None for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    for size in (8, 33):
        with pytest.raises(ValueError, match=f"image_size must be a power of two, at least 16, got {size}"):
            ScaleDiscriminator(size)
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 32, 32\), got \(2, 1, 64, 64\)"):
        small()(torch.zeros(2, 1, 64, 64), torch.tensor([0, 1]))
    assert CropDiscriminator(3, width=4)(torch.zeros(5, 3, 32, 32)).shape == (5, 1, 8, 8)  # a score per patch
