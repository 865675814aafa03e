"""The tasks of the processes of `benchmarks/arm.py`, on the x86 machine and on the emulated one.

    python benchmarks/arm_tasks.py draw '{"backend": "onnxruntime", "model": "sd", ...}'

Prints the result as JSON. Packages are imported when they are needed: on Arm each task has only some of them.
"""

from __future__ import annotations

import importlib
import json
import math
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROMPT = "a large red circle on a blue background"
#: Number of steps, and the gate.
STEPS: Mapping[str, tuple[int, int]] = {"sd": (10, 4), "sdxl": (10, 4), "pixart": (10, 4), "lcm": (4, 2)}
#: Shape of the latents of one image.
LATENTS = (1, 4, 16, 16)


def export_bundle(model: str, precision: str, format: str, components: str, folder: str) -> dict[str, Any]:
    """Export an embedded model; formats with a program in C++ get the DDIM scheduler."""
    import tgate_compile

    steps, gate = STEPS[model]
    pipe = plain(model, precision, ddim=format in ("aoti", "executorch"))
    tgate_compile.optimize(pipe, gate, backend="eager")
    call = {"prompt": "", "num_inference_steps": steps, "guidance_scale": tgate_compile.DEMO_VARIANTS[model].guidance}
    tgate_compile.export(
        pipe,
        folder,
        format,  # type: ignore[arg-type]
        call=call,
        dynamic=False,
        components=components,  # type: ignore[arg-type]
        quantize=None if precision.startswith("float") else precision,  # type: ignore[arg-type]
    )
    return {}


def plain(model: str, precision: str, *, ddim: bool = False) -> Any:
    """Return an embedded pipeline, with the scheduler of the programs in C++ if `ddim`."""
    import torch

    import tgate_compile

    torch.set_num_threads(1)
    dtype = torch.float16 if precision == "float16" else torch.float32
    pipe = tgate_compile.load_demo_pipeline(model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if ddim:
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def draw(backend: str, model: str, precision: str, folder: str, sequential: bool, out: str) -> dict[str, Any]:
    """Make an image of a bundle and save it: by `load` with a backend, or by `BundlePipeline`.

    The noise is the same on every machine.
    """
    import numpy as np

    steps, _ = STEPS[model]
    if not backend:
        from tgate_compile.runtime import BundlePipeline

        program = BundlePipeline(folder, threads=1, sequential=sequential)
        np.save(out, program(PROMPT, seed=0, num_inference_steps=steps, output="numpy"))
        return {}
    import torch

    import tgate_compile

    pipe = plain(model, precision)
    tgate_compile.load(pipe, folder, backend=backend, sequential=sequential)  # type: ignore[arg-type]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(LATENTS, dtype=np.float32))
    scale = tgate_compile.DEMO_VARIANTS[model].guidance
    call = {"num_inference_steps": steps, "guidance_scale": scale, "latents": noise.to(pipe.dtype)}
    np.save(out, pipe(PROMPT, output_type="np", **call).images[0])
    return {}


def write_inputs(model: str, precision: str, bundle: str, folder: str, out: str) -> dict[str, Any]:
    """Write the inputs of a program in C++, and save the image that the bundle makes of them here, in Python."""
    import numpy as np
    import torch

    import tgate_compile

    pipe = plain(model, precision, ddim=True)
    steps, _ = STEPS[model]
    script = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "cpp" / "write_inputs.py"))
    script["write_inputs"](pipe, Path(folder), PROMPT, steps)
    tgate_compile.load(pipe, bundle)
    latents = torch.from_numpy(np.load(Path(folder, "latents.npy"))).to(pipe.dtype)
    scale = tgate_compile.DEMO_VARIANTS[model].guidance
    call = {"num_inference_steps": steps, "guidance_scale": scale, "latents": latents}
    np.save(out, pipe(PROMPT, output_type="np", **call).images[0])
    return {"guidance_scale": scale}


def decode(model: str, precision: str, latents: str, out: str) -> dict[str, Any]:
    """Save the image of the final latents of a program in C++."""
    import numpy as np
    import torch

    pipe = plain(model, precision)
    with torch.no_grad():
        values = torch.from_numpy(np.load(latents)).to(pipe.dtype) / pipe.vae.config.scaling_factor
        images = pipe.image_processor.postprocess(pipe.vae.decode(values).sample, output_type="np")
    np.save(out, images[0])
    return {}


def compare(images: str, expected: str) -> dict[str, Any]:
    """Return the PSNR in dB, and the largest difference, of two images with values from 0 to 1.

    The PSNR of equal images is None.
    """
    import numpy as np

    first, second = (np.load(path).astype(np.float64) for path in (images, expected))
    if first.shape != second.shape or not np.isfinite(first).all():
        raise ValueError(f"the image has the shape {first.shape} and values from {first.min()} to {first.max()}")
    error = float(np.square(first - second).mean())
    return {
        "psnr_db": round(-10 * math.log10(error), 1) if error else None,
        "largest_difference": float(np.abs(first - second).max()),
    }


def imports(modules: str) -> dict[str, Any]:
    """Only import the modules of a run."""
    for module in filter(None, modules.split(", ")):
        importlib.import_module(module)
    return {}


TASKS = {task.__name__: task for task in (export_bundle, draw, write_inputs, decode, compare, imports)}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
