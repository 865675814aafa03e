"""Run the page's JavaScript modules in Node.js, without a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

#: The page's files.
SITE = Path(str(resources.files("tgate_compile._web").joinpath("site")))


def run_in_node(script: str, given: Any) -> Any:
    """Run the body of an async function of `given` and return its result; both are JSON. It may import the modules."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node.js on this machine")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in SITE.glob("*.*js"):
            shutil.copy(path, folder)
        (folder / "package.json").write_text('{"type": "module"}')
        (folder / "given.json").write_text(json.dumps(given))
        (folder / "main.js").write_text(
            'import { readFileSync } from "node:fs";\n'
            'const given = JSON.parse(readFileSync("given.json", "utf8"));\n'
            f"const made = await (async () => {{ {script} }})();\n"
            "process.stdout.write(JSON.stringify(made));\n"
        )
        done = subprocess.run([node, "main.js"], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
