"""`tgate-compile export`: a model's graphs for other runtimes, as a bundle."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, print_json
from tgate_compile._cli.settings import ScheduleOptions, chosen_for
from tgate_compile._errors import ConfigurationError, check_installed
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.formats import check_can_write
from tgate_compile.bundle.quantization import CALIBRATED, SCHEMES, read_quantization

#: The formats of `tgate_compile.export`.
Format = Enum("Format", {name: name for name in FORMATS}, type=str)  # type: ignore[misc]
ONNX = Format("onnx")
#: The schemes of `tgate_compile.export(..., quantize=)`.
Scheme = Enum("Scheme", {name: name for name in SCHEMES}, type=str)  # type: ignore[misc]


class Components(str, Enum):
    """The parts of a pipeline to export."""

    denoiser = "denoiser"
    all = "all"


#: Number of demo prompts for calibrated schemes on an embedded pipeline.
CALIBRATION_PROMPTS = 4
#: The time for writing and checking ONNX graphs, as a multiple of the time of their capture: between 2.3 (the embedded
#: model) and 3.8 (SDXL, docs/guides/exporting.md).
AFTER_CAPTURE = 3.5

MSG_NO_SCHEME = "--quantize-option needs --quantize, which is missing. Add it."
MSG_OPTION = "{option} takes NAME=VALUE, where VALUE is JSON or plain text, but got {given!r}."


def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.", rich_help_panel=options.OUTPUT)],
    model: options.Model = None,
    *,
    loading: options.LoadingOnCpu,
    format: Annotated[
        Format, typer.Option("--format", metavar="NAME", help=f"File format of the graphs: {', '.join(FORMATS)}.")
    ] = ONNX,
    format_option: Annotated[
        list[str] | None,
        typer.Option(
            "--format-option",
            metavar="NAME=VALUE",
            help="An option of the format (see docs/guides/exporting.md); repeatable.",
        ),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Fix batch, height and width.")] = False,
    components: Annotated[
        Components, typer.Option("--components", help="all adds text encoders, tokenizers and VAE, which `run` needs.")
    ] = Components.denoiser,
    quantize: Annotated[
        Scheme | None,
        typer.Option(
            "--quantize",
            metavar="NAME",
            help=f"Store or compute in fewer bits: {', '.join(SCHEMES)} (see docs/guides/edge.md).",
        ),
    ] = None,
    quantize_option: Annotated[
        list[str] | None,
        typer.Option(
            "--quantize-option",
            metavar="NAME=VALUE",
            help="An option of --quantize, such as skip or block; repeatable.",
        ),
    ] = None,
    binding_times: Annotated[
        bool | None,
        typer.Option(
            help="Split graphs into a prelude, a table and a step (see docs/guides/binding-times.md).",
            show_default="where it saves memory",
        ),
    ] = None,
    image: options.Image,
    num_images: options.NumImages = 1,
    schedule: ScheduleOptions,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Export a model's graphs with a schedule into a folder, for another runtime."""
    format_options = _parsed("--format-option", format_option or [])
    quantization = _quantization(quantize, quantize_option or [])
    read_quantization(quantization, format.value, FORMATS[format.value].schemes)
    schedule.check_known_in_advance()
    check_can_write(format.value)
    if components is Components.all:
        check_can_write("onnx")  # the format of the components
        check_installed("tokenizers", what="--components all")
    began = time.perf_counter()
    progress = _progress(began, shown=not json)
    from tgate_compile.bundle.write import check_target

    check_target(out, overwrite=force)
    progress("Loading the model")
    loaded = loading.load(model)
    settings, chosen = chosen_for(loaded, loading, image, schedule, shown=not json)
    if loaded.is_embedded and quantization is not None and quantization["scheme"] in CALIBRATED:
        from tgate_compile._cli.loading import demo_prompts

        quantization = {"calibration_prompts": demo_prompts(CALIBRATION_PROMPTS), **quantization}
    tgate_compile.optimize(loaded.pipe, schedule=chosen, backend="eager")
    call: dict[str, Any] = {"prompt": "", **loaded.call, **image.size}
    call |= {"num_inference_steps": settings.steps, **loaded.guided(settings.guidance)}
    if num_images > 1:
        call["num_images_per_prompt"] = num_images
    folder = tgate_compile.export(
        loaded.pipe,
        out,
        format.value,
        call=call,
        dynamic=not static,
        format_options=format_options,
        components=components.value,
        quantize=quantization,
        binding_times=binding_times,
        overwrite=force,
        progress=progress,
    )
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if json:
        about = {"model": loaded.source, "folder": str(folder), "format": format.value, "schedule": str(chosen)}
        print_json(about | {"bytes": size, "seconds": seconds})
    else:
        OUT.print(f"{loaded.source}: {chosen}, {size / 1e6:.1f} MB, in {seconds:.1f} s", soft_wrap=True)
        OUT.print(f"written   {folder}", soft_wrap=True)


def _progress(began: float, *, shown: bool) -> Callable[[str], None]:
    """Return a function that prints a stage and its start time on stderr, and the time left once capture has ended."""
    captures: list[float] = []

    def print_stage(stage: str) -> None:
        now = time.perf_counter()
        left = ""
        if len(captures) == 1:
            seconds = AFTER_CAPTURE * (now - captures[0])
            left = f", about {seconds / 60:.0f} min to go" if seconds > 90 else f", about {seconds:.0f} s to go"
            captures.append(now)
        elif stage.startswith("Capturing"):
            captures.append(now)
        if shown:
            ERR.print(f"[dim]{now - began:6.1f} s[/]  {stage}{left}", soft_wrap=True)

    return print_stage


def _quantization(scheme: Scheme | None, options: list[str]) -> dict[str, object] | None:
    """Return the argument `quantize` of the export."""
    if scheme is None:
        if options:
            raise ConfigurationError(MSG_NO_SCHEME)
        return None
    return {"scheme": scheme.value, **_parsed("--quantize-option", options)}


def _parsed(option: str, given: list[str]) -> dict[str, object]:
    parsed: dict[str, object] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise ConfigurationError(MSG_OPTION.format(option=option, given=one))
        try:
            parsed[name] = jsonlib.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed
