"""T-GATE for your own denoiser and pipeline: only the scheduler comes from diffusers.

python examples/own_denoiser.py
"""

import torch
from diffusers import DDIMScheduler
from torch import nn

import tgate_compile


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own, self.cross = (nn.MultiheadAttention(dim, 4, batch_first=True) for _ in range(2))
        self.feed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        x = x + self.cross(x, text, text, need_weights=False)[0]  # cached: the text is the same in all steps
        return x + self.feed(x)


class Denoiser(nn.Module):
    def __init__(self, dim: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.time = nn.Linear(1, dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.time(t.float().reshape(-1, 1, 1) / 1000)  # [batch, tokens, dim]
        for block in self.blocks:
            x = block(x, text)
        return x


class Pipeline:
    def __init__(self) -> None:
        self.model, self.scheduler = Denoiser().eval(), DDIMScheduler()

    @torch.no_grad()
    def __call__(self, text: torch.Tensor, steps: int = 20, guidance_scale: float = 5.0) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(1, 64, 64)
        both = torch.cat([torch.zeros_like(text), text])  # [2, text tokens, dim]
        for t in self.scheduler.timesteps:
            uncond, cond = self.model(torch.cat([x, x]), t, both).chunk(2)
            x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
        return x


pipe = tgate_compile.optimize(Pipeline(), gate_step=8, denoiser="model", backend="eager")
pipe(torch.randn(1, 12, 64))
print(tgate_compile.describe(pipe))
