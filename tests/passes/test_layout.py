"""`passes/` and `exports/` lie at the top level but are part of the package."""

from __future__ import annotations

from pathlib import Path

import tgate_compile.exports
import tgate_compile.passes

ROOT = Path(__file__).parents[2]


def test_the_packages_are_the_folders_at_the_top() -> None:
    assert Path(tgate_compile.passes.__file__).resolve().parent == ROOT / "passes"
    assert Path(tgate_compile.exports.__file__).resolve().parent == ROOT / "exports"


def test_no_module_is_called_like_a_library_that_it_would_hide() -> None:
    names = {path.stem for folder in ("passes", "exports") for path in (ROOT / folder).glob("*.py")}
    assert not names & {"onnx", "tensorrt", "openvino", "executorch", "torch", "utils"}
