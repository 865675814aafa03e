"""Tests that need a GPU; skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.tiny_pipelines import run, sdxl, stable_diffusion

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("build", [stable_diffusion, sdxl], ids=["sd", "sdxl"])
def test_ungated_eager_is_the_plain_pipeline_to_the_bit(build: Any) -> None:
    pipe = build().to("cuda")
    plain = run(pipe)
    tgate_compile.optimize(pipe, 100, backend="eager")
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_eager_within_rounding_and_compiles_once(dtype: torch.dtype) -> None:
    pipe = tgate_compile.optimize(stable_diffusion().to("cuda", dtype), 3, backend="eager")
    eager = run(pipe)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 3, backend="inductor")
    assert difference(run(pipe), eager) < (1e-4 if dtype == torch.float32 else 5e-2)
    compiled = pipe._tgate_compile.hook.store.compilations
    first = run(pipe)
    assert torch.equal(run(pipe, steps=6), first)
    assert pipe._tgate_compile.hook.store.compilations == compiled == 2


def test_the_graphs_add_no_copy_of_the_weights() -> None:
    pipe = stable_diffusion().to("cuda")
    run(pipe)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    tgate_compile.optimize(pipe, 3, backend="inductor")
    run(pipe)
    torch.cuda.synchronize()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in pipe.unet.parameters())
    assert torch.cuda.memory_allocated() - before < weights / 4


@pytest.mark.parametrize("schedule", [{}, {"sp_interval": 2}, {"deepcache_interval": 2}], ids=["v1", "v2", "deepcache"])
def test_cuda_graphs_change_nothing(schedule: dict[str, int]) -> None:
    pipe = tgate_compile.optimize(stable_diffusion().to("cuda"), 3, backend="inductor", **schedule)
    compiled = run(pipe)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True}, **schedule)
    first = run(pipe)
    assert torch.equal(first, compiled)
    assert torch.equal(run(pipe, prompt="a blue dog", seed=1), run(pipe, prompt="a blue dog", seed=1))
    assert torch.equal(run(pipe), first)


def test_cuda_graphs_see_weights_that_change_and_weights_that_move() -> None:
    pipe = stable_diffusion().to("cuda")
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True})
    before = run(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    changed = run(pipe)
    assert not torch.equal(changed, before)
    pipe.unet.conv_out.weight = torch.nn.Parameter(pipe.unet.conv_out.weight.detach() / 2)
    assert difference(run(pipe), before) < 1e-5


def test_cuda_graphs_add_no_copy_of_the_weights() -> None:
    pipe = stable_diffusion().to("cuda")
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True})
    run(pipe)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run(pipe)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before  # the generation's memory is free again
