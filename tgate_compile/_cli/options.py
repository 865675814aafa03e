"""Options that several commands share, and their checks."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from tgate_compile._errors import ConfigurationError
from tgate_compile._schedule import checked_gate_step

MSG_SIZE = "{given} is no multiple of 8, which the models need. The nearest: {below} or {above}."


class Dtype(str, Enum):
    """Number formats by their usual short names."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Backend(str, Enum):
    """The backends of `optimize`."""

    eager = "eager"
    inductor = "inductor"
    onnxruntime = "onnxruntime"
    openvino = "openvino"
    tensorrt = "tensorrt"
    auto = "auto"


class Keep(str, Enum):
    """The guidance half that goes on after the gate."""

    uncond = "uncond"
    cond = "cond"


def parse_gate_step(text: object) -> float:
    """A gate step from the command line: an int is a number of steps, a float a fraction of them."""
    given = str(text)
    try:
        value: float = float(given) if "." in given or "e" in given.lower() else int(given)
    except ValueError:
        raise typer.BadParameter(
            f"expected a number of steps (10) or a fraction of them (0.4), got {given!r}."
        ) from None
    try:
        return checked_gate_step(value)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from None


def check_size(given: int | None) -> int | None:
    """A height or width: a multiple of 8, or None for the model's own."""
    if given is not None and given % 8:
        below = given - given % 8
        raise typer.BadParameter(MSG_SIZE.format(given=given, below=below, above=below + 8))
    return given


GATE_HELP = "Steps to run in full: a number (10), or a fraction of the steps (0.4)."

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder with a diffusers pipeline, a .safetensors file, a hub id, or embedded:sd, :sdxl, :pixart or "
        ":lcm.",
        show_default="embedded:sd",
    ),
]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        help="For a checkpoint in a single file: folder or hub id of a pipeline with its configuration.",
        show_default="found on the hub",
    ),
]
Unet = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of another UNet for the pipeline, e.g. latent-consistency/lcm-sdxl."),
]
Lora = Annotated[str | None, typer.Option(help="LoRA weights: a file, a folder or a hub id. Needs peft.")]
Scheduler = Annotated[
    str | None, typer.Option(help="Put this scheduler in: ddim, dpm++, euler, lcm, ...", show_default="auto")
]
GateStep = Annotated[
    float | None,
    typer.Option(
        "--gate-step", "-g", parser=parse_gate_step, metavar="INT|FRACTION", help=GATE_HELP, show_default="auto"
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="auto")]
Guidance = Annotated[
    float | None, typer.Option(min=0.0, help="Guidance scale; up to 1 means none.", show_default="auto")
]
Height = Annotated[
    int | None, typer.Option(min=8, callback=check_size, help="Of the image.", show_default="the model's")
]
Width = Annotated[
    int | None, typer.Option(min=8, callback=check_size, help="Of the image.", show_default="the model's")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda (or cuda:1, ...) or mps.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="auto: fp32 on a CPU, fp16 or bf16 on a GPU.")]
KeepOption = Annotated[
    Keep | None,
    typer.Option("--keep", help="Guidance half that goes on once guidance has stopped.", show_default="the paper's"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
