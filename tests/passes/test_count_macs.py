"""MACs computed from the nodes' shapes, against manual counts."""

from __future__ import annotations

import torch
from torch import nn

from tests.passes.tiny_denoiser import DIM, TEXT_DIM, TEXT_TOKENS, TOKENS, tiny_capture, tiny_denoiser
from tgate_compile.passes.count_macs import count_macs


def test_linear_and_attention_products() -> None:
    for fused in (True, False):
        macs = count_macs(tiny_capture(tiny_denoiser(blocks=1, fused=fused), batch=4).program.graph)
        self_attention = 4 * 4 * TOKENS * DIM * DIM  # q, k, v, out
        cross_attention = 4 * (2 * TOKENS * DIM * DIM + 2 * TEXT_TOKENS * TEXT_DIM * DIM)
        assert macs.layers == self_attention + cross_attention + DIM  # and the time embedding
        assert macs.attention == 4 * 2 * TOKENS * (TOKENS + TEXT_TOKENS) * DIM


def test_convolutions_with_groups_and_strides() -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strided = nn.Conv2d(4, 6, 3, stride=2, padding=1)
            self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.grouped(self.strided(x))

    program = torch.export.export(Convolutions(), (torch.zeros(2, 4, 8, 8),), strict=False)
    macs = count_macs(program.graph)
    assert macs.layers == 2 * 16 * 6 * 4 * 9 + 2 * 16 * 6 * 2 * 9
    assert macs.attention == 0
    assert macs.total == macs.layers


def test_a_graph_without_products_costs_nothing() -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.norm()

    assert count_macs(torch.export.export(Norm(), (torch.ones(3),), strict=False).graph).total == 0
