"""Backends, which run the graphs of variants: their interface, the eager backend, and the choice of a backend."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from tgate_compile._errors import ConfigurationError, did_you_mean
from tgate_compile._machine import default_threads
from tgate_compile._runtimes import BACKENDS, FORMATS, home_of
from tgate_compile.passes.graphs import Binding, Variant


@dataclass(frozen=True)
class Option:
    """A constraint on the value of a backend or format option.

    Attributes:
        expected: description of valid values, to follow "must be" in a message.
        fits: returns whether a value is valid.
    """

    expected: str
    fits: Callable[[Any], bool]


SWITCH = Option("True or False", lambda given: isinstance(given, bool))


def one_of(names: Collection[str]) -> Option:
    """Return an option whose value is one of `names`."""
    return Option(" or ".join(f'"{name}"' for name in names), lambda given: isinstance(given, str) and given in names)


def at_least(least: int, expected: str) -> Option:
    """Return an option whose value is an integer >= `least`; `expected` describes it in messages."""
    return Option(expected, lambda given: isinstance(given, int) and not isinstance(given, bool) and given >= least)


def threads_for(options: Mapping[str, object]) -> int:
    """Return the number of threads of a runtime on a CPU: the option `threads`, or `default_threads`."""
    given = options.get("threads")
    if isinstance(given, int):
        return given
    own = torch.get_num_threads()
    return default_threads(own) or own


def check_known_options(
    owner: str,
    argument: Literal["backend_options", "format_options"],
    options: Mapping[str, object],
    known: Mapping[str, Option],
    note: str = "",
) -> None:
    """Check the `options` that the user passed as `argument` to `owner`, such as `format="onnx"`.

    Args:
        known: every option of `owner`, by name.
        note: a sentence appended to the message when `owner` has no options.

    Raises:
        ConfigurationError: an option is unknown, or its value is not valid.
    """
    unknown = [name for name in options if name not in known]
    if unknown:
        names = ", ".join(map(repr, unknown))
        if not known:
            raise ConfigurationError(f"{owner} has no options, but {argument} has {names}. {note}".rstrip())
        close = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ConfigurationError(
            f"{argument} has {names}, which {owner} does not accept.{hint} It accepts: {', '.join(known)}."
        )
    for name, given in options.items():
        if not known[name].fits(given):
            raise ConfigurationError(f'{argument}["{name}"] must be {known[name].expected}, but got {given!r}.')


#: Runs a variant: (weights, inputs + caches) -> outputs + caches, as flat sequences in the variant's order. The
#: weights are passed in every call, so that a backend holds no copy that could become stale.
Runner = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Backend(Protocol):
    """Compiles variants into runners."""

    @property
    def name(self) -> str:
        """The name of the backend."""
        ...

    @property
    def packs_weights(self) -> bool:
        """Whether each graph holds its own copy of the weights, in the layout that the runtime requires."""
        ...

    @property
    def is_reference(self) -> bool:
        """Whether the results are computed by PyTorch itself, so that they need not be compared with PyTorch."""
        ...

    def __init__(self, options: Mapping[str, object]) -> None: ...

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        """Raise ConfigurationError if the backend does not support one of the options."""

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        """Return the dtype that it computes in on `device` if that is less precise than the values' own, else None."""
        ...

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        """Compile `variant` for inputs and caches with the shapes, dtypes and devices of `inputs`.

        Raises:
            BackendError: the graph cannot be compiled.
        """
        ...


class EagerBackend:
    """Runs the graph's ATen operators one by one: no compile time, and bit-identical to the plain pipeline."""

    name: ClassVar[str] = "eager"
    packs_weights: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, object]) -> None:
        del options  # it has no options

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
    """Raise ConfigurationError unless `name` is `auto` or a backend that supports `options`."""
    if name == "auto":
        if options:
            raise ConfigurationError('backend_options need a named backend, but backend is "auto".')
        return
    if isinstance(name, str) and name in FORMATS and name not in BACKENDS:
        raise ConfigurationError(
            f'backend="{name}" runs graphs that are built in advance. Optimize the pipeline with another backend, '
            f'such as "eager", call export(pipe, folder, format="{name}"), then load(pipe, folder) into a plain '
            "pipeline."
        )
    if not isinstance(name, str) or name not in BACKENDS:
        known = ", ".join(f'"{known}"' for known in BACKENDS)
        hint = (
            " The number of steps to run in full is the argument gate_step." if isinstance(name, (int, float)) else ""
        )
        nearest = did_you_mean(name, [*BACKENDS, "auto"])
        raise ConfigurationError(f'backend must be one of {known} or "auto", but got {name!r}.{nearest}{hint}')
    backend_class(name).check_options(options)


def backend_class(name: str) -> type[Backend]:
    """Import and return the class of the backend `name`, whose packages must be installed."""
    found: type[Backend] = home_of(BACKENDS[name])
    return found


class EarlyPart(Protocol):
    """A prelude or a table, with the names of its inputs and outputs."""

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...


class Parts(Protocol):
    """The parts that run before the step of a graph that is split by binding time, if they exist."""

    @property
    def prelude(self) -> EarlyPart | None: ...

    @property
    def table(self) -> EarlyPart | None: ...

    @property
    def early(self) -> Sequence[EarlyPart]: ...


class Divided(Protocol):
    """A graph that may be split by binding time, ready to run."""

    @property
    def split(self) -> Parts | None:
        """Its parts; None if it is not split."""
        ...

    @property
    def roles(self) -> Mapping[str, Binding]:
        """How often each input changes, by name."""
        ...

    @property
    def ahead(self) -> bool:
        """Whether to compute the rows of all timesteps as soon as the first is needed."""
        ...

    @property
    def early_weights(self) -> Sequence[Sequence[torch.Tensor]]:
        """The weights of each part before the step."""
        ...

    @property
    def step_weights(self) -> Sequence[torch.Tensor]:
        """The weights of the step."""
        ...

    def run_early(self, position: int, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the values of the part at `position` in `split.early`."""
        ...
