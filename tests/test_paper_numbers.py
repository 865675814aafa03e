"""The cost of SD-1.5 in the paper's convention, read off the variants' graphs; no weights are ever allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from tgate_compile._call import Call
from tgate_compile._capture import capture
from tgate_compile._schedule import Schedule
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.specialize import specialize

STEPS = 25
# arXiv 2404.02747, table of SD-1.5 at 512 px: parameters in millions, and MACs in tera for 25 steps.
PAPER_PARAMETERS = {"full": 859.520, "pruned": 815.557}
PAPER_MACS = {25: 16.938, 5: 9.875, 10: 11.641}


@pytest.fixture(scope="module")
def costs() -> dict[str, Any]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768).eval()

        def captured(batch: int) -> Any:
            arguments = (torch.zeros(batch, 4, 64, 64), torch.zeros((), dtype=torch.int64))
            text = torch.zeros(batch, 77, 768)
            return capture(
                unet, unet.forward, Call.of(arguments, {"encoder_hidden_states": text, "return_dict": False})
            )

        plan = Schedule(10).plan(STEPS, guided=True)
        variants = {"full": specialize(captured(2), plan[9]), "pruned": specialize(captured(1), plan[10])}
    return {
        name: (
            sum(tensor.numel() for tensor in variant.program.state_dict.values()),
            count_macs(variant.program.graph),
            len(variant.emitted) + len(variant.reused),
        )
        for name, variant in variants.items()
    }


def test_sixteen_sites(costs: dict[str, Any]) -> None:
    assert [sites for _, _, sites in costs.values()] == [16, 16]


def test_the_papers_parameters(costs: dict[str, Any]) -> None:
    # The paper counts the cross-attentions' own weights. With them go the layer norms in front, two vectors each.
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    norms = {"full": 0, "pruned": 2 * sum(widths)}
    for name, (parameters, _, _) in costs.items():
        assert (parameters + norms[name]) / 1e6 == pytest.approx(PAPER_PARAMETERS[name], abs=0.002)


@pytest.mark.parametrize("gate", PAPER_MACS)
def test_the_papers_macs(costs: dict[str, Any], gate: int) -> None:
    full, pruned = costs["full"][1].layers, costs["pruned"][1].layers
    assert (gate * full + (STEPS - gate) * pruned) / 1e12 == pytest.approx(PAPER_MACS[gate], rel=1e-3)
