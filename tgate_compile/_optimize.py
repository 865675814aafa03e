"""`optimize` and `restore`."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from diffusers import DiffusionPipeline

from tgate_compile._arguments import BackendName, check_names, check_pipeline_first, did_you_mean
from tgate_compile._errors import ConfigurationError
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

#: What `tuning` may hold.
_TUNING = [name for name in inspect.signature(tune).parameters if name != "pipe"]

MSG_SCHEDULE = "schedule must be a tgate_compile.Schedule or the path of a schedule file, but got {given!r}."
MSG_SCHEDULE_AND_MORE = "A schedule says all about the steps, but {given} is given as well. Give one or the other."
MSG_METHOD_AND_MORE = "A method says all about the steps, but {given} is given as well. Give one or the other."
MSG_AUTO_AND_MORE = 'gate_step="auto" chooses the whole schedule, but {given} is given as well. Give one or the other.'
MSG_TUNING = 'tuning is for gate_step="auto", and must be a mapping of arguments of tune(), but got {given!r}.'


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
    schedule: Schedule | Method | str | os.PathLike[str] | None = None,
    tuning: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
    sites: Sequence[str] | None = None,
    cache_dtype: torch.dtype | None = None,
    backend: BackendName = "inductor",
    backend_options: Mapping[str, object] | None = None,
    on_unsupported: OnUnsupported = "error",
    graph_memory: int | None = None,
) -> Pipeline:
    """Make the pipeline's ordinary call skip what no longer matters: T-GATE, DeepCache, or guidance that ends early.

    With T-GATE, `gate_step` steps run in full. The outputs of every cross-attention are cached at the last of them
    (under guidance the mean of the two halves), and from step `gate_step` on a pruned graph runs that has neither the
    cross-attentions nor their weights, at half the batch, since guidance has done its work too.
    Source: arXiv 2404.02747 v1, section 3.2. `Schedule` has the other methods' rules and sources.

    The graphs are captured and compiled at the first call, on its real inputs, and again for new shapes or dtypes.
    They hold no copy of the weights. Outside a pipeline call the denoiser runs as if never optimized.

    Args:
        pipe: a diffusers pipeline, ordinary or modular, with a UNet or transformer that has cross-attentions, or an
            object like one (see `docs/guides/own-denoiser.md`). It is changed, and returned; `restore(pipe)` undoes it.
        gate_step: steps to run in full: a number >= 1, or a fraction of the steps strictly between 0 and 1. A gate at
            or beyond the last step means that nothing is gated; None is no gate. One call may differ:
            `pipe(..., gate_step=8)`. Where two denoisers share the steps (Wan 2.2), each counts its own from 0, and
            a pair gives each its own gate. `"auto"` measures schedules on a few prompts first, and takes the cheapest
            that is close enough, by `tune`, whose arguments `tuning` may have. In place of all these arguments, a
            method or several: `TGate(10)`, `DeepCache(3) + TGate(10)`, `AdaptiveGuidance(similarity=0.991)`,
            `PAB(6, 2)`; the arguments below are the same in short.
        sp_interval: T-GATE v2: before the gate, compute self-attention at every such step only.
        fi_interval: T-GATE v2: the same after the gate.
        warm_up: T-GATE v2: the step, from 0, after which `sp_interval` begins.
        deepcache_interval: compute a UNet's deep part at every such step only (DeepCache), with a gate or without.
        deepcache_branch: the skip connection at which the deep part begins; 0 is the outermost.
        guidance_step: without a gate: guidance stops after so many steps, or such a fraction of them.
        guidance_similarity: without a gate: guidance stops when the two predictions are this similar (Adaptive
            Guidance; costs a synchronization with the device per guided step).
        keep: the guidance half that goes on once guidance has stopped, with its pooled text and other conditioning:
            `"uncond"` or `"cond"`. None is the papers' choice: uncond with a gate, cond without.
        anchor_weight: weight of the cond half in what the gate caches; 0.5 is the paper's mean of the halves, 1 the
            cond half alone, and more goes beyond it.
        schedule: all of the above in one: a `Schedule`, or a file that `tune` or `save_schedule` has written. The
            other arguments then stay at their defaults.
        tuning: for `gate_step="auto"`: arguments of `tune`, such as `prompts`, `tolerance` and `call`. Without prompts
            it is done on four of our own; give some that are like those to come.
        denoiser: the attribute of `pipe` that is the denoiser, if it is neither `unet` nor `transformer`.
        sites: cache only the attentions whose names match one of these patterns, as in a shell: `["up_blocks.*"]`.
        cache_dtype: keep the caches in this dtype: half of fp32's memory with `torch.bfloat16`, a quarter with
            `torch.float8_e4m3fn`. None keeps the model's own.
        backend: `"inductor"` (compiled), `"onnxruntime"`, `"openvino"`, `"tensorrt"` (on NVIDIA's GPUs), `"eager"` (the
            rewritten graphs, uncompiled: no compile time), or `"auto"` (the fastest for the device, as measured).
        backend_options: options for the backend: Inductor's configuration, and `cuda_graphs=True` for it on a GPU.
        on_unsupported: what to do with a pipeline, or a call, that cannot be gated: `"error"` refuses it; `"plain"`
            runs it in full, as the plain pipeline does, and logs a warning once per cause. If gated steps have run
            before the cause is found, the whole call is repeated, callbacks included.
        graph_memory: bytes that the graphs may take, by estimate. Beyond that, the least recently used ones are
            dropped. None is a quarter of the machine's memory.

    Returns:
        `pipe` itself.

    Raises:
        ConfigurationError: an argument is wrong. The pipeline is as it was.
        UnsupportedModelError: this pipeline or denoiser cannot be gated. The pipeline is as it was.
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
        backend_options=backend_options,
        on_unsupported=on_unsupported,
        graph_memory=graph_memory,
    )
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `optimize`: the pipeline and its denoiser are exactly as they were, and the graphs are freed.

    Raises:
        ConfigurationError: the pipeline is not optimized.
        ConcurrentGenerationError: it is in the middle of a generation.
    """
    detach(pipe)
    return pipe


def _not_a_gate_step(given: str) -> str:
    expected = f'gate_step must be a number of steps, a fraction of them or "auto", but got "{given}".'
    if given in get_args(BackendName):
        return f'{expected} That is a backend. Write: optimize(pipe, gate_step=10, backend="{given}").'
    if given.endswith(".json"):
        return f'{expected} For a schedule file, write: optimize(pipe, schedule="{given}").'
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
