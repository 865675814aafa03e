"""Changes of a denoiser's computation that leave no trace in its modules' plain attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

import tgate_compile
from tests.comparing import assert_differ
from tests.tiny_pipelines import add_lora, image_embeds, load_ip_adapter, run, stable_diffusion

STEPS = 2


def small() -> Any:
    return stable_diffusion(layout="small")


def ungated(pipe: Any) -> Any:
    return tgate_compile.optimize(pipe, 1000, backend="eager")


def check(make: Callable[[], Any], *changes: Callable[[Any], Any], **call: Any) -> Any:
    """Assert that after each of `changes`, which must have an effect, the optimized image equals the plain one."""
    plain, ours = make(), ungated(make())
    before = run(plain, steps=STEPS, **call)
    assert torch.equal(run(ours, steps=STEPS, **call), before)
    for change in changes:
        change(plain)
        change(ours)
        after = run(plain, steps=STEPS, **call)
        assert_differ(after, before)
        assert torch.equal(run(ours, steps=STEPS, **call), after)
        before = after
    return ours


def with_lora() -> Any:
    pipe = small()
    add_lora(pipe.unet)
    return pipe


def with_image() -> Any:
    pipe = small()
    load_ip_adapter(pipe)
    return pipe


@pytest.mark.parametrize("number", [np.float64, torch.tensor], ids=["numpy", "tensor"])
def test_scales_that_are_no_python_numbers(number: Callable[[float], Any]) -> None:
    scales = [lambda pipe, scale=scale: pipe.unet.set_adapters(["default"], [number(scale)]) for scale in (0.2, 0.6)]
    pipe = check(with_lora, *scales)
    compiled = pipe._tgate_compile.hook.store.compilations
    scales[0](pipe)
    run(pipe, steps=STEPS)
    assert pipe._tgate_compile.hook.store.compilations == compiled  # no new compilation


def test_an_image_scale_of_numpy() -> None:
    changes = [lambda pipe, scale=scale: pipe.set_ip_adapter_scale(scale) for scale in np.array([0.2, 0.9])]
    check(with_image, *changes, ip_adapter_image_embeds=image_embeds(with_image()))


def test_an_entry_of_the_configuration() -> None:
    check(small, lambda pipe: pipe.unet.register_to_config(center_input_sample=True))


# Patches of diffusers' functions, for all models.

strength = {"value": 0.8}


@pytest.fixture(params=[(BasicTransformerBlock, "forward"), (AttnProcessor2_0, "__call__")], ids=["block", "processor"])
def patched(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[..., Any]], None]]:
    kind, name = request.param
    own = getattr(kind, name)

    def patch(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            return change(own(self, *args, **kwargs))

        setattr(kind, name, changed)

    yield patch
    setattr(kind, name, own)


def test_patched_classes(patched: Callable[..., None]) -> None:
    plain, ours = small(), ungated(small())
    before = run(ours, steps=STEPS)
    for factor in (0.8, 0.5):
        patched(lambda output, factor=factor: output * factor)
        assert_differ(run(plain, steps=STEPS), before)
        assert torch.equal(run(ours, steps=STEPS), run(plain, steps=STEPS))


def test_patches_that_keep_state_are_refused(patched: Callable[..., None]) -> None:
    patched(lambda output: output * strength["value"])
    with pytest.raises(tgate_compile.UnsupportedModelError, match=r"cannot be part of a graph.*'strength'"):
        ungated(small())


def test_another_attention_function(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.nn.functional.scaled_dot_product_attention

    def weaker(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return own(query, key, value * 0.8, *args, **kwargs)

    def counting(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return own(query, key, value * strength["value"], *args, **kwargs)

    plain, ours = small(), ungated(small())
    before = run(ours, steps=STEPS)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", weaker)
    assert_differ(run(plain, steps=STEPS), before)
    assert torch.equal(run(ours, steps=STEPS), run(plain, steps=STEPS))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    with pytest.raises(tgate_compile.UnsupportedModelError, match="in place of torch's scaled_dot_product_attention"):
        run(ours, steps=STEPS)


factor = 1.0


def test_a_global_variable_of_the_denoisers_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        pipe = small()
        own = pipe.unet.forward

        def weaker(*args: Any, **kwargs: Any) -> Any:
            return (own(*args, **kwargs)[0] * factor,)

        pipe.unet.forward = weaker
        return pipe

    check(make, lambda pipe: monkeypatch.setitem(globals(), "factor", 0.5))


# Custom denoiser classes.

settings: dict[str, Any] = {"scale": 1.0, "more": SimpleNamespace(offset=0.0)}


class Configured(diffusers.UNet2DConditionModel):  # type: ignore[misc]
    """Reads a dictionary of its Python module, an attribute of its class, and tensors that are not buffers."""

    scale = 1.0

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scaled = sample * self.scale * self.tensor.sum() + settings["more"].offset
        return super().forward(scaled * settings["scale"], *args, **kwargs)


def configured() -> Any:
    pipe = small()
    pipe.unet.__class__ = Configured
    pipe.unet.tensor = torch.ones(100) / 100
    return pipe


def test_values_that_a_custom_class_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    check(
        configured,
        lambda pipe: monkeypatch.setitem(settings, "scale", 0.5),
        lambda pipe: monkeypatch.setattr(settings["more"], "offset", 0.3),
        lambda pipe: monkeypatch.setattr(Configured, "scale", 0.7),
        lambda pipe: setattr(pipe.unet, "tensor", torch.ones(100) / 50),
        lambda pipe: pipe.unet.tensor.mul_(0.5),
    )
