"""Errors, the checks of arguments and packages that raise them, and the cause of another library's error."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Literal

#: The last sentence of messages about pipelines and calls that cannot be gated.
INSTEAD = 'What works instead: the pipeline without tgate_compile, or optimize(..., on_unsupported="plain").'


class TGateError(Exception):
    """Base class of the library's errors."""


class ConfigurationError(TGateError, ValueError):
    """An argument is wrong. The message states what was given, what was expected and how to fix it."""


class UnsupportedModelError(TGateError):
    """The pipeline or denoiser cannot be gated. The message states the reason and what works instead."""


class UnsupportedCallError(UnsupportedModelError, ConfigurationError):
    """A call cannot be gated with its arguments. The message states the reason and what to change."""


class CaptureError(TGateError, RuntimeError):
    """The denoiser could not be captured as a graph."""


class BackendError(TGateError, RuntimeError):
    """A backend could not compile a graph."""


class VerificationError(TGateError, RuntimeError):
    """A rewritten graph is not valid. This is a bug in tgate_compile: please report it."""


class ConcurrentGenerationError(TGateError, RuntimeError):
    """A second generation was started on a denoiser that is in the middle of one."""


class BundleError(TGateError, RuntimeError):
    """A bundle cannot be written, is damaged, or does not belong to the pipeline, as the message states."""


def first_line(error: BaseException, *, named: bool = False) -> str:
    """Return the first line of another package's error, without its full stop; `named` prepends the error's class.

    For an error without a message it is the name of the class.
    """
    name = type(error).__name__
    line = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "")
    if not line:
        return name
    return f"{name}: {line}" if named else line


#: Additions to the message of `check_installed`, by extra.
HINTS = {
    "onnx": " (or 'tgate_compile[onnx-gpu]' on a machine with an NVIDIA GPU)",
    "tensorrt": ", which fetches NVIDIA's packages from NVIDIA's own index",
}


def is_installed(*modules: str) -> bool:
    """Return whether all of these modules are installed."""
    return all(importlib.util.find_spec(name) is not None for name in modules)


def check_installed(*modules: str, extra: str = "onnx", what: str = "ONNX") -> None:
    """Raise ConfigurationError, with the command to install them, unless all of these modules are installed."""
    missing = ", ".join(name for name in modules if not is_installed(name))
    if missing:
        raise ConfigurationError(
            f"{what} needs packages that are not installed: {missing}. Run: pip install "
            f"'tgate_compile[{extra}]'{HINTS.get(extra, '')}."
        )


#: Lines of OpenVINO's errors that only locate the error in OpenVINO's source.
_PLACES = re.compile(r"^(Exception from |Check .* failed at |While validating |Error loading )")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def cause_of(error: BaseException) -> str:
    """Return the root cause of `error` on one line.

    torch.onnx wraps the cause in general advice, and OpenVINO puts locations in its source code before it. For an error
    of this library the result is the message alone; otherwise the error's class precedes it.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not _PLACES.match(line)] or lines or [""]
    line = telling[0].rstrip(".")
    return line if isinstance(error, TGateError) else f"{type(error).__name__}: {line}"


#: Values of `backend=` in `optimize`, `tune` and `evaluate`. A test compares these names with the tables of runtimes.
BackendName = Literal["inductor", "onnxruntime", "openvino", "tensorrt", "eager", "auto"]
#: Values of `precision=` in `optimize`, `tune` and `evaluate`.
Precision = Literal["auto", "float32", "bfloat16", "float16"]
#: Values of `format=` in `export`.
FormatName = Literal["onnx", "tensorrt-rtx", "tensorrt", "openvino", "aoti", "executorch", "coreml"]
#: Values of `backend=` in `load`.
BundleBackendName = Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "aoti", "executorch", "coreml"]


#: Names that diffusers' pipelines still accept, although their signatures no longer list them.
_DEPRECATED = ("callback", "callback_steps")
#: The largest number of names that a message lists.
_MOST_LISTED = 40


def did_you_mean(given: object, known: Collection[str]) -> str:
    """Return a hint with the most similar name in `known`, with a leading space; empty if none is similar."""
    nearest = difflib.get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return f' Did you mean "{nearest[0]}"?' if nearest else ""


def check_names(given: Mapping[str, object], known: Collection[str], what: str, *, source: str | None = None) -> None:
    """Raise ConfigurationError unless every key of `given` is in `known`.

    Args:
        given: the options, by name.
        known: the accepted names.
        what: the owner of the options, as the beginning of a sentence.
        source: the place that lists the names, if there are too many to print.
    """
    for name in given:
        if name not in known:
            listed = f"It accepts: {', '.join(known)}." if known else "It accepts none."
            where = listed if len(known) <= _MOST_LISTED or source is None else f"{source} lists what it accepts."
            raise ConfigurationError(f'{what} has no option "{name}".{did_you_mean(name, known)} {where}')


def check_call(call: object, pipeline: type, *, argument: str = "call") -> None:
    """Raise ConfigurationError unless `call` holds arguments that the call of the class `pipeline` accepts.

    A pipeline whose call has `**kwargs` accepts every name, except for diffusers' own pipelines, which ignore unknown
    names.
    """
    if not isinstance(call, Mapping):
        raise ConfigurationError(
            f"{argument} must be a mapping of arguments for the pipeline's call, such as "
            f'{{"height": 512, "width": 512}}, but got {brief(call)}.'
        )
    parameters = inspect.signature(pipeline.__call__).parameters
    known = [name for name, each in parameters.items() if name != "self" and each.kind is not each.VAR_KEYWORD]
    takes_any = len(known) < len(parameters) - 1 and "prompt" not in known
    if takes_any or not pipeline.__module__.startswith("diffusers."):
        return
    check_names(call, [*known, "gate_step", *_DEPRECATED], f"{argument}: the call of {pipeline.__name__}")


def check_pipeline_first(function: str, first: object, *others: object) -> None:
    """Raise ConfigurationError if the pipeline was passed to `function` as a later argument, not as the first."""
    if _is_like_pipeline(first) or not any(map(_is_like_pipeline, others)):
        return
    pipeline = next(type(other).__name__ for other in others if _is_like_pipeline(other))
    raise ConfigurationError(
        f"{function}() takes the pipeline first, but got {brief(first)} first and the {pipeline} after it. Swap them: "
        f"{function}(pipe, {brief(first)}, ...)."
    )


def brief(value: object) -> str:
    """Return `value` for a message; for a pipeline or a value with a long representation, return the type."""
    if _is_like_pipeline(value):
        return f"a {type(value).__name__}"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"a {type(value).__name__}"


def _is_like_pipeline(value: object) -> bool:
    is_object = callable(value) and not isinstance(value, type)
    return is_object and any(hasattr(value, name) for name in ("scheduler", "components"))
