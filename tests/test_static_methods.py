"""FORA, Delta-DiT, MagCache and the block cache: their rules, and their images against hooks and diffusers' own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_mag_cache, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.hook_reference import hook_reference
from tests.joint_reference import TextReference, frozen_text
from tests.programs import noise
from tests.test_joint_attention import FLUX, SD3
from tests.tiny_pipelines import PROMPT, pixart, pixart_prompt, run, stable_diffusion
from tests.tiny_video import wan, wan_call
from tgate_compile import (
    PAB,
    AdaptiveGuidance,
    BlockCache,
    ConfigurationError,
    DeepCache,
    DeltaDiT,
    Fora,
    FrozenReferences,
    MagCache,
    Method,
    Schedule,
    TGate,
    UnsupportedModelError,
    load_schedule,
    save_schedule,
)
from tgate_compile._cli.app import app
from tgate_compile.bundle.plan_rows import plan_from, plans_of
from tgate_compile.methods.method import forecast_weights
from tgate_compile.runtime import BundlePipeline

STEPS = 8
#: Ratios for which steps are computed, skipped once and skipped several times in a row.
RATIOS = (1.0, 1.3, 1.1, 1.03, 0.99, 1.01, 1.2, 0.98)


# The rules.


@pytest.mark.parametrize(
    ("method", "strip"),
    [
        (Fora(3), "FHHFHHFHHFHH"),
        (Fora(3, warm_up=4), "FFFFHHFHHFHH"),
        (Fora(2) + TGate(5), "FHFHFphphphp"),
        (Fora(3) + AdaptiveGuidance(step=4), "FHHFfhhfhhfh"),
        (Fora(2, mask="1101"), "FFHFFFFFFFFF"),
        (BlockCache(3), "FKKFKKFKKFKK"),
        (BlockCache(mask="110010"), "FFKKFKFFFFFF"),
        (BlockCache(3) + TGate(6), "FKKFKFpllpll"),
        (DeltaDiT(2), "FMFMFMFKFKFK"),
        (DeltaDiT(3, boundary=0.25), "FMMFKKFKKFKK"),
        (DeltaDiT(2, boundary=0.5) + TGate(9), "FMFMFMFKFplp"),
    ],
    ids=str,
)
def test_strips(method: Method | Schedule, strip: str) -> None:
    schedule = method if isinstance(method, Schedule) else Schedule.of(method)
    assert schedule.strip(12) == strip


def test_the_rule_of_mag_cache() -> None:
    # Steps 0 and 1 are retained. From then on products of ratios: 1.1 is too far from 1; then 1.03 is within 0.06; with
    # 0.99 the sum is 0.03 + 0.0197; with 1.01 it is 0.0797, and so on.
    assert Schedule.of(MagCache(RATIOS, retention=0.25)).strip(8) == "FFFKKFFK"
    assert Schedule.of(MagCache(RATIOS, most_skipped=1, retention=0.25)).strip(8) == "FFFKFKFK"
    assert Schedule.of(MagCache(RATIOS, threshold=0.0)).strip(8) == "F" * 8
    assert Schedule.of(MagCache((1.0,))).strip(10) == "FFKKKFKKKF"
    assert (MagCache((1.0,)) + TGate(5)).strip(10) == "FFKKFplllp"


def test_weights_of_forecasts() -> None:
    assert forecast_weights([4], 7) == (1.0,)
    assert forecast_weights([4, 2], 5) == (1.5, -0.5)
    values = {step: 3.0 + 2.0 * step for step in range(9)}
    for steps in ([5, 4], [5, 2], [5, 4, 1], [7, 4, 3]):
        weights = forecast_weights(steps, 8)
        assert sum(weights) == pytest.approx(1.0)
        assert sum(w * values[s] for w, s in zip(weights, steps, strict=True)) == pytest.approx(values[8])


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: Fora(1), "at least 2"),
        (lambda: Fora(3, forecast=3), "an order from 0 to 2"),
        (lambda: BlockCache(mask="0110"), "begins with 1"),
        (lambda: DeltaDiT(boundary=2), "a fraction of the steps"),
        (lambda: MagCache(), "needs the ratios of the model"),
        (lambda: MagCache("1,2"), "needs the ratios of the model"),  # type: ignore[arg-type]
        (lambda: MagCache((1.0, float("nan"))), "each of the ratios must be a number"),
        (lambda: Fora(3) + PAB(4, 2), "both cache the values of kind 'self'"),
        (lambda: BlockCache(3) + PAB(4, 2), "the layers that Block cache skips have no values for PAB"),
        (lambda: BlockCache(3) + DeepCache(3), "cannot be combined"),
        (lambda: BlockCache(3) + FrozenReferences(1), "skips have no values for Frozen references to cache"),
        (lambda: (Fora(3) + FrozenReferences(1)).strip(9), "reuses cross, ff, reference, self together"),
        (lambda: BlockCache(3) + MagCache((1.0,)), "both cache the values of kind 'blocks'"),
        (lambda: BlockCache(3) + TGate(10, sp_interval=5), "Block cache cannot be combined with T-GATE"),
        (lambda: BlockCache(3) + TGate(10, text_interval=5), "Block cache cannot be combined with T-GATE"),
        (lambda: Fora(3, forecast=1) + TGate(10, text_interval=5), "FORA with a forecast cannot be combined"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], telling: str) -> None:
    with pytest.raises(ConfigurationError, match=telling):
        make()


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [Fora(3, forecast=2) + TGate(7), BlockCache(2) + AdaptiveGuidance(9), DeltaDiT(3, forecast=2) + TGate(9)],
    ids=str,
)
def test_rows_of_a_manifest(schedule: Schedule, guided: bool) -> None:
    plans = plans_of(schedule, {})
    assert plans is not None
    for steps in (1, 12, 40):
        letters = [one.letter for one in plan_from(plans, steps, guided=guided)]
        assert letters == list(schedule.strip(steps, guided=guided))


def test_schedule_files_and_options(tmp_path: Path) -> None:
    schedule = MagCache(RATIOS, front=1, forecast=1) + TGate(6)
    save_schedule(schedule, tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json") == schedule
    assert json.loads((tmp_path / "a.json").read_text())["schedule"]["magcache"]["ratios"] == list(RATIOS)
    options = ["--magcache-ratios", ",".join(map(str, RATIOS)), "--magcache-retention", "0.25", "--steps", "8"]
    done = CliRunner().invoke(app, ["strip", *options])
    assert done.exit_code == 0, done.output
    assert "FFFKKFFK" in done.stdout
    done = CliRunner().invoke(app, ["strip", "--blockcache-mask", "1101", "--steps", "5"])
    assert "FFKFF" in done.stdout
    assert CliRunner().invoke(app, ["strip", "--magcache-ratios", "1,two"]).exit_code == 2


# Images.


def latents_of(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent")
    return torch.as_tensor(result[0])


def pixart_call() -> dict[str, Any]:
    return {**pixart_prompt(), "guidance_scale": 4.0}


def sd3_pipe() -> Any:
    return SD3.build(SD3.tiny.build())


def flux_pipe() -> Any:
    return FLUX.build(FLUX.tiny.build())


def sd3_call() -> dict[str, Any]:
    return SD3.call(1)


def flux_call() -> dict[str, Any]:
    return FLUX.call(1)


def computed_steps(method: Method) -> list[bool]:
    return [letter in "Ff" for letter in Schedule.of(method).strip(STEPS)]


@contextmanager
def skipping(
    denoiser: torch.nn.Module, first: str, last: str, computed: list[bool], order: int = 0, calls: int = 1
) -> Iterator[None]:
    """Replace what the blocks from `first` to `last` change by forecasts from earlier changes, with plain hooks.

    The blocks still run, but at skipped steps their results are discarded.
    """
    states: dict[tuple[int, str], TaylorSeerState] = {}
    entered: dict[str, torch.Tensor] = {}
    call = -1

    def count(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal call
        call += 1

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        entered.update(image=kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        if isinstance(kwargs.get("encoder_hidden_states"), torch.Tensor):
            entered.update(text=kwargs["encoder_hidden_states"])

    def change(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return stream("image", output)
        text, image = output
        return None if text is None else stream("text", text), stream("image", image)

    def stream(name: str, value: torch.Tensor) -> torch.Tensor:
        step, half = divmod(call, calls)
        state = states.setdefault((half, name), TaylorSeerState(torch.float32, order))
        state.current_step = step
        if computed[step]:
            state.update((value - entered[name],))
            return value
        return entered[name] + state.predict()[0]

    handles = [
        denoiser.register_forward_pre_hook(count, with_kwargs=True),
        denoiser.get_submodule(first).register_forward_pre_hook(note, with_kwargs=True),
        denoiser.get_submodule(last).register_forward_hook(change),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Method, str, str]] = {
    "pixart": (pixart, pixart_call, BlockCache(3), "transformer_blocks.1", "transformer_blocks.1"),
    "pixart, whole": (
        pixart, pixart_call, BlockCache(3, 0, warm_up=2, forecast=1), "transformer_blocks.0", "transformer_blocks.1",
    ),
    "sd3": (sd3_pipe, sd3_call, BlockCache(2, 1, forecast=2), "transformer_blocks.1", "transformer_blocks.2"),
    "sd3, both streams": (sd3_pipe, sd3_call, BlockCache(3, 0, 1), "transformer_blocks.0", "transformer_blocks.1"),
    "flux": (
        flux_pipe, flux_call, BlockCache(2, 1, 1, forecast=1), "transformer_blocks.1", "single_transformer_blocks.0",
    ),
}  # fmt: skip


SWEEP = pytest.mark.sweep


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[SWEEP] if name == "sd3, both streams" else []) for name in CASES]
)
def test_the_block_cache_is_as_with_hooks(name: str) -> None:
    build, call, method, first, last = CASES[name]
    pipe = build()
    plain = latents_of(pipe, call())
    assert isinstance(method, BlockCache)
    with skipping(pipe.transformer, first, last, computed_steps(method), method.forecast):
        expected = latents_of(pipe, call())
    tgate_compile.optimize(pipe, method, backend="eager")
    ours = latents_of(pipe, call())
    assert_same(ours, expected)
    assert_differ(ours, plain)


def test_delta_dit_is_as_with_hooks() -> None:
    pipe, method = pixart(), DeltaDiT(2, blocks=1, boundary=0.5)
    strip = Schedule.of(method).strip(STEPS)
    with (
        skipping(pipe.transformer, *["transformer_blocks.0"] * 2, [letter != "K" for letter in strip]),
        skipping(pipe.transformer, *["transformer_blocks.1"] * 2, [letter != "M" for letter in strip]),
    ):
        expected = latents_of(pipe, pixart_call())
    tgate_compile.optimize(pipe, method, backend="eager")
    assert_same(latents_of(pipe, pixart_call()), expected)


@pytest.mark.parametrize(
    ("build", "call"),
    [(pixart, pixart_call), pytest.param(sd3_pipe, sd3_call, marks=SWEEP), (flux_pipe, flux_call)],
    ids=["pixart", "sd3", "flux"],
)
def test_mag_cache_is_as_in_diffusers(build: Callable[[], Any], call: Callable[[], Any]) -> None:
    ours = tgate_compile.optimize(build(), MagCache(RATIOS, retention=0.25), backend="eager")
    theirs = build()
    apply_mag_cache(
        theirs.transformer,
        MagCacheConfig(retention_ratio=0.25, num_inference_steps=STEPS, mag_ratios=torch.tensor(RATIOS)),
    )
    assert_same(latents_of(ours, call()), latents_of(theirs, call()))
    assert tgate_compile.describe(ours).strip.upper() == "FFFKKFFK"


def mask_of_taylorseer(interval: int, warm_up: int) -> str:
    """Return which steps diffusers computes.

    Its condition is `(step - warm_up - 1) % interval == 0`, so the first step after the warm-up is skipped and the next
    one computed, whatever the interval; only from there on does it compute every `interval`-th step. Its documentation
    says that a computed output is reused for `interval` steps. The paper's own code skips `interval - 1` steps from the
    beginning, as `Fora(interval, warm_up)` does.
    """
    return "".join(str(int(step < warm_up or (step - warm_up - 1) % interval == 0)) for step in range(STEPS))


MODULES = {
    "pixart": r"transformer_blocks\.\d+\.(attn1|attn2|ff)",
    "sd3": r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)",
    "flux": r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context)",
}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param("pixart", 0, marks=SWEEP),
        ("pixart", 1),
        ("pixart", 2),
        pytest.param("sd3", 1, marks=SWEEP),
        ("flux", 2),
    ],
)
def test_fora_with_forecasts_is_taylorseer_in_diffusers(name: str, order: int) -> None:
    build, call = {"pixart": (pixart, pixart_call), "sd3": (sd3_pipe, sd3_call), "flux": (flux_pipe, flux_call)}[name]
    mask = mask_of_taylorseer(3, 3)
    ours, theirs = build(), build()
    plain = latents_of(ours, call())
    tgate_compile.optimize(ours, Fora(mask=mask, forecast=order), backend="eager")
    config = TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=3, max_order=order, taylor_factors_dtype=torch.float32,
        cache_identifiers=[MODULES[name]],
    )  # fmt: skip
    apply_taylorseer_cache(theirs.transformer, config)
    _set_cache_context(theirs.transformer, CacheContext("inference"))  # which the pipelines of PixArt and SD3 do not
    expected = latents_of(theirs, call())
    images = latents_of(ours, call())
    assert_same(images, expected)
    assert_differ(images, plain)


def test_the_first_steps_that_diffusers_skips() -> None:
    assert mask_of_taylorseer(3, 3) == "11101001"
    assert Schedule.of(Fora(3, warm_up=3)).strip(STEPS) == "FFFHHFHH"
    assert mask_of_taylorseer(2, 3).replace("1", "F").replace("0", "H") == Schedule.of(Fora(2, warm_up=3)).strip(STEPS)


@pytest.mark.parametrize("method", [Fora(2, forecast=1), BlockCache(2, forecast=2)], ids=str)
def test_composed_with_a_gate(method: Method) -> None:
    """The costs are known beforehand, forecasts included, and few graphs serve all steps."""
    pipe = tgate_compile.optimize(pixart(), method + TGate(5), backend="eager")
    call = {**pixart_call(), "num_inference_steps": STEPS, "output_type": "latent"}
    foreseen = tgate_compile.describe(pipe, **call)
    latents_of(pipe, pixart_call())
    described = tgate_compile.describe(pipe)
    assert described.strip == foreseen.strip == (method + TGate(5)).strip(STEPS)
    assert described.cache_bytes == foreseen.cache_bytes
    assert len(described.variants) == 4
    without = tgate_compile.optimize(pixart(), type(method)(2) + TGate(5), backend="eager")
    latents_of(without, pixart_call())
    assert described.cache_bytes > tgate_compile.describe(without).cache_bytes


def skipped_as(schedule: Schedule, pipe: Any, first: str, last: str) -> Any:
    computed = [letter in "Ffp" for letter in schedule.strip(STEPS)]
    return skipping(pipe.transformer, first, last, computed)


def test_the_block_cache_after_a_gate() -> None:
    pipe, schedule = pixart(), BlockCache(2) + TGate(4)
    with skipped_as(schedule, pipe, *["transformer_blocks.1"] * 2), hook_reference(pipe, 4):
        expected = latents_of(pipe, pixart_call())
    tgate_compile.optimize(pipe, schedule, backend="eager")
    assert_same(latents_of(pipe, pixart_call()), expected)


def test_the_text_is_gone_after_a_gate_and_blocks_are_skipped() -> None:
    schedule, tiny = BlockCache(2, forecast=1) + TGate(4), SD3.tiny
    pipe = sd3_pipe()
    reference = TextReference(pipe.transformer, 4, tiny.image + tiny.text, tiny.text_tokens, halved=SD3.halved)
    computed = [letter in "Ffp" for letter in schedule.strip(STEPS)]
    blocks = skipping(pipe.transformer, "transformer_blocks.1", "transformer_blocks.2", computed, 1)
    with blocks, frozen_text(reference):
        expected = latents_of(pipe, sd3_call())
    tgate_compile.optimize(pipe, schedule, backend="eager")
    call = {**sd3_call(), "num_inference_steps": STEPS, "output_type": "latent"}
    foreseen = tgate_compile.describe(pipe, **call)
    assert_same(latents_of(pipe, sd3_call()), expected)
    described = tgate_compile.describe(pipe)
    assert (described.strip, described.cache_bytes) == ("FKFFplpl", foreseen.cache_bytes)
    with pytest.raises(UnsupportedModelError, match="joint attention"):
        latents_of(tgate_compile.optimize(sd3_pipe(), Fora(2) + TGate(4), backend="eager"), sd3_call())


def test_nothing_to_cache_is_said() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), BlockCache(2, front=1), backend="eager")
    with pytest.raises(UnsupportedModelError, match="is empty: its stacks of transformer blocks have 1"):
        run(pipe, steps=2)


@pytest.mark.sweep
def test_blocks_of_a_unet() -> None:
    pipe = stable_diffusion(layout="small")
    plain = run(pipe, steps=4)
    tgate_compile.optimize(pipe, BlockCache(2, front=0) + TGate(2), backend="eager")
    assert_differ(run(pipe, steps=4), plain)
    assert tgate_compile.describe(pipe).strip == "FFpl"


@pytest.mark.sweep
@pytest.mark.parametrize("method", [Fora(2, warm_up=3, forecast=1), MagCache(RATIOS, retention=0.25)], ids=str)
def test_a_video_model(method: Method) -> None:
    ours = tgate_compile.optimize(wan(), method, backend="eager")
    theirs = wan()
    if isinstance(method, MagCache):
        config: Any = MagCacheConfig(retention_ratio=0.25, num_inference_steps=STEPS, mag_ratios=torch.tensor(RATIOS))
    else:
        config = TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=3, max_order=1, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.(attn1|attn2|ffn)"],
        )  # fmt: skip
    theirs.transformer.enable_cache(config)
    assert_same(latents_of(ours, wan_call()), latents_of(theirs, wan_call()))


@pytest.mark.heavy
def test_inductor_compiles_each_graph_once() -> None:
    method = BlockCache(2, forecast=1)
    expected = latents_of(tgate_compile.optimize(pixart(), method, backend="eager"), pixart_call())
    pipe = tgate_compile.optimize(pixart(), method, backend="inductor")
    assert difference(latents_of(pipe, pixart_call()), expected) < 1e-4
    store = pipe._tgate_compile.hook.store
    compiled = store.compilations
    latents_of(pipe, pixart_call())
    assert store.compilations == compiled == 2
    assert tgate_compile.describe(pipe).strip == "FKFKFKFK"


@pytest.mark.heavy
def test_a_bundle_with_forecasts(tmp_path: Path) -> None:
    """The graphs have free sizes, and the runtime without PyTorch forecasts as well."""
    pytest.importorskip("onnxruntime")
    pipe = stable_diffusion(layout="small")
    schedule = BlockCache(2, front=0, forecast=1) + TGate(5)
    tgate_compile.optimize(pipe, schedule, backend="eager")
    call = {"prompt": PROMPT, "num_inference_steps": STEPS}
    latents = noise()
    expected = pipe(**call, latents=torch.from_numpy(latents), output_type="np").images
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=call, components="all")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["method"]["forecasts"]) == (3, {"blocks": 1})
    assert manifest["example"]["strip"] == "FKFKFplp"
    images = BundlePipeline(folder, threads=1)(PROMPT, latents=latents, num_inference_steps=STEPS, output="numpy")
    assert abs(images - expected).max() < 1e-4
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    loaded = pipe(**call, latents=torch.from_numpy(latents), output_type="np").images
    assert abs(loaded - expected).max() < 1e-4


@pytest.mark.sweep
def test_a_bundle_of_fora(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pipe = tgate_compile.optimize(pixart(), Fora(2, forecast=1) + TGate(4), backend="eager")
    expected = latents_of(pipe, pixart_call())
    call = {**pixart_call(), "num_inference_steps": STEPS, "output_type": "latent"}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=call, dynamic=False)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(latents_of(pipe, pixart_call()), expected) < 1e-4


@pytest.mark.parametrize(
    "method",
    [pytest.param(Fora(2), marks=pytest.mark.sweep), pytest.param(BlockCache(2), marks=pytest.mark.heavy)],
    ids=str,
)
def test_openvino(method: Method) -> None:
    pytest.importorskip("openvino")
    expected = latents_of(tgate_compile.optimize(pixart(), method, backend="eager"), pixart_call())
    pipe = tgate_compile.optimize(pixart(), method, backend="openvino", precision="float32")
    assert difference(latents_of(pipe, pixart_call()), expected) < 1e-3
