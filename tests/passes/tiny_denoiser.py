"""A hand-written denoiser whose every node is known: self-attention, cross-attention and a residual stream."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.methods.method import Kind
from tgate_compile.passes.graphs import Captured

DIM, TEXT_DIM, TOKENS, TEXT_TOKENS = 8, 6, 5, 3


class TinyAttention(nn.Module):
    """Attention of 2 heads with an output projection and dropout, laid out as diffusers' `Attention`."""

    def __init__(self, key_dim: int, *, fused: bool = True, cross: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, DIM, bias=False)
        self.to_k = nn.Linear(key_dim, DIM, bias=False)
        self.to_v = nn.Linear(key_dim, DIM, bias=False)
        self.to_out = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.1))
        self.is_cross_attention = cross
        self.fused = fused
        self.residual = residual

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_q(hidden), self.to_k(context), self.to_v(context)  # [batch, tokens, dim]
        query, key, value = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (query, key, value))
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            mixed = scores.float().softmax(-1).to(value.dtype) @ value
        out: torch.Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return (out + hidden) / 2.0 if self.residual else out


class TinyBlock(nn.Module):
    def __init__(self, *, fused: bool, residual: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn1 = TinyAttention(DIM, fused=fused)
        self.norm2 = nn.LayerNorm(DIM)
        self.attn2 = TinyAttention(TEXT_DIM, fused=fused, cross=True, residual=residual)

    def forward(self, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(hidden)
        hidden = hidden + self.attn1(normed, normed)
        return hidden + self.attn2(self.norm2(hidden), text)


class TinyDenoiser(nn.Module):
    """[batch, tokens, dim] latents, a timestep and [batch, text tokens, text dim] text -> a prediction."""

    def __init__(self, *, blocks: int = 2, fused: bool = True, residual: bool = False) -> None:
        super().__init__()
        self.time = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(TinyBlock(fused=fused, residual=residual) for _ in range(blocks))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        hidden = sample + self.time(timestep.float().reshape(1, 1))
        for block in self.blocks:
            hidden = block(hidden, text)
        return (hidden,)


def tiny_inputs(batch: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, TOKENS, DIM, generator=generator),
        torch.tensor(7),
        torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
    )


def tiny_denoiser(**options: object) -> TinyDenoiser:
    torch.manual_seed(0)
    return TinyDenoiser(**options).eval()  # type: ignore[arg-type]


def tiny_capture(denoiser: nn.Module, batch: int = 4, kinds: Collection[Kind] = ("cross",)) -> Captured:
    sample, timestep, text = tiny_inputs(batch)
    call = Call.of((sample, timestep), {"text": text, "return_dict": False})
    return capture(denoiser, denoiser.forward, call, kinds)
