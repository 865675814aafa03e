"""The results of a comparison: plain data and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any, TypeAlias

from tgate_compile.study.bench.result import MOST_GAIN, MOST_GAIN_OF_BACKEND, spread_of, why_unreliable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "tgate_compile.comparison"
VERSION = 1


@dataclass(frozen=True)
class ImageFigures:
    """The measurements of one image.

    Attributes:
        seconds: time of the generation.
        psnr: PSNR relative to the plain image, in dB; None if the images are identical.
        ssim: SSIM relative to the plain image; None if torchmetrics is not installed.
        drift: distance of the final latents from the plain ones, relative to their norm.
        right: whether the image shows everything in its caption, according to the attribute reader of the embedded
            models; None for other models.
    """

    seconds: float
    psnr: float | None
    ssim: float | None
    drift: float
    right: bool | None


@dataclass(frozen=True)
class MethodFigures:
    """The measurements of one method on one model.

    Attributes:
        key: identifier for programs.
        title: name for people.
        schedule: description of the schedule; empty for the plain pipeline.
        steps: number of denoising steps.
        strip: one character per step.
        why_not: why the method did not run; the attributes below are then empty.
        first_call_seconds: time of the first call, which captures graphs.
        seconds: median time of an image.
        step_seconds: median time of each denoiser call.
        macs: multiply-accumulates of an image in linear and convolution layers of the denoiser.
        parameters_at_end: parameters that the steps after the gate need.
        cache_bytes: largest total size of the values kept from one step to the next.
        peak_bytes: peak memory: of torch's allocator on a GPU, increase of the process's memory on a CPU.
        images: measurements of the images, one per prompt.
        run_seconds: times of all runs, whose median is `seconds`; empty in results of older versions.
    """

    key: str
    title: str
    schedule: str
    steps: int
    strip: str = ""
    why_not: str | None = None
    first_call_seconds: float | None = None
    seconds: float | None = None
    step_seconds: tuple[float, ...] = ()
    macs: float | None = None
    parameters_at_end: int | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    images: tuple[ImageFigures, ...] = ()
    run_seconds: tuple[float, ...] = ()

    @property
    def psnr(self) -> float | None:
        """The mean PSNR of the images that differ from the plain ones."""
        return _mean([image.psnr for image in self.images])

    @property
    def ssim(self) -> float | None:
        """The mean SSIM of the images."""
        return _mean([image.ssim for image in self.images])

    @property
    def drift(self) -> float | None:
        """The mean drift of the images."""
        return _mean([image.drift for image in self.images])

    @property
    def right(self) -> int | None:
        """The number of images that show everything in their captions; None if they cannot be judged."""
        judged = [image.right for image in self.images if image.right is not None]
        return sum(judged) if judged else None


@dataclass(frozen=True)
class ModelFigures:
    """The measurements of one model.

    Attributes:
        name: name of the model, as given by the user.
        error: why the model could not be measured; the attributes below are then empty.
        setting: classes, dtype, versions and options, by name.
        steps: number of denoising steps.
        gate: first gated step.
        guided: whether guidance is on, which doubles the batch.
        parameters: number of parameters of the denoiser.
        prompts: the prompts.
        seeds: seed of the noise for each prompt.
        convergence: relative change of the cross-attentions between consecutive steps of the plain pipeline.
        methods: measurements of the methods, the plain pipeline first.
    """

    name: str
    error: str | None = None
    setting: Mapping[str, str] = field(default_factory=dict)
    steps: int = 0
    gate: int = 0
    guided: bool = False
    parameters: int = 0
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    convergence: tuple[float, ...] = ()
    methods: tuple[MethodFigures, ...] = ()

    @property
    def plain(self) -> MethodFigures:
        """The measurements of the plain pipeline."""
        return self.methods[0]

    def speedup(self, method: MethodFigures) -> float | None:
        """Return the time of the plain pipeline divided by the time of `method`."""
        return None if not method.seconds or not self.plain.seconds else self.plain.seconds / method.seconds

    def cost(self, method: MethodFigures) -> float | None:
        """Return the operations of `method` divided by those of the plain pipeline."""
        return None if method.macs is None or not self.plain.macs else method.macs / self.plain.macs

    def why_unreliable(self, method: MethodFigures) -> str | None:
        """Return why the time and speedup of `method` are unreliable; None if they are reliable."""
        if method.seconds is None:
            return None
        return why_unreliable(
            method.run_seconds,
            self.plain.run_seconds,
            speedup=self.speedup(method),
            cost=self.cost(method),
            most_gain=MOST_GAIN if self.setting.get("backend") == "eager" else MOST_GAIN_OF_BACKEND,
        )


#: One image per prompt, by method.
Pictures: TypeAlias = "Mapping[str, Sequence[Image]]"


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
        command: command line that made the comparison.
        machine: hardware and versions, by name.
        models: measurements of each model.
        pictures: images, by model.
    """

    command: str
    machine: Mapping[str, str]
    models: tuple[ModelFigures, ...]
    pictures: Mapping[str, Pictures]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the pictures."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "command": self.command,
            "machine": dict(self.machine),
            "models": [_with_means(model) for model in self.models],
        }


def _with_means(model: ModelFigures) -> dict[str, Any]:
    data = asdict(model)
    for own, method in zip(data["methods"], model.methods, strict=True):
        means = {"psnr": method.psnr, "ssim": method.ssim, "drift": method.drift, "right": method.right}
        unreliable = model.why_unreliable(method)
        speedup = model.speedup(method) if unreliable is None else None
        own |= means | {"speedup": speedup, "cost": model.cost(method)}
        own |= {"spread": spread_of(method.run_seconds), "unreliable": unreliable}
    return data


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
