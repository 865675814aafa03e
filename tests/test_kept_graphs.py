"""Graphs are kept: returning to an earlier size, adapter or prompt length compiles nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.denoiser_reference import OneCall, played
from tests.hook_reference import hook_reference
from tests.own_loops import Looping
from tests.tiny_pipelines import (
    TEXT_DIM,
    VELOCITY,
    add_lora,
    image_embeds,
    load_ip_adapter,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)
from tgate_compile.engine.weights import fingerprint

GATE = 2
STEPS = 3
#: Compiled kernels, and those of ONNX Runtime and OpenVINO, add in a different order, and the steps amplify that.
TOLERANCES = {"eager": 0.0, "onnxruntime": 1e-4, "openvino": 1e-4, "inductor": 1e-4}


def least() -> Any:
    return stable_diffusion(layout="least")


def optimized(pipe: Any, **options: Any) -> Any:
    return tgate_compile.optimize(pipe, **{"gate_step": GATE, "backend": "eager", **options})


def store_of(pipe: Any) -> Any:
    return pipe._tgate_compile.hook.store


def latents(pipe: Any, **call: Any) -> torch.Tensor:
    result: torch.Tensor = run(pipe, steps=STEPS, **call)
    return result


def by_hooks(pipe: Any, **call: Any) -> torch.Tensor:
    with hook_reference(pipe, GATE):
        return latents(pipe, **call)


def check_both(pipe: Any, plain: Any, tolerance: float = 0.0, **call: Any) -> None:
    """Check `pipe` against the hooks and, without a gate, against the plain pipeline."""
    gated, ungated = latents(pipe, **call), latents(pipe, gate_step=1000, **call)
    assert difference(ungated, latents(plain, **call)) <= tolerance
    assert difference(gated, by_hooks(plain, **call)) <= max(tolerance, 1e-5)
    assert_differ(gated, ungated)


def both(change: Callable[[Any], None], *pipes: Any) -> None:
    for pipe in pipes:
        change(pipe)


# States of the denoiser.


def lora(name: str, scale: float = 1.0) -> Callable[[Any], None]:
    return lambda pipe: pipe.unet.set_adapters([name], [scale])


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def with_loras(pipe: Any) -> Any:
    add_lora(pipe.unet, "a", 1)
    add_lora(pipe.unet, "b", 2)
    return pipe


def with_ip_adapter(pipe: Any) -> Any:
    load_ip_adapter(pipe)
    return pipe


def load(seed: int) -> Callable[[Any], None]:
    return lambda pipe: add_lora(pipe.unet, "a", seed)


def unload(pipe: Any) -> None:
    pipe.unload_lora_weights()


STATES: dict[str, tuple[Callable[[Any], Any], list[Callable[[Any], Any]], list[int], dict[str, Any]]] = {
    "LoRAs": (with_loras, [lora("a"), lora("b")] * 2, [2, 4, 4, 4], {}),
    "LoRA scales": (with_loras, [lora("a", scale) for scale in (0.3, 0.7, 0.3)], [2, 4, 4], {}),
    # A LoRA loaded again has the same structure, so the graphs take its weights.
    "LoRAs loaded in turn": (lambda pipe: pipe, [load(1), unload, load(2), unload], [2, 4, 4, 4], {}),
    "IP-Adapter scales": (
        with_ip_adapter,
        [lambda pipe, scale=scale: pipe.set_ip_adapter_scale(scale) for scale in (0.3, 0.7, 0.3)],
        [2, 4, 4],
        {"ip_adapter_image_embeds": True},
    ),
    "FreeU": (lambda pipe: pipe, [freeu, lambda pipe: pipe.disable_freeu()] * 2, [2, 4, 4, 4], {}),
}


#: Scales of adapters, and FreeU, change what a LoRA changes: attributes of modules.
QUICK = ("LoRAs", "LoRAs loaded in turn")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in STATES]
)
def test_states_of_the_denoiser_in_turn(name: str) -> None:
    prepare, changes, expected, call = STATES[name]
    pipe, plain = optimized(prepare(least())), prepare(least())
    if call:
        call = {"ip_adapter_image_embeds": image_embeds(pipe)}
    counts, images = [], []
    for change in changes:
        both(change, pipe, plain)
        images.append(latents(pipe, **call))
        assert_same(images[-1], by_hooks(plain, **call))
        counts.append(store_of(pipe).compilations)
    assert counts == expected
    assert_differ(images[0], images[1])


def test_freeu_that_is_off_again_is_no_other_state() -> None:
    unet = least().unet
    before = fingerprint(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert fingerprint(unet) != before
    unet.disable_freeu()
    assert fingerprint(unet) == before


@pytest.mark.heavy
def test_a_function_that_takes_the_place_of_another_is_another_state() -> None:
    """Even at the address of the first one."""
    unet = least().unet
    seen = set()
    for scale in range(20):
        unet.conv_act.forward = lambda value, scale=scale: value * scale
        unet.conv_act.note = lambda value, scale=scale: value * scale
        seen.add(fingerprint(unet))
        del unet.conv_act.forward, unet.conv_act.note
        gc.collect()
    assert len(seen) == 20


@pytest.mark.heavy
def test_nine_sizes_in_turn() -> None:
    pipe = optimized(least())
    counts = []
    for _ in range(2):
        for width in range(1, 10):
            latents(pipe, height=16, width=8 * width)
        counts.append(store_of(pipe).compilations)
    assert counts == [18, 18]


# Prompts of other lengths.


def prompt(tokens: int, dim: int = TEXT_DIM, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, tokens, dim, generator=generator) for name in names} | more


def sdxl_prompt(tokens: int) -> dict[str, Any]:
    pooled = {name: torch.full((1, TEXT_DIM), 0.1 * i) for i, name in enumerate(("", "negative_"))}
    return prompt(tokens, 2 * TEXT_DIM, **{f"{name}pooled_prompt_embeds": each for name, each in pooled.items()})


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    "unet": (least, prompt),
    "pixart": (pixart, lambda tokens: pixart_prompt(tokens=tokens)),
    "sdxl": (sdxl, sdxl_prompt),
}


@contextmanager
def plain_compilations(module: Any) -> Iterator[list[int]]:
    """Count the graphs that plain torch.compile makes of `module`."""
    made = [0]

    def compile(graph: Any, inputs: Any) -> Any:
        made[0] += 1
        return graph.forward

    torch._dynamo.reset()
    module.compile(backend=compile)
    try:
        yield made
    finally:
        module._compiled_call_impl = None
        torch._dynamo.reset()


@pytest.mark.parametrize("name", ["unet", "pixart", pytest.param("sdxl", marks=pytest.mark.heavy)])
def test_lengths_of_the_text(name: str) -> None:
    """There is one full graph for the first length and one for all others; the only pruned graph has no text."""
    build, call = MODELS[name]
    pipe, plain = optimized(build()), build()
    counts = []
    for tokens in (16, 32, 48, 77, 16, 40):
        check_both(pipe, plain, **call(tokens))
        counts.append(store_of(pipe).compilations)
    assert counts == [2, 3, 3, 3, 3, 3]
    assert [variant.phase.name for variant, _ in store_of(pipe).variants].count("pruned") == 1


@pytest.mark.heavy
def test_lengths_of_the_text_in_plain_torch_compile() -> None:
    pipe = least()
    with plain_compilations(pipe.unet) as made:
        for tokens in (16, 32, 48, 77, 16, 40):
            latents(pipe, **prompt(tokens))
    gated = optimized(least(), gate_step=1000)
    for tokens in (16, 32, 48, 77, 16, 40):
        latents(gated, **prompt(tokens))
    assert store_of(gated).compilations <= made[0]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "backend", ["onnxruntime", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("openvino", "inductor"))]
)
def test_lengths_of_the_text_in_other_backends(backend: str) -> None:
    pytest.importorskip({"inductor": "torch"}.get(backend, backend))
    pipe, plain = optimized(least(), backend=backend), least()
    for tokens in (16, 32, 48, 77, 16, 40):
        check_both(pipe, plain, TOLERANCES[backend], **prompt(tokens))
    assert store_of(pipe).compilations == 3


def test_lengths_and_sizes() -> None:
    """A length that is free for one size is not assumed to be free for another one."""
    pipe, plain = optimized(least()), least()
    for tokens, width in ((16, 16), (32, 16), (32, 24), (48, 24), (77, 24), (48, 16)):
        check_both(pipe, plain, **prompt(tokens, width=width, height=16))


@pytest.mark.heavy
def test_other_products_of_a_graph_with_a_free_length(tmp_path: Any) -> None:
    pipe = optimized(least())
    for tokens in (16, 32, 48):
        latents(pipe, **prompt(tokens))
    described = tgate_compile.describe(pipe)
    macs = {(v.name, v.macs, v.macs_total) for v in described.variants}
    assert all(type(number) is int for variant in macs for number in variant[1:])
    assert "G" in str(described)
    fixed = optimized(least())
    latents(fixed, **prompt(32))
    # The numbers are those of the captured call.
    assert macs >= {(v.name, v.macs, v.macs_total) for v in tgate_compile.describe(fixed).variants if v.name == "full"}

    made = store_of(pipe).compilations
    asked = tgate_compile.describe(pipe, **prompt(40), height=16, width=16, num_inference_steps=STEPS)
    assert asked.strip == "FFp"
    assert asked.cache_bytes == tgate_compile.describe(fixed).cache_bytes
    assert store_of(pipe).compilations == made

    pytest.importorskip("onnxruntime")
    call = {**prompt(48), "height": 16, "width": 16, "num_inference_steps": STEPS}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=call, dynamic=False)
    served = tgate_compile.load(least(), folder)
    assert difference(latents(served, **prompt(48)), by_hooks(least(), **prompt(48))) <= 1e-4


# Denoisers whose code depends on the text's length.


class Cut(torch.nn.Module):
    """Reads only the first tokens of the text."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @property
    def config(self) -> Any:
        return self.unet.config

    def text(self, text: torch.Tensor) -> torch.Tensor:
        return text[:, :20] if text.shape[1] > 20 else text

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, return_dict: bool = True
    ) -> Any:
        return self.unet(
            sample, timestep, encoder_hidden_states=self.text(encoder_hidden_states), return_dict=return_dict
        )


class Scaled(Cut):
    """Also changes the latents from a certain length on."""

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, return_dict: bool = True
    ) -> Any:
        if encoder_hidden_states.shape[1] > 20:
            sample = sample * 1.5
        return super().forward(sample, timestep, encoder_hidden_states, return_dict)


class Table(Cut):
    """Changes the latents by a table with an entry for each length."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__(unet)
        self.register_buffer("table", torch.linspace(0.5, 2.0, 80))

    def text(self, text: torch.Tensor) -> torch.Tensor:
        return text

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, return_dict: bool = True
    ) -> Any:
        row = self.table[encoder_hidden_states.shape[1]]
        return super().forward(sample * row, timestep, encoder_hidden_states, return_dict)


class Specialized(Cut):
    """The length becomes a constant in the graph."""

    def text(self, text: torch.Tensor) -> torch.Tensor:
        return text * float(range(100)[text.shape[1]])


class Lengths(Looping):
    """Calls its denoiser with a text of a given length."""

    @torch.no_grad()
    def __call__(self, tokens: int) -> torch.Tensor:  # type: ignore[override]
        texts = torch.randn(2, tokens, TEXT_DIM, generator=torch.Generator().manual_seed(tokens))
        current = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(4)
        for timestep in self.scheduler.timesteps:
            uncond, cond = self.denoised(torch.cat([current] * 2), timestep, texts).chunk(2)
            current = self.scheduler.step(uncond + 5 * (cond - uncond), timestep, current).prev_sample
        return current


LENGTHS = (16, 18, 20, 21, 32, 12, 77, 16, 32)


@pytest.mark.heavy
@pytest.mark.parametrize("denoiser", [Cut, Scaled, Table, Specialized])
def test_a_denoiser_that_depends_on_the_length(denoiser: type[Cut]) -> None:
    def pipeline() -> Any:
        return Lengths(denoiser(least().unet), DDIMScheduler(**VELOCITY))

    pipe, ungated, plain = optimized(pipeline()), optimized(pipeline(), gate_step=1000), pipeline()
    for tokens in LENGTHS:
        reference = OneCall(plain.unet, GATE, halved=("sample", "encoder_hidden_states"))
        sites = [name for name, _ in plain.unet.named_modules() if name.endswith("attn2")]
        with played(reference, plain.unet, sites):
            expected = plain(tokens)
        assert_same(pipe(tokens), expected)
        assert torch.equal(ungated(tokens), plain(tokens))
    made = store_of(pipe).compilations
    for tokens in LENGTHS:
        pipe(tokens)
    assert store_of(pipe).compilations == made
    # At most two kinds of full step for each length. The pruned graph never needs the text, unless
    # the latents depend on its length.
    pruned = [variant for variant, _ in store_of(pipe).variants if variant.phase.name == "pruned"]
    assert len(pruned) == 1 or denoiser in (Scaled, Table)
    assert made <= 2 * len(set(LENGTHS)) + len(pruned)


# Memory.


def test_dropped_graphs_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = optimized(least(), graph_memory=1)
    expected = [latents(least(), width=width, height=16) for width in (8, 16, 24)]
    with caplog.at_level("WARNING", "tgate_compile"):
        for _ in range(2):
            for width, image in zip((8, 16, 24), expected, strict=True):
                assert torch.equal(
                    latents(pipe, width=width, height=16, gate_step=2.0 / 3), latents(pipe, width=width, height=16)
                )
                assert torch.equal(latents(pipe, width=width, height=16, gate_step=1000), image)
    dropped = [r.getMessage() for r in caplog.records if "graph_memory" in r.getMessage()]
    assert len(dropped) == 1
    # Only one state and its captures are left.
    assert len(store_of(pipe)._captures) <= 2


def test_a_call_that_looks_at_the_denoiser_keeps_its_graphs() -> None:
    """With a callback the denoiser is inspected at each step, which does not count as a new call."""

    def nothing(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors

    pipe = optimized(least(), graph_memory=1)
    for _ in range(2):
        latents(pipe, callback_on_step_end=nothing)
        assert store_of(pipe).compilations == 2


def test_states_that_have_no_graphs_left_are_forgotten() -> None:
    pipe = optimized(with_loras(least()), graph_memory=1)
    for step in range(3):
        lora("a", 0.1 * (step + 1))(pipe)
        latents(pipe)
    store = store_of(pipe)
    assert len(store._models) <= 2
    assert len(store._backends) <= 2
    lora("a", 0.1)(pipe)
    plain = with_loras(least())
    lora("a", 0.1)(plain)
    assert_same(latents(pipe), by_hooks(plain))


def replace_weights(pipe: Any) -> None:
    pipe.unet.load_state_dict({name: value.clone() for name, value in pipe.unet.state_dict().items()}, assign=True)


def unload_and_load(pipe: Any) -> None:
    pipe.unload_lora_weights()
    latents(pipe)
    add_lora(pipe.unet, "a", 2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("onnxruntime", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("change", [pytest.param(replace_weights, marks=pytest.mark.heavy), unload_and_load])
def test_no_old_tensor_stays(change: Callable[[Any], None], backend: str) -> None:
    pytest.importorskip({"eager": "torch"}.get(backend, backend))
    pipe, plain = optimized(least(), backend=backend), least()
    for each in (pipe, plain):
        add_lora(each.unet, "a", 1)
    latents(pipe)
    latents(pipe, **prompt(32))  # with a free length
    old = {name: weakref.ref(tensor) for name, tensor in pipe.unet.named_parameters() if "lora" in name}
    both(change, pipe, plain)
    made = store_of(pipe).compilations
    assert difference(latents(pipe), by_hooks(plain)) <= max(TOLERANCES[backend], 1e-5)
    gc.collect()
    assert old
    assert [name for name, tensor in old.items() if tensor() is not None] == []
    assert store_of(pipe).compilations == made
