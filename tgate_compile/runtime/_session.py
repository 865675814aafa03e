"""Run ONNX files in ONNX Runtime on OrtValues, which can be passed from one run to another without a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import BackendError, BundleError, ConfigurationError, first_line
from tgate_compile._machine import default_threads
from tgate_compile.bundle.manifest import TensorSpec
from tgate_compile.runtime._noise import Array

if TYPE_CHECKING:
    from onnxruntime import OrtValue


@dataclass(frozen=True)
class Settings:
    """How sessions are opened.

    Attributes:
        providers: the execution providers, in order of priority.
        threads: the number of threads per operator; None means one per physical core that the process may use.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int | None = None

    def check(self) -> None:
        """Raise ConfigurationError if a provider is not available."""
        import onnxruntime

        known = onnxruntime.get_available_providers()
        missing = [name for name in self.providers if name not in known]
        if missing:
            raise ConfigurationError(f"This onnxruntime has no {' and no '.join(missing)}. It has {', '.join(known)}.")

    @property
    def device(self) -> str:
        """The device of values that are passed from one run to another."""
        return "cuda" if self.providers[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"


class Session:
    """A session that runs the file at `path`, with the inputs and outputs that the manifest describes."""

    def __init__(
        self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], settings: Settings
    ) -> None:
        """Open the file; raise BackendError if ONNX Runtime cannot, and BundleError if it is another graph."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # the warnings are about the placement of operators
        options.intra_op_num_threads = settings.threads or default_threads() or 0
        try:
            # ONNX Runtime rejects weights from anywhere but the file's own folder.
            self._session = onnxruntime.InferenceSession(path, options, providers=list(settings.providers))
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise BackendError(_failed("open", path, error)) from error
        given = [
            [value.name for value in values] for values in (self._session.get_inputs(), self._session.get_outputs())
        ]
        expected = [[spec.name for spec in specs] for specs in (inputs, outputs)]
        if given != expected:
            raise BundleError(f"{path} has the inputs and outputs {given}, but the manifest says {expected}.")
        self._path = path
        self._outputs = expected[1]
        self._device = settings.device

    def run(self, inputs: Mapping[str, OrtValue], *, kept: int = 0) -> list[OrtValue]:
        """Run the graph and return all outputs; the last `kept` of them stay on the device, for another run.

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
    """Return `array` as an OrtValue on the CPU, with the dtype of `spec`."""
    import numpy as np
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, dtype=spec.dtype, order="C"))


def detached(value: OrtValue) -> OrtValue:
    """Return a copy of a session's output, which itself would keep the session and its weights in memory."""
    import onnxruntime

    array, device = value.numpy(), value.device_name()
    if device == "cpu":  # numpy represents fp8 as bytes, and only this function converts them back
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, value.element_type())
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device)


def _failed(verb: str, path: Path, error: Exception) -> str:
    return f"ONNX Runtime could not {verb} {path} ({first_line(error, named=True)})."
