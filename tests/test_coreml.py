"""`format="coreml"`: converted and inspected here; Core ML itself runs only on Apple devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_compile
from tests.exported import GATE, STEPS, plain
from tests.packages import need
from tests.tiny_pipelines import pixart, pixart_prompt
from tgate_compile import BackendError, BundleError, ConfigurationError, FirstBlockCache
from tgate_compile.bundle.manifest import Manifest
from tgate_compile.bundle.read import read_bundle
from tgate_compile.exports.coreml.save import PACKAGE, check_graph, feature_name

need("coremltools")  # it has no packages for some machines

CALL = {"prompt": "", "num_inference_steps": STEPS}
#: A call for steps that are decided at run time.
DECIDED = {**pixart_prompt(), "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def optimized() -> Any:
    return tgate_compile.optimize(plain(), GATE, backend="eager")


@pytest.fixture(scope="module")
def bundle(optimized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tgate_compile.export(optimized, tmp_path_factory.mktemp("coreml") / "bundle", "coreml", call=CALL)


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    """Read the manifest, which checks names, dtypes and shapes of each function."""
    return read_bundle(bundle).manifest


@pytest.mark.heavy
def test_functions_share_their_weights(bundle: Path, manifest: Manifest) -> None:
    assert {graph.file for graph in manifest.graphs.values()} == {PACKAGE}
    assert {name: graph.entry for name, graph in manifest.graphs.items()} == {"full": "full", "pruned": "pruned"}
    assert all(graph.parity is None for graph in manifest.graphs.values())
    assert manifest.weights is None
    assert manifest.sizes == {}
    (weights,) = [file.size for name, file in manifest.files.items() if name.endswith("weight.bin")]
    in_halves = sum(tensor.numel() * 2 for tensor in plain().unet.state_dict().values())
    assert weights < 1.1 * in_halves
    assert sorted(path.name for path in (bundle / "graphs").iterdir()) == ["graphs.mlpackage"]


@pytest.mark.heavy
def test_the_inputs_of_functions(bundle: Path, manifest: Manifest) -> None:
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((bundle / PACKAGE / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    full, pruned = model.description.functions
    assert model.description.defaultFunctionName == full.name == "full"
    assert [each.name for each in full.input] == ["sample", "timestep", "encoder_hidden_states"]
    caches = [feature_name(spec.name) for spec in manifest.graphs["full"].cache_outputs]
    assert [each.name for each in full.output] == ["out_sample", *caches]
    assert [each.name for each in pruned.input] == ["sample", "timestep", *caches]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"entry": "other"}, "not a Core ML package with a function other"),
        ({"file": "graphs/other.mlpackage"}, "does not exist"),
        ({"outputs": []}, "the manifest says"),
    ],
)
def test_other_functions(bundle: Path, manifest: Manifest, changed: dict[str, Any], problem: str) -> None:
    graph = manifest.graphs["full"].model_copy(update=changed)
    with pytest.raises(BundleError, match=problem):
        check_graph(graph, bundle, manifest)


@pytest.mark.heavy
def test_it_does_not_run_here(bundle: Path) -> None:
    with pytest.raises(BackendError, match="Apple devices"):
        tgate_compile.load(plain(), bundle)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"fast": 1}, ("'fast'", "minimum_deployment_target, precision")),
        ({"minimum_deployment_target": "iOS17"}, ('"iOS18"', "'iOS17'")),
        ({"precision": "int8"}, ('"float16" or "float32"', "'int8'")),
    ],
)
def test_options(optimized: Any, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tgate_compile.export(optimized, tmp_path / "bundle", "coreml", format_options=options)
    assert all(part in str(caught.value) for part in parts)


def test_measures_in_float16(tmp_path: Path) -> None:
    """The decision would depend on means that Core ML computes in float16."""
    pipe = tgate_compile.optimize(pixart(), FirstBlockCache(0.15), backend="eager")
    with pytest.raises(ConfigurationError, match=r'decided at run time.*"precision": "float32"'):
        tgate_compile.export(pipe, tmp_path / "bundle", "coreml", call=DECIDED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sweep
def test_measures_in_float32(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(pixart(), FirstBlockCache(0.15), backend="eager")
    options = {"precision": "float32"}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "coreml", call=DECIDED, format_options=options)
    assert set(read_bundle(folder).manifest.graphs) == {"full", "head", "tail", "finish"}


def test_float16(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(plain().to(torch.float16), GATE, backend="eager")
    with pytest.raises(BundleError, match=r"sample in float16.*Export the float32 model"):
        tgate_compile.export(pipe, tmp_path / "bundle", "coreml", call=CALL)
    assert list(tmp_path.iterdir()) == []
