"""Compile models with OpenVINO, and run them on PyTorch tensors."""

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

from tgate_compile._errors import BackendError, ConfigurationError, check_installed, first_line
from tgate_compile.bundle.manifest import WEIGHTS_FILE, Graph
from tgate_compile.bundle.read_manifest import inputs_of, output_shapes, outputs_of
from tgate_compile.engine.backends import Option, at_least, check_known_options, one_of, threads_for

#: The package with which openvino sends an event when it is imported, unless the user has opted out before. If it is
#: missing, openvino uses its own stub.
_TELEMETRY = "openvino_telemetry"


def openvino() -> ModuleType:
    """Import the module `openvino` without its telemetry, unless it has already been imported elsewhere."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    was_there, before = _TELEMETRY in sys.modules, sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]
        if was_there and before is not None:
            sys.modules[_TELEMETRY] = before


@functools.cache
def core() -> Any:
    """Return the `openvino.Core` of this process, which loads its plug-ins only once."""
    return openvino().Core()


def _is_text(given: object) -> bool:
    return isinstance(given, str) and bool(given)


#: OpenVINO's names of the dtypes to compute in. Its own default would be bfloat16 on some CPUs.
PRECISIONS: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
OPTIONS: Mapping[str, Option] = {
    "device": Option('a device that OpenVINO finds here, such as "CPU", "GPU" or "NPU"', _is_text),
    "precision": Option(
        '"float32", or "float16" or "bfloat16", which are faster where the device supports them',
        one_of(PRECISIONS).fits,
    ),
    "threads": at_least(1, "a whole number of threads, at least 1"),
    "cache": Option("a folder for compiled graphs, which then open faster the next time", _is_text),
}

#: The attributes of `openvino.Type` for torch's dtypes.
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


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options that the backend does not know, or a device that is not available."""
    check_installed("openvino", extra="openvino", what='backend="openvino"')
    check_known_options('backend="openvino"', "backend_options", options, OPTIONS)
    _check_device(str(options.get("device", "CPU")))


def check_device(device: torch.device) -> None:
    """Raise BackendError unless OpenVINO can read tensors on `device`."""
    if device.type != "cpu":
        raise BackendError(
            f'The backend "openvino" needs tensors on the CPU, but the pipeline is on "{device}". Call '
            'pipe.to("cpu"); to compute on an Intel GPU, use backend_options={"device": "GPU"}.'
        )


class CompiledModel:
    """An `openvino.Model` compiled for a device, which is called with `inputs` of these names.

    Raises:
        Exception: openvino cannot compile the model; the error may have any class.
    """

    def __init__(self, model: Any, inputs: Sequence[str], options: Mapping[str, object]) -> None:
        device = str(options.get("device", "CPU"))
        settings: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[str(options.get("precision", "float32"))],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads_for(options)
        if "cache" in options:
            settings["CACHE_DIR"] = options["cache"]
        self.device = device
        taken = {name: position for position, port in enumerate(model.inputs) for name in port.get_names()}
        # OpenVINO drops inputs of which only the shape is used.
        self._positions = [taken.get(name) for name in inputs]
        self._request: Any = core().compile_model(model, device, settings).create_infer_request()
        self._bound: dict[int, torch.Tensor] = {}  # the inputs of the last run

    def run(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[tuple[Sequence[int], torch.dtype]]
    ) -> list[torch.Tensor]:
        """Run the model, and return new tensors with the shapes and dtypes of `outputs`.

        Raises:
            RuntimeError: openvino fails.
        """
        held = [tensor.contiguous() for tensor in inputs]  # must live until the run is over
        results = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in outputs]
        for position, tensor in zip(self._positions, held, strict=True):
            if position is not None and not _is_same_memory(tensor, self._bound.get(position)):
                self._request.set_input_tensor(position, shared(tensor))
                self._bound[position] = tensor  # kept, so that its memory belongs to no other tensor
        for position, tensor in enumerate(results):
            self._request.set_output_tensor(position, shared(tensor))
        self._request.infer()
        return results


def _is_same_memory(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Return whether two contiguous tensors, of which the second still exists, are the same part of the memory."""
    return (
        other is not None
        and tensor.data_ptr() == other.data_ptr()
        and tensor.shape == other.shape
        and tensor.dtype == other.dtype
    )


def shared(tensor: torch.Tensor) -> Any:
    """Return an `openvino.Tensor` that shares the memory of `tensor`, which is contiguous and on the CPU."""
    package = openvino()
    # Strides of dimensions of size 1 may be anything.
    content = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    element = getattr(package.Type, ELEMENT_TYPES[tensor.dtype])
    return package.Tensor(content, package.Shape(list(tensor.shape)), element)


def _check_device(given: str) -> None:
    """Raise ConfigurationError unless OpenVINO finds the device `given`.

    `GPU` exists if `GPU.0` does. `AUTO:GPU,CPU` and similar names need all devices that they name.
    """
    available = core().available_devices
    found = {*available, *(name.partition(".")[0] for name in available), "AUTO", "HETERO", "MULTI"}
    if not all(name in found for name in re.split("[:,]", given)):
        raise ConfigurationError(
            f'OpenVINO finds no device "{given}" here; it has {", ".join(available)}. Intel GPUs and NPUs need '
            "drivers: see https://docs.openvino.ai/."
        )


logger = logging.getLogger(__name__)


class OpenVinoSession:
    """A session that runs `graph` of the bundle at `root`, an OpenVINO or an ONNX file.

    OpenVINO maps the weights from the bundle's file, and copies them into the layouts that it computes with.
    """

    def __init__(self, graph: Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> None:
        check_device(device)
        began = time.perf_counter()
        self._graph = graph
        path = root / graph.file
        try:
            # An ONNX file names its weights file itself.
            weights = () if path.suffix == ".onnx" else (root / WEIGHTS_FILE,)
            model = core().read_model(path, *weights)
            self._check(model)
            self._compiled = CompiledModel(model, [spec.name for spec in inputs_of(graph)], options)
        except BackendError:
            raise
        except Exception as error:  # openvino's errors have no common base class
            raise BackendError(self._failed(error)) from error
        logger.info("opened %s in OpenVINO in %.1f s", path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """The name of the runtime and of its device."""
        return f"OpenVINO, {self._compiled.device}"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on `inputs` and return all outputs, both in the order of the manifest, caches last."""
        outputs = [
            (shape, getattr(torch, spec.dtype))
            for spec, shape in zip(outputs_of(self._graph), output_shapes(self._graph, inputs), strict=True)
        ]
        try:
            return self._compiled.run(inputs, outputs)
        except RuntimeError as error:
            raise BackendError(self._failed(error)) from error

    def _check(self, model: Any) -> None:
        """Raise BackendError unless the outputs are in the manifest's order, in which they are bound."""
        expected = [spec.name for spec in outputs_of(self._graph)]
        given = [port.get_names() for port in model.outputs]
        if len(given) != len(expected) or not all(name in names for name, names in zip(expected, given, strict=True)):
            found = ", ".join("/".join(sorted(names)) for names in given)
            raise BackendError(
                f"The {Path(self._graph.file).stem} graph has the outputs {found} in OpenVINO, but the manifest says "
                f"{', '.join(expected)}."
            )

    def _failed(self, error: Exception) -> str:
        problem = first_line(error, named=True)
        return f"OpenVINO could not run the {Path(self._graph.file).stem} graph of the bundle ({problem})."
