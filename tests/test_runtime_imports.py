"""Large packages are imported only when they are used."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tgate_compile
from tgate_compile import _errors


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    assert set(tgate_compile.__all__) == {*tgate_compile._HOMES, "__version__"}
    for name in tgate_compile.__all__:
        assert hasattr(tgate_compile, name)
    assert set(tgate_compile.__all__) <= set(dir(tgate_compile))
    tree = ast.parse(Path(tgate_compile.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {node.names[0].name: node.module for node in block.body if isinstance(node, ast.ImportFrom)}
    assert imported == {name: f"tgate_compile.{home}" for name, home in tgate_compile._HOMES.items()}


def test_every_type_that_a_public_function_returns_is_public() -> None:
    public = {name: getattr(tgate_compile, name) for name in tgate_compile.__all__}
    for name, function in public.items():
        if inspect.isfunction(function):
            returned = inspect.signature(function).return_annotation
            for word in re.findall(r"[A-Z]\w+", returned):
                # The caller's type, or one from the standard library or diffusers.
                known = word in ("Pipeline", "Code", "Path", "Iterator", "DiffusionPipeline", "None")
                assert known or word in public, f"{name}() returns {returned}"
    errors = {name for name, value in vars(_errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert errors <= {*public}
    assert public["DEMO_VARIANTS"].keys() >= {"sd", "lcm"}


def test_other_names() -> None:
    assert tgate_compile.runtime.__name__ == "tgate_compile.runtime"
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        tgate_compile.optimise  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import tgate_compile; tgate_compile.Schedule; tgate_compile.BundleError; tgate_compile.load_schedule",
        "import tgate_compile.runtime",
        "import tgate_compile._cli.app, tgate_compile._cli.run",
    ],
)
def test_without_torch(code: str) -> None:
    code = (
        f"import sys\n{code}\nprint([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
