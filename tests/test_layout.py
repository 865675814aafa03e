"""The package layout stays easy to navigate."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.layout import measure

ROOT = Path(__file__).parents[1]
SCRIPTS = [path for name in ("benchmarks", "training", "examples") for path in sorted((ROOT / name).rglob("*.py"))]


def test_the_layout() -> None:
    layout = measure()
    assert layout.modules <= 201
    assert len(layout.short) <= 12
    assert layout.long == []
    assert layout.crowded == []
    assert layout.floors <= 10
    assert layout.circles == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_what_exists(path: Path) -> None:
    """mypy checks the package only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("tgate_compile", "tests"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
