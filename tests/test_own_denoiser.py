"""Denoisers and pipelines of one's own, against T-GATE played with plain hooks at the taps of `own_denoisers.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.own_denoisers import CASES, DIM, TEXT, TOKENS, Case, Denoiser
from tgate_compile import ConfigurationError, UnsupportedModelError

STEPS, GATE = 5, 2


class OwnPipeline(DiffusionPipeline):
    """Guidance in one batch, as in diffusers; the text is given as it is."""

    def __init__(self, transformer: nn.Module, scheduler: Any, predict: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.predict = predict or (lambda model, x, t, text: model(x, t, text))

    @torch.no_grad()
    def __call__(self, text: Tensor, num_inference_steps: int = STEPS, guidance_scale: float = 4.0) -> Tensor:
        return _denoise(self, self.transformer, text, num_inference_steps, guidance_scale)


class MerelyAlike:
    """A pipeline that has never heard of diffusers', but for its scheduler."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.encoder = nn.Identity()
        self.scheduler = DDIMScheduler()
        self.predict = lambda model, x, t, text: model(x, t, text)

    @torch.no_grad()
    def __call__(self, text: Tensor, **kwargs: Any) -> Tensor:
        return _denoise(self, self.model, text, STEPS, kwargs.get("guidance_scale", 1.0))


def _denoise(pipe: Any, model: nn.Module, text: Tensor, steps: int, scale: float) -> Tensor:
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(len(text), TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    for t in pipe.scheduler.timesteps:
        if scale > 1:
            both = torch.cat([torch.zeros_like(text), text])
            uncond, cond = pipe.predict(model, torch.cat([x, x]), t, both).chunk(2)
            prediction = uncond + scale * (cond - uncond)
        else:
            prediction = pipe.predict(model, x, t, text)
        x = pipe.scheduler.step(prediction, t, x).prev_sample
    return x


def texts(prompts: int = 2) -> Tensor:
    return torch.randn(prompts, TEXT, DIM, generator=torch.Generator().manual_seed(1))


def built(case: Case) -> OwnPipeline:
    torch.manual_seed(0)
    return OwnPipeline(case.build().eval(), DDIMScheduler(), case.predict)


@contextmanager
def played(model: nn.Module, gate: int, *, guided: bool = True) -> Iterator[None]:
    """T-GATE v1 by hooks: the mean of the halves at every tap, and from the gate on the first half alone."""
    original, step, caches = model.forward, -1, {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        if step < gate or not guided:
            return original(*args, **kwargs)
        rows = max(leaf.shape[0] for leaf in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(leaf) and leaf.ndim)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda leaf: leaf[: rows // 2] if leaf.ndim and leaf.shape[0] == rows else leaf, (args, kwargs)
        )
        return pytree.tree_map_only(Tensor, lambda leaf: torch.cat([leaf, leaf]), original(*args, **kwargs))

    def tap(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if step >= gate:
            return caches[module]
        caches[module] = sum(output.chunk(2)) / 2 if guided else output
        return output

    taps = [module for module in model.modules() if isinstance(module, nn.Identity)]
    assert taps
    handles = [module.register_forward_hook(tap) for module in taps]
    model.forward = forward  # type: ignore[method-assign]
    yield
    del model.forward
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Case, OwnPipeline, OwnPipeline]:
    case = CASES[request.param]
    return case, built(case), tgate_compile.optimize(built(case), GATE, backend="eager")


def test_gated(case: tuple[Case, OwnPipeline, OwnPipeline]) -> None:
    made, plain, gated = case
    with played(plain.transformer, GATE):
        expected = plain(texts())
    assert_same(gated(texts()), expected)
    assert tgate_compile.describe(gated).sites == made.sites
    assert tgate_compile.describe(gated).strip == "FFppp"
    assert_differ(expected, plain(texts()))


def test_ungated(case: tuple[Case, OwnPipeline, OwnPipeline]) -> None:
    _, plain, gated = case
    assert torch.equal(gated(texts(), gate_step=1000), plain(texts()))


def test_without_guidance(case: tuple[Case, OwnPipeline, OwnPipeline]) -> None:
    _, plain, gated = case
    with played(plain.transformer, GATE, guided=False):
        expected = plain(texts(), guidance_scale=1.0)
    assert_same(gated(texts(), guidance_scale=1.0), expected)
