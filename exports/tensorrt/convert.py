"""Build TensorRT engines from ONNX files."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tgate_compile._errors import BackendError

logger = logging.getLogger(__name__)

_PROBLEMS = ("INTERNAL_ERROR", "ERROR")


@functools.cache
def tensorrt_log(package: str) -> Any:
    """Return the `trt.ILogger` shared by all objects of the package, which must live longer than any of them.

    Its attribute `last_problem` is the last error message, in one line.
    """
    trt = importlib.import_module(package)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind needs exactly this call
            self.last_problem = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _PROBLEMS:
                self.last_problem = " ".join(message.split())[:500].rstrip(". ")
            # Problems are raised as errors, and warnings are mostly about TensorRT's internal choices.
            logger.log(logging.INFO if severity.name in (*_PROBLEMS, "WARNING") else logging.DEBUG, "%s", message)

    return Log()


Shape = tuple[int, ...]

#: torch's dtypes by the names of `trt.DataType`.
DTYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}

#: The value of a free size.
FREE = -1


@dataclass(frozen=True)
class Binding:
    """An input or output; free sizes have the value `FREE`."""

    name: str
    dtype: torch.dtype
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        flags: the names of the `trt.BuilderFlag` members to set.
        compute_capabilities: the compute capabilities of the GPUs that it is built for, such as `8.9`; if empty, the
            default of the package. Only TensorRT for RTX can build for several, or for other GPUs than the present one.
        hardware_compatibility: the name of a member of `trt.HardwareCompatibilityLevel`.
        timing_cache: a file with the measurements of earlier builds, which is created or updated.
    """

    flags: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: str | None = None
    timing_cache: Path | None = None


def to_tensorrt(
    package: str,
    model: Path,
    inputs: Sequence[Binding],
    outputs: Sequence[Binding],
    profile: Mapping[str, tuple[Shape, Shape, Shape]],
    settings: EngineSettings,
) -> Any:
    """Build an engine from the ONNX file `model`, and return it serialized, as an object with a buffer.

    float32 stays float32: TF32, which rounds factors to ten bits, is disabled.

    Args:
        package: `tensorrt_rtx` or `tensorrt`.
        model: the path of the file; its weights may be in another file in the same folder.
        inputs: the expected inputs, in order.
        outputs: the expected outputs, in order.
        profile: the smallest, the typical and the largest shape of each input with a free size.
        settings: how the engine is built.

    Raises:
        BackendError: the file cannot be read, has other inputs or outputs, or no engine can be built from it.
    """
    trt = importlib.import_module(package)
    began = time.perf_counter()
    log = tensorrt_log(package)
    builder = trt.Builder(log)
    # Every tensor has the dtype that the file says, which is the only mode of TensorRT 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        problem = parser_errors(parser) or log.last_problem
        raise BackendError(f"{package} cannot read the {model.stem} graph ({problem}).")
    _check(network, inputs, outputs, package, model.stem)
    _let_attention_be_decomposed(trt, network)
    config = _config(trt, builder, settings)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (least, usual, most) in profile.items():
            shapes.set_shape(name, least, usual, most)
        config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"{package} cannot build an engine for the {model.stem} graph ({log.last_problem}).")
    if settings.timing_cache is not None:
        _write(config.get_timing_cache().serialize(), settings.timing_cache)
    logger.info("%s built the %s graph in %.1f s", package, model.stem, time.perf_counter() - began)
    return engine


def parser_errors(parser: Any) -> str:
    """Return the error messages of a parser or refitter of ONNX files; empty if there are none."""
    errors = [" ".join(parser.get_error(i).desc().split()).rstrip(".") for i in range(parser.num_errors)]
    return "; ".join(dict.fromkeys(errors))


def _check(network: Any, inputs: Sequence[Binding], outputs: Sequence[Binding], package: str, graph: str) -> None:
    """Raise BackendError unless the network has these inputs and outputs, before a build that takes minutes."""
    given = [_binding(network.get_input(i)) for i in range(network.num_inputs)]
    returned = [_binding(network.get_output(i)) for i in range(network.num_outputs)]
    counts = [f"{len(a)} inputs and {len(b)} outputs" for a, b in ((given, returned), (inputs, outputs))]
    pairs: list[tuple[object, object]] = [
        *zip(given, inputs, strict=False),
        *zip(map(_blurred, returned, outputs), outputs, strict=False),
        (counts[0], counts[1]),
    ]
    for one, other in pairs:
        if one != other:
            raise BackendError(f"{package} reads the {graph} graph as one with {one}, but it has {other}.")


def _binding(tensor: Any) -> Binding:
    return Binding(tensor.name, DTYPES[tensor.dtype.name], tuple(tensor.shape))


def _blurred(given: Binding, expected: Binding) -> Binding:
    """Return `given` with the sizes that TensorRT does not know replaced by those of `expected`."""
    if len(given.shape) != len(expected.shape):
        return given
    shape = tuple(b if a == FREE else a for a, b in zip(given.shape, expected.shape, strict=True))
    return Binding(given.name, given.dtype, shape)


def _let_attention_be_decomposed(trt: Any, network: Any) -> None:
    """Permit decomposed attention: without a fused kernel (float32, free sizes) the build would fail otherwise."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how NVIDIA's own code casts a layer
            layer.attention.decomposable = True


def _config(trt: Any, builder: Any, settings: EngineSettings) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in settings.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for i, capability in enumerate(settings.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), i)
    if settings.hardware_compatibility is not None:
        level = getattr(trt.HardwareCompatibilityLevel, settings.hardware_compatibility)
        config.hardware_compatibility_level = level
    if settings.timing_cache is not None:
        path = settings.timing_cache
        known = path.read_bytes() if path.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            # The cache is for another GPU or version, so this build measures again.
            config.set_timing_cache(config.create_timing_cache(b""), False)
    return config


def _write(content: Any, path: Path) -> None:
    """Write `content` to `path` atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
