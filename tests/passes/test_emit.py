"""Emission appends the sites' values to the outputs, merged over the guidance halves if requested."""

from __future__ import annotations

import pytest
import torch

from tests.passes.tiny_denoiser import tiny_capture, tiny_denoiser, tiny_inputs
from tgate_compile.passes.graphs import Captured, Emission, copy_graph
from tgate_compile.passes.specialize import emit


def _run(graph_module: torch.fx.GraphModule, captured: Captured, denoiser: torch.nn.Module, batch: int = 4) -> list:
    state = denoiser.state_dict()
    specs = captured.program.graph_signature.input_specs
    weights = [state[spec.target] for spec in specs if spec.target is not None]
    return list(graph_module(*weights, *tiny_inputs(batch), False))


def _attn2_outputs(denoiser: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    hooks = [b.attn2.register_forward_hook(lambda m, i, o: seen.append(o)) for b in denoiser.blocks]
    (out,) = denoiser(*tiny_inputs())
    for hook in hooks:
        hook.remove()
    return out, seen


@torch.no_grad()
def test_values_are_appended_in_the_order_of_the_sites() -> None:
    denoiser = tiny_denoiser()
    captured = tiny_capture(denoiser)
    graph_module = copy_graph(captured.program.graph_module)
    assert emit(graph_module, [Emission(site) for site in captured.sites]).changes == 2
    graph_module.recompile()
    plain, values = _attn2_outputs(denoiser)
    prediction, *emitted = _run(graph_module, captured, denoiser)
    assert torch.equal(prediction, plain)
    assert all(torch.equal(a, b) for a, b in zip(emitted, values, strict=True))


@pytest.mark.parametrize("anchor", [0.5, 0.0, 1.0, 3.0])
@torch.no_grad()
def test_merging_weighs_the_halves(anchor: float) -> None:
    denoiser = tiny_denoiser()
    captured = tiny_capture(denoiser)
    graph_module = copy_graph(captured.program.graph_module)
    emit(graph_module, [Emission(site, anchor) for site in captured.sites])
    graph_module.recompile()
    _, values = _attn2_outputs(denoiser)
    _, *emitted = _run(graph_module, captured, denoiser)
    for merged, value in zip(emitted, values, strict=True):
        uncond, cond = value.chunk(2)
        torch.testing.assert_close(merged, (1 - anchor) * uncond + anchor * cond, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_merging_is_accumulated_in_fp32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    denoiser = tiny_denoiser().to(dtype)
    captured = _capture_in(denoiser, dtype)
    graph_module = copy_graph(captured.program.graph_module)
    emit(graph_module, [Emission(site, 0.5) for site in captured.sites])
    means = [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.mean.dim]
    assert [node.meta["val"].dtype for node in means] == [torch.float32] * 2
    outputs = graph_module.graph.output_node().args[0][1:]
    assert [node.meta["val"].dtype for node in outputs] == [dtype] * 2


def _capture_in(denoiser: torch.nn.Module, dtype: torch.dtype) -> Captured:
    from tgate_compile.engine.call import Call
    from tgate_compile.engine.capture import capture

    class Cast(type(denoiser)):  # type: ignore[misc]
        def forward(self, sample, timestep, text, return_dict=True):  # type: ignore[no-untyped-def]
            hidden = sample
            for block in self.blocks:
                hidden = block(hidden, text)
            return (hidden,)

    denoiser.__class__ = Cast
    sample, timestep, text = tiny_inputs()
    return capture(denoiser, denoiser.forward, Call.of((sample.to(dtype), timestep), {"text": text.to(dtype)}))


def test_no_sites_means_no_change() -> None:
    captured = tiny_capture(tiny_denoiser())
    graph_module = copy_graph(captured.program.graph_module)
    before = graph_module.code
    assert emit(graph_module, []).changes == 0
    graph_module.recompile()
    assert graph_module.code == before
