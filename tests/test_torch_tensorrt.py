"""`backend="tensorrt"` without Torch-TensorRT, and the program for it; tests/test_tensorrt_gpu.py runs it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.exported import GATE, plain
from tests.tiny_pipelines import run
from tgate_compile import ConfigurationError
from tgate_compile.engine.weights import live_tensors
from tgate_compile.exports.tensorrt.live import OPTIONS, _program

without_it = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is not None, reason="tests the error without the package"
)


@without_it
def test_the_error_names_the_extra() -> None:
    pipe = plain()
    with pytest.raises(ConfigurationError, match=r"'tgate_compile\[tensorrt\]', which fetches .* NVIDIA's own index"):
        tgate_compile.optimize(pipe, GATE, backend="tensorrt")
    assert "_tgate_compile" not in vars(pipe)


def test_a_mask_is_not_taken_for_a_causal_one() -> None:
    """Torch-TensorRT's default replaces the mask of an attention with as many queries as keys."""
    assert OPTIONS["attn_bias_is_causal"] is False


def test_the_program_that_it_compiles() -> None:
    """It is a copy with the current weights, since the variant's may be out of date."""
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    run(pipe)
    store = pipe._tgate_compile.hook.store
    live = live_tensors(store.denoiser)
    for variant, _ in store.variants:
        nodes = len(variant.program.graph.nodes)
        placeholders = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"]
        inputs = [torch.randn(fake.shape).to(fake.dtype) for fake in placeholders[len(variant.weights) :]]
        weights = [live[name].detach() * 1.5 if live[name].ndim > 1 else live[name] for name in variant.weights]
        with torch.no_grad():
            expected = variant.program.graph_module(*weights, *inputs)
            parameters = [torch.nn.Parameter(weight, requires_grad=False) for weight in weights]
            program = _program(variant, parameters).run_decompositions({})
            outputs = program.module(check_guards=False)(*inputs)
        assert len(outputs) == len(expected)
        for one, other in zip(outputs, expected, strict=True):
            assert difference(one, other) < 1e-5
        assert len(variant.program.graph.nodes) == nodes
        assert all(variant.program.state_dict[name] is live[name] for name in variant.weights)
