"""Run a bundle as a text-to-image program."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from tgate_compile._errors import BundleError, ConfigurationError, check_installed
from tgate_compile.bundle.manifest import Components, Manifest, Source
from tgate_compile.bundle.manifest import Scheduler as SchedulerSpec
from tgate_compile.bundle.plan_rows import plan_for, warn_of_alternation
from tgate_compile.bundle.read_manifest import read_manifest
from tgate_compile.methods.method import Half
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import read_schedule
from tgate_compile.runtime._ddim import Ddim
from tgate_compile.runtime._denoiser import Conditions, Denoiser, Graphs
from tgate_compile.runtime._dpm_plus_plus import DpmPlusPlus
from tgate_compile.runtime._euler import Euler, FlowMatchEuler
from tgate_compile.runtime._noise import NAMES, Array
from tgate_compile.runtime._pndm import Pndm
from tgate_compile.runtime._session import Settings
from tgate_compile.runtime._text_and_images import Decoder, Encoded, Prompts, pil_images

if TYPE_CHECKING:
    from PIL.Image import Image


class Scheduler(Protocol):
    """The scheduler of one generation, whose methods are called for each denoiser call in order.

    There is one call for each of `timesteps`. The first `warm_up` calls are additional and belong to the first step.
    """

    timesteps: Any
    initial_sigma: float
    warm_up: int

    def model_input(self, latents: Array, step: int) -> Array: ...

    def step(self, prediction: Array, step: int, latents: Array) -> Array: ...


#: The only scheduler of models trained by flow matching, which has other noise levels than the others.
FLOW_MATCHING = "FlowMatchEulerDiscreteScheduler"

_CLASSES: Mapping[str, Callable[[Mapping[str, Any], int], Scheduler]] = {
    "DDIMScheduler": Ddim,
    "EulerDiscreteScheduler": Euler,
    "DPMSolverMultistepScheduler": DpmPlusPlus,
    "PNDMScheduler": Pndm,
    FLOW_MATCHING: FlowMatchEuler,
}


def make_scheduler(spec: SchedulerSpec, name: str | None, steps: int) -> Scheduler:
    """Return the scheduler `name`, or that of the bundle if it is None, for a generation of `steps` steps.

    It has the bundle's configuration. Settings that are missing there because the class is another one have the
    defaults of the class, as with diffusers' `from_config`.

    Raises:
        ConfigurationError: the name, the class, the configuration or the number of steps is not supported.
    """
    if name is not None and name not in NAMES:
        raise ConfigurationError(
            f"scheduler must be one of {', '.join(map(repr, NAMES))}, or None for the bundle's own, but got {name!r}."
        )
    if name is not None and spec.class_name == FLOW_MATCHING:
        raise ConfigurationError(
            f"scheduler={name!r} cannot be used with this bundle, whose model was trained by flow matching and not for "
            f"the noise levels of {NAMES[name]}. Leave scheduler out."
        )
    class_name = spec.class_name if name is None else NAMES[name]
    if class_name not in _CLASSES:
        names = " or ".join(map(repr, NAMES))
        raise ConfigurationError(
            f"The bundle's scheduler is a {class_name}, which this runtime does not support. It supports "
            f"{', '.join(_CLASSES)}; choose one of these with scheduler={names}."
        )
    most = spec.config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not hasattr(steps, "__index__") or not 1 <= steps.__index__() <= most:
        raise ConfigurationError(f"num_inference_steps must be an integer from 1 to {most}, but got {steps!r}.")
    return _CLASSES[class_name](spec.config, steps.__index__())


#: The packages that the runtime needs.
NEEDS = ("onnxruntime", "tokenizers")


@dataclass(frozen=True)
class Step:
    """A completed step.

    Attributes:
        number: the number of the step, from 0.
        steps: the number of steps in the generation.
        graph: the name of the graph that was run.
        letter: the letter of the step's phase, explained in `docs/reference/schedules.md`.
        seconds: the duration of the step, in seconds.
        latents: the latents after the step, [images, channels, h, w].
    """

    number: int
    steps: int
    graph: str
    letter: str
    seconds: float
    latents: Array


class BundlePipeline:
    """A bundle that was exported with `components="all"`, ready to generate images from prompts.

    It needs numpy, ONNX Runtime, pydantic and tokenizers, and Pillow for PIL images, but neither PyTorch nor diffusers.
    Sessions are opened when they are first needed, and stay open. Calls share nothing else, so they can be made from
    several threads at the same time. With `sequential`, the text encoders, each graph and the decoder are closed before
    the next one is opened, and calls are serialized.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        verify: bool = True,
        sequential: bool = False,
    ) -> None:
        """Open the bundle in `folder`, which must stay there while the pipeline is in use.

        Args:
            folder: the folder of the bundle.
            providers: the execution providers of ONNX Runtime; the default is the CPU.
            threads: the number of threads per operator; the default is one for each physical core that the process may
                use, or OMP_NUM_THREADS.
            verify: whether to compare the hashes of all files with the manifest. Otherwise only paths and sizes are
                checked, and no large file is read.
            sequential: save memory by keeping only one graph open at a time, which makes every call slower.

        Raises:
            BundleError: the bundle is damaged, has only the denoiser, or has graphs in another format than ONNX.
            ConfigurationError: an argument is wrong, or a package is missing.
        """
        check_installed(*NEEDS, extra="runtime", what="tgate_compile.runtime")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigurationError(f"threads must be None or a positive integer, but got {threads!r}.")
        self._settings = Settings(tuple(providers or Settings.providers), threads)
        self._settings.check()
        self._folder = Path(os.path.abspath(folder))
        self._manifest = read_manifest(self._folder, hashes=verify)
        if self._manifest.graph_format != "onnx":
            raise BundleError(
                f"The bundle {self._folder} has graphs of the format {self._manifest.graph_format!r}, but this runtime "
                'supports only "onnx".'
            )
        if self._manifest.components is None:
            raise BundleError(
                f"The bundle {self._folder} has only the denoiser, without text encoders and a VAE decoder. Export one "
                'with tgate_compile.export(..., components="all"), or `tgate-compile export --components all`.'
            )
        self._components: Components = self._manifest.components
        self._sequential = sequential
        self._call = threading.Lock() if sequential else nullcontext()
        if sequential:
            warn_of_alternation(self._manifest)
        self._graphs = Graphs(self._manifest, self._folder, self._settings, sequential=sequential)
        self._prompts: Prompts | None = None
        self._decoder: Decoder | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self._manifest

    @property
    def schedule(self) -> Schedule:
        """The schedule of the bundle."""
        return read_schedule(self._manifest.method.schedule)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        latents: Array | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: str | None = None,
        gate_step: int | float | None = None,
        callback: Callable[[Step], None] | None = None,
        output: Literal["pil", "numpy"] = "pil",
    ) -> Image | list[Image] | Array:
        """Generate an image for `prompt`, or a list of images for a list of prompts.

        The defaults are those in the manifest.

        Args:
            prompt: what to show. The bundle must support as many prompts at a time.
            negative_prompt: what not to show: one text for all prompts, or a list with one for each.
            num_inference_steps: the number of denoising steps.
            guidance_scale: the scale of guidance. Values up to 1 disable it, which needs a bundle with such graphs.
            seed: the seed of the first image; each further image has the next one. The noise is generated by numpy, so
                a seed gives other images than in PyTorch. To reproduce those, pass their initial `latents`.
            latents: normal noise, [images, channels, height / scale, width / scale], instead of a seed.
            height: the height of the images in pixels.
            width: the width of the images in pixels.
            scheduler: `"ddim"`, `"euler"`, `"dpm++"` or `"pndm"`, configured like the bundle's own scheduler, which is
                the default.
            gate_step: another gate step than the bundle's.
            callback: called after each step.
            output: `"pil"` for PIL images, or `"numpy"` for a float32 array with values in [0, 1], [height, width, 3],
                or [images, height, width, 3] for a list of prompts.

        Raises:
            ConfigurationError: an argument is wrong.
            BundleError: the bundle does not support this call.
            BackendError: ONNX Runtime fails.
        """
        prompts = _texts(prompt)
        if output not in ("pil", "numpy"):
            raise ConfigurationError(f'output must be "pil" or "numpy", but got {output!r}.')
        steps = self._components.num_inference_steps if num_inference_steps is None else num_inference_steps
        noise_scheduler = make_scheduler(self._manifest.scheduler, scheduler, steps)
        steps = len(noise_scheduler.timesteps) - noise_scheduler.warm_up
        scale = _number(self._components.guidance_scale if guidance_scale is None else guidance_scale)
        plan = plan_for(self._manifest, steps, guided=scale > 1, gate_step=gate_step)
        noise = self._noise(len(prompts), height, width, seed, latents)
        with self._call:
            conditions = self._conditions(prompts, negative_prompt, noise.shape, guided=scale > 1)
            calls = enumerate(noise_scheduler.timesteps)
            times = [(max(call - noise_scheduler.warm_up, 0), timestep.item()) for call, timestep in calls]
            denoiser = Denoiser(self._graphs, self._manifest, self._folder, plan, conditions, times)
            images = self._decoded(self._denoised(denoiser, noise, noise_scheduler, scale, callback))
        if output == "numpy":
            return images[0] if isinstance(prompt, str) else images
        pictures = pil_images(images)
        return pictures[0] if isinstance(prompt, str) else pictures

    @property
    def graphs(self) -> Graphs:
        """The graphs of the denoiser."""
        return self._graphs

    def with_graphs(self, graphs: Graphs) -> BundlePipeline:
        """Return a pipeline that runs the denoiser by `graphs`, and shares the text encoders and the decoder.

        Raises:
            ConfigurationError: this pipeline is sequential, so that only one call at a time can be made.
        """
        if self._sequential:
            raise ConfigurationError("A sequential pipeline makes one call at a time. Leave sequential out.")
        self._open_prompts()
        self._open_decoder()
        other = copy.copy(self)
        other._graphs = graphs
        return other

    def decode(self, latents: Array) -> Array:
        """Return the images of `latents`, [images, height, width, 3], with values in [0, 1]."""
        return self._decoded(latents)

    def close(self) -> None:
        """Close the graphs, the text encoders and the decoder; the next call opens them again."""
        self._prompts = self._decoder = None
        self._graphs.close()

    @property
    def open_graphs(self) -> tuple[str, ...]:
        """The names of the denoiser's graphs that are currently open."""
        return self._graphs.open

    def _denoised(
        self,
        denoiser: Denoiser,
        noise: Array,
        noise_scheduler: Scheduler,
        scale: float,
        callback: Callable[[Step], None] | None,
    ) -> Array:
        denoiser.open_graphs()
        warm_up = noise_scheduler.warm_up
        steps = len(noise_scheduler.timesteps) - warm_up
        current = noise * np.float32(noise_scheduler.initial_sigma)
        began = time.perf_counter()
        for call, timestep in enumerate(noise_scheduler.timesteps):
            step = max(call - warm_up, 0)
            prediction = denoiser(step, noise_scheduler.model_input(current, call), timestep.item(), scale)
            current = noise_scheduler.step(prediction, call, current)
            if call < warm_up:
                continue  # further calls belong to the first step
            if callback is not None:
                seconds, (graph, letter) = time.perf_counter() - began, denoiser.ran(step)
                callback(Step(step, steps, graph, letter, seconds, current))
            began = time.perf_counter()
        if self._sequential:
            self._graphs.close()
        return current

    def _noise(self, count: int, height: int | None, width: int | None, seed: int | None, given: Array | None) -> Array:
        decoder = self._components.vae_decoder
        sizes = {
            "height": self._components.height if height is None else height,
            "width": self._components.width if width is None else width,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % decoder.scale_factor:
                raise ConfigurationError(
                    f"{name} must be a multiple of {decoder.scale_factor} pixels, but got {size!r}."
                )
        shape = (decoder.latent_channels, *(size // decoder.scale_factor for size in sizes.values()))
        if given is not None:
            if np.shape(given) != (count, *shape):
                raise ConfigurationError(
                    f"latents must be an array of shape {(count, *shape)}, but got {np.shape(given)}."
                )
            return np.asarray(given, dtype=np.float32)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ConfigurationError(f"seed must be None or a non-negative integer, but got {seed!r}.")
        seeds = [None if seed is None else seed + index for index in range(count)]
        return np.stack([np.random.default_rng(one).standard_normal(shape, dtype=np.float32) for one in seeds])

    def _conditions(
        self, prompts: Sequence[str], negative: str | Sequence[str] | None, latents: Sequence[int], *, guided: bool
    ) -> Conditions:
        encoder = self._open_prompts()
        negatives = _negatives(negative, len(prompts))
        cond = encoder.encoded(prompts)
        halves: dict[Half, Encoded] = {"cond": cond}
        if guided:
            halves = {"uncond": encoder.negative(negatives, cond), "cond": cond}
        if self._sequential:
            self._prompts = None
        sizes = self._sizes(len(prompts), latents)
        return {half: {**encoded, **sizes} for half, encoded in halves.items()}

    def _sizes(self, count: int, latents: Sequence[int]) -> Mapping[Source, Array]:
        """Return the inputs of some denoisers for the images' size, which are the same in both halves."""
        height, width = (size * self._components.vae_decoder.scale_factor for size in latents[-2:])

        def rows(*values: float) -> Array:
            return np.tile(np.array(values, dtype=np.float32), (count, 1))  # [images, values]

        return {
            "sizes": rows(height, width, 0, 0, height, width),  # original size, crop offset, target size
            "resolution": rows(height, width),
            "aspect_ratio": rows(height / width),
        }

    def _open_prompts(self) -> Prompts:
        if self._prompts is None:
            self._prompts = Prompts(self._components, self._folder, self._settings)
        return self._prompts

    def _open_decoder(self) -> Decoder:
        if self._decoder is None:
            self._decoder = Decoder(self._components.vae_decoder, self._folder, self._settings)
        return self._decoder

    def _decoded(self, latents: Array) -> Array:
        images = self._open_decoder()(latents)
        if self._sequential:
            self._decoder = None
        return images


def _texts(prompt: object) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigurationError(f"prompt must be a string or a list of strings, but got {prompt!r}.")
    return list(texts)


def _negatives(negative: object, count: int) -> list[str] | None:
    if negative is None:
        return None
    texts = [negative] * count if isinstance(negative, str) else negative
    if isinstance(texts, Sequence) and len(texts) == count and all(isinstance(text, str) for text in texts):
        return list(texts)
    raise ConfigurationError(
        f"negative_prompt must be None, a string, or a list of {count} strings (as many as prompts), but got "
        f"{negative!r}."
    )


def _number(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ConfigurationError(f"guidance_scale must be a number, but got {scale!r}.")
    return float(scale)
