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
    """The one `trt.ILogger` for all objects of the package: it must live longer than any of them.

    Its `last_problem` is what went wrong last, in one line.
    """
    trt = importlib.import_module(package)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind needs this very call
            self.last_problem = "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _PROBLEMS:
                self.last_problem = " ".join(message.split())[:500].rstrip(". ")
            # Problems are raised as errors; its warnings are mostly about its own choices.
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

#: A size that is left free.
FREE = -1

MSG_NOT_PARSED = "{package} cannot read the {graph} graph ({problem})."
MSG_NOT_BUILT = "{package} cannot build an engine of the {graph} graph ({problem})."
MSG_DIFFERS = "{package} reads the {graph} graph as one with {given}, and it has {expected}."


@dataclass(frozen=True)
class Binding:
    """An input or output: a size of `FREE` is left free."""

    name: str
    dtype: torch.dtype
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        flags: members of `trt.BuilderFlag` to set.
        compute_capabilities: of the GPUs it is built for, such as `8.9`; only TensorRT for RTX builds for several, or
            for others than the one that is there. None: as the package has it.
        hardware_compatibility: a member of `trt.HardwareCompatibilityLevel`.
        timing_cache: a file with what earlier builds have measured; it is made, or added to.
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
    """The serialized engine of the ONNX file `model`, as an object with a buffer.

    float32 stays float32: TF32, which rounds to ten bits what is multiplied, is off.

    Args:
        package: `tensorrt_rtx` or `tensorrt`.
        model: the file; its weights may be in another beside it.
        inputs: what it must take, in order.
        outputs: what it must return, in order.
        profile: the least, the usual and the largest shape of each input that has a free size.
        settings: how it is built.

    Raises:
        BackendError: the file cannot be read, is not what it must be, or no engine can be built of it.
    """
    trt = importlib.import_module(package)
    began = time.perf_counter()
    log = tensorrt_log(package)
    told = {"package": package, "graph": model.stem}
    builder = trt.Builder(log)
    # Every tensor has the dtype that the file says. TensorRT 11 knows nothing else.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise BackendError(MSG_NOT_PARSED.format(**told, problem=parser_errors(parser) or log.last_problem))
    _check(network, inputs, outputs, told)
    _let_attention_be_decomposed(trt, network)
    config = _config(trt, builder, settings)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (least, usual, most) in profile.items():
            shapes.set_shape(name, least, usual, most)
        config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(MSG_NOT_BUILT.format(**told, problem=log.last_problem))
    if settings.timing_cache is not None:
        _keep(config.get_timing_cache().serialize(), settings.timing_cache)
    logger.info("%s built the %s graph in %.1f s", package, model.stem, time.perf_counter() - began)
    return engine


def parser_errors(parser: Any) -> str:
    """What a parser or refitter of ONNX files says of its failure; empty if nothing."""
    errors = [" ".join(parser.get_error(i).desc().split()).rstrip(".") for i in range(parser.num_errors)]
    return "; ".join(dict.fromkeys(errors))


def _check(network: Any, inputs: Sequence[Binding], outputs: Sequence[Binding], told: Mapping[str, str]) -> None:
    """Raise BackendError unless the network has these inputs and outputs: before minutes of building, not after."""
    given = [_binding(network.get_input(i)) for i in range(network.num_inputs)]
    returned = [_binding(network.get_output(i)) for i in range(network.num_outputs)]
    pairs = [*zip(given, inputs, strict=False), *zip(map(_blurred, returned, outputs), outputs, strict=False)]
    for one, other in pairs:
        if one != other:
            raise BackendError(MSG_DIFFERS.format(**told, given=one, expected=other))
    counts = [f"{len(a)} inputs and {len(b)} outputs" for a, b in ((given, returned), (inputs, outputs))]
    if counts[0] != counts[1]:
        raise BackendError(MSG_DIFFERS.format(**told, given=counts[0], expected=counts[1]))


def _binding(tensor: Any) -> Binding:
    return Binding(tensor.name, DTYPES[tensor.dtype.name], tuple(tensor.shape))


def _blurred(given: Binding, expected: Binding) -> Binding:
    """`given` with those of its sizes as `expected` that TensorRT cannot tell from the inputs' free ones."""
    if len(given.shape) != len(expected.shape):
        return given
    shape = tuple(b if a == FREE else a for a, b in zip(given.shape, expected.shape, strict=True))
    return Binding(given.name, given.dtype, shape)


def _let_attention_be_decomposed(trt: Any, network: Any) -> None:
    """Where there is no kernel for a whole attention (float32, free sizes), the build fails unless it is allowed to
    take several."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # NVIDIA's own way to a layer's class
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
            # Of another GPU or version: this build measures anew.
            config.set_timing_cache(config.create_timing_cache(b""), False)
    return config


def _keep(content: Any, path: Path) -> None:
    """Write `content` to `path`, all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
