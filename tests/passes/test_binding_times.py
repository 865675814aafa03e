"""Splitting a variant by binding time: what leaves the step, what stays, and that nothing changes in the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from tests.passes.tiny_denoiser import tiny_capture, tiny_denoiser, tiny_inputs
from tgate_compile import VerificationError
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.methods.method import CROSS, Phase
from tgate_compile.passes.binding_times import SplitVariant, split_by_binding, verify_split
from tgate_compile.passes.graphs import Captured, Variant, outputs_of
from tgate_compile.passes.specialize import specialize

FULL = Phase(True, merge=CROSS)
PRUNED = Phase(False, reuse=CROSS)


def _split(captured: Captured, phase: Phase = FULL) -> tuple[Variant, SplitVariant]:
    variant = specialize(captured, phase)
    return variant, split_by_binding(variant, captured.roles)


def _run(variant: Variant, state: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    names = variant.program.graph_signature.user_inputs
    return list(variant.program.graph_module(*(state[name] for name in variant.weights), *(values[n] for n in names)))


def _run_split(
    split: SplitVariant, state: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    known = dict(values)
    for part in split.early:
        known.update(zip(part.outputs, _run(part, state, known), strict=True))
    return _run(split.step, state, known)


class Modulated(nn.Module):
    """A transformer block's essentials: modulation by the timestep and the pooled text, and a mask of the text."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim)
        self.pool = nn.Linear(4, dim)
        self.modulation = nn.Linear(dim, 3 * dim)
        self.table = nn.Parameter(torch.randn(3, dim))
        self.text = nn.Linear(6, dim)
        self.position = nn.Parameter(torch.randn(1, 5, dim))
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        embedding = self.time(timestep.float().reshape(-1, 1)) + self.pool(pooled_projections)
        modulation = self.modulation(nn.functional.silu(embedding)).unflatten(1, (3, -1)) + self.table[None]
        shift, scale, gate = modulation.chunk(3, dim=1)
        text = self.text(encoder_hidden_states)  # [batch, text, dim]
        hidden = (sample + self.position + residual) * (1 + scale) + shift
        scores = hidden @ text.transpose(1, 2)
        mask = ((1 - encoder_attention_mask.float()) * -1e4).unsqueeze(1).expand(-1, sample.shape[1], -1)
        mixed = (scores + mask).softmax(-1) @ text
        return (sample + gate * self.out(mixed),)


def _modulated(batch: int = 2) -> tuple[Modulated, dict[str, torch.Tensor], Captured]:
    torch.manual_seed(0)
    model = Modulated().eval()
    inputs = {
        "sample": torch.randn(batch, 5, 32),
        "timestep": torch.full((batch,), 7),
        "encoder_hidden_states": torch.randn(batch, 3, 6),
        "pooled_projections": torch.randn(batch, 4),
        "encoder_attention_mask": torch.tensor([[1, 1, 0]]).repeat(batch, 1),
        "residual": torch.randn(batch, 5, 32),
    }
    return model, inputs, capture(model, model.forward, Call.of((), inputs), ())


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_keys_and_values_of_the_text_and_the_time_embedding_leave_the_step(fused: bool) -> None:
    denoiser = tiny_denoiser(fused=fused)
    captured = tiny_capture(denoiser)
    variant, split = _split(captured)
    assert split.prelude is not None
    assert split.table is not None
    assert set(split.prelude.weights) == {
        f"blocks.{i}.attn2.{name}.weight" for i in (0, 1) for name in ("to_k", "to_v")
    }
    assert set(split.table.weights) == {"time.weight", "time.bias"}
    assert set(split.step.weights) == set(variant.weights) - {*split.prelude.weights, *split.table.weights}
    assert split.prelude.inputs == ("text",)
    assert split.table.inputs == ("timestep",)
    assert split.step.inputs == ("sample", *split.cut)
    assert set(split.cut) == {*split.prelude.outputs, *split.table.outputs}
    assert "prelude_blocks_0_attn2_to_k" in split.cut
    values = dict(zip(("sample", "timestep", "text"), tiny_inputs(), strict=True))
    expected = _run(variant, denoiser.state_dict(), values)
    results = _run_split(split, denoiser.state_dict(), values)
    assert all(map(torch.equal, results, expected))


def test_the_caches_of_a_pruned_graph_stay_last() -> None:
    _, split = _split(tiny_capture(tiny_denoiser(), batch=2), PRUNED)
    assert split.prelude is None
    assert split.table is not None
    names = split.step.program.graph_signature.user_inputs
    assert list(names)[: len(split.step.inputs)] == list(split.step.inputs) == ["sample", *split.cut]
    assert len(names) == len(split.step.inputs) + len(split.step.reused)


@torch.no_grad()
def test_cheap_operators_stay_in_the_step() -> None:
    model, inputs, captured = _modulated()
    variant, split = _split(captured, Phase(False))
    assert split.prelude is not None
    assert split.table is not None
    # The mask is expanded in the step, from an input; the table's result is the modulation in one piece.
    assert "encoder_attention_mask" in split.step.inputs
    assert set(split.prelude.weights) == {"text.weight", "text.bias", "pool.weight", "pool.bias"}
    assert {"modulation.weight", "modulation.bias", "time.weight", "time.bias"} <= set(split.table.weights)
    assert len(split.table.outputs) == 1
    # Added to the latents: work on parameters alone stays, too.
    assert "position" in split.step.weights
    assert "residual" in split.step.inputs
    state = {**model.state_dict()}
    assert torch.equal(_run_split(split, state, inputs)[0], _run(variant, state, inputs)[0])


def test_a_row_larger_than_its_weights_is_not_stored() -> None:
    model, _, captured = _modulated(batch=128)
    _, split = _split(captured, Phase(False))
    # 128 rows of 3 * 32 values are more than the 96 * 33 parameters of the modulation.
    assert "modulation.weight" in split.step.weights
    # Whatever its size, the work on the prompt alone is not repeated.
    assert split.prelude is not None
    assert "text.weight" in split.prelude.weights
    assert "text.weight" not in split.step.weights
    del model


def test_an_input_without_a_role_changes_at_every_call() -> None:
    captured = dataclasses.replace(tiny_capture(tiny_denoiser()), roles={})
    variant, split = _split(captured)
    assert split.early == split.cut == ()
    assert split.step.inputs == variant.inputs
    assert split.step.weights == variant.weights


def test_random_numbers_stay_in_the_step() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Linear(6, 6)

        def forward(self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            text = self.text(encoder_hidden_states)
            return sample + text + torch.rand_like(text)

    model = Noisy().eval()
    inputs = {"sample": torch.zeros(3, 6), "encoder_hidden_states": torch.zeros(3, 6)}  # an odd batch is not probed
    captured = capture(model, model.forward, Call.of((), inputs), ())
    _, split = _split(captured, Phase(False))
    assert split.prelude is not None
    assert not any("rand" in str(node.target) for node in split.prelude.program.graph.nodes)
    assert any("rand" in str(node.target) for node in split.step.program.graph.nodes)


def test_the_parts_are_valid_programs_that_share_the_parameters() -> None:
    captured = tiny_capture(tiny_denoiser())
    variant, split = _split(captured)
    for part in (*split.early, split.step):
        part.program.validate()
        for name, tensor in part.program.state_dict.items():
            assert tensor is captured.program.state_dict[name]
    assert [node.name for node in outputs_of(split.step.program.graph)] == [
        node.name for node in outputs_of(variant.program.graph)
    ]
    again = split_by_binding(variant, captured.roles)
    assert again.cut == split.cut
    assert split_by_binding(split.step, {}).early == ()  # nothing is left to move


def test_the_verifier_rejects_invalid_splits() -> None:
    captured = tiny_capture(tiny_denoiser())
    variant, split = _split(captured)
    assert split.prelude is not None
    for broken, problem in (
        (SplitVariant(None, None, variant), "is repeated"),
        (dataclasses.replace(split, prelude=None), "no earlier part returns"),
        (dataclasses.replace(split, table=dataclasses.replace(split.table, outputs=())), "not distinct"),
    ):
        with pytest.raises(VerificationError, match=problem):
            verify_split(broken, variant, captured.roles)
    with pytest.raises(VerificationError, match="change more often"):
        verify_split(split, variant, {**captured.roles, "text": "latents"})
    _, _, captured = _modulated()
    variant, split = _split(captured, Phase(False))
    no_table = split_by_binding(variant, {name: role for name, role in captured.roles.items() if role == "prompt"})
    with pytest.raises(VerificationError, match="only values of the timestep need"):
        verify_split(no_table, variant, captured.roles)
