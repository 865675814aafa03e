"""Core ML."""

from tgate_compile._runtimes import FormatEntry

FORMATS = (
    FormatEntry(
        "coreml",
        "tgate_compile.exports.coreml.save",
        backend="coreml",
        extra="coreml",
        to_write=("coremltools", "pydantic"),
        to_load=("coremltools", "pydantic"),
        fixed_sizes=True,
    ),
)
