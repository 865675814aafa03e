"""Measure how far a written graph is from the variant that it was converted from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tgate_compile._errors import BackendError, BundleError
from tgate_compile.bundle.formats import GraphFormat
from tgate_compile.bundle.manifest import Deviation, Graph, Parity
from tgate_compile.bundle.plan import PlannedGraph, example_sizes, inputs_of, other_sizes, size_of, symbols_of
from tgate_compile.bundle.read_manifest import shape_at
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.engine.capture import SYMBOLS
from tgate_compile.engine.trust import TOLERANCES, coarsest, full_float32, relative_difference
from tgate_compile.passes.graphs import shape_of

#: The tolerance for quantized graphs: with 4 bits, outputs for random inputs differed by up to 0.51 while images had
#: a PSNR of 42 dB to the float ones. A graph that returns only zeros differs by 1.
QUANTIZED_TOLERANCE = 0.9

#: Options that save memory: the weights, which may be large, are already in memory once.
FRUGAL: Mapping[str, object] = {"prepacking": False, "frugal": True}

#: The largest height and width to compare at, in units of what the denoiser downsamples to 1: its deepest layers then
#: see 4x4 latents.
ENOUGH = 4


def measure_parity(
    planned: PlannedGraph,
    graph: Graph,
    functions: GraphFormat,
    folder: Path,
    device: torch.device,
    limits: Mapping[str, tuple[int, int]],
    *,
    quantized: bool = False,
    real: Sequence[Sequence[torch.Tensor]] | None = None,
) -> Parity:
    """Run the written graph, on `device`, and the variant on the same random inputs, at several sizes within `limits`.

    A `quantized` graph may differ by more than others. If it was calibrated on `real` inputs, it is compared on the
    first and the last of these instead of random ones.

    Raises:
        BundleError: the outputs differ by more than rounding, or the runtime cannot run the file.
    """
    own_device = planned.device
    eager = planned.variant.program.graph_module
    measured: list[Deviation] = []
    dtypes: set[torch.dtype] = set()
    try:
        session = functions.open_graph(graph, folder, device, FRUGAL)
        for sizes, inputs in _cases(planned, limits, real if quantized else None):
            with torch.no_grad(), full_float32():
                expected = eager(*planned.weights, *(tensor.to(own_device) for tensor in inputs))
            results = session.run([tensor.to(device) for tensor in inputs])
            relative = max(relative_difference(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))
            measured.append(Deviation(sizes=sizes, relative=relative))
            dtypes.update(tensor.dtype for tensor in (*inputs, *results) if tensor.is_floating_point())
    except BackendError as error:
        hint = " ONNX Runtime supports float32 and float16 there, but not bfloat16." if device.type == "cpu" else ""
        raise BundleError(
            f"The {planned.name} graph cannot be checked against PyTorch on the {device}: {error} Nothing has been "
            f"written.{hint}"
        ) from error
    dtype = coarsest(dtypes)
    tolerance = QUANTIZED_TOLERANCE if quantized else TOLERANCES[dtype]
    relative = max(one.relative for one in measured)
    if not all(one.relative <= tolerance for one in measured):  # also true for NaN
        kind = "quantized graphs" if quantized else dtype_name(dtype)
        raise BundleError(
            f"The {planned.name} graph in {session.provider} differs from PyTorch by {relative:.1e} on the same "
            f"inputs, relative to the largest value; at most {tolerance:.0e} is allowed for {kind}. Nothing has been "
            "written. Please report this."
        )
    return Parity(relative=relative, tolerance=tolerance, provider=session.provider, measured=measured)


def _cases(
    planned: PlannedGraph,
    limits: Mapping[str, tuple[int, int]],
    real: Sequence[Sequence[torch.Tensor]] | None,
) -> list[tuple[dict[str, int], list[torch.Tensor]]]:
    """Return the cases to compare: sizes, and inputs of these sizes."""
    example = example_sizes(planned)
    if real is not None:
        return [(dict(example), list(inputs)) for inputs in (real[0], real[-1])]
    return [(sizes, _random_inputs(planned, sizes)) for sizes in _choices(example, limits)]


def _choices(example: Mapping[str, int], limits: Mapping[str, tuple[int, int]]) -> list[dict[str, int]]:
    """Return the call's own sizes, reduced because PyTorch takes minutes for a large image on a CPU, and others."""
    if not example:
        return [{}]
    sides = {SYMBOLS["height"], SYMBOLS["width"]}
    own = {name: min(size, ENOUGH) if name in sides else size for name, size in example.items()}
    return [
        {
            name: min(max(size, limits[name][0]), limits[name][1]) if name in limits else size
            for name, size in one.items()
        }
        for one in (own, other_sizes(own))
    ]


def _resized(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of another shape with the same values, repeated or cut off."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] != size:
            tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    return tensor


def _random_inputs(planned: PlannedGraph, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """Return normally distributed latents, text embeddings and caches; timesteps and masks are those of the call.

    Values of a prelude or a table are those that PyTorch computes from these inputs.
    """
    generator = torch.Generator().manual_seed(0)
    symbols = symbols_of(planned)

    def random(node: torch.fx.Node, given: object) -> torch.Tensor:
        dtype = node.meta["val"].dtype
        shape = shape_at([size_of(size, symbols) for size in shape_of(node)], sizes)
        if isinstance(given, torch.Tensor) and not (given.is_floating_point() and given.ndim > 1):
            return _resized(given.cpu(), shape)
        return torch.randn(shape, generator=generator).to(dtype)

    values: dict[str, torch.Tensor] = {}
    for part in (planned, *planned.early):
        for name, node in zip(part.input_names, inputs_of(part), strict=True):
            if name not in part.early_names and name not in values:
                values[name] = random(node, part.arguments.get(name))
    values |= {name: value.cpu() for name, value in planned.early_values(values).items()}
    return [values[name] for name in planned.input_names]
