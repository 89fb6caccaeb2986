"""Nearest neighbours, train against held-out."""

import pytest
import torch

from train.metrics.memorisation import low_resolution, memorisation


def _rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def _measure(generated, train, held_out, *, images_a_patient=1):
    patients = torch.arange(len(train)) // images_a_patient, torch.arange(len(held_out)) // images_a_patient + 10_000
    return memorisation(generated, train, held_out, *patients, generator=torch.Generator().manual_seed(0), draws=100)


def test_distances_and_share_worked_on_paper():
    train, held_out = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    result = _measure(torch.tensor([[0.0, 1.0], [3.0, 3.0], [10.0, 2.0]]), train, held_out)
    assert result.to_train.tolist() == pytest.approx([1, 18**0.5, 2])
    assert result.nearest.tolist() == [0, 0, 1]
    assert result.to_held_out.tolist() == pytest.approx([18**0.5, 1, 53**0.5])
    assert result.share == pytest.approx(2 / 3) and result.expected == pytest.approx(2 / 3)


def test_images_of_one_distribution_are_no_nearer_to_train_than_their_number_says():
    result = _measure(_rows(200, 1), _rows(200, 2), _rows(100, 3))
    assert result.interval[0] < 2 / 3 < result.interval[1] and not result.memorises
    assert result.interval[0] < result.share < result.interval[1]
    few = _measure(_rows(200, 1), _rows(200, 2), _rows(100, 3), images_a_patient=20).interval
    assert few[1] - few[0] > 1.3 * (result.interval[1] - result.interval[0])  # fewer patients know less


def test_copies_of_training_images_are_found():
    train = _rows(200, 2)
    copies = train[:100] + 0.05 * _rows(100, 4)
    result = _measure(torch.cat([copies, _rows(100, 1)]), train, _rows(200, 3))
    assert result.memorises and result.share == pytest.approx(0.75, abs=0.08)
    assert torch.equal(result.nearest[:100], torch.arange(100))
    rows = low_resolution(torch.stack([torch.zeros(1, 64, 64), torch.full((1, 64, 64), 0.5)]))
    assert rows.shape == (2, 1024) and torch.dist(*rows).item() == pytest.approx(0.5)  # the root mean square


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"held_out must be \(n, 6\) with n >= 1, got \(0, 6\)"):
        _measure(_rows(4, 0), _rows(4, 1), torch.empty(0, 6))
    same, sets = torch.arange(4), (_rows(4, 0), _rows(4, 1), _rows(4, 2))
    with pytest.raises(ValueError, match="of other patients than train, got patient 0"):
        memorisation(*sets, same, same, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"one an image \(4 and 4\), got 3 and 4"):
        memorisation(*sets, same[:3], same + 9, generator=torch.Generator())
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        memorisation(*sets, same, same + 9, generator=torch.Generator(), draws=1)
