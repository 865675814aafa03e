"""What a comparison found: plain data, and the images beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any, TypeAlias

from tgate_compile.study.timings import MOST_GAIN, MOST_GAIN_OF_BACKEND, spread_of, why_unreliable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "tgate_compile.comparison"
VERSION = 1


@dataclass(frozen=True)
class ImageFigures:
    """Of one image.

    Attributes:
        seconds: that it took.
        psnr: to the plain image, in dB; None where the two are identical.
        ssim: to the plain image; None if torchmetrics is not installed.
        drift: of the final latents from the plain ones, relative to their norm.
        right: whether it shows all that its caption says, as the embedded models' judge sees it; None for others.
    """

    seconds: float
    psnr: float | None
    ssim: float | None
    drift: float
    right: bool | None


@dataclass(frozen=True)
class MethodFigures:
    """Of one method on one model.

    Attributes:
        key: for programs.
        title: for people.
        schedule: in words; empty for the plain pipeline.
        steps: denoising steps.
        strip: one character a step.
        why_not: why it did not run; everything below is then empty.
        first_call_seconds: of the first call, which captures graphs.
        seconds: of an image: the median.
        step_seconds: of each denoiser call, the medians.
        macs: multiply-accumulates of an image in linear and convolution layers of the denoiser.
        parameters_at_end: that the steps after the gate need.
        cache_bytes: the most that is kept from one step to the next.
        peak_bytes: of memory: torch's own on a GPU, what comes on top of the process's on a CPU.
        images: one for each prompt.
        run_seconds: of each run that `seconds` is the median of; empty in results of older versions.
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
        """The mean over the images that differ from plain's."""
        return _mean([image.psnr for image in self.images])

    @property
    def ssim(self) -> float | None:
        """The mean."""
        return _mean([image.ssim for image in self.images])

    @property
    def drift(self) -> float | None:
        """The mean."""
        return _mean([image.drift for image in self.images])

    @property
    def right(self) -> int | None:
        """How many images show what their captions say; None if that cannot be told."""
        judged = [image.right for image in self.images if image.right is not None]
        return sum(judged) if judged else None


@dataclass(frozen=True)
class ModelFigures:
    """Of one model.

    Attributes:
        name: as asked for.
        error: why there is nothing about it; everything below is then empty.
        setting: what it is and how it ran: words by name.
        steps: denoising steps.
        gate: the first gated step.
        guided: whether guidance runs, at twice the batch.
        parameters: of the denoiser.
        prompts: what was to be shown.
        seeds: of each prompt's noise.
        convergence: how much the cross-attentions change from each step to the next in the plain pipeline, relative.
        methods: the plain one first.
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
        """The plain pipeline's figures."""
        return self.methods[0]

    def speedup(self, method: MethodFigures) -> float | None:
        """Plain's time over the method's."""
        return None if not method.seconds or not self.plain.seconds else self.plain.seconds / method.seconds

    def cost(self, method: MethodFigures) -> float | None:
        """The method's operations over plain's."""
        return None if method.macs is None or not self.plain.macs else method.macs / self.plain.macs

    def why_unreliable(self, method: MethodFigures) -> str | None:
        """Why the method's time, and its speed-up, should not be believed; None if nothing speaks against them."""
        if method.seconds is None:
            return None
        return why_unreliable(
            method.run_seconds,
            self.plain.run_seconds,
            speedup=self.speedup(method),
            cost=self.cost(method),
            most_gain=MOST_GAIN if self.setting.get("backend") == "eager" else MOST_GAIN_OF_BACKEND,
        )


#: By method, an image for each prompt.
Pictures: TypeAlias = "Mapping[str, Sequence[Image]]"


@dataclass(frozen=True)
class Comparison:
    """Everything that was found.

    Attributes:
        command: that made it.
        machine: what it ran on: words by name.
        models: figures.
        pictures: by model.
    """

    command: str
    machine: Mapping[str, str]
    models: tuple[ModelFigures, ...]
    pictures: Mapping[str, Pictures]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON, without the pictures."""
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
