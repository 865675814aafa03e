"""`format="openvino"`: graphs in OpenVINO's own format, one weights file, and the images of the eager graphs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import difference
from tests.exported import GATE, STEPS, exported, plain
from tests.tiny_pipelines import run
from tgate_compile import BundleError, ConfigurationError
from tgate_compile._cli.app import app
from tgate_compile.bundle.manifest import Graph
from tgate_compile.bundle.read import read_bundle
from tgate_compile.exports.openvino.save import check_ir

pytestmark = pytest.mark.heavy

pytest.importorskip("openvino", reason="OpenVINO has no packages for some machines")

#: OpenVINO adds in a different order.
CLOSE = 1e-4
CALL = {"prompt": "", "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    return tgate_compile.export(pipe, tmp_path_factory.mktemp("openvino") / "bundle", "openvino", call=CALL)


def eager(**call: Any) -> torch.Tensor:
    return run(tgate_compile.optimize(plain(), GATE, backend="eager"), **call)


def test_one_weights_file(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    assert sorted(manifest.files) == ["graphs/full.xml", "graphs/pruned.xml", "graphs/weights.bin"]
    assert manifest.versions.runtime.startswith("openvino 20")
    weights = sum(tensor.nbytes for tensor in plain().unet.state_dict().values())
    assert weights <= manifest.files["graphs/weights.bin"].size < 1.1 * weights
    for graph in manifest.graphs.values():
        assert graph.parity is not None
        assert graph.parity.provider == "OpenVINO, CPU"
        assert graph.parity.relative < 1e-5
        assert len(graph.parity.measured) == 2
        assert 50 < graph.facts.nodes < 2000


@pytest.mark.parametrize(
    "call", [{}, {"prompt": ["red", "cat"]}, {"height": 24, "width": 8, "num_images_per_prompt": 3}]
)
def test_sizes_that_each_call_chooses(bundle: Path, call: dict[str, Any]) -> None:
    pipe = tgate_compile.load(plain(), bundle)
    result = run(pipe, **call)
    assert difference(result, eager(**call)) < CLOSE
    assert torch.equal(run(pipe, **call), result)


def test_onnx_files_in_openvino() -> None:
    pipe = tgate_compile.load(plain(), exported(), backend="openvino", backend_options={"threads": 1})
    assert difference(run(pipe), eager()) < CLOSE


def test_bfloat16(tmp_path: Path) -> None:
    """The format `onnx` does not support it on CPUs."""
    pipe = tgate_compile.optimize(plain().to(torch.bfloat16), GATE, backend="eager")
    expected = run(pipe)
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "openvino", call=CALL, dynamic=False)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe).float(), expected.float()) < 6e-2


@pytest.mark.parametrize(
    ("scheme", "stored", "most", "dynamic"),
    [
        ("int8", "i8", 0.06, True),
        ("int4", "i4", 0.5, False),
        ("int8-dynamic", "i8", 0.06, True),
        ("int8-static", "i8", 0.1, False),
    ],
)
def test_weights_in_few_bits(tmp_path: Path, scheme: str, stored: str, most: float, dynamic: bool) -> None:
    """The weights are stored in few bits, and stay so in OpenVINO."""
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    expected = run(pipe)
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "openvino", call=CALL, quantize=scheme, dynamic=dynamic)
    manifest = read_bundle(folder).manifest
    weights = sum(tensor.nbytes for tensor in pipe.unet.state_dict().values())
    assert manifest.files["graphs/weights.bin"].size < 0.4 * weights  # two layers keep float weights
    for graph in ("full", "pruned"):
        assert f'type="Const" version="opset1"><data element_type="{stored}"' in _without_space(
            folder / f"graphs/{graph}.xml"
        )
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert 1e-4 < difference(run(pipe), expected) < most


def test_backends_and_options(bundle: Path) -> None:
    for options, parts in (
        ({"backend": "onnxruntime"}, ("openvino", "onnxruntime")),
        ({"backend_options": {"prepacking": True}}, ("prepacking", "device")),
        ({"backend_options": {"device": "NPU"}}, ('no device "NPU"',)),
    ):
        with pytest.raises(ConfigurationError) as caught:
            tgate_compile.load(plain(), bundle, **options)  # type: ignore[arg-type]
        assert all(part in str(caught.value) for part in parts)
    result = CliRunner().invoke(app, ["export", "--format", "openvino", "--format-option", "fast=1", "-o", "nowhere"])
    assert result.exit_code == 1
    assert "no options" in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('names="sample"', 'names="other"', "has other"),
        ('shape="?,4,?,?"', 'shape="?,3,?,?"', "says sample .*4"),
        ('output_names="out_sample"', 'output_names="out"', "says out_sample"),
        ('offset="', 'offset="99999999', "weights file that has only"),
        ('offset="', 'offset="-', "without a valid offset"),
        ("<net", '<!DOCTYPE net [<!ENTITY a "b">]><net', "a declaration"),
        ("</net>", "", "not a valid OpenVINO graph"),
    ],
)
def test_suspicious_files(bundle: Path, old: str, new: str, problem: str, tmp_path: Path) -> None:
    graph, size = _full(bundle)
    text = (bundle / graph.file).read_text()
    assert old in text
    path = tmp_path / "full.xml"
    path.write_text(text)
    inputs, outputs = [*graph.inputs, *graph.cache_inputs], [*graph.outputs, *graph.cache_outputs]
    check_ir(path, inputs, outputs, size)
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(BundleError, match=problem):
        check_ir(path, inputs, outputs, size)


def _full(bundle: Path) -> tuple[Graph, int]:
    manifest = read_bundle(bundle).manifest
    return manifest.graphs["full"], manifest.files["graphs/weights.bin"].size


def _without_space(path: Path) -> str:
    return re.sub(r">\s+<", "><", path.read_text())
