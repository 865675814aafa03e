"""`precision=`: graphs compute in another dtype, and the pipeline keeps its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, difference
from tests.tiny_pipelines import add_lora, pixart, pixart_prompt, run, sdxl, stable_diffusion
from tgate_compile import BackendError, ConfigurationError, UnsupportedModelError
from tgate_compile.engine import choice
from tgate_compile.engine.choice import _Copies, _Form
from tgate_compile.passes.graphs import copy_graph
from tgate_compile.passes.legalize import _NORMS, _PRODUCTS, change_precision

#: What rounding to these dtypes in a few steps of a tiny model may change, relative to the largest value.
MOST = {"bfloat16": 6e-2, "float16": 1e-2}


def small() -> Any:
    return stable_diffusion(layout="small")


def drawn(pipe: Any, precision: str = "auto", backend: str = "eager", **call: Any) -> torch.Tensor:
    """Return the latents of an optimized pipeline, which is plain again afterwards."""
    tgate_compile.optimize(pipe, 2, backend=backend, precision=precision)  # type: ignore[arg-type]
    result: torch.Tensor = run(pipe, steps=4, **call)
    tgate_compile.restore(pipe)
    return result


@pytest.mark.parametrize(
    ("build", "call", "precision"),
    [
        pytest.param(small, {}, "bfloat16", id="sd, bfloat16"),
        pytest.param(small, {}, "float16", id="sd, float16"),
        pytest.param(sdxl, {}, "bfloat16", id="sdxl, bfloat16", marks=pytest.mark.heavy),
        pytest.param(sdxl, {}, "float16", id="sdxl, float16", marks=pytest.mark.heavy),
        pytest.param(pixart, pixart_prompt(), "bfloat16", id="pixart, bfloat16"),
        pytest.param(pixart, pixart_prompt(), "float16", id="pixart, float16", marks=pytest.mark.heavy),
    ],
)
def test_close_to_float32(build: Any, call: dict[str, Any], precision: str) -> None:
    pipe = build()
    expected = drawn(pipe, **call)
    result = drawn(pipe, precision, **call)
    assert result.dtype == torch.float32
    assert 0 < difference(result, expected) < MOST[precision]


def test_nothing_of_the_pipeline_changes() -> None:
    pipe = small()
    before = {name: (each, each.clone(), each.dtype) for name, each in pipe.unet.state_dict(keep_vars=True).items()}
    plain = run(pipe, steps=2)
    tgate_compile.optimize(pipe, 2, backend="eager", precision="bfloat16")
    run(pipe, steps=4)
    assert pipe.unet.dtype == pipe.dtype == torch.float32
    caches = {site.cache_dtype for variant, _ in pipe._tgate_compile.hook.store.variants for site in variant.reused}
    assert caches == {torch.bfloat16}
    tgate_compile.restore(pipe)
    for name, each in pipe.unet.state_dict(keep_vars=True).items():
        same, values, dtype = before[name]
        assert each is same
        assert each.dtype == dtype
        assert torch.equal(each, values)
    assert torch.equal(run(pipe, steps=2), plain)


def test_the_pipelines_own_dtype_changes_nothing() -> None:
    pipe = small()
    expected = drawn(pipe)
    assert torch.equal(drawn(pipe, "float32"), expected)
    pipe = small().to(torch.bfloat16)
    assert torch.equal(drawn(pipe, "bfloat16"), drawn(pipe))


def test_a_bfloat16_pipeline_in_float32() -> None:
    pipe = small().to(torch.bfloat16)
    exact = small().to(torch.bfloat16).to(torch.float32)  # the same rounded weights
    own, raised, expected = drawn(pipe), drawn(pipe, "float32"), drawn(exact)
    assert raised.dtype == torch.bfloat16
    assert difference(raised.float(), expected) < difference(own.float(), expected)


def graph_of(build: Any, **call: Any) -> tuple[Any, list[str]]:
    pipe = build()
    tgate_compile.optimize(pipe, 2, backend="eager")
    run(pipe, steps=3, **call)
    (variant, _), *_ = pipe._tgate_compile.hook.store.variants
    placeholders = variant.program.graph.find_nodes(op="placeholder")
    return variant.program.graph_module, [node.name for node in placeholders][: len(variant.weights)]


def test_the_dtypes_of_operators() -> None:
    graph_module, weights = graph_of(small)
    nodes = len(graph_module.graph.nodes)
    changed, given = change_precision(graph_module, weights, torch.float32, torch.bfloat16)
    assert len(graph_module.graph.nodes) == nodes
    assert given == set(weights)
    changed.graph.lint()
    for node in changed.graph.nodes:
        if node.target in _PRODUCTS | _NORMS:
            assert node.meta["val"].dtype == torch.bfloat16, node.format_node()
        if node.target in (torch.ops.aten.sin.default, torch.ops.aten.cos.default, torch.ops.aten.exp.default):
            assert node.meta["val"].dtype == torch.float32, node.format_node()
    (old,), (new,) = (each.graph.output_node().args for each in (graph_module, changed))
    assert [node.meta["val"].dtype for node in new] == [node.meta["val"].dtype for node in old]
    # Each value is cast once, and the residual stream is not.
    casts = changed.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)
    assert len({(node.args[0], node.args[1]) for node in casts}) == len(casts) < 20


def test_changing_nothing_is_an_identity() -> None:
    graph_module, weights = graph_of(small)
    changed, _ = change_precision(graph_module, weights, torch.float32, torch.float32)
    cast = torch.ops.aten.to.dtype
    before, after = (
        [node.target for node in each.graph.nodes if node.op == "call_function" and node.target is not cast]
        for each in (graph_module, changed)
    )
    assert after == before


def test_changed_weights_are_seen() -> None:
    pipe = small()
    add_lora(pipe.unet)
    tgate_compile.optimize(pipe, 2, backend="eager", precision="bfloat16")
    first = run(pipe, steps=4)
    assert torch.equal(run(pipe, steps=4), first)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(2)  # not seen by torch's version counters
    changed = run(pipe, steps=4)
    assert_differ(changed, first)
    tgate_compile.restore(pipe)
    assert torch.equal(drawn(pipe, "bfloat16"), changed)


def test_both_graphs_share_one_copy_of_the_weights() -> None:
    pipe = small()
    tgate_compile.optimize(pipe, 2, backend="eager", precision="bfloat16")
    run(pipe, steps=4)
    full, pruned = pipe._tgate_compile.hook.store.compiled
    copies = {id(tensor) for tensor in full.runner._runner._given}
    assert {id(tensor) for tensor in pruned.runner._runner._given} <= copies
    assert all(tensor.dtype == torch.bfloat16 for tensor in full.runner._runner._given)


def test_copies_of_convolutions_weights_are_channels_last() -> None:
    pipe = small()
    strides = {name: each.stride() for name, each in pipe.unet.named_parameters()}
    tgate_compile.optimize(pipe, 2, backend="eager", precision="bfloat16")
    run(pipe, steps=4)
    full, _ = pipe._tgate_compile.hook.store.compiled
    kernels = [each for each in full.runner._runner._given if each.ndim == 4 and each.shape[-1] > 1]
    assert kernels
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in kernels)
    assert {name: each.stride() for name, each in pipe.unet.named_parameters()} == strides


def test_weights_are_laid_out_for_inductor_on_a_gpu_in_their_own_dtype() -> None:
    """Without a GPU: what the rewrite does to the graph, and to a weight that has the layout already."""
    graph_module, weights = graph_of(small)
    changed = copy_graph(graph_module)
    names = choice._to_channels_last(changed, weights)
    assert len(names) > 5
    for node in changed.graph.find_nodes(op="placeholder"):
        assert (node.meta["val"].ndim == 4) >= (node.name in names)
    assert not changed.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    copies, form = choice._Copies(), choice._Form(None, channels_last=True)
    weight = torch.randn(8, 4, 3, 3)
    (laid_out,) = copies.of(["a"], [weight], [form])
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out, weight)
    weight.add_(1)
    (after,) = copies.of(["a"], [weight], [form])
    assert after is laid_out  # the same address, which a CUDA graph has recorded
    assert torch.equal(after, weight)
    first = weight.contiguous(memory_format=torch.channels_last)
    kept = first.clone()
    (same,) = copies.of(["b"], [first], [form])
    assert same.data_ptr() == first.data_ptr()  # no copy
    (other,) = copies.of(["b"], [first + 1], [form])
    assert torch.equal(other, first + 1)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.heavy)])
def test_in_openvino(precision: str) -> None:
    pytest.importorskip("openvino")
    pipe = small()
    expected = drawn(pipe)
    result = drawn(pipe, precision, "openvino")
    assert 0 < difference(result, expected) < MOST[precision]


@pytest.mark.heavy
def test_in_inductor() -> None:
    pipe = stable_diffusion(layout="least")
    expected = drawn(pipe)
    assert 0 < difference(drawn(pipe, "bfloat16", "inductor"), expected) < MOST["bfloat16"]


@pytest.mark.heavy
def test_in_onnx_runtime() -> None:
    pytest.importorskip("onnxruntime")
    pipe = small()
    expected = drawn(pipe)
    assert 0 < difference(drawn(pipe, "float16", "onnxruntime"), expected) < MOST["float16"]


def test_onnx_runtime_refuses_bfloat16_on_a_cpu() -> None:
    pytest.importorskip("onnxruntime")
    pipe = small()
    tgate_compile.optimize(pipe, 2, backend="onnxruntime", precision="bfloat16")
    with pytest.raises(BackendError, match=r"kernels.*openvino"):
        run(pipe, steps=3)


def test_automatic_takes_a_backend_that_can(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    pipe = tgate_compile.optimize(small(), 2, precision="bfloat16")
    with caplog.at_level(logging.INFO, "tgate_compile.engine.choice"):
        run(pipe, steps=3)
    assert tgate_compile.describe(pipe).served_by == ("openvino",)
    assert "onnxruntime (not used: " in caplog.text


def test_bfloat16_is_suggested_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    choice.fast_bfloat16.cache_clear()
    choice._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "tgate_compile.engine.choice"):
        for dtype in (torch.bfloat16, torch.float32, torch.float32):
            tgate_compile.optimize(small().to(dtype), 2)
        tgate_compile.optimize(small(), 2, precision="float32")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "(AVX512-BF16)" in message
    assert 'precision="bfloat16"' in message
    choice.fast_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "bf16"}, '"bfloat16", "float16", but got \'bf16\''),
        ({"precision": torch.bfloat16}, 'Use precision="bfloat16"'),
        ({"backend": "openvino", "backend_options": {"precision": "bfloat16"}}, "precision='bfloat16'"),
    ],
)
def test_wrong_values(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        tgate_compile.optimize(small(), 2, **options)
    assert words in str(error.value)


def test_quantized_weights_are_refused() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    pipe = small()
    torchao.quantize_(pipe.unet, torchao.Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedModelError, match="quantized"):
        tgate_compile.optimize(pipe, 2, precision="bfloat16")


def test_no_bundle_of_another_precision(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(small(), 2, backend="eager", precision="bfloat16")
    with pytest.raises(ConfigurationError, match="without precision"):
        tgate_compile.export(pipe, tmp_path / "bundle", call={"prompt": "a fox"})


def test_graphs_that_take_a_weight_in_different_forms_have_copies_of_their_own() -> None:
    """Compiled code reads a weight by the strides that it was compiled for."""
    copies, weight = _Copies(), torch.randn(4, 3, 3, 3)
    forms = [_Form(torch.bfloat16, channels_last) for channels_last in (False, True, False)]
    plain, laid_out, again = (copies.of(["conv"], [weight], [form])[0] for form in forms)
    assert plain.is_contiguous()
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert not laid_out.is_contiguous()
    assert again is plain
    assert torch.equal(plain, laid_out)
