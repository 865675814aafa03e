"""Run graphs of a bundle in ExecuTorch's runtime."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tgate_compile._errors import BackendError, first_line
from tgate_compile.bundle.manifest import Graph

if TYPE_CHECKING:
    from executorch.runtime import Program

logger = logging.getLogger(__name__)


def open_program(path: Path) -> Program:
    """Open the program in the file `path` and check that it is consistent, without running it.

    Raises:
        BackendError: the file is not a program, or is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that the interface is experimental
        from executorch.runtime import Runtime, Verification
    try:
        return Runtime.get().load_program(path, verification=Verification.InternalConsistency)
    except RuntimeError as error:
        raise BackendError(_failed("read", path, error)) from error


class ExecuTorchSession:
    """A session that runs a method of a program, with weights mapped from the file; XNNPACK makes packed copies.

    Raises:
        BackendError: the runtime cannot load the method, or lacks a delegate or an operator that it needs.
    """

    def __init__(self, graph: Graph, root: Path, device: torch.device) -> None:
        began = time.perf_counter()
        if device.type != "cpu":
            raise BackendError(
                f'A bundle of format "executorch" runs on the CPU, but the pipeline is on "{device}". Call '
                'pipe.to("cpu") first.'
            )
        assert graph.entry is not None
        self._path = root / graph.file
        self._entry = graph.entry
        self._program = open_program(self._path)  # kept because the method uses its memory
        try:
            method = self._program.load_method(graph.entry)
        except (RuntimeError, KeyError) as error:
            raise BackendError(_failed(f"load {graph.entry} of", self._path, error)) from error
        assert method is not None
        self._method = method
        logger.info("opened %s of %s in %.1f s", graph.entry, self._path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """The name of the runtime and of its device."""
        return "ExecuTorch, cpu"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on `inputs` and return all outputs, both in the order of the manifest, caches last."""
        try:
            return list(self._method.execute([tensor.contiguous() for tensor in inputs]))
        except RuntimeError as error:
            raise BackendError(_failed(f"run {self._entry} of", self._path, error)) from error


def _failed(what: str, path: Path, error: Exception) -> str:
    return f"ExecuTorch could not {what} {path} ({first_line(error, named=True)})."
