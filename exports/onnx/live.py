"""Run graphs live in ONNX Runtime, the fastest backend on CPUs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tgate_compile._errors import BackendError, ConfigurationError, cause_of
from tgate_compile._runtimes import check_backend_installed
from tgate_compile.engine.backends import SWITCH, Option, Runner, at_least, check_known_options
from tgate_compile.engine.samples import MadeOfWeights
from tgate_compile.exports.onnx.convert import SerializedOnnx, serialized_onnx
from tgate_compile.exports.onnx.session import ELEMENT_TYPES, best_providers, open_session, run_bound, session_options
from tgate_compile.passes.graphs import Variant

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

#: The options of the backend, and their valid values.
OPTIONS: Mapping[str, Option] = {
    "providers": Option(
        "a list of execution provider names, of which the first that supports an operator runs it",
        lambda given: isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given),
    ),
    "threads": at_least(1, "a whole number of threads, at least 1"),
    "prepacking": Option("True (faster) or False (weights are not copied)", SWITCH.fits),
}


#: The providers that compute float32 in float32, with the options that `open_session` gives them.
_FULL_PRECISION = frozenset({"CPUExecutionProvider", "CUDAExecutionProvider"})


class OnnxRuntimeBackend:
    """A backend that converts a graph to ONNX once, and runs it in ONNX Runtime on the memory of the live weights."""

    name: ClassVar[str] = "onnxruntime"
    packs_weights: ClassVar[bool] = True
    is_reference: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = options

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        check_backend_installed("onnxruntime")
        check_known_options('backend="onnxruntime"', "backend_options", options, OPTIONS)
        if "providers" in options:
            _check_providers(options["providers"])  # type: ignore[arg-type]

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        """Return None for providers that compute float32 in float32; others may round like float16."""
        providers: Any = self._options.get("providers") or best_providers(device)
        return None if set(providers) <= _FULL_PRECISION else torch.float16

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        device = inputs[0].device
        providers = self._options.get("providers") or best_providers(device)
        _check_providers(providers)  # type: ignore[arg-type]
        try:
            graph = serialized_onnx(variant, "file")
        except ConfigurationError:
            raise
        except Exception as error:  # torch.onnx raises whatever its converters raise
            raise BackendError(_failed(variant, error)) from error
        return _Session(variant, graph, device, list(providers), self._options)  # type: ignore[call-overload]


class _Session:
    """A runner. Its session, which may have copied the weights into packed layouts, is recreated when they change."""

    def __init__(
        self,
        variant: Variant,
        graph: SerializedOnnx,
        device: torch.device,
        providers: list[str],
        options: Mapping[str, object],
    ) -> None:
        self._variant = variant
        self._graph = graph
        self._device = device
        self._providers = providers
        self._options = options
        self._input_names = graph.inputs
        self._outputs = [
            (name, node.meta["val"].shape, node.meta["val"].dtype)
            for name, node in zip(graph.outputs, variant.program.graph.output_node().args[0], strict=True)
        ]
        self._positions = [variant.weights.index(name) for name in graph.weights]
        self._session = MadeOfWeights(self._open)
        self._held: list[Any] = []

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        session = self._session.of(weights, self._positions)
        named = dict(zip(self._input_names, inputs, strict=True))
        try:
            return run_bound(session, named, self._outputs, self._device)
        except RuntimeError as error:
            raise BackendError(_failed(self._variant, error)) from error

    @property
    def remade(self) -> int:
        """How often the graph has been compiled again because the weights had changed."""
        return self._session.remade

    def release(self) -> None:
        """Close the session and release the weights."""
        self._session.release()
        self._held = []

    def _open(self, weights: Sequence[torch.Tensor]) -> onnxruntime.InferenceSession:
        began = time.perf_counter()
        settings = session_options(self._options)
        tensors = [tensor.detach().cpu().contiguous() for tensor in weights]
        values = [_ort_value(tensor) for tensor in tensors]
        self._held = [tensors, values]  # until the session has been opened
        settings.add_external_initializers(list(self._graph.weights), values)
        try:
            session = open_session(self._graph.data, settings, self._providers, self._device)
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise BackendError(_failed(self._variant, error)) from error
        if self._device.type != "cpu":
            self._held = []  # copies; on a CPU they share the memory of the weights
        logger.info(
            "opened the %s graph in ONNX Runtime (%s) in %.1f s",
            self._variant.phase.name, ", ".join(session.get_providers()), time.perf_counter() - began,
        )  # fmt: skip
        return session


def _ort_value(tensor: torch.Tensor) -> Any:
    """Return an OrtValue that shares the memory of `tensor`."""
    import onnxruntime

    if tensor.dtype is torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ELEMENT_TYPES[tensor.dtype])
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _check_providers(names: Sequence[str]) -> None:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for name in names:
        if name not in available:
            raise ConfigurationError(
                f"This build of onnxruntime has no {name}; it has {', '.join(available)}. For NVIDIA GPUs, run pip "
                "uninstall onnxruntime, then pip install 'tgate_compile[onnx-gpu]'."
            )


def _failed(variant: Variant, error: Exception) -> str:
    return (
        f"ONNX Runtime could not open or run the {variant.phase.name} graph ({cause_of(error)}). optimize(pipe, "
        'backend="eager") or backend="inductor" runs the same graph.'
    )
