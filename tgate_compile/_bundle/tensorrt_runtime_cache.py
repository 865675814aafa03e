"""Execution contexts of TensorRT, and what TensorRT for RTX compiles for them on the GPU that it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorRTRuntimeCache:
    """The kernels that TensorRT for RTX compiles for the GPU that it finds, in a file, if a folder is given for it."""

    def __init__(self, trt: Any, engine: Any, path: Path, folder: object) -> None:
        self._trt = trt
        self._engine = engine
        self._file = None if folder is None else Path(str(folder)) / f"{path.stem}.cache"
        self._cache: Any = None

    def context(self) -> Any:
        """An execution context that is given its memory."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._file is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._cache = config.create_runtime_cache()
        if self._file.exists():
            self._cache.deserialize(self._file.read_bytes())  # of another GPU or version, it stays empty
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def save(self) -> None:
        """Write what is new to the file."""
        if self._file is not None:
            temporary = self._file.with_suffix(".tmp")
            temporary.write_bytes(self._cache.serialize())
            temporary.replace(self._file)
