"""Open ONNX Runtime sessions, and run them on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgate_compile.engine.backends import threads_for

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


#: The name, shape and dtype of an output.
Output = tuple[str, Sequence[int], torch.dtype]


def session_options(options: Mapping[str, object]) -> onnxruntime.SessionOptions:
    """Return ONNX Runtime's settings for the backend's options `threads` and `prepacking`.

    If the internal option `optimized` is False, the graph is not optimized: no weight is transposed or cast in advance,
    so none is in memory twice.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # the warnings are about the placement of operators
    settings.intra_op_num_threads = threads_for(options)
    if options.get("prepacking") is False:
        settings.add_session_config_entry("session.disable_prepacking", "1")
        # The levels beyond "extended" change the layouts of convolutions, which copies their weights.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if options.get("optimized") is False:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return settings


def best_providers(device: torch.device) -> list[str]:
    """Return the execution providers for tensors on `device`, in order of priority."""
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if device.type == "cuda" else ["CPUExecutionProvider"]


#: Options of execution providers for NVIDIA's GPUs, besides the number of the GPU. By default float32 is multiplied in
#: TF32, which rounds factors to ten bits.
_GPU_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0"},
    "TensorrtExecutionProvider": {},
    "NvTensorRTRTXExecutionProvider": {},
}


def provider_options(providers: Sequence[str], device: torch.device) -> list[dict[str, str]]:
    """Return the options of each of `providers` for tensors on `device`: those for GPUs use the same one."""
    return [
        {"device_id": str(device.index or 0), **_GPU_OPTIONS[name]} if name in _GPU_OPTIONS else {}
        for name in providers
    ]


def open_session(
    model: bytes | Path,
    settings: onnxruntime.SessionOptions,
    providers: Sequence[str],
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> onnxruntime.InferenceSession:
    """Open a session for `model`, for inputs on `device`.

    Raises:
        Exception: of any class, because ONNX Runtime's errors have no common base class.
    """
    import onnxruntime

    return onnxruntime.InferenceSession(
        model, settings, providers=list(providers), provider_options=provider_options(providers, device)
    )


def run_bound(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[Output],
    device: torch.device,
) -> list[torch.Tensor]:
    """Run `session` on the memory of `inputs`, and return new tensors on `device`, in the order of `outputs`.

    Raises:
        RuntimeError: ONNX Runtime fails.
    """
    binding: Any = session.io_binding()
    index = device.index or 0
    contiguous = {name: tensor.contiguous() for name, tensor in inputs.items()}  # must live until the run is over
    for name, tensor in contiguous.items():
        element = ELEMENT_TYPES[tensor.dtype]
        binding.bind_input(name, device.type, index, element, list(tensor.shape), tensor.data_ptr())
    results = []
    for name, shape, dtype in outputs:
        result = torch.empty(tuple(shape), dtype=dtype, device=device)
        binding.bind_output(name, device.type, index, ELEMENT_TYPES[dtype], list(shape), result.data_ptr())
        results.append(result)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime uses its own stream
    session.run_with_iobinding(binding)
    return results
