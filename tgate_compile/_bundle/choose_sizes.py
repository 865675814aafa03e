"""Which sizes the graphs of a bundle leave free: what was asked for, or what the denoiser's code permits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_compile._bundle.describe_graph import LATENTS_DIMENSION, inputs_of, size_of, symbols_of
from tgate_compile._bundle.planned_graphs import PlannedGraph, planned_graphs
from tgate_compile._bundle.sizes import shape_at
from tgate_compile._errors import CaptureError
from tgate_compile._free_sizes import SYMBOLS, FreeSize
from tgate_compile._generation import Plan
from tgate_compile._hook import GatedDenoiser
from tgate_compile._schedule import Phase

logger = logging.getLogger(__name__)

#: What is tried, one after the other. Some transformers have tables of positions for one size.
ATTEMPTS: tuple[tuple[FreeSize, ...], ...] = (("batch", "height", "width"), ("batch",))

MSG_NOT_FREE = (
    "{model} cannot be exported with these sizes left to each call: {free}. At {sizes} its graph fails ({error}). "
    "Leave out dynamic, or name fewer of them."
)


def choose_sizes(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize] | None) -> dict[Phase, PlannedGraph]:
    """The graphs of `plan` with the sizes `free`, seen to work at other sizes than the call's.

    None leaves free what the denoiser's code permits: batch, height and width, or the batch alone, or nothing.

    Raises:
        CaptureError: the denoiser's code depends on one of `free`.
    """
    if free is not None:
        return _checked(hook, plan, free)
    for attempt in ATTEMPTS:
        try:
            return _checked(hook, plan, attempt)
        except CaptureError as error:
            logger.info("%s cannot leave %s free: %s", type(hook.denoiser).__name__, ", ".join(attempt), error)
    return planned_graphs(hook, plan, ())


def example_sizes(planned: PlannedGraph) -> dict[str, int]:
    """The free sizes of the call that `planned` is made for."""
    latents = planned.example_inputs[planned.own_names.index(planned.latents)]
    return {name: latents.shape[LATENTS_DIMENSION[name]] // unit for name, unit in planned.units.items()}


def other_sizes(example: Mapping[str, int]) -> dict[str, int]:
    """More prompts, and half the height: no larger than the call's own."""
    other = dict(example)
    if SYMBOLS["batch"] in other:
        other[SYMBOLS["batch"]] += 1
    if SYMBOLS["height"] in other:
        other[SYMBOLS["height"]] = other[SYMBOLS["height"]] // 2 or 2
    return other


def _checked(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize]) -> dict[Phase, PlannedGraph]:
    graphs = planned_graphs(hook, plan, free)
    for planned in graphs.values():
        if planned.units:
            sizes = other_sizes(example_sizes(planned))
            try:
                with _without_torch_log():
                    _run_without_numbers(planned, sizes)
            except Exception as error:  # whatever an operator raises
                shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
                told = {"free": ", ".join(free), "sizes": shown, "error": str(error).splitlines()[0]}
                raise CaptureError(MSG_NOT_FREE.format(model=type(hook.denoiser).__name__, **told)) from error
    return graphs


@contextmanager
def _without_torch_log() -> Iterator[None]:
    """torch writes a traceback into its log before it raises the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = was


def _run_without_numbers(planned: PlannedGraph, sizes: Mapping[str, int]) -> None:
    """Run the graph on shapes alone. torch.export lets a table of 16 positions be added to `h*w` values."""
    symbols = symbols_of(planned)
    with torch.no_grad(), FakeTensorMode() as mode:
        weights = [mode.from_tensor(weight) for weight in planned.weights]
        inputs = []
        for node in inputs_of(planned):
            value = node.meta["val"]
            shape = shape_at([size_of(size, symbols) for size in value.shape], sizes)
            inputs.append(torch.empty(shape, dtype=value.dtype, device=value.device))
        planned.variant.program.graph_module(*weights, *inputs)
