"""Pipelines with joint attention, through their unchanged call: the text is frozen at the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.joint_denoisers import DENOISERS, DIM, TEXT, Tiny, random
from tests.joint_reference import TextReference, frozen_text
from tests.test_joint_guidance import run as denoised
from tests.tiny_joint_siblings import EVERY
from tgate_compile import PAB, AdaptiveGuidance, FrozenText, UnsupportedModelError
from tgate_compile.bundle.read import read_bundle
from tgate_compile.pipeline.hook import hook_of

STEPS = 6
GATE = 3


@dataclass(frozen=True)
class Case:
    """A pipeline.

    Attributes:
        build: makes it from its denoiser.
        call: returns the arguments of its call for a number of prompts.
        tiny: its denoiser.
        halved: see `TextReference`.
        kept: see `TextReference`.
        strip: the strip of a gated call.
        unguided: the arguments that switch guidance off.
    """

    build: Callable[[torch.nn.Module], Any]
    call: Callable[[int], dict[str, Any]]
    tiny: Tiny
    halved: tuple[str, ...] = ()
    kept: int = 1
    guided: bool = True
    strip: str = "FFFppp"
    unguided: tuple[tuple[str, Any], ...] = (("guidance_scale", 1.0),)


def text_of(batch: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.stack([random(*shape, seed=seed + row) for row in range(batch)])


def sd3(transformer: torch.nn.Module) -> Any:
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=None, **dict.fromkeys(encoders))


def sd3_call(batch: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text_of(batch, TEXT, DIM, seed=60),
        "negative_prompt_embeds": text_of(batch, TEXT, DIM, seed=70),
        "pooled_prompt_embeds": text_of(batch, DIM, seed=80),
        "negative_pooled_prompt_embeds": text_of(batch, DIM, seed=90),
        "height": 64,
        "width": 64,
    }


def flux(transformer: torch.nn.Module) -> Any:
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(transformer=transformer, scheduler=scheduler, vae=None, **dict.fromkeys(encoders))


def flux_call(batch: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text_of(batch, TEXT, DIM, seed=60),
        "pooled_prompt_embeds": text_of(batch, DIM, seed=80),
        "height": 64,
        "width": 64,
    }


def qwen_image(transformer: torch.nn.Module) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return QwenImagePipeline(transformer=transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)


def qwen_image_call(batch: int) -> dict[str, Any]:
    mask, negative = torch.ones(2, batch, TEXT, dtype=torch.long)
    mask[0, 5:] = 0
    negative[:, 3:] = 0
    return {
        "prompt_embeds": text_of(batch, TEXT, DIM, seed=60),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": text_of(batch, TEXT, DIM, seed=70)[:, :4],
        "negative_prompt_embeds_mask": negative[:, :4],
        "height": 64,
        "width": 64,
    }


def flux2(transformer: torch.nn.Module) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return Flux2Pipeline(transformer=transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)


def flux2_call(batch: int) -> dict[str, Any]:
    return {"prompt_embeds": text_of(batch, TEXT, DIM, seed=60), "height": 64, "width": 64}


CASES = {
    "StableDiffusion3Pipeline": Case(
        sd3,
        sd3_call,
        DENOISERS["sd3"],
        halved=("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"),
    ),
    "FluxPipeline": Case(flux, flux_call, DENOISERS["flux"], guided=False, strip="fffppp", unguided=()),
    "Flux2Pipeline": Case(flux2, flux2_call, DENOISERS["flux2"], guided=False, strip="fffppp", unguided=()),
    "QwenImagePipeline": Case(
        qwen_image, qwen_image_call, DENOISERS["qwen_image"], kept=0, unguided=(("true_cfg_scale", 1.0),)
    ),
}


def run(pipe: Any, **call: Any) -> torch.Tensor:
    """Return the final latents."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent").images  # type: ignore[no-any-return]


def expected_of(case: Case, call: dict[str, Any], gate: int = GATE, **options: Any) -> torch.Tensor:
    tiny = case.tiny
    pipe = case.build(tiny.build())
    given = {"guided": case.guided, "halved": case.halved, "kept": case.kept, **options}
    reference = TextReference(pipe.transformer, gate, tiny.image + tiny.text, tiny.text_tokens, **given)
    with frozen_text(reference):
        return run(pipe, **call)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def gated(case: Case) -> Any:
    return tgate_compile.optimize(case.build(case.tiny.build()), GATE, backend="eager")


@pytest.fixture(scope="module")
def plain(case: Case) -> Any:
    return case.build(case.tiny.build())


def test_gated(case: Case, gated: Any, plain: Any) -> None:
    call = case.call(2)
    expected = expected_of(case, call)
    first = run(gated, **call)
    assert_same(first, expected)
    assert torch.equal(run(gated, **call), first)
    assert_differ(expected, run(plain, **call))
    assert tgate_compile.describe(gated).strip == case.strip


def test_ungated(case: Case, gated: Any, plain: Any) -> None:
    call = case.call(1)
    assert torch.equal(run(gated, gate_step=1000, **call), run(plain, **call))


def test_per_call_gate(case: Case, gated: Any) -> None:
    call = case.call(1)
    assert_same(run(gated, gate_step=1, **call), expected_of(case, call, 1))


# Options, with one pipeline that has guidance and one that has none.

SD3 = CASES["StableDiffusion3Pipeline"]
FLUX = CASES["FluxPipeline"]


def optimized(case: Case, *args: Any, **options: Any) -> Any:
    return tgate_compile.optimize(case.build(case.tiny.build()), *args, backend="eager", **options)


@pytest.mark.parametrize("case", [SD3, FLUX], ids=["sd3", "flux"])
def test_refreshed_after_the_gate(case: Case) -> None:
    call = case.call(1)
    pipe = optimized(case, 2, text_interval=2)
    assert_same(run(pipe, **call), expected_of(case, call, 2, refresh=2))
    assert tgate_compile.describe(pipe).strip == ("FFfpfp" if case.guided else "fffpfp")


@pytest.mark.parametrize("case", [SD3, FLUX], ids=["sd3", "flux"])
def test_frozen_text_keeps_guidance(case: Case) -> None:
    call = case.call(2)
    pipe = optimized(case, FrozenText(3))
    assert_same(run(pipe, **call), expected_of(case, call, 3, drops_guidance=False))
    assert tgate_compile.describe(pipe).strip == ("FFFPPP" if case.guided else "fffppp")
    pipe = optimized(case, FrozenText(2, interval=3))
    assert_same(run(pipe, **call), expected_of(case, call, 2, drops_guidance=False, refresh=3))
    assert tgate_compile.describe(pipe).strip == ("FFPFPP" if case.guided else "ffpfpp")


@pytest.mark.parametrize("case", [SD3, FLUX], ids=["sd3", "flux"])
def test_frozen_hidden_states(case: Case) -> None:
    """The text's keys and values still follow the timestep; its hidden states take half the memory."""
    call = case.call(1)
    pipe, keys = optimized(case, FrozenText(2, text="hidden")), optimized(case, FrozenText(2))
    assert_differ(run(pipe, **call), run(keys, **call))
    hidden, both = tgate_compile.describe(pipe), tgate_compile.describe(keys)
    assert hidden.strip == both.strip == ("FFPPPP" if case.guided else "ffpppp")
    assert {name.rpartition(".")[2] for name in hidden.sites} == {"hidden"}
    assert 2 * hidden.cache_bytes == both.cache_bytes
    pruned, smaller = (next(v for v in each.variants if v.name == "pruned") for each in (hidden, both))
    assert smaller.parameters < pruned.parameters < next(v for v in hidden.variants if v.name == "full").parameters


def test_frozen_text_and_guidance_that_ends_later() -> None:
    """Where guidance ends, the text is computed once more: what was kept before belongs to both halves."""
    pipe = optimized(SD3, FrozenText(2) + AdaptiveGuidance(step=4))
    run(pipe, **SD3.call(1))
    assert tgate_compile.describe(pipe).strip == "FFPPfp"


def test_pab_broadcasts_the_text() -> None:
    call = SD3.call(1)
    pipe = optimized(SD3, PAB(3, 1, begin=0.0, end=1.0))
    assert_same(run(pipe, **call), expected_of(SD3, call, 1, drops_guidance=False, refresh=3))
    assert tgate_compile.describe(pipe).strip == "FPPFPP"


def test_guidance_drop_alone_needs_no_sites() -> None:
    pipe = optimized(SD3, AdaptiveGuidance(step=3))
    run(pipe, **SD3.call(1))
    description = tgate_compile.describe(pipe)
    assert (description.strip, description.sites, description.keep) == ("FFFfff", (), "cond")


def test_description(case: Case, gated: Any) -> None:
    call = case.call(2)
    foreseen = tgate_compile.describe(gated, num_inference_steps=STEPS, output_type="latent", **call)
    run(gated, **call)
    done = tgate_compile.describe(gated)
    assert (foreseen.strip, foreseen.cache_bytes, foreseen.sites) == (done.strip, done.cache_bytes, done.sites)
    assert done.keep == "cond"
    attentions = {name.rpartition(".")[0] for name in done.sites}
    assert sorted(done.sites) == sorted(f"{name}.{part}" for name in attentions for part in ("key", "value"))
    assert len(attentions) == case.tiny.joint
    # Keys and values of the text's tokens, in float32, for two images.
    width = gated.transformer.config.num_attention_heads * gated.transformer.config.attention_head_dim
    assert done.cache_bytes == len(done.sites) * 2 * case.tiny.text * width * 4
    full, pruned = (next(v for v in done.variants if v.name == name and v.batch == 2) for name in ("full", "pruned"))
    assert pruned.parameters < full.parameters
    assert pruned.macs < full.macs


def test_caches_do_not_hold_the_images_keys() -> None:
    """A cache is a separate tensor, because a view of all keys would keep these alive."""
    pipe = optimized(FLUX, 2)
    kept: list[int] = []
    call = {**FLUX.call(1), "callback_on_step_end": lambda pipe, step, time, tensors: kept.append(stored(pipe)) or {}}
    run(pipe, **call)
    assert kept[2:] == [tgate_compile.describe(pipe).cache_bytes] * (STEPS - 2)


def stored(pipe: Any) -> int:
    """Return the size of the memory that the caches of the present generation keep alive."""
    generation = hook_of(pipe.transformer)._active
    values = generation._caches.values(None, {"cross"}, 0).values()
    return sum({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}.values())


@pytest.mark.heavy
def test_a_bundle_for_texts_of_any_length(tmp_path: Path) -> None:
    """The graph after the gate takes no text, but keys and values of any length."""
    pipe, calls = optimized(FLUX, GATE), [FLUX.call(1), {**FLUX.call(1), "prompt_embeds": text_of(1, 9, DIM, seed=77)}]
    expected = [run(pipe, **call) for call in calls]
    example = {**calls[0], "num_inference_steps": STEPS, "output_type": "latent"}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=example, dynamic=["text"])
    sizes = read_bundle(folder).manifest.sizes
    assert {name: size.example for name, size in sizes.items()} == {"t": TEXT}
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    for call, target in zip(calls, expected, strict=True):
        assert difference(run(pipe, **call), target) < 1e-4


def test_some_blocks_only() -> None:
    """With a part of the sites, the text is still computed for the other blocks."""
    pipe = optimized(SD3, 2, sites=["transformer_blocks.2.*"])
    run(pipe, **SD3.call(1))
    description = tgate_compile.describe(pipe)
    assert description.sites == ("transformer_blocks.2.attn.key", "transformer_blocks.2.attn.value")
    call = SD3.call(1)
    everything = run(optimized(SD3, 2), **call)
    guidance = run(optimized(SD3, AdaptiveGuidance(step=2)), **call)
    part = run(pipe, **call)
    assert_differ(part, everything)
    assert_differ(part, guidance)


def test_cached_in_fewer_bytes() -> None:
    call = SD3.call(1)
    pipe, whole = optimized(SD3, 2, cache_dtype=torch.bfloat16), optimized(SD3, 2)
    near, exact = run(pipe, **call), run(whole, **call)
    assert difference(near, exact) < 0.05
    assert 2 * tgate_compile.describe(pipe).cache_bytes == tgate_compile.describe(whole).cache_bytes


def test_other_caches_are_refused() -> None:
    pipe = optimized(SD3, 2, sp_interval=2)
    with pytest.raises(UnsupportedModelError, match="leave sp_interval and fi_interval at 1"):
        run(pipe, **SD3.call(1))


# Further pipelines, with the number of their image's and text's tokens, and whether the text comes first.

FURTHER = {
    "ZImagePipeline": (32, 32, False),
    "AuraFlowPipeline": (16, 14, True),
    "ChromaPipeline": (16, 6, True),
    "CogVideoXPipeline": (48, 6, True),
    "HunyuanVideoPipeline": (32, 6, False),
    "Lumina2Pipeline": (16, 6, True),
    "GlmImagePipeline": (16, 6, True),
    "BriaFiboPipeline": (16, 3, True),
    "ConsisIDPipeline": (48, 6, True),
    "JoyImageEditPlusPipeline": (32, 44, False),
    "LongCatImagePipeline": (16, 6, True),
    "LongCatImageEditPipeline": (32, 12, True),
    "BriaFiboEditPipeline": (80, 8, True),
    "StableDiffusion3InpaintPipeline": (64, 6, False),
    "QwenImageLayeredPipeline": (75, 3, True),
    "HunyuanVideoImageToVideoPipeline": (32, 6, False),
    "HunyuanSkyreelsImageToVideoPipeline": (32, 6, False),
    "EasyAnimateInpaintPipeline": (32, 6, True),
    "CogVideoXFunControlPipeline": (48, 6, True),
    "PRXPixelPipeline": (64, 6, True),
    "VisualClozeGenerationPipeline": (16, 8, True),
    "HunyuanImageRefinerPipeline": (64, 6, False),
    "MotifVideoImage2VideoPipeline": (32, 6, False),
    "ZImageControlNetPipeline": (32, 32, False),
}
QUICK = ("ZImagePipeline",)  # its text comes last
HEAVY = (
    *tuple(FURTHER)[:7],
    "BriaFiboPipeline",
    "ConsisIDPipeline",
    "JoyImageEditPlusPipeline",
    "LongCatImagePipeline",
)


def _mark(name: str) -> pytest.MarkDecorator:
    return pytest.mark.heavy if name in HEAVY else pytest.mark.sweep


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=_mark(n)) for n in FURTHER])
def test_further_pipelines(name: str) -> None:
    image, text, first = FURTHER[name]
    joint = EVERY[name]
    pipe, call = joint.build(), joint.call(joint.prompts if name != "Lumina2Pipeline" else 1)
    plain = denoised(pipe, **call)
    is_batch = joint.guidance == "batch"
    reference = TextReference(
        pipe.transformer,
        1,
        image + text,
        slice(0, text) if first else slice(image, None),
        guided=joint.guidance != "none",
        halved=joint.halved if is_batch else (),
        listed=joint.listed,
        kept=joint.kept if is_batch else 0,
    )
    with frozen_text(reference):
        expected = denoised(pipe, **call)
    assert reference.attended
    tgate_compile.optimize(pipe, 1, backend="eager")
    assert_same(denoised(pipe, **call), expected)
    assert tgate_compile.describe(pipe).strip == ("fpp" if joint.guidance == "none" else "Fpp")
    assert_differ(expected, plain)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")
def test_attention_of_each_row_apart() -> None:
    """Mochi's attentions take one row of the batch at a time, so that a half of the guidance has sites of its own."""
    case = EVERY["MochiPipeline"]
    pipe = tgate_compile.optimize(case.build(), 2, backend="eager")
    with pytest.raises(UnsupportedModelError, match="is computed for each row of the batch apart"):
        denoised(pipe, **case.call(1))
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, FrozenText(2), backend="eager")
    denoised(pipe, **case.call(1))
    assert tgate_compile.describe(pipe).strip == "FFP"
