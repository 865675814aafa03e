"""Options that commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from tgate_compile._demo.captions import caption_of, random_scene
from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import checked_gate_step
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import load_schedule

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


@dataclass(frozen=True)
class Family:
    """How a family of checkpoints is used. A row matches where each of its conditions holds or is not given.

    Attributes:
        name: for people.
        pipelines: condition: the class name of the pipeline is one of these.
        schedulers: condition: the class name of its scheduler is one of these.
        guidance_embedded: condition: the denoiser takes the guidance scale as an input (a distilled model).
        steps: denoising steps.
        guidance: guidance scale.
        gate_step: the paper's for this family, of `steps`.
        scheduler: put in where the checkpoint has one of `replaced`; None leaves the checkpoint's own.
        replaced: schedulers that checkpoints of the family have only by age or convention.
        gpu_dtype: the number format on a GPU.
    """

    name: str
    steps: int
    guidance: float
    gate_step: int
    pipelines: frozenset[str] | None = None
    schedulers: frozenset[str] | None = None
    guidance_embedded: bool | None = None
    scheduler: str | None = None
    replaced: frozenset[str] = frozenset()
    gpu_dtype: str = "fp16"


_SD = frozenset({"StableDiffusionPipeline"})
_SDXL = frozenset({"StableDiffusionXLPipeline"})
_PIXART = frozenset({"PixArtAlphaPipeline", "PixArtSigmaPipeline"})
_LCM = frozenset({"LCMScheduler"})
_EDM = frozenset({"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"})
_ANY_OTHER = frozenset(
    {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"}
    | {"PNDMScheduler", "UniPCMultistepScheduler"}
)
# Their main.py, too, puts DPM-Solver++ in the place of what SD and SDXL come with.
_SLOWER = frozenset({"DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"})

#: The embedded pipeline; its own row, since it is the one that was measured at these settings.
EMBEDDED = Family("embedded", 25, 5.0, 10)

#: The first row that matches is taken. Gates: tables 1 and 3 of arXiv 2404.02747, and the authors' read-me.
FAMILIES: tuple[Family, ...] = (
    # The guidance scale goes into the denoiser; 8 is the scale that the LCM authors distilled for.
    Family("LCM, guidance embedded", 4, 8.0, 1, guidance_embedded=True, scheduler="lcm", replaced=_ANY_OTHER),
    Family("PixArt LCM", 4, 0.0, 1, pipelines=_PIXART, schedulers=_LCM, gpu_dtype="bf16"),
    Family("LCM", 4, 1.0, 1, schedulers=_LCM),
    Family("PixArt", 25, 4.5, 8, pipelines=_PIXART, gpu_dtype="bf16"),
    Family("Playground v2.5", 25, 3.0, 10, pipelines=_SDXL, schedulers=_EDM),
    Family("SDXL", 25, 5.0, 10, pipelines=_SDXL, scheduler="dpm++", replaced=_SLOWER),
    Family("Stable Diffusion", 25, 7.5, 10, pipelines=_SD, scheduler="dpm++", replaced=_SLOWER),
    Family("unknown", 25, 5.0, 10),
)

#: Short names of schedulers: the diffusers class, and what is set on top of the checkpoint's own configuration.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "edm-dpm++": ("EDMDPMSolverMultistepScheduler", {}),
    "edm-euler": ("EDMEulerScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as in every checkpoint that has it
    "unipc": ("UniPCMultistepScheduler", {}),
}


def recognise(pipe: Any) -> Family:
    """The family of a loaded pipeline."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    embedded = getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None) is not None
    for family in FAMILIES:
        if (
            (family.pipelines is None or type(pipe).__name__ in family.pipelines)
            and (family.schedulers is None or type(pipe.scheduler).__name__ in family.schedulers)
            and (family.guidance_embedded is None or family.guidance_embedded == embedded)
        ):
            return family
    raise AssertionError("the last row matches everything")


def gpu_dtype(pipeline_class: str) -> str:
    """The number format for a pipeline class on a GPU, which has to be known before anything is loaded."""
    return next((f.gpu_dtype for f in FAMILIES if f.pipelines and pipeline_class in f.pipelines), "fp16")


DTYPES = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}

MSG_DEVICE = "The device must be auto, cpu, cuda, cuda:<number> or mps, but got {given!r}."
MSG_NO_DEVICE = "There is no {given} device here that torch {version} can use. Use --device cpu, or leave it out."


def choose_device(given: str) -> torch.device:
    """The device called `given`; `auto` is the best one here.

    Raises:
        ConfigurationError: there is no such device.
    """
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if given == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if usable[name]))
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ConfigurationError(MSG_DEVICE.format(given=given)) from None
    if device.type not in usable:
        raise ConfigurationError(MSG_DEVICE.format(given=given))
    is_missing_gpu = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not usable[device.type] or is_missing_gpu:
        raise ConfigurationError(MSG_NO_DEVICE.format(given=given, version=torch.__version__))
    return device


def choose_dtype(given: Dtype, pipeline_class: str, device: torch.device) -> Dtype:
    """The number format asked for, or the best one for a pipeline of this class on `device`."""
    if given is not Dtype.auto:
        return given
    if device.type == "cpu":
        return Dtype.fp32
    chosen = Dtype(gpu_dtype(pipeline_class))
    if chosen is Dtype.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return Dtype.fp16
    return chosen


MSG_FILE_ALONE = "--schedule says all about the steps. Leave out {given}, or leave out --schedule."

_STEP = "INT|FRACTION"

OptionalGateStep = Annotated[
    float | None,
    typer.Option("--gate-step", "-g", parser=parse_gate_step, metavar=_STEP, help=GATE_HELP, show_default="no gate"),
]
SpInterval = Annotated[
    int | None, typer.Option(min=1, help="Self-attention every so many steps before the gate.", show_default="1")
]
FiInterval = Annotated[int | None, typer.Option(min=1, help="The same after the gate.", show_default="1")]
WarmUp = Annotated[int | None, typer.Option(min=0, help="Steps before --sp-interval counts.", show_default="2")]
DeepcacheInterval = Annotated[
    int | None, typer.Option(min=1, help="A UNet's deep part every so many steps.", show_default="1")
]
DeepcacheBranch = Annotated[
    int | None, typer.Option(min=0, help="Skip connection that the shallow part ends at.", show_default="0")
]
GuidanceStep = Annotated[
    float | None, typer.Option(parser=parse_gate_step, metavar=_STEP, help="Steps with guidance.", show_default="all")
]
AnchorWeight = Annotated[
    float | None,
    typer.Option(help="Weight of the prompt's half in what the gate caches.", show_default="0.5, the paper's"),
]
File = Annotated[
    Path | None, typer.Option("--schedule", help="A schedule file, in the place of options.", show_default="none")
]


def given_options(**options: Any) -> dict[str, Any]:
    """Those options of a schedule that were given, by the names of its fields."""
    return {name: value for name, value in options.items() if value is not None}


def schedule_from(file: Path | None, given: Mapping[str, Any]) -> Schedule:
    """The schedule in `file`, or else that of the options.

    Raises:
        ConfigurationError: both are given, or what is given makes no schedule.
    """
    if file is None:
        return Schedule(**{"gate_step": None, **given})
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigurationError(MSG_FILE_ALONE.format(given=shown))
    return load_schedule(file)


#: Shown first, in this order. Six single objects, two pairs; every combination is held out (a test checks that).
CHOSEN = (
    "a large red circle on a blue background",
    "a large yellow star on a green background",
    "a red square left of a yellow star on a white background",
    "a large purple triangle at the top of a white background",
    "a small orange square on a white background",
    "a large black square on an orange background",
    "a yellow circle above a green triangle on a blue background",
    "a small green star at the right of a blue background",
)

_SEED = 0
_SHARE_OF_PAIRS = 4  # one of so many


def demo_prompts(count: int) -> list[str]:
    """The first `count` prompts; those beyond the chosen ones are drawn from the held-out captions, always the same."""
    rng = np.random.default_rng(_SEED)
    prompts = list(CHOSEN[:count])
    while len(prompts) < count:
        objects = 2 if len(prompts) % _SHARE_OF_PAIRS == 0 else 1
        prompt = caption_of(random_scene(rng, objects, held_out=True))
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts


MSG_NO_PROMPTS = (
    "Give a few prompts like those that the model will get: --prompt (several times), or --prompts FILE, one a line."
)
MSG_BOTH = "Give --prompt or --prompts, not both."
MSG_NOT_READ = "The prompts cannot be read from {given}: {reason}."
MSG_EMPTY = "{given} has no prompts: expected one a line."

Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="What to show; several times.", show_default="a few")
]
Prompts = Annotated[Path | None, typer.Option(help="A text file with a prompt in each line.", show_default="none")]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", min=0, help="Noise for each prompt; several times.", show_default="0")
]


def chosen_prompts(given: list[str] | None, file: Path | None, *, embedded: int | None) -> list[str]:
    """The prompts given, or those in `file`; else so many of the demo's, or (None) an error.

    Raises:
        ConfigurationError: there are none, or two lists of them, or the file cannot be read.
    """
    if given and file is not None:
        raise ConfigurationError(MSG_BOTH)
    if given:
        return given
    if file is None:
        if embedded is None:
            raise ConfigurationError(MSG_NO_PROMPTS)
        return demo_prompts(embedded)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigurationError(MSG_NOT_READ.format(given=file, reason=reason)) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigurationError(MSG_EMPTY.format(given=file))
    return texts
