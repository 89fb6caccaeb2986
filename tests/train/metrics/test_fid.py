"""Fréchet and kernel distance against paper and torch-fidelity."""

import pytest
import torch

from train.metrics.fid import frechet_distance, kernel_distance, kernel_interval


def _features(n: int, *, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Twelve random projections of 8-pixel images."""
    images = torch.rand(n, 192, generator=torch.Generator().manual_seed(seed)).double() * (1 + shift) + shift
    return torch.relu(images @ torch.randn(192, 12, generator=torch.Generator().manual_seed(0)).double() / 14)


def test_distances_worked_on_paper():
    # Means 0 and 3, variances 2 and 8: 9 + 2 + 8 - 2 sqrt(16) = 11.
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])
    assert frechet_distance(a, b).item() == pytest.approx(11, abs=1e-12)
    a = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(a, a).item() == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + 2).item() == pytest.approx(6 * 4, abs=1e-9)
    # D = 1, kernel (xy + 1)^3: within a {0, 1}: 1; within b {1, 2}: 27; across: 1, 1, 8, 27, mean 9.25.
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kernel_distance(a, b).item() == pytest.approx(1 + 27 - 18.5, abs=1e-12)


@pytest.mark.parametrize(("n", "rel"), [(8, 1e-4), (40, 1e-8), (200, 1e-8)])  # fewer and more than features
def test_distances_are_torch_fidelitys(n, rel):
    fid, kid = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "kid"))
    real, fake = _features(n, seed=1), _features(n, seed=2, shift=0.5)
    statistics = [fid.fid_features_to_statistics(features) for features in (real, fake)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(real, fake).item() == pytest.approx(theirs, rel=rel) and theirs > 0.1
    # One subset that is the whole set: drawn without replacement, so in another order only.
    metric = kid.kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=n, verbose=False)
    theirs = metric[kid.KEY_METRIC_KID_MEAN]
    assert kernel_distance(real, fake).item() == pytest.approx(theirs, rel=1e-8) and theirs > 0.01


def test_kernel_distance_of_one_distribution_is_zero_on_average_and_interval_covers_it():
    rng = torch.Generator().manual_seed(0)
    covered, values = 0, []
    for _ in range(60):
        a, b = torch.randn(40, 4, generator=rng), torch.randn(30, 4, generator=rng)
        values.append(kernel_distance(a, b).item())
        low, high = kernel_interval(a, b, generator=rng, draws=200)
        covered += low <= 0 <= high
    values = torch.tensor(values)
    assert values.mean().abs() < 3 * values.std() / 60**0.5
    assert covered >= 48  # 95 % of 60 is 57


def test_interval_holds_the_distance_and_shrinks_with_more_rows():
    rng = torch.Generator().manual_seed(1)
    widths = []
    for n in (40, 640):
        a, b = torch.randn(n, 5, generator=rng), torch.randn(n, 5, generator=rng) + 0.7
        low, high = kernel_interval(a, b, generator=torch.Generator().manual_seed(0), draws=400)
        assert low < kernel_distance(a, b).item() < high and low > 0
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert kernel_interval(a, b, generator=torch.Generator().manual_seed(0), draws=400) == (low, high)


def test_gradient_of_both_distances_reaches_the_features():
    rng = torch.Generator().manual_seed(2)
    a, b = torch.randn(9, 4, generator=rng, requires_grad=True), torch.randn(8, 4, generator=rng) + 1
    for distance in (frechet_distance, kernel_distance):
        (gradient,) = torch.autograd.grad(distance(a, b), a)
        assert gradient.isfinite().all() and distance(a - 1e-3 * gradient, b) < distance(a, b)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"a must be \(N, D\) with N >= 2, got \(1, 3\)"),
        (torch.zeros(5, 3), torch.zeros(5), r"b must be \(N, D\) with N >= 2, got \(5,\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "same number of features, got 3 and 4"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "b must be finite, got nan"),
    ],
)
def test_bad_features_are_named(a, b, message):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=message):
            distance(a, b)
    a = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        kernel_interval(a, a, generator=torch.Generator(), draws=1)
