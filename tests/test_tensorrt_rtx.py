"""TensorRT for RTX: engines are built here, and run on NVIDIA GPUs in tests/test_tensorrt_gpu.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tgate_compile
from tests.exported import GATE, STEPS, exported, plain
from tests.tiny_joint import JOINT
from tests.tiny_pipelines import pixart, pixart_prompt
from tgate_compile import BackendError, BundleError, ConfigurationError, FirstBlockCache
from tgate_compile._cli.app import app
from tgate_compile.bundle.manifest import Manifest
from tgate_compile.bundle.read import read_bundle
from tgate_compile.bundle.read_manifest import shape_at
from tgate_compile.exports.tensorrt.convert import FREE, Binding, EngineSettings, to_tensorrt
from tgate_compile.exports.tensorrt.open import check_gpu_supported
from tgate_compile.exports.tensorrt.save import full_profile

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has packages for Linux and Windows only")

CALL = {"prompt": "", "num_inference_steps": STEPS}
PROFILE = {"b": [1, 1, 3], "h": [2, 8, 12]}
RTX = ("tensorrt_rtx",)

no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without a GPU")


@pytest.fixture(scope="module")
def optimized() -> Any:
    """Return a pipeline in bfloat16, which ONNX Runtime does not run on CPUs."""
    return tgate_compile.optimize(plain().to(torch.bfloat16), GATE, backend="eager")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle in half precision with free sizes."""
    pipe = tgate_compile.optimize(plain().to(torch.float16), GATE, backend="eager")
    folder = tmp_path_factory.mktemp("rtx") / "bundle"
    return tgate_compile.export(pipe, folder, "tensorrt-rtx", call=CALL, format_options={"profile": PROFILE})


def manifest_of(folder: Path) -> Manifest:
    return read_bundle(folder).manifest


# Exports.


@pytest.mark.heavy
def test_engines_of_free_sizes(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    assert sorted(manifest.files) == ["graphs/full.engine", "graphs/pruned.engine"]
    assert manifest.weights is None
    assert manifest.versions.runtime == f"tensorrt_rtx {trt.__version__}"
    sizes = {name: (size.least, size.most, size.example) for name, size in manifest.sizes.items()}
    assert sizes == {"b": (1, 3, 1), "h": (2, 12, 8), "w": (4, 16, 8)}
    full, pruned = manifest.graphs["full"], manifest.graphs["pruned"]
    assert [(spec.name, spec.dtype, spec.shape) for spec in full.inputs] == [
        ("sample", "float16", ["2*b", 4, "h", "w"]),
        ("timestep", "float32", []),
        ("encoder_hidden_states", "float16", ["2*b", 16, 32]),
    ]
    assert {spec.dtype for spec in (*full.cache_outputs, *pruned.cache_inputs)} == {"float16"}
    assert (full.file, pruned.file) == ("graphs/full.engine", "graphs/pruned.engine")
    assert full.facts.nodes > pruned.facts.nodes > 100
    if not torch.cuda.is_available():
        assert (full.parity, pruned.parity) == (None, None)


@pytest.mark.heavy
def test_engines_of_fixed_sizes(optimized: Any, tmp_path: Path) -> None:
    options = {"compute_capabilities": ["8.9", "12.0"], "weight_streaming": True}
    stages: list[str] = []
    folder = tgate_compile.export(
        optimized,
        tmp_path / "bundle",
        "tensorrt-rtx",
        call=CALL,
        dynamic=False,
        format_options=options,
        progress=stages.append,
    )
    assert "Building the engine of the pruned graph" in stages
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    manifest = manifest_of(folder)
    assert manifest.sizes == {}
    for graph in manifest.graphs.values():
        assert manifest.files[graph.file].size > graph.facts.parameters * torch.bfloat16.itemsize
    sample = manifest.graphs["full"].inputs[0]
    assert (sample.dtype, sample.shape) == ("bfloat16", [2, 4, 8, 8])


@pytest.mark.heavy
def test_engines_of_joint_attention(tmp_path: Path) -> None:
    """The caches are the text's keys and values, and the engine after the gate is without its tokens."""
    joint = JOINT["StableDiffusion3Pipeline"]
    pipe = tgate_compile.optimize(joint.build(), GATE, backend="eager")
    call = {**joint.call(1), "num_inference_steps": STEPS, "output_type": "latent"}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "tensorrt-rtx", call=call, dynamic=False)
    graphs = manifest_of(folder).graphs
    assert {spec.name.rpartition(".")[2] for spec in graphs["pruned"].cache_inputs} == {"key", "value"}
    assert "encoder_hidden_states" not in [spec.name for spec in graphs["pruned"].inputs]
    assert (folder / graphs["pruned"].file).stat().st_size < (folder / graphs["full"].file).stat().st_size


@pytest.mark.sweep
def test_engines_of_decided_steps(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(pixart(), FirstBlockCache(0.15), backend="eager")
    call = {**pixart_prompt(), "num_inference_steps": STEPS, "output_type": "latent"}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "tensorrt-rtx", call=call, dynamic=False)
    graphs = manifest_of(folder).graphs
    assert set(graphs) == {"full", "head", "tail", "finish"}
    assert [(spec.name, spec.dtype, spec.shape) for spec in graphs["head"].outputs] == [("measure", "float32", [1])]


@pytest.mark.heavy
def test_inspect(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    for part in ("graphs/pruned.engine", "for tensorrt_rtx", "verified: 2 files"):
        assert part in result.stdout
    if not torch.cuda.is_available():
        assert "not run" in result.stdout


@pytest.mark.heavy
@no_gpu_here
def test_load_without_a_gpu_is_an_error(bundle: Path) -> None:
    pipe = plain().to(torch.float16)
    with pytest.raises(BackendError, match=r"needs an NVIDIA GPU.*finds none"):
        tgate_compile.load(pipe, bundle)
    assert "_tgate_compile" not in vars(pipe)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"providers": []}, ("'providers'", "weight_budget, runtime_cache")),
        ({"weight_budget": -1}, ("weight_budget", "whole number", "-1")),
        ({"runtime_cache": "no/such/folder"}, ("runtime_cache", "a folder that exists")),
    ],
)
def test_options_of_load(bundle: Path, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tgate_compile.load(plain().to(torch.float16), bundle, backend_options=options)
    for part in parts:
        assert part in str(caught.value)


def test_the_calls_that_run_an_engine() -> None:
    """No engine runs here, but the names exist."""
    called = {
        "Runtime": ["deserialize_cuda_engine", "engine_host_code_allowed"],
        "ICudaEngine": [
            *("create_execution_context", "create_runtime_config", "device_memory_size_v2", "get_engine_stat"),
            *("get_tensor_dtype", "get_tensor_mode", "get_tensor_name", "get_tensor_shape", "num_io_tensors"),
            *("refittable", "weight_streaming_budget_v2"),
        ],
        "IExecutionContext": ["execute_async_v3", "set_device_memory", "set_input_shape", "set_tensor_address"],
        "IRuntimeConfig": ["create_runtime_cache", "set_execution_context_allocation_strategy", "set_runtime_cache"],
        "IRuntimeCache": ["deserialize", "serialize"],
        "Refitter": ["refit_cuda_engine"],
        "OnnxParserRefitter": ["get_error", "load_initializer", "load_model_proto", "num_errors", "refit_model_proto"],
        "EngineStat": ["STRIPPED_WEIGHTS_SIZE"],
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
        "TensorIOMode": ["INPUT", "OUTPUT"],
    }
    for owner, names in called.items():
        assert [name for name in names if not hasattr(getattr(trt, owner), name)] == [], owner


# Networks are checked before the build, which takes minutes.


def bindings(graph: str) -> tuple[list[Binding], list[Binding], dict[str, Any]]:
    """Return inputs, outputs and a profile of a graph of the ONNX bundle."""
    described = manifest_of(exported(binding_times=False)).graphs[graph]

    def binding(spec: Any) -> Binding:
        shape = tuple(size if isinstance(size, int) else FREE for size in spec.shape)
        return Binding(spec.name, getattr(torch, spec.dtype), shape)

    inputs, outputs = [*described.inputs, *described.cache_inputs], [*described.outputs, *described.cache_outputs]
    sizes = [{"b": 1, "h": 4, "w": 4}, {"b": 1, "h": 8, "w": 8}, {"b": 2, "h": 8, "w": 8}]
    profile = {spec.name: tuple(shape_at(spec.shape, size) for size in sizes) for spec in inputs}
    free = {name: shapes for name, shapes in profile.items() if shapes[0] != shapes[2]}
    return [binding(spec) for spec in inputs], [binding(spec) for spec in outputs], free


def test_attention_without_a_fused_kernel() -> None:
    """There is no kernel for float32 with free sizes: the build needs decomposable attention."""
    inputs, outputs, profile = bindings("full")
    assert profile
    engine = to_tensorrt(
        *RTX, exported(binding_times=False) / "graphs/full.onnx", inputs, outputs, profile, EngineSettings()
    )
    assert engine.nbytes > 100_000


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda i, o: i.__setitem__(0, Binding("latents", *_rest(i[0]))), ("sample float32", "latents float32")),
        (lambda i, o: i.__setitem__(0, Binding("sample", torch.float16, i[0].shape)), ("float32", "sample float16")),
        (lambda i, o: i.__setitem__(0, Binding("sample", torch.float32, (2, 4, 8, 8))), ("[-1, 4, -1, -1]", "[2, 4,")),
        (lambda i, o: o.__setitem__(0, Binding("out_sample", torch.float32, (-1, 4))), ("out_sample", "[-1, 4]")),
        (lambda i, o: i.reverse(), ("sample", "cache.mid_block")),
        (lambda i, o: o.append(o[0]), ("4 inputs and 1 outputs", "4 inputs and 2 outputs")),
    ],
)
def test_networks_that_are_not_the_graph(change: Any, parts: tuple[str, ...]) -> None:
    inputs, outputs, profile = bindings("pruned")
    change(inputs, outputs)
    with pytest.raises(BackendError) as caught:
        to_tensorrt(
            *RTX, exported(binding_times=False) / "graphs/pruned.onnx", inputs, outputs, profile, EngineSettings()
        )
    for part in ("tensorrt_rtx reads the pruned graph", *parts):
        assert part in str(caught.value)


def _rest(binding: Binding) -> tuple[torch.dtype, tuple[int, ...]]:
    return binding.dtype, binding.shape


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "full.onnx").write_bytes(b"no model")
    with pytest.raises(BackendError, match="cannot read the full graph"):
        to_tensorrt(*RTX, tmp_path / "full.onnx", [], [], {}, EngineSettings())


def test_profiles_that_tensorrt_does_not_take() -> None:
    inputs, outputs, _ = bindings("pruned")
    with pytest.raises(BackendError, match=r"cannot build an engine for the pruned graph \(.*profile"):
        to_tensorrt(*RTX, exported(binding_times=False) / "graphs/pruned.onnx", inputs, outputs, {}, EngineSettings())


# Profiles.


def test_profiles() -> None:
    example = {"b": 2, "h": 8, "w": 1}
    assert full_profile({}, example) == {"b": (1, 2, 4), "h": (4, 8, 16), "w": (1, 1, 2)}
    assert full_profile({"h": (2, 4, 8)}, example) == {"b": (1, 2, 4), "h": (2, 4, 8), "w": (1, 1, 2)}
    assert full_profile({}, {"b": 31, "h": 1024}) == {"b": (1, 31, 31), "h": (512, 1024, 1024)}
    with pytest.raises(ConfigurationError, match=r"has h from 2 to 4, but the call .* has 8"):
        full_profile({"h": (2, 4, 4)}, example)
    with pytest.raises(ConfigurationError, match="free sizes are: none"):
        full_profile({"h": (2, 4, 4)}, {})


# Exports that are refused.


def not_exported(
    pipe: Any, folder: Path, *parts: str, error: type[Exception] = ConfigurationError, **options: Any
) -> None:
    with pytest.raises(error) as caught:
        tgate_compile.export(pipe, folder, "tensorrt-rtx", call=CALL, **options)
    for part in parts:
        assert part in str(caught.value)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"timing_cache": "x"}, ("'timing_cache'", "profile, compute_capabilities, weight_streaming")),
        ({"compute_capabilities": ["9.0"]}, ("8.0, 8.6, 8.9, 12.0", "['9.0']")),
        ({"compute_capabilities": []}, ("compute_capabilities", "got []")),
        ({"weight_streaming": "yes"}, ("weight_streaming", "True or False", "'yes'")),
        ({"profile": {"x": (1, 2, 3)}}, ("profile", "b, h and w", "'x'")),
        ({"profile": {"b": (2, 1, 3)}}, ("the smallest, the typical and the largest", "(2, 1, 3)")),
        ({"profile": {"b": (1, 1, 32)}}, ("profile", "(1, 1, 32)")),
        ({"profile": {"b": 3}}, ("profile", "3")),
    ],
)
def test_wrong_options(optimized: Any, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    not_exported(optimized, tmp_path / "bundle", *parts, format_options=options)


def test_profiles_of_sizes_that_are_fixed(optimized: Any, tmp_path: Path) -> None:
    options = {"profile": {"b": (1, 1, 2)}}
    not_exported(optimized, tmp_path / "bundle", "'b'", "none", dynamic=False, format_options=options)


@no_gpu_here
@pytest.mark.parametrize("option", ["strip", "refit"])
def test_engines_without_weights_need_a_gpu(optimized: Any, tmp_path: Path, option: str) -> None:
    parts = (f'format_options["{option}"]', "needs an NVIDIA GPU to build engines", f"Leave {option} out")
    not_exported(optimized, tmp_path / "bundle", *parts, format_options={option: True})


def test_a_graph_that_tensorrt_cannot_build(tmp_path: Path) -> None:
    """It has no cast to fp8. A failed build leaves no files."""
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager", cache_dtype=torch.float8_e4m3fn)
    parts = ("The full graph cannot be written", "tensorrt_rtx cannot build", "FP8")
    not_exported(pipe, tmp_path / "bundle", *parts, error=BundleError, dynamic=False)


def test_optimize_explains_how_to_export() -> None:
    with pytest.raises(ConfigurationError, match=r'format="tensorrt-rtx".*load\(pipe, folder\)'):
        tgate_compile.optimize(plain(), GATE, backend="tensorrt-rtx")


def test_the_error_names_the_extra(optimized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt_rtx" else real(name))
    not_exported(optimized, tmp_path / "bundle", "tensorrt_rtx", "pip install 'tgate_compile[tensorrt-rtx]'")


def test_gpus_without_kernels_are_refused_by_name() -> None:
    """Data centre GPUs of the Hopper generation, such as an H200, are not among NVIDIA's RTX GPUs."""
    for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)]:
        check_gpu_supported("tensorrt_rtx", capability, "a GPU")
    with pytest.raises(BackendError, match=r"7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1, but this GPU is an H200, with 9\.0"):
        check_gpu_supported("tensorrt_rtx", (9, 0), "an H200")
