"""Bundles are untrusted when read, and written completely or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tgate_compile
from tests.exported import exported
from tgate_compile import BundleError, TGateError
from tgate_compile.bundle.manifest import SCHEMA_VERSION, WEIGHTS_FILE, json_schema
from tgate_compile.bundle.read import read_bundle
from tgate_compile.bundle.weights import (
    INDEX_FILE,
    WeightsFile,
    fetched,
    mapped_weights,
    tensor_bytes,
    write_weights,
)


@pytest.fixture(scope="module")
def original() -> Path:
    return exported()


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def change_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_model(folder: Path, change: Callable[[onnx.ModelProto], object], name: str = "graphs/full.onnx") -> None:
    """Change a graph and put its new hash into the manifest."""
    model = onnx.load_model(folder / name, load_external_data=False)
    change(model)
    content = model.SerializeToString()
    (folder / name).write_bytes(content)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda manifest: manifest["files"].update({name: record}))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(folder)
    for part in parts:
        assert part in str(caught.value)


# Content.


def test_the_contents_of_a_bundle() -> None:
    manifest = read_bundle(exported(binding_times=False)).manifest
    assert manifest.pipeline.class_name == "StableDiffusionPipeline"
    assert manifest.denoiser.component == "unet"
    assert manifest.denoiser.arguments == ["sample", "timestep", "encoder_hidden_states"]
    assert manifest.denoiser.constants["return_dict"] is False
    assert manifest.method.schedule["gate_step"] == 3
    assert manifest.example.strip == "FFFppp"
    assert [step.graph for step in manifest.example.steps] == ["full"] * 3 + ["pruned"] * 3
    assert manifest.example.steps[2].phase.merge == ["cross"]
    full, pruned = manifest.graphs["full"], manifest.graphs["pruned"]
    assert [(spec.name, spec.shape) for spec in full.inputs] == [
        ("sample", ["2*b", 4, "h", "w"]),
        ("timestep", []),
        ("encoder_hidden_states", ["2*b", 16, 32]),
    ]
    assert full.inputs[1].dtype == "float32"  # Euler's timesteps are not integers
    assert {name: size.example for name, size in manifest.sizes.items()} == {"b": 1, "h": 8, "w": 8}
    assert [spec.name for spec in pruned.inputs] == ["sample", "timestep"]
    sites = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    ]
    assert [spec.name for spec in pruned.cache_inputs] == [f"cache.{site}" for site in sites]
    assert [(wire.graph, wire.output, wire.to_graph, wire.to_input) for wire in manifest.wiring] == [
        ("full", f"cache.{site}", "pruned", f"cache.{site}") for site in sites
    ]
    for graph in manifest.graphs.values():
        assert graph.parity is not None
        assert 0 < graph.parity.relative < 1e-5
        assert len(graph.parity.measured) == 2


def test_the_graphs_are_valid_and_share_their_weights(original: Path) -> None:
    taken: dict[str, set[tuple[int, int]]] = {}
    for name in ("full-prelude", "full-table", "full", "pruned-table", "pruned"):
        path = original / f"graphs/{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        tensors = onnx.load_model(path, load_external_data=False).graph.initializer
        places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
        assert {place["location"] for place in places if place} == {"weights.bin"}
        of_parts = taken.setdefault(name.partition("-")[0], set())
        of_parts |= {(int(place["offset"]), int(place["length"])) for place in places if place}
    assert taken["pruned"] < taken["full"]
    weights = sum(length for _, length in taken["full"])
    assert weights <= (original / "graphs/weights.bin").stat().st_size <= 1.02 * weights
    assert all(offset % 64 == 0 for offset, _ in taken["full"])


def test_the_shipped_schema_is_that_of_the_types() -> None:
    path = Path(tgate_compile.__file__).parent / "bundle" / "manifest.schema.json"
    assert json.loads(path.read_text()) == json_schema()


# Bundles that are refused.


def test_files_that_are_missing(folder: Path) -> None:
    (folder / "graphs/pruned.onnx").unlink()
    refused(folder, "not complete", "graphs/pruned.onnx")


def test_files_that_are_too_many(folder: Path) -> None:
    (folder / "graphs/more.onnx").write_bytes(b"")
    refused(folder, "graphs/more.onnx", "does not list")


def test_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    refused(folder, "is not a bundle", "manifest.json")
    refused(folder / "nothing", "is not a bundle")
    refused(folder / "graphs/weights.bin", "is not a bundle")


@pytest.mark.parametrize("name", ["graphs/full.onnx", "graphs/weights.bin"])
def test_changed_bytes(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    refused(folder, name, "has been changed", "SHA-256")


def test_truncated_weights(folder: Path) -> None:
    with (folder / "graphs/weights.bin").open("r+b") as file:
        file.truncate(1000)
    refused(folder, "weights.bin", "1000 bytes", "not complete")


def test_a_newer_schema(folder: Path) -> None:
    def newer(manifest: Any) -> None:
        manifest.update(schema_version=SCHEMA_VERSION + 1, unheard_of=1)

    change_manifest(folder, newer)
    refused(folder, f"schema version {SCHEMA_VERSION + 1}", "Install a newer tgate_compile")


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside", "graphs/../../outside", "graphs\\x", "C:x", "", "./x"])
def test_paths_out_of_the_folder(folder: Path, path: str) -> None:
    (folder.parent / "outside").write_bytes(b"")

    def move(manifest: Any) -> None:
        manifest["files"][path] = manifest["files"]["graphs/full.onnx"]
        manifest["graphs"]["full"]["file"] = path

    change_manifest(folder, move)
    refused(folder, "manifest")


@pytest.mark.parametrize("name", ["graphs/full.onnx", "graphs", "manifest.json"])
def test_links(folder: Path, name: str) -> None:
    moved = folder.parent / "moved"
    (folder / name).rename(moved)
    (folder / name).symlink_to(moved)
    refused(folder, name, "is a link")


@pytest.mark.parametrize("location", ["/etc/hostname", "../manifest.json", "full.onnx", ""])
def test_weights_from_elsewhere(folder: Path, location: str) -> None:
    def move(model: onnx.ModelProto) -> None:
        next(tensor for tensor in model.graph.initializer if tensor.external_data).external_data[0].value = location

    change_model(folder, move)
    refused(folder, "full.onnx", repr(location), "weights.bin")


def test_weights_from_elsewhere_in_a_constant_of_a_branch(folder: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(name="stolen", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/hostname")
        constant = onnx.helper.make_node("Constant", [], ["stolen"], value=tensor)
        branch = onnx.helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(
            onnx.helper.make_node("If", ["timestep"], ["x"], then_branch=branch, else_branch=branch)
        )

    change_model(folder, add)
    refused(folder, "stolen", "/etc/hostname")


@pytest.mark.parametrize(("key", "value"), [("offset", "999999999"), ("length", "x"), ("offset", "-1")])
def test_weights_beyond_the_file(folder: Path, key: str, value: str) -> None:
    def move(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    change_model(folder, move)
    refused(folder, "full.onnx", value)


def test_graphs_that_are_no_models(folder: Path) -> None:
    (folder / "graphs/full.onnx").write_bytes(b"no model")
    record = {"size": 8, "sha256": hashlib.sha256(b"no model").hexdigest()}
    change_manifest(folder, lambda manifest: manifest["files"].update({"graphs/full.onnx": record}))
    refused(folder, "not a valid ONNX model")


def test_other_shapes_and_dtypes_in_a_graph(folder: Path) -> None:
    change_model(folder, lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 10))
    refused(folder, "sample (float16, ['2*b', 4, 'h', 'w'])", "sample (float32, ['2*b', 4, 'h', 'w'])")
    change_model(folder, lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 1))
    read_bundle(folder)
    change_model(folder, lambda model: model.graph.output.pop())
    refused(folder, "2 inputs or outputs", "says 3")


def test_other_shapes_in_the_manifest(folder: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["graphs"]["pruned"]["cache_inputs"][0]["shape"][0] = 2

    change_manifest(folder, change)
    refused(folder, "wire from full.cache.down_blocks.0")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: m.pop("graphs"), ("graphs", "Field required")),
        (lambda m: m.update(more=1), ("more", "not permitted")),
        (lambda m: m["method"]["schedule"].update(gate_step=-1), ("method.schedule", "gate_step")),
        (lambda m: m["method"]["schedule"].update(more=1), ("method.schedule", "unknown key")),
        (lambda m: m["files"].pop("graphs/full.onnx"), ("graphs/full.onnx", "does not list")),
        (lambda m: m.update(weights="graphs/full.onnx"), ("weights", "graphs/weights.bin")),
        (lambda m: m.update(weights=None), ("weights", "graphs/weights.bin")),
        (lambda m: m["sizes"].pop("h"), ("sample", "'h'")),
        (lambda m: m["graphs"]["full"]["inputs"][0].update(shape=["b**9**9", 4, 4, 4]), ("sample", "b**9**9")),
        (lambda m: m["example"]["steps"][0].update(graph="none"), ("example", "'none'")),
    ],
)
def test_manifests_that_are_not_valid(folder: Path, change: Callable[[Any], object], parts: tuple[str, ...]) -> None:
    change_manifest(folder, change)
    refused(folder, "manifest", *parts)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100000, b'{"schema_version": 1e400}'])
def test_manifests_that_are_no_objects(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "manifest")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_only_our_own_errors_come_out(folder: Path, original: Path, data: st.DataObject) -> None:
    manifest = manifest_of(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = manifest
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or data.draw(st.integers(0, 3)) == 0:
                place[key] = data.draw(JSON)
                break
            place = place[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with suppress(TGateError):
        read_bundle(folder)


def test_weights_of_a_gpu_are_fetched_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy waits for the GPU. What is joined for it is separated again."""
    tensors = [
        torch.randn(5, 3),
        torch.randn(4, 6).T,
        torch.tensor(7),
        torch.randn(2, 2).bfloat16(),
        torch.empty(0),
        torch.tensor([True, False]),
        torch.randn(40),
    ]
    expected = [bytes(tensor_bytes(tensor)) for tensor in tensors]
    joined: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: joined.append(len(parts)) or cat(parts))
    assert [bytes(content) for content in fetched(tensors)] == expected
    assert joined == [7]
    joined.clear()
    assert [bytes(content) for content in fetched(tensors, at_most=100)] == expected
    assert joined == [1, 1, 4, 1]  # 60 bytes, 96, 18 and 160


def test_layouts_of_weights(tmp_path: Path) -> None:
    """Code for a GPU reads channels-last kernels as they are. In the file they are in C order, like all tensors."""
    tensors = {
        "kernel": torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
        "video": torch.randn(4, 3, 2, 5, 2).to(memory_format=torch.channels_last_3d),
        "transposed": torch.randn(3, 4).T,
        "gaps": torch.randn(4, 6)[:, ::2],
        "plain": torch.randn(4, 3),
    }
    (tmp_path / "graphs").mkdir()
    with (tmp_path / WEIGHTS_FILE).open("xb") as file:
        write_weights(tensors, WeightsFile(file), tmp_path / INDEX_FILE, keep_layout=True)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    orders = {"kernel": [0, 2, 3, 1], "video": [0, 2, 3, 4, 1], "transposed": [1, 0], "gaps": None, "plain": None}
    assert {name: place.get("order") for name, place in index.items()} == orders
    mapped = mapped_weights(tmp_path, torch.device("cpu")).tensors(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(mapped[name], tensor)
        assert name == "gaps" or mapped[name].stride() == tensor.stride()
    assert index["plain"].keys() == {"dtype", "shape", "offset", "length"}
