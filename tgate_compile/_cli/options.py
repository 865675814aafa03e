"""Options that commands share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tgate_compile._cli.console import ERR
from tgate_compile._demo import DEMO_VARIANTS
from tgate_compile._errors import BackendName, ConfigurationError
from tgate_compile._errors import Precision as PrecisionName
from tgate_compile._runtimes import BACKENDS, check_backend_installed
from tgate_compile.methods.method import checked_gate_step

if TYPE_CHECKING:
    from tgate_compile._cli.loading import Loaded

#: The embedded model that is used without --model, and the prefix of the names of embedded models.
DEFAULT_EMBEDDED = "sd"
EMBEDDED_PREFIX = "embedded:"
EMBEDDED_NAMES = ", ".join(f"{EMBEDDED_PREFIX}{name}" for name in DEMO_VARIANTS)

#: The sections of `--help`.
MODEL, IMAGE, SCHEDULE, OUTPUT = "Model", "Image", "Schedule", "Output"

MSG_SIZE = "{given} is not a multiple of 8, which the models need. Use {below} or {above}."
MSG_AUTO = (
    "auto measures schedules on a model, but this command takes only a number (10) or a fraction (0.4). "
    "Find a gate step with `tgate-compile tune --out schedule.json`."
)

MSG_CONFIG_ALONE = (
    "--model-config is the configuration for a --model that is a single-file checkpoint, but {given} is not one. Leave "
    "it out."
)


class Dtype(str, Enum):
    """Number formats, under the usual short names."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


#: The backends of `optimize`.
Backend = Enum("Backend", {name: name for name in (*BACKENDS, "auto")}, type=str)  # type: ignore[misc]
EAGER = Backend("eager")


#: The dtypes that graphs compute in.
Precision = Enum("Precision", {name: name for name in get_args(PrecisionName)}, type=str)  # type: ignore[misc]
OWN = Precision("auto")


class Keep(str, Enum):
    """The guidance half that is kept after the gate."""

    uncond = "uncond"
    cond = "cond"


def embedded_name(model: str | None) -> str | None:
    """Return the name of the embedded pipeline; None if `model` is a folder, a file or a hub id."""
    if model is None:
        return DEFAULT_EMBEDDED
    if model in DEMO_VARIANTS and not Path(model).exists():  # hub ids have an owner, as in owner/name
        return model
    return model.removeprefix(EMBEDDED_PREFIX) if model.startswith(EMBEDDED_PREFIX) else None


def parse_gate_step(text: object) -> float:
    """Parse a gate step: an int is a number of steps, a float a fraction of them."""
    given = str(text)
    if given == "auto":
        raise typer.BadParameter(MSG_AUTO)
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
    """Check a height or width, which must be a multiple of 8, or None for the model's own."""
    if given is not None and given % 8:
        below = given - given % 8
        raise typer.BadParameter(MSG_SIZE.format(given=given, below=below, above=below + 8))
    return given


def check_backend(backend: Backend) -> BackendName:
    """Return the name of `backend`.

    Raises:
        ConfigurationError: its packages are not installed.
    """
    name: BackendName = backend.value
    check_backend_installed(name)
    return name


GATE_HELP = "Steps to run in full: a number (10), or a fraction of the steps (0.4)."

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder with a diffusers pipeline, a .safetensors file, a hub id, or an embedded model: "
        f"{EMBEDDED_NAMES}.",
        show_default="embedded:sd",
        rich_help_panel=MODEL,
    ),
]
GateStep = Annotated[
    float | None,
    typer.Option(
        "--gate-step",
        "-g",
        parser=parse_gate_step,
        metavar="N",
        help=GATE_HELP,
        show_default="the model's",
        rich_help_panel=SCHEDULE,
    ),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps.", show_default="the model's", rich_help_panel=IMAGE)
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="Guidance scale; up to 1 means no guidance.", show_default="the model's", rich_help_panel=IMAGE
    ),
]
Side = Annotated[
    int | None,
    typer.Option(
        min=8,
        callback=check_size,
        help="Size in pixels, a multiple of 8.",
        show_default="the model's",
        rich_help_panel=IMAGE,
    ),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What the image should not show.", rich_help_panel=IMAGE)]
NumImages = Annotated[
    int, typer.Option("--num-images", "-n", min=1, help="Images per prompt, in one batch.", rich_help_panel=IMAGE)
]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of the first image; the others use the next ones.", rich_help_panel=IMAGE)
]
RandomSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Seed of the first image; the others use the next ones.",
        show_default="random",
        rich_help_panel=IMAGE,
    ),
]
_BACKEND_HELP = (
    f"Backend for the graphs: {', '.join(each.value for each in Backend)}. auto uses the fastest one installed; eager "
    "starts at once."
)
BackendOption = Annotated[Backend, typer.Option("--backend", metavar="NAME", help=_BACKEND_HELP)]
BackendForOne = Annotated[
    Backend | None,
    typer.Option("--backend", metavar="NAME", help=_BACKEND_HELP, show_default="auto; eager for the embedded models"),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        metavar="NAME",
        help=f"Compute in {', '.join(each.value for each in Precision if each.value != 'auto')}; auto is the dtype of "
        "the model. bfloat16 is fast on CPUs with AVX512-BF16 or AMX.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options for loading a model. A command's argument that is annotated with this class becomes these options."""

    model_config: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a pipeline whose configuration fits a single-file checkpoint.",
            show_default="found on the hub",
            rich_help_panel=MODEL,
        ),
    ] = None
    unet: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of another UNet for the pipeline, e.g. latent-consistency/lcm-sdxl.",
            rich_help_panel=MODEL,
        ),
    ] = None
    lora: Annotated[
        str | None,
        typer.Option(help="LoRA weights: a file, a folder or a hub id. Needs peft.", rich_help_panel=MODEL),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Use this scheduler: ddim, dpm++, euler, lcm, ...",
            show_default="the model's",
            rich_help_panel=MODEL,
        ),
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda (or cuda:1, ...) or mps.", rich_help_panel=MODEL)] = (
        "auto"
    )
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="fp32, fp16, bf16, or auto: fp32 on a CPU, fp16 or bf16 on a GPU.",
            rich_help_panel=MODEL,
        ),
    ] = Dtype.auto

    def load(self, model: str | None) -> Loaded:
        """Load `model` (None: the embedded pipeline), with a status display.

        Raises:
            ConfigurationError: the model, device, scheduler or LoRA cannot be loaded.
        """
        with ERR.status("Loading the model"):
            from tgate_compile._cli.loading import load  # PyTorch and diffusers take seconds

            return load(model, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Return the options as arguments of `load`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LoadingOnCpu(Loading):
    """The same options, with the CPU as the default device."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda (or cuda:1, ...) or mps.", rich_help_panel=MODEL)] = "cpu"


@dataclass(frozen=True, kw_only=True)
class Image:
    """Options for images. A command's argument that is annotated with this class becomes these options."""

    steps: Steps = None
    guidance: Guidance = None
    height: Side = None
    width: Side = None

    @property
    def size(self) -> dict[str, int]:
        """The height and width, if given."""
        given = {"height": self.height, "width": self.width}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Family:
    """The default settings of a family of checkpoints. A row matches if all conditions that it has are met.

    Attributes:
        name: name for people.
        pipelines: condition: the class name of the pipeline is one of these.
        schedulers: condition: the class name of its scheduler is one of these.
        guidance_embedded: condition: the denoiser takes the guidance scale as an input (a distilled model).
        steps: denoising steps.
        guidance: guidance scale.
        gate_step: the paper's gate step for this family, out of `steps`.
        scheduler: replaces a scheduler in `replaced`; None keeps the checkpoint's own.
        replaced: schedulers that checkpoints of the family have only because of their age or by convention.
        gpu_dtype: the number format on a GPU.
        scale: the argument of the pipeline's call that is the guidance scale.
        call: further arguments of every call.
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
    scale: str = "guidance_scale"
    call: tuple[tuple[str, Any], ...] = ()


_SD = frozenset({"StableDiffusionPipeline"})
_SDXL = frozenset({"StableDiffusionXLPipeline"})
_PIXART = frozenset({"PixArtAlphaPipeline", "PixArtSigmaPipeline"})
_FLUX = frozenset({"FluxPipeline"})
_LCM = frozenset({"LCMScheduler"})
_EDM = frozenset({"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"})
_ANY_OTHER = frozenset(
    {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"}
    | {"PNDMScheduler", "UniPCMultistepScheduler"}
)
# The authors' main.py also replaces the schedulers of SD and SDXL with DPM-Solver++.
_SLOWER = frozenset({"DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"})

#: The embedded pipeline has a separate row, with the settings at which it was measured.
EMBEDDED = Family("embedded", 25, 5.0, 10)

#: The first row that matches is used. Gates: tables 1 and 3 of arXiv 2404.02747, and the authors' README. Models with
#: joint attention have a row only if their settings are not the defaults of their pipeline's call (`_own_defaults`).
FAMILIES: tuple[Family, ...] = (
    Family("FLUX.1 schnell", 4, 0.0, 1, pipelines=_FLUX, guidance_embedded=False, gpu_dtype="bf16"),
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

#: Short names of schedulers: the diffusers class, and settings that override the checkpoint's configuration.
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
    """Return the family of a loaded pipeline."""
    from tgate_compile.engine.families import has_joint_attention  # PyTorch takes seconds

    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    is_joint = has_joint_attention(type(denoiser))
    config = getattr(denoiser, "config", None)
    embedded = bool(getattr(config, "time_cond_proj_dim", None) or getattr(config, "guidance_embeds", None))
    for family in FAMILIES:
        if is_joint and family.pipelines is None:
            continue  # these have the paper's settings, which are those of models with cross-attention
        if (
            (family.pipelines is None or type(pipe).__name__ in family.pipelines)
            and (family.schedulers is None or type(pipe.scheduler).__name__ in family.schedulers)
            and (family.guidance_embedded is None or family.guidance_embedded == embedded)
        ):
            return family
    assert is_joint, "the last row matches everything else"
    return _own_defaults(type(pipe))


#: The share of the steps before the gate, for models with joint attention: about that of the paper's models.
_JOINT_GATE = 0.4


def _own_defaults(pipeline: type) -> Family:
    """Return a family with the steps and the guidance scale that are the defaults of a pipeline's call.

    Where `true_cfg_scale` is on by default (Qwen-Image), it is the guidance scale, and needs a negative prompt.
    """
    given = {name: parameter.default for name, parameter in inspect.signature(pipeline.__call__).parameters.items()}
    numbers = {name: default for name, default in given.items() if isinstance(default, (int, float))}
    steps = int(numbers.get("num_inference_steps", FAMILIES[-1].steps))
    is_true = numbers.get("true_cfg_scale", 0) > 1
    scale = "true_cfg_scale" if is_true else "guidance_scale"
    guidance = float(numbers.get(scale, FAMILIES[-1].guidance))
    call = (("negative_prompt", " "),) if is_true else ()
    name, gate = pipeline.__name__.removesuffix("Pipeline"), max(1, round(_JOINT_GATE * steps))
    return Family(name, steps, guidance, gate, gpu_dtype="bf16", scale=scale, call=call)


def gpu_dtype(pipeline_class: str) -> str:
    """Return the number format for a pipeline class on a GPU, which must be known before anything is loaded."""
    known = next((f.gpu_dtype for f in FAMILIES if f.pipelines and pipeline_class in f.pipelines), None)
    return known or ("bf16" if _has_joint_attention(pipeline_class) else "fp16")


def _has_joint_attention(pipeline_class: str) -> bool:
    """Return whether the pipeline of diffusers with this name has a denoiser with joint attention."""
    import diffusers

    from tgate_compile.engine.unsupported import JOINT_ATTENTION

    kind = getattr(diffusers, pipeline_class, None)
    parameter = inspect.signature(kind).parameters.get("transformer") if isinstance(kind, type) else None
    annotation = getattr(parameter, "annotation", "")
    return str(getattr(annotation, "__name__", annotation)) in JOINT_ATTENTION


MSG_NO_PROMPTS = (
    "Give a few prompts that are typical of the model's use: --prompt (repeatable), or --prompts FILE, one per line."
)
MSG_BOTH = "Give --prompt or --prompts, not both."
MSG_NOT_READ = "The prompts cannot be read from {given}: {reason}."
MSG_EMPTY = "{given} has no prompts: expected one per line."

Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What to show; repeatable.",
        show_default="a few",
        rich_help_panel=IMAGE,
    ),
]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A text file with one prompt per line.", rich_help_panel=IMAGE)
]
Count = Annotated[
    int | None, typer.Option(min=1, help="Number of prompts to use.", show_default="all", rich_help_panel=IMAGE)
]


def parse_seeds(text: object) -> list[int]:
    """Parse seeds such as `0,1,2`."""
    words = str(text).split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise typer.BadParameter(f"expected numbers separated by commas (0,1,2), got {str(text)!r}.")
    return [int(word) for word in words]


Seeds = Annotated[
    Any,
    typer.Option(
        "--seeds",
        parser=parse_seeds,
        metavar="N,N,...",
        help="Run every prompt with each of these seeds.",
        show_default="0",
        rich_help_panel=IMAGE,
    ),
]


def chosen_prompts(given: list[str] | None, file: Path | None, count: int | None, *, embedded: int | None) -> list[str]:
    """Return the prompts given, those in `file`, or the demo's.

    Args:
        given: the prompts.
        file: a text file with one prompt per line.
        count: number of prompts to use; None: all, or `embedded` of the demo's.
        embedded: number of the demo's prompts to use without prompts and file; None: raise an error instead.

    Raises:
        ConfigurationError: no prompts are given, or both prompts and a file, or the file cannot be read.
    """
    if given and file is not None:
        raise ConfigurationError(MSG_BOTH)
    if given:
        return given[:count]
    if file is None:
        if embedded is None:
            raise ConfigurationError(MSG_NO_PROMPTS)

        from tgate_compile._cli.loading import demo_prompts  # PyTorch takes seconds

        return demo_prompts(embedded if count is None else count)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigurationError(MSG_NOT_READ.format(given=file, reason=reason)) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigurationError(MSG_EMPTY.format(given=file))
    return texts[:count]
