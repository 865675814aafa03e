"""Errors for wrong arguments state what was given, what is accepted, and what was probably meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest

import tgate_compile
from tests.tiny_pipelines import run, stable_diffusion
from tgate_compile import BundleError, ConfigurationError, Schedule
from tgate_compile._cli.loading import load_pipeline
from tgate_compile._cli.options import Dtype
from tgate_compile._errors import BackendName, BundleBackendName, FormatName
from tgate_compile.bundle.formats import FORMATS, openers
from tgate_compile.bundle.read_manifest import wrong_pixels
from tgate_compile.engine.backends import BACKENDS

STEPS = 3
MULTIPLE = "must be a multiple of 32 pixels, not 144 (the nearest are 128 and 160)"


@pytest.fixture(scope="module")
def plain() -> Any:
    return stable_diffusion(layout="small")


@pytest.fixture(scope="module")
def optimized() -> Any:
    return tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager")


def message_of(call: Callable[[], object], error: type[Exception] = ConfigurationError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# Argument names, for completion in editors.


def test_the_literals_are_those_of_the_tables() -> None:
    assert {*get_args(BackendName)} == {*BACKENDS, "auto"}
    assert {*get_args(FormatName)} == {*FORMATS}
    assert {*get_args(BundleBackendName)} == {backend for name in FORMATS for backend in openers(name)}


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (lambda pipe: tgate_compile.optimize(pipe, backend="egaer"), "eager"),
        (lambda pipe: tgate_compile.optimize(pipe, "atuo"), "auto"),
        (lambda pipe: tgate_compile.load(pipe, "bundle", backend="onnxrt"), "onnxruntime"),
        (lambda pipe: tgate_compile.export(pipe, "bundle", "onx"), "onnx"),
    ],
)
def test_a_misspelt_choice(plain: Any, call: Callable[[Any], object], nearest: str) -> None:
    assert f'Did you mean "{nearest}"?' in message_of(lambda: call(plain))


# Options passed as mappings.


@pytest.mark.parametrize(
    ("call", "name", "nearest", "another"),
    [
        (lambda pipe: tgate_compile.export(pipe, "bundle", call={"heigth": 16}), "heigth", "height", "guidance_scale"),
        (lambda pipe: tgate_compile.describe(pipe, promt="a fox"), "promt", "prompt", "num_inference_steps"),
    ],
)
def test_misspelt_arguments_of_an_optimized_pipelines_call(
    optimized: Any, call: Callable[[Any], object], name: str, nearest: str, another: str
) -> None:
    message = message_of(lambda: call(optimized))
    assert f'the call of StableDiffusionPipeline has no option "{name}". Did you mean "{nearest}"?' in message
    assert another in message


@pytest.mark.parametrize("function", [tgate_compile.tune, tgate_compile.analyze])
def test_misspelt_arguments_of_a_plain_pipelines_call(plain: Any, function: Callable[..., object]) -> None:
    message = message_of(lambda: function(plain, ["a fox"], call={"guidance_scal": 5.0}))
    assert 'has no option "guidance_scal". Did you mean "guidance_scale"?' in message
    assert "height" in message


def test_misspelt_arguments_of_evaluate(plain: Any, tmp_path: Path) -> None:
    call = {"guidance_scal": 5.0}
    message = message_of(lambda: tgate_compile.evaluate(plain, [Schedule(2)], ["a fox"], tmp_path, call=call))
    assert 'Did you mean "guidance_scale"?' in message


def test_misspelt_arguments_of_tune(plain: Any) -> None:
    message = message_of(lambda: tgate_compile.optimize(plain, "auto", tuning={"prompt": ["a fox"]}))
    assert 'tune() has no option "prompt". Did you mean "prompts"?' in message
    assert "tolerance" in message


@pytest.mark.parametrize(
    ("backend", "options", "expected"),
    [
        ("onnxruntime", {"thread": 2}, 'Did you mean "threads"? It accepts: providers, threads, prepacking.'),
        ("openvino", {"precison": "float32"}, 'Did you mean "precision"? It accepts: device, '),
        ("inductor", {"max_autotun": True}, 'Did you mean "max_autotune"? torch._inductor.list_options() lists'),
    ],
)
def test_misspelt_options_of_backends(plain: Any, backend: BackendName, options: dict[str, Any], expected: str) -> None:
    for needed in ("onnxscript", "openvino") if backend in ("onnxruntime", "openvino") else ():
        pytest.importorskip(needed)
    message = message_of(lambda: tgate_compile.optimize(plain, backend=backend, backend_options=options))
    wrong = next(iter(options))
    assert f'backend="{backend}"' in message
    assert wrong in message
    assert expected in message


@pytest.mark.parametrize(
    ("format", "needs", "options", "expected"),
    [
        ("aoti", "pydantic", {"targt": "native"}, 'Did you mean "target"? It accepts: target.'),
        ("executorch", "executorch", {"delegat": "xnnpack"}, 'Did you mean "delegate"? It accepts: delegate.'),
        ("coreml", "coremltools", {"precison": "float16"}, 'Did you mean "precision"? It accepts: '),
    ],
)
def test_misspelt_options_of_formats(
    optimized: Any, format: FormatName, needs: str, options: dict[str, Any], expected: str
) -> None:
    pytest.importorskip(needs)
    message = message_of(lambda: tgate_compile.export(optimized, "bundle", format, format_options=options))
    wrong = next(iter(options))
    assert f'format_options has {wrong!r}, which format="{format}" does not accept. {expected}' in message


# Misplaced arguments.


@pytest.mark.parametrize(
    ("function", "arguments", "swap"),
    [
        (tgate_compile.optimize, (10,), "optimize(pipe, 10, ...)"),
        (tgate_compile.export, ("folder",), "export(pipe, 'folder', ...)"),
        (tgate_compile.load, ("folder",), "load(pipe, 'folder', ...)"),
        (tgate_compile.tune, (["a fox"],), "tune(pipe, ['a fox'], ...)"),
        (tgate_compile.analyze, (["a fox"],), "analyze(pipe, ['a fox'], ...)"),
    ],
)
def test_the_pipeline_comes_first(
    plain: Any, function: Callable[..., object], arguments: tuple[object, ...], swap: str
) -> None:
    message = message_of(lambda: function(*arguments, plain))
    assert "takes the pipeline first" in message
    assert swap in message
    assert len(message) < 200  # the pipeline is not printed


def test_evaluates_pipeline_comes_first(plain: Any, tmp_path: Path) -> None:
    unknown: Any = [Schedule(2)]
    message = message_of(lambda: tgate_compile.evaluate(unknown, plain, ["a fox"], tmp_path))
    assert "evaluate() takes the pipeline first" in message


def test_a_backend_as_the_gate_step_and_the_other_way_round(plain: Any) -> None:
    gate_step: Any = "eager"
    message = message_of(lambda: tgate_compile.optimize(plain, gate_step))
    assert 'That is the name of a backend. Use optimize(pipe, gate_step=10, backend="eager").' in message
    backend: Any = 10
    message = message_of(lambda: tgate_compile.optimize(plain, backend=backend))
    assert "but got 10. The number of steps to run in full is the argument gate_step." in message


def test_a_schedule_file_as_the_gate_step(plain: Any) -> None:
    gate_step: Any = "schedule.json"
    message = message_of(lambda: tgate_compile.optimize(plain, gate_step))
    assert 'call optimize(pipe, schedule="schedule.json")' in message


def test_the_folder_and_the_format_of_an_export_swapped(plain: Any) -> None:
    format: Any = "bundle"
    message = message_of(lambda: tgate_compile.export(plain, "onnx", format))
    assert 'export(pipe, "bundle", format="onnx")' in message


# Sizes, in pixels.


def unit_of(pipe: Any) -> int:
    """Return the pixels of which height and width must be multiples in graphs with free sizes."""
    halvings = sum(1 for block in pipe.unet.down_blocks if block.downsamplers is not None)
    return int(pipe.vae_scale_factor * 2**halvings)


def test_a_size_that_cannot_be_left_free_is_explained_in_pixels(optimized: Any) -> None:
    unit = unit_of(optimized)
    size = 4 * unit + unit // 2
    call = {"height": size, "num_inference_steps": STEPS}
    message = message_of(lambda: tgate_compile.export(optimized, "bundle", call=call, dynamic=["height"]))
    assert f"height must be a multiple of {unit} pixels, but got {size}." in message
    assert f"The nearest multiples are {4 * unit} and {5 * unit}." in message


@pytest.mark.parametrize(
    ("expected", "given", "wrong"),
    [
        (["2*b", 4, "4*h", "4*w"], (2, 4, 18, 16), f"height {MULTIPLE}"),
        (["2*b", 4, "4*h", "4*w"], (2, 4, 16, 404), "width must be from 32 to 3200 pixels, not 3232"),
        ([2, 4, 16, 16], (2, 4, 24, 16), "height must be 128 pixels, not 192"),
        ([2, 4, 16, 16], (2, 4, 8, 8), "height must be 128 pixels, not 64, and width must be 128 pixels, not 64"),
        (["2*b", 4, 3, "4*h", "w"], (2, 4, 3, 16, 7), ""),
        (["2*b", 4, "4*h", "4*w"], (8, 4, 16, 16), ""),
        (["b", 16, "t"], (1, 16, 7), ""),
    ],
)
def test_sizes_of_latents_are_explained_in_pixels(expected: list[Any], given: tuple[int, ...], wrong: str) -> None:
    assert wrong_pixels(expected, given, 8, {"b": (1, 31), "h": (1, 100), "w": (1, 100)}) == wrong


def test_a_size_that_a_bundle_does_not_take_is_explained_in_pixels(optimized: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    call = {"height": 16, "width": 16, "num_inference_steps": STEPS}  # without a prompt, which is then empty
    folder = tgate_compile.export(optimized, tmp_path / "bundle", call=call, dynamic=False)
    pipe = tgate_compile.load(stable_diffusion(layout="small"), folder)
    message = message_of(lambda: run(pipe, steps=STEPS, height=24, width=16), BundleError)
    assert "height must be 16 pixels, not 24" in message
    assert "float32[" not in message


# The hub.


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # from diffusers
def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    device: Any = "cpu"
    message = message_of(lambda: load_pipeline("nobody/nothing", None, Dtype.fp32, device))
    assert message.startswith("No network: nobody/nothing is not on this machine")
    assert "HF_HUB_OFFLINE" in message
