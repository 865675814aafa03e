"""The backend that serves a denoiser: the first of its candidates that computes the graphs rightly."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from tgate_compile._backends._interface import Backend
from tgate_compile._backends.closeness import TOLERANCES, coarsest, full_float32, relative_difference
from tgate_compile._errors import BackendError, TGateError
from tgate_compile._graphs import Variant
from tgate_compile._traffic import exclusive
from tgate_compile.exports.causes import cause_of

logger = logging.getLogger(__name__)

MSG_DIFFERS = (
    'The {graph} graph in the backend "{name}" is {distance} PyTorch\'s on the same inputs, and a relative difference '
    "of {tolerance:.0e} is allowed for {dtype}."
)
MSG_RELATIVE = "{relative:.1e} (relative to the largest value) from"
MSG_NOT_FINITE = "NaN or infinite in other places than"
MSG_ADVICE = (
    'This backend computes an operator of it differently. optimize(pipe, backend="eager") or backend="inductor" runs '
    'the same graph, and backend="auto" takes the first backend that agrees with PyTorch. Please report this.'
)
MSG_FAILED = 'The backend "{name}" could not run the {graph} graph ({problem}). backend="eager" runs the same graph.'
MSG_FALLS_BACK = 'backend="auto" goes on with "{name}", for this denoiser\'s other graphs as well: {problem}'

#: Are rounded to when a value is stored, and never computed in.
_STORED = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


class _DiffersError(BackendError):
    """A backend's results are not PyTorch's."""


class ChosenBackend:
    """Compiles graphs with the first of `candidates` that compiles them, runs them, and agrees with PyTorch.

    A candidate that failed is not tried again; graphs that it already runs, and was right about, stay with it. With a
    single candidate, as for a backend that was asked for by name, its error is raised.
    """

    def __init__(self, candidates: Sequence[Backend]) -> None:
        self._left = list(candidates)

    @property
    def name(self) -> str:
        """The name of the backend that compiles the next graph."""
        return self._left[0].name

    @property
    def packs_weights(self) -> bool:
        """Whether its graphs have copies of the weights."""
        return self._left[0].packs_weights

    def compile(self, variant: Variant, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Served:
        """A runner of `variant` for inputs and caches like these, compared with PyTorch on them.

        Raises:
            BackendError: the last candidate cannot compile or run it, or its results differ by more than rounding.
        """
        served = Served(self._left, variant)
        served.start(weights, inputs)
        return served


class Served:
    """A runner of one graph. If its backend fails later on, the next one that is left takes over.

    Attributes:
        backend: what runs it.
        compared: whether its results need not be compared with PyTorch's any more.
    """

    def __init__(self, left: list[Backend], variant: Variant) -> None:
        self._left = left
        self._variant = variant
        self.backend = left[0]
        self.compared = False

    def start(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Compile the graph with the first backend left that agrees with PyTorch on these inputs."""
        while True:
            self.backend = self._left[0]
            try:
                with exclusive():
                    self._runner = self.backend.compile(self._variant, inputs)
                self.compared = self.backend.is_reference or self.compare(weights, inputs)
                return
            except BackendError as error:
                self._give_up(error)

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        try:
            self.compared = self.compared or self.compare(weights, inputs)
            return self._runner(weights, inputs)
        except BackendError as error:
            self._give_up(error)
        self.start(weights, inputs)
        return self._runner(weights, inputs)

    def release(self) -> None:
        """Let go of the weights that it has seen, and of what it has made of them; the next call makes it anew."""
        release = getattr(self._runner, "release", None)
        if release is not None:
            release()

    def _give_up(self, error: BackendError) -> None:
        """Have the next backend take over; raise `error` if there is none."""
        name = self.backend.name
        if self._left == [self.backend]:
            raise BackendError(f"{error} {MSG_ADVICE}") if isinstance(error, _DiffersError) else error
        if self.backend in self._left:
            self._left.remove(self.backend)
            logger.warning(MSG_FALLS_BACK.format(name=self._left[0].name, problem=error))
        else:
            logger.debug("the %s graph leaves %s: %s", self._variant.phase.name, name, error)

    @exclusive()  # `full_float32` holds for all threads
    def compare(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> bool:
        """Whether there was anything finite to compare, in each of the outputs, if all of them are close to PyTorch's.

        Raises:
            BackendError: they are not, or the runner fails.
        """
        results = self._results(weights, inputs)
        with torch.no_grad(), full_float32():
            expected: Sequence[torch.Tensor] = self._variant.program.graph_module(*weights, *inputs)
        computed = self._computed_in(inputs[0].device)
        compared = True
        for result, wanted in zip(results, expected, strict=True):
            dtype = coarsest({computed, wanted.dtype} & TOLERANCES.keys())
            relative, tolerance = relative_difference(result, wanted), TOLERANCES[dtype]
            compared = compared and not math.isnan(relative)
            if relative > tolerance:
                raise _DiffersError(
                    MSG_DIFFERS.format(
                        graph=self._variant.phase.name,
                        name=self.backend.name,
                        distance=MSG_NOT_FINITE if math.isinf(relative) else MSG_RELATIVE.format(relative=relative),
                        tolerance=tolerance,
                        dtype=str(dtype).removeprefix("torch."),
                    )
                )
        return compared

    def _results(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        try:
            return self._runner(weights, inputs)
        except TGateError:
            raise
        except Exception as error:  # a runtime has errors of its own
            told = {"name": self.backend.name, "graph": self._variant.phase.name, "problem": cause_of(error)}
            raise BackendError(MSG_FAILED.format(**told)) from error

    def _computed_in(self, device: torch.device) -> torch.dtype:
        """The coarsest dtype that the graph or the backend computes in."""
        values = (node.meta.get("val") for node in self._variant.program.graph.nodes)
        dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)} & (TOLERANCES.keys() - _STORED)
        lowered = self.backend.lowered_to(device)
        return coarsest(dtypes if lowered is None else dtypes | {lowered})
