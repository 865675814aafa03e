"""`load`: run a pipeline on a bundle."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tgate_compile._errors import (
    BundleBackendName,
    BundleError,
    ConfigurationError,
    check_installed,
    check_pipeline_first,
    did_you_mean,
)
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.formats import GraphFormat, check_can_load, check_can_run, format_called, openers
from tgate_compile.methods.schedule_file import read_schedule
from tgate_compile.pipeline.attach import attach, denoiser_names, detach
from tgate_compile.pipeline.optimized import Optimized, required_state_of

if TYPE_CHECKING:
    from tgate_compile.bundle.read import Bundle

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")


def load(
    pipe: Pipeline,
    folder: str | os.PathLike[str],
    *,
    backend: BundleBackendName | None = None,
    backend_options: Mapping[str, object] | None = None,
    sequential: bool = False,
) -> Pipeline:
    """Run `pipe` on the bundle in `folder`, which `export` has written from a pipeline with the same model.

    Calls of the pipeline then follow the bundle's schedule and use its graphs and weights, as after `optimize`, but
    nothing is captured, converted or compiled. `restore(pipe)` undoes this. The bundle is verified, and must stay in
    its folder while it is in use. A call with shapes that the bundle does not support raises an error that names the
    supported ones.

    Args:
        pipe: a pipeline of the same class, with the same weights and the same setup (LoRA scales, attention
            processors, FreeU) as the one that the bundle was exported from. It is changed in place and returned.
        folder: the folder of the bundle.
        backend: the backend that runs the graphs: `"onnxruntime"` or `"openvino"` for the format `onnx`, and otherwise
            the name of the format. The default is the backend that the format is intended for.
        backend_options: the options of this backend, as in `optimize`: `providers`, `threads` and `prepacking` for ONNX
            Runtime; `device`, `precision`, `threads` and `cache` for OpenVINO. `docs/guides/exporting.md` has those for
            engines.
        sequential: keep only one graph open at a time. This saves memory, but a graph is opened whenever the schedule
            switches to it: twice per generation with T-GATE, more often with other methods (a warning says how often).

    Returns:
        `pipe` itself.

    Raises:
        ConfigurationError: an argument is wrong, or a package is missing. After an error, `pipe` is unchanged.
        BundleError: the bundle is damaged, or was exported from another pipeline, another model, other weights, or a
            model with another setup (LoRA scales, attention processors, FreeU, hooks).
        BackendError: this machine cannot run the bundle's graphs.
    """
    check_pipeline_first("load", pipe, folder)
    known = list(dict.fromkeys(row.backend for row in FORMATS.values()))
    if backend is not None and backend not in known:
        names = ", ".join(f'"{name}"' for name in known)
        message = f"backend must be one of {names}, or None for the bundle's own backend, but got {backend!r}."
        raise ConfigurationError(message + did_you_mean(backend, known))
    if not isinstance(sequential, bool):
        raise ConfigurationError(f"sequential must be True or False, but got {sequential!r}.")
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigurationError(f"folder must be a str or a Path, but got {folder!r}.")
    check_installed("pydantic", what="load()")
    # Imported here because pydantic is an optional dependency.
    from tgate_compile.bundle.read import read_bundle

    denoisers = denoiser_names(pipe)
    bundle = read_bundle(os.path.abspath(folder))
    made_from, method = bundle.manifest.pipeline.class_name, bundle.manifest.method
    backends = openers(bundle.manifest.graph_format)
    chosen = next(iter(backends)) if backend is None else backend
    if chosen not in backends:
        supported = " or ".join(f'"{name}"' for name in backends)
        raise ConfigurationError(
            f'The bundle {bundle.folder} has graphs of the format "{bundle.manifest.graph_format}", which need the '
            f'backend {supported}, but got "{backend}". Leave backend out, or export a bundle of another format.'
        )
    if type(pipe).__name__ != made_from:
        given = type(pipe).__name__
        raise BundleError(
            f"The bundle {bundle.folder} was exported from a {made_from}, but this is a {given}. Load it into a "
            "pipeline of that class."
        )
    options = dict(backend_options or {})
    check_can_load(backends[chosen])
    functions = format_called(backends[chosen])
    functions.check_load_options(options)
    check_can_run(bundle.manifest.graph_format, pipe._execution_device)  # type: ignore[attr-defined]
    attach(
        pipe,
        dict.fromkeys(denoisers, read_schedule(method.schedule)),
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
    from tgate_compile.bundle.plan_rows import warn_of_alternation
    from tgate_compile.bundle.store import BundleStore
    from tgate_compile.bundle.weights import weights_digest

    made_from = bundle.manifest.denoiser
    hook = state.hooks.get(made_from.component)
    model = "missing" if hook is None else f"a {type(hook.denoiser).__name__}"
    if hook is None or len(state.hooks) > 1 or type(hook.denoiser).__name__ != made_from.class_name:
        raise BundleError(
            f"The bundle {bundle.folder} was exported from a {made_from.class_name}, but the {made_from.component} of "
            f"this pipeline is {model}."
        )
    differs = settings_that_differ(hook.denoiser, made_from.config)
    if made_from.state is None:
        logger.warning(
            "The bundle %s was written by tgate_compile %s, which did not record LoRA scales, attention processors, "
            "FreeU and hooks, so it cannot be checked that this pipeline has the same ones. Export the bundle again to "
            "enable this check.",
            bundle.folder,
            bundle.manifest.versions.tgate_compile,
        )
    elif not differs:
        recorded = recorded_state(made_from.state)
        here = state_of_denoiser(hook.denoiser, forward=hook.own_forward, baseline=recorded.baseline)
        differs = what_differs(here, recorded)
    if differs:
        raise BundleError(
            f"The {made_from.component} of this pipeline is not set up like the one that the bundle {bundle.folder} "
            f"was exported from: {'; '.join(differs)}. Set it up in the same way, or export a bundle of this one."
        )
    if weights_digest(hook.denoiser) != made_from.weights_digest:
        raise BundleError(
            f"The {made_from.component} of this pipeline has other weights than the one that the bundle "
            f"{bundle.folder} was exported from: another checkpoint, another dtype, or different LoRAs. Load the "
            "bundle into the same model, or export a bundle of this one."
        )
    if sequential:
        warn_of_alternation(bundle.manifest)
    anchor = hook.config.schedule.anchor_weight
    hook.store = BundleStore(hook.denoiser, bundle, functions, anchor, options, sequential=sequential)
