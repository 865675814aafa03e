"""An end-to-end test on a tiny pipeline in less than a minute: run it first after a change.

Each step uses the result of the previous one, as a user would: optimize, describe, export, run without PyTorch, run
from the command line, restore.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import ROUNDING, assert_differ, assert_same, difference
from tests.hook_reference import hook_reference
from tests.programs import noise, plain
from tests.tiny_pipelines import PROMPT, SIZE, run
from tgate_compile._cli.app import app

GATE, STEPS = 3, 6
CALL = {"prompt": PROMPT, "num_inference_steps": STEPS}

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = sys.modules["transformers"] = None  # importing them is an error
import numpy as np
from tgate_compile.runtime import BundlePipeline
folder, prompt, latents, out = sys.argv[1:]
images = BundlePipeline(folder, threads=1)(prompt, latents=np.load(latents), output="numpy")
np.save(out, images)
"""


def test_the_whole_product(tmp_path: Path) -> None:
    pipe = plain()
    before = run(pipe, steps=STEPS)
    with hook_reference(pipe, GATE):
        expected = run(pipe, steps=STEPS)
    assert_differ(expected, before)

    # Optimized, it makes the same images as T-GATE with hooks, in every call.
    assert tgate_compile.optimize(pipe, GATE, backend="eager") is pipe
    assert_same(run(pipe, steps=STEPS), expected)
    assert_same(run(pipe, steps=STEPS), expected)
    assert difference(run(pipe, steps=STEPS, gate_step=STEPS), before) <= ROUNDING

    # `describe` reports the optimization.
    description = tgate_compile.describe(pipe, **CALL)
    assert description.strip == "FFFppp"
    assert [variant.name for variant in description.variants] == ["full", "pruned"]
    assert sorted(description.sites) == [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]

    # A bundle makes the same image without PyTorch.
    latents = noise()
    image = pipe(**CALL, latents=torch.from_numpy(latents), output_type="np").images[0]
    bundle = tgate_compile.export(pipe, tmp_path / "bundle", call=CALL, dynamic=False, components="all")
    np.save(tmp_path / "latents.npy", latents)
    arguments = [str(bundle), PROMPT, str(tmp_path / "latents.npy"), str(tmp_path / "image.npy")]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], check=True)
    assert np.abs(np.load(tmp_path / "image.npy") - image).max() < 1e-4

    # The bundle also runs from the command line.
    out = tmp_path / "cat.png"
    done = CliRunner().invoke(app, ["run", str(bundle), "--prompt", PROMPT, "--seed", "3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "FFFppp" in done.stdout
    with Image.open(out) as written:
        assert written.size == (SIZE, SIZE)

    # The bundle replaces the pipeline's own graphs; `restore` leaves no trace.
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, bundle)
    assert difference(run(pipe, steps=STEPS), expected) < 1e-4
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe, steps=STEPS), before)
    assert type(pipe) is type(plain())
