"""Tests that need a GPU; skipped without one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code

import tgate_compile
from tests.comparing import difference
from tests.tiny_pipelines import run, sdxl, stable_diffusion
from tgate_compile.engine.samples import WeightSamples
from tgate_compile.exports.inductor.live import without_cuda_graphs

pytestmark = [
    pytest.mark.gpu,
    # Inductor recommends TF32 for float32, on GPUs with compute capability 8.0 and later.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning"),
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


def test_cuda_graphs_are_recorded_again_after_the_pipeline_has_moved() -> None:
    pipe = stable_diffusion().to("cuda")
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True})
    before = run(pipe)
    for _ in range(2):
        pipe.to("cpu")
        torch.cuda.empty_cache()
        held = torch.empty(1 << 20, device="cuda")  # so that the weights get other addresses
        pipe.to("cuda")
        assert torch.equal(run(pipe), before)
        del held
    pipe.unet.set_attn_processor(AttnProcessor())  # other graphs, in another pool
    changed = run(pipe)
    assert difference(changed, before) < 1e-3
    assert torch.equal(run(pipe), changed)


def test_cuda_graphs_in_and_outside_of_inference_mode() -> None:
    pipe = stable_diffusion().to("cuda")
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True})
    with torch.inference_mode():
        before = run(pipe)
    assert torch.equal(run(pipe), before)


def test_the_same_code_without_its_recording() -> None:
    pipe = stable_diffusion().to("cuda")
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True})
    recorded = run(pipe)
    with without_cuda_graphs():
        assert torch.equal(run(pipe), recorded)
    assert pipe._tgate_compile.hook.store.compilations == 2


def test_recording_while_another_thread_allocates_memory() -> None:
    pipe = stable_diffusion().to("cuda")
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True})
    done = threading.Event()

    def allocate() -> None:
        while not done.is_set():
            torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
            torch.cuda.empty_cache()

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        first = run(pipe)
    finally:
        done.set()
        thread.join()
    assert torch.equal(run(pipe), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_does_not_copy_channels_last_weights(dtype: torch.dtype) -> None:
    """Convolutions of channels-last weights read them where they are; otherwise each step would copy them."""
    pipe = stable_diffusion().to("cuda", dtype)
    torch.nn.Module.to(pipe.unet, memory_format=torch.channels_last)
    tgate_compile.optimize(pipe, 3, backend="inductor")
    with fresh_inductor_cache():
        _, codes = run_and_get_code(run, pipe)
    kernels = {tuple(p.shape) for p in pipe.unet.parameters() if p.ndim == 4 and p.shape[-1] > 1}
    copies = [shape for shape in kernels for code in codes if f"empty_strided_cuda({shape}" in code]
    assert codes
    assert not copies


def test_all_weights_are_compared_with_one_synchronization() -> None:
    weights = [torch.randn(64, 64, device="cuda") for _ in range(20)]
    sampler = WeightSamples()
    sampler.of(weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchron"):
            sampler.of(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(acc_events=True) as profiler:
        sampler.of(weights)
    copies = [event for event in profiler.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1


def test_cuda_graphs_add_no_copy_of_the_weights() -> None:
    pipe = stable_diffusion().to("cuda")
    tgate_compile.optimize(pipe, 3, backend="inductor", backend_options={"cuda_graphs": True})
    run(pipe)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run(pipe)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before  # the generation's memory is free again
