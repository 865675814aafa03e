"""Both graphs share the denoiser's parameters, without copies or omissions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import tgate_compile
from tests.tiny_pipelines import (
    PROMPTS,
    add_lora,
    latent_consistency,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return address and size of each distinct storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def with_lora() -> Any:
    pipe = stable_diffusion(layout="small")
    add_lora(pipe.unet)
    return pipe


def denoiser_of(pipe: Any) -> torch.nn.Module:
    return pipe.transformer if "transformer" in pipe.components else pipe.unet


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd1": (stable_diffusion, {}),
    "sd2": (lambda: stable_diffusion(layout="sd2"), {}),
    "sdxl": (sdxl, {}),
    "pixart": (pixart, pixart_prompt()),
    "lcm": (latent_consistency, {"steps": 4}),
    "lora": (with_lora, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_graphs_share_the_parameters(name: str) -> None:
    build, call = CASES[name]
    pipe = build()
    denoiser = denoiser_of(pipe)
    before = storages(denoiser.parameters())
    tgate_compile.optimize(pipe, 2, backend="eager")
    run(pipe, **call)
    full, pruned = pipe._tgate_compile.hook.store.compiled
    parameters = dict(denoiser.named_parameters())

    # The same objects, in the exported program and in the weights that are run.
    for compiled in (full, pruned):
        assert compiled.variant.program.state_dict
        for path, tensor in compiled.variant.program.state_dict.items():
            assert tensor is denoiser.get_parameter(path)
        for path, tensor in zip(compiled.variant.weights, compiled.weights, strict=True):
            if path in parameters:
                assert tensor is parameters[path]

    # All of the model's memory and no more, except for the graph's constants, which are a few numbers.
    together = storages([*full.weights, *pruned.weights])
    constants = [t for c in (full, pruned) for t in c.variant.program.constants.values() if torch.is_tensor(t)]
    extra = {address: size for address, size in together.items() if address not in before}
    assert set(extra) <= set(storages([*constants, *denoiser.buffers()]))
    assert sum(storages(constants).values()) <= 4096
    of_parameters = {address: size for address, size in together.items() if address in before}
    assert of_parameters == before == storages(denoiser.parameters())
    assert sum(of_parameters.values()) == sum(p.numel() * p.element_size() for p in denoiser.parameters())

    # The full graph has all of the pruned graph's storages.
    assert set(storages(pruned.weights)) - set(storages(constants)) < set(storages(full.weights))


def test_the_graphs_hold_no_tensors_of_their_own() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager")
    run(pipe)
    for compiled in pipe._tgate_compile.hook.store.compiled:
        graph_module = compiled.variant.program.graph_module
        assert not list(graph_module.parameters())
        assert not list(graph_module.buffers())
        assert not [node for node in graph_module.graph.nodes if node.op == "get_attr"]


def test_other_shapes_share_them_too() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager")
    run(pipe)
    run(pipe, PROMPTS, height=32)
    compiled = pipe._tgate_compile.hook.store.compiled
    assert len(compiled) == 4
    known = storages(pipe.unet.parameters())
    assert all(tensor.untyped_storage().data_ptr() in known for c in compiled for tensor in c.weights)


def test_old_weights_are_let_go() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager")
    run(pipe)
    pipe.to(torch.float64)
    run(pipe)
    store = pipe._tgate_compile.hook.store
    assert_no_old_tensors(pipe)
    assert len(store.compiled) == 4
    # The same parameters with other values: both dtypes' graphs are still valid.
    pipe.to(torch.float32)
    run(pipe)
    assert store.compilations == 4
    # Other parameters: the current state's graphs take them, and the other state's release the old ones.
    other = stable_diffusion(layout="small")
    pipe.unet.load_state_dict(other.unet.state_dict(), assign=True)
    run(pipe)
    assert_no_old_tensors(pipe)
    pipe.to(torch.float64)
    run(pipe)
    assert store.compilations == 4
    assert_no_old_tensors(pipe)


def assert_no_old_tensors(pipe: Any) -> None:
    store = pipe._tgate_compile.hook.store
    known = storages([*pipe.unet.parameters(), *pipe.unet.buffers()])
    for compiled in store.compiled:
        for tensor in (*compiled.weights, *compiled.variant.program.state_dict.values()):
            assert tensor.is_meta or tensor.untyped_storage().data_ptr() in known


@pytest.mark.heavy
def test_captures_do_not_pile_up(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tgate_compile.optimize(pixart(), 1000, backend="eager")
    store = pipe._tgate_compile.hook.store

    def make(size: int) -> None:
        run(pipe, **{**pixart_prompt(), "height": 8 * size, "width": 8}, steps=2)

    make(1)
    one = sum(held.nbytes for held in store._captures.values())
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 1000, backend="eager", graph_memory=int(2.5 * one))
    store = pipe._tgate_compile.hook.store
    with caplog.at_level("WARNING", "tgate_compile"):
        for size in (1, 2, 3):
            make(size)
            assert len(store.compiled) == min(size, 2)
        # The oldest was dropped: the newest is still there, and the first is made again.
        make(3)
        assert store.compilations == 3
        make(1)
        assert store.compilations == 4
    messages = [record.getMessage() for record in caplog.records if "graph_memory" in record.getMessage()]
    assert len(messages) == 1


def test_graphs_of_a_generation_are_not_dropped_while_it_runs() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager", graph_memory=1)
    for _ in range(2):
        run(pipe)
        assert pipe._tgate_compile.hook.store.compilations == 2


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "2 GB"])
def test_graph_memory_is_checked(given: Any) -> None:
    with pytest.raises(tgate_compile.ConfigurationError, match="graph_memory"):
        tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager", graph_memory=given)
