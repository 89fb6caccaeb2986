"""Presets: frozen dataclasses of numbers that a command line may change one by one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from train.common.run import RunError

Preset = TypeVar("Preset", bound=Any)


def find_preset(presets: Mapping[str, Preset], name: str) -> Preset:
    """Return a preset by its name, or raise RunError."""
    if name not in presets:
        raise RunError(f"preset must be one of {sorted(presets)}, got {name!r}")
    return presets[name]


def override(preset: Preset, settings: Sequence[str]) -> Preset:
    """Return a preset with numbers changed, as in `--set crop_weight=0 grow_at=[1000,2000]`: JSON values, or text."""
    known = {field.name: getattr(preset, field.name) for field in fields(preset)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise RunError(f"set must name one of {sorted(known)}, got {setting!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        before = known[name]
        if isinstance(before, float) and type(value) is int:
            value = float(value)
        if isinstance(before, tuple) and isinstance(value, list):
            value = tuple(value)
        if type(value) is not type(before):
            raise RunError(f"set must give {name} a value such as {before!r}, got {setting!r}")
        values[name] = value
    return replace(preset, **values)
