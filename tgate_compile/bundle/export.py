"""`export`: an optimized pipeline's graphs, written for other runtimes."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils.logging import tqdm

from tgate_compile._arguments import AnyPipeline, FormatName, check_call, check_pipeline_first, did_you_mean
from tgate_compile._errors import ConfigurationError, UnsupportedModelError, check_installed
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.formats import check_can_write, components_format, format_called
from tgate_compile.bundle.quantization import Scheme, read_quantization
from tgate_compile.bundle.read_manifest import nearest_multiples
from tgate_compile.engine.config import AUTO_PROMPTS
from tgate_compile.engine.free_sizes import SYMBOLS, FreeSize, downsampling
from tgate_compile.engine.traffic import exclusive
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import rounded_input, wrapped_weight
from tgate_compile.pipeline.optimized import preview, required_state_of

logger = logging.getLogger(__name__)

MSG_FORMAT = "format must be one of {known}, but got {given!r}."
MSG_ROUNDED = (
    "{model} was quantized by torchao so that layers round their inputs to few bits when they run ({name} and others). "
    "Bundles do not take that: most formats have no operator for it, and AOTInductor rounds values between integers "
    "differently, so that its graphs cannot be checked against PyTorch. What works: Int8WeightOnlyConfig, whose "
    'weights stay int8 in a bundle; or the model as it was, exported with quantize="int8-dynamic".'
)
MSG_QUANTIZED = (
    '{model} was quantized by torchao, and the converter of format="{format}" does not take its weights ({name} and '
    'others). Export the model as it was with quantize="int8-dynamic", or to another format, such as "onnx".'
)
#: What may be written: the denoiser's graphs alone, or all that makes an image of a prompt.
COMPONENTS = ("denoiser", "all")


def export(
    pipe: AnyPipeline,
    folder: str | os.PathLike[str],
    format: FormatName = "onnx",
    *,
    call: Mapping[str, Any] | None = None,
    dynamic: bool | Collection[FreeSize] = True,
    format_options: Mapping[str, object] | None = None,
    components: Literal["denoiser", "all"] = "denoiser",
    quantize: Scheme | Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the graphs of an optimized pipeline's schedule to `folder`, as a bundle that `load` serves from.

    A bundle has an ONNX file for each graph, one file with the weights of all of them, and a manifest with all that
    another runtime needs to know (`docs/reference/bundle.md`). Each graph is checked against PyTorch as it is written.

    Args:
        pipe: what `optimize` has returned.
        folder: a new folder, in one that exists.
        format: `"onnx"`, or `"aoti"`: native code, compiled here for machines like this one; or engines for NVIDIA's
            GPUs: `"tensorrt-rtx"`, built without one, and `"tensorrt"`; or for devices: `"executorch"`, `"openvino"`,
            `"coreml"`.
        call: arguments of the pipeline's call, which fix the shapes that are not dynamic. Its steps are the manifest's
            example. The default is an empty prompt and the pipeline's own defaults.
        dynamic: which of `"batch"` (prompts and images at a time), `"height"` and `"width"` each call may choose. True
            is as many as the denoiser permits: all three, or the batch alone (transformers that compute tables from
            the size), or none. False is none, and so is True where the format's graphs have fixed sizes: `executorch`
            and `coreml`.
        format_options: see the format in `docs/guides/exporting.md`; `onnx` has none, `aoti` has `target`.
        components: `"all"` also writes the text encoders, the tokenizers and the VAE's decoder, so that
            `tgate_compile.runtime` makes images of prompts without PyTorch; for Stable Diffusion, SDXL and PixArt.
        quantize: store the graphs' weights, or compute, in fewer bits: `"int8"` (weights alone), or a mapping with such
            a `scheme` and more; `docs/guides/edge.md` has the schemes, and what each costs. The text encoders and the
            VAE stay as they are.
        overwrite: replace the bundle that is in `folder`.
        progress: called with a line at the beginning of each stage. None shows the stages on stderr as diffusers shows
            its progress bars, unless these are disabled (`diffusers.utils.logging.disable_progress_bar()`) or stderr
            is not a terminal. They are logged at INFO in any case.

    Returns:
        `folder`.

    Raises:
        ConfigurationError: an argument is wrong, or a package is missing.
        UnsupportedModelError: this pipeline's graphs cannot be put into a bundle.
        CaptureError: the denoiser's code depends on a size that `dynamic` names.
        BundleError: the bundle cannot be written, or a graph is not what it must be. `folder` is then as it was.
    """
    check_pipeline_first("export", pipe, folder, format)
    if not isinstance(format, str) or format not in FORMATS:
        message = MSG_FORMAT.format(known=", ".join(f'"{known}"' for known in FORMATS), given=format)
        if folder in FORMATS:
            message += f' The folder comes first: export(pipe, "{format}", format="{folder}").'
        raise ConfigurationError(message + did_you_mean(format, FORMATS))
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ConfigurationError(f"export() needs a folder, a str or a Path, but got {folder!r}.")
    free = _free(dynamic, format)
    if components not in COMPONENTS:
        raise ConfigurationError(f"components must be {' or '.join(map(repr, COMPONENTS))}, but got {components!r}.")
    state = required_state_of(pipe)
    pipeline = state.pipeline_class.__name__
    if len(state.hooks) > 1:
        raise UnsupportedModelError(
            f"This {pipeline} has the denoisers {' and '.join(state.hooks)}, and a bundle holds the graphs of one. "
            "Bundles of several are not written yet."
        )
    ((component, hook),) = state.hooks.items()
    if call is not None:
        check_call(call, state.pipeline_class)
        for name in ("height", "width"):
            _check_multiple(pipe, hook.denoiser, name, call.get(name), free)
    if not isinstance(hook.store, VariantStore):
        raise ConfigurationError(
            f"This {pipeline} is served from a bundle already: copy that, or restore(pipe) and optimize(pipe, ...) "
            "first."
        )
    if hook.config.schedule.guidance_similarity is not None:
        raise UnsupportedModelError(
            "This schedule ends guidance by the predictions' similarity (guidance_similarity), so that which "
            "graphs a call needs is known only while it runs. A bundle needs a gate_step or a guidance_step "
            "instead."
        )
    check_can_write(format)
    rounded, quantized = rounded_input(hook.denoiser), wrapped_weight(hook.denoiser)
    told = {"model": type(hook.denoiser).__name__, "format": format}
    if rounded is not None:
        raise UnsupportedModelError(MSG_ROUNDED.format(name=rounded, **told))
    if quantized is not None and not FORMATS[format].quantized_weights:
        raise UnsupportedModelError(MSG_QUANTIZED.format(name=quantized, **told))
    quantization = read_quantization(quantize, format, FORMATS[format].schemes)
    options = dict(format_options or {})
    format_called(format).check_options(options)
    # pydantic is an extra.
    from tgate_compile.bundle.write import check_target, write_bundle

    call = {} if call is None else call
    if "prompt" not in call and call.get("prompt_embeds") is None:
        call = {"prompt": "", **call}
    says_nothing = not call.get("prompt") and call.get("prompt_embeds") is None
    if says_nothing and quantization is not None and quantization.calibrated:
        prompts = quantization.calibration_prompts or AUTO_PROMPTS
        quantization = dataclasses.replace(quantization, calibration_prompts=prompts)
    request = None
    if components == "all":
        check_can_write(components_format())
        check_installed("tokenizers", what='components="all"')
        from tgate_compile.bundle.component_recipes import ComponentsRequest, recipe_for

        request = ComponentsRequest(state.pipeline_class, recipe_for(pipe, call), call)
    target = Path(folder)
    target = target.parent.resolve() / target.name if target.name else target.resolve()
    check_target(target, overwrite=overwrite)
    # Exporters change state of the whole process, as torch.export does.
    with exclusive(), _stages(progress) as report:
        report("Capturing the graphs")
        plan = preview(pipe, call)[component]
        write_bundle(
            pipe,
            component,
            hook,
            plan,
            target,
            graph_format=format,
            options=options,
            free=free,
            components=request,
            quantization=quantization,
            call=call,
            overwrite=overwrite,
            progress=report,
        )
    return target


def _check_multiple(
    pipe: AnyPipeline, denoiser: torch.nn.Module, name: str, size: object, free: Collection[str] | None
) -> None:
    """Raise ConfigurationError unless graphs can be captured at this height or width that leave it to each call."""
    pixels = getattr(pipe, "vae_scale_factor", None)
    if free is None or name not in free or not isinstance(pixels, int) or not isinstance(size, int):
        return
    multiple = pixels * downsampling(denoiser)
    if size % multiple:
        raise ConfigurationError(
            f"For graphs that leave the {name} to each call, {name} must be a multiple of {multiple} pixels; {size} is "
            f"not. The nearest are {nearest_multiples(size, multiple)}. Or leave {name} out of dynamic, and the bundle "
            f"has this {name} only."
        )


@contextmanager
def _stages(progress: Callable[[str], None] | None) -> Iterator[Callable[[str], None]]:
    """What to call at the beginning of each stage."""
    # disable=None: not unless stderr is a terminal.
    with tqdm(desc="Exporting", bar_format="{desc} [{elapsed}]", disable=None if progress is None else True) as bar:

        def report(stage: str) -> None:
            logger.info("%s", stage)
            if progress is not None:
                progress(stage)
            bar.set_description_str(stage)

        yield report


def _free(dynamic: object, format: str) -> Collection[FreeSize] | None:
    fixed = FORMATS[format].fixed_sizes
    if dynamic is True:
        return () if fixed else None
    if dynamic is False:
        return ()
    if isinstance(dynamic, str) or not isinstance(dynamic, Collection) or not set(dynamic) <= set(SYMBOLS):
        raise ConfigurationError(
            'dynamic must be True (whatever the denoiser permits), False, or names of "batch", "height" and '
            f'"width", but got {dynamic!r}.'
        )
    if fixed and dynamic:
        raise ConfigurationError(
            f'format="{format}" has graphs of fixed sizes only, but got dynamic={dynamic!r}. Leave it out; `call` '
            "says the sizes."
        )
    return tuple(dynamic)
