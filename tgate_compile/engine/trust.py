"""Compare the results of backends with PyTorch's, and choose the first backend that agrees."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tgate_compile._errors import BackendError, TGateError, cause_of
from tgate_compile._machine import available_memory
from tgate_compile.engine.backends import Backend
from tgate_compile.engine.call import Call
from tgate_compile.engine.disk import verdict_on
from tgate_compile.engine.samples import SAMPLES, sums_of_bits
from tgate_compile.engine.traffic import exclusive
from tgate_compile.methods.method import LAYERS, Kind
from tgate_compile.passes.graphs import Site, Variant

#: The largest difference that rounding can explain, relative to an output's largest value, by the coarsest dtype.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    # A value may be rounded to a neighbouring fp8 number; these are an eighth, or a quarter, apart.
    torch.float8_e4m3fn: 0.13,
    torch.float8_e5m2: 0.26,
}


def coarsest(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """Return the least precise of `dtypes`."""
    return max(dtypes, key=lambda dtype: TOLERANCES[dtype])


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of any element, relative to the largest finite element of `expected`.

    It is infinite if the shapes differ, or if an element is NaN or infinite in one tensor and not the same in the
    other, and NaN if no element is finite, so that there is nothing to compare.
    """
    if result.shape != expected.shape:
        return float("inf")
    given, target = result.double(), expected.double()
    equal = (given == target) | (given.isnan() & target.isnan())
    finite = target.isfinite()
    if not bool((equal | (finite & given.isfinite())).all()):
        return float("inf")
    if not bool(finite.any()):
        return float("nan")
    difference = (given - target).abs().masked_fill(equal, 0.0)
    largest = target.abs().masked_fill(~finite, 0.0).max()
    return float(difference.max() / largest.clamp(min=torch.finfo(torch.float32).tiny))


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute in full float32 precision inside the context.

    On a GPU, PyTorch computes float32 convolutions in TF32 by default, which would make the reference less precise
    than the results compared with it.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Reference:
    """The results of the denoiser's own code on `call`, computed when they are needed.

    Args:
        denoiser: the denoiser.
        forward: its original forward.
        call: the inputs.
    """

    def __init__(self, denoiser: torch.nn.Module, forward: Callable[..., Any], call: Call) -> None:
        self._denoiser = denoiser
        self._forward = forward
        self._call = call

    @functools.cached_property
    def outputs(self) -> list[torch.Tensor]:
        """The flat outputs."""
        args, kwargs = self._call.arguments
        with torch.no_grad():
            return pytree.tree_leaves(self._forward(*args, **kwargs))

    def outputs_with(
        self, sites: Sequence[Site], caches: Mapping[tuple[Kind, str], torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """Return the flat outputs with the values of `sites` taken from `caches`; None if a site is not a module."""
        modules = dict(self._denoiser.named_modules())
        if any(site.kind in LAYERS or site.batch or site.name not in modules for site in sites):
            return None
        values = {site.name: caches[site.kind, site.name].to(site.dtype) for site in sites}
        args, kwargs = self._call.arguments
        with torch.no_grad(), _returning({modules[name]: value for name, value in values.items()}):
            return pytree.tree_leaves(self._forward(*args, **kwargs))


def agree(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Return whether results equal the expected ones up to the last bits, which free sizes may change."""
    return len(results) == len(expected) and all(map(_close, results, expected))


@contextmanager
def _returning(values: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Make the modules return the given values inside the context."""
    with ExitStack() as stack:
        for module, value in values.items():
            hook = module.register_forward_hook(lambda module, args, output, value=value: value)
            stack.callback(hook.remove)
        yield


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    eps = torch.finfo(result.dtype).eps
    tolerance = eps * (64 if eps < 1e-5 else 8)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((result - expected).abs() <= tolerance * scale).all())


logger = logging.getLogger(__name__)

#: After so many changes of the weights in successive generations, `auto` no longer uses backends that copy them.
MOST_CHANGES = 2
#: The memory that must be free for a copy of the weights, relative to their size: compiling needs additional memory.
MEMORY_FACTOR = 1.25

MSG_WEIGHTS_CHANGE = "the weights have changed in {count} calls in a row, and it compiles every graph again each time"
MSG_DIFFERS = (
    'The {graph} graph in the backend "{name}" is {distance} PyTorch\'s on the same inputs, and a relative difference '
    "of {tolerance:.0e} is allowed for {dtype}."
)
MSG_NOT_FINITE = "NaN or infinite in other places than"
MSG_ADVICE = (
    "This backend computes one of the graph's operators differently. Run the same graph with "
    'optimize(pipe, backend="eager") or backend="inductor", or use backend="auto", which chooses the first backend '
    "that agrees with PyTorch. Please report this."
)
MSG_FAILED = 'The backend "{name}" could not run the {graph} graph ({problem}). backend="eager" runs the same graph.'

#: Dtypes that values are only stored in, never computed in.
_STORED = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


class _DiffersError(BackendError):
    """A backend's results differ from PyTorch's."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A backend that may run graphs.

    Attributes:
        backend: the backend.
        title: its name and options, for messages.
        settings: everything that its results depend on besides the graph; None if they are compared in each process.
    """

    backend: Backend
    title: str
    settings: Hashable = None


class ChosenBackend:
    """Compiles graphs with the first of `candidates` that compiles them, runs them, and agrees with PyTorch.

    A candidate that has failed is not tried again; graphs that it already runs correctly stay with it. The error of the
    last candidate, or of a backend selected by name, is raised.

    Args:
        candidates: the backends, in the order in which they are tried.
        report: is called with a candidate when it is the first to serve a graph, or takes over from another one, and
            with the reasons why others do not, by title.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        report: Callable[[Candidate, Mapping[str, str]], None] = lambda candidate, failures: None,
    ) -> None:
        self._left = list(candidates)
        self._report = report
        self._reported: Candidate | None = None
        self._failures: dict[str, str] = {}
        self._weights_change = False

    @property
    def name(self) -> str:
        """The name of the backend that compiles the next graph."""
        return self._left[0].backend.name

    @property
    def packs_weights(self) -> bool:
        """Whether the graphs of that backend hold copies of the weights."""
        return self._left[0].backend.packs_weights

    @property
    def next(self) -> Candidate:
        """The candidate that compiles the next graph."""
        return self._left[0]

    @property
    def has_choice(self) -> bool:
        """Whether another candidate is left if the next one fails."""
        return len(self._left) > 1

    def compile(self, variant: Variant, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Served:
        """Return a runner of `variant` for inputs and caches like these, compared with PyTorch on them.

        Raises:
            BackendError: the last candidate cannot compile or run the graph, or its results differ beyond rounding.
        """
        served = Served(self, variant)
        served.start(weights, inputs)
        return served

    def serves(self, candidate: Candidate) -> None:
        """Note that `candidate` has compiled and run a graph."""
        if candidate is not self._reported:
            self._reported = candidate
            self._report(candidate, self._failures)

    def is_outdated(self, candidate: Candidate) -> bool:
        """Return whether graphs of `candidate` should move on, since it copies weights that keep changing."""
        return self._weights_change and candidate.backend.packs_weights and candidate not in self._left

    def avoid_copies(self, reason: str) -> None:
        """Leave out the backends that copy the weights, unless there are no others."""
        without = [candidate for candidate in self._left if not candidate.backend.packs_weights]
        if self._weights_change or not without:
            return
        self._weights_change = True
        self._failures |= {each.title: reason for each in self._left if each not in without}
        if len(without) < len(self._left):
            logger.warning(
                'backend="auto" switches from "%s" to "%s": %s. A backend that is selected by name stays in use.',
                self._left[0].title, without[0].title, reason,
            )  # fmt: skip
        self._left = without

    def give_up(self, candidate: Candidate, error: BackendError, variant: Variant) -> None:
        """Leave out `candidate`, which failed with `variant`; raise `error` if there is no other."""
        if self._left == [candidate]:
            raise BackendError(f"{error} {MSG_ADVICE}") if isinstance(error, _DiffersError) else error
        if candidate in self._left:
            self._left.remove(candidate)
            self._failures[candidate.title] = str(error)
            logger.warning(
                'backend="auto" switches to "%s", for this denoiser\'s other graphs as well: %s',
                self._left[0].title,
                error,
            )
        else:
            logger.debug("the %s graph no longer runs with %s: %s", variant.phase.name, candidate.title, error)


class Served:
    """A runner of one graph. If its backend fails later on, the next remaining one takes over.

    Attributes:
        compared: whether the results have been compared with PyTorch's.
    """

    def __init__(self, choice: ChosenBackend, variant: Variant) -> None:
        self._choice = choice
        self._variant = variant
        self._candidate = choice.next
        self.compared = False
        self._weights: Sequence[torch.Tensor] | None = None
        self._remade = self._changes = 0

    @property
    def backend(self) -> Backend:
        """The backend that runs the graph."""
        return self._candidate.backend

    def start(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Compile the graph with the first remaining backend that agrees with PyTorch on these inputs."""
        self._weights, self._remade, self._changes = weights, 0, 0
        while True:
            self._candidate = self._choice.next
            try:
                if self._choice.has_choice and self.backend.packs_weights:
                    _check_memory(self._variant, weights)
                with exclusive():
                    self._runner = self.backend.compile(self._variant, inputs)
                if not self.backend.is_reference:
                    self.compared = self._agrees(weights, inputs)
                else:
                    self.compared = True
                    if self._choice.has_choice:
                        self._results(weights, inputs)  # it may fail only when it runs, as CUDA graphs do
                self._choice.serves(self._candidate)
                return
            except BackendError as error:
                self._choice.give_up(self._candidate, error, self._variant)

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self._choice.is_outdated(self._candidate):
            self.start(weights, inputs)
        try:
            self.compared = self.compared or self._agrees(weights, inputs)
            results = self._runner(weights, inputs)
        except BackendError as error:
            self._choice.give_up(self._candidate, error, self._variant)
            self.start(weights, inputs)
            return self._runner(weights, inputs)
        self._watch(weights)
        return results

    def prepare(self, weights: Sequence[torch.Tensor]) -> None:
        """Let the runner check the weights that the next calls pass, when no step is waiting for it."""
        prepare = getattr(self._runner, "prepare", None)
        if prepare is not None:
            prepare(weights)

    def release(self) -> None:
        """Release the weights and everything computed from them, which the next call recomputes."""
        self._weights = None
        release = getattr(self._runner, "release", None)
        if release is not None:
            release()

    def _watch(self, weights: Sequence[torch.Tensor]) -> None:
        """Notice when a backend had to compile the graph again in several generations in a row."""
        if weights is self._weights:  # each generation starts with a new list
            return
        remade = getattr(self._runner, "remade", 0)
        self._changes = self._changes + 1 if remade > self._remade else 0
        self._weights, self._remade = weights, remade
        if self._changes >= MOST_CHANGES and self._choice.has_choice:
            self._choice.avoid_copies(MSG_WEIGHTS_CHANGE.format(count=MOST_CHANGES))

    def _agrees(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> bool:
        """Compare as `compare` does, unless an earlier process has, with these weights and on such a machine."""
        settings, verdict = self._candidate.settings, None
        if settings is not None:
            verdict = verdict_on(self._variant, settings, sums_of_bits(weights, SAMPLES), inputs)
        if verdict is not None and verdict.is_known:
            return True
        compared = self.compare(weights, inputs)
        if compared and verdict is not None:
            verdict.keep()
        return compared

    @exclusive()  # `full_float32` affects all threads
    def compare(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> bool:
        """Compare all outputs with PyTorch's, and return whether each had finite elements to compare.

        Raises:
            BackendError: an output differs beyond rounding, or the runner fails.
        """
        results = self._results(weights, inputs)
        with torch.no_grad(), full_float32():
            expected: Sequence[torch.Tensor] = self._variant.program.graph_module(*weights, *inputs)
        computed = self.computed_in(inputs[0].device)
        compared = True
        is_head = self._variant.phase.part == "head"
        for position, (result, target) in enumerate(zip(results, expected, strict=True)):
            dtype = coarsest({computed, target.dtype} & TOLERANCES.keys())
            if is_head and position == 0:  # the measure, which is relative to 1
                result, target = result + 1.0, target + 1.0
            relative, tolerance = relative_difference(result, target), TOLERANCES[dtype]
            compared = compared and not math.isnan(relative)
            if relative > tolerance:
                raise _DiffersError(
                    MSG_DIFFERS.format(
                        graph=self._variant.phase.name,
                        name=self.backend.name,
                        distance=MSG_NOT_FINITE
                        if math.isinf(relative)
                        else f"{relative:.1e} (relative to the largest value) from",
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
        except Exception as error:  # each runtime has its own exception classes
            name, graph = self.backend.name, self._variant.phase.name
            raise BackendError(MSG_FAILED.format(name=name, graph=graph, problem=cause_of(error))) from error

    def computed_in(self, device: torch.device) -> torch.dtype:
        """Return the least precise dtype that the graph or the backend computes in."""
        values = (node.meta.get("val") for node in self._variant.program.graph.nodes)
        dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)} & (TOLERANCES.keys() - _STORED)
        lowered = self.backend.lowered_to(device)
        return coarsest(dtypes if lowered is None else dtypes | {lowered})


def _check_memory(variant: Variant, weights: Sequence[torch.Tensor]) -> None:
    """Raise BackendError if a copy of the weights of `variant` would not fit into memory."""
    available = available_memory()
    needed = sum(tensor.nbytes for tensor in weights)
    if available is not None and weights and weights[0].device.type == "cpu" and MEMORY_FACTOR * needed > available:
        raise BackendError(
            f"The {variant.phase.name} graph would need a copy of its weights ({needed / 1e9:.1f} GB), and "
            f"{available / 1e9:.1f} GB of memory are free."
        )
