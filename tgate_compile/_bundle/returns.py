"""What a denoiser's outputs are put into: a tuple, or one of diffusers' output classes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch.utils import _pytree as pytree

from tgate_compile._bundle.manifest import Returns
from tgate_compile._errors import BundleError

MSG_NO_CLASS = (
    "The bundle's denoiser returns a {name}, and {module} has no such output class. Its diffusers was {version}."
)


def returns_of(spec: pytree.TreeSpec) -> Returns | None:
    """What `spec` puts outputs into; None if it is neither."""
    if spec == pytree.tree_structure(tuple(range(spec.num_leaves))):
        return Returns(class_name=None, fields=[])
    is_output = isinstance(spec.type, type) and issubclass(spec.type, BaseOutput)
    if is_output and len(spec.context) == spec.num_leaves:
        return Returns(class_name=spec.type.__name__, fields=list(spec.context))
    return None


def unflatten_as(returns: Returns, denoiser: torch.nn.Module, version: str) -> Callable[[Sequence[torch.Tensor]], Any]:
    """A function that puts outputs into what `denoiser` returns; `version` of diffusers is only told in the error.

    Raises:
        BundleError: there is no such class beside that of the denoiser.
    """
    if returns.class_name is None:
        return tuple
    module = type(denoiser).__module__
    found = getattr(sys.modules[module], returns.class_name, None)
    if not (isinstance(found, type) and issubclass(found, BaseOutput)):
        raise BundleError(MSG_NO_CLASS.format(name=returns.class_name, module=module, version=version))
    return lambda outputs: found(**dict(zip(returns.fields, outputs, strict=True)))
