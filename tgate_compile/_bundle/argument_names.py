"""Names for the leaves of a denoiser call: `sample`, `added_cond_kwargs.text_embeds`, `residuals.0`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

from tgate_compile._call import Call


def argument_names(call: Call, forward: Callable[..., Any]) -> tuple[str, ...]:
    """For each leaf of `call`, in order, the parameter of `forward` that it is, and its path inside of it."""
    parameters = list(inspect.signature(forward).parameters)
    leaves, _ = pytree.tree_flatten_with_path(call.arguments)
    return tuple(_name(path, parameters) for path, _ in leaves)


def _name(path: tuple[Any, ...], parameters: list[str]) -> str:
    (part, first, *rest) = [_key(step) for step in path]
    positional = part == 0
    return ".".join(str(step) for step in (parameters[first] if positional else first, *rest))


def _key(step: Any) -> Any:
    return step.idx if isinstance(step, pytree.SequenceKey) else getattr(step, "key", None) or getattr(step, "name", "")
