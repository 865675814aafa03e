"""Custom denoisers and pipelines against T-GATE by plain hooks at the taps of `own_denoisers.py`."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Guidance in one batch, as in diffusers; the call takes embedded text."""

    def __init__(self, transformer: nn.Module, scheduler: Any, predict: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.predict = predict or (lambda model, x, t, text: model(x, t, text))

    @torch.no_grad()
    def __call__(
        self,
        text: Tensor,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 4.0,
        generator: torch.Generator | None = None,
        output_type: str = "latent",
        return_dict: bool = True,
    ) -> Any:
        latents = _denoise(self, self.transformer, text, num_inference_steps, guidance_scale)
        return latents if return_dict else (latents,)


class MerelyAlike:
    """A pipeline that uses nothing of diffusers but a scheduler."""

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
    """Run T-GATE v1 by hooks: cache the mean of the halves at every tap; from the gate on run only the first half."""
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


#: Two of the four combinations of these options have each value of both.
REPEATED = (
    "MultiheadAttention, batch_first=True, need_weights=False",
    "MultiheadAttention, batch_first=False, need_weights=True",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.heavy) if name in REPEATED else name for name in CASES],
)
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


@pytest.fixture(scope="module", autouse=True)
def no_fast_path() -> Iterator[None]:
    """Disable the fast path of `torch.nn`'s transformer layers, which graphs lack and which rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("case", ["fused", "two modalities"], indirect=True)
def test_without_guidance(case: tuple[Case, OwnPipeline, OwnPipeline]) -> None:
    _, plain, gated = case
    with played(plain.transformer, GATE, guided=False):
        expected = plain(texts(), guidance_scale=1.0)
    assert_same(gated(texts(), guidance_scale=1.0), expected)


@pytest.mark.parametrize("name", ["fused", "inline, context as a dict"])
def test_self_attention_is_cached_as_well(name: str) -> None:
    plain, gated = built(CASES[name]), tgate_compile.optimize(built(CASES[name]), 3, sp_interval=2, backend="eager")
    assert_differ(gated(texts()), plain(texts()))
    own = {"own.0", "own.1", "blocks.0", "blocks.1"} & set(tgate_compile.describe(gated).sites)
    assert len(own) == 2
    tgate_compile.restore(gated)
    tgate_compile.optimize(gated, STEPS, sp_interval=2, warm_up=STEPS, backend="eager")
    assert torch.equal(gated(texts()), plain(texts()))


# Pipelines.


def merely_alike() -> MerelyAlike:
    torch.manual_seed(0)
    return MerelyAlike(Denoiser().eval())


def test_a_pipeline_that_is_merely_like_diffusers() -> None:
    plain, pipe = merely_alike(), merely_alike()
    untouched = dict(vars(pipe)), dict(vars(pipe.model))
    assert tgate_compile.optimize(pipe, GATE, denoiser="model", backend="eager") is pipe
    with played(plain.model, GATE):
        expected = plain(texts(), guidance_scale=4.0)
    assert tgate_compile.describe(pipe, text=texts(), guidance_scale=4.0).strip == "FFppp"
    assert_same(pipe(texts(), guidance_scale=4.0), expected)
    assert tgate_compile.describe(pipe).sites == ("cross.0", "cross.1")
    assert torch.equal(pipe(texts(), guidance_scale=4.0, gate_step=9), plain(texts(), guidance_scale=4.0))
    tgate_compile.restore(pipe)
    assert (type(pipe), vars(pipe), vars(pipe.model)) == (MerelyAlike, *untouched)
    assert torch.equal(pipe(texts()), plain(texts()))


def test_the_denoiser_must_be_named() -> None:
    pipe = merely_alike()
    with pytest.raises(
        ConfigurationError, match=r"called unet or transformer.* model \(Denoiser\), encoder \(Identity\)"
    ):
        tgate_compile.optimize(pipe)
    with pytest.raises(ConfigurationError, match=r"denoiser='models': MerelyAlike has no such module. It has model"):
        tgate_compile.optimize(pipe, denoiser="models")
    del pipe.scheduler
    with pytest.raises(ConfigurationError, match="with a scheduler that has timesteps"):
        tgate_compile.optimize(pipe, denoiser="model")


@pytest.mark.heavy
def test_tune_and_analyze() -> None:
    pipe = built(CASES["inline, context as a dict"])
    plain = pipe(texts())
    call = {"text": texts()}
    analysis = tgate_compile.analyze(pipe, num_inference_steps=STEPS, call=call, switch_steps=(2,))
    assert {kind: len(attentions.sites) for kind, attentions in analysis.kinds.items()} == {"cross": 4, "self": 2}
    assert set(analysis.kinds["cross"].norms) == {"uncond", "cond"}
    assert analysis.trajectories is not None
    tuning = tgate_compile.tune(pipe, num_inference_steps=STEPS, call=call, tolerance=10.0)
    assert len(tuning.convergence.mean) == STEPS - 1
    assert tuning.schedule.gate_step is not None
    assert torch.equal(pipe(texts()), plain)


def test_the_analysis_reads_the_values_at_the_taps() -> None:
    pipe = built(CASES["fused"])
    norms: list[float] = []
    handles = [
        module.register_forward_hook(lambda module, args, out: norms.append(out.chunk(2)[1].norm().item()))
        for module in pipe.transformer.modules()
        if isinstance(module, nn.Identity)
    ]
    pipe(texts())
    for handle in handles:
        handle.remove()
    analysis = tgate_compile.analyze(pipe, num_inference_steps=STEPS, call={"text": texts()}, switch_steps=())
    assert analysis.kinds["cross"].norms["cond"].mean == pytest.approx(
        [sum(pair) / 2 for pair in zip(norms[::2], norms[1::2], strict=True)]
    )


# Refusals.


class Joint(Denoiser):
    """Has text and latents in one sequence."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        both = torch.cat([self.start(x, t), context], dim=1)
        for own in self.own:
            both = both + own(both)
        return both[:, : x.shape[1]]


class MixesRows(Denoiser):
    """Takes a mean over the batch."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return super().forward(x - x.mean(), t, context)


class Scalar(Denoiser):
    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Any:
        return super().forward(x, t, context), x.pow(2).mean()


class Layer(nn.TransformerDecoderLayer):
    def __init__(self) -> None:
        super().__init__(DIM, 4, batch_first=True)


class Ambiguous(Denoiser):
    def forward(self, first: Tensor, t: Tensor, second: Tensor) -> Any:
        return super().forward(second, t, first)


@pytest.mark.parametrize(
    ("build", "predict", "message"),
    [
        (Joint, None, r"has joint attention, .*keep=\"cond\", anchor_weight=1.0"),
        (MixesRows, None, "make no row depend on another"),
        (Scalar, lambda model, x, t, text: model(x, t, text)[0], "Value 1 of the result of forward"),
        (
            Ambiguous,
            lambda model, x, t, text: model(torch.cat([x, x], 1)[:, :TEXT], t, x),
            "'first' was chosen, but the prediction has the shape of 'second'",
        ),
        (lambda: Denoiser(Layer).train(), None, r"Call its eval\(\)"),
    ],
)
def test_refused_for_the_true_reason(build: Any, predict: Any, message: str) -> None:
    torch.manual_seed(0)
    model = build()
    was_training = isinstance(model.cross[0], Layer)
    pipe = OwnPipeline(model if was_training else model.eval(), DDIMScheduler(), predict)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(UnsupportedModelError, match=message):
        pipe(texts())


def test_joint_attention_with_the_text_of_the_prompt() -> None:
    torch.manual_seed(0)
    model = Joint().eval()
    pipe = OwnPipeline(model, DDIMScheduler())
    plain = pipe(texts())
    tgate_compile.optimize(pipe, GATE, keep="cond", anchor_weight=1.0, backend="eager")
    gated = pipe(texts())
    assert not torch.equal(gated, plain)
    assert tgate_compile.describe(pipe).strip == "F" * GATE + "p" * (STEPS - GATE)
    assert all(name.endswith((".key", ".value")) for name in tgate_compile.describe(pipe).sites)


def test_halves_in_two_calls_are_noticed_under_any_name_for_the_timestep() -> None:
    class TwoCalls(OwnPipeline):
        @torch.no_grad()
        def __call__(self, text: Tensor, guidance_scale: float = 4.0) -> Tensor:
            self.scheduler.set_timesteps(STEPS)
            x = torch.zeros(2, TOKENS, DIM)
            for t in self.scheduler.timesteps:
                uncond, cond = self.transformer(x, t, 0 * text), self.transformer(x, t, text)
                x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
            return x

    torch.manual_seed(0)
    pipe = tgate_compile.optimize(TwoCalls(Denoiser().eval(), DDIMScheduler()), GATE, backend="eager")
    with pytest.raises(UnsupportedModelError, match="called twice for one timestep"):
        pipe(texts())
