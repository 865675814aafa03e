"""TensorRT, TensorRT for RTX, and Torch-TensorRT."""

from tgate_compile._runtimes import BackendEntry, FormatEntry

BACKENDS = (
    BackendEntry(
        "tensorrt",
        "tgate_compile.exports.tensorrt.live:TensorRTBackend",
        needs=("torch_tensorrt", "tensorrt"),
        extra="tensorrt",
        needs_gpu=True,
    ),
)

FORMATS = (
    FormatEntry(
        "tensorrt-rtx",
        "tgate_compile.exports.tensorrt.save:RTX",
        backend="tensorrt-rtx",
        extra="tensorrt-rtx",
        to_write=("onnx", "onnxscript", "tensorrt_rtx", "pydantic"),
        to_load=("onnx", "tensorrt_rtx", "pydantic"),
        needs_gpu=True,
    ),
    FormatEntry(
        "tensorrt",
        "tgate_compile.exports.tensorrt.save:ENTERPRISE",
        backend="tensorrt",
        extra="tensorrt",
        to_write=("onnx", "onnxscript", "tensorrt", "pydantic"),
        to_load=("onnx", "tensorrt", "pydantic"),
        needs_gpu=True,
    ),
)
