"""`export`: write the graphs of an optimized pipeline for other runtimes."""

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

from tgate_compile._errors import (
    ConfigurationError,
    FormatName,
    UnsupportedModelError,
    check_call,
    check_installed,
    check_pipeline_first,
    did_you_mean,
)
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.formats import check_can_write, components_format, format_called
from tgate_compile.bundle.quantization import Scheme, read_quantization
from tgate_compile.bundle.read_manifest import nearest_multiples
from tgate_compile.engine.capture import SYMBOLS, FreeSize, downsampling
from tgate_compile.engine.config import AUTO_PROMPTS, AnyPipeline
from tgate_compile.engine.tracing import values_read
from tgate_compile.engine.traffic import exclusive
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import rounded_input, wrapped_weight
from tgate_compile.pipeline.optimized import preview, required_state_of

logger = logging.getLogger(__name__)

MSG_NO_REFERENCE = (
    "The schedule freezes reference images (FrozenReferences), but the call that the bundle is made for has none. Pass "
    "the arguments of a call of this {pipeline} with a reference image, such as call={{'image': image, 'prompt': ''}}."
)

#: The choices of `components`: the denoiser's graphs only, or everything needed to turn a prompt into an image.
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
    binding_times: bool | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the graphs of an optimized pipeline to `folder`, as a bundle for `load`.

    By default, a bundle consists of one ONNX file per graph, one file with the weights of all graphs, and a manifest
    that describes them for other runtimes (`docs/reference/bundle.md`). Each graph is checked against PyTorch as it is
    written.

    Args:
        pipe: a pipeline that `optimize` has returned.
        folder: the folder to create. Its parent must exist.
        format: `"onnx"`; `"aoti"`, native code compiled here for machines like this one; `"tensorrt-rtx"` (built
            without a GPU) or `"tensorrt"`, engines for NVIDIA GPUs; or `"executorch"`, `"openvino"` or `"coreml"`, for
            edge devices.
        call: arguments of the pipeline's call, which determine the shapes that are not dynamic. The steps of this call
            are the example in the manifest. The default is an empty prompt and the pipeline's own defaults.
        dynamic: the sizes that each call may choose, out of `"batch"` (prompts and images at a time), `"height"`,
            `"width"` and `"text"` (the number of tokens of a prompt). True means as many of the first three as the
            denoiser permits: all, only the batch (for transformers that compute tables from the size), or none. False
            means none, and so does True for the formats whose graphs have fixed sizes, `executorch` and `coreml`.
        format_options: options of the format, described in `docs/guides/exporting.md`; `onnx` has none, `aoti` has
            `target`.
        components: `"all"` also writes the text encoders, the tokenizers and the VAE decoder, so that
            `tgate_compile.runtime` can generate images from prompts without PyTorch. This is supported for Stable
            Diffusion, SDXL, PixArt, and Stable Diffusion 3 without its T5 encoder.
        quantize: store the weights of the graphs, or compute, in fewer bits: `"int8"` (weights only), another scheme,
            or a mapping with a `scheme` and further settings. `docs/guides/edge.md` describes the schemes and their
            costs. The text encoders and the VAE are not quantized.
        binding_times: split each graph by how often its values change: a prelude that runs once per generation, a table
            that runs once per timestep, and the step (`docs/guides/binding-times.md`). A runtime that keeps only one
            graph open at a time then needs less memory. None means only for the format `onnx`.
        overwrite: replace the bundle that is in `folder`.
        progress: called with a line of text at the start of each stage. By default, the stages are shown on stderr,
            unless the progress bars of diffusers are disabled (`diffusers.utils.logging.disable_progress_bar()`) or
            stderr is not a terminal. Stages are also logged at the level INFO.

    Returns:
        `folder`.

    Raises:
        ConfigurationError: an argument is wrong, or a package is missing.
        UnsupportedModelError: the graphs of this pipeline cannot be stored in a bundle.
        CaptureError: the denoiser's code depends on a size that `dynamic` names.
        BundleError: the bundle cannot be written, or a graph is not correct. `folder` is then unchanged.
    """
    check_pipeline_first("export", pipe, folder, format)
    if not isinstance(format, str) or format not in FORMATS:
        known = ", ".join(f'"{name}"' for name in FORMATS)
        message = f"format must be one of {known}, but got {format!r}."
        if folder in FORMATS:
            message += f' The folder comes first: export(pipe, "{format}", format="{folder}").'
        raise ConfigurationError(message + did_you_mean(format, FORMATS))
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ConfigurationError(f"folder must be a str or a Path, but got {folder!r}.")
    free = _free(dynamic, format)
    if components not in COMPONENTS:
        raise ConfigurationError(f"components must be {' or '.join(map(repr, COMPONENTS))}, but got {components!r}.")
    if binding_times not in (True, False, None):
        raise ConfigurationError(f"binding_times must be True, False or None, but got {binding_times!r}.")
    split = FORMATS[format].splits if binding_times is None else binding_times
    state = required_state_of(pipe)
    pipeline = state.pipeline_class.__name__
    if len(state.hooks) > 1:
        raise UnsupportedModelError(
            f"This {pipeline} has several denoisers ({' and '.join(state.hooks)}), but a bundle can hold the graphs "
            "of only one. Bundles with several denoisers are not supported yet."
        )
    ((component, hook),) = state.hooks.items()
    if call is not None:
        check_call(call, state.pipeline_class)
        for name in ("height", "width"):
            _check_multiple(pipe, hook.denoiser, name, call.get(name), free)
    if not isinstance(hook.store, VariantStore):
        raise ConfigurationError(
            f"This {pipeline} is already served from a bundle. Copy that bundle, or call restore(pipe) and "
            "optimize(pipe, ...) first."
        )
    if hook.config.precision != "auto":
        raise ConfigurationError(
            f'This {pipeline} computes in {hook.config.precision} (precision="{hook.config.precision}"), but bundles '
            "have the dtype of the pipeline. Call restore(pipe), then optimize(pipe, ...) without precision."
        )
    if hook.config.schedule.guidance_similarity is not None:
        raise UnsupportedModelError(
            "This schedule ends guidance when the predictions are similar (guidance_similarity), so the graphs that a "
            "call needs are only known while it runs. For a bundle, use a gate_step or a guidance_step instead."
        )
    if hook.config.schedule.estimating is not None:
        raise UnsupportedModelError(
            f"This schedule estimates predictions ({hook.config.schedule.estimating.title}), which is computed between "
            "the graphs, and the runtimes of bundles do not do that. Leave the method out."
        )
    if values_read(hook.denoiser):
        raise UnsupportedModelError(
            f"The graphs of {type(hook.denoiser).__name__} are valid only for inputs with the same values "
            f"({', '.join(values_read(hook.denoiser))}), such as prompts of one length, and a generation with guidance "
            "has a prompt and a negative prompt of different lengths. Use the optimized pipeline, which captures a "
            "graph for each length."
        )
    check_can_write(format)
    rounded, quantized = rounded_input(hook.denoiser), wrapped_weight(hook.denoiser)
    model = type(hook.denoiser).__name__
    if rounded is not None:
        raise UnsupportedModelError(
            f"{model} was quantized by torchao so that layers round their inputs to few bits at run time ({rounded} "
            "and others). Bundles do not support this: most formats have no operator for it, and AOTInductor rounds "
            "values halfway between integers differently, so its graphs cannot be checked against PyTorch. Use "
            "Int8WeightOnlyConfig, whose weights stay int8 in a bundle, or export the original model with "
            'quantize="int8-dynamic".'
        )
    if quantized is not None and not FORMATS[format].quantized_weights:
        raise UnsupportedModelError(
            f'{model} was quantized by torchao, and the converter of format="{format}" does not support its weights '
            f'({quantized} and others). Export the original model with quantize="int8-dynamic", or choose another '
            'format, such as "onnx".'
        )
    quantization = read_quantization(quantize, format, FORMATS[format].schemes)
    if hook.config.schedule.rule is not None and quantization is not None and quantization.calibrated:
        raise UnsupportedModelError(
            "Steps of this schedule are decided while they run, so the inputs of its graphs cannot be recorded for a "
            f'calibration. Use a scheme without one, such as quantize="int8", instead of {quantization.scheme!r}.'
        )
    options = dict(format_options or {})
    format_called(format).check_options(options)
    # Imported here because pydantic is an optional dependency.
    from tgate_compile.bundle.write import check_target, write_bundle

    call = {} if call is None else call
    if "prompt" not in call and call.get("prompt_embeds") is None:
        call = {"prompt": "", **call}
    has_no_prompt = not call.get("prompt") and call.get("prompt_embeds") is None
    if has_no_prompt and quantization is not None and quantization.calibrated:
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
    # Exporters change the state of the whole process, as torch.export does.
    with exclusive(), _stages(progress) as report:
        report("Capturing the graphs")
        plan = preview(pipe, call)[component]
        if "reference" in hook.config.schedule.kinds and all(
            call.image is None for of_step in plan.graphs for _, call in of_step
        ):
            raise ConfigurationError(MSG_NO_REFERENCE.format(pipeline=pipeline))
        write_bundle(
            pipe,
            component,
            hook,
            plan,
            target,
            graph_format=format,
            options=options,
            free=free,
            split=split,
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
    """Raise ConfigurationError unless graphs that leave this height or width free can be captured at `size` pixels."""
    pixels = getattr(pipe, "vae_scale_factor", None)
    if free is None or name not in free or not isinstance(pixels, int) or not isinstance(size, int):
        return
    multiple = pixels * downsampling(denoiser)
    if size % multiple:
        raise ConfigurationError(
            f"For graphs with a free {name}, {name} must be a multiple of {multiple} pixels, but got {size}. The "
            f"nearest multiples are {nearest_multiples(size, multiple)}. To export a bundle for this {name} only, "
            f"leave {name} out of dynamic."
        )


@contextmanager
def _stages(progress: Callable[[str], None] | None) -> Iterator[Callable[[str], None]]:
    """Yield the function to call at the start of each stage."""
    # disable=None shows the bar only if stderr is a terminal.
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
            'dynamic must be True (whatever the denoiser permits), False, or a list of names out of "batch", "height", '
            f'"width" and "text", but got {dynamic!r}.'
        )
    if fixed and dynamic:
        raise ConfigurationError(
            f'format="{format}" supports only fixed sizes, but got dynamic={dynamic!r}. Leave dynamic out; the sizes '
            "are those of `call`."
        )
    return tuple(dynamic)
