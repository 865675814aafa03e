"""Sites are found by data flow: queries from the latents, keys and values not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.tiny_denoiser import DIM, TEXT_TOKENS, TOKENS, TinyAttention, tiny_capture, tiny_denoiser, tiny_inputs
from tgate_compile import UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.methods.method import Phase
from tgate_compile.passes.find_sites import Inputs, find_attention
from tgate_compile.passes.specialize import specialize


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
def test_self_attention_is_a_site_of_kind_self(fused: bool) -> None:
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
        return self.attn(sample, sample) + text.mean((1, 2), keepdim=True)


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


def test_a_model_with_self_attention_alone_is_refused() -> None:
    denoiser = _SelfOnly().eval()
    with pytest.raises(UnsupportedModelError, match="_SelfOnly has no cross-attention"):
        capture(denoiser, denoiser.forward, Call.of(tiny_inputs(), {}))


def test_the_sites_of_joint_attention_are_the_texts_keys_and_values() -> None:
    denoiser = _Joint().eval()
    captured = capture(denoiser, denoiser.forward, Call.of(tiny_inputs(), {}))
    assert [site.name for site in captured.sites] == ["attn.key", "attn.value"]
    assert all(site.of_text for site in captured.sites)


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
        return sample + out + mixed.tanh()


def test_of_an_attention_with_two_results_the_value_before_both_is_cached() -> None:
    program = torch.export.export(_TwoOutputs().eval(), tiny_inputs(), strict=False)
    (site,) = find_attention(program.graph_module, _inputs(program))
    nodes = {node.name: node for node in program.graph.nodes}
    assert nodes[site.node].target is torch.ops.aten.scaled_dot_product_attention.default


def test_the_graph_takes_precedence_over_attributes_of_an_attention() -> None:
    denoiser = tiny_denoiser()
    denoiser.blocks[1].attn1.is_cross_attention = True  # although its keys depend on the latents
    del denoiser.blocks[0].attn2.is_cross_attention
    denoiser.blocks[1].attn2.is_cross_attention = False
    assert [site.name for site in tiny_capture(denoiser).sites] == ["blocks.0.attn2", "blocks.1.attn2"]


def test_each_call_of_a_shared_module_is_a_separate_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = TinyAttention(6)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            sample = self.attn(self.attn(sample, text), text)
            return self.attn(sample, text) + sample

    program = torch.export.export(Twice().eval(), tiny_inputs(), strict=False)
    sites = find_attention(program.graph_module, _inputs(program))
    assert [site.name for site in sites] == ["attn", "attn#2", "attn#3"]
    assert len({site.node for site in sites}) == 3


class _Unrecognized(TinyAttention):
    """Compute the scores as sums of products, without a matrix product."""

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_q(hidden), self.to_k(context), self.to_v(context)
        weights = (query[:, :, None] * key[:, None]).sum(-1).softmax(-1)  # [batch, tokens, text tokens]
        return self.to_out((weights[..., None] * value[:, None]).sum(2))


def test_an_attention_that_calls_itself_cross_but_is_not_recognized_is_named() -> None:
    denoiser = tiny_denoiser()
    denoiser.blocks[1].attn2 = _Unrecognized(6, cross=True).eval()
    with pytest.raises(UnsupportedModelError, match=r"no attention was recognized: blocks\.1\.attn2"):
        tiny_capture(denoiser)


def test_the_refusal_lists_the_attentions_found() -> None:
    denoiser = tiny_denoiser()
    for block in denoiser.blocks:
        block.attn2 = _Unrecognized(6).eval()
        del block.attn2.is_cross_attention
    with pytest.raises(UnsupportedModelError, match=r"2 attentions, of which 2 take keys .* were assumed to be 'samp"):
        tiny_capture(denoiser)


class _Core(nn.Module):
    """Applies `core`, attention or similar, to a query, key and value made from latents, text, or weights."""

    def __init__(self, core: Callable[..., torch.Tensor], sources: str) -> None:
        super().__init__()
        self.core, self.sources = core, sources
        self.project = nn.Linear(6, DIM)
        self.weights = nn.Parameter(torch.randn(1, TEXT_TOKENS, DIM))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        time = timestep * torch.ones(1, TEXT_TOKENS, DIM)
        given = {"x": sample, "c": self.project(text), "w": self.weights, "t": time}
        out = self.core(*(given[source] for source in self.sources))
        return sample + (out if out.shape[1] == TOKENS else out.mean(1, keepdim=True))


def _softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.mT).softmax(-1) @ value


def _einsum(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bji,bjd->bid", torch.einsum("bjd,bid->bji", key, query).softmax(1), value)


def _linear(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query @ (key.mT @ value)


def _relative(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    table = torch.ones(DIM, key.shape[1])
    return (query @ key.mT + query @ table).softmax(-1) @ value


def _no_softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.mT).relu() @ value  # layers with weights computed from the text


def _two_layers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query @ key.mT @ value


FORMS = (F.scaled_dot_product_attention, _softmax, _einsum, _relative)


@pytest.mark.parametrize("core", [*FORMS, _linear])
@pytest.mark.parametrize(("sources", "kind"), [("xcc", "cross"), ("xxx", "self")])
def test_forms(core: Callable[..., torch.Tensor], sources: str, kind: str) -> None:
    program = torch.export.export(_Core(core, sources).eval(), tiny_inputs(), strict=False)
    assert [site.kind for site in find_attention(program.graph_module, _inputs(program))] == [kind]


@pytest.mark.parametrize(
    ("core", "sources"),
    [
        *((core, sources) for core in FORMS for sources in ("cxx", "wxx", "xww", "xtt", "ccc")),
        (_linear, "xcw"),  # a bilinear form in the text
        (_no_softmax, "xcc"),
        (_two_layers, "xcc"),
    ],
)
def test_near_misses(core: Callable[..., torch.Tensor], sources: str) -> None:
    program = torch.export.export(_Core(core, sources).eval(), tiny_inputs(), strict=False)
    assert find_attention(program.graph_module, _inputs(program)) == []


@torch.no_grad()
def test_a_batch_that_is_not_first_is_first_in_the_cache() -> None:
    """The token dimension comes first and is as large as the batch, so that shapes cannot tell them apart."""

    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(DIM, 2, kdim=6, vdim=6)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            context = text.transpose(0, 1)
            out, _ = self.attn(sample.transpose(0, 1), context, context, need_weights=False)
            return sample + out.transpose(0, 1)

    torch.manual_seed(0)
    denoiser = TokensFirst().eval()
    sample, timestep, text = tiny_inputs()
    sample = sample[:, :4].contiguous()
    inputs = (sample, timestep, text)  # 4 rows of 4 tokens
    captured = capture(denoiser, denoiser.forward, Call.of(inputs, {}))
    (site,) = captured.sites
    assert (site.name, site.batch) == ("attn", 1)
    full = specialize(captured, Phase(True, merge=frozenset({"cross"})))
    reusing = specialize(captured, Phase(False, reuse=frozenset({"cross"})))
    state = denoiser.state_dict()
    prediction, cache = full.program.graph_module(*(state[name] for name in full.weights), sample, text)
    torch.testing.assert_close(prediction, denoiser(*inputs))
    value = prediction - inputs[0]  # [rows, tokens, dim]
    torch.testing.assert_close(cache, sum(value.chunk(2)) / 2)
    (result,) = reusing.program.graph_module(inputs[0], value)
    assert torch.equal(result, inputs[0] + value)
