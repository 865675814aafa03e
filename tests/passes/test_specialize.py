"""The driver: variants that run, share their parameters, and pass the verifier."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.passes.tiny_denoiser import DIM, TOKENS, tiny_capture, tiny_denoiser, tiny_inputs
from tgate_compile import VerificationError
from tgate_compile.methods.method import Phase
from tgate_compile.passes.graphs import Variant
from tgate_compile.passes.specialize import specialize, verify

FULL = Phase(True, merge=frozenset({"cross"}))
FULL_UNGUIDED = Phase(False, emit=frozenset({"cross"}))
PRUNED = Phase(False, reuse=frozenset({"cross"}))


def _run(variant: Variant, denoiser: torch.nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    state = denoiser.state_dict()
    return list(variant.program.graph_module(*(state[name] for name in variant.weights), *inputs))


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_full_then_pruned_equals_the_model_with_hooked_attention(fused: bool) -> None:
    denoiser = tiny_denoiser(fused=fused)
    full = specialize(tiny_capture(denoiser, batch=4), FULL)
    pruned = specialize(tiny_capture(denoiser, batch=2), PRUNED)
    sample, timestep, text = tiny_inputs(batch=4)
    prediction, *caches = _run(full, denoiser, sample, timestep, text)
    assert torch.equal(prediction, denoiser(sample, timestep, text)[0])
    assert [cache.shape for cache in caches] == [(2, TOKENS, DIM)] * 2

    for block, cache in zip(denoiser.blocks, caches, strict=True):
        block.attn2.register_forward_hook(lambda module, inputs, output, cache=cache: cache)
    (expected,) = denoiser(sample[:2], timestep, text[:2])
    (result,) = _run(pruned, denoiser, sample[:2], timestep, *caches)
    assert torch.equal(result, expected)


def test_names_of_inputs_and_sites() -> None:
    denoiser = tiny_denoiser()
    full, pruned = (specialize(tiny_capture(denoiser), phase) for phase in (FULL, PRUNED))
    assert full.inputs == ("sample", "timestep", "text")
    assert pruned.inputs == ("sample", "timestep")
    assert [emission.site.name for emission in full.emitted] == [site.name for site in pruned.reused]
    assert not full.reused
    assert not pruned.emitted


def test_the_programs_are_valid_exported_programs() -> None:
    denoiser = tiny_denoiser()
    pruned = specialize(tiny_capture(denoiser, batch=2), PRUNED)
    pruned.program.validate()
    module = pruned.program.module(check_guards=False)
    sample, timestep, _ = tiny_inputs(batch=2)
    caches = [torch.zeros(site.shape) for site in pruned.reused]
    (result,) = module(sample, timestep, *caches)
    with torch.no_grad():
        assert torch.equal(result, _run(pruned, denoiser, sample, timestep, *caches)[0])


def test_parameters_are_shared_and_dead_ones_left_out() -> None:
    denoiser = tiny_denoiser()
    own = dict(denoiser.named_parameters())
    full, pruned = (specialize(tiny_capture(denoiser), phase) for phase in (FULL, PRUNED))
    assert set(full.program.state_dict) == set(own)
    assert set(pruned.program.state_dict) == {n for n in own if "attn2" not in n and "norm2" not in n}
    for variant in (full, pruned):
        assert all(tensor is own[name] for name, tensor in variant.program.state_dict.items())


def test_the_captured_graph_is_left_alone_and_specializing_twice_gives_the_same() -> None:
    captured = tiny_capture(tiny_denoiser())
    before = str(captured.program.graph)
    first = specialize(captured, PRUNED)
    second = specialize(captured, PRUNED)
    assert str(captured.program.graph) == before
    assert first.program.graph_module.code == second.program.graph_module.code


def test_without_guidance_nothing_is_merged() -> None:
    full = specialize(tiny_capture(tiny_denoiser(), batch=3), FULL_UNGUIDED)
    outputs = full.program.graph.output_node().args[0]
    assert [tuple(node.meta["val"].shape) for node in outputs] == [(3, TOKENS, DIM)] * 3


def test_the_verifier_rejects_invalid_graphs() -> None:
    captured = tiny_capture(tiny_denoiser())
    full, pruned = specialize(captured, FULL), specialize(captured, PRUNED)
    with pytest.raises(VerificationError, match="3 outputs, expected 1"):
        verify(dataclasses.replace(full, emitted=()), captured)
    unmerged = tuple(dataclasses.replace(emission, anchor=None) for emission in full.emitted)
    with pytest.raises(VerificationError, match="is emitted as"):
        verify(dataclasses.replace(full, emitted=unmerged), captured)
    untouched = specialize(captured, Phase(guided=False))
    with pytest.raises(VerificationError, match="2 attentions are left"):
        verify(dataclasses.replace(untouched, phase=PRUNED), captured)
    with pytest.raises(VerificationError, match="takes 4 inputs"):
        verify(dataclasses.replace(pruned, inputs=pruned.inputs[:1]), captured)
