"""Against the final latents of the authors' own packages, on the same weights, inputs and schedulers.

`data/authors/README.md` (T-GATE v1 and v2) and `data/deepcache/README.md` (DeepCache, alone and with T-GATE) describe
how they were made. Every case that their known bugs do not affect must agree within fp32 rounding; for the others,
the tests state the correct result.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import tgate_compile

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4  # relative to the latents' largest value


def _cases(source: str) -> dict[str, dict[str, Any]]:
    cases = json.loads((DATA / source / "cases.json").read_text())["cases"]
    return {case["name"]: {**case, "source": source} for case in cases}


CASES = _cases("authors")
DEEPCACHE = _cases("deepcache")
WRONG_THERE = {name for name, case in CASES.items() if case["affected_by_official_bug"]}


@functools.cache
def _pipeline(source: str, model: str, kind: str, **options: Any) -> Any:
    """Return the case's pipeline, optimized only once: cases that differ in scheduler and gate must not need more."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)  # anything else makes the pipeline warn
    path = DATA / source / "models" / model
    if kind == "pixart_alpha":
        transformer = diffusers.PixArtTransformer2DModel.from_pretrained(path)
        pipe: Any = diffusers.PixArtAlphaPipeline(None, None, vae, transformer, scheduler)
    else:
        unet = diffusers.UNet2DConditionModel.from_pretrained(path)
        if kind == "sd":
            pipe = diffusers.StableDiffusionPipeline(
                vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
            )
        else:
            pipe = diffusers.StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return tgate_compile.optimize(pipe, backend="eager", **options)


def _pipeline_of(case: dict[str, Any]) -> Any:
    intervals = {name: value for name, value in (case.get("tgate") or {}).items() if name != "gate_step"}
    options: dict[str, Any] = intervals
    if "deepcache" in case:
        options = {
            "deepcache_interval": case["deepcache"]["cache_interval"],
            "deepcache_branch": case["deepcache"]["cache_branch_id"],
            "gate_step": case["tgate"]["gate_step"] if case.get("tgate") else None,
        }
    return _pipeline(case["source"], case["model"], case["kind"], **options)


def _run(case: dict[str, Any], **options: Any) -> torch.Tensor:
    pipe = _pipeline_of(case)
    config = {name: float(value) if value == "-inf" else value for name, value in case["scheduler_config"].items()}
    pipe.scheduler = getattr(diffusers, case["scheduler_class"]).from_config(config)
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in case["call_kwargs"].items()
        if name != "lcm"  # an argument of the authors' package only
    }
    latents: torch.Tensor = pipe(
        **load_file(DATA / case["source"] / "inputs" / f"{case['inputs']}.safetensors"),
        **arguments,
        **options,
        num_inference_steps=case["num_inference_steps"],
        generator=torch.Generator().manual_seed(case["generator_seed"]),
        output_type="latent",
    ).images
    return latents


def _reference(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(DATA / case["source"] / "out" / f"{case['name']}.safetensors")


#: The cases of other schedulers, batches and intervals repeat what the quick ones show, on graphs of their own.
_QUICK = {
    *(f"{kind}_dpm_B1_{rest}" for kind in ("sd", "sdxl", "pixart_alpha") for rest in ("v1_g4", "v1_g8of8")),
    "sd_dpm_nimg2_v1",
    *(f"sd_dpm_B1_{rest}" for rest in ("fi3_g7", "v1_g4_rescale", "v2_g10_d25", "v2sp5_g9", "warm0")),
    "sdxl_dpm_B1_v1_negsizes",
    "sdxl_nocfg_B1_lcm_g2",
    "sd_pndm_B1_v1_g4",
    "pixart_alpha_dpm_B1_v1_oc4",
    *(f"sd_dpm_dc{rest}" for rest in ("3_b0", "5_b0", "3_b0_g5")),
}


def _parameters(names: set[str]) -> list[Any]:
    return [name if name in _QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in sorted(names)]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", _parameters(set(CASES) - WRONG_THERE))
def test_agrees_with_the_authors(name: str) -> None:
    case = CASES[name]
    gate = case["tgate"]["gate_step"]
    theirs = _reference(case)
    assert _difference(_run(case, gate_step=gate), theirs["latents"]) < TOLERANCE
    if "_B1_" in name:  # others also run after earlier calls of the same pipeline
        assert _difference(_run(case, gate_step=gate), theirs["latents"]) < TOLERANCE, "second call"


@pytest.mark.parametrize("name", _parameters(set(DEEPCACHE)))
def test_agrees_with_deepcache(name: str) -> None:
    case = DEEPCACHE[name]
    theirs = _reference(case)["latents"]
    assert _difference(_run(case), theirs) < TOLERANCE
    compiled = _pipeline_of(case)._tgate_compile.hook.store.compilations
    assert _difference(_run(case), theirs) < TOLERANCE, "second call"
    assert _pipeline_of(case)._tgate_compile.hook.store.compilations == compiled


@pytest.mark.parametrize("name", ["sd_dpm_B1_v1_g4", "sdxl_dpm_B2_v1_g4", "pixart_alpha_euler_B2_v1_g4"])
def test_a_gate_beyond_the_last_step_is_the_plain_pipeline(name: str) -> None:
    case = CASES[name]
    plain = _reference(case)["plain"]
    assert _difference(_run(case, gate_step=case["num_inference_steps"]), plain) < TOLERANCE
    # The gate must matter, or the comparison would prove nothing.
    assert _difference(_reference(case)["latents"], plain) > 10 * TOLERANCE


@pytest.mark.parametrize("name", sorted(name for name in WRONG_THERE if "heun" in name))
def test_a_step_of_a_second_order_scheduler_is_two_calls(name: str) -> None:
    """The authors' code counts calls as steps, so that its gate closes at half the steps, or it raises."""
    case = CASES[name]
    gate, steps = case["tgate"]["gate_step"], case["num_inference_steps"]
    ours = _run(case, gate_step=gate)
    ran = tgate_compile.describe(_pipeline_of(case))
    assert [graph for _, graph in ran.last_steps] == ["full"] * (2 * gate) + ["pruned"] * (2 * (steps - gate) - 1)
    assert _difference(_run(case, gate_step=steps), _reference(case)["plain"]) < TOLERANCE
    assert _difference(ours, _reference(case)["plain"]) > TOLERANCE


@pytest.mark.parametrize("name", sorted(name for name in WRONG_THERE if "nocfg" in name))
def test_samples_of_a_batch_without_guidance_do_not_mix(name: str) -> None:
    """The authors' code averages the two samples like guidance halves; each must be as in a call for it alone."""
    case = CASES[name]
    gate = case["tgate"]["gate_step"]
    both = _run(case, gate_step=gate)
    pipe = _pipeline_of(case)
    inputs = load_file(DATA / case["source"] / "inputs" / f"{case['inputs']}.safetensors")
    for sample in range(2):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        alone = pipe(
            **{key: tensor[sample : sample + 1] for key, tensor in inputs.items()},
            **case["call_kwargs"],
            gate_step=gate,
            num_inference_steps=case["num_inference_steps"],
            output_type="latent",
        ).images
        assert _difference(both[sample : sample + 1], alone) < TOLERANCE
    assert _difference(both, _reference(case)["latents"]) > TOLERANCE, "cross-talk, as theirs"


def test_the_warm_up_call_of_pndm_is_no_step() -> None:
    """The authors' code raises for PixArt, whose gate test omits the warm-up call; for SD it counts it correctly."""
    case = CASES["pixart_alpha_pndm_B1_v1_g4"]
    _run(case, gate_step=4)
    ran = tgate_compile.describe(_pipeline_of(case))
    assert [step for step, _ in ran.last_steps] == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert ran.strip == "FFFFpppp"
    assert _difference(_run(case, gate_step=8), _reference(case)["plain"]) < TOLERANCE


def test_negative_time_ids_are_meant_after_the_gate() -> None:
    """diffusers interleaves SDXL's time ids for batches; after the gate both implementations use the negative ones."""
    case = CASES["sdxl_dpm_B2_v1_negsizes"]
    assert _difference(_run(case, gate_step=4), _reference(case)["latents"]) < TOLERANCE


def test_every_known_bug_has_its_test() -> None:
    assert not _QUICK - (set(CASES) - WRONG_THERE) - set(DEEPCACHE)
    stated = {n for n in WRONG_THERE if "heun" in n or "nocfg" in n}
    assert WRONG_THERE - stated == {"pixart_alpha_pndm_B1_v1_g4", "sdxl_dpm_B2_v1_negsizes"}
