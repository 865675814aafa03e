"""`load`: serve a plain pipeline from a bundle."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tgate_compile._arguments import BundleBackendName, check_pipeline_first, did_you_mean
from tgate_compile._errors import BundleError, ConfigurationError, check_installed
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.formats import GraphFormat, check_can_load, check_can_run, format_called, openers
from tgate_compile.methods.schedule_file import read_schedule
from tgate_compile.pipeline.attach import attach, denoiser_names, detach
from tgate_compile.pipeline.optimized import Optimized, required_state_of

if TYPE_CHECKING:
    from tgate_compile.bundle.read import Bundle

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")

MSG_BACKEND = "load() takes the backend {known}, or None for the one that the bundle is made for, but got {given!r}."
MSG_OTHER_BACKEND = (
    'The bundle {folder} has graphs of the format "{format}", which the backend {backends} runs, not "{given}". Leave '
    "backend out, or export a bundle of another format."
)
MSG_OTHER_MODEL = "The bundle {folder} is made from a {expected}, and the {component} of this pipeline is a {given}."
MSG_OTHER_WEIGHTS = (
    "The {component} of this pipeline has other weights than the one that the bundle {folder} is made from: another "
    "checkpoint, another dtype, or a LoRA more or less. Load it into the same model, or export a bundle of this one."
)

MSG_OTHER_STATE = (
    "The {component} of this pipeline is not set up as the one that the bundle {folder} was made from: {what}. Set it "
    "up in the same way, or export a bundle of this one."
)
MSG_STATE_UNKNOWN = (
    "The bundle %s was written by tgate_compile %s, which did not record LoRA scales, attention processors, FreeU and "
    "hooks: that this pipeline has the same ones cannot be checked. Export the bundle again to have it checked."
)


def load(
    pipe: Pipeline,
    folder: str | os.PathLike[str],
    *,
    backend: BundleBackendName | None = None,
    backend_options: Mapping[str, object] | None = None,
    sequential: bool = False,
) -> Pipeline:
    """Serve `pipe`, a plain pipeline, from the bundle in `folder`, which `export` has written from one like it.

    Its ordinary call then runs the bundle's schedule on the bundle's graphs and weights, as after `optimize`, but
    nothing is captured, converted or compiled; `restore(pipe)` undoes it. The bundle is verified, and must go on lying
    where it is. Other shapes than those it was made for are an error that says which ones it has.

    Args:
        pipe: a pipeline of the class and with the weights that the bundle was made from, set up in the same way (LoRA
            scales, attention processors, FreeU). It is changed, and returned.
        folder: of the bundle.
        backend: what runs the bundle's graphs: `"onnxruntime"` or `"openvino"` for the format `onnx`, otherwise what
            the format is called. None: what they are made for.
        backend_options: those of `optimize` with the same backend: of ONNX Runtime `providers`, `threads`,
            `prepacking`; of OpenVINO `device`, `precision`, `threads`, `cache`. Of engines: see
            `docs/guides/exporting.md`.
        sequential: have one graph open at a time: less memory, and a graph is opened whenever the schedule changes to
            it, which is twice per generation with T-GATE, and often with others (a warning says how often).

    Returns:
        `pipe` itself.

    Raises:
        ConfigurationError: an argument is wrong, or a package is missing. `pipe` is as it was, here and below.
        BundleError: the bundle is damaged, or made from another pipeline, another model, other weights, or a model in
            another state: LoRA scales, attention processors, FreeU, hooks.
        BackendError: this machine cannot run the bundle's graphs.
    """
    check_pipeline_first("load", pipe, folder)
    known = list(dict.fromkeys(row.backend for row in FORMATS.values()))
    if backend is not None and backend not in known:
        message = MSG_BACKEND.format(known=", ".join(f'"{name}"' for name in known), given=backend)
        raise ConfigurationError(message + did_you_mean(backend, known))
    if not isinstance(sequential, bool):
        raise ConfigurationError(f"sequential must be True or False, but got {sequential!r}.")
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigurationError(f"load() needs the folder of a bundle, a str or a Path, but got {folder!r}.")
    check_installed("pydantic", what="load()")
    # pydantic is an extra.
    from tgate_compile.bundle.read import read_bundle

    names = denoiser_names(pipe)
    bundle = read_bundle(os.path.abspath(folder))
    made_from, method = bundle.manifest.pipeline.class_name, bundle.manifest.method
    backends = openers(bundle.manifest.graph_format)
    chosen = next(iter(backends)) if backend is None else backend
    if chosen not in backends:
        runs = " or ".join(f'"{name}"' for name in backends)
        told = {"format": bundle.manifest.graph_format, "backends": runs, "given": backend}
        raise ConfigurationError(MSG_OTHER_BACKEND.format(folder=bundle.folder, **told))
    if type(pipe).__name__ != made_from:
        given = type(pipe).__name__
        raise BundleError(
            f"The bundle {bundle.folder} is made from a {made_from}, and this is a {given}. Load it into a pipeline "
            "of that class."
        )
    options = dict(backend_options or {})
    check_can_load(backends[chosen])
    functions = format_called(backends[chosen])
    functions.check_load_options(options)
    check_can_run(bundle.manifest.graph_format, pipe._execution_device)  # type: ignore[attr-defined]
    attach(
        pipe,
        dict.fromkeys(names, read_schedule(method.schedule)),
        sites=method.sites,
        cache_dtype=None if method.cache_dtype is None else getattr(torch, method.cache_dtype),
        backend=chosen,
        backend_options=options,
        from_bundle=True,
    )
    try:
        _serve(required_state_of(pipe), bundle, functions, options, sequential=sequential)
    except BaseException:
        detach(pipe)
        raise
    return pipe


def _serve(
    state: Optimized, bundle: Bundle, functions: GraphFormat, options: Mapping[str, Any], *, sequential: bool
) -> None:
    from tgate_compile.bundle.denoiser_state import (
        recorded_state,
        settings_that_differ,
        state_of_denoiser,
        what_differs,
    )
    from tgate_compile.bundle.manifest import warn_of_alternation
    from tgate_compile.bundle.store import BundleStore
    from tgate_compile.bundle.weights import weights_digest

    made_from = bundle.manifest.denoiser
    hook = state.hooks.get(made_from.component)
    model = "missing" if hook is None else type(hook.denoiser).__name__
    told = {"folder": bundle.folder, "component": made_from.component}
    if hook is None or len(state.hooks) > 1 or model != made_from.class_name:
        raise BundleError(MSG_OTHER_MODEL.format(**told, expected=made_from.class_name, given=model))
    differs = settings_that_differ(hook.denoiser, made_from.config)
    if made_from.state is None:
        logger.warning(MSG_STATE_UNKNOWN, bundle.folder, bundle.manifest.versions.tgate_compile)
    elif not differs:
        recorded = recorded_state(made_from.state)
        here = state_of_denoiser(hook.denoiser, forward=hook.own_forward, baseline=recorded.baseline)
        differs = what_differs(here, recorded)
    if differs:
        raise BundleError(MSG_OTHER_STATE.format(**told, what="; ".join(differs)))
    if weights_digest(hook.denoiser) != made_from.weights_digest:
        raise BundleError(MSG_OTHER_WEIGHTS.format(**told))
    if sequential:
        warn_of_alternation(bundle.manifest)
    anchor = hook.config.schedule.anchor_weight
    hook.store = BundleStore(hook.denoiser, bundle, functions, anchor, options, sequential=sequential)
