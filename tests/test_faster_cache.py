"""FasterCache's guidance part: its rule, and its images against diffusers' own and against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig
from diffusers.hooks import apply_faster_cache
from diffusers.hooks.faster_cache import _UNCOND_COND_INPUT_KWARGS_IDENTIFIERS, _split_low_high_freq

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.hook_reference import hook_reference
from tests.tiny_joint import JOINT
from tests.tiny_pipelines import pixart, pixart_prompt
from tests.tiny_video import ltx, ltx_call, wan, wan_call
from tgate_compile import (
    PAB,
    AdaptiveGuidance,
    BlockCache,
    ConfigurationError,
    DeepCache,
    FasterCache,
    FrozenText,
    Schedule,
    TGate,
    UnsupportedModelError,
    load_schedule,
    save_schedule,
)

# diffusers' own, when it splits predictions into frequencies.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

STEPS = 8
#: Computes steps 0, 1, 3 and 6; the low frequencies have their weight until step 5, the high ones from step 4 on.
METHOD = FasterCache(3, begin=0.25, low_weight=1.2, low_end=0.75, high_weight=0.9, high_begin=0.5)
STRIP = "FFwFwwFw"


@pytest.mark.parametrize(
    ("schedule", "strip"),
    [
        (Schedule.of(METHOD), STRIP),
        (Schedule.of(FasterCache()), "FFFwwFww"),
        (FasterCache(2, begin=0.0) + TGate(5), "FwFwFppp"),
        (FasterCache(2, begin=0.0) + TGate(4), "FwFFpppp"),  # the step before the gate computes both halves
        (FasterCache(4, begin=0.0) + AdaptiveGuidance(6), "FwwwFwff"),
    ],
    ids=str,
)
def test_strips(schedule: Schedule, strip: str) -> None:
    assert schedule.strip(STEPS) == strip
    assert schedule.strip(STEPS, guided=False) == strip.lower().replace("w", "f")


@pytest.mark.parametrize(
    "other", [PAB(4, 2), DeepCache(3), BlockCache(2), FrozenText(4), TGate(5, sp_interval=2), TGate(5, text_interval=2)]
)
def test_methods_that_cache_both_halves_are_refused(other: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"FasterCache cannot be combined with .* the values of both halves"):
        FasterCache(3) + other


@pytest.mark.parametrize("options", [{"interval": 1}, {"begin": 1.5}, {"low_weight": float("nan")}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        FasterCache(**options)


def test_it_is_kept_in_schedule_files(tmp_path: Path) -> None:
    save_schedule(METHOD + TGate(7), tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json") == METHOD + TGate(7)


def latents_of(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent", return_dict=False)
    return torch.as_tensor(result[0])


def pixart_call(batch: int = 1) -> dict[str, Any]:
    return {**pixart_prompt(batch), "guidance_scale": 4.0}


@contextmanager
def as_in_diffusers(denoiser: torch.nn.Module, until: int = STEPS, **options: Any) -> Iterator[None]:
    """Apply diffusers' FasterCache with the settings of `METHOD`, its attention part off, to the steps before `until`.

    As timesteps it gets 1000, 875, 750 and so on.
    """
    step = -1

    def count(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal step
        step += 1

    config = FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, -1),
        temporal_attention_timestep_skip_range=(-1, -1),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(1000 - 125 * until + 60, 800),
        low_frequency_weight_update_timestep_range=(300, 1001),
        high_frequency_weight_update_timestep_range=(-1, 560),
        alpha_low_frequency=1.2,
        alpha_high_frequency=0.9,
        current_timestep_callback=lambda: 1000 - 125 * step,
        **options,
    )
    apply_faster_cache(denoiser, config)
    # A hook of the module runs before diffusers' forward, which reads the timestep first of all.
    handle = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


POOLED = (*_UNCOND_COND_INPUT_KWARGS_IDENTIFIERS, "pooled_projections")
SWEEP = pytest.mark.sweep


@pytest.mark.parametrize(
    ("build", "call", "options"),
    [
        (pixart, pixart_call, {"tensor_format": "BCHW"}),
        pytest.param(
            JOINT["StableDiffusion3Pipeline"].build,
            lambda: JOINT["StableDiffusion3Pipeline"].call(1),
            {"tensor_format": "BCHW", "_unconditional_conditional_input_kwargs_identifiers": POOLED},
            marks=SWEEP,
        ),
        pytest.param(
            JOINT["CogVideoXPipeline"].build,
            lambda: JOINT["CogVideoXPipeline"].call(1),
            {"tensor_format": "BFCHW"},
            marks=SWEEP,
        ),
    ],
    ids=["pixart", "sd3", "cogvideox"],
)
def test_it_is_as_in_diffusers(build: Callable[[], Any], call: Callable[[], Any], options: dict[str, Any]) -> None:
    ours, theirs = build(), build()
    plain = latents_of(ours, call())
    tgate_compile.optimize(ours, METHOD, backend="eager")
    images = latents_of(ours, call())
    with as_in_diffusers(theirs.transformer, **options):
        assert_same(images, latents_of(theirs, call()))
    assert_differ(images, plain)
    described = tgate_compile.describe(ours)
    assert described.strip == STRIP
    foreseen = tgate_compile.describe(ours, **call(), num_inference_steps=STEPS, output_type="latent")
    assert foreseen.strip == STRIP
    half, whole = sorted(described.variants, key=lambda variant: variant.batch)
    assert (half.batch, whole.batch) == (1, 2)
    assert 0.45 < half.macs / whole.macs < 0.55


@pytest.mark.heavy
def test_with_a_gate_it_is_as_in_diffusers_up_to_the_gate() -> None:
    ours, theirs = pixart(), pixart()
    schedule = METHOD + TGate(7)
    tgate_compile.optimize(ours, schedule, backend="eager")
    images = latents_of(ours, pixart_call(2))
    assert tgate_compile.describe(ours).strip == "FFwFwwFp"
    with as_in_diffusers(theirs.transformer, until=7, tensor_format="BCHW"), hook_reference(theirs, 7):
        assert_same(images, latents_of(theirs, pixart_call(2)))


@contextmanager
def estimated_with_hooks(denoiser: torch.nn.Module, computed: str) -> Iterator[None]:
    """Estimate the second of each two calls with diffusers' split into frequencies, where `computed` has a `c`.

    diffusers' FasterCache assumes that both halves are in one batch; in a pipeline with two calls, it takes one half of
    a batch of one, and fails.
    """
    original, call = denoiser.forward, 0
    kept: dict[str, torch.Tensor] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal call
        step, second = divmod(call, 2)
        call += 1
        if not second or computed[step] == "F":
            (output,) = original(*args, **kwargs)
            if not second:
                kept["cond"] = output.clone()
            else:
                pairs = zip(parts(output), parts(kept["cond"]), strict=True)
                kept["low"], kept["high"] = (uncond - cond for uncond, cond in pairs)
            return (output,)
        kept["low"] = kept["low"] * (1.2 if step < 6 else 1.0)
        kept["high"] = kept["high"] * (0.9 if step >= 4 else 1.0)
        low, high = parts(kept["cond"])
        cond = kept["cond"]
        estimate = torch.fft.ifft2(torch.fft.ifftshift(kept["low"] + low + kept["high"] + high)).real
        return (estimate.reshape(cond.shape[0], cond.shape[2], cond.shape[1], *cond.shape[3:]).transpose(1, 2),)

    def parts(video: torch.Tensor) -> Any:  # [B, C, F, H, W]
        return _split_low_high_freq(video.transpose(1, 2).flatten(0, 1).float())

    denoiser.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del denoiser.forward


def test_a_pipeline_with_two_calls() -> None:
    """diffusers' own cannot run it; see `estimated_with_hooks`."""
    ours, theirs = wan(), wan()
    plain = latents_of(ours, wan_call())
    with estimated_with_hooks(theirs.transformer, STRIP):
        expected = latents_of(theirs, wan_call())
    tgate_compile.optimize(ours, METHOD, backend="eager")
    images = latents_of(ours, wan_call())
    assert_same(images, expected)
    assert_differ(images, plain)
    described = tgate_compile.describe(ours)
    assert described.strip == STRIP
    assert len(described.last_steps) == 4 * 2 + 4
    with as_in_diffusers(theirs.transformer, tensor_format="BCFHW"), pytest.raises(IndexError):
        latents_of(theirs, wan_call())


@pytest.mark.heavy
def test_tokens_have_no_spatial_frequencies() -> None:
    pipe = tgate_compile.optimize(ltx(), FasterCache(3), backend="eager")
    with pytest.raises(UnsupportedModelError, match="LTXVideoTransformer3DModel returns"):
        latents_of(pipe, ltx_call())


def test_bundles_are_refused(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(pixart(), FasterCache(3), backend="eager")
    with pytest.raises(UnsupportedModelError, match="estimates predictions"):
        tgate_compile.export(pipe, tmp_path / "bundle", call=pixart_call())
