"""`backend="openvino"`: the same images as the eager graphs, on the live weights."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, difference
from tests.test_refusals import refused
from tests.tiny_pipelines import (
    PROMPTS,
    add_lora,
    latent_consistency,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)
from tests.tiny_video import wan, wan_call
from tgate_compile import BackendError, ConfigurationError
from tgate_compile.exports.openvino.session import check_device

pytest.importorskip("openvino", reason="OpenVINO has no packages for some machines")

#: OpenVINO adds in a different order.
CLOSE = 1e-4


def both(pipe: Any, call: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of OpenVINO, run twice, and of the eager graphs. The pipeline stays optimized."""
    tgate_compile.optimize(pipe, **options, backend="eager")
    eager = drawn(pipe, **call)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, **options, backend="openvino")
    first = drawn(pipe, **call)
    assert torch.equal(drawn(pipe, **call), first)
    return first, eager


def drawn(pipe: Any, **call: Any) -> torch.Tensor:
    """Return the latents of images or videos."""
    if type(pipe).__name__ != "WanPipeline":
        return run(pipe, **call)
    call = {"num_inference_steps": 6, "output_type": "latent", **call}
    return pipe(generator=torch.Generator().manual_seed(0), **call).frames


CASES: dict[str, Any] = {
    "sdxl": (sdxl, {}, {"gate_step": 3, "keep": "cond"}),
    "pixart": (pixart, pixart_prompt(), {"gate_step": 2}),
    "lcm": (latent_consistency, {"steps": 4, "guidance_scale": 6.0}, {"gate_step": 1}),
    "wan": (wan, wan_call(), {"gate_step": 3}),
    "v2": (
        lambda: stable_diffusion(layout="small"),
        {"steps": 9},
        {"gate_step": 5, "sp_interval": 2, "fi_interval": 2, "anchor_weight": 1.0},
    ),
    "deepcache, fp8 caches": (
        lambda: stable_diffusion(layout="small"),
        {},
        {"gate_step": 3, "deepcache_interval": 2, "cache_dtype": torch.float8_e4m3fn},
    ),
}


#: The cases with the most kinds of graphs, which run by default.
QUICK = ("v2", "deepcache")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in CASES]
)
def test_the_same_images(name: str) -> None:
    build, call, options = CASES[name]
    result, eager = both(build(), call, **options)
    # A cached value may be rounded to a different fp8 number.
    assert difference(result, eager) < (5e-3 if "fp8" in name else CLOSE)


@pytest.mark.heavy
def test_changed_weights_are_seen() -> None:
    """Even through `.data`, as in peft, which bypasses torch's version counters; without another conversion."""
    pipe = stable_diffusion(layout="small")
    add_lora(pipe.unet)
    result, eager = both(pipe, {"prompt": PROMPTS}, gate_step=3)
    assert difference(result, eager) < CLOSE
    compiled = pipe._tgate_compile.hook.store.compilations
    for name, parameter in pipe.unet.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(2)
    changed = run(pipe, PROMPTS)
    assert pipe._tgate_compile.hook.store.compilations == compiled
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 3, backend="eager")
    assert difference(changed, run(pipe, PROMPTS)) < CLOSE
    assert_differ(changed, result)


@pytest.mark.heavy
@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_half_precision(dtype: torch.dtype, most: float) -> None:
    """OpenVINO computes in float32, and supports bfloat16 on a CPU, unlike ONNX Runtime."""
    result, eager = both(stable_diffusion(layout="small").to(dtype), {}, gate_step=3)
    assert result.dtype == dtype
    assert difference(result.float(), eager.float()) < most


def test_options(tmp_path: Path) -> None:
    options = {"device": "CPU", "threads": 1, "cache": str(tmp_path)}
    pipe = stable_diffusion(layout="small")
    tgate_compile.optimize(pipe, 3, backend="eager")
    eager = run(pipe)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 3, backend="openvino", precision="bfloat16", backend_options=options)
    assert difference(run(pipe), eager) < 6e-2
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"provider": "CPU"}, ("provider", "device, precision, threads, cache")),
        ({"device": "TPU"}, ('no device "TPU"', "CPU", "drivers")),
        ({"device": "AUTO:CPU,TPU"}, ("AUTO:CPU,TPU",)),
        ({"device": 0}, ("device", "got 0")),
        ({"precision": "int8"}, ("float32", "got 'int8'")),
        ({"threads": 0}, ("threads", "got 0")),
        ({"cache": ""}, ("a folder", "got ''")),
    ],
)
def test_wrong_options(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    pipe = stable_diffusion(layout="small")
    refused(pipe, ConfigurationError, *parts, backend="openvino", backend_options=options)


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    message = refused(stable_diffusion(layout="small"), ConfigurationError, "openvino", backend="openvino")
    assert "pip install 'tgate_compile[openvino]'" in message


def test_tensors_elsewhere() -> None:
    with pytest.raises(BackendError, match=r'"meta".*pipe.to\("cpu"\)'):
        check_device(torch.device("meta"))


def test_no_telemetry() -> None:
    """Importing openvino sends a telemetry event unless its telemetry package is hidden."""
    code = (
        "import sys\n"
        "from tgate_compile.exports.openvino.session import core, openvino\n"
        "assert core().available_devices\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "assert telemetry_utils.tm.__name__ == 'openvino.tools.ovc.telemetry_stub'\n"
        "import openvino_telemetry\n"
        "assert openvino_telemetry.Telemetry\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
