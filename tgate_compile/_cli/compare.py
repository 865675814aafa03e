"""`tgate-compile compare`: methods side by side on several models, as one HTML file."""

from __future__ import annotations

import json as json_format
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tgate_compile._cli import options
from tgate_compile._cli import options as prompt_options
from tgate_compile._cli.console import OUT, make_progress, print_json, print_note
from tgate_compile._cli.loading import EMBEDDED_PREFIX, MSG_CONFIG_ALONE, embedded_name, load, settings_for
from tgate_compile._cli.options import choose_device
from tgate_compile._cli.pictures import check_targets
from tgate_compile._demo.variants import DEMO_VARIANTS
from tgate_compile._errors import ConfigurationError
from tgate_compile.study.bench.measure import machine_of
from tgate_compile.study.comparison.page import check_page_can_be_made, page_of
from tgate_compile.study.comparison.result import Comparison, ModelFigures, Pictures
from tgate_compile.study.comparison.run import Progress, Task, compare_model, seeds_for

logger = logging.getLogger(__name__)

_PROMPTS = 5

#: For models that know more than coloured shapes.
DEFAULT_PROMPTS = (
    "a red fox in the snow",
    "a portrait of an old fisherman",
    "a street at night in the rain",
    "a bowl of fruit on a wooden table",
    "an astronaut riding a horse, oil painting",
)

MSG_FAILED = "{model}: {reason}"


def compare(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder with a diffusers pipeline, a .safetensors file, a hub id, or embedded:sd and the like; "
            "several times.",
            show_default="all the embedded ones",
        ),
    ] = None,
    model_config: options.ModelConfig = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for comparison.html and comparison.json.")] = Path(
        "tgate-comparison"
    ),
    prompt: prompt_options.Prompt = None,
    prompts: prompt_options.Prompts = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first prompt's noise; the next one's is one more.")] = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    gate_step: options.GateStep = None,
    height: options.Height = None,
    width: options.Width = None,
    scheduler: options.Scheduler = None,
    backend: Annotated[
        options.Backend, typer.Option(help="Of all but the plain pipelines; inductor compiles for minutes.")
    ] = options.Backend.eager,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json: options.Json = False,
) -> None:
    """Compare T-GATE, DeepCache, Adaptive Guidance and fewer steps with the plain pipeline: images, time, likeness."""
    names = model or [f"{EMBEDDED_PREFIX}{variant}" for variant in DEMO_VARIANTS]
    if model_config is not None and not any(Path(name).is_file() for name in names):
        raise ConfigurationError(MSG_CONFIG_ALONE.format(given=", ".join(names)))
    given = prompt_options.chosen_prompts(prompt, prompts, embedded=0)
    check_page_can_be_made()
    page, data = out / "comparison.html", out / "comparison.json"
    check_targets([page, data], force=force)
    settings: dict[str, Any] = {
        "seed": seed, "steps": steps, "guidance": guidance, "gate_step": gate_step, "backend": backend.value,
        "size": {name: side for name, side in (("height", height), ("width", width)) if side is not None},
        "loading": {"model_config": model_config, "device": device, "dtype": dtype, "scheduler": scheduler},
    }  # fmt: skip
    figures: list[ModelFigures] = []
    pictures: dict[str, Pictures] = {}
    with make_progress(shown=not json) as progress:
        for name in dict.fromkeys(names):
            bar = progress.add_task(f"{name}: loading", total=None)

            def show(done: int, total: int, what: str, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total, description=what)

            try:
                of_model, pictures[name] = _compare_one(name, given, progress=show, **settings)
            except Exception as error:
                if len(names) == 1:
                    raise
                # A model that fails is told of, and does not take the others' results with it.
                logger.info("%s failed", name, exc_info=True)
                of_model = ModelFigures(name, error=f"{type(error).__name__}: {error}")
                print_note(MSG_FAILED.format(model=name, reason=error))
            figures.append(of_model)
            progress.update(bar, completed=1, total=1, description=name)
    command = shlex.join(["tgate-compile", *sys.argv[1:]])
    result = Comparison(command, machine_of(choose_device(device)), tuple(figures), pictures)
    page.write_text(page_of(result), encoding="utf-8")
    data.write_text(json_format.dumps(result.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if json:
        print_json(result.as_dict() | {"written": {"page": str(page), "figures": str(data)}})
        return
    for of_model in figures:
        if of_model.error is None:
            OUT.print(_table(of_model))
    OUT.print(f"Page: {page}\nFigures: {data}", soft_wrap=True)


def _compare_one(
    name: str,
    given: list[str],
    *,
    seed: int,
    steps: int | None,
    guidance: float | None,
    gate_step: float | None,
    backend: str,
    size: dict[str, int],
    loading: dict[str, Any],
    progress: Progress,
) -> tuple[ModelFigures, Pictures]:
    if not Path(name).is_file():
        loading = loading | {"model_config": None}  # it is for single files
    loaded = load(name, **loading)
    settings = settings_for(loaded, steps=steps, guidance=guidance, gate_step=gate_step)
    own = prompt_options.chosen_prompts(None, None, embedded=_PROMPTS) if loaded.is_embedded else [*DEFAULT_PROMPTS]
    texts = tuple(given or own)
    task = Task(
        prompts=texts,
        seeds=seeds_for(texts, seed),
        steps=settings.steps,
        gate=settings.gate,
        call={**loaded.call, "guidance_scale": settings.guidance, **size},
        backend=backend,
    )
    return compare_model(name, loaded.pipe, task, judged=embedded_name(name) is not None, progress=progress)


def _table(model: ModelFigures) -> Table:
    table = Table(title=model.name, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("time/s", "speed", "MACs", "PSNR", "drift", "right"):
        table.add_column(heading, justify="right", no_wrap=True)
    reasons = []
    for method in model.methods:
        if method.why_not is not None:
            reasons.append(f"{method.title}: {method.why_not}")
            continue
        unreliable = model.why_unreliable(method)
        if unreliable is not None:
            reasons.append(f"{method.title}: ?: its time is unreliable: {unreliable}")
        numbers = (
            (method.seconds, ".3f"), (model.speedup(method) if unreliable is None else "?", ".2f"),
            (model.cost(method), ".3f"), (method.psnr, ".1f"), (method.drift, ".3f"), (method.right, "d"),
        )  # fmt: skip
        table.add_row(
            method.title,
            *(value or "" if isinstance(value, str | None) else format(value, form) for value, form in numbers),
        )
    table.caption = "\n".join(reasons)
    table.caption_justify = "left"
    return table
