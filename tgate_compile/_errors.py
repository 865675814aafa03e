"""Every error that tgate_compile raises on purpose; catch `TGateError` for all of them."""

#: The last sentence of messages about what cannot be gated.
INSTEAD = 'What works instead: the pipeline without tgate_compile, or optimize(..., on_unsupported="plain").'


class TGateError(Exception):
    """Base class of the library's own errors."""


class ConfigurationError(TGateError, ValueError):
    """An argument is wrong: the message says what was given, what was expected and what to do."""


class UnsupportedModelError(TGateError):
    """The pipeline or denoiser cannot be gated: the message says why and what works instead."""


class UnsupportedCallError(UnsupportedModelError, ConfigurationError):
    """A call cannot be gated as it is made: the message says why and what to change."""


class CaptureError(TGateError, RuntimeError):
    """The denoiser could not be captured as a graph."""


class BackendError(TGateError, RuntimeError):
    """A backend could not compile a graph."""


class VerificationError(TGateError, RuntimeError):
    """A rewritten graph is not what it must be. This is a bug of ours: please report it."""


class ConcurrentGenerationError(TGateError, RuntimeError):
    """A second generation was started on a denoiser that is in the middle of one."""


class BundleError(TGateError, RuntimeError):
    """A bundle cannot be written, is damaged, or does not belong to the pipeline: the message says which."""
