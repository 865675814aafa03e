"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch

from tgate_compile._graphs import Variant

#: Runs a variant: (weights, inputs and caches) -> outputs and caches, all flat and in the variant's order. The
#: weights are passed in every call, so that a backend has no copy that could go stale.
Runner = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Backend(Protocol):
    """Makes runners."""

    name: ClassVar[str]
    #: Whether each graph has its own copy of the weights, in the order that its runtime wants.
    packs_weights: ClassVar[bool] = False
    #: Whether its results are PyTorch's own, so that there is nothing to compare them with.
    is_reference: ClassVar[bool]

    def __init__(self, options: Mapping[str, object]) -> None: ...

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options that the backend does not know."""

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        """The dtype that it computes in on `device` where that may round more than the values' own; else None."""
        ...

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        """A runner of `variant` for inputs and caches of the shapes, dtypes and devices of these.

        Raises:
            BackendError: the graph cannot be compiled.
        """
        ...
