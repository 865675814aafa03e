"""ExecuTorch programs with integer layers: close to the float ones, smaller, with one copy of the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Node

import tgate_compile
from tests.comparing import difference
from tests.exported import least, least_pixart
from tests.tiny_pipelines import PROMPTS, pixart_prompt, run
from tgate_compile import ConfigurationError, UnsupportedModelError
from tgate_compile.bundle.manifest import Manifest
from tgate_compile.bundle.parity import QUANTIZED_TOLERANCE
from tgate_compile.bundle.quantization import Quantization
from tgate_compile.bundle.read import read_bundle

pytest.importorskip("executorch", reason="needs ExecuTorch")

from tgate_compile.exports.executorch.convert import Integers, xnnpack_integers

GATE, STEPS = 2, 4
CALL = {"prompt": "", "num_inference_steps": STEPS}
PROGRAM = "graphs/graphs.pte"
operators = torch.ops.quantized_decomposed


class _Layers(torch.nn.Module):
    """A convolution and linear layers on its channels."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.linear = torch.nn.Linear(8, 16, bias=False)
        self.last = torch.nn.Linear(16, 4, bias=False)
        for parameter in self.parameters():
            parameter.data *= size

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        rows = self.conv(value).flatten(2).transpose(1, 2)
        return self.last(torch.nn.functional.silu(self.linear(rows)))  # type: ignore[no-any-return]


def integers(scheme: Any, keep: tuple[str, ...] = ("last",), calls: int = 3) -> Integers:
    return Integers(Quantization(scheme, skip=keep), [[latents(seed)] for seed in range(calls)])


def latents(seed: int) -> torch.Tensor:
    return torch.randn((2, 4, 6, 6), generator=torch.Generator().manual_seed(seed))


def layers_of(program: torch.export.ExportedProgram) -> dict[str, bool]:
    """Return whether the weight of each layer is an integer."""

    def is_integer(node: Node) -> bool:
        weight = node.args[1]
        assert isinstance(weight, Node)
        return weight.target is operators.dequantize_per_channel.default

    aten = torch.ops.aten
    layers = [node for node in program.graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]
    names = [str(node.target).split(".")[1] for node in layers]
    return {f"{name} {at}": is_integer(node) for at, (name, node) in enumerate(zip(names, layers, strict=True))}


@pytest.mark.parametrize(("scheme", "convolution"), [("int8-dynamic", False), ("int8-static", True)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_layers(scheme: str, convolution: bool, size: float) -> None:
    """Even small weights are quantized, although the quantizer's own scales have a minimum."""
    module = _Layers(size)
    before = copy.deepcopy(module.state_dict())
    program = torch.export.export(module, (latents(0),), strict=False)
    quantized = xnnpack_integers(program, integers(scheme))
    assert layers_of(quantized) == {"conv2d 0": convolution, "linear 1": True, "linear 2": False}
    value = latents(1)
    assert 1e-5 < difference(quantized.module()(value), module(value)) < 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert layers_of(program) == dict.fromkeys(["conv2d 0", "linear 1", "linear 2"], False)


@pytest.mark.heavy
def test_layers_that_are_kept() -> None:
    program = torch.export.export(_Layers(), (latents(0),), strict=False)
    quantized = xnnpack_integers(program, integers("int8-static", ("conv", "la*")))
    assert layers_of(quantized) == {"conv2d 0": False, "linear 1": True, "linear 2": False}
    quantized = xnnpack_integers(program, integers("int8-static", ("*",)))
    value = latents(1)
    assert torch.equal(quantized.module()(value), program.module()(value))


def test_ranges_are_those_of_the_calls() -> None:
    """Values beyond the ranges are clipped; a dynamic scheme needs no calls."""
    program = torch.export.export(_Layers(), (latents(0),), strict=False)
    static = xnnpack_integers(program, integers("int8-static", calls=1)).module()
    dynamic = xnnpack_integers(program, integers("int8-dynamic", calls=0)).module()
    expected = program.module()(20 * latents(0))
    assert difference(dynamic(20 * latents(0)), expected) < 0.05
    assert difference(static(20 * latents(0)), expected) > 0.5


def manifest_of(folder: Path) -> Manifest:
    return read_bundle(folder).manifest


def check_quantized(manifest: Manifest, names: set[str]) -> None:
    assert manifest.quantization is not None
    assert set(manifest.quantization.graphs) == names
    for name in names:
        parity = manifest.graphs[name].parity
        assert parity is not None
        assert parity.tolerance == QUANTIZED_TOLERANCE
        assert 1e-5 < parity.relative < 0.2
        assert manifest.graphs[name].facts.nodes < 20  # still run by XNNPACK


@pytest.mark.heavy
def test_a_transformer_in_int8(tmp_path: Path) -> None:
    pipe = least_pixart()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = run(pipe, steps=STEPS, **pixart_prompt())
    call = {**CALL, **pixart_prompt()}
    folder = tgate_compile.export(pipe, tmp_path / "b", "executorch", call=call, quantize="int8-dynamic")
    check_quantized(manifest_of(folder), {"full", "pruned"})
    size = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
    assert (folder / PROGRAM).stat().st_size < 0.6 * size
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert 1e-5 < difference(run(pipe, steps=STEPS, **pixart_prompt()), expected) < 0.06


@pytest.mark.heavy
def test_a_unet_in_int8(tmp_path: Path) -> None:
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = run(pipe, steps=STEPS)
    quantize = {"scheme": "int8-static", "calibration_prompts": list(PROMPTS), "calibration_steps": 2}
    folder = tgate_compile.export(pipe, tmp_path / "b", "executorch", call=CALL, quantize=quantize)
    manifest = manifest_of(folder)
    check_quantized(manifest, {"full", "pruned"})
    assert manifest.quantization is not None
    assert manifest.quantization.calibration is not None
    assert set(manifest.quantization.calibration.steps) == {"full", "pruned"}
    size = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    assert (folder / PROGRAM).stat().st_size < 0.7 * size  # both graphs share one copy of the weights
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert 1e-5 < difference(run(pipe, steps=STEPS), expected) < 0.2


@pytest.mark.sweep  # as with format="onnx", in test_quantization.py
def test_the_pruned_graph_alone(tmp_path: Path) -> None:
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    quantize = {"scheme": "int8-dynamic", "graphs": "pruned"}
    manifest = manifest_of(tgate_compile.export(pipe, tmp_path / "b", "executorch", call=CALL, quantize=quantize))
    check_quantized(manifest, {"pruned"})
    full = manifest.graphs["full"].parity
    assert full is not None
    assert full.relative < full.tolerance == 1e-4


def test_missing_features(tmp_path: Path) -> None:
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    for scheme in ("int8", "int4"):
        with pytest.raises(ConfigurationError, match=f"supports only .*'int8-dynamic' or .*'int8-static'.*'{scheme}'"):
            tgate_compile.export(pipe, tmp_path / "b", "executorch", call=CALL, quantize=scheme)
    with pytest.raises(ConfigurationError, match='is "portable"'):
        tgate_compile.export(
            pipe,
            tmp_path / "b",
            "executorch",
            call=CALL,
            quantize="int8-dynamic",
            format_options={"delegate": "portable"},
        )
    half = least().to(torch.float16)
    tgate_compile.optimize(half, GATE, backend="eager")
    with pytest.raises(UnsupportedModelError, match="this denoiser is in float16"):
        tgate_compile.export(half, tmp_path / "b", "executorch", call=CALL, quantize="int8-dynamic")
    assert list(tmp_path.iterdir()) == []
