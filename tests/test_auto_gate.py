"""`optimize(pipe, gate_step="auto")` uses the gate that `tune` chooses."""

from __future__ import annotations

from typing import Any

import pytest

import tgate_compile
from tests.tiny_pipelines import PROMPTS, run, stable_diffusion
from tgate_compile import ConfigurationError, Schedule, tune


@pytest.mark.heavy
def test_the_automatic_gate_is_the_tuned_one() -> None:
    pipe = stable_diffusion(layout="small")
    asked = {"prompts": PROMPTS, "tolerance": 0.4, "num_inference_steps": 6}
    chosen = tune(pipe, **asked).schedule
    tgate_compile.optimize(pipe, gate_step="auto", tuning=asked, backend="eager")
    assert tgate_compile.describe(pipe).schedule == str(chosen)
    run(pipe, steps=6)
    assert tgate_compile.describe(pipe).strip == chosen.strip(6)


def test_the_automatic_gate_needs_no_prompts() -> None:
    pipe = stable_diffusion(layout="small")
    tgate_compile.optimize(pipe, "auto", tuning={"tolerance": 5.0, "num_inference_steps": 3}, backend="eager")
    assert tgate_compile.describe(pipe).strip == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_step": "auto", "sp_interval": 3}, "sp_interval is given as well"),
        ({"gate_step": "auto", "schedule": Schedule(3)}, "schedule is given as well"),
        ({"gate_step": "auto", "tuning": 3}, "must be a mapping"),
        ({"gate_step": 5, "tuning": {"tolerance": 0.1}}, 'tuning requires gate_step="auto"'),
        ({"gate_step": "auto", "tuning": {"tolerance": -1}}, "tolerance must be"),
        ({"gate_step": "automatic"}, "gate_step must be"),
    ],
)
def test_an_automatic_gate_that_cannot_be(options: dict[str, Any], message: str) -> None:
    pipe = stable_diffusion(layout="small")
    with pytest.raises(ConfigurationError, match=message):
        tgate_compile.optimize(pipe, **options)
    assert "_tgate_compile" not in vars(pipe)
