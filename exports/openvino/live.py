"""Run graphs live in OpenVINO, on Intel's CPUs, GPUs and NPUs and on other CPUs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tgate_compile._errors import BackendError, ConfigurationError, cause_of
from tgate_compile._runtimes import check_backend_installed
from tgate_compile.engine.backends import Runner
from tgate_compile.engine.choice import model_dtype
from tgate_compile.engine.samples import MadeOfWeights
from tgate_compile.exports.onnx.convert import SerializedOnnx, serialized_onnx
from tgate_compile.exports.openvino.session import (
    PRECISIONS,
    CompiledModel,
    check_device,
    check_options,
    core,
    openvino,
    shared,
)
from tgate_compile.passes.graphs import Variant

logger = logging.getLogger(__name__)


class OpenVinoBackend:
    """A backend that converts a graph to ONNX once, and compiles it in OpenVINO, again whenever the weights change."""

    name: ClassVar[str] = "openvino"
    packs_weights: ClassVar[bool] = True
    is_reference: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = options

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        check_backend_installed("openvino")
        check_options(options)

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        precision: torch.dtype | None = getattr(torch, str(self._options.get("precision")), None)
        return None if precision is torch.float32 else precision

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        check_device(inputs[0].device)
        try:
            graph = serialized_onnx(variant, "inputs")
            own = str(model_dtype(variant)).removeprefix("torch.")
            return _Compiled(variant, graph, {"precision": own if own in PRECISIONS else "float32", **self._options})
        except ConfigurationError:
            raise
        except Exception as error:  # torch.onnx and openvino raise errors of any class
            raise BackendError(_failed(variant, error)) from error


class _Compiled:
    """A runner whose model is recompiled when the weights change."""

    def __init__(self, variant: Variant, graph: SerializedOnnx, options: Mapping[str, object]) -> None:
        self._variant = variant
        self._options = options
        self._names = graph.weights
        self._inputs = graph.inputs
        self._positions = [variant.weights.index(name) for name in graph.weights]
        self._outputs = [
            (tuple(node.meta["val"].shape), node.meta["val"].dtype)
            for node in variant.program.graph.output_node().args[0]
        ]
        self._model = core().read_model(graph.data)
        self._compiled = MadeOfWeights(self._compile)
        self._held: list[torch.Tensor] = []

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        compiled = self._compiled.of(weights, self._positions)
        try:
            return compiled.run(inputs, self._outputs)
        except RuntimeError as error:
            raise BackendError(_failed(self._variant, error)) from error

    @property
    def remade(self) -> int:
        """How often the graph has been compiled again because the weights had changed."""
        return self._compiled.remade

    def release(self) -> None:
        """Release the compiled model and the weights."""
        self._compiled.release()
        self._held = []

    def _compile(self, weights: Sequence[torch.Tensor]) -> CompiledModel:
        began = time.perf_counter()
        self._held = [tensor.detach().contiguous() for tensor in weights]  # the model uses their memory
        model: Any = self._model.clone()
        inputs = {parameter.get_friendly_name(): parameter for parameter in model.get_parameters()}
        try:
            for name, tensor in zip(self._names, self._held, strict=True):
                constant = openvino().op.Constant(shared(tensor), shared_memory=True)
                inputs[name].output(0).replace(constant.output(0))
                model.remove_parameter(inputs[name])
            model.validate_nodes_and_infer_types()
            compiled = CompiledModel(model, self._inputs, self._options)
        except Exception as error:  # openvino's errors have no common base class
            raise BackendError(_failed(self._variant, error)) from error
        logger.info(
            "compiled the %s graph in OpenVINO (%s) in %.1f s",
            self._variant.phase.name, compiled.device, time.perf_counter() - began,
        )  # fmt: skip
        return compiled


def _failed(variant: Variant, error: Exception) -> str:
    return (
        f"OpenVINO could not open or run the {variant.phase.name} graph ({cause_of(error)}). optimize(pipe, "
        'backend="eager") or backend="onnxruntime" runs the same graph.'
    )
