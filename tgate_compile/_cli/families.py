"""Sensible defaults per model family: rows of data, recognised from the loaded pipeline and not from a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
