"""Sessions of ONNX Runtime on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnxruntime

# ONNX's numbers for element types (onnx.TensorProto.DataType): numpy has no bfloat16 and no fp8.
ELEMENT_TYPES: Mapping[torch.dtype, int] = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
    torch.float8_e4m3fn: 17,
    torch.float8_e5m2: 19,
}


#: What an output is: its name, shape and dtype.
Output = tuple[str, Sequence[int], torch.dtype]


def session_options(options: Mapping[str, object]) -> onnxruntime.SessionOptions:
    """ONNX Runtime's own settings for the backend's options `threads` and `prepacking`.

    Without `optimized`, which no user is offered, the graph is run as it is: no weight is transposed or cast once for
    all runs, and so none is in memory twice.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # its warnings are about its own placement of operators
    threads = options.get("threads")
    settings.intra_op_num_threads = threads if isinstance(threads, int) else torch.get_num_threads()
    if options.get("prepacking") is False:
        settings.add_session_config_entry("session.disable_prepacking", "1")
        # Beyond "extended" are the layouts of convolutions, for which their weights are copied.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if options.get("optimized") is False:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return settings


def best_providers(device: torch.device) -> list[str]:
    """The execution providers for tensors on `device`, the first that takes an operator runs it."""
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if device.type == "cuda" else ["CPUExecutionProvider"]


def open_session(
    model: bytes | Path, settings: onnxruntime.SessionOptions, providers: Sequence[str]
) -> onnxruntime.InferenceSession:
    """A session of the model.

    Raises:
        Exception: of any class; ONNX Runtime has no common base class of its errors.
    """
    import onnxruntime

    return onnxruntime.InferenceSession(model, settings, providers=list(providers))


def run_bound(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[Output],
    device: torch.device,
) -> list[torch.Tensor]:
    """Run `session` on the memory of `inputs`, into new tensors on `device`, in the order of `outputs`.

    Raises:
        RuntimeError: ONNX Runtime's, if it fails.
    """
    binding: Any = session.io_binding()
    index = device.index or 0
    contiguous = {name: tensor.contiguous() for name, tensor in inputs.items()}  # which live until the run is over
    for name, tensor in contiguous.items():
        element = ELEMENT_TYPES[tensor.dtype]
        binding.bind_input(name, device.type, index, element, list(tensor.shape), tensor.data_ptr())
    results = []
    for name, shape, dtype in outputs:
        result = torch.empty(tuple(shape), dtype=dtype, device=device)
        binding.bind_output(name, device.type, index, ELEMENT_TYPES[dtype], list(shape), result.data_ptr())
        results.append(result)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime has a stream of its own
    session.run_with_iobinding(binding)
    return results
