"""Assert that `optimize` refuses a pipeline and leaves it unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import tgate_compile


def _state(pipe: Any) -> list[Any]:
    denoiser = pipe.transformer if "transformer" in pipe.components else pipe.unet
    modules = [(name, type(module), dict(vars(module))) for name, module in denoiser.named_modules()]
    return [type(pipe), dict(vars(pipe)), [(name, kind, {**state}) for name, kind, state in modules]]


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Assert that the block leaves the pipeline, its denoiser and all of the denoiser's modules unchanged."""
    before = _state(pipe)
    yield
    after = _state(pipe)
    assert after[0] is before[0]
    assert after[1] == before[1]
    for (name, kind, state), (name_after, kind_after, state_after) in zip(before[2], after[2], strict=True):
        assert (name, kind) == (name_after, kind_after)
        assert list(state) == list(state_after)
        for key in state:
            assert state[key] is state_after[key] or state[key] == state_after[key], f"{name}.{key}"


def refused(pipe: Any, error: type[Exception], *parts: str, **options: Any) -> str:
    """Assert that `optimize` raises `error` with all of `parts` in its message, and leaves `pipe` unchanged."""
    with untouched(pipe), pytest.raises(error) as caught:
        tgate_compile.optimize(pipe, **{"gate_step": 3, "backend": "eager", **options})
    message = str(caught.value)
    assert isinstance(caught.value, tgate_compile.TGateError)
    for part in parts:
        assert part in message
    return message
