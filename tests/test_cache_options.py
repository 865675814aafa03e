"""Options for which attentions are cached and in which dtype, and their description before a call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.hook_reference import HookReference
from tests.test_refusals import refused
from tests.tiny_pipelines import PROMPT, pixart, pixart_prompt, run, sdxl, stable_diffusion
from tgate_compile import ConfigurationError

GATE = 2


@pytest.fixture(scope="module")
def sd() -> SimpleNamespace:
    pipe = stable_diffusion()
    plain = run(pipe)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    gated, cache_bytes = run(pipe), tgate_compile.describe(pipe).cache_bytes
    tgate_compile.restore(pipe)
    return SimpleNamespace(pipe=pipe, plain=plain, gated=gated, cache_bytes=cache_bytes)


# sites=


def test_only_the_chosen_sites_are_cached(sd: SimpleNamespace) -> None:
    chosen = [
        name for name, _ in sd.pipe.unet.named_modules() if name.startswith("up_blocks") and name.endswith("attn2")
    ]
    reference = HookReference(sd.pipe.unet, GATE)
    handles = [
        sd.pipe.unet.get_submodule(name).register_forward_hook(reference.attention_hook(name)) for name in chosen
    ]
    sd.pipe.unet.forward = reference.forward
    expected = run(sd.pipe)
    del sd.pipe.unet.forward
    for handle in handles:
        handle.remove()

    tgate_compile.optimize(sd.pipe, GATE, sites=["up_blocks.*"], backend="eager")
    assert_same(run(sd.pipe), expected)
    description = tgate_compile.describe(sd.pipe)
    tgate_compile.restore(sd.pipe)
    assert list(description.sites) == chosen
    assert_differ(expected, sd.gated)
    pruned = next(v for v in description.variants if v.name == "pruned")
    own = sum(p.numel() for name in chosen for p in sd.pipe.unet.get_submodule(name).parameters())
    norms = sum(2 * sd.pipe.unet.get_submodule(name).to_q.in_features for name in chosen)
    assert pruned.parameters == description.parameters - own - norms


def test_all_sites_by_pattern_are_all_sites(sd: SimpleNamespace) -> None:
    tgate_compile.optimize(sd.pipe, GATE, sites="*", backend="eager")
    assert torch.equal(run(sd.pipe), sd.gated)
    tgate_compile.restore(sd.pipe)


@pytest.mark.parametrize("sites", [[], [3], 5, ["no_such.*"], ["up_blocks.*", "no_such.*"]])
def test_sites_must_be_there(sd: SimpleNamespace, sites: Any) -> None:
    refused(sd.pipe, ConfigurationError, "sites", sites=sites)


def test_sites_must_be_attentions_that_can_be_cached(sd: SimpleNamespace) -> None:
    tgate_compile.optimize(sd.pipe, GATE, sites=["*.ff"], backend="eager")
    with pytest.raises(ConfigurationError, match="matches none"):
        run(sd.pipe)
    tgate_compile.restore(sd.pipe)


# cache_dtype=


@pytest.mark.parametrize(
    ("dtype", "bound", "share"),
    [
        (torch.float32, 0.0, 1.0),
        (torch.float16, 5e-3, 0.5),
        pytest.param(torch.bfloat16, 2e-2, 0.5, marks=pytest.mark.heavy),
        (torch.float8_e4m3fn, 0.1, 0.25),
        pytest.param(torch.float8_e5m2, 0.2, 0.25, marks=pytest.mark.heavy),
    ],
)
def test_caches_in_another_dtype(sd: SimpleNamespace, dtype: torch.dtype, bound: float, share: float) -> None:
    tgate_compile.optimize(sd.pipe, GATE, cache_dtype=dtype, backend="eager")
    result = run(sd.pipe)
    description = tgate_compile.describe(sd.pipe)
    tgate_compile.restore(sd.pipe)
    assert difference(result, sd.gated) <= bound
    assert (difference(result, sd.gated) > 0) == (dtype != torch.float32)
    assert description.cache_bytes == share * sd.cache_bytes
    assert {variant.cache_bytes for variant in description.variants} == {description.cache_bytes}


def test_narrow_dtypes_saturate() -> None:
    """A value beyond fp8's range is clamped to the largest, instead of becoming infinity or NaN."""
    pipe = stable_diffusion(layout="small")
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_out[0].bias.add_(1e6)
    tgate_compile.optimize(pipe, GATE, cache_dtype=torch.float8_e4m3fn, backend="eager")
    assert run(pipe).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, "fp8", torch.float64])
def test_cache_dtype_must_be_known(sd: SimpleNamespace, dtype: Any) -> None:
    refused(sd.pipe, ConfigurationError, "cache_dtype", "float8_e4m3fn", cache_dtype=dtype)


@pytest.mark.heavy
def test_compiled_with_fp8_caches() -> None:
    pipe = stable_diffusion(layout="least")
    tgate_compile.optimize(pipe, GATE, cache_dtype=torch.float8_e4m3fn, backend="eager")
    expected = run(pipe)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, GATE, cache_dtype=torch.float8_e4m3fn, backend="inductor")
    assert difference(run(pipe), expected) < 1e-3


# describe(pipe, **call)

CALLS: dict[str, Any] = {
    "v1": {"gate_step": GATE},
    "v2": {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 0},
    "deepcache": {"gate_step": 3, "deepcache_interval": 2},
    "guidance": {"gate_step": None, "guidance_step": 3},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_described_before_it_runs(name: str) -> None:
    pipe = stable_diffusion(layout="small")
    tgate_compile.optimize(pipe, backend="eager", **CALLS[name])
    beforehand = tgate_compile.describe(pipe, prompt=PROMPT, num_inference_steps=6, output_type="latent")
    assert beforehand.last_steps == ()
    assert "such a call" in str(beforehand)
    store = pipe._tgate_compile.hook.store
    assert store.compilations == 0
    run(pipe, steps=6)
    afterwards = tgate_compile.describe(pipe)
    assert (afterwards.strip, afterwards.cache_bytes, afterwards.sites, afterwards.variants) == (
        beforehand.strip,
        beforehand.cache_bytes,
        beforehand.sites,
        beforehand.variants,
    )
    assert afterwards.last_steps


def test_describing_runs_no_step_and_leaves_the_pipeline_usable() -> None:
    pipe = pixart()
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(module))
    expected = run(pipe, **pixart_prompt())
    ran = len(calls)
    tgate_compile.optimize(pipe, 100, backend="eager")
    handle.remove()
    description = tgate_compile.describe(pipe, **pixart_prompt(), num_inference_steps=6, gate_step=2)
    assert description.strip == "FFpppp"
    assert len(calls) == ran
    assert torch.equal(run(pipe, **pixart_prompt()), expected)


@pytest.mark.heavy
def test_the_size_of_a_call_that_would_be_large() -> None:
    pipe = tgate_compile.optimize(sdxl(), GATE, backend="eager")
    call = {"prompt": [PROMPT] * 2, "num_inference_steps": 4, "height": 64, "width": 32}
    description = tgate_compile.describe(pipe, **call)
    tokens = {32: 32 * 16, 64: 16 * 8}
    expected = 0
    for site in description.sites:
        width = pipe.unet.get_submodule(site).to_q.in_features
        expected += 2 * tokens[width] * width * 4
    assert description.cache_bytes == expected


def test_a_wrong_call_is_the_pipelines_own_error() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), GATE, backend="eager")
    with pytest.raises(ValueError, match="has to be of type"):
        tgate_compile.describe(pipe, prompt=5)
    assert run(pipe).isfinite().all()
