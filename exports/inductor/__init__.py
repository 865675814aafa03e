"""Inductor, and AOTInductor: PyTorch's own compiler, live and ahead of time."""

from tgate_compile._runtimes import BackendEntry, FormatEntry

BACKENDS = (
    # On a CPU it compiles for minutes and is then about as fast as eager, so `auto` does not consider it there.
    BackendEntry(
        "inductor",
        "tgate_compile.exports.inductor.live:InductorBackend",
        automatic={"cuda": 1, "mps": 1, "xpu": 1},
        # CUDA graphs need all inputs on one GPU, and memory of their own.
        attempts={"cuda": ({"cuda_graphs": True}, {})},
    ),
)

FORMATS = (
    FormatEntry(
        "aoti",
        "tgate_compile.exports.inductor.save",
        backend="aoti",
        extra="aoti",
        to_write=("pydantic",),
        to_load=("pydantic",),
    ),
)
