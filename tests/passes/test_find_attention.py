"""Sites are found by data flow: queries from the latents, keys and values not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.passes.tiny_denoiser import DIM, TOKENS, TinyAttention, tiny_capture, tiny_denoiser, tiny_inputs
from tgate_compile import UnsupportedModelError
from tgate_compile._call import Call
from tgate_compile._capture import capture
from tgate_compile.passes.find_attention import Inputs, find_attention


def _inputs(program: torch.export.ExportedProgram) -> Inputs:
    nodes = {node.name: node for node in program.graph.nodes}
    return Inputs((nodes["sample"],), (nodes["timestep"],), (nodes["text"],))


@pytest.mark.parametrize("fused", [True, False])
def test_each_cross_attention_is_one_site(fused: bool) -> None:
    captured = tiny_capture(tiny_denoiser(fused=fused))
    assert [site.name for site in captured.sites] == ["blocks.0.attn2", "blocks.1.attn2"]
    assert {site.kind for site in captured.sites} == {"cross"}
    assert all(site.shape == (4, TOKENS, DIM) and site.dtype == torch.float32 for site in captured.sites)


@pytest.mark.parametrize("fused", [True, False])
def test_self_attention_is_a_site_of_its_own_kind(fused: bool) -> None:
    captured = tiny_capture(tiny_denoiser(fused=fused), kinds=("cross", "self"))
    assert [(site.kind, site.name) for site in captured.sites] == [
        ("cross", "blocks.0.attn2"),
        ("cross", "blocks.1.attn2"),
        ("self", "blocks.0.attn1"),
        ("self", "blocks.1.attn1"),
    ]


def test_the_value_is_the_one_after_projection_and_dropout() -> None:
    captured = tiny_capture(tiny_denoiser())
    nodes = {node.name: node for node in captured.program.graph.nodes}
    assert [nodes[site.node].target for site in captured.sites] == [torch.ops.aten.dropout.default] * 2


def test_the_value_is_the_one_before_residual_and_rescale() -> None:
    captured = tiny_capture(tiny_denoiser(residual=True))
    nodes = {node.name: node for node in captured.program.graph.nodes}
    assert [nodes[site.node].target for site in captured.sites] == [torch.ops.aten.dropout.default] * 2


def test_the_graph_is_left_alone() -> None:
    captured = tiny_capture(tiny_denoiser())
    before = captured.program.graph_module.code
    find_attention(captured.program.graph_module, _inputs(captured.program))
    captured.program.graph_module.recompile()
    assert captured.program.graph_module.code == before


class _SelfOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = TinyAttention(DIM)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.attn(sample, sample) + text.mean()


class _Joint(nn.Module):
    """Keys of text and image in one sequence, as in SD3 and Flux."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, DIM)
        self.attn = TinyAttention(DIM)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.attn(sample, torch.cat([sample, self.project(text)], dim=1))


@pytest.mark.parametrize("model", [_SelfOnly, _Joint])
def test_self_and_joint_attention_are_no_cross_attention(model: type[nn.Module]) -> None:
    denoiser = model().eval()
    program = torch.export.export(denoiser, tiny_inputs(), strict=False)
    assert find_attention(program.graph_module, _inputs(program), ("cross",)) == []
    with pytest.raises(UnsupportedModelError, match=rf"{model.__name__} has no cross-attention .*Joint attention"):
        capture(denoiser, denoiser.forward, Call.of(tiny_inputs(), {}))


class _TwoOutputs(nn.Module):
    class Attention(TinyAttention):
        def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            query = self.to_q(hidden)
            key = self.to_k(context)
            mixed = nn.functional.scaled_dot_product_attention(query, key, self.to_v(context))
            return self.to_out(mixed), mixed

    def __init__(self) -> None:
        super().__init__()
        self.attn = self.Attention(6)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out, mixed = self.attn(sample, text)
        return out + mixed.mean()


def test_an_attention_with_two_results_is_refused_by_name() -> None:
    program = torch.export.export(_TwoOutputs().eval(), tiny_inputs(), strict=False)
    with pytest.raises(UnsupportedModelError, match="'attn': 2 of its values"):
        find_attention(program.graph_module, _inputs(program))


def test_a_site_that_is_not_found_is_an_error_that_names_it() -> None:
    denoiser = tiny_denoiser()
    denoiser.blocks[1].attn1.is_cross_attention = True  # claims to be one; its keys depend on the latents
    with pytest.raises(UnsupportedModelError, match=r"has 3\. Not found: blocks\.1\.attn1"):
        tiny_capture(denoiser)
