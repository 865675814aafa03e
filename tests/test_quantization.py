"""Quantized bundles: smaller, close to the float ones, with one weights file, and documented in the manifest."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import difference
from tests.exported import GATE, STEPS, exported, plain
from tests.programs import noise, program, psnr
from tests.programs import plain as plain_program
from tests.tiny_pipelines import PROMPT, PROMPTS, run
from tgate_compile import BundleError, ConfigurationError, UnsupportedModelError
from tgate_compile._cli.app import app
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.manifest import Manifest
from tgate_compile.bundle.parity import QUANTIZED_TOLERANCE
from tgate_compile.bundle.quantization import CALIBRATED, SCHEMES, SKIPPED, Quantization, read_quantization
from tgate_compile.bundle.read import read_bundle
from tgate_compile.exports.onnx.quantize import quantized_by_block, quantized_by_channel
from tgate_compile.runtime import BundlePipeline

#: The graphs of the bundle.
GRAPHS = ["full-prelude", "full-table", "full", "pruned-table", "pruned"]
#: The largest difference of the latents, relative to their largest value. Random weights are the worst case: 8 bits of
#: a channel are off by 0.4 % of its largest weight, and 4 bits of a block by 7 %. Measured: about half of these.
FAR = {"int8": 0.03, "int4": 0.3, "int8-dynamic": 0.03, "int8-static": 0.06}
#: Share of the weights' bytes in float32, of which 8 bits are a quarter. Biases, norms, scales and unquantized layers
#: are large in such a small model.
SHARE = {"int8": 0.45, "int4": 0.42, "int8-dynamic": 0.45, "int8-static": 0.5}


@functools.cache
def quantized(scheme: str) -> Path:
    """Return a quantized bundle of `plain()`, as `exported()` does."""
    pipe = plain()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home)
    quantize: dict[str, Any] = {"scheme": scheme}
    if scheme in CALIBRATED:
        quantize |= {"calibration_prompts": list(PROMPTS), "calibration_steps": 2}
    call = {"prompt": "", "num_inference_steps": STEPS}
    return tgate_compile.export(pipe, Path(home, "bundle"), call=call, dynamic=False, quantize=quantize)


def manifest_of(folder: Path) -> Manifest:
    return read_bundle(folder).manifest


@functools.cache
def float_latents() -> torch.Tensor:
    pipe = tgate_compile.load(plain(), exported())
    latents: torch.Tensor = run(pipe, steps=STEPS)
    return latents


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme(scheme: str) -> None:
    folder = quantized(scheme)
    manifest = manifest_of(folder)
    assert manifest.quantization is not None
    assert manifest.quantization.scheme == scheme
    assert manifest.quantization.graphs == GRAPHS
    assert manifest.quantization.keep == list(SKIPPED)
    assert manifest.denoiser.weights_digest == manifest_of(exported()).denoiser.weights_digest

    sizes = [(one / "graphs/weights.bin").stat().st_size for one in (folder, exported())]
    assert sizes[0] < SHARE[scheme] * sizes[1]
    for graph in manifest.graphs.values():
        assert graph.parity is not None
        assert graph.parity.tolerance == QUANTIZED_TOLERANCE
        assert 1e-5 < graph.parity.relative <= QUANTIZED_TOLERANCE

    pipe = tgate_compile.load(plain(), folder)
    assert 1e-5 < difference(run(pipe, steps=STEPS), float_latents()) < FAR[scheme]


@pytest.mark.parametrize(
    "scheme", [one if one.startswith("int8-") else pytest.param(one, marks=pytest.mark.heavy) for one in SCHEMES]
)
def test_weights_are_there_once(scheme: str) -> None:
    folder = quantized(scheme)
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for name in ("full", "pruned"):
        model = onnx.load_model(folder / f"graphs/{name}.onnx", load_external_data=False)
        onnx.checker.check_model(folder / f"graphs/{name}.onnx")
        external = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer}
        places[name] = {key: (int(one["offset"]), int(one["length"])) for key, one in external.items() if one}
    shared = places["full"].keys() & places["pruned"].keys()
    # Biases of static graphs have the scales of their layers' inputs, which differ between the graphs.
    weights = [name for name in shared if "bias" not in name and not name.endswith(("_scale", "_zero_point"))]
    assert len(weights) > 20
    assert all(places["full"][name] == places["pruned"][name] for name in weights)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_products_of_integers_fit_into_16_bits(scheme: str) -> None:
    """CPUs without VNNI add two products in 16 bits; with weights of 8 bits, images there were wrong by a third."""
    path = quantized(scheme) / "graphs/full.onnx"
    model = onnx.load_model(path)
    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    factors, zeros = [], []
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            factors.append(values[node.input[1]])
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            taken, weight = (makers.get(name) for name in node.input[:2])
            if weight is not None and taken is not None and taken.op_type == "DequantizeLinear":
                factors.append(values[weight.input[0]])
                zeros.append(values[taken.input[2]])
    assert len(factors) > 5
    assert all(each.dtype == np.int8 for each in factors)
    assert 60 <= max(abs(each.astype(int)).max() for each in factors) <= 64
    # OpenVINO's convolutions of signed activations are wrong without VNNI as well.
    assert all(each.dtype == np.uint8 for each in zeros)
    assert bool(zeros) == (scheme == "int8-static")


def test_calibration_sees_both_sides_of_the_gate() -> None:
    quantization = manifest_of(quantized("int8-static")).quantization
    assert quantization is not None
    assert quantization.calibration is not None
    assert quantization.calibration.prompts == list(PROMPTS)
    # The first and the last step of each graph in both generations.
    assert quantization.calibration.steps == {
        name: ([0, GATE - 1] if name.startswith("full") else [GATE, STEPS - 1]) * len(PROMPTS) for name in GRAPHS
    }


@pytest.mark.heavy
def test_calibration_has_the_calls_batch(tmp_path: Path) -> None:
    pipe = plain()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    call = {"prompt": ["", ""], "num_inference_steps": STEPS}
    quantize = {"scheme": "int8-static", "calibration_prompts": [PROMPTS[0]], "calibration_steps": 1}
    folder = tgate_compile.export(pipe, tmp_path / "b", call=call, dynamic=False, quantize=quantize)
    (latents,) = (spec for spec in manifest_of(folder).graphs["pruned"].inputs if len(spec.shape) == 4)
    assert latents.shape[0] == 2


def test_the_full_graph_alone_is_refused(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    call = {"prompt": "", "num_inference_steps": STEPS}
    with pytest.raises(ConfigurationError, match="graphs of quantize must be"):
        tgate_compile.export(pipe, tmp_path / "b", call=call, quantize={"scheme": "int8", "graphs": "full"})


@pytest.mark.heavy
def test_the_pruned_graph_alone(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    call = {"prompt": "", "num_inference_steps": STEPS}
    quantize = {"scheme": "int8", "graphs": "pruned"}
    folder = tgate_compile.export(pipe, tmp_path / "b", call=call, dynamic=False, quantize=quantize)
    manifest = manifest_of(folder)
    assert manifest.quantization is not None
    assert manifest.quantization.graphs == ["pruned-table", "pruned"]
    full, pruned = manifest.graphs["full"].parity, manifest.graphs["pruned"].parity
    assert full is not None
    assert pruned is not None
    assert (full.tolerance, pruned.tolerance) == (1e-4, QUANTIZED_TOLERANCE)


@pytest.mark.heavy
def test_a_program_in_8_bits(tmp_path: Path) -> None:
    pipe = plain_program()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    call = {"prompt": "", "num_inference_steps": STEPS}
    folder = tgate_compile.export(
        pipe, tmp_path / "b", call=call, dynamic=("batch",), components="all", quantize="int8"
    )
    images = [BundlePipeline(one, threads=1)(PROMPT, latents=noise(), output="numpy") for one in (folder, program())]
    assert psnr(*images) > 35  # 8-bit pixels alone give 59 dB; random weights amplify errors
    assert not np.array_equal(*images)
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert f"quantized: int8 in {', '.join(GRAPHS)}, except conv_in" in result.output


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7), (8, 1)])
def test_a_channel_is_off_by_half_a_step(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.rand(shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    few = quantized_by_channel(weight, 0)
    step = weight.abs().flatten(1).amax(1) / 127
    off = (few.dequantized() - weight).abs().flatten(1).amax(1)
    assert few.values.dtype == torch.int8
    assert (off <= 0.501 * step).all()
    other = quantized_by_channel(weight.movedim(0, 1).contiguous(), 1)
    assert torch.equal(other.dequantized().movedim(1, 0), few.dequantized())


def test_blocks_and_zeros() -> None:
    weight = torch.randn((64, 3), generator=torch.Generator().manual_seed(0))
    weight[32:] = 0
    few = quantized_by_block(weight, 32)
    assert few.scales.shape == (2, 3)
    assert few.values.abs().max() == 7
    assert (few.dequantized()[32:] == 0).all()
    assert (few.dequantized() - weight).abs().max() <= 0.501 * weight.abs().max() / 7


def test_half_precision() -> None:
    weight = (torch.randn((4, 16), generator=torch.Generator().manual_seed(0)) * 1e-3).half()
    few = quantized_by_channel(weight, 0)
    assert few.scales.dtype == torch.float16
    assert (few.dequantized() - weight).abs().max() < 0.02 * weight.abs().max()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int9", "must be one of"),
        (8, "quantize must be None, one of"),
        ({"graphs": "all"}, "quantize must be None, one of"),
        ({"scheme": "int8", "bits": 8}, 'unknown settings: "bits"'),
        ({"scheme": "int8", "skip": "conv_in"}, "must be a list of layer name patterns"),
        ({"scheme": "int4", "block": 20}, "block of quantize must be one of 16"),
        ({"scheme": "int8-static", "calibration_prompts": "a cat"}, "must be a list of strings"),
        ({"scheme": "int8-static", "calibration_steps": 0}, "a positive integer"),
        ({"scheme": "int8", "calibration_prompts": ["a cat"]}, "needs no calibration"),
    ],
)
def test_invalid_values(given: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_quantization(given, "onnx", SCHEMES)


def test_formats_list_their_schemes() -> None:
    assert read_quantization(None, "onnx", ()) is None
    assert read_quantization("int4", "onnx", ("int8", "int4")) == Quantization("int4")
    with pytest.raises(ConfigurationError, match="format=\"x\" supports only quantize='int8', but got quantize='int4'"):
        read_quantization("int4", "x", ("int8",))
    with pytest.raises(ConfigurationError, match='format="aoti" supports no quantization'):
        read_quantization("int8", "aoti", FORMATS["aoti"].schemes)


def test_integer_schemes_are_for_float32(tmp_path: Path) -> None:
    pipe = plain().to(torch.float16)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(UnsupportedModelError, match="this denoiser is in float16"):
        tgate_compile.export(
            pipe, tmp_path / "b", call={"prompt": "", "num_inference_steps": 4}, dynamic=False, quantize="int8-dynamic"
        )
    assert not (tmp_path / "b").exists()


def test_older_manifests_have_no_quantization(tmp_path: Path) -> None:
    folder = shutil.copytree(exported(), tmp_path / "b")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("quantization") is None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert manifest_of(folder).quantization is None


def test_missing_graphs(tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("int8"), tmp_path / "b")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["quantization"]["graphs"].append("other")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"quantization\.graphs"):
        read_bundle(folder)


def test_from_the_command_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "--out", str(tmp_path / "b"), "--quantize-option", "block=16"])
    assert result.exit_code == 1
    assert "--quantize-option needs --quantize" in result.output
    result = CliRunner().invoke(
        app, ["export", "--out", str(tmp_path / "b"), "--quantize", "int4", "--quantize-option", "block=5"]
    )
    assert result.exit_code == 1
    assert "block of quantize must be one of 16" in result.output
