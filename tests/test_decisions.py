"""Steps that are decided while they run: first-block cache, DBCache and TeaCache, against diffusers and hooks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cache_dit
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.test_joint_attention import CASES as JOINT
from tests.test_static_methods import SWEEP, latents_of, pixart_call
from tests.tiny_pipelines import pixart, run, stable_diffusion
from tests.tiny_video import ltx, ltx_call, wan, wan_call
from tgate_compile import (
    AdaptiveGuidance,
    BlockCache,
    ConfigurationError,
    DBCache,
    DeepCache,
    FirstBlockCache,
    Fora,
    FrozenText,
    Method,
    Schedule,
    TeaCache,
    TGate,
    UnsupportedModelError,
    load_schedule,
    save_schedule,
)
from tgate_compile._cli.app import app
from tgate_compile.bundle.plan_rows import plan_from, plans_of
from tgate_compile.methods.decisions import Decider, Rule
from tgate_compile.runtime import BundlePipeline

STEPS = 8
#: A measure is never above this, so blocks are skipped wherever they may be.
ALWAYS = 1e9
#: A measure is never below this, so blocks are never skipped.
NEVER = 1e-12


# The rules.


@pytest.mark.parametrize(
    ("method", "strip"),
    [
        (FirstBlockCache(), "FBBBBBBBBB"),
        (FirstBlockCache() + TGate(5), "FBBBFpcccc"),
        (FirstBlockCache() + AdaptiveGuidance(step=4), "FBBBfbbbbb"),
        (DBCache(front=1, warm_up=3), "FFFBBBBBBB"),
        (DBCache(front=1, mask="110100"), "FFBFBBBBBB"),
        (DBCache(front=1, warm_up=3) + TGate(2), "FFpccccccc"),
        (TeaCache(model="flux"), "FBBBBBBBBF"),
    ],
    ids=str,
)
def test_strips(method: Method | Schedule, strip: str) -> None:
    schedule = method if isinstance(method, Schedule) else Schedule.of(method)
    assert schedule.strip(10) == strip


def decisions(rule: Rule, measures: list[float]) -> str:
    decider = Decider(rule)
    return "".join("K" if decider.skips(measure) else "F" for measure in measures)


def test_rules() -> None:
    assert decisions(Rule(0.1), [0.05, 0.1, 0.2, 0.09, math.nan]) == "KFFKF"
    assert decisions(Rule(0.1, at_threshold=True), [0.1, 0.11]) == "KF"
    assert decisions(Rule(0.1, most_in_row=2), [0.01] * 7) == "KKFKKFK"
    assert decisions(Rule(0.1, most=3), [0.01] * 6) == "KKKFFF"
    # 2 x + 0.01: the estimates are 0.03 each; the fourth brings the sum to 0.12, and it starts again.
    assert decisions(Rule(0.1, accumulates=True, coefficients=(2.0, 0.01)), [0.01] * 6) == "KKKFKK"
    decider = Decider(Rule(0.1, accumulates=True))
    assert [decider.skips(0.06), decider.computed(), decider.skips(0.06)] == [True, None, True]


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: FirstBlockCache(0.0), "threshold must be above 0"),
        (lambda: FirstBlockCache("0.1"), "threshold must be a number"),  # type: ignore[arg-type]
        (lambda: FirstBlockCache(forecast=3), "an order from 0 to 2"),
        (lambda: DBCache(front=0), "front must be a whole number, at least 1"),
        (lambda: DBCache(1.0), "between 0 and 1"),
        (lambda: DBCache(mask="01"), "begins with 1"),
        (lambda: TeaCache(), "needs either the model"),
        (lambda: TeaCache(model="flux", coefficients=(1, 0)), "needs either the model"),
        (lambda: TeaCache(model="fluks"), 'Did you mean "flux"'),
        (lambda: TeaCache(coefficients=(1, 0), measured="output"), "measured must be one of"),
        (lambda: FirstBlockCache() + DBCache(), "both cache the values of kind 'blocks'"),
        (lambda: FirstBlockCache() + Fora(3), "cannot be combined"),
        (lambda: FirstBlockCache() + DeepCache(3), "cannot be combined"),
        (lambda: FirstBlockCache() + FrozenText(3), "skips have no values for Frozen text to cache"),
        (lambda: FirstBlockCache() + TGate(10, sp_interval=5), "cannot be combined with T-GATE"),
        (lambda: FirstBlockCache() + TGate(10, text_interval=5), "cannot be combined with T-GATE"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], telling: str) -> None:
    with pytest.raises(ConfigurationError, match=telling):
        make()


def test_schedule_files_options_and_costs(tmp_path: Path) -> None:
    schedule = TeaCache(0.3, coefficients=(1.5, 0.0), forecast=1) + TGate(6)
    save_schedule(schedule, tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json") == schedule
    done = CliRunner().invoke(app, ["strip", "--firstblock-threshold", "0.08", "--gate-step", "4", "--steps", "7"])
    assert done.exit_code == 0, done.output
    assert "FBBFpcc" in done.stdout
    assert "full or blocks-skipped" in done.stdout
    rows = plans_of(schedule, {})
    assert rows is not None
    assert [row.letter for row in plan_from(rows, 12, guided=True)] == list(schedule.strip(12))


# Images.


def joint(name: str) -> tuple[Callable[[], Any], Callable[[], dict[str, Any]]]:
    case = JOINT[name]
    return lambda: case.build(case.tiny.build()), lambda: case.call(1)


#: Pipelines with their calls, and a threshold at which some steps are skipped and others are not.
PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], float]] = {
    "pixart": (pixart, pixart_call, 0.15),
    "sd3": (*joint("StableDiffusion3Pipeline"), 0.2),
    "flux": (*joint("FluxPipeline"), 0.45),
    "qwen-image": (*joint("QwenImagePipeline"), 0.5),
    "wan": (wan, wan_call, 0.034),
    "ltx": (ltx, ltx_call, 0.035),
}


@contextmanager
def recorded() -> Iterator[list[bool]]:
    """Record the decisions of diffusers' first-block cache: whether blocks are computed."""
    original = FBCHeadBlockHook._should_compute_remaining_blocks
    made: list[bool] = []

    def recording(self: Any, residual: torch.Tensor) -> bool:
        made.append(original(self, residual))
        return made[-1]

    FBCHeadBlockHook._should_compute_remaining_blocks = recording
    try:
        yield made
    finally:
        FBCHeadBlockHook._should_compute_remaining_blocks = original


def apply_theirs(transformer: Any, threshold: float) -> None:
    config = FirstBlockCacheConfig(threshold=threshold)
    if hasattr(transformer, "enable_cache"):
        transformer.enable_cache(config)
    else:
        apply_first_block_cache(transformer, config)
        _set_cache_context(transformer, CacheContext("inference"))  # which the pipelines of PixArt and SD3 do not


def computed_calls(pipe: Any) -> list[bool]:
    """Return for each denoiser call of the last generation whether its blocks were computed."""
    return ["blocks-skipped" not in name for _, name in tgate_compile.describe(pipe).last_steps]


@pytest.mark.parametrize(
    "name", ["pixart", "wan", *(pytest.param(name, marks=SWEEP) for name in ("flux", "qwen-image", "ltx"))]
)
def test_first_block_cache_is_as_in_diffusers(name: str) -> None:
    """diffusers' hook fails with SD3, whose last block returns no text."""
    build, call, threshold = PIPELINES[name]
    theirs = build()
    plain = latents_of(theirs, call())
    apply_theirs(theirs.transformer, threshold)
    with recorded() as decided:
        expected = latents_of(theirs, call())
    ours = tgate_compile.optimize(build(), FirstBlockCache(threshold), backend="eager")
    images = latents_of(ours, call())
    assert computed_calls(ours) == decided
    assert {True, False} <= set(decided[2:])
    assert_same(images, expected)
    assert_differ(images, plain)
    assert torch.equal(latents_of(ours, call()), images)  # nothing is left of the first call
    # Two calls have compiled each graph once: the whole step, the head, the tail and the finish. Qwen-Image has them
    # for each half, because the two texts have different lengths.
    assert ours._tgate_compile.hook.store.compilations == (8 if name == "qwen-image" else 4)


def test_nothing_is_left_after_an_exception() -> None:
    """In diffusers, the residuals of an interrupted call stay, and the next call compares its first step with them."""
    call, threshold = pixart_call(), PIPELINES["pixart"][2]

    def interrupt(pipe: Any) -> None:
        def stop(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        step = pipe.scheduler.step
        pipe.scheduler.step = stop
        with pytest.raises(KeyboardInterrupt):
            latents_of(pipe, call)
        pipe.scheduler.step = step

    theirs = pixart()
    apply_theirs(theirs.transformer, threshold)
    interrupt(theirs)
    with recorded() as decided:
        latents_of(theirs, call)
    assert not decided[0]
    ours = tgate_compile.optimize(pixart(), FirstBlockCache(threshold), backend="eager")
    expected = latents_of(ours, call)
    interrupt(ours)
    assert torch.equal(latents_of(ours, call), expected)
    assert computed_calls(ours)[0]


@pytest.mark.parametrize("name", [pytest.param("pixart", marks=pytest.mark.heavy), pytest.param("sd3", marks=SWEEP)])
def test_composed_with_a_gate(name: str) -> None:
    """If blocks are always skipped, or never, the images are those of steps that are known beforehand."""
    build, call, _ = PIPELINES[name]
    mask = "1001" + "1" + "0" * 3
    for threshold, same in ((ALWAYS, BlockCache(mask=mask) + TGate(4)), (NEVER, Schedule.of(TGate(4)))):
        expected = latents_of(tgate_compile.optimize(build(), same, backend="eager"), call())
        ours = tgate_compile.optimize(build(), FirstBlockCache(threshold) + TGate(4), backend="eager")
        foreseen = tgate_compile.describe(ours, **call(), num_inference_steps=STEPS, output_type="latent")
        assert foreseen.strip == "FBBFpccc"
        assert_same(latents_of(ours, call()), expected)
        described = tgate_compile.describe(ours)
        assert described.strip == ("FKKFplll" if threshold == ALWAYS else "FFFFpppp")
        assert described.cache_bytes == foreseen.cache_bytes


@pytest.mark.sweep
def test_guidance_that_ends_by_similarity() -> None:
    """Values of both halves are reduced to those of the kept one."""
    schedule = FirstBlockCache(ALWAYS) + AdaptiveGuidance(similarity=0.001)
    same = BlockCache(99) + AdaptiveGuidance(similarity=0.001)
    expected = latents_of(tgate_compile.optimize(pixart(), same, backend="eager"), pixart_call())
    ours = tgate_compile.optimize(pixart(), schedule, backend="eager")
    assert_same(latents_of(ours, pixart_call()), expected)
    assert tgate_compile.describe(ours).strip[1:].islower()


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=SWEEP)])
def test_forecasts(order: int) -> None:
    """The steps that a decision computes are the support of the forecast, as with a mask."""
    threshold = PIPELINES["pixart"][2]
    ours = tgate_compile.optimize(pixart(), FirstBlockCache(threshold, forecast=order), backend="eager")
    images = latents_of(ours, pixart_call())
    mask = "".join("01"[computed] for computed in computed_calls(ours))
    assert {"0", "1"} == set(mask)
    same = tgate_compile.optimize(pixart(), BlockCache(mask=mask, forecast=order), backend="eager")
    assert_same(images, latents_of(same, pixart_call()))
    without = tgate_compile.optimize(pixart(), BlockCache(mask=mask), backend="eager")
    assert_differ(images, latents_of(without, pixart_call()))


# DBCache.


@contextmanager
def dual_block_cache(denoiser: torch.nn.Module, blocks: list[str], method: DBCache) -> Iterator[list[bool]]:
    """DBCache with plain hooks: the middle blocks always run, but their results may be discarded."""
    first, last = blocks[method.front], blocks[len(blocks) - method.back - 1]
    before: list[torch.Tensor] = []
    kept: dict[str, torch.Tensor] = {}
    made: list[bool] = []
    in_row = 0

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        kept["start"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def decide(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal in_row
        kept["enters"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        residual = kept["enters"] - kept["start"]
        skipped = False
        if len(made) >= method.warm_up:
            change = (residual - before[0]).abs().mean() / before[0].abs().mean()
            skipped = bool(change < method.threshold) and in_row < (method.most_in_row or len(made))
        in_row = in_row + 1 if skipped else 0
        made.append(not skipped)
        if not skipped:
            before[:] = [residual]

    def change(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if made[-1]:
            kept["residual"] = output - kept["enters"]
        return kept["enters"] + kept["residual"]

    handles = [
        denoiser.get_submodule(blocks[0]).register_forward_pre_hook(enter, with_kwargs=True),
        denoiser.get_submodule(first).register_forward_pre_hook(decide, with_kwargs=True),
        denoiser.get_submodule(last).register_forward_hook(change),
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def long_wan() -> Any:
    return wan(num_layers=4)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(DBCache(0.1, front=2, back=1, warm_up=2), marks=SWEEP),
        pytest.param(DBCache(0.1, front=1, back=0, warm_up=1, most_in_row=1), marks=SWEEP),
    ],
    ids=str,
)
def test_dbcache_is_as_with_hooks(method: DBCache) -> None:
    call = {**wan_call(), "guidance_scale": 1.0}
    reference = long_wan()
    with dual_block_cache(reference.transformer, [f"blocks.{i}" for i in range(4)], method) as made:
        expected = latents_of(reference, call)
    ours = tgate_compile.optimize(long_wan(), method, backend="eager")
    assert_same(latents_of(ours, call), expected)
    assert computed_calls(ours) == made
    assert {True, False} <= set(made)


@contextmanager
def with_cache_dit(pipe: Any, method: DBCache, forecast: int = 0) -> Iterator[None]:
    """Let cache-dit skip blocks as `method` does."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=method.front,
        Bn_compute_blocks=method.back,
        max_warmup_steps=method.warm_up,
        max_cached_steps=method.most_skipped or -1,
        max_continuous_cached_steps=method.most_in_row or -1,
        residual_diff_threshold=method.threshold,
        steps_computation_mask=[int(digit) for digit in method.mask] or None,
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=forecast) if forecast else None
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("pixart", DBCache(0.15, front=1, warm_up=1)),
        ("wan", DBCache(0.034, front=2, back=1, warm_up=2, most_in_row=1)),
        pytest.param("wan", DBCache(0.034, front=1, warm_up=1, most_skipped=2), marks=SWEEP),
        pytest.param("wan", DBCache(0.034, front=1, mask="11010000"), marks=SWEEP),
        pytest.param("flux", DBCache(0.45, front=1, back=1, warm_up=2), marks=SWEEP),
        pytest.param("qwen-image", DBCache(0.5, front=1, warm_up=1), marks=SWEEP),
    ],
    ids=str,
)
def test_dbcache_is_as_in_cache_dit(name: str, method: DBCache) -> None:
    build, call, _ = PIPELINES[name]
    build = long_wan if name == "wan" else build
    theirs = build()
    plain = latents_of(theirs, call())
    with with_cache_dit(theirs, method):
        expected = latents_of(theirs, call())
        seen = cache_dit.summary(theirs)[0]
    ours = tgate_compile.optimize(build(), method, backend="eager")
    assert_same(latents_of(ours, call()), expected)
    assert_differ(expected, plain)
    made = computed_calls(ours)
    halves = (made[::2], made[1::2]) if seen.cfg_cached_steps else (made,)
    skipped = [[step for step, computed in enumerate(half) if not computed] for half in halves]
    assert skipped == [each for each in (seen.cached_steps, seen.cfg_cached_steps) if each]


@pytest.mark.parametrize(("warm_up", "theirs"), [(4, 1), pytest.param(3, 0, marks=SWEEP)])
def test_forecasts_are_as_in_cache_dit(warm_up: int, theirs: int) -> None:
    """cache-dit counts steps only from the first computed one on, and takes no difference before its third.

    So with a warm-up of three steps, an extrapolation of order 1 still repeats the last value.
    """
    method = DBCache(0.3, front=1, warm_up=warm_up, forecast=1)
    pipe = pixart()
    with with_cache_dit(pipe, method, forecast=1):
        expected = latents_of(pipe, pixart_call())
    ours = tgate_compile.optimize(pixart(), dataclasses.replace(method, forecast=theirs), backend="eager")
    assert_same(latents_of(ours, pixart_call()), expected)
    assert computed_calls(ours) == [True] * warm_up + [False] * (STEPS - warm_up)


# TeaCache.


@contextmanager
def tea_cache(denoiser: torch.nn.Module, method: TeaCache, last: str) -> Iterator[list[bool]]:
    """TeaCache with plain hooks, for a transformer whose blocks begin with `norm1(hidden_states, emb=temb)`."""
    before: list[torch.Tensor] = []
    kept: dict[str, torch.Tensor] = {}
    made: list[bool] = []
    total = 0.0

    def decide(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal total
        kept["enters"] = kwargs["hidden_states"]
        modulated = module.norm1(kwargs["hidden_states"], emb=kwargs["temb"])[0]
        if len(made) in (0, STEPS - 1):
            computed = True
        else:
            change = float((modulated - before[0]).abs().mean() / before[0].abs().mean())
            powers = reversed(range(len(method.coefficients)))
            total += sum(c * change**power for c, power in zip(method.coefficients, powers, strict=True))
            computed = total >= method.threshold
        total = 0.0 if computed else total
        made.append(computed)
        before[:] = [modulated]

    def change(module: torch.nn.Module, args: Any, output: Any) -> Any:
        text, image = output
        if made[-1]:
            kept["residual"] = image - kept["enters"]
        return text, kept["enters"] + kept["residual"]

    handles = [
        denoiser.get_submodule("transformer_blocks.0").register_forward_pre_hook(decide, with_kwargs=True),
        denoiser.get_submodule(last).register_forward_hook(change),
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def test_teacache_is_as_with_hooks() -> None:
    build, call, _ = PIPELINES["flux"]
    method = TeaCache(1.0, coefficients=(1.5, 0.01))
    reference = build()
    with tea_cache(reference.transformer, method, "single_transformer_blocks.1") as made:
        expected = latents_of(reference, call())
    ours = tgate_compile.optimize(build(), method, backend="eager")
    assert_same(latents_of(ours, call()), expected)
    assert computed_calls(ours) == made
    assert {True, False} <= set(made[1:-1])


@pytest.mark.sweep
def test_teacache_of_the_time_embedding() -> None:
    """The measure depends on the timesteps alone, so all prompts have the same decisions."""
    method = TeaCache(0.5, coefficients=(1.0, 0.0), measured="time embedding")
    ours = tgate_compile.optimize(wan(), method, backend="eager")
    latents_of(ours, wan_call())
    made = computed_calls(ours)
    assert made[::2] == made[1::2]  # the halves
    embedded: list[torch.Tensor] = []
    theirs = wan()
    theirs.transformer.condition_embedder.time_embedder.register_forward_hook(
        lambda module, args, output: embedded.append(output)
    )
    latents_of(theirs, wan_call())
    changes = [
        float((a - b).abs().mean() / b.abs().mean()) for b, a in zip(embedded[::2], embedded[2::2], strict=False)
    ]
    decider = Decider(Rule(0.5, accumulates=True))
    expected = [True, *(not decider.skips(change) for change in changes[:-1]), True]
    assert made[::2] == expected


# What cannot be done is refused.


def test_several_stacks_are_refused() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), FirstBlockCache(), backend="eager")
    with pytest.raises(UnsupportedModelError, match="stacks of transformer blocks, and a decision at run time needs"):
        run(pipe, steps=2)


def test_a_value_that_is_not_there_is_refused() -> None:
    """FLUX embeds the guidance scale as it embeds the timestep."""
    build, call, _ = PIPELINES["flux"]
    method = TeaCache(coefficients=(1, 0), measured="time embedding")
    pipe = tgate_compile.optimize(build(), method, backend="eager")
    with pytest.raises(UnsupportedModelError, match="there are 2 values of modules called TimestepEmbedding"):
        latents_of(pipe, call())


def test_an_engine_refuses_it() -> None:
    from tgate_compile.serve import Engine

    pipe = tgate_compile.optimize(pixart(), FirstBlockCache(), backend="eager")
    with pytest.raises(ConfigurationError, match="decides for each request"):
        Engine(pipe)


# Backends and bundles.


@pytest.mark.sweep
def test_inductor_compiles_each_graph_once() -> None:
    method = FirstBlockCache(PIPELINES["pixart"][2])
    eager = tgate_compile.optimize(pixart(), method, backend="eager")
    expected = latents_of(eager, pixart_call())
    pipe = tgate_compile.optimize(pixart(), method, backend="inductor")
    assert difference(latents_of(pipe, pixart_call()), expected) < 1e-4
    store = pipe._tgate_compile.hook.store
    assert store.compilations == 4  # the whole step, the head, the tail and the finish
    assert computed_calls(pipe) == computed_calls(eager)
    latents_of(pipe, pixart_call())
    assert store.compilations == 4


@pytest.mark.sweep
def test_an_openvino_bundle(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pipe = tgate_compile.optimize(pixart(), FirstBlockCache(PIPELINES["pixart"][2]), backend="eager")
    expected = latents_of(pipe, pixart_call())
    made = computed_calls(pipe)
    call = {**pixart_call(), "num_inference_steps": STEPS, "output_type": "latent"}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "openvino", call=call, dynamic=False)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(latents_of(pipe, pixart_call()), expected) < 1e-3
    assert computed_calls(pipe) == made
    assert {True, False} <= set(made)


@pytest.mark.heavy
def test_an_onnx_bundle(tmp_path: Path) -> None:
    """It decides in the pipeline and in the numpy runtime as the pipeline does that it was exported from."""
    pytest.importorskip("onnxruntime")
    pipe = tgate_compile.load_demo_pipeline("pixart")
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:2]
    tgate_compile.optimize(pipe, FirstBlockCache(0.3, forecast=1), backend="eager")
    config = pipe.transformer.config
    size = (1, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(0))
    prompt = "a large red circle on a blue background"
    call = {"prompt": prompt, "num_inference_steps": STEPS}
    expected = pipe(**call, latents=latents, output_type="np").images[0]
    strip = tgate_compile.describe(pipe).strip
    assert {"F", "K"} <= set(strip[1:])
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=call, components="all", binding_times=False)

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema_version"] == 4
    assert manifest["method"]["rule"]["threshold"] == 0.3
    assert manifest["graphs"]["head"]["outputs"] == [{"name": "measure", "dtype": "float32", "shape": [1]}]
    assert set(manifest["graphs"]) == {"full", "head", "tail", "finish"}
    first, second = manifest["example"]["steps"][:2]
    assert (first["graph"], "tail" in first) == ("full", False)
    assert (second["graph"], second["tail"], second["finish"]) == ("head", "tail", "finish")

    for sequential in (False, True):
        steps: list[Any] = []
        image = BundlePipeline(folder, threads=1, sequential=sequential)(
            prompt, latents=latents.numpy(), num_inference_steps=STEPS, output="numpy", callback=steps.append
        )
        assert abs(image - expected).max() < 1e-3
        assert "".join(step.letter for step in steps) == strip
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    loaded = pipe(**call, latents=latents, output_type="np").images[0]
    assert abs(loaded - expected).max() < 1e-3
    assert tgate_compile.describe(pipe).strip == strip
