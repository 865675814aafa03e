"""How far a written graph is from the variant that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tgate_compile._bundle.manifest import Graph, Parity
from tgate_compile._bundle.planned_graphs import PlannedGraph
from tgate_compile._bundle.session import GraphSession
from tgate_compile._bundle.weights_digest import dtype_name
from tgate_compile._errors import BackendError, BundleError

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

MSG_NOT_RUN = (
    "The {graph} graph cannot be checked against PyTorch on the CPU: {problem} Nothing has been written. ONNX Runtime "
    "runs float32 and float16 there, and no bfloat16."
)
MSG_TOO_FAR = (
    "The {graph} graph in ONNX Runtime is {relative:.1e} from PyTorch's on random inputs, relative to the largest "
    "value, and {tolerance:.0e} is allowed for {dtype}. Nothing has been written. Please report this."
)


def measure_parity(planned: PlannedGraph, graph: Graph, path: Path) -> Parity:
    """Run the file and the variant on the same random inputs, the file on the CPU.

    Raises:
        BundleError: they differ by more than rounding, or ONNX Runtime does not take the file.
    """
    inputs = _random_inputs(planned)
    device = planned.example_inputs[0].device
    with torch.no_grad():
        eager = planned.variant.program.graph_module
        expected = eager(*planned.weights, *(tensor.to(device) for tensor in inputs))
    try:
        session = GraphSession(graph, path, torch.device("cpu"), {"prepacking": False})
        results = session.run(inputs)
    except BackendError as error:
        raise BundleError(MSG_NOT_RUN.format(graph=planned.name, problem=error)) from error
    relative = max(_relative(a, b.cpu()) for a, b in zip(results, expected, strict=True))
    coarsest = max((t.dtype for t in [*inputs, *results] if t.is_floating_point()), key=lambda dtype: TOLERANCES[dtype])
    tolerance = TOLERANCES[coarsest]
    if not relative <= tolerance:  # NaN is neither
        raise BundleError(
            MSG_TOO_FAR.format(graph=planned.name, relative=relative, tolerance=tolerance, dtype=dtype_name(coarsest))
        )
    return Parity(relative=relative, tolerance=tolerance, provider=session.provider)


def _random_inputs(planned: PlannedGraph) -> list[torch.Tensor]:
    """Normal numbers for latents, texts and caches; a timestep or a mask of integers is that of the call."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = [
        random(given.shape, given.dtype) if given.is_floating_point() and given.ndim > 1 else given.cpu()
        for given in planned.example_inputs
    ]
    return [*inputs, *(random(site.shape, site.cache_dtype) for site in planned.variant.reused)]


def _relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny))
