"""Compiled models of OpenVINO on PyTorch tensors."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tgate_compile._arguments import check_names
from tgate_compile._errors import BackendError, ConfigurationError, check_installed
from tgate_compile.bundle.formats import inputs_of, output_shapes, outputs_of
from tgate_compile.bundle.manifest import WEIGHTS_FILE, Graph

#: What openvino sends an event with when it is imported, unless the user has said no beforehand. Without it, openvino
#: takes a stub of its own.
_TELEMETRY = "openvino_telemetry"


def openvino() -> ModuleType:
    """The module `openvino`, which sends nothing if it is first imported here."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    was_there, before = _TELEMETRY in sys.modules, sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # so importing it says that it is not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]
        if was_there and before is not None:
            sys.modules[_TELEMETRY] = before


@functools.cache
def core() -> Any:
    """The `openvino.Core` of this process: it loads its plug-ins once."""
    return openvino().Core()


#: Options, and what they must be.
OPTIONS: Mapping[str, str] = {
    "device": 'one that OpenVINO finds here: "CPU", "GPU", "NPU"',
    "precision": '"float32", or "float16" or "bfloat16", which are faster where the device has them',
    "threads": "a whole number of threads, at least 1",
    "cache": "a folder for compiled graphs, which are opened faster the next time",
}
#: What is computed in, as OpenVINO calls it. By its own choice it would be bfloat16 on some processors.
PRECISIONS: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

#: torch's dtypes in OpenVINO, as attributes of `openvino.Type`.
ELEMENT_TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.bool: "boolean",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}

MSG_OPTION = 'backend_options["{name}"] must be {expected}, but got {given!r}.'
MSG_NO_DEVICE = (
    'OpenVINO finds no device "{given}" here; it has {available}. Intel\'s GPUs and NPUs need their drivers: '
    "https://docs.openvino.ai/ has them."
)
MSG_NOT_ON_CPU = (
    'The backend "openvino" takes tensors on the CPU, and the pipeline is on "{device}". Call pipe.to("cpu"); '
    'backend_options={{"device": "GPU"}} has Intel\'s GPU compute.'
)


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options that the backend does not know, or a device that is not here."""
    check_installed("openvino", extra="openvino", what='backend="openvino"')
    check_names(options, OPTIONS, 'backend="openvino"')
    device, threads = options.get("device", "CPU"), options.get("threads", 1)
    right = {
        "device": isinstance(device, str) and bool(device),
        "precision": options.get("precision", "float32") in PRECISIONS,
        "threads": isinstance(threads, int) and not isinstance(threads, bool) and threads >= 1,
        "cache": isinstance(options.get("cache", "."), str) and bool(options.get("cache", ".")),
    }
    for name, is_right in right.items():
        if not is_right:
            raise ConfigurationError(MSG_OPTION.format(name=name, expected=OPTIONS[name], given=options[name]))
    _check_device(str(device))


def check_device(device: torch.device) -> None:
    """Raise BackendError unless tensors on `device` are in memory that OpenVINO reads."""
    if device.type != "cpu":
        raise BackendError(MSG_NOT_ON_CPU.format(device=device))


class CompiledModel:
    """An `openvino.Model`, compiled for a device, which is given inputs of these names.

    Raises:
        Exception: openvino's, of any class, if it does not take the model.
    """

    def __init__(self, model: Any, inputs: Sequence[str], options: Mapping[str, object]) -> None:
        device = str(options.get("device", "CPU"))
        settings: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[str(options.get("precision", "float32"))],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = options.get("threads", torch.get_num_threads())
        if "cache" in options:
            settings["CACHE_DIR"] = options["cache"]
        self.device = device
        taken = {name: position for position, port in enumerate(model.inputs) for name in port.get_names()}
        # It drops an input of which only the shape is used.
        self._positions = [taken.get(name) for name in inputs]
        self._request: Any = core().compile_model(model, device, settings).create_infer_request()

    def run(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[tuple[Sequence[int], torch.dtype]]
    ) -> list[torch.Tensor]:
        """New tensors of the shapes and dtypes of `outputs`, for all inputs.

        Raises:
            RuntimeError: openvino's, if it fails.
        """
        held = [tensor.contiguous() for tensor in inputs]  # which live until the run is over
        results = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in outputs]
        for position, tensor in zip(self._positions, held, strict=True):
            if position is not None:
                self._request.set_input_tensor(position, shared(tensor))
        for position, tensor in enumerate(results):
            self._request.set_output_tensor(position, shared(tensor))
        self._request.infer()
        return results


def shared(tensor: torch.Tensor) -> Any:
    """The memory of `tensor`, which is contiguous and on the CPU, as an `openvino.Tensor`."""
    package = openvino()
    # Strides of dimensions of size 1 may be anything.
    content = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    element = getattr(package.Type, ELEMENT_TYPES[tensor.dtype])
    return package.Tensor(content, package.Shape(list(tensor.shape)), element)


def _check_device(given: str) -> None:
    """`GPU` is there if `GPU.0` is; `AUTO:GPU,CPU` and the like need all that they name."""
    available = core().available_devices
    found = {*available, *(name.partition(".")[0] for name in available), "AUTO", "HETERO", "MULTI"}
    if not all(name in found for name in re.split("[:,]", given)):
        raise ConfigurationError(MSG_NO_DEVICE.format(given=given, available=", ".join(available)))


logger = logging.getLogger(__name__)

MSG_FAILED = "OpenVINO could not run the {graph} graph of the bundle ({problem})."
MSG_DIFFERS = "The {graph} graph has the outputs {given} in OpenVINO, and the manifest says {expected}."


class OpenVinoSession:
    """Runs the graph `graph` of the bundle at `root`, OpenVINO's own or an ONNX file.

    OpenVINO maps the weights from the bundle's file, and copies them into the layouts that it works on.
    """

    def __init__(self, graph: Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> None:
        check_device(device)
        began = time.perf_counter()
        self._graph = graph
        path = root / graph.file
        try:
            weights = (
                () if path.suffix == ".onnx" else (root / WEIGHTS_FILE,)
            )  # an ONNX file says itself where they are
            model = core().read_model(path, *weights)
            self._check(model)
            self._compiled = CompiledModel(model, [spec.name for spec in inputs_of(graph)], options)
        except BackendError:
            raise
        except Exception as error:  # openvino's errors are RuntimeErrors, or of classes of their own
            raise BackendError(self._failed(error)) from error
        logger.info("opened %s in OpenVINO in %.1f s", path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """OpenVINO and its device."""
        return f"OpenVINO, {self._compiled.device}"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last."""
        outputs = [
            (shape, getattr(torch, spec.dtype))
            for spec, shape in zip(outputs_of(self._graph), output_shapes(self._graph, inputs), strict=True)
        ]
        try:
            return self._compiled.run(inputs, outputs)
        except RuntimeError as error:
            raise BackendError(self._failed(error)) from error

    def _check(self, model: Any) -> None:
        """Raise BackendError unless outputs are in the manifest's order, in which they are bound."""
        expected = [spec.name for spec in outputs_of(self._graph)]
        given = [port.get_names() for port in model.outputs]
        if len(given) != len(expected) or not all(name in names for name, names in zip(expected, given, strict=True)):
            told = ", ".join("/".join(sorted(names)) for names in given)
            raise BackendError(
                MSG_DIFFERS.format(graph=Path(self._graph.file).stem, given=told, expected=", ".join(expected))
            )

    def _failed(self, error: Exception) -> str:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        return MSG_FAILED.format(graph=Path(self._graph.file).stem, problem=problem)
