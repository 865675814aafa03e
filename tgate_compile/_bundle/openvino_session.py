"""One of a bundle's graphs in OpenVINO."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_compile._backends.openvino_model import CompiledModel, check_device
from tgate_compile._backends.openvino_package import core
from tgate_compile._bundle.manifest import WEIGHTS_FILE, Graph
from tgate_compile._bundle.session import inputs_of, output_shapes, outputs_of
from tgate_compile._errors import BackendError

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
