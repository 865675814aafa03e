"""T-GATE v2 on denoisers other than UNets: self-attention caches against hooks that replay the last output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.denoiser_cases import run
from tests.tiny_transformers import sana, sana_call
from tests.tiny_video import wan, wan_call
from tgate_compile import UnsupportedModelError

STEPS = 7
#: The gate is beyond the last step: 0 and 1 are warm-up steps, and the interval computes 3 and 6; the others reuse.
OPTIONS: dict[str, Any] = {"gate_step": 100, "sp_interval": 3, "warm_up": 1}
COMPUTED = {0, 1, 3, 6}


@contextmanager
def replayed(denoiser: torch.nn.Module, calls_per_step: int) -> Iterator[None]:
    """Make every `attn1` return its output of the last computed step, per guidance half if each has a separate call."""
    call = -1
    last: dict[tuple[str, int], torch.Tensor] = {}

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal call
        call += 1

    def replay(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            step, half = divmod(call, calls_per_step)
            if step in COMPUTED:
                last[name, half] = output
            return last[name, half]

        return hook

    modules = {name: module for name, module in denoiser.named_modules() if name.endswith("attn1")}
    assert modules
    handles = [denoiser.register_forward_pre_hook(count, with_kwargs=True)]
    handles += [module.register_forward_hook(replay(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("build", "call", "calls_per_step"),
    [(sana, sana_call(2), 1), (wan, wan_call(2), 2)],
    ids=["sana, linear attention", "wan, two calls"],
)
def test_self_attention_is_replayed(build: Any, call: dict[str, Any], calls_per_step: int) -> None:
    call = {**call, "num_inference_steps": STEPS}
    pipe = build()
    plain = run(pipe, **call)
    with replayed(pipe.transformer, calls_per_step):
        expected = run(pipe, **call)
    tgate_compile.optimize(pipe, **OPTIONS, backend="eager")
    assert_same(run(pipe, **call), expected)
    assert tgate_compile.describe(pipe).strip == "FFSFSSF"
    assert_differ(expected, plain)


def test_both_kinds_over_the_gate_in_two_calls() -> None:
    """After the gate self-attention is also merged, and then computed at every second step."""
    pipe = wan()
    call = {**wan_call(), "num_inference_steps": STEPS}
    tgate_compile.optimize(pipe, 3, backend="eager")
    crossed = run(pipe, **call)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 3, fi_interval=2, backend="eager")
    beforehand = tgate_compile.describe(pipe, **call)
    both = run(pipe, **call)
    afterwards = tgate_compile.describe(pipe)
    assert beforehand.strip == afterwards.strip == "FFFqpqp"
    assert beforehand.cache_bytes == afterwards.cache_bytes
    assert_differ(both, crossed)


def test_a_denoiser_without_self_attention_is_refused() -> None:
    pipe = sana()
    for block in pipe.transformer.transformer_blocks:
        block.attn1 = None
        block.forward = _without_self_attention.__get__(block)
    tgate_compile.optimize(pipe, 3, sp_interval=2, backend="eager")
    with pytest.raises(UnsupportedModelError, match="cache self-attention"):
        run(pipe, **sana_call(), num_inference_steps=4)


def _without_self_attention(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    return hidden_states + self.attn2(hidden_states, encoder_hidden_states=text)
