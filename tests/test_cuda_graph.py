"""CUDA graphs, as far as they can be tested on a CPU; see tests/test_gpu.py for the rest."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_pipelines import run, stable_diffusion
from tgate_compile import BackendError, ConfigurationError, optimize
from tgate_compile.exports.inductor.live import StaticInputs


def test_inputs_are_copied_to_fixed_addresses_and_cached_values_once() -> None:
    latents, timestep, cached = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 16, 8)
    static = StaticInputs([latents.transpose(1, 2), timestep, cached], cached=1)
    addresses = [buffer.data_ptr() for buffer in static.buffers]
    assert static.fill([latents.transpose(1, 2), timestep, cached]) == 3
    other = torch.randn(2, 4, 8, 8).transpose(1, 2)
    assert static.fill([other, torch.tensor(6), cached]) == 2
    assert torch.equal(static.buffers[0], other)
    assert static.buffers[0].is_contiguous()
    assert int(static.buffers[1]) == 6
    # Another generation's value, even at the address of the first one.
    assert static.fill([other, timestep, cached + 1]) == 3
    assert torch.equal(static.buffers[2], cached + 1)
    assert [buffer.data_ptr() for buffer in static.buffers] == addresses


def test_a_buffer_keeps_no_cached_value_alive() -> None:
    static = StaticInputs([torch.zeros(3)], cached=1)
    for value in range(3):  # each is freed before the next is made, which may get its address
        assert static.fill([torch.full((3,), float(value))]) == 1
        assert torch.equal(static.buffers[0], torch.full((3,), float(value)))


def test_options_are_checked() -> None:
    pipe = stable_diffusion(layout="small")
    with pytest.raises(ConfigurationError, match="must be True or False, but got 1"):
        optimize(pipe, 2, backend="inductor", backend_options={"cuda_graphs": 1})
    with pytest.raises(ConfigurationError, match="exclude each other"):
        optimize(pipe, 2, backend="inductor", backend_options={"cuda_graphs": True, "triton.cudagraphs": True})


def test_a_cpu_has_no_cuda_graphs() -> None:
    pipe = optimize(stable_diffusion(layout="small"), 2, backend="inductor", backend_options={"cuda_graphs": True})
    with pytest.raises(BackendError, match="these are on cpu"):
        run(pipe)
