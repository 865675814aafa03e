"""Callbacks that call the denoiser: their calls do not count as steps, and use the plain denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
)

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.denoiser_reference import TwoCalls, played
from tests.hook_reference import hook_reference
from tests.own_loops import NO_TEXT, TEXTS, Looping, looping
from tests.tiny_pipelines import image_embeds, load_ip_adapter, run, stable_diffusion
from tests.tiny_video import wan, wan_call
from tgate_compile.engine.variants import VariantStore
from tgate_compile.study.bench.measure import timed_generation

GATE, STEPS = 3, 6


class Preview:
    """Calls the denoiser at some steps, moves the latents by its prediction, and records both.

    Args:
        steps: the steps at which it calls the denoiser.
        batch: rows of the call.
        at: the timestep of the call; None for the step's own.
    """

    def __init__(self, *steps: int, batch: int = 1, at: int | None = None) -> None:
        self.steps = steps
        self.batch = batch
        self.at = at
        self.calls: list[tuple[Any, torch.Tensor]] = []
        self.denoiser: Any = None

    def moved(self, step: int, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
        if step not in self.steps:
            return latents
        rows = latents.repeat(self.batch, *[1] * (latents.ndim - 1))
        text = TEXTS[:1].expand(self.batch, -1, -1)
        time = torch.as_tensor(timestep if self.at is None else self.at)
        time = time if latents.ndim == 4 else time.expand(self.batch)  # a UNet's, a video transformer's
        with torch.no_grad():
            prediction = self.denoiser(rows, time, text, return_dict=False)[0]
        self.calls.append(((rows, time, text), prediction))
        return latents - 0.05 * prediction[:1]

    def at_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        return {**tensors, "latents": self.moved(step, timestep, tensors["latents"])}

    __call__ = at_step_end

    def old(self, step: int, timestep: Any, latents: torch.Tensor) -> None:
        latents.copy_(self.moved(step, timestep, latents))

    def check(self, plain: Any) -> None:
        """Assert that the calls returned the plain denoiser's predictions."""
        assert len(self.calls) == len(self.steps)
        for inputs, prediction in self.calls:
            with torch.no_grad():
                assert torch.equal(prediction, plain(*inputs, return_dict=False)[0])


class Official(PipelineCallback):
    """Return a callback as diffusers takes them."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, preview: Preview) -> None:
        super().__init__(cutoff_step_ratio=None, cutoff_step_index=1)
        self.preview = preview

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Any) -> Any:
        return self.preview.at_step_end(pipeline, step_index, timesteps, callback_kwargs)


def function_of(preview: Preview) -> Callable[..., Any]:
    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        return preview(pipe, step, timestep, tensors)

    return callback


#: Ways to pass a callback.
WAYS: dict[str, Callable[[Preview], dict[str, Any]]] = {
    "function": lambda preview: {"callback_on_step_end": function_of(preview)},
    "lambda": lambda preview: {"callback_on_step_end": lambda *given: preview(*given)},
    "partial": lambda preview: {"callback_on_step_end": functools.partial(Preview.at_step_end, preview)},
    "bound method": lambda preview: {"callback_on_step_end": preview.at_step_end},
    "object": lambda preview: {"callback_on_step_end": preview},
    "PipelineCallback": lambda preview: {"callback_on_step_end": Official(preview)},
    "MultiPipelineCallbacks": lambda preview: {"callback_on_step_end": MultiPipelineCallbacks([Official(preview)])},
    "callback": lambda preview: {"callback": preview.old, "callback_steps": 1},
}


@pytest.fixture(scope="module")
def sd() -> SimpleNamespace:
    """Return an optimized pipeline and a plain one with the same weights."""
    gated, plain = (stable_diffusion(layout="small") for _ in range(2))
    tgate_compile.optimize(gated, GATE, backend="eager")
    return SimpleNamespace(gated=gated, plain=plain, image=run(gated))


@contextmanager
def aside(reference: Any) -> Iterator[None]:
    """Make the denoiser of a hook reference the plain one inside the context."""
    denoiser, inside = reference.denoiser, dict(vars(reference))
    reference.step, reference.guided, reference.cache = -1, lambda: False, {}
    forward = vars(denoiser).pop("forward")
    yield
    denoiser.forward = forward
    vars(reference).update({name: inside[name] for name in ("step", "guided", "cache")})


def played_by_hooks(pipe: Any, way: str, preview: Preview, **call: Any) -> torch.Tensor:
    with hook_reference(pipe, GATE) as reference:
        original = preview.moved

        def moved(*args: Any) -> torch.Tensor:
            preview.denoiser = pipe.unet
            with aside(reference):
                return original(*args)

        preview.moved = moved  # type: ignore[method-assign]
        return run(pipe, **WAYS[way](preview), **call)


PREVIEWS: list[tuple[str, dict[str, Any]]] = [
    ("function", {"steps": (0,)}),
    ("lambda", {"steps": (2, 3)}),
    ("partial", {"steps": (5,)}),
    ("bound method", {"steps": (1, 4), "batch": 2}),
    ("object", {"steps": (0, 3), "batch": 3}),
    ("PipelineCallback", {"steps": (2, 5), "at": 1}),
    ("MultiPipelineCallbacks", {"steps": (0, 4), "batch": 2, "at": 999}),
    ("callback", {"steps": tuple(range(6)), "batch": 2}),
]


@pytest.mark.filterwarnings("ignore:.*Passing `callback:FutureWarning")
@pytest.mark.parametrize(("way", "given"), PREVIEWS, ids=[way for way, _ in PREVIEWS])
def test_calls_of_a_callback_are_no_steps(sd: SimpleNamespace, way: str, given: dict[str, Any]) -> None:
    def preview(denoiser: Any = None) -> Preview:
        made = Preview(*given["steps"], batch=given.get("batch", 1), at=given.get("at"))
        made.denoiser = denoiser
        return made

    gated, ungated = preview(sd.gated.unet), preview(sd.gated.unet)
    result = run(sd.gated, **WAYS[way](gated))
    assert tgate_compile.describe(sd.gated).strip == "FFFppp"
    gated.check(sd.plain.unet)
    assert_same(result, played_by_hooks(sd.plain, way, preview()))
    assert_differ(result, sd.image)
    result = run(sd.gated, gate_step=1000, **WAYS[way](ungated))
    ungated.check(sd.plain.unet)
    assert torch.equal(result, run(sd.plain, **WAYS[way](preview(sd.plain.unet))))
    assert torch.equal(run(sd.gated), sd.image)


def test_halves_in_two_calls() -> None:
    gated, plain = wan(), wan()
    tgate_compile.optimize(gated, GATE, backend="eager")
    call = {**wan_call(), "num_inference_steps": STEPS, "output_type": "latent"}

    def preview() -> Preview:
        return Preview(0, 3, 5, batch=2)

    ours = preview()
    result = gated(**call, callback_on_step_end=ours, generator=torch.Generator().manual_seed(0)).frames
    assert tgate_compile.describe(gated).strip == "FFFppp"
    ours.check(plain.transformer)
    sites = gated._tgate_compile.hook.store.site_names
    reference = TwoCalls(plain.transformer, GATE, guided=lambda: True)
    theirs = preview()
    original = theirs.moved

    def moved(*args: Any) -> torch.Tensor:
        forward, attention = vars(plain.transformer).pop("forward"), reference.attention
        reference.attention = lambda name, output: output  # type: ignore[method-assign]
        result = original(*args)
        plain.transformer.forward, reference.attention = forward, attention  # type: ignore[method-assign]
        return result

    theirs.moved = moved  # type: ignore[method-assign]
    with played(reference, plain.transformer, sites):
        expected = plain(**call, callback_on_step_end=theirs, generator=torch.Generator().manual_seed(0)).frames
    assert_same(result, expected)


class BrokenError(Exception):
    pass


def test_a_callback_that_fails_in_its_denoiser_call(sd: SimpleNamespace) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 4:
            pipe.unet(tensors["latents"], timestep, encoder_hidden_states=TEXTS[:1], return_dict=False)
            raise BrokenError
        return tensors

    with pytest.raises(BrokenError):
        run(sd.gated, callback_on_step_end=callback)
    assert torch.equal(run(sd.gated), sd.image)


@pytest.mark.parametrize("cutoff", [1, 4])
def test_a_callback_that_ends_guidance_and_calls_the_denoiser(sd: SimpleNamespace, cutoff: int) -> None:
    def callbacks(preview: Preview) -> MultiPipelineCallbacks:
        end = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=cutoff)
        return MultiPipelineCallbacks([Official(preview), end])

    ours, theirs = Preview(0, 2, 5), Preview(0, 2, 5)
    result = run(sd.gated, callback_on_step_end=callbacks(ours))
    ours.check(sd.plain.unet)
    with hook_reference(sd.plain, GATE, guided=lambda: sd.plain.do_classifier_free_guidance) as reference:
        original = theirs.moved

        def moved(*args: Any) -> torch.Tensor:
            with aside(reference):
                return original(*args)

        theirs.moved = moved  # type: ignore[method-assign]
        expected = run(sd.plain, callback_on_step_end=callbacks(theirs))
    if cutoff > GATE:
        # After the gate the pipeline continues with only the prompt's half, and so do the hooks.
        assert tgate_compile.describe(sd.gated).strip == "FFFppp"
    assert_same(result, expected)


def test_a_callback_that_changes_an_ip_adapters_scale() -> None:
    gated, plain = (stable_diffusion(layout="small") for _ in range(2))
    for pipe in (gated, plain):
        load_ip_adapter(pipe)
    tgate_compile.optimize(gated, GATE, backend="eager")

    def call(pipe: Any) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.8)
        end = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
        return {"ip_adapter_image_embeds": image_embeds(pipe), "callback_on_step_end": end}

    result = run(gated, **call(gated))
    with hook_reference(plain, GATE):
        assert_same(result, run(plain, **call(plain)))
    assert torch.equal(run(gated, gate_step=1000, **call(gated)), run(plain, **call(plain)))


# Custom pipelines and loops.


class Calling(Looping):
    """Calls all of its callbacks."""

    @torch.no_grad()
    def __call__(self, callbacks: Any = (), watcher: Any = None) -> torch.Tensor:  # type: ignore[override]
        given = [*callbacks, *([] if watcher is None else [watcher])]
        return super().__call__(callback=lambda *args: [each(*args) for each in given])


class Watcher:
    def __call__(self, pipe: Any, timestep: Any, latents: torch.Tensor) -> None:
        pipe.denoised(latents, timestep, TEXTS[:1])


def test_callbacks_in_a_list() -> None:
    pipe = looping(Calling)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    without = pipe()
    assert torch.equal(pipe(callbacks=[Watcher(), Watcher()]), without)
    # As a function under any name.
    assert torch.equal(pipe(watcher=lambda *given: Watcher()(*given)), without)


def test_unrecognized_callbacks_are_refused() -> None:
    pipe = looping(Calling)
    plain = pipe(watcher=Watcher())
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(tgate_compile.UnsupportedModelError, match="already stepped over"):
        pipe(watcher=Watcher())
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, GATE, backend="eager", on_unsupported="plain")
    assert torch.equal(pipe(watcher=Watcher()), plain)


def test_previews_of_a_loop_of_ones_own(sd: SimpleNamespace) -> None:
    inputs = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor(7), TEXTS[:3])
    with torch.no_grad():
        expected = sd.plain.unet(*inputs).sample

    def denoised(loop: Any) -> torch.Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        sd.gated.scheduler.set_timesteps(STEPS)
        for timestep in sd.gated.scheduler.timesteps:
            texts = torch.cat([NO_TEXT, TEXTS[:1]])
            uncond, cond = sd.gated.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=texts).sample.chunk(
                2
            )
            latents = sd.gated.scheduler.step(uncond + 5 * (cond - uncond), timestep, latents).prev_sample
            if loop is not None:
                with loop.paused():
                    assert torch.equal(sd.gated.unet(*inputs).sample, expected)
        return latents

    with torch.no_grad(), tgate_compile.generation(sd.gated, guidance=True):
        without = denoised(None)
    with torch.no_grad(), tgate_compile.generation(sd.gated, guidance=True) as loop:
        assert torch.equal(denoised(loop), without)
    assert tgate_compile.describe(sd.gated).strip == "FFFppp"


def test_the_denoiser_is_checked_once_unless_other_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="least"), GATE, backend="eager")
    checks = []
    refresh = VariantStore.refresh
    monkeypatch.setattr(VariantStore, "refresh", lambda self, **given: checks.append(given) or refresh(self, **given))
    run(pipe)
    assert checks == [{}]  # a check takes longer than a step of a small model
    checks.clear()
    run(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: {})
    assert checks == [{}, *[{"begins": False}] * 5]
    checks.clear()
    timed_generation(pipe, {"prompt": "a fox", "num_inference_steps": STEPS, "output_type": "latent"}, 0)
    assert checks == [{}]  # the library's own timer does not slow down what it measures
    checks.clear()
    step = pipe.scheduler.step
    foreign = functools.wraps(step)(lambda *args, **kwargs: step(*args, **kwargs))
    monkeypatch.setattr(pipe.scheduler, "step", foreign)
    run(pipe)
    assert checks == [{}, *[{"begins": False}] * 5]
    checks.clear()
    timed_generation(pipe, {"prompt": "a fox", "num_inference_steps": STEPS, "output_type": "latent"}, 0)
    assert checks == [{}, *[{"begins": False}] * 5]  # the timer calls the other method, and puts it back
    assert pipe.scheduler.step is foreign
