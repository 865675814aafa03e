"""Bundles of format "executorch": methods of one program that share their weights, with the results of `optimize`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import difference
from tests.exported import COMPILED_GATE as GATE
from tests.exported import COMPILED_STEPS as STEPS
from tests.exported import exported_compiled, least, least_pixart
from tests.test_joint_guidance import run as denoised
from tests.tiny_joint import JOINT
from tests.tiny_pipelines import pixart_prompt, run
from tgate_compile import BackendError, BundleError, ConfigurationError
from tgate_compile._cli.app import app
from tgate_compile.bundle.read import read_bundle
from tgate_compile.exports.executorch import save as executorch_graphs
from tgate_compile.exports.executorch.open import ExecuTorchSession

pytestmark = pytest.mark.heavy

pytest.importorskip("executorch", reason="needs ExecuTorch")

#: XNNPACK adds in a different order.
CLOSE = 1e-4
CPU = torch.device("cpu")
PROGRAM = "graphs/graphs.pte"
CALL = {"prompt": "", "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported_compiled("executorch")


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle, to be damaged."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


# Supported calls and pipelines.


def test_as_after_optimize(bundle: Path) -> None:
    calls: list[dict[str, Any]] = [{}, {"prompt": "a dog"}, {"steps": 6, "gate_step": 4}]
    pipe = least()
    before = run(pipe, steps=STEPS)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = [run(pipe, **{"steps": STEPS, **call}) for call in calls]
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, bundle)
    for call, wanted in zip(calls, expected, strict=True):
        assert difference(run(pipe, **{"steps": STEPS, **call}), wanted) < CLOSE
    with pytest.raises(BundleError, match=r"supports sample float32\[2, 4, 8, 8\]"):
        run(pipe, prompt=["red", "cat"], steps=STEPS)
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe, steps=STEPS), before)


@pytest.mark.parametrize(
    ("method", "call", "names"),
    [
        ({"deepcache_interval": 2}, {}, {"full", "pruned", "pruned-shallow"}),
        ({}, {"guidance_scale": 1.0}, {"full-unguided", "pruned"}),
    ],
)
def test_other_schedules(method: dict[str, Any], call: dict[str, Any], names: set[str], tmp_path: Path) -> None:
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager", **method)
    expected = run(pipe, steps=STEPS, **call)
    folder = tgate_compile.export(
        pipe, tmp_path / "bundle", "executorch", call={**CALL, **call}, format_options={"delegate": "portable"}
    )
    assert set(read_bundle(folder).manifest.graphs) == names
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder, backend="executorch")
    assert difference(run(pipe, steps=STEPS, **call), expected) < CLOSE


def test_a_transformer(tmp_path: Path) -> None:
    """Its timestep is expanded, and its GELUs are approximate, which XNNPACK would mistake for exact ones."""
    pipe = least_pixart()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = run(pipe, steps=STEPS, **pixart_prompt())
    call = {**pixart_prompt(), "num_inference_steps": STEPS}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "executorch", call=call)
    parities = [graph.parity for graph in read_bundle(folder).manifest.graphs.values()]
    assert all(parity is not None and parity.relative < 1e-5 for parity in parities)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe, steps=STEPS, **pixart_prompt()), expected) < CLOSE


def test_joint_attention(tmp_path: Path) -> None:
    """The caches are the text's keys and values, and the graph after the gate is without its tokens."""
    joint = JOINT["StableDiffusion3Pipeline"]
    pipe, call = joint.build(), joint.call(1) | {"num_inference_steps": STEPS}
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = denoised(pipe, **call)
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "executorch", call={**call, "output_type": "latent"})
    graphs = read_bundle(folder).manifest.graphs
    assert {spec.name.rpartition(".")[2] for spec in graphs["pruned"].cache_inputs} == {"key", "value"}
    assert "encoder_hidden_states" not in [spec.name for spec in graphs["pruned"].inputs]
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(denoised(pipe, **call), expected) < CLOSE


def test_the_contents_of_a_bundle(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    assert manifest.graph_format == "executorch"
    assert manifest.versions.runtime.startswith("executorch 1.")
    assert set(manifest.files) == {PROGRAM}
    assert manifest.weights is None
    assert manifest.sizes == {}
    for name, graph in manifest.graphs.items():
        assert (graph.file, graph.entry) == (PROGRAM, name)
        assert graph.facts.nodes < 10  # XNNPACK runs nearly all of it, in two pieces
        assert graph.parity is not None
        assert 0 < graph.parity.relative < 1e-5
    result = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    assert "verified: 1 file" in result.stdout


def test_weights_are_stored_once(bundle: Path) -> None:
    graphs = read_bundle(bundle).manifest.graphs.values()
    size = sum(parameter.nbytes for parameter in least().unet.parameters())
    assert sum(4 * graph.facts.parameters for graph in graphs) > 1.9 * size
    assert (bundle / PROGRAM).stat().st_size < 1.25 * size


# Calls and bundles that are refused.


def change_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_program(folder: Path, content: bytes) -> None:
    """Change the program and the manifest's hash, as in a deliberately modified bundle."""
    (folder / PROGRAM).write_bytes(content)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda manifest: manifest["files"].update({PROGRAM: record}))


def test_programs_that_are_none(folder: Path) -> None:
    content = (folder / PROGRAM).read_bytes()
    for damaged in (b"", b"no program", content[:5000], content[:-100_000], b"\0" * 64 + content[64:]):
        change_program(folder, damaged)
        with pytest.raises(BundleError, match=r"could not read .*graphs\.pte"):
            read_bundle(folder)


def test_a_program_whose_graphs_are_damaged(folder: Path) -> None:
    """Only XNNPACK checks its own part, when that is loaded."""
    content = (folder / PROGRAM).read_bytes()
    change_program(folder, content.replace(b"XN00", b"XN99").replace(b"XH00", b"XH99"))
    graph = read_bundle(folder).manifest.graphs["pruned"]
    with pytest.raises(BackendError, match=r"could not load pruned"):
        executorch_graphs.open_graph(graph, folder, CPU, {})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda graphs: graphs["full"].update(entry=None), "must be methods of"),
        (lambda graphs: graphs["full"].update(entry="pruned"), "must be methods of"),
        (lambda graphs: graphs["full"]["inputs"][0].update(dtype="float16"), "has the inputs float32"),
        (lambda graphs: graphs["full"]["outputs"][0].update(shape=[2, 4, 8, 9]), "has the outputs float32"),
    ],
)
def test_a_manifest_that_differs(folder: Path, change: Callable[[Any], object], part: str) -> None:
    change_manifest(folder, lambda manifest: change(manifest["graphs"]))
    with pytest.raises(BundleError, match=part):
        read_bundle(folder)


def test_a_method_that_is_not_there(folder: Path) -> None:
    manifest = read_bundle(folder).manifest
    graph = manifest.graphs["full"].model_copy(update={"entry": "shallow"})
    other = manifest.model_copy(update={"graphs": {**manifest.graphs, "shallow": graph}})
    with pytest.raises(BundleError, match=r"has the methods full, pruned.* says full, pruned, shallow"):
        executorch_graphs.check_graph(graph, folder, other)
    with pytest.raises(BackendError, match="could not load shallow"):
        ExecuTorchSession(graph, folder, CPU)


def test_inputs_that_the_method_does_not_take(bundle: Path) -> None:
    session = ExecuTorchSession(read_bundle(bundle).manifest.graphs["full"], bundle, CPU)
    with pytest.raises(BackendError, match="could not run full"):
        session.run([torch.zeros(1, 2, 3)])


def test_other_devices(bundle: Path) -> None:
    graph = read_bundle(bundle).manifest.graphs["full"]
    with pytest.raises(BackendError, match=r"runs on the CPU.*mps"):
        executorch_graphs.open_graph(graph, bundle, torch.device("mps"), {})


# Exports that are refused.


def test_options(bundle: Path, tmp_path: Path) -> None:
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    wrong: list[tuple[dict[str, Any], list[str]]] = [
        ({"format_options": {"fast": True}}, ["'fast'", "delegate"]),
        ({"format_options": {"delegate": "vulkan"}}, ['"xnnpack" or "portable"', "'vulkan'"]),
        ({"dynamic": ["batch"]}, ["only fixed sizes", "['batch']"]),
    ]
    for options, parts in wrong:
        with pytest.raises(ConfigurationError) as caught:
            tgate_compile.export(pipe, tmp_path / "bundle", "executorch", **options)
        assert all(part in str(caught.value) for part in parts)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match=r"'threads'"):
        tgate_compile.load(least(), bundle, backend_options={"threads": 1})
    with pytest.raises(ConfigurationError, match=r"export.*load"):
        tgate_compile.optimize(least(), GATE, backend="executorch")


def test_caches_without_a_kernel(tmp_path: Path) -> None:
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager", cache_dtype=torch.float8_e4m3fn)
    with pytest.raises(BundleError, match=r"Nothing has been written"):
        tgate_compile.export(
            pipe, tmp_path / "bundle", "executorch", call=CALL, format_options={"delegate": "portable"}
        )
    assert list(tmp_path.iterdir()) == []
