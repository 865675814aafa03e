"""Which input of a denoiser carries the latents, and which the timestep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tgate_compile._errors import UnsupportedModelError

#: Names under which denoisers take the latents, the surest first.
LATENTS_NAMES = ("sample", "hidden_states", "latents", "noisy_latents", "latent", "x", "x_t", "z", "z_t")

_TIME = re.compile(r"^[trs]$|(^|_)(time|times|time_?steps?|sigmas?|noise_levels?|noise_labels?|log_?snr)($|_)|^t_")
_CONDITION = re.compile(
    r"encoder|context|ctx|text|txt|prompt|cond|caption|cap_|emb|label|class|mask|guid|pool|control|memory|hint|ref|adapter"
    r"|^[cy]$"
)

MSG_NO_LATENTS = (
    "The denoiser was called without a tensor that could be its latents: {given}. It must take them as a tensor of at "
    "least two dimensions, the batch first."
)


def named_leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a call's bound `arguments`, each with its innermost name: a key's in a dict, or the parameter's."""
    for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        yield next(key for key in reversed(keys) if isinstance(key, str)), leaf


def latents_of(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The latents among a denoiser call's bound `arguments`, which may be nested.

    They are the argument with one of `LATENTS_NAMES`, else the first tensor of floating-point numbers with two
    dimensions or more whose name is not one for time, text or another condition.

    Raises:
        UnsupportedModelError: there is no such tensor.
    """
    leaves = list(named_leaves(arguments))
    tensors: list[tuple[str, torch.Tensor]] = [(name, leaf) for name, leaf in leaves if _may_be_latents(leaf)]
    for wanted in LATENTS_NAMES:
        for name, leaf in tensors:
            if name == wanted:
                return leaf
    unnamed = [leaf for name, leaf in tensors if not is_time(name) and _CONDITION.search(name.lower()) is None]
    if not tensors:
        given = ", ".join(f"{name}: {_in_words(leaf)}" for name, leaf in leaves) or "nothing"
        raise UnsupportedModelError(MSG_NO_LATENTS.format(given=given))
    return (unnamed or [leaf for _, leaf in tensors])[0]


def timestep_of(arguments: Mapping[str, Any]) -> Any:
    """The timestep among a denoiser call's bound `arguments`: a tensor, or a number; None if nothing looks like one.

    It is called `timestep`, or has another name for time, or is a tensor of no dimensions.
    """
    leaves = [
        (name, leaf)
        for name, leaf in named_leaves(arguments)
        # One for each frame, in more dimensions, is told by its name alone.
        if (torch.is_tensor(leaf) and (leaf.ndim <= 2 or name == "timestep"))
        or (isinstance(leaf, (int, float)) and not isinstance(leaf, bool))
    ]
    exact = [leaf for name, leaf in leaves if name == "timestep"]
    named = [leaf for name, leaf in leaves if is_time(name)]
    scalars = [leaf for _, leaf in leaves if torch.is_tensor(leaf) and leaf.ndim == 0]
    return next(iter([*exact, *named, *scalars]), None)


def is_time(name: str) -> bool:
    """Whether an argument called `name` is a timestep or a noise level."""
    return _TIME.search(name.lower()) is not None


def fits(latents: Sequence[str], output: Sequence[str]) -> bool:
    """Whether a prediction of these sizes may be one for `latents`: they differ in the channels at most."""
    return len(latents) == len(output) and sum(a != b for a, b in zip(latents, output, strict=True)) <= 1


def _may_be_latents(leaf: object) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.ndim >= 2


def _in_words(leaf: object) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if torch.is_tensor(leaf) else repr(leaf)
