"""ONNX and ONNX Runtime."""

from tgate_compile._runtimes import BackendEntry, FormatEntry

BACKENDS = (
    BackendEntry(
        "onnxruntime",
        "tgate_compile.exports.onnx.live:OnnxRuntimeBackend",
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        automatic={"cpu": 2},
        # ONNX Runtime 1.31: "Could not find an implementation for Gemm(13)".
        lacks={"cpu bfloat16": "ONNX Runtime has no kernels for it on CPUs; openvino, eager and inductor have"},
    ),
)

FORMATS = (
    FormatEntry(
        "onnx",
        "tgate_compile.exports.onnx.save",
        backend="onnxruntime",
        extra="onnx",
        to_write=("onnx", "onnxscript", "onnxruntime", "pydantic"),
        to_load=("onnx", "pydantic"),
        also={"openvino": "openvino"},
        schemes=("int8", "int4", "int8-dynamic", "int8-static"),
        splits=True,
        components="tgate_compile.exports.onnx.components",
    ),
)
