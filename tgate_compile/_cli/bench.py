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
from tgate_compile._cli.console import OUT, make_progress, print_json
from tgate_compile._cli.loading import load, settings_for
from tgate_compile._cli.options import DTYPES, choose_device, choose_dtype, demo_prompts, recognise
from tgate_compile._cli.pictures import check_targets
from tgate_compile._errors import ConfigurationError, is_installed
from tgate_compile._runtimes import BACKENDS
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.bench.methods import FEWER_STEPS, NAMES, PEERS, PLAIN, methods_for, random_pipeline
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow
from tgate_compile.study.bench.run import CUDA_GRAPHS, Task, run_benchmark, to_channels_last

RANDOM_PREFIX = "random:"

MSG_NO_GPU = "--cuda-graphs are for GPUs, and this runs on {device}."
MSG_UNKNOWN = "--{option} must be one of {known}, but got {given!r}."

_METHODS = tuple(method.key for method in methods_for(1) if method.key not in (PLAIN, FEWER_STEPS))
_PROMPT = "a red fox in the snow"


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder with a diffusers pipeline, a .safetensors checkpoint, a hub id, embedded:sd and the like, "
            f"or random weights in a denoiser of real size: {', '.join(RANDOM_PREFIX + name for name in NAMES)}.",
            show_default="embedded:sd",
        ),
    ] = None,
    model_config: options.ModelConfig = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(_METHODS)}; several times.", show_default="all"),
    ] = None,
    backend: Annotated[
        list[options.Backend] | None, typer.Option(help="Several times.", show_default="all that are installed")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(each.key for each in PEERS)}; several times.", show_default="all"),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Other packages, and diffusers' own ways.")] = True,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="The backend inductor with CUDA graphs, too.",
            show_default="on GPUs",
        ),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Weights in this layout, in all contenders: faster on most GPUs.")
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Images that are timed, after the first; the median counts.")] = 5,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to show.", show_default="one")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    gate_step: options.GateStep = None,
    height: options.Height = None,
    width: options.Width = None,
    scheduler: options.Scheduler = None,
    unet: options.Unet = None,
    lora: options.Lora = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the figures to this .json file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: options.Json = False,
) -> None:
    """Time schedules on backends, and other packages, beside the plain pipeline: in turns, in one process."""
    chosen_peers = _named(peer, {each.key: each for each in PEERS}, "peer") if peers else []
    chosen_methods = _named(method, dict.fromkeys(_METHODS), "method", keys=True)
    backends = _backends(backend, device, cuda_graphs)
    if out is not None:
        check_targets([out], force=force)
    with make_progress(shown=not json) as progress:
        bar = progress.add_task("Loading the model", total=None)
        pipe, call, num_steps, gate = _load(
            model, prompt=prompt, steps=steps, guidance=guidance, gate_step=gate_step,
            size={"height": height, "width": width}, device=device, dtype=dtype,
            others={"model_config": model_config, "scheduler": scheduler, "unet": unet, "lora": lora},
        )  # fmt: skip
        if channels_last:
            to_channels_last(pipe)
        benchmark = run_benchmark(
            pipe,
            Task(call, num_steps, gate, repeat=repeat, seed=seed),
            [each for each in methods_for(gate) if each.key in (PLAIN, *chosen_methods)],
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


def _backends(given: list[options.Backend] | None, device: str, cuda_graphs: bool | None) -> list[str]:
    on_gpu = choose_device(device).type == "cuda"
    if cuda_graphs and not on_gpu:
        raise ConfigurationError(MSG_NO_GPU.format(device=choose_device(device)))
    if given:
        names = list(dict.fromkeys(each.value for each in given))
    else:
        # Engines are for GPUs.
        usable = [name for name, entry in BACKENDS.items() if on_gpu or not entry.needs_gpu]
        installed = (name for name in usable if is_installed(*BACKENDS[name].needs))
        names = sorted(installed, key=lambda name: name != "eager")
    if "inductor" in names and (on_gpu if cuda_graphs is None else cuda_graphs):
        names.insert(names.index("inductor") + 1, CUDA_GRAPHS)
    return names


def _load(
    model: str | None,
    *,
    prompt: str | None,
    steps: int | None,
    guidance: float | None,
    gate_step: float | None,
    size: dict[str, int | None],
    device: str,
    dtype: options.Dtype,
    others: dict[str, str | None],
) -> tuple[Any, dict[str, Any], int, int]:
    """The pipeline, the arguments of its call, its steps and its gate."""
    if model is not None and model.startswith(RANDOM_PREFIX):
        torch_device = choose_device(device)
        chosen = DTYPES[choose_dtype(dtype, "StableDiffusionPipeline", torch_device)]
        side = next((side for side in size.values() if side is not None), None)
        pipe, call = random_pipeline(model.removeprefix(RANDOM_PREFIX), torch_device, chosen, size=side)
        family = recognise(pipe)
        num_steps = family.steps if steps is None else steps
        gate = Schedule(gate_step or max(1, round(num_steps * family.gate_step / family.steps))).gate(num_steps)
        call["guidance_scale"] = family.guidance if guidance is None else guidance
        return pipe, call | {"num_inference_steps": num_steps}, num_steps, gate
    loaded = load(model, device=device, dtype=dtype, **others)
    settings = settings_for(loaded, steps=steps, guidance=guidance, gate_step=gate_step)
    call = {
        **loaded.call,
        "prompt": prompt or (demo_prompts(1)[0] if loaded.is_embedded else _PROMPT),
        "guidance_scale": settings.guidance,
        "num_inference_steps": settings.steps,
        **{name: side for name, side in size.items() if side is not None},
    }
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
