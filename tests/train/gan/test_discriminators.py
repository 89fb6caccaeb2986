import pytest
import torch

from train.gan.discriminators import CropDiscriminator, ScaleDiscriminator


@pytest.mark.parametrize(("size", "millions"), [(64, 5.7), (128, 18.8), (256, 71.3)])
def test_the_sources_discriminators_have_its_number_of_parameters(size, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in ScaleDiscriminator(size, spectral_norm=False).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def _small(**options):
    torch.manual_seed(0)
    return ScaleDiscriminator(32, width=8, max_channels=16, condition_dim=4, batch_norm=False, grow=False, **options)


def test_both_heads_give_one_score_per_image():
    scores = _small()(torch.rand(3, 1, 32, 32) * 2 - 1, torch.tensor([0, 1, 1]))
    assert [s.shape for s in scores] == [(3,), (3,)]


def test_only_the_conditional_head_sees_the_class():
    net = _small().eval()
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    features = net.features(images)
    normal, nodule = net.judge(features, torch.zeros(4, dtype=torch.long)), net.judge(features, torch.ones(4).long())
    assert torch.equal(normal[0], nodule[0])
    assert not torch.allclose(normal[1], nodule[1])


def test_gradient_reaches_the_image():
    images = torch.zeros(2, 1, 32, 32, requires_grad=True)
    sum(s.sum() for s in _small()(images, torch.tensor([0, 1]))).backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("net", [_small(), CropDiscriminator(width=4)])
def test_every_layer_without_batch_norm_has_a_bias(net):
    # Or the score grows with the image's contrast, whatever the image shows.
    assert all(m.bias is not None for m in net.modules() if isinstance(m, torch.nn.Conv2d))


@pytest.mark.parametrize("size", [0, 8, 33, 96])
def test_a_size_that_is_no_power_of_two_is_refused(size):
    with pytest.raises(ValueError, match="image_size must be a power of two"):
        ScaleDiscriminator(size)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 32, 32\), got \(2, 1, 64, 64\)"):
        _small()(torch.zeros(2, 1, 64, 64), torch.tensor([0, 1]))


def test_crops_get_a_score_per_patch():
    assert CropDiscriminator(3, width=4)(torch.zeros(5, 3, 32, 32)).shape == (5, 1, 8, 8)
