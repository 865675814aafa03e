"""Preludes and tables of running pipelines: computed as rarely as possible, and never used when they do not apply."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PixArtTransformer2DModel

import tgate_compile
from tests.tiny_pipelines import (
    PROMPTS,
    SCHEDULE,
    controlnet,
    image,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)
from tests.tiny_transformers import (
    hunyuan_dit,
    hunyuan_dit_call,
    lumina,
    lumina_call,
    sana,
    sana_call,
    stable_diffusion_3,
)
from tests.tiny_video import wan, wan_call
from tgate_compile import ConfigurationError
from tgate_compile.engine.compiled import CompiledVariant, Parking
from tgate_compile.pipeline import optimized

GATE, STEPS = 3, 6
small = functools.partial(stable_diffusion, layout="small")


def gated(pipe: Any, gate_step: int | None = GATE, **options: Any) -> Any:
    return tgate_compile.optimize(pipe, **{"gate_step": gate_step, "backend": "eager", **options})


def runs_of(pipe: Any) -> dict[str, int]:
    """Return how often the last generation has run a prelude and a table."""
    runs: dict[str, int] = pipe._tgate_compile.hook.last.early.runs
    return runs


def compiled_of(pipe: Any) -> list[CompiledVariant]:
    compiled: list[CompiledVariant] = pipe._tgate_compile.hook.store.compiled
    return compiled


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (small, {}),
        (sdxl, {}),
        (pixart, pixart_prompt()),
        (functools.partial(pixart, micro_conditions=True), pixart_prompt(2)),
        (hunyuan_dit, hunyuan_dit_call()),
        (sana, sana_call()),
        (lumina, lumina_call()),
    ],
    ids=["sd", "sdxl", "pixart", "pixart-sizes", "hunyuan", "sana", "lumina"],
)
def test_splitting_changes_nothing(make: Callable[[], Any], call: dict[str, Any]) -> None:
    plain = run(make(), steps=4, **call)
    pipe = gated(make(), 2, binding_times=True)
    assert torch.equal(run(pipe, steps=4, gate_step=4, **call), plain)
    split = run(pipe, steps=4, **call)
    assert all(compiled.split is not None for compiled in compiled_of(pipe))
    assert torch.equal(split, run(gated(make(), 2, binding_times=False), steps=4, **call))
    assert not torch.equal(split, plain)


def test_a_pipeline_that_evaluates_the_halves_in_two_calls() -> None:
    def frames(pipe: Any, **call: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            **{"num_inference_steps": 4, "output_type": "latent", **wan_call(), **call}, generator=generator
        ).frames

    pipe = gated(wan(), 2, binding_times=True)
    assert torch.equal(frames(pipe, gate_step=4), frames(wan()))
    assert runs_of(pipe) == {"prelude": 2, "table": 8}  # one of each for either half
    assert torch.equal(frames(pipe), frames(gated(wan(), 2, binding_times=False)))


def sd3_image(pipe: Any) -> Any:
    config = pipe.transformer.config
    dims = config.joint_attention_dim, config.pooled_projection_dim
    generator = torch.Generator().manual_seed(5)
    text = {
        f"{half}{name}": torch.randn(*shape, generator=generator)
        for half in ("", "negative_")
        for name, shape in (("prompt_embeds", (1, 5, dims[0])), ("pooled_prompt_embeds", (1, dims[1])))
    }
    return run(pipe, steps=4, **text)


def gated_sd3() -> Any:
    # Guidance never ends in 4 steps: joint attention cannot be gated.
    return tgate_compile.optimize(stable_diffusion_3(), None, guidance_step=4, backend="eager", binding_times=True)


def test_joint_attention_has_a_table_too() -> None:
    pipe = gated_sd3()
    assert torch.equal(sd3_image(pipe), sd3_image(stable_diffusion_3()))
    assert runs_of(pipe) == {"prelude": 1, "table": 4}
    (compiled,) = compiled_of(pipe)
    assert compiled.split is not None
    assert compiled.split.table is not None
    assert any("norm1.linear" in name for name in compiled.split.table.weights)
    assert not any("norm1.linear" in name for name in compiled.split.step.weights)


def test_how_often_they_run() -> None:
    pipe = gated(sdxl())
    run(pipe)
    full, pruned = compiled_of(pipe)
    # One prelude for each graph: the pruned one still takes the pooled text.
    assert runs_of(pipe) == {"prelude": 2, "table": STEPS}
    run(pipe)
    assert runs_of(pipe) == {"prelude": 2, "table": STEPS}
    names = {name for part in (full, pruned) for name in part.step.weights}
    assert not any("attn2.to_k" in name or "attn2.to_v" in name or "time_emb" in name for name in names)
    run(gated(pipe2 := small()))
    assert runs_of(pipe2) == {"prelude": 1, "table": STEPS}  # the pruned graph takes no text


def test_repeated_timesteps_of_a_second_order_scheduler() -> None:
    def make() -> Any:
        pipe = small()
        pipe.scheduler = HeunDiscreteScheduler(**SCHEDULE, prediction_type="v_prediction")
        return pipe

    pipe = gated(make(), STEPS)
    assert torch.equal(run(pipe), run(make()))
    assert len(pipe.scheduler.timesteps) == 2 * STEPS - 1
    assert runs_of(pipe) == {"prelude": 1, "table": STEPS}


def at_step(number: int, change: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return change(pipe, tensors) if step == number else tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


def swapped(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "prompt_embeds": tensors["prompt_embeds"] * 2 - 1}


def in_place(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["prompt_embeds"].mul_(2).sub_(1)
    return tensors


def copied(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "prompt_embeds": tensors["prompt_embeds"].clone()}


@pytest.mark.parametrize(("change", "preludes"), [(swapped, 2), (in_place, 2), (copied, 1)])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_prompt_that_a_callback_changes(change: Any, preludes: int, inference_mode: bool) -> None:
    with torch.inference_mode(inference_mode):
        pipe = gated(small(), STEPS)
        expected = run(small(), **at_step(1, change))
        assert torch.equal(run(pipe, **at_step(1, change)), expected)
        assert torch.equal(expected, run(small())) == (change is copied)
    if not inference_mode:  # where the weights cannot be watched either
        assert runs_of(pipe) == {"prelude": preludes, "table": STEPS}


def test_a_timestep_that_a_callback_changes() -> None:
    def earlier(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.scheduler.timesteps[3:] -= 7
        return tensors

    pipe = gated(small(), STEPS)
    expected = run(small(), **at_step(1, earlier))
    assert not torch.equal(expected, run(small()))
    assert torch.equal(run(pipe, **at_step(1, earlier)), expected)


def test_another_scheduler() -> None:
    pipe, plain = gated(small(), STEPS), small()
    run(pipe)
    for each in (pipe, plain):
        each.scheduler = EulerDiscreteScheduler.from_config(each.scheduler.config)
    assert torch.equal(run(pipe), run(plain))


def test_weights_that_change_in_place() -> None:
    pipe, plain = gated(small(), STEPS), small()
    before = run(pipe)
    for each in (pipe, plain):
        each.unet.time_embedding.linear_2.weight.data.mul_(1.5)
        each.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data.mul_(1.5)
    assert torch.equal(run(pipe), run(plain))
    assert not torch.equal(run(pipe), before)


def test_weights_that_a_callback_changes_in_place() -> None:
    def changed(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            pipe.unet.time_embedding.linear_2.weight.mul_(1.5)
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.5)
        return tensors

    pipe = gated(small(), STEPS)
    assert torch.equal(run(pipe, **at_step(2, changed)), run(small(), **at_step(2, changed)))
    assert runs_of(pipe)["prelude"] == 2


def test_a_lora_on_attentions_and_modulation() -> None:
    from peft import LoraConfig

    pipe, plain = gated_sd3(), stable_diffusion_3()
    images = [sd3_image(pipe)]
    config = LoraConfig(r=2, target_modules=["norm1.linear", "to_k", "add_k_proj"], init_lora_weights=False)
    for each in (pipe, plain):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            each.transformer.add_adapter(config, adapter_name="modulation")
    images.append(sd3_image(plain))
    assert torch.equal(sd3_image(pipe), images[-1])
    for each in (pipe, plain):
        each.transformer.transformer_blocks[0].norm1.linear.lora_B["modulation"].weight.data.mul_(2)
    images.append(sd3_image(plain))
    assert torch.equal(sd3_image(pipe), images[-1])
    for each in (pipe, plain):
        each.transformer.set_adapters(["modulation"], [0.5])
    images.append(sd3_image(plain))
    assert torch.equal(sd3_image(pipe), images[-1])
    assert len({each.numpy().tobytes() for each in images}) == 4


def test_residuals_of_a_controlnet_are_not_in_the_prelude() -> None:
    call = {"image": image()}
    pipe = gated(controlnet(), STEPS)
    assert torch.equal(run(pipe, **call), run(controlnet(), **call))
    (compiled,) = compiled_of(pipe)
    assert compiled.split is not None
    inputs = {name for part in compiled.split.early for name in part.inputs}
    assert not any("residual" in name for name in inputs)
    assert any("residual" in name for name in compiled.split.step.inputs)


def test_batches_and_guidance_change() -> None:
    pipe, other = gated(small(), binding_times=True), gated(small(), binding_times=False)
    calls: list[dict[str, Any]] = [{}, {"prompt": PROMPTS}, {"guidance_scale": 1.0}, {"prompt": "blue dog"}, {}]
    images = [run(pipe, **call) for call in calls]
    for got, call in zip(images, calls, strict=True):
        assert torch.equal(got, run(other, **call))
    assert torch.equal(images[0], images[4])


def test_pipelines_that_share_a_store_keep_their_own_values() -> None:
    pipe, other = small(), small()
    other.unet = pipe.unet
    gated(pipe, STEPS)
    gated(other, STEPS)
    assert other._tgate_compile.hook.store is pipe._tgate_compile.hook.store
    inner: list[torch.Tensor] = []

    def nested(_: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner.append(run(other, "blue dog"))
        return tensors

    outer = run(pipe, **at_step(2, nested))
    assert torch.equal(outer, run(small()))
    assert torch.equal(inner[0], run(small(), "blue dog"))


def test_the_values_are_freed_with_the_generation() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def look(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        generation = pipe._tgate_compile.hook._hook._active
        ((_, (prompt,)),) = generation.early._prompts.values()
        seen.extend(weakref.ref(value) for value in (*prompt.values.values(), *prompt.rows.popitem()[1].values()))
        return tensors

    pipe = gated(small(), STEPS)
    run(pipe, **at_step(2, look))
    gc.collect()
    assert len(seen) > 4
    assert all(value() is None for value in seen)


class Withheld(Parking):
    """Replaces parked weights by NaN, so that a graph that uses one is noticed. This machine has one device."""

    def send(self, tensor: torch.Tensor) -> Any:
        kept, tensor.data = tensor.data, torch.full_like(tensor, float("nan"))
        return kept

    def fetch(self, tensor: torch.Tensor, home: Any) -> None:
        tensor.data = home


@pytest.fixture
def withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimized, "Parking", Withheld)


def missing(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.isnan().any()}


def noting(found: list[set[str]], denoiser: torch.nn.Module) -> dict[str, Any]:
    """Return arguments of a call that note after each step which weights are away."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        found.append(missing(denoiser))
        return tensors

    if isinstance(denoiser, PixArtTransformer2DModel):  # its pipeline has the older argument
        return {"callback": lambda step, timestep, latents: found.append(missing(denoiser))}
    return {"callback_on_step_end": callback}


@pytest.mark.usefixtures("withheld")
@pytest.mark.parametrize(
    ("make", "name", "call"),
    [
        pytest.param(sdxl, "unet", {}, id="sdxl", marks=pytest.mark.heavy),
        pytest.param(pixart, "transformer", pixart_prompt(), id="pixart"),
        pytest.param(small, "unet", {"gate_step": STEPS}, id="ungated"),
    ],
)
def test_weights_are_away_during_the_loop_and_come_back(
    make: Callable[[], Any], name: str, call: dict[str, Any]
) -> None:
    pipe = gated(make(), offload_prelude=True)
    found: list[set[str]] = []
    denoiser = getattr(pipe, name)
    state = {key: value.clone() for key, value in denoiser.state_dict().items()}
    parameters = dict(denoiser.named_parameters())
    for _ in range(2):
        got = run(pipe, **call, **noting(found, denoiser))
        assert torch.equal(got, run(gated(make(), binding_times=False), **call))
        assert not missing(denoiser)
    assert all(torch.equal(value, state[key]) for key, value in denoiser.state_dict().items())
    assert all(parameters[key] is parameter for key, parameter in denoiser.named_parameters())
    assert len(found) == 2 * STEPS
    for at in found:
        assert any("attn2.to_k" in each for each in at)
        assert any("time_embed" in each or "adaln" in each or "time_emb" in each for each in at)
        assert not any("attn1" in each for each in at)
    assert len(compiled_of(pipe)) == (1 if "gate_step" in call else 2)  # nothing was captured again
    call = {name: value for name, value in call.items() if name != "gate_step"}
    assert torch.equal(run(tgate_compile.restore(pipe), **call), run(make(), **call))


@pytest.mark.usefixtures("withheld")
def test_weights_come_back_after_an_error_and_for_other_calls() -> None:
    pipe = gated(small(), offload_prelude=True)

    def fail(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert missing(pipe.unet)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run(pipe, **at_step(1, fail))
    assert not missing(pipe.unet)

    def swap_and_look(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():  # a call of the denoiser from a callback runs the plain denoiser
            pipe.unet(tensors["latents"], 10, tensors["prompt_embeds"][:1])
        return swapped(pipe, tensors)

    assert torch.equal(
        run(pipe, gate_step=STEPS, **at_step(1, swap_and_look)), run(small(), **at_step(1, swap_and_look))
    )
    assert not missing(pipe.unet)


@pytest.mark.usefixtures("withheld")
def test_a_timestep_that_was_not_foreseen_brings_the_table_back() -> None:
    def earlier(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.scheduler.timesteps[3:] -= 7
        return tensors

    pipe = gated(small(), STEPS, offload_prelude=True)
    assert torch.equal(run(pipe, **at_step(1, earlier)), run(small(), **at_step(1, earlier)))
    assert runs_of(pipe)["table"] == 2 * STEPS - 3


def test_there_is_nowhere_to_offload_to_on_the_cpu() -> None:
    pipe = gated(small(), offload_prelude=True)
    with pytest.raises(ConfigurationError, match="on the CPU already"):
        run(pipe)
    assert torch.equal(run(tgate_compile.restore(pipe)), run(small()))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"binding_times": "yes"}, "True, False or None"),
        ({"offload_prelude": None}, "True or False"),
        ({"binding_times": False, "offload_prelude": True}, "Leave one of them out"),
    ],
)
def test_wrong_options(options: dict[str, Any], problem: str) -> None:
    pipe = small()
    with pytest.raises(ConfigurationError, match=problem):
        gated(pipe, **options)
    assert not hasattr(pipe, "_tgate_compile")
