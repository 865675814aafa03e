"""The Inductor backend: correct results from a single compilation. All tests share one minimal denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch._inductor.metrics

import tgate_compile
from tests.comparing import assert_differ, difference
from tests.hook_reference import hook_reference
from tests.tiny_pipelines import VELOCITY, run, stable_diffusion

#: Compiled kernels add in a different order, and six steps amplify the difference.
TOLERANCE = 1e-4


def build() -> Any:
    return stable_diffusion(
        layout="small", block_out_channels=(16,), mid_block_type=None, norm_num_groups=4, attention_head_dim=2
    )


def compiler_counters() -> dict[str, Any]:
    """Return all of torch's counters for tracing, compiling and loading compiled code."""
    counters = {name: dict(values) for name, values in torch._dynamo.utils.counters.items()}
    counters["kernels"] = {"generated": torch._inductor.metrics.generated_kernel_count}
    counters["compile times"] = {
        name: len(times) for name, times in torch._dynamo.utils.compilation_time_metrics.items()
    }
    return counters


@pytest.fixture(scope="module")
def compiled() -> SimpleNamespace:
    gated = tgate_compile.optimize(build(), 3, backend="inductor")
    before = compiler_counters()
    first = run(gated)
    assert compiler_counters() != before, "the counters do not see a compilation"
    return SimpleNamespace(gated=gated, plain=build(), first=first)


@pytest.fixture
def settled(compiled: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """Return the compiled pipeline, and check that the test compiles nothing."""
    scheduler = compiled.plain.scheduler
    store = compiled.gated._tgate_compile.hook.store
    made, before = store.compilations, compiler_counters()
    yield compiled
    compiled.plain.scheduler = compiled.gated.scheduler = scheduler
    assert store.compilations == made
    assert compiler_counters() == before


def expected_of(pipe: Any, gate: int = 3, calls_per_step: int = 1, **call: Any) -> torch.Tensor:
    with hook_reference(pipe, gate, calls_per_step=calls_per_step):
        return run(pipe, **call)


def test_two_graphs(settled: SimpleNamespace) -> None:
    assert settled.gated._tgate_compile.hook.store.compilations == 2
    assert [v.name for v in tgate_compile.describe(settled.gated).variants] == ["full", "pruned"]


def test_right(settled: SimpleNamespace) -> None:
    assert difference(settled.first, expected_of(settled.plain)) < TOLERANCE
    plain = run(settled.plain)
    assert_differ(settled.first, plain)
    assert difference(run(settled.gated, gate_step=1000), plain) < TOLERANCE


def test_second_call(settled: SimpleNamespace) -> None:
    # This call crosses the gate.
    assert torch.equal(run(settled.gated), settled.first)


def test_other_seeds_prompts_and_scales(settled: SimpleNamespace) -> None:
    call = {"prompt": "blue dog", "seed": 5, "guidance_scale": 3.0, "negative_prompt": "snow"}
    assert difference(run(settled.gated, **call), expected_of(settled.plain, **call)) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 4, 11, 25])
def test_other_numbers_of_steps(settled: SimpleNamespace, steps: int) -> None:
    assert difference(run(settled.gated, steps=steps), expected_of(settled.plain, steps=steps)) < TOLERANCE


@pytest.mark.parametrize("gate", [1, 2, 5, 0.9])
def test_other_gates(settled: SimpleNamespace, gate: int | float) -> None:
    expected = expected_of(settled.plain, 5 if gate == 0.9 else gate)  # type: ignore[arg-type]
    assert difference(run(settled.gated, gate_step=gate), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "warmup_calls", "options"),
    [
        ("LCMScheduler", 0, {}),
        ("DPMSolverMultistepScheduler", 0, {}),
        ("PNDMScheduler", 1, {"skip_prk_steps": True}),
    ],
)
def test_other_schedulers(settled: SimpleNamespace, name: str, warmup_calls: int, options: dict[str, Any]) -> None:
    for pipe in (settled.gated, settled.plain):
        pipe.scheduler = getattr(diffusers, name)(**VELOCITY, **options)
    result = run(settled.gated)
    with hook_reference(settled.plain, 3, warmup_calls=warmup_calls):
        expected = run(settled.plain)
    assert difference(result, expected) < TOLERANCE
    assert_differ(result, run(settled.plain))
    assert_differ(result, settled.first)


def test_hundred_calls(settled: SimpleNamespace) -> None:
    for _ in range(100):
        last = run(settled.gated, steps=4)
    assert difference(last, expected_of(settled.plain, steps=4)) < TOLERANCE


def test_weights_changed_in_place(settled: SimpleNamespace) -> None:
    unets = [settled.gated.unet, settled.plain.unet]
    before = {name: value.clone() for name, value in unets[0].state_dict().items()}
    with torch.no_grad():
        for unet in unets:
            unet.conv_in.weight.mul_(1.2)
            unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(1.5)
    changed = run(settled.gated)
    expected = expected_of(settled.plain)
    for unet in unets:
        unet.load_state_dict(before)
    assert_differ(changed, settled.first)
    assert difference(changed, expected) < TOLERANCE
    assert torch.equal(run(settled.gated), settled.first)


def test_weights_replaced_by_others_of_the_same_shape(settled: SimpleNamespace) -> None:
    for pipe in (settled.gated, settled.plain):
        for parameter in pipe.unet.parameters():
            parameter.data = parameter.data.clone()
    assert torch.equal(run(settled.gated), settled.first)


def test_the_same_parameters_as_the_model(settled: SimpleNamespace) -> None:
    parameters = {id(parameter) for parameter in settled.gated.unet.parameters()}
    for variant in settled.gated._tgate_compile.hook.store.compiled:
        assert {id(weight) for weight in variant.weights} <= parameters


def test_exception_and_interrupt(settled: SimpleNamespace) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise ZeroDivisionError
        return tensors

    with pytest.raises(ZeroDivisionError):
        run(settled.gated, callback_on_step_end=fail)
    assert torch.equal(run(settled.gated), settled.first)


def test_global_settings_are_left_alone(settled: SimpleNamespace) -> None:
    before = torch._inductor.config.save_config_portable()
    run(settled.gated)
    assert torch._inductor.config.save_config_portable() == before


@pytest.mark.heavy
def test_float_timesteps_are_compiled_once(compiled: SimpleNamespace) -> None:
    # Not `settled`: this may compile, since a timestep of another dtype needs another graph.
    store = compiled.gated._tgate_compile.hook.store
    scheduler, made = compiled.gated.scheduler, store.compilations
    compiled.plain.scheduler = diffusers.EulerDiscreteScheduler(**VELOCITY)
    compiled.gated.scheduler = diffusers.EulerDiscreteScheduler(**VELOCITY)
    first = run(compiled.gated)
    assert difference(first, expected_of(compiled.plain)) < TOLERANCE
    assert store.compilations <= made + 2
    made = store.compilations
    compiled.gated.scheduler = diffusers.HeunDiscreteScheduler(**VELOCITY)
    run(compiled.gated)
    compiled.gated.scheduler = diffusers.EulerDiscreteScheduler(**VELOCITY)
    assert torch.equal(run(compiled.gated), first)
    compiled.gated.scheduler = compiled.plain.scheduler = scheduler
    assert torch.equal(run(compiled.gated), compiled.first)
    assert store.compilations == made
