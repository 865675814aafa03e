"""`backend="onnxruntime"`: the same images as the eager graphs, on the live weights."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, difference
from tests.test_refusals import refused
from tests.tiny_pipelines import (
    PROMPTS,
    add_lora,
    latent_consistency,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)
from tgate_compile import ConfigurationError, Schedule
from tgate_compile.engine.choice import Chooser
from tgate_compile.engine.config import Config
from tgate_compile.exports.onnx import convert
from tgate_compile.exports.onnx.convert import to_onnx
from tgate_compile.exports.onnx.live import OnnxRuntimeBackend
from tgate_compile.exports.onnx.session import best_providers, provider_options, run_bound
from tgate_compile.passes.graphs import copy_graph

#: ONNX Runtime adds in a different order.
CLOSE = 1e-4


def both(pipe: Any, call: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of ONNX Runtime, run twice, and of the eager graphs. The pipeline stays optimized."""
    tgate_compile.optimize(pipe, **options, backend="eager")
    eager = run(pipe, **call)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, **options, backend="onnxruntime")
    first = run(pipe, **call)
    assert torch.equal(run(pipe, **call), first)
    return first, eager


CASES: dict[str, Any] = {
    "sd": (lambda: stable_diffusion(layout="small"), {"prompt": PROMPTS}, {"gate_step": 3}),
    "sdxl": (sdxl, {}, {"gate_step": 3, "keep": "cond"}),
    "pixart": (pixart, pixart_prompt(), {"gate_step": 2}),
    "lcm": (latent_consistency, {"steps": 4, "guidance_scale": 6.0}, {"gate_step": 1}),
    "v2": (
        lambda: stable_diffusion(layout="small"),
        {"steps": 9},
        {"gate_step": 5, "sp_interval": 2, "fi_interval": 2, "anchor_weight": 1.0},
    ),
    "deepcache": (lambda: stable_diffusion(layout="small"), {}, {"gate_step": 3, "deepcache_interval": 2}),
    "fp8 caches": (
        lambda: stable_diffusion(layout="small"),
        {},
        {"gate_step": 2, "cache_dtype": torch.float8_e4m3fn},
    ),
}


#: The case that runs by default; the others run in OpenVINO, or with --heavy.
QUICK = ("deepcache",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in CASES]
)
def test_the_same_images(name: str) -> None:
    build, call, options = CASES[name]
    result, eager = both(build(), call, **options)
    # A cached value may be rounded to a different fp8 number.
    assert difference(result, eager) < (5e-3 if name == "fp8 caches" else CLOSE)


def test_changed_weights_are_seen() -> None:
    """Even through `.data`, as in peft, which bypasses torch's version counters; without another conversion."""
    pipe = stable_diffusion(layout="small")
    add_lora(pipe.unet)
    result, _ = both(pipe, {}, gate_step=3)
    compiled = pipe._tgate_compile.hook.store.compilations
    for name, parameter in pipe.unet.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(2)
    changed = run(pipe)
    assert pipe._tgate_compile.hook.store.compilations == compiled
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 3, backend="eager")
    assert difference(changed, run(pipe)) < CLOSE
    assert_differ(changed, result)


@pytest.mark.heavy
def test_half_precision() -> None:
    pipe = stable_diffusion(layout="small").to(torch.float16)
    result, eager = both(pipe, {}, gate_step=3)
    assert result.dtype == torch.float16
    assert difference(result.float(), eager.float()) < 2e-2


@pytest.mark.heavy
def test_options() -> None:
    options = {"providers": ["CPUExecutionProvider"], "threads": 1, "prepacking": False}
    pipe = stable_diffusion(layout="small")
    expected, _ = both(pipe, {}, gate_step=3)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 3, backend="onnxruntime", backend_options=options)
    assert difference(run(pipe), expected) < CLOSE


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"provider": "CPU"}, ("provider", "providers, threads, prepacking")),
        ({"providers": "CPUExecutionProvider"}, ("a list of execution provider names", "got 'CPUExecutionProvider'")),
        ({"providers": ["NoSuchProvider"]}, ("no NoSuchProvider", "CPUExecutionProvider", "onnx-gpu")),
        ({"threads": 0}, ("threads", "got 0")),
        ({"prepacking": "no"}, ("prepacking", "got 'no'")),
    ],
)
def test_wrong_options(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    pipe = stable_diffusion(layout="small")
    refused(pipe, ConfigurationError, *parts, backend="onnxruntime", backend_options=options)


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    message = refused(stable_diffusion(layout="small"), ConfigurationError, "onnxruntime", backend="onnxruntime")
    assert "pip install 'tgate_compile[onnx]'" in message


@pytest.mark.parametrize(
    ("missing", "name"),
    [((), "openvino"), (("openvino",), "onnxruntime"), (("openvino", "onnxruntime"), "eager")],
)
def test_automatic_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], name: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module in missing else real(module))
    assert Chooser(Config(Schedule(2)), "UNet").backend(torch.device("cpu"), 1).name == name


def test_the_models_are_valid_and_hold_no_weight_twice() -> None:
    import onnx
    import onnx_ir

    pipe = stable_diffusion(layout="small")
    tgate_compile.optimize(pipe, 3, backend="eager")
    run(pipe)
    for variant, _ in pipe._tgate_compile.hook.store.variants:
        graph = to_onnx(variant)
        proto = onnx_ir.to_proto(graph.model)
        onnx.checker.check_model(proto, full_check=True)
        assert set(graph.weights) == set(variant.weights)
        assert [value.name for value in proto.graph.input][: len(variant.inputs)] == list(variant.inputs)
        assert len(proto.graph.input) == len(variant.inputs) + len(variant.reused)
        constants = [i for i in graph.model.graph.initializers.values() if i.name not in graph.weights]
        assert sum(value.const_value.nbytes for value in constants) < 4096  # type: ignore[union-attr]


# GPUs.


def test_providers_for_gpus_use_the_gpu_of_the_pipeline_in_full_precision() -> None:
    second = torch.device("cuda", 1)
    assert provider_options(best_providers(second), second) == [{"device_id": "1", "use_tf32": "0"}, {}]
    assert provider_options(["TensorrtExecutionProvider"], torch.device("cuda")) == [{"device_id": "0"}]
    assert provider_options(best_providers(torch.device("cpu")), torch.device("cpu")) == [{}]
    backend = OnnxRuntimeBackend({})
    assert backend.lowered_to(torch.device("cpu")) is None
    assert backend.lowered_to(second) is None
    assert OnnxRuntimeBackend({"providers": ["TensorrtExecutionProvider"]}).lowered_to(second) is torch.float16


@pytest.mark.heavy
def test_an_open_session_does_not_need_the_memory_that_it_was_opened_with() -> None:
    """So the copies that a session for a GPU is opened with, all weights in the CPU's memory, are not kept."""
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="onnxruntime")
    run(pipe)
    compiled = pipe._tgate_compile.hook.store.compiled[0]
    session = compiled.runner._runner
    given = {name: torch.rand(shape).to(dtype) for name, shape, dtype in session_inputs(compiled)}
    opened = session._session._made[0]
    before = run_bound(opened, given, session._outputs, torch.device("cpu"))
    with torch.no_grad():
        for weight in compiled.weights:
            weight.fill_(7)
    after = run_bound(opened, given, session._outputs, torch.device("cpu"))
    assert all(map(torch.equal, after, before))


def session_inputs(compiled: Any) -> list[tuple[str, torch.Size, torch.dtype]]:
    names = compiled.runner._runner._input_names
    placeholders = [node for node in compiled.variant.program.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders[-len(names) :]]
    return [(name, value.shape, value.dtype) for name, value in zip(names, values, strict=True)]


class Layers(torch.nn.Module):
    """Layers with operators that are made of others, on sizes that may be free."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.GroupNorm(2, 4), torch.nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, gate = self.linear(self.norm(x)).unflatten(-1, (2, 8)).flatten(1, 2).chunk(2, dim=1)
        heads = torch.nn.functional.scaled_dot_product_attention(*[heads[:, None]] * 3)
        rows = torch.arange(x.shape[0] * 3).reshape(x.shape[0], -1).to(torch.int32).to(x.dtype)
        ys, xs = torch.meshgrid(rows[:, 0], torch.outer(rows[0], rows[0])[0], indexing="xy")
        return (1 - heads.squeeze(1).contiguous() * gate.square()) + (ys + xs).sum().type_as(x)


@pytest.mark.parametrize("sizes", [{}, {0: torch.export.Dim.DYNAMIC}], ids=["fixed", "free batch"])
def test_the_shortcut_writes_what_pytorchs_exporter_writes(
    sizes: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the PyTorch that was checked, only some operators are traced again; the model has the same ones."""
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Layers(), (x,), dynamic_shapes=(sizes,))
    decomposed = copy_graph(program.graph_module)
    assert convert._decompose(decomposed), "PyTorch's own exporter would be used"
    ours = convert.program_to_onnx(program, ["linear.weight"])
    monkeypatch.setattr(convert, "CHECKED_TORCH", "none")
    theirs = convert.program_to_onnx(program, ["linear.weight"])
    assert ours.weights == theirs.weights == ("linear.weight",)
    kinds = [Counter(node.op_type for node in model.model.graph.all_nodes()) for model in (ours, theirs)]
    if sizes:  # may be read from another value
        for kind in kinds:
            for name in ("Shape", "Squeeze", "Reshape", "Concat"):
                del kind[name]
    assert kinds[0] == kinds[1]
    results = []
    for graph in (ours, theirs):
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(graph.model).SerializeToString())
        results.append(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], program.module()(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_operators_that_cannot_be_traced_alone_are_left_to_pytorchs_exporter() -> None:
    class WritesInPlace(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            y[:, 0].add_(1)
            return y

    x = torch.ones(2, 3)
    program = torch.export.export(WritesInPlace(), (x,))
    assert not convert._decompose(copy_graph(program.graph_module))
    model = convert.program_to_onnx(program, []).model
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    assert session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].tolist() == [[2, 1, 1]] * 2
