"""Tables 1 and 2 of Ann (2021) as they must be read: PSNR on one scale, Table 2 transposed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.metrics.statistics import rates
from train.reproduction.published import TABLE2, corrected_reading, corrected_table1, corrected_table2


def test_printed_rows_have_their_corrected_reading():
    for name, expected in (
        ("DS2", (0.6034, 0.7661, 0.4407, 0.5780)),
        ("DS3", (0.6113, 0.8009, 0.4217, 0.5807)),
        ("DS4", (0.6208, 0.7930, 0.4485, 0.5898)),
    ):
        assert tuple(round(value, 4) for value in corrected_table2()[name].values())[:4] == expected
    assert corrected_table2().keys() == {"DS2", "DS3", "DS4"}
    for name, row in corrected_table2().items():  # F1 does not change when precision and recall change places
        assert row["f1"] == pytest.approx(TABLE2[name]["f1"], abs=2e-4)
    assert corrected_table1()["carim"] == pytest.approx((19.39, 18.32), abs=0.01)


def test_figures_that_fit_no_transposed_table_are_refused():
    with pytest.raises(ValueError, match=r"accuracy must be 0\.9509 on a test set of two equal halves"):
        corrected_reading(0.9100, 0.9107, 0.0000, 0.9999)  # DS1
    labels = torch.arange(40) % 2
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.5 * labels
    with pytest.raises(ValueError, match="read transposed"):
        corrected_reading(*rates(scores, labels, threshold=0.7)[:4])
    with pytest.raises(ValueError, match="accuracy must be a share .* got 60.34"):
        corrected_reading(60.34, 0.5780, 0.6533, 0.7661)


@given(recall=st.floats(0.5, 0.99), specificity=st.floats(0.2, 0.95))
def test_a_transposed_table_of_a_balanced_test_is_read_back(recall, specificity):
    nodule, called = 633 * recall, 633 * recall + 633 * (1 - specificity)
    precision, npv = nodule / called, 633 * specificity / (2 * 633 - called)
    printed = [round(value, 4) for value in ((recall + specificity) / 2, precision, npv, recall)]
    found = corrected_reading(*printed, tolerance=5e-4)
    expected = {"accuracy": printed[0], "sensitivity": recall, "specificity": specificity, "precision": precision}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=5e-4)
