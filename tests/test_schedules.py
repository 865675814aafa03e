"""Methods beyond T-GATE v1 in real pipelines, against plain hooks and diffusers' own implementations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.hook_reference import hook_reference
from tests.tiny_pipelines import run, sdxl, stable_diffusion
from tgate_compile import ConfigurationError, Schedule, save_schedule

STEPS = 6


def _run(pipe: Any, **options: Any) -> torch.Tensor:
    return run(pipe, steps=STEPS, **options)


def test_guidance_dropped_after_a_step_is_diffusers_own_cutoff() -> None:
    pipe = stable_diffusion(layout="small")
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    expected = _run(pipe, callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=cutoff.tensor_inputs)
    plain = _run(pipe)
    tgate_compile.optimize(pipe, None, guidance_step=3, backend="eager")
    dropped = _run(pipe)
    assert tgate_compile.describe(pipe).strip == "FFFfff"
    assert "\nguidance step 3, keeps cond, backend eager\n" in str(tgate_compile.describe(pipe))
    assert tgate_compile.describe(pipe).keep == "cond"
    assert_same(dropped, expected)
    assert_differ(dropped, plain)
    assert_same(_run(pipe), expected)


def test_adaptive_guidance_stops_where_the_predictions_agree() -> None:
    pipe = stable_diffusion(layout="small")
    similarities = _similarities(pipe)
    threshold = sorted(similarities)[STEPS // 2] - 1e-6
    stop = next(step for step, value in enumerate(similarities) if value >= threshold) + 1
    assert 0 < stop < STEPS
    tgate_compile.optimize(pipe, None, guidance_similarity=threshold, backend="eager")
    adaptive = _run(pipe)
    assert tgate_compile.describe(pipe).strip == "F" * stop + "f" * (STEPS - stop)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, None, guidance_step=stop, backend="eager")
    assert_same(adaptive, _run(pipe))


def _similarities(pipe: Any) -> list[float]:
    """Return the cosine similarity of the guidance halves at each step of the plain pipeline."""
    seen: list[float] = []

    def look(module: Any, args: Any, output: Any) -> None:
        uncond, cond = output[0].flatten(1).chunk(2)
        seen.append(float(torch.cosine_similarity(uncond, cond).min()))

    handle = pipe.unet.register_forward_hook(look)
    _run(pipe)
    handle.remove()
    return seen


@pytest.mark.parametrize("build", [stable_diffusion, sdxl], ids=["sd", "sdxl"])
def test_caching_self_attention_reuses_its_output(build: Any) -> None:
    """T-GATE v2 before the gate, against hooks that replay the attention's last output."""
    pipe = build()
    plain = _run(pipe)
    tgate_compile.optimize(pipe, 100, sp_interval=3, warm_up=1, backend="eager")
    # The gate is beyond the last step: 0 and 1 are warm-up steps, and the interval computes step 3; others reuse.
    cached = _run(pipe)
    assert tgate_compile.describe(pipe).strip == "FFSFSS"
    assert_same(cached, _with_replayed_self_attention(build(), computed={0, 1, 3}))
    assert_differ(cached, plain)


def _with_replayed_self_attention(pipe: Any, computed: set[int]) -> torch.Tensor:
    calls = 0
    last: dict[str, torch.Tensor] = {}

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    def replay(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            if calls in computed:
                last[name] = output
            return last[name]

        return hook

    handles = [pipe.unet.register_forward_hook(count)]
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            handles.append(module.register_forward_hook(replay(name)))
    result = _run(pipe)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("keep", ["uncond", "cond"])
@pytest.mark.parametrize("anchor", [0.0, 1.0, 2.5])
def test_anchor_weight(keep: Any, anchor: float) -> None:
    pipe = stable_diffusion(layout="small")
    with hook_reference(pipe, 3):
        papers = _run(pipe)
    with hook_reference(pipe, 3, keep=keep, anchor=anchor):
        expected = _run(pipe)
    assert_differ(expected, papers)
    tgate_compile.optimize(pipe, 3, keep=keep, anchor_weight=anchor, backend="eager")
    assert_same(_run(pipe), expected)
    assert_same(_run(pipe), expected)


def test_one_gate_more_or_other_steps_need_no_new_graphs() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 5, sp_interval=2, fi_interval=2, backend="eager")
    run(pipe, steps=9)
    store = pipe._tgate_compile.hook.store
    compiled = store.compilations
    assert compiled == 4
    for gate, steps in ((4, 12), (6, 10), (0.5, 9), (5, 8)):
        run(pipe, steps=steps, gate_step=gate)
    assert store.compilations == compiled


def test_a_schedule_is_all_of_its_options(tmp_path: Path) -> None:
    pipe = stable_diffusion(layout="small")
    options: dict[str, Any] = {"sp_interval": 2, "keep": "cond", "anchor_weight": 1.0}
    tgate_compile.optimize(pipe, 4, **options, backend="eager")
    expected = _run(pipe)
    tgate_compile.restore(pipe)
    schedule = Schedule(4, **options)
    save_schedule(schedule, tmp_path / "schedule.json")
    for given in (schedule, tmp_path / "schedule.json", str(tmp_path / "schedule.json")):
        tgate_compile.optimize(pipe, schedule=given, backend="eager")
        assert torch.equal(_run(pipe), expected)
        assert tgate_compile.describe(pipe).schedule == str(schedule)
        tgate_compile.restore(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": 5}, "got 5"),
        ({"schedule": {"gate_step": 5}}, "tgate_compile.Schedule"),
        ({"schedule": "no/such/file.json"}, "cannot be read"),
        ({"schedule": Schedule(5), "sp_interval": 3}, "sp_interval is given as well"),
        ({"schedule": Schedule(5), "gate_step": 3}, "gate_step is given as well"),
        ({"gate_step": (5, 4)}, "several gate steps"),
    ],
)
def test_schedules_that_cannot_be(options: dict[str, Any], message: str) -> None:
    pipe = stable_diffusion(layout="small")
    with pytest.raises(ConfigurationError, match=message):
        tgate_compile.optimize(pipe, **options)
    assert type(pipe).__module__.startswith("diffusers")
    assert "_tgate_compile" not in vars(pipe)


def test_the_log_shows_what_ran(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager")
    with caplog.at_level(logging.INFO, "tgate_compile"):
        _run(pipe)
    assert "UNet2DConditionModel ran FFpppp" in caplog.text
