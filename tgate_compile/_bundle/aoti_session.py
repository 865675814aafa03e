"""One of a bundle's graphs, run by AOTInductor's runtime: native code on weights that are mapped from the bundle."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_compile._bundle.aoti_package import check_runs_here
from tgate_compile._bundle.manifest import Graph
from tgate_compile._bundle.mapped_weights import mapped_weights
from tgate_compile._errors import BackendError, TGateError

logger = logging.getLogger(__name__)

MSG_FAILED = "AOTInductor could not {what} {entry} of {path} ({problem}). This is torch {torch}."


class AotiSession:
    """Runs an entry of a package for inputs on `device`; all entries of a bundle work on the same weights.

    torch unpacks the entry into a folder of its own in the system's temporary folder. It is removed with the session,
    or when Python exits; a process that is killed leaves it.

    Raises:
        BackendError: the code is for another machine, or cannot be loaded.
        BundleError: the bundle has not the weights that the code asks for.
    """

    def __init__(self, graph: Graph, root: Path, device: torch.device) -> None:
        began = time.perf_counter()
        assert graph.entry is not None
        self._path = root / graph.file
        self._entry = graph.entry
        self._device = device
        index = -1 if device.index is None else device.index
        try:
            check_runs_here(self._path, graph.entry, device)
            # Not torch's load_package, which opens all entries, and reads exported programs, which it unpickles.
            loader = torch._C._aoti.AOTIModelPackageLoader(str(self._path), graph.entry, False, 1, index)
            self._weights = mapped_weights(root, device)
            # The loader keeps their addresses only: self._weights keeps them alive.
            loader.load_constants(self._weights.tensors(loader.get_constant_fqns()), False, True, True)
        except TGateError:
            raise
        except (RuntimeError, OSError) as error:
            raise BackendError(self._failed("load", error)) from error
        held: list[Any] = [loader]
        self._held = held
        weakref.finalize(self, held.clear)  # at the latest when Python exits, which does not destroy what is left
        logger.info("opened %s of %s in %.1f s", graph.entry, self._path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """For the manifest's parity."""
        return f"AOTInductor, {self._device.type}"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last."""
        # Compiled code is made for fixed strides: contiguous ones.
        try:
            outputs: list[torch.Tensor] = self._held[0].boxed_run([tensor.contiguous() for tensor in inputs])
        except RuntimeError as error:
            raise BackendError(self._failed("run", error)) from error
        return outputs

    def _failed(self, what: str, error: Exception) -> str:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        return MSG_FAILED.format(
            what=what, entry=self._entry, path=self._path, problem=problem, torch=torch.__version__
        )
