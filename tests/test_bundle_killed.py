"""A killed export leaves the complete bundle, the previous one, or nothing that can be loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exported import exported
from tgate_compile import BundleError
from tgate_compile.bundle.read import read_bundle

ROOT = Path(__file__).parents[1]
STAGES = ("Converting the pruned graph", "Hashing the files")
#: Seconds. Replacing one bundle by another takes about ten milliseconds.
DELAYS = (*(0.001 * 1.3**i for i in range(18)), 1.0)

# One process imports the library and forks the processes to be killed.

KILLED_AT_STAGES = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import tgate_compile
from tests.exported import GATE, least

pipe = least()
tgate_compile.optimize(pipe, GATE, backend="eager")
call = {"prompt": "", "num_inference_steps": 6}
tgate_compile.describe(pipe, **call)  # captures the graphs
folder, *stages = sys.argv[1:]

def export(name, fatal):
    def progress(stage):
        if stage == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    tgate_compile.export(pipe, Path(folder, name), call=call, dynamic=False, progress=progress)

for number, fatal in enumerate(stages):
    child = os.fork()
    if child == 0:
        export(str(number), fatal)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, fatal
"""

KILLED_WHILE_REPLACING = """
import itertools, os, shutil, signal, sys, time
from pathlib import Path
from tgate_compile.bundle.write import written_folder

folder, one, other, *delays = sys.argv[1:]

def replace(target):
    for source in itertools.cycle((one, other)):
        with written_folder(target, overwrite=True) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)

for number, delay in enumerate(delays):
    child = os.fork()
    if child == 0:
        replace(Path(folder, str(number)))
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def run_script(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, cwd=ROOT)


@pytest.mark.heavy
def test_at_the_stages_of_an_export(tmp_path: Path) -> None:
    run_script(KILLED_AT_STAGES, tmp_path, *STAGES)
    left = list(tmp_path.iterdir())
    assert len(left) == len(STAGES)
    for folder in left:
        assert folder.name.startswith(".")
        with pytest.raises(BundleError, match="is not a bundle"):
            read_bundle(folder)


@pytest.mark.heavy
def test_at_any_moment_of_a_replacement(tmp_path: Path) -> None:
    bundle = exported()
    newer = shutil.copytree(bundle, tmp_path / "newer")
    (newer / "manifest.json").write_text(json.dumps({"schema_version": 99}))
    home = tmp_path / "home"
    home.mkdir()
    run_script(KILLED_WHILE_REPLACING, home, bundle, newer, *DELAYS)
    found = {_found(home / str(number)) for number in range(len(DELAYS))}
    assert {"nothing"} < found <= {"nothing", "bundle", "newer"}


def _found(folder: Path) -> str:
    if not folder.exists():
        return "nothing"
    try:
        read_bundle(folder)
    except BundleError as error:
        return "newer" if "Install a newer tgate_compile" in str(error) else str(error)
    return "bundle"
