"""ExecuTorch, with XNNPACK."""

from tgate_compile._runtimes import FormatEntry

FORMATS = (
    FormatEntry(
        "executorch",
        "tgate_compile.exports.executorch.save",
        backend="executorch",
        extra="executorch",
        to_write=("executorch", "pydantic"),
        to_load=("executorch", "pydantic"),
        fixed_sizes=True,
        quantized_weights=False,
        schemes=("int8-dynamic", "int8-static"),
    ),
)
