"""Literal types for arguments of the public functions, and checks that several of these functions share."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tgate_compile._errors import ConfigurationError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: Values of `backend=` in `optimize`, `tune` and `evaluate`. A test compares these names with the tables of runtimes.
BackendName = Literal["inductor", "onnxruntime", "openvino", "tensorrt", "eager", "auto"]
#: Values of `format=` in `export`.
FormatName = Literal["onnx", "tensorrt-rtx", "tensorrt", "openvino", "aoti", "executorch", "coreml"]
#: Values of `backend=` in `load`.
BundleBackendName = Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "aoti", "executorch", "coreml"]

#: A pipeline, or a similar object. `Any` is for mypy, which resolves the pipelines that diffusers exports to the
#: placeholders in `diffusers.utils.dummy_torch_and_transformers_objects`; these do not derive from DiffusionPipeline.
AnyPipeline: TypeAlias = "DiffusionPipeline | Any"

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
    """Return `value` for a message; a pipeline, or a value with a long representation, is described by its type."""
    if _is_like_pipeline(value):
        return f"a {type(value).__name__}"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"a {type(value).__name__}"


def _is_like_pipeline(value: object) -> bool:
    is_object = callable(value) and not isinstance(value, type)
    return is_object and any(hasattr(value, name) for name in ("scheduler", "components"))
