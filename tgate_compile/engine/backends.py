"""Backends run the graph of a variant: the interface that each implements, the eager one, and the choice of one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from tgate_compile._arguments import did_you_mean
from tgate_compile._errors import ConfigurationError
from tgate_compile._runtimes import BACKENDS, FORMATS, home_of
from tgate_compile.passes.graphs import Variant


@dataclass(frozen=True)
class Option:
    """What an option must be.

    Attributes:
        expected: in words, for "must be ...".
        fits: whether a value is that.
    """

    expected: str
    fits: Callable[[Any], bool]


SWITCH = Option("True or False", lambda given: isinstance(given, bool))


def one_of(names: Collection[str]) -> Option:
    """An option that is one of `names`."""
    return Option(" or ".join(f'"{name}"' for name in names), lambda given: isinstance(given, str) and given in names)


def at_least(least: int, expected: str) -> Option:
    """An option that is a whole number from `least`."""
    return Option(expected, lambda given: isinstance(given, int) and not isinstance(given, bool) and given >= least)


def check_known_options(
    owner: str,
    argument: Literal["backend_options", "format_options"],
    options: Mapping[str, object],
    known: Mapping[str, Option],
    note: str = "",
) -> None:
    """Check the `options` that were given as `argument` for `owner`, such as `format="onnx"`.

    Args:
        known: every option that `owner` has, by name.
        note: a sentence that ends the message of an `owner` without options.

    Raises:
        ConfigurationError: one is not among `known`, or its value does not fit.
    """
    unknown = [name for name in options if name not in known]
    if unknown:
        names = ", ".join(map(repr, unknown))
        if not known:
            raise ConfigurationError(f"{owner} has no options, but {argument} has {names}. {note}".rstrip())
        close = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ConfigurationError(
            f"{argument} has {names}, which {owner} does not know.{hint} It knows: {', '.join(known)}."
        )
    for name, given in options.items():
        if not known[name].fits(given):
            raise ConfigurationError(f'{argument}["{name}"] must be {known[name].expected}, but got {given!r}.')


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


class EagerBackend:
    """Runs the graph's ATen operators one by one: no compile time, the plain pipeline's numbers to the bit."""

    name: ClassVar[str] = "eager"
    packs_weights: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, object]) -> None:
        del options  # there are none

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        check_known_options('backend="eager"', "backend_options", options, {})

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        return None

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        graph_module = variant.program.graph_module

        def run(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            outputs: Sequence[torch.Tensor] = graph_module(*weights, *inputs)
            return outputs

        return run


def check_backend(name: object, options: Mapping[str, object]) -> None:
    """Raise ConfigurationError unless `name` is a backend, or `auto`, that takes `options`."""
    if name == "auto":
        if options:
            raise ConfigurationError('backend_options need a named backend, but backend is "auto".')
        return
    if isinstance(name, str) and name in FORMATS and name not in BACKENDS:
        raise ConfigurationError(
            f'backend="{name}" runs graphs that are built beforehand: export(pipe, folder, format="{name}") of a '
            'pipeline that is optimized with another backend, such as "eager", then load(pipe, folder) into a '
            "plain one."
        )
    if not isinstance(name, str) or name not in BACKENDS:
        known = ", ".join(f'"{known}"' for known in BACKENDS)
        hint = " The number of steps to run in full is gate_step." if isinstance(name, (int, float)) else ""
        nearest = did_you_mean(name, [*BACKENDS, "auto"])
        raise ConfigurationError(f'backend must be one of {known} or "auto", but got {name!r}.{nearest}{hint}')
    backend_class(name).check_options(options)


def backend_class(name: str) -> type[Backend]:
    """Import the class of the backend `name`; its packages must be installed."""
    found: type[Backend] = home_of(BACKENDS[name])
    return found
