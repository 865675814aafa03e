"""Joint attention with separated tokens, in graphs of real denoisers: see `joint_denoisers.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils import _pytree as pytree

from tests.comparing import assert_differ, assert_same
from tests.joint_denoisers import DENOISERS, Tiny
from tests.joint_reference import TextReference, frozen_text
from tests.tiny_denoisers import first_call
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.engine.compiled import inputs_for, tensors_of
from tgate_compile.engine.halves import is_time
from tgate_compile.engine.tracing import call_of
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import CROSS, Phase
from tgate_compile.passes.find_sites import depends_on
from tgate_compile.passes.graphs import Captured, Variant
from tgate_compile.passes.specialize import specialize

FULL = Phase(False, emit=CROSS)
PRUNED = Phase(False, reuse=CROSS)


def captured_of(tiny: Tiny, denoiser: torch.nn.Module, batch: int = 2, *, hidden: bool = False) -> Captured:
    arguments = {**tiny.call(batch, 0), "return_dict": False}
    denoiser(**arguments)  # Z-Image makes its rotary tables at the first call
    call = Call.of((), arguments)
    return capture(denoiser, denoiser.forward, call, hidden=hidden)


@torch.no_grad()
def run(denoiser: Any, variant: Variant, captured: Captured, kwargs: Any, caches: Any = None) -> list[torch.Tensor]:
    call = Call.of((), {**kwargs, "return_dict": False})
    weights = tensors_of(variant.program, live_tensors(denoiser))
    return list(variant.program.graph_module(*weights, *inputs_for(variant, captured, call, caches or {})))


#: One denoiser for each arrangement of streams. The others, which take longer to capture, are heavy.
QUICK = ("sd3", "flux", "flux2", "qwen_image")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in DENOISERS]
)
@torch.no_grad()
def test_frozen_text(name: str) -> None:
    tiny = DENOISERS[name]
    denoiser = tiny.build()
    captured = captured_of(tiny, denoiser)
    assert len(captured.sites) == 2 * tiny.joint
    full, pruned = (specialize(captured, phase) for phase in (FULL, PRUNED))
    count = captured.out_spec.num_leaves

    reference = TextReference(denoiser, 1, tiny.image + tiny.text, tiny.text_tokens, guided=False)
    with frozen_text(reference):
        first, second = (
            pytree.tree_leaves(reference.forward(**tiny.call(2, step), return_dict=False)) for step in (0, 1)
        )
    assert reference.calls == 2
    outputs = run(denoiser, full, captured, tiny.call(2, 0))
    for output, expected in zip(outputs[:count], first, strict=True):
        assert torch.equal(output, expected)
    caches = {(e.site.kind, e.site.name): value for e, value in zip(full.emitted, outputs[count:], strict=True)}
    assert not any(follow_the_timestep(pruned, captured))
    for output, expected in zip(run(denoiser, pruned, captured, tiny.call(2, 1), caches), second, strict=True):
        assert_same(output, expected)
    plain = pytree.tree_leaves(denoiser(**tiny.call(2, 1), return_dict=False))
    assert_differ(second[0], plain[0])
    # With the caches of the same step, the pruned graph computes what the full one does.
    for output, expected in zip(run(denoiser, pruned, captured, tiny.call(2, 0), caches), first, strict=True):
        assert_same(output, expected)


#: Denoisers whose blocks take the text's hidden states as an argument.
WITH_STATES = ("sd3", "flux")


@contextmanager
def frozen_states(denoiser: torch.nn.Module, states: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let each block have the text's hidden state in `states`, which is added there if it is missing."""

    def hook(path: str) -> Any:
        def replace(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "encoder_hidden_states": states.setdefault(path, kwargs["encoder_hidden_states"])}

        return replace

    stacks = ("transformer_blocks", "single_transformer_blocks")
    blocks = {f"{stack}.{i}": block for stack in stacks for i, block in enumerate(getattr(denoiser, stack, ()))}
    handles = [block.register_forward_pre_hook(hook(path), with_kwargs=True) for path, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def follow_the_timestep(variant: Variant, captured: Captured) -> list[bool]:
    """Return for each cache whether something is computed from it and the timestep, but not from the latents."""
    graph = variant.program.graph
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    times = [inputs[name] for name in variant.inputs if is_time(name)]
    assert times
    of_time, of_image = depends_on(graph, times), depends_on(graph, [inputs[captured.latents]])
    caches = list(inputs.values())[-len(variant.reused) :]
    return [bool((depends_on(graph, [cache]) & of_time) - of_image) for cache in caches]


@pytest.mark.parametrize(
    "name", [name if name in WITH_STATES else pytest.param(name, marks=pytest.mark.heavy) for name in DENOISERS]
)
@torch.no_grad()
def test_frozen_hidden_states(name: str) -> None:
    """The text's keys and values follow the timestep, but not the image."""
    tiny = DENOISERS[name]
    denoiser = tiny.build()
    captured = captured_of(tiny, denoiser, hidden=True)
    assert {site.name.rpartition(".")[2] for site in captured.sites} == {"hidden"}
    assert len(captured.sites) <= tiny.joint
    full, pruned = (specialize(captured, phase) for phase in (FULL, PRUNED))
    assert all(follow_the_timestep(pruned, captured))
    count = captured.out_spec.num_leaves
    outputs = run(denoiser, full, captured, tiny.call(2, 0))
    caches = {(e.site.kind, e.site.name): value for e, value in zip(full.emitted, outputs[count:], strict=True)}
    # With the caches of the same step, the pruned graph computes what the full one does.
    for output, expected in zip(run(denoiser, pruned, captured, tiny.call(2, 0), caches), outputs[:count], strict=True):
        assert_same(output, expected)
    later = run(denoiser, pruned, captured, tiny.call(2, 1), caches)
    plain = pytree.tree_leaves(denoiser(**tiny.call(2, 1), return_dict=False))
    assert_differ(later[0], plain[0])
    if name in WITH_STATES:
        states: dict[str, torch.Tensor] = {}
        with frozen_states(denoiser, states):
            denoiser(**tiny.call(2, 0))
            (expected,) = denoiser(**tiny.call(2, 1), return_dict=False)
        assert_same(later[0], expected)


@torch.no_grad()
def test_hidden_states_of_layers_with_adapters() -> None:
    """Keys that are sums of two linear layers are computed from one hidden state all the same."""
    tiny = DENOISERS["sd3"]
    denoiser: Any = tiny.build()
    targets = ["add_k_proj", "add_v_proj", "to_k"]
    denoiser.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    captured = captured_of(tiny, denoiser, hidden=True)
    assert {site.name.rpartition(".")[2] for site in captured.sites} == {"hidden"}
    assert len(captured.sites) == tiny.joint


#: Denoisers whose code reads the lengths of texts from masks, with the number of the image's tokens, which are first.
READING = {
    "MochiTransformer3DModel": 32,
    "HunyuanImageTransformer2DModel": 64,
    "HunyuanVideo15Transformer3DModel": 48,
}


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")
@pytest.mark.parametrize("name", READING)
@torch.no_grad()
def test_lengths_read_from_masks(name: str) -> None:
    """The graph is that of the mask's values, and the frozen text that of plain hooks."""
    denoiser, _, kwargs = first_call(name)
    kwargs["return_dict"] = False
    mask = kwargs["encoder_attention_mask"] = kwargs["encoder_attention_mask"].clone()
    mask[:, -2:] = 0
    later = {**kwargs, "hidden_states": kwargs["hidden_states"] * 0.7, "timestep": kwargs["timestep"] * 0.8}
    call = call_of(denoiser, (), kwargs, kwargs)
    other = {**kwargs, "encoder_attention_mask": torch.ones_like(mask)}
    assert call_of(denoiser, (), other, other).key != call.key
    captured = capture(denoiser, denoiser.forward, call)
    full, pruned = (specialize(captured, phase) for phase in (FULL, PRUNED))
    lengths: list[int] = []

    def attention(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        lengths.append(key.shape[-2])
        return own(query, key, *args, **options)

    own = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda query, key, *a, **o: attention(query, key, *a, **o)
    try:
        denoiser(**kwargs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = own
    tokens = max(lengths)
    reference = TextReference(denoiser, 1, tokens, slice(READING[name], tokens), guided=False)
    with frozen_text(reference):
        first, second = (reference.forward(**each)[0] for each in (kwargs, later))
    outputs = run(denoiser, full, captured, kwargs)
    assert_same(outputs[0], first)
    caches = {(e.site.kind, e.site.name): value for e, value in zip(full.emitted, outputs[1:], strict=True)}
    assert_same(run(denoiser, pruned, captured, later, caches)[0], second)
    assert_differ(second, denoiser(**later)[0])
