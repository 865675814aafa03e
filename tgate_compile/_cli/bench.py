"""`tgate-compile bench`: schedules on backends, and other packages, timed side by side."""

from __future__ import annotations

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tgate_compile._cli import options
from tgate_compile._cli import settings as schedule_options
from tgate_compile._cli.console import OUT, check_targets, make_progress, print_json, print_note
from tgate_compile._cli.options import EMBEDDED_NAMES, recognise
from tgate_compile._cli.settings import print_chosen, settings_for
from tgate_compile._errors import ConfigurationError
from tgate_compile._runtimes import BACKENDS, is_backend_installed
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.bench.methods import (
    FEWER_STEPS,
    NAMES,
    PEERS,
    PLAIN,
    Peer,
    check_random_model,
    methods_for,
    random_pipeline,
)
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow

RANDOM_PREFIX = "random:"

MSG_NO_GPU = "--cuda-graphs needs a CUDA GPU, but the device is {device}. Leave it out."
MSG_NO_PEER = "--peer {peers}: not installed. Run pip install {packages}."
MSG_LEFT_OUT = "Skipped, because they are not installed: {peers}. To measure them too, run pip install {packages}."
MSG_UNKNOWN = "--{option} must be one of {known}, but got {given!r}."

_METHODS = tuple(method.key for method in methods_for(1) if method.key not in (PLAIN, FEWER_STEPS))
_PROMPT = "a red fox in the snow"


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder with a diffusers pipeline, a .safetensors file, a hub id, an embedded model "
            f"({EMBEDDED_NAMES}), or random weights in a denoiser of real size: "
            f"{', '.join(RANDOM_PREFIX + name for name in NAMES)}.",
            show_default="embedded:sd",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    *,
    loading: options.Loading,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"{', '.join(_METHODS)}; repeatable.", show_default="all"),
    ] = None,
    backend: Annotated[
        list[options.Backend] | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(each.value for each in options.Backend)}; repeatable.",
            show_default="all that are installed",
        ),
    ] = None,
    precision: options.PrecisionOption = options.OWN,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(each.key for each in PEERS)}; repeatable.",
            show_default="all that are installed",
        ),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also time other packages and diffusers' own methods.")
    ] = True,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Also time the inductor backend with CUDA graphs.",
            show_default="on GPUs",
        ),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Use this memory format for all contenders: faster on most GPUs.")
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Images to time after the first; the median is reported.")] = 5,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="What to show.", show_default="one", rich_help_panel=options.IMAGE),
    ] = None,
    seed: options.Seed = 0,
    image: options.Image,
    gate_step: options.GateStep = None,
    schedule: schedule_options.Files = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the figures to this .json file.", rich_help_panel=options.OUTPUT),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Time schedules on backends, and other packages, against the plain pipeline: interleaved, in one process."""
    chosen_peers = _peers(peer) if peers else []
    chosen_methods = _named(method, dict.fromkeys(_METHODS), "method", keys=True)
    more = schedule_options.methods_in(schedule)
    for each in backend or ():
        options.check_backend(each)
    if model is not None and model.startswith(RANDOM_PREFIX):
        check_random_model(model.removeprefix(RANDOM_PREFIX))
    if out is not None:
        check_targets([out], force=force)
    with make_progress(shown=not json) as progress:
        bar = progress.add_task("Loading the model", total=None)
        from tgate_compile.study.bench.run import Task, run_benchmark, to_channels_last

        backends = _backends(backend, loading.device, cuda_graphs)
        pipe, call, num_steps, gate = _load(model, loading, prompt, image, gate_step)
        if channels_last:
            to_channels_last(pipe)
        benchmark = run_benchmark(
            pipe,
            Task(call, num_steps, gate, repeat=repeat, seed=seed, precision=precision.value),
            [*(each for each in methods_for(gate) if each.key in (PLAIN, *chosen_methods)), *more],
            backends,
            chosen_peers,
            progress=lambda done, total, what: progress.update(bar, completed=done, total=total, description=what),
        )
        progress.update(bar, completed=1, total=1, description="Timed")
    data = {"command": shlex.join(["tgate-compile", *sys.argv[1:]]), "model": model or "embedded:sd"}
    data |= benchmark.as_dict()
    if out is not None:
        out.write_text(json_format.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if json:
        print_json(data)
        return
    OUT.print(_table(benchmark))
    for row in benchmark.rows:
        if row.error is not None:
            OUT.print(f"{row.title}: {row.error}", soft_wrap=True, markup=False)
        elif (reason := benchmark.why_unreliable(row)) is not None:
            OUT.print(f"{row.title}: ?: its time is unreliable: {reason}", soft_wrap=True, markup=False)
    if out is not None:
        OUT.print(f"written {out}", soft_wrap=True)


def _named(given: list[str] | None, known: dict[str, Any], option: str, *, keys: bool = False) -> list[Any]:
    for name in given or ():
        if name not in known:
            raise ConfigurationError(MSG_UNKNOWN.format(option=option, known=", ".join(known), given=name))
    return [name if keys else value for name, value in known.items() if not given or name in given]


def _peers(given: list[str] | None) -> list[Peer]:
    """Return the installed peers. Print which are missing, or raise an error if they were asked for."""
    chosen: list[Peer] = _named(given, {each.key: each for each in PEERS}, "peer")
    absent = [each for each in chosen if not each.is_installed]
    if absent:
        keys = ", ".join(each.key for each in absent)
        missing = {"peers": keys, "packages": " ".join(dict.fromkeys(each.package for each in absent))}
        if given:
            raise ConfigurationError(MSG_NO_PEER.format(**missing))
        print_note(MSG_LEFT_OUT.format(**missing))
    return [each for each in chosen if each.is_installed]


def _backends(given: list[options.Backend] | None, device: str, cuda_graphs: bool | None) -> list[str]:
    from tgate_compile._cli.loading import choose_device
    from tgate_compile.study.bench.run import CUDA_GRAPHS

    on_gpu = choose_device(device).type == "cuda"
    if cuda_graphs and not on_gpu:
        raise ConfigurationError(MSG_NO_GPU.format(device=choose_device(device)))
    if given:
        names = list(dict.fromkeys(each.value for each in given))
    else:
        # Engines need a GPU.
        usable = [name for name, entry in BACKENDS.items() if on_gpu or not entry.needs_gpu]
        names = sorted((name for name in usable if is_backend_installed(name)), key=lambda name: name != "eager")
    if "inductor" in names and (on_gpu if cuda_graphs is None else cuda_graphs):
        names.insert(names.index("inductor") + 1, CUDA_GRAPHS)
    return names


def _load(
    model: str | None, loading: options.Loading, prompt: str | None, image: options.Image, gate_step: float | None
) -> tuple[Any, dict[str, Any], int, int]:
    """Return the pipeline, the arguments of a call, the number of steps and the gate."""
    from tgate_compile._cli.loading import Loaded, demo_prompts, load

    if model is not None and model.startswith(RANDOM_PREFIX):
        from tgate_compile._cli.loading import DTYPES, choose_device, choose_dtype

        device = choose_device(loading.device)
        dtype = choose_dtype(loading.dtype, "StableDiffusionPipeline", device)
        side = next(iter(image.size.values()), None)
        pipe, call = random_pipeline(model.removeprefix(RANDOM_PREFIX), device, DTYPES[dtype], size=side)
        loaded = Loaded(pipe, recognise(pipe), model, device, dtype.value)
    else:
        loaded = load(model, **loading.arguments())
        prompt = prompt or (demo_prompts(1)[0] if loaded.is_embedded else _PROMPT)
        call = {**loaded.call, "prompt": prompt, **image.size}
    settings = settings_for(loaded, steps=image.steps, guidance=image.guidance, gate_step=gate_step)
    print_chosen(loaded, loading, image, settings, Schedule(settings.gate_step) if gate_step is None else None)
    call |= {**loaded.guided(settings.guidance), "num_inference_steps": settings.steps}
    return loaded.pipe, call, settings.steps, settings.gate


def _table(benchmark: Benchmark) -> Table:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("contender")
    headings = ("image\n/s", "speed", "MACs", "eff.", "early\n/ms", "late\n/ms", "first\n/s", "peak\n/MB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in benchmark.rows:
        table.add_row(row.title, *(("failed",) if row.error is not None else _cells(benchmark, row)))
    return table


def _cells(benchmark: Benchmark, row: BenchmarkRow) -> list[str]:
    early, late = (1e3 * sorted(times)[len(times) // 2] if times else None for times in (row.early, row.late))
    peak = None if row.peak_bytes is None else row.peak_bytes / 1e6
    sure = benchmark.why_unreliable(row) is None
    efficiency = benchmark.efficiency(row)
    numbers = (
        (row.image, ".3f"), (benchmark.speedup(row) if sure else "?", ".2f"), (benchmark.macs_ratio(row), ".3f"),
        (efficiency if sure or efficiency is None else "?", ".2f"), (early, ".1f"), (late, ".1f"), (row.extra, ".1f"),
        (peak, ".1f"),
    )  # fmt: skip
    return [value or "" if isinstance(value, str | None) else format(value, form) for value, form in numbers]
