"""One ONNX file in ONNX Runtime, on OrtValues: what one run returns, another takes without a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import BackendError, BundleError, ConfigurationError, first_line
from tgate_compile.bundle.manifest import TensorSpec
from tgate_compile.runtime._noise import Array

if TYPE_CHECKING:
    from onnxruntime import OrtValue


@dataclass(frozen=True)
class Settings:
    """How sessions are opened.

    Attributes:
        providers: execution providers, the first that takes an operator runs it.
        threads: of one operator; None: as many as there are cores.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int | None = None

    def check(self) -> None:
        """Raise ConfigurationError if there is no such provider."""
        import onnxruntime

        known = onnxruntime.get_available_providers()
        missing = [name for name in self.providers if name not in known]
        if missing:
            raise ConfigurationError(f"This onnxruntime has no {' and no '.join(missing)}. It has {', '.join(known)}.")

    @property
    def device(self) -> str:
        """Where values lie that one run hands to another."""
        return "cuda" if self.providers[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"


class Session:
    """Runs the file at `path`, whose inputs and outputs are those that the manifest says."""

    def __init__(
        self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], settings: Settings
    ) -> None:
        """Raises BackendError if ONNX Runtime does not take it, and BundleError if it is another graph."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # its warnings are about its own placement of operators
        options.intra_op_num_threads = settings.threads or 0
        try:
            # It refuses weights from anywhere but the file's own folder.
            self._session = onnxruntime.InferenceSession(path, options, providers=list(settings.providers))
        except Exception as error:  # ONNX Runtime has no common base class of its errors
            raise BackendError(_failed("open", path, error)) from error
        given = [
            [value.name for value in values] for values in (self._session.get_inputs(), self._session.get_outputs())
        ]
        expected = [[spec.name for spec in specs] for specs in (inputs, outputs)]
        if given != expected:
            raise BundleError(f"{path} takes and returns {given}, and the manifest says {expected}.")
        self._path = path
        self._outputs = expected[1]
        self._device = settings.device

    def run(self, inputs: Mapping[str, OrtValue], *, kept: int = 0) -> list[OrtValue]:
        """All outputs; the last `kept` of them stay on the device, for another run.

        Raises:
            BackendError: ONNX Runtime fails.
        """
        binding: Any = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for index, name in enumerate(self._outputs):
            binding.bind_output(name, self._device if index >= len(self._outputs) - kept else "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(_failed("run", self._path, error)) from error
        outputs: list[OrtValue] = binding.get_outputs()
        return outputs


def ort_value(array: Array, spec: TensorSpec) -> OrtValue:
    """`array` as what `spec` is, on the CPU."""
    import numpy as np
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, dtype=spec.dtype, order="C"))


def detached(value: OrtValue) -> OrtValue:
    """A copy of what a session has returned, which else keeps that session, and all its weights, in memory."""
    import onnxruntime

    array, device = value.numpy(), value.device_name()
    if device == "cpu":  # numpy has fp8 as bytes, which only this one makes fp8 again
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, value.element_type())
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device)


def _failed(verb: str, path: Path, error: Exception) -> str:
    return f"ONNX Runtime could not {verb} {path} ({first_line(error, named=True)})."
