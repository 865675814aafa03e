"""Configurations of models and schedulers as data that JSON can carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without diffusers' own notes, which tell where the model lies on this machine."""
    return {str(name): _plain(value) for name, value in config.items() if not str(name).startswith("_")}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity: "inf", "-inf", "nan"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    tolist = getattr(value, "tolist", None)  # numpy's arrays and numbers
    return _plain(tolist()) if tolist is not None else str(value)
