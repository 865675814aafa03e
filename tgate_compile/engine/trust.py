"""Compare what a backend computes with PyTorch, and take the first backend that agrees."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils import _pytree as pytree

from tgate_compile._errors import BackendError, TGateError, cause_of
from tgate_compile._runtimes import automatic_backends
from tgate_compile.engine.backends import Backend, backend_class
from tgate_compile.engine.call import Call
from tgate_compile.engine.traffic import exclusive
from tgate_compile.methods.method import Kind
from tgate_compile.passes.graphs import Site, Variant

#: The largest difference that rounding may explain, relative to an output's largest value, by the coarsest dtype.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    # A value may be rounded to another of fp8's few numbers: one step is an eighth, or a quarter.
    torch.float8_e4m3fn: 0.13,
    torch.float8_e5m2: 0.26,
}


def coarsest(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """The one of `dtypes` that rounds most."""
    return max(dtypes, key=lambda dtype: TOLERANCES[dtype])


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of any element, relative to the largest finite element that is expected.

    Infinite if the shapes differ, or if an element is NaN or infinite in one tensor and not the same in the other;
    NaN if no element is finite, so that there is nothing to compare.
    """
    if result.shape != expected.shape:
        return float("inf")
    given, wanted = result.double(), expected.double()
    equal = (given == wanted) | (given.isnan() & wanted.isnan())
    finite = wanted.isfinite()
    if not bool((equal | (finite & given.isfinite())).all()):
        return float("inf")
    if not bool(finite.any()):
        return float("nan")
    difference = (given - wanted).abs().masked_fill(equal, 0.0)
    largest = wanted.abs().masked_fill(~finite, 0.0).max()
    return float(difference.max() / largest.clamp(min=torch.finfo(torch.float32).tiny))


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in float32.

    On a GPU, PyTorch convolves float32 in TF32 unless told otherwise, and would then be further off than what it is
    compared with.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


#: Elements of a weight that are looked at once per image, at least.
SAMPLES = 1024

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Made = TypeVar("Made")


class MadeOfWeights(Generic[Made]):
    """What `make` makes of the weights, made anew when they have changed."""

    def __init__(self, make: Callable[[Sequence[torch.Tensor]], Made]) -> None:
        self._make = make
        self._seen: Sequence[torch.Tensor] | None = None
        self._samples: list[tuple[int, int]] = []
        self._made: list[Made] = []

    def release(self) -> None:
        """Let go of it, and of the weights."""
        self._made, self._samples, self._seen = [], [], None

    def of(self, weights: Sequence[torch.Tensor], used: Sequence[int] | None = None) -> Made:
        """It, for `weights`, or those at the positions `used` of them."""
        # The library hands over a new list at the start of each generation: only then can anything have changed.
        if not self._made or weights is not self._seen:
            tensors = weights if used is None else [weights[position] for position in used]
            samples = [weight_sample(tensor) for tensor in tensors]
            if not self._made or samples != self._samples:
                self._made = [self._make(tensors)]
                self._samples = samples
            self._seen = weights
        return self._made[0]


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each element of `tensor`, as whole numbers in one dimension."""
    return tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.itemsize])


def weight_sample(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a changed `tensor` from the old one: torch's count of changes, and a sum over samples.

    The samples are for what goes past torch's count, as peft's merging through `.data` does, which changes all of a
    weight. Summing all of it would take a second per image of an SD-1.5.
    """
    bits = as_integers(tensor)
    version = 0 if tensor.is_inference() else tensor._version
    return version, int(bits[:: max(1, bits.numel() // SAMPLES)].sum())


class Reference:
    """Runs the denoiser's own code on `call`, at most once for each way that it is asked.

    Args:
        denoiser: the module.
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
        """The flat outputs with cached values in the places of these `sites`; None if their places are not modules."""
        modules = dict(self._denoiser.named_modules())
        if any(site.kind == "deep" or site.batch or site.name not in modules for site in sites):
            return None
        values = {site.name: caches[site.kind, site.name].to(site.dtype) for site in sites}
        args, kwargs = self._call.arguments
        with torch.no_grad(), _returning({modules[name]: value for name, value in values.items()}):
            return pytree.tree_leaves(self._forward(*args, **kwargs))


def agree(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether a graph's results are the expected ones but for the last bits, which free sizes may change."""
    return len(results) == len(expected) and all(map(_close, results, expected))


@contextmanager
def _returning(values: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Let these modules return these values."""
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

MSG_DIFFERS = (
    'The {graph} graph in the backend "{name}" is {distance} PyTorch\'s on the same inputs, and a relative difference '
    "of {tolerance:.0e} is allowed for {dtype}."
)
MSG_NOT_FINITE = "NaN or infinite in other places than"
MSG_ADVICE = (
    'This backend computes an operator of it differently. optimize(pipe, backend="eager") or backend="inductor" runs '
    'the same graph, and backend="auto" takes the first backend that agrees with PyTorch. Please report this.'
)
MSG_FAILED = 'The backend "{name}" could not run the {graph} graph ({problem}). backend="eager" runs the same graph.'

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
            logger.warning(
                f'backend="auto" goes on with "{self._left[0].name}", for this denoiser\'s other graphs as well: '
                f"{error}"
            )
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
        except Exception as error:  # a runtime has errors of its own
            told = {"name": self.backend.name, "graph": self._variant.phase.name, "problem": cause_of(error)}
            raise BackendError(MSG_FAILED.format(**told)) from error

    def _computed_in(self, device: torch.device) -> torch.dtype:
        """The coarsest dtype that the graph or the backend computes in."""
        values = (node.meta.get("val") for node in self._variant.program.graph.nodes)
        dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)} & (TOLERANCES.keys() - _STORED)
        lowered = self.backend.lowered_to(device)
        return coarsest(dtypes if lowered is None else dtypes | {lowered})


def make_backend(name: str, options: Mapping[str, object], device: torch.device) -> ChosenBackend:
    """Make the backend called `name`; for `auto`, those that can serve the type of `device`, the fastest first."""
    names = automatic_backends(device.type) if name == "auto" else [name]
    return ChosenBackend([backend_class(name)(options) for name in names])
