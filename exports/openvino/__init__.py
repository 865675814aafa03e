"""OpenVINO."""

from tgate_compile._runtimes import BackendEntry, FormatEntry

BACKENDS = (
    BackendEntry(
        "openvino",
        "tgate_compile.exports.openvino.live:OpenVinoBackend",
        needs=("onnx", "onnxscript", "openvino"),
        extra="openvino",
        automatic={"cpu": 1},
        precision_option="precision",
    ),
)

FORMATS = (
    FormatEntry(
        "openvino",
        "tgate_compile.exports.openvino.save",
        backend="openvino",
        extra="openvino",
        to_write=("onnx", "onnxscript", "openvino", "pydantic"),
        to_load=("openvino", "pydantic"),
        schemes=("int8", "int4", "int8-dynamic", "int8-static"),
    ),
)
