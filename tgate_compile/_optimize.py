"""The public functions `optimize` and `restore`."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import (
    BackendName,
    ConfigurationError,
    Precision,
    check_names,
    check_pipeline_first,
    did_you_mean,
)
from tgate_compile.engine.config import AUTO_PROMPTS
from tgate_compile.methods.method import Half, Method
from tgate_compile.methods.schedule import Schedule, schedule_of
from tgate_compile.methods.schedule_file import load_schedule
from tgate_compile.pipeline.attach import attach, denoiser_names, detach
from tgate_compile.pipeline.loop import OnUnsupported
from tgate_compile.pipeline.optimized import GateStep, split_gate_step
from tgate_compile.study.tuning.search import tune

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")

#: The keys that `tuning` accepts.
_TUNING = [name for name in inspect.signature(tune).parameters if name != "pipe"]

MSG_SCHEDULE = "schedule must be a tgate_compile.Schedule or the path of a schedule file, but got {given!r}."
MSG_SCHEDULE_AND_MORE = "A schedule defines all steps, but {given} is given as well. Pass one or the other."
MSG_METHOD_AND_MORE = "A method defines all steps, but {given} is given as well. Pass one or the other."
MSG_AUTO_AND_MORE = 'gate_step="auto" chooses the whole schedule, but {given} is given as well. Pass one or the other.'
MSG_TUNING = 'tuning requires gate_step="auto", and must be a mapping of arguments for tune(), but got {given!r}.'


def optimize(
    pipe: Pipeline,
    gate_step: GateStep | Literal["auto"] | Method | Schedule | None = 10,
    *,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 2,
    deepcache_interval: int = 1,
    deepcache_branch: int = 0,
    guidance_step: int | float | None = None,
    guidance_similarity: float | None = None,
    keep: Half | None = None,
    anchor_weight: float = 0.5,
    text_interval: int | None = None,
    schedule: Schedule | Method | str | os.PathLike[str] | None = None,
    tuning: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
    sites: Sequence[str] | None = None,
    cache_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    precision: Precision = "auto",
    backend_options: Mapping[str, object] | None = None,
    on_unsupported: OnUnsupported = "error",
    graph_memory: int | None = None,
    binding_times: bool | None = None,
    offload_prelude: bool = False,
) -> Pipeline:
    """Speed up the calls of a pipeline with T-GATE, DeepCache, PAB or guidance that ends early.

    With T-GATE (arXiv 2404.02747 v1, section 3.2), `gate_step` steps run in full. The last of them caches the outputs
    of all cross-attentions; with guidance, it caches the mean of the two halves. From step `gate_step` on, guidance is
    off, and a pruned graph runs at half the batch, without the cross-attentions and their weights. In models with joint
    attention (SD3, FLUX, Qwen-Image), the keys and values of the text are cached instead, and the pruned graph has
    neither the text's tokens nor the weights that only they need. The other methods are described in their classes.

    The graphs are captured and compiled at the first call, on its inputs, and again for new shapes or dtypes. In eager
    mode and with Inductor they share the pipeline's weights; OpenVINO and ONNX Runtime keep a copy for each graph.
    Outside of a pipeline call the denoiser runs as if it were not optimized.

    Args:
        pipe: a diffusers pipeline, ordinary or modular, with a UNet or transformer that has cross-attention or
            joint attention, or a similar object (see `docs/guides/own-denoiser.md`). It is changed in place;
            `restore(pipe)` undoes that.
        gate_step: the number of steps (>= 1), or the fraction of the steps (0 < x < 1), that run in full. If it is not
            less than the number of steps, nothing is gated; None means no gate. A single call can override it:
            `pipe(..., gate_step=8)`. If two denoisers share the steps (Wan 2.2), each counts its own steps from 0, and
            a pair sets a gate for each. `"auto"` measures schedules on a few prompts with `tune`, and chooses the
            cheapest one within the tolerance. The argument may also be a method or a sum of methods, which replaces
            the arguments below: `TGate(10)`, `DeepCache(3) + TGate(10)`, `AdaptiveGuidance(similarity=0.991)`.
        sp_interval: T-GATE v2: the interval of self-attention before the gate, in steps.
        fi_interval: T-GATE v2: the interval of self-attention after the gate, in steps.
        warm_up: T-GATE v2: the step, from 0, after which `sp_interval` begins.
        deepcache_interval: the interval of a UNet's deep layers, in steps (DeepCache), with or without a gate.
        deepcache_branch: the skip connection at which the deep part begins; 0 is the outermost.
        guidance_step: without a gate: the number or the fraction of steps after which guidance ends.
        guidance_similarity: without a gate: the cosine similarity of the two predictions at which guidance ends
            (Adaptive Guidance). Computing it synchronizes with the device at every guided step.
        keep: the guidance half that is kept once guidance has ended, with its pooled text and other conditioning:
            `"uncond"` or `"cond"`. None means the papers' choice: uncond with a gate, cond without one. With joint
            attention it is always cond.
        anchor_weight: the weight of the cond half in the cached values; 0.5 is the paper's mean of the halves, 1 is
            the cond half alone, and larger values extrapolate beyond it.
        text_interval: after the gate: the interval of cross-attention, or of the text in joint attention, in steps.
            None means that neither is computed again.
        schedule: a `Schedule`, or a file written by `tune` or `save_schedule`, instead of all the arguments above,
            which must be left at their defaults.
        tuning: for `gate_step="auto"`: arguments for `tune`, such as `prompts`, `tolerance` and `call`. Without
            prompts, four built-in ones are used; prompts that resemble the later ones give better results.
        denoiser: the name of the attribute of `pipe` that is the denoiser, if it is neither `unet` nor `transformer`.
        sites: shell-style patterns of the names of the attentions to cache: `["up_blocks.*"]`. None means all.
        cache_dtype: the dtype of the caches: `torch.bfloat16` takes half the memory of fp32, `torch.float8_e4m3fn` a
            quarter. None means the model's own dtype.
        backend: `"auto"`, or the name of a backend: `"eager"` (the rewritten graphs without compilation, and without a
            copy of the weights), `"openvino"`, `"onnxruntime"`, `"inductor"` or `"tensorrt"` (on NVIDIA GPUs). `"auto"`
            takes the fastest installed backend whose results agree with PyTorch: on a CPU OpenVINO, then ONNX Runtime,
            then eager; on a GPU Inductor with CUDA graphs. It logs its choice at level INFO.
        precision: the dtype that the denoiser's graphs compute in. `"auto"` is the pipeline's own; `"bfloat16"` is
            about twice as fast as float32 on CPUs with AVX512-BF16 or AMX. The pipeline, its weights, inputs and
            results keep their dtypes. Caches have this dtype too, unless `cache_dtype` is given.
        backend_options: options of a backend that is selected by name: Inductor's configuration and its
            `cuda_graphs=True`, the `threads` of OpenVINO and ONNX Runtime, and others.
        on_unsupported: how to handle a pipeline or a call that cannot be gated: `"error"` refuses it; `"plain"` runs it
            in full, like the plain pipeline, and logs a warning once per cause. If gated steps have run before the
            cause is found, the whole call is repeated, including its callbacks.
        graph_memory: the estimated number of bytes that the graphs may take. Beyond it, the least recently used graphs
            are dropped. None means a quarter of the machine's memory.
        binding_times: whether to compute values that depend on the prompt alone once per generation, and those that
            depend on the timestep once per timestep, instead of in every step. None means only with
            `backend="eager"`. See `docs/guides/binding-times.md`.
        offload_prelude: on an accelerator: whether to move the weights that only these values need to the CPU after
            the values have been computed, and back when the call ends. Implies `binding_times=True`.

    Returns:
        `pipe` itself.

    Raises:
        ConfigurationError: an argument is wrong. The pipeline is left unchanged.
        UnsupportedModelError: this pipeline or denoiser cannot be gated. The pipeline is left unchanged.
    """
    check_pipeline_first("optimize", pipe, gate_step)
    names = denoiser_names(pipe, denoiser)
    choices: dict[str, Any] = {
        "sp_interval": sp_interval,
        "fi_interval": fi_interval,
        "warm_up": warm_up,
        "deepcache_interval": deepcache_interval,
        "deepcache_branch": deepcache_branch,
        "guidance_step": guidance_step,
        "guidance_similarity": guidance_similarity,
        "keep": keep,
        "anchor_weight": anchor_weight,
        "text_interval": text_interval,
    }
    if tuning is not None and (gate_step != "auto" or not isinstance(tuning, Mapping)):
        raise ConfigurationError(MSG_TUNING.format(given=tuning))
    check_names(tuning or {}, _TUNING, "tuning: tune()")
    if isinstance(gate_step, str) and gate_step != "auto":
        raise ConfigurationError(_not_a_gate_step(gate_step))
    if isinstance(gate_step, (Method, Schedule)):
        _check_alone({**choices, "schedule": schedule}, MSG_METHOD_AND_MORE)
        schedules = dict.fromkeys(names, schedule_of(gate_step))
    elif gate_step == "auto":
        _check_alone({**choices, "schedule": schedule}, MSG_AUTO_AND_MORE)
        schedules = dict.fromkeys(names, _tuned(pipe, denoiser, {} if tuning is None else tuning))
    elif schedule is not None:
        _check_alone({"gate_step": gate_step, **choices}, MSG_SCHEDULE_AND_MORE)
        schedules = dict.fromkeys(names, _given(schedule))
    else:
        schedules = {name: Schedule(gate, **choices) for name, gate in split_gate_step(gate_step, names).items()}
    attach(
        pipe,
        schedules,
        sites=sites,
        cache_dtype=cache_dtype,
        backend=backend,
        precision=precision,
        backend_options=backend_options,
        on_unsupported=on_unsupported,
        graph_memory=graph_memory,
        binding_times=binding_times,
        offload_prelude=offload_prelude,
    )
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `optimize`: restore the pipeline and its denoiser exactly, and free the graphs.

    Raises:
        ConfigurationError: the pipeline is not optimized.
        ConcurrentGenerationError: the pipeline is in the middle of a generation.
    """
    detach(pipe)
    return pipe


def _not_a_gate_step(given: str) -> str:
    expected = (
        'gate_step must be a number of steps (at least 1), a fraction of them (between 0 and 1) or "auto", but got '
        f"{given!r}."
    )
    if given in get_args(BackendName):
        return f'{expected} That is the name of a backend. Use optimize(pipe, gate_step=10, backend="{given}").'
    if given.endswith(".json"):
        return f'{expected} To use a schedule file, call optimize(pipe, schedule="{given}").'
    return f"{expected}{did_you_mean(given, ['auto'])}"


def _tuned(pipe: DiffusionPipeline, denoiser: str | None, arguments: Mapping[str, Any]) -> Schedule:
    own = {} if "call" in arguments else {"prompts": AUTO_PROMPTS}
    schedule = tune(pipe, **{**own, "denoiser": denoiser, **arguments}).schedule
    logger.info('gate_step="auto" chose: %s', schedule)
    return schedule


def _check_alone(others: Mapping[str, Any], message: str) -> None:
    defaults = inspect.signature(optimize).parameters
    doubled = [name for name, value in others.items() if value != defaults[name].default]
    if doubled:
        raise ConfigurationError(message.format(given=", ".join(doubled)))


def _given(schedule: object) -> Schedule:
    if isinstance(schedule, (Method, Schedule)):
        return schedule_of(schedule)
    if isinstance(schedule, (str, os.PathLike)):
        return load_schedule(Path(schedule))
    raise ConfigurationError(MSG_SCHEDULE.format(given=schedule))
