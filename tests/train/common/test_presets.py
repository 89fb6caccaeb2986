"""Presets whose numbers a command line may change."""

from dataclasses import dataclass

import pytest

from train.common.presets import find_preset, override
from train.common.run import RunError


@dataclass(frozen=True)
class Numbers:
    batch: int = 8
    weight: float = 1.0
    grow_at: tuple[int, ...] = ()
    form: str = "softplus"
    augment: bool = False


def test_numbers_are_changed_by_name():
    changed = override(Numbers(), ["weight=0", "grow_at=[8]", "form=relu", "augment=true"])
    assert changed == Numbers(8, 0.0, (8,), "relu", True)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("crops=1", "set must name one of .*'batch'.*, got 'crops=1'"),
        ("batch=many", "set must give batch a value such as 8, got 'batch=many'"),
        ("batch=1.5", "got 'batch=1.5'"),
        ("augment=1", "such as False, got 'augment=1'"),
        ("weight", "such as 1.0, got 'weight'"),
    ],
)
def test_an_unknown_number_or_a_value_of_another_type_is_refused(setting, match):
    with pytest.raises(RunError, match=match):
        override(Numbers(), [setting])


def test_an_unknown_preset_is_named():
    assert find_preset({"tiny": Numbers()}, "tiny") == Numbers()
    with pytest.raises(RunError, match=r"preset must be one of \['tiny'\], got 'small'"):
        find_preset({"tiny": Numbers()}, "small")
