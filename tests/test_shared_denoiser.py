"""Several pipelines over one denoiser, each with its own options: they run one at a time and do not interfere."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.hook_reference import hook_reference
from tests.tiny_pipelines import VELOCITY, add_lora, image, run, sdxl, seeded, stable_diffusion

STEPS = 4
CONTROL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(12))


def over(unet: Any, pipeline: type = StableDiffusionPipeline, **components: Any) -> Any:
    """Return a pipeline with `unet` and otherwise separate components."""
    parts = {**stable_diffusion(layout="least").components, "unet": unet, **components}
    pipe = pipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_of(layout: str = "least") -> Any:
    return stable_diffusion(layout=layout).unet


def control_of(unet: Any) -> Any:
    return seeded(lambda: ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)), 6)


#: Pipelines over one UNet: the class, and its specific call arguments.
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "txt2img": (StableDiffusionPipeline, {}),
    "img2img": (StableDiffusionImg2ImgPipeline, {"image": image(), "strength": 1.0}),
    "controlnet": (StableDiffusionControlNetPipeline, {"image": CONTROL}),
}


def made(kind: str, unet: Any, **components: Any) -> Any:
    more = {"controlnet": control_of(unet)} if kind == "controlnet" else {}
    return over(unet, KINDS[kind][0], **{**more, **components})


def latents(kind: str, pipe: Any, **call: Any) -> torch.Tensor:
    result: torch.Tensor = run(pipe, steps=STEPS, **{**KINDS[kind][1], **call})
    return result


def by_hooks(kind: str, gate: int, pipe: Any = None, **call: Any) -> torch.Tensor:
    pipe = made(kind, unet_of()) if pipe is None else pipe
    with hook_reference(pipe, gate):
        return latents(kind, pipe, **call)


def optimized(pipe: Any, gate: Any = 2, **options: Any) -> Any:
    return tgate_compile.optimize(pipe, gate, **{"backend": "eager", **options})


def compilations(*pipes: Any) -> int:
    stores = {id(pipe._tgate_compile.hook.store): pipe._tgate_compile.hook.store for pipe in pipes}
    return sum(store.compilations for store in stores.values())


@pytest.mark.heavy
def test_pipelines_of_several_kinds_in_turn() -> None:
    unet = unet_of("small")  # a ControlNet has a middle block
    gates = {"txt2img": 2, "img2img": 3, "controlnet": 1}
    pipes = {kind: optimized(made(kind, unet), gate) for kind, gate in gates.items()}
    plain = {kind: made(kind, unet_of("small")) for kind in KINDS}
    for kind in (*KINDS, *reversed(KINDS)):
        assert_same(latents(kind, pipes[kind]), by_hooks(kind, gates[kind], plain[kind]))
    # With a gate for one call, and without a gate.
    for kind, pipe in pipes.items():
        assert_same(latents(kind, pipe, gate_step=2), by_hooks(kind, 2, plain[kind]))
        assert torch.equal(latents(kind, pipe, gate_step=1000), latents(kind, plain[kind]))
    assert tgate_compile.describe(pipes["txt2img"]).strip == "FFFF"
    assert tgate_compile.describe(pipes["img2img"]).gate_step == 3


@pytest.mark.heavy
def test_hires_fix() -> None:
    """The second pipeline refines the enlarged images of the first, each with a gate at half of its steps."""

    def hires(first: Any, second: Any) -> torch.Tensor:
        small = run(first, steps=STEPS, output_type="pt")
        large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
        return run(second, steps=2 * STEPS, image=large, strength=0.5, output_type="pt")

    def both(unet: Any) -> tuple[Any, Any]:
        return made("txt2img", unet), made("img2img", unet)

    first, second = both(unet_of())
    with hook_reference(first, 2):
        small = run(first, steps=STEPS, output_type="pt")
    with hook_reference(second, 2):
        large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
        expected = run(second, steps=2 * STEPS, image=large, strength=0.5, output_type="pt")
    first, second = both(unet_of())
    optimized(first), optimized(second, 0.5)
    for _ in range(2):
        assert_same(hires(first, second), expected)
    assert_differ(expected, hires(*both(unet_of())))


def test_sdxl_base_and_refiner() -> None:
    """The refiner has a separate denoiser, but shares the second text encoder and the VAE with the base."""

    def pair() -> tuple[Any, Any]:
        base = sdxl()
        parts = sdxl("StableDiffusionXLImg2ImgPipeline").components
        shared = {name: base.components[name] for name in ("text_encoder_2", "tokenizer_2", "vae")}
        refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**{**parts, **shared}, add_watermarker=False)
        refiner.set_progress_bar_config(disable=True)
        return base, refiner

    def refined(base: Any, refiner: Any, **call: Any) -> torch.Tensor:
        made = run(base, steps=6, denoising_end=0.5, **call)
        return run(refiner, steps=6, denoising_start=0.5, image=made, **call)

    base, refiner = pair()
    plain = refined(base, refiner)
    with hook_reference(base, 2, interleaved=True):
        halfway = run(base, steps=6, denoising_end=0.5)
    with hook_reference(refiner, 1, interleaved=True):
        expected = run(refiner, steps=6, denoising_start=0.5, image=halfway)
    optimized(base), optimized(refiner, 1)
    assert_same(refined(base, refiner), expected)
    assert_differ(expected, plain)
    assert torch.equal(refined(base, refiner, gate_step=1000), plain)
    tgate_compile.restore(base)
    assert_same(run(refiner, steps=6, denoising_start=0.5, image=halfway), expected)
    tgate_compile.restore(refiner)
    assert torch.equal(refined(base, refiner), plain)


def test_schedules_of_several_methods() -> None:
    unet = unet_of()
    drop = optimized(made("txt2img", unet), None, guidance_step=2)
    gate = optimized(made("txt2img", unet, scheduler=EulerDiscreteScheduler(**VELOCITY)), 2)
    v2 = optimized(made("img2img", unet), 3, sp_interval=2, warm_up=1)
    alone = [
        optimized(made("txt2img", unet_of()), None, guidance_step=2),
        optimized(made("txt2img", unet_of(), scheduler=EulerDiscreteScheduler(**VELOCITY)), 2),
        optimized(made("img2img", unet_of()), 3, sp_interval=2, warm_up=1),
    ]
    for _ in range(2):
        for kind, pipe, other in zip(("txt2img", "txt2img", "img2img"), (drop, gate, v2), alone, strict=True):
            assert torch.equal(latents(kind, pipe), latents(kind, other))


def test_backends_side_by_side() -> None:
    pytest.importorskip("onnxruntime")
    unet = unet_of()
    eager, onnx = optimized(made("txt2img", unet)), optimized(made("img2img", unet), backend="onnxruntime")
    for _ in range(2):
        assert_same(latents("txt2img", eager), by_hooks("txt2img", 2))
        assert difference(latents("img2img", onnx), by_hooks("img2img", 2)) <= 1e-4


# Graphs.


def test_equal_configurations_share_graphs() -> None:
    unet = unet_of()
    first, second, third = (optimized(made("txt2img", unet), gate) for gate in (2, 3, 2))
    latents("txt2img", first)
    assert compilations(first, second, third) == 2
    latents("txt2img", second)
    latents("txt2img", third)
    assert compilations(first, second, third) == 2
    # Another configuration needs other graphs; graphs made by a restored pipeline are kept for the others.
    other = optimized(made("txt2img", unet), 2, cache_dtype=torch.bfloat16)
    latents("txt2img", other)
    assert compilations(first, second, third, other) == 4
    tgate_compile.restore(first)
    tgate_compile.restore(third)
    assert_same(latents("txt2img", second), by_hooks("txt2img", 3))
    assert compilations(second) == 2


def test_a_change_of_the_denoiser_is_seen_by_all() -> None:
    unet, plain = unet_of(), made("txt2img", unet_of())
    pipes = {kind: optimized(made(kind, unet)) for kind in ("txt2img", "img2img")}
    for kind, pipe in pipes.items():
        latents(kind, pipe)
    add_lora(unet)
    add_lora(plain.unet)
    for kind, pipe in pipes.items():
        assert_same(latents(kind, pipe), by_hooks(kind, 2, made(kind, plain.unet)))
    unet.delete_adapters("default")


# One at a time.


@pytest.mark.parametrize("inner", ["txt2img", "img2img"])
def test_a_call_inside_of_another_pipelines_call(inner: str) -> None:
    unet = unet_of()
    outer, other = optimized(made("txt2img", unet)), optimized(made(inner, unet))
    refused = []

    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # The other pipeline has a separate scheduler, so its whole call fits between two steps of this one.
        assert_same(latents(inner, other), by_hooks(inner, 2))
        with pytest.raises(tgate_compile.ConcurrentGenerationError):
            tgate_compile.restore(other)
        refused.append(step)
        return tensors

    assert_same(latents("txt2img", outer, callback_on_step_end=call), by_hooks("txt2img", 2))
    assert refused == [0, 1, 2, 3]
    assert_same(latents(inner, other), by_hooks(inner, 2))


def test_a_call_that_breaks_off_leaves_the_others_alone() -> None:
    unet = unet_of()
    first, second = optimized(made("txt2img", unet)), optimized(made("img2img", unet), 3)

    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError

    for error in range(2):
        with pytest.raises(ZeroDivisionError):
            latents("txt2img", first, callback_on_step_end=fail)
        assert_same(latents("img2img", second), by_hooks("img2img", 3))
        if error:
            assert_same(latents("txt2img", first), by_hooks("txt2img", 2))


def test_a_plain_pipeline_over_an_optimized_denoiser() -> None:
    """`from_pipe` on an optimized pipeline makes a plain one with plain results."""
    gated = optimized(made("txt2img", unet_of()))
    plain = StableDiffusionImg2ImgPipeline.from_pipe(gated)
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is StableDiffusionImg2ImgPipeline
    assert torch.equal(latents("img2img", plain), latents("img2img", made("img2img", unet_of())))
    assert_same(latents("txt2img", gated), by_hooks("txt2img", 2))
    # It can also be optimized.
    optimized(plain, 3)
    assert_same(latents("img2img", plain), by_hooks("img2img", 3))
    tgate_compile.restore(gated)
    assert_same(latents("img2img", plain), by_hooks("img2img", 3))


# Restoring.


def state(unet: Any, pipes: list[Any]) -> Any:
    """Return everything that `optimize` changes or might change."""
    hooks = [(name, id(value)) for name, value in vars(unet).items() if name not in ("_parameters", "_modules")]
    return (
        [(type(pipe), sorted(vars(pipe)), type(pipe.scheduler)) for pipe in pipes],
        type(unet),
        hooks,
        [id(parameter) for parameter in unet.parameters()],
        unet.forward.__func__,
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_restored_in_any_order(order: tuple[int, ...]) -> None:
    unet = unet_of("small")
    kinds = list(KINDS)
    pipes = [made(kind, unet) for kind in kinds]
    before = state(unet, pipes)
    for pipe, gate in zip(pipes, (2, 3, 1), strict=True):
        optimized(pipe, gate)
    for number, which in enumerate(order):
        tgate_compile.restore(pipes[which])
        with pytest.raises(tgate_compile.ConfigurationError, match="not optimized"):
            tgate_compile.restore(pipes[which])
        left = [other for other in range(3) if other not in order[: number + 1]]
        assert [pipes[other]._tgate_compile is not None for other in left] == [True] * len(left)
    assert state(unet, pipes) == before


def test_restored_pipelines_are_plain_while_others_go_on() -> None:
    unet = unet_of()
    first, second = optimized(made("txt2img", unet)), optimized(made("img2img", unet), 3)
    plain = latents("txt2img", made("txt2img", unet_of()))
    latents("txt2img", first)
    for _ in range(2):
        tgate_compile.restore(first)
        assert torch.equal(latents("txt2img", first), plain)
        assert_same(latents("img2img", second), by_hooks("img2img", 3))
        optimized(first)
        assert_same(latents("txt2img", first), by_hooks("txt2img", 2))


def test_a_denoiser_that_is_replaced_in_one_of_them() -> None:
    unet = unet_of()
    first, second = optimized(made("txt2img", unet)), optimized(made("img2img", unet))
    first.unet = unet_of()
    with pytest.raises(tgate_compile.ConfigurationError, match="has been replaced since"):
        latents("txt2img", first)
    assert_same(latents("img2img", second), by_hooks("img2img", 2))
    tgate_compile.restore(first)
    assert torch.equal(latents("txt2img", first), latents("txt2img", made("txt2img", unet_of())))
    assert_same(latents("img2img", second), by_hooks("img2img", 2))


# Bundles and copies.


@pytest.mark.heavy
def test_a_bundle_on_one_of_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    unet = unet_of()
    first = optimized(made("txt2img", unet))
    call = {"prompt": "", "num_inference_steps": STEPS, "height": 16, "width": 16}
    folder = tgate_compile.export(first, tmp_path / "bundle", call=call, dynamic=False)
    served = tgate_compile.load(made("txt2img", unet), folder)
    second = optimized(made("img2img", unet), 3)
    for _ in range(2):
        assert difference(latents("txt2img", served), by_hooks("txt2img", 2)) <= 1e-4
        assert_same(latents("txt2img", first), by_hooks("txt2img", 2))
        assert_same(latents("img2img", second), by_hooks("img2img", 3))
    assert tgate_compile.describe(served).bundle == str(folder)
    assert tgate_compile.describe(first).bundle is None
    tgate_compile.restore(first)
    tgate_compile.restore(second)
    assert difference(latents("txt2img", served), by_hooks("txt2img", 2)) <= 1e-4
    tgate_compile.restore(served)
    assert torch.equal(latents("txt2img", served), latents("txt2img", made("txt2img", unet_of())))


def test_no_copies() -> None:
    unet = unet_of()
    pipes = [optimized(made(kind, unet)) for kind in ("txt2img", "img2img")]
    plain = made("txt2img", unet)
    for refused in (*pipes, unet, plain):
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(tgate_compile.ConfigurationError, match=r"restore\(pipe\)"):
                way(refused)
    tgate_compile.restore(pipes[0])
    with pytest.raises(tgate_compile.ConfigurationError):
        copy.deepcopy(pipes[0])  # the other one is still optimized, and its hook is on the denoiser
    tgate_compile.restore(pipes[1])
    copied = copy.deepcopy(pipes[0])
    assert torch.equal(latents("txt2img", copied), latents("txt2img", pipes[0]))


def test_schedulers_are_each_pipelines_own() -> None:
    unet = unet_of()
    heun = diffusers.HeunDiscreteScheduler(**VELOCITY)
    first = optimized(made("txt2img", unet, scheduler=heun))
    second = optimized(made("txt2img", unet, scheduler=DDIMScheduler(**VELOCITY, clip_sample=False)))
    plain = made("txt2img", unet_of(), scheduler=diffusers.HeunDiscreteScheduler(**VELOCITY))
    with hook_reference(plain, 2, calls_per_step=2):
        expected = latents("txt2img", plain)
    for _ in range(2):
        assert_same(latents("txt2img", first), expected)
        reference = by_hooks(
            "txt2img", 2, made("txt2img", unet_of(), scheduler=DDIMScheduler(**VELOCITY, clip_sample=False))
        )
        assert_same(latents("txt2img", second), reference)
