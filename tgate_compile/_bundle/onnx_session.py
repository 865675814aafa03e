"""One of a bundle's ONNX graphs in ONNX Runtime."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tgate_compile._backends.onnx_session import best_providers, open_session, run_bound, session_options
from tgate_compile._bundle.manifest import Graph
from tgate_compile._bundle.session import inputs_of, output_shapes, outputs_of
from tgate_compile._errors import BackendError

logger = logging.getLogger(__name__)

MSG_FAILED = "ONNX Runtime could not run the {graph} graph of the bundle ({problem})."


class OnnxSession:
    """Runs the graph in the file `path`, which `graph` describes, for inputs on `device`.

    ONNX Runtime maps the weights from the bundle's file. With prepacking, which is faster, it copies them into layouts
    of its own.
    """

    def __init__(self, graph: Graph, path: Path, device: torch.device, options: Mapping[str, object]) -> None:
        began = time.perf_counter()
        self._graph = graph
        self._path = path
        self._device = device
        providers = options.get("providers") or best_providers(device)
        try:
            self._session = open_session(path, session_options(options), providers)  # type: ignore[arg-type]
        except Exception as error:  # ONNX Runtime has no common base class of its errors
            raise BackendError(failed(path, error)) from error
        logger.info("opened %s in ONNX Runtime in %.1f s", path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """The execution provider that is asked first."""
        return str(self._session.get_providers()[0])

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last."""
        named = {spec.name: tensor for spec, tensor in zip(inputs_of(self._graph), inputs, strict=True)}
        outputs = [
            (spec.name, shape, getattr(torch, spec.dtype))
            for spec, shape in zip(outputs_of(self._graph), output_shapes(self._graph, inputs), strict=True)
        ]
        try:
            return run_bound(self._session, named, outputs, self._device)
        except RuntimeError as error:
            raise BackendError(failed(self._path, error)) from error


def failed(path: Path, error: Exception) -> str:
    """What to say when ONNX Runtime does not take or run the graph at `path`."""
    return MSG_FAILED.format(graph=path.stem, problem=f"{type(error).__name__}: {error}".splitlines()[0])
