"""Make and measure the images of a comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import parse_caption
from tgate_compile._errors import UnsupportedModelError, first_line, is_installed
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.attach import attach, denoiser_names
from tgate_compile.pipeline.facts import guidance_of
from tgate_compile.study.bench.measure import (
    Cost,
    Timed,
    cost_of_last,
    peak_memory,
    plain_macs,
    timed_generation,
    twin_of,
)
from tgate_compile.study.bench.methods import (
    COMPARED,
    FEWER_STEPS,
    FOR_TRANSFORMERS,
    FOR_UNETS,
    PLAIN,
    TGATE,
    ComparedMethod,
    caching_methods,
    methods_for,
    steps_at_equal_cost,
    why_not,
)
from tgate_compile.study.comparison.result import ImageFigures, MethodFigures, ModelFigures, Pictures
from tgate_compile.study.evaluation.result import decibels
from tgate_compile.study.tuning.calibrate import calibrate_mag_cache, calibrate_tea_cache
from tgate_compile.study.tuning.measure import relative_distances
from tgate_compile.study.tuning.recorder import Convergence, Recorder
from tgate_compile.study.tuning.request import setting_of


def psnr(image: Image, plain: Image) -> float | None:
    """Return the peak signal-to-noise ratio of two 8-bit images in dB; None if they are identical."""
    return decibels(float(np.mean((_pixels(image) - _pixels(plain)) ** 2)))


def ssim(image: Image, plain: Image) -> float | None:
    """Return the structural similarity of two images, 1 if identical; None if torchmetrics is not installed."""
    if not is_installed("torchmetrics"):
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    one, other = (torch.from_numpy(_pixels(each)).permute(2, 0, 1)[None] for each in (image, plain))
    return float(structural_similarity_index_measure(one, other, data_range=1.0))  # type: ignore[arg-type]


class Judge:
    """Judge whether images of the embedded models show everything in their captions."""

    def __init__(self) -> None:
        self._reader = AttributeReader.load()

    def is_right(self, image: Image, caption: str) -> bool | None:
        """Return whether `image` shows everything in `caption`; None if the caption or image size is unsupported."""
        try:
            parse_caption(caption)
        except ValueError:
            return None
        return self._reader.score([image], [caption])["all"] == 1.0 if image.size == (64, 64) else None


def _pixels(image: Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the pixels of `image`, [height, width, 3], in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


logger = logging.getLogger(__name__)

#: Called before each generation with the number done, the expected total, and a description of the next one.
Progress = Callable[[int, int, str], None]

#: Minimum number of timed runs of each method.
_LEAST_RUNS = 3


@dataclass(frozen=True)
class Task:
    """The images that every method makes.

    Attributes:
        prompts: prompts, one image each.
        seeds: seed of the noise for each prompt.
        steps: number of denoising steps.
        gate: first step in which T-GATE reuses outputs, and in which guidance is off.
        call: further arguments of the pipeline's call.
        backend: backend of the optimized pipelines.
        methods: the keys of the methods, of those in `COMPARED`; empty for those that suit the model.
        more: further methods.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    gate: int
    call: Mapping[str, Any]
    backend: str = "eager"
    methods: tuple[str, ...] = ()
    more: tuple[ComparedMethod, ...] = ()

    def call_of(self, prompt: int, steps: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for one prompt."""
        return {**self.call, "prompt": self.prompts[prompt], "num_inference_steps": steps}


@dataclass
class _Runner:
    """The state of a method during the comparison."""

    method: ComparedMethod
    pipe: Any
    steps: int
    first: float
    strip: str
    cost: Cost | None
    macs: float | None
    peak: int | None = None
    runs: list[Timed] = field(default_factory=list)
    of_prompts: list[float] = field(default_factory=list)  # the operations of each prompt's image, if they differ

    @property
    def is_decided(self) -> bool:
        """Whether the method decides at run time, so that its operations depend on the prompt."""
        return self.method.schedule is not None and self.method.schedule.rule is not None


def compare_model(
    name: str, pipe: DiffusionPipeline, task: Task, *, judged: bool, progress: Progress | None = None
) -> tuple[ModelFigures, Pictures]:
    """Run every method on twins of the plain pipeline `pipe`, which itself is not changed.

    Args:
        name: name of the model for people.
        pipe: the pipeline.
        task: the images to make.
        judged: whether the model is an embedded one, whose images can be judged.
        progress: see `Progress`.

    Raises:
        UnsupportedModelError: the pipeline does not make images.
    """
    return _Comparing(name, pipe, task, Judge() if judged else None, progress).run()


class _Comparing:
    def __init__(
        self, name: str, pipe: DiffusionPipeline, task: Task, judge: Judge | None, progress: Progress | None
    ) -> None:
        self._name = name
        self._pipe = pipe
        self._task = task
        self._judge = judge
        self._progress = progress
        self._denoisers = {name: getattr(pipe, name) for name in denoiser_names(pipe)}
        self._methods = _methods_of(task, next(iter(self._denoisers.values())))
        self._why_not: dict[str, str] = {}
        self._done = 0
        # All prompts, repeated if there are few, because a single time cannot be checked for reliability.
        count = len(task.prompts)
        self._rounds = count * -(-_LEAST_RUNS // count)

    def run(self) -> tuple[ModelFigures, Pictures]:
        task = self._task
        plain, recorder, guided = self._prepare_plain()
        runners = [plain, *self._prepare_optimized(recorder.rows, plain, guided=guided)]
        self._add_fewer_steps(runners, plain)
        for runner in runners:
            runner.peak = self._peak(runner)
        for index in range(self._rounds):
            # The order changes in each round, so that a busy moment does not affect one method alone.
            for turn in range(len(runners)):
                runner = runners[(index + turn) % len(runners)]
                prompt = index % len(task.prompts)
                runner.runs.append(self._generate(runner.pipe, runner.method, prompt, runner.steps))
                if runner.is_decided and index < len(task.prompts):
                    runner.of_prompts.append(cost_of_last(runner.pipe).macs)
        by_key = {runner.method.key: runner for runner in runners}
        figures = ModelFigures(
            name=self._name,
            setting=setting_of(self._pipe, self._denoisers)
            | {"guidance scale": f"{task.call.get('guidance_scale', '')}", "backend": task.backend},
            steps=task.steps,
            gate=task.gate,
            guided=guided,
            parameters=sum(p.numel() for denoiser in self._denoisers.values() for p in denoiser.parameters()),
            prompts=task.prompts,
            seeds=task.seeds,
            convergence=Convergence.of(recorder.changes).mean,
            methods=tuple(
                self._figures(by_key[method.key], plain) if method.key in by_key else self._absent(method)
                for method in self._methods
            ),
        )
        return figures, {
            key: [run.output[0] for run in runner.runs[: len(task.prompts)]] for key, runner in by_key.items()
        }

    def _prepare_plain(self) -> tuple[_Runner, Recorder, bool]:
        """Prepare the plain pipeline, and record its first call, which is slower than the others anyway."""
        pipe = twin_of(self._pipe)
        call = self._task.call_of(0, self._task.steps)
        recorder = Recorder(pipe, guidance_of(pipe, call))
        with recorder.recording({name: getattr(pipe, name) for name in self._denoisers}):
            first = self._generate(pipe, self._methods[0], 0, self._task.steps)
        self._check_images(first.output)
        guided = guidance_of(pipe, call)()
        strip = ("F" if guided else "f") * self._task.steps
        return _Runner(self._methods[0], pipe, self._task.steps, first.seconds, strip, None, None), recorder, guided

    def _check_images(self, output: Any) -> None:
        if not isinstance(output, list) or not output or not isinstance(output[0], Image):
            given = f"a {type(output).__name__}"
            raise UnsupportedModelError(
                f"Comparisons need images, but {type(self._pipe).__name__} returns {given}. Use `tune`, which measures "
                "latents."
            )

    def _prepare_optimized(self, rows: Mapping[str, int], plain: _Runner, *, guided: bool) -> list[_Runner]:
        task = self._task
        runners = []
        for method in self._methods:
            if method.schedule is None and not method.calibrated:
                continue
            try:
                pipe = twin_of(self._pipe)
                if method.calibrated:
                    self._methods, method = self._calibrated(method, pipe)
                why = why_not(method, self._methods, self._denoisers, steps=task.steps, guided=guided)
                if why is not None:
                    self._why_not[method.key] = why
                    continue
                assert method.schedule is not None
                attach(pipe, dict.fromkeys(denoiser_names(pipe), method.schedule), backend=task.backend)
                first = self._generate(pipe, method, 0, task.steps)
            except Exception as error:  # report the error on the page, and run the other methods
                logger.info("%s on %s failed", method.title, self._name, exc_info=True)
                self._why_not[method.key] = f"{first_line(error, named=True)}."
                continue
            cost = cost_of_last(pipe)
            plain.macs = plain_macs(pipe, rows)
            runners.append(_Runner(method, pipe, task.steps, first.seconds, cost.strip, cost, cost.macs))
        return runners

    def _calibrated(
        self, method: ComparedMethod, pipe: DiffusionPipeline
    ) -> tuple[tuple[ComparedMethod, ...], ComparedMethod]:
        """Return the methods with the schedule of one of them measured on `pipe`, and that method.

        The prompts are those of the comparison, with other noise.
        """
        task = self._task
        if self._progress is not None:
            self._progress(self._done, self._total, f"{self._name}: calibration of {method.title}")
        seeds = (max(task.seeds) + 1,)
        common: dict[str, Any] = {"num_inference_steps": task.steps, "seeds": seeds, "call": task.call}
        schedule = Schedule.of(
            calibrate_tea_cache(pipe, task.prompts[:4], **common)
            if method.key == "teacache"
            else replace(calibrate_mag_cache(pipe, task.prompts[:1], **common), threshold=0.12, forecast=1)
        )
        measured = replace(method, schedule=schedule)
        return tuple(measured if each is method else each for each in self._methods), measured

    def _add_fewer_steps(self, runners: list[_Runner], plain: _Runner) -> None:
        method = next((method for method in self._methods if method.key == FEWER_STEPS), None)
        if method is None:
            return
        tgate = next((runner for runner in runners if runner.method.key == TGATE), None)
        share = None if tgate is None or tgate.macs is None or not plain.macs else tgate.macs / plain.macs
        if all(each.key != TGATE for each in self._methods):
            share = 0.5
        steps, why = steps_at_equal_cost(self._task.steps, share)
        if why is not None:
            self._why_not[FEWER_STEPS] = why
            return
        macs = None if plain.macs is None else plain.macs * steps / self._task.steps
        runners.append(_Runner(method, plain.pipe, steps, plain.first, plain.strip[:steps], None, macs))

    @property
    def _total(self) -> int:
        return len(self._methods) * (self._rounds + 2)

    def _generate(self, pipe: Any, method: ComparedMethod, prompt: int, steps: int) -> Timed:
        if self._progress is not None:
            self._progress(self._done, self._total, f"{self._name}: {method.title}")
        self._done += 1
        return timed_generation(pipe, self._task.call_of(prompt, steps), self._task.seeds[prompt])

    def _peak(self, runner: _Runner) -> int | None:
        """Return the peak memory of an additional generation, which is not timed."""
        with peak_memory(self._pipe.device) as peak:
            self._generate(runner.pipe, runner.method, 0, runner.steps)
        return peak.total if self._pipe.device.type == "cuda" else peak.added

    def _figures(self, runner: _Runner, plain: _Runner) -> MethodFigures:
        method, runs = runner.method, runner.runs
        return MethodFigures(
            key=method.key,
            title=method.title,
            schedule="" if method.schedule is None else str(method.schedule),
            steps=runner.steps,
            strip=runner.strip,
            first_call_seconds=runner.first,
            seconds=median(run.seconds for run in runs),
            step_seconds=tuple(median(step) for step in zip(*(run.steps for run in runs), strict=True)),
            macs=mean(runner.of_prompts) if runner.of_prompts else runner.macs,
            parameters_at_end=None if runner.cost is None else runner.cost.parameters_at_end,
            cache_bytes=0 if runner.cost is None else runner.cost.cache_bytes,
            peak_bytes=runner.peak,
            images=tuple(
                self._image(run, of_plain, prompt)
                for run, of_plain, prompt in zip(runs, plain.runs, self._task.prompts, strict=False)
            ),
            run_seconds=tuple(run.seconds for run in runs),
        )

    def _image(self, run: Timed, plain: Timed, prompt: str) -> ImageFigures:
        image, reference = run.output[0], plain.output[0]
        return ImageFigures(
            seconds=run.seconds,
            psnr=psnr(image, reference),
            ssim=ssim(image, reference),
            drift=relative_distances(run.latents, plain.latents)[0],
            right=None if self._judge is None else self._judge.is_right(image, prompt),
        )

    def _absent(self, method: ComparedMethod) -> MethodFigures:
        words = "" if method.schedule is None else str(method.schedule)
        return MethodFigures(
            method.key, method.title, words, self._task.steps, why_not=self._why_not.get(method.key, "")
        )


def _methods_of(task: Task, denoiser: torch.nn.Module) -> tuple[ComparedMethod, ...]:
    """Return the methods of a comparison, in the order of its tables, the plain pipeline first."""
    suitable = FOR_UNETS if hasattr(denoiser, "up_blocks") else FOR_TRANSFORMERS
    chosen = {PLAIN, *(task.methods or suitable)}
    basic = methods_for(task.gate)
    known = {method.key: method for method in (*basic, *caching_methods(task.gate, denoiser))}
    listed = [known[key] for key in (PLAIN, *COMPARED) if key in chosen and key in known]
    *others, last = listed
    return (*others, *task.more, last) if last.key == FEWER_STEPS else (*listed, *task.more)


def seeds_for(prompts: Sequence[str], first: int) -> tuple[int, ...]:
    """Return consecutive seeds for the prompts, starting with `first`."""
    return tuple(first + index for index in range(len(prompts)))
