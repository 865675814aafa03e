"""`tgate-compile compare`: methods side by side on several models, as one HTML file."""

from __future__ import annotations

import json as json_format
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tgate_compile._cli import options
from tgate_compile._cli import options as prompt_options
from tgate_compile._cli import settings as schedule_options
from tgate_compile._cli.console import OUT, check_targets, make_progress, print_json, print_note
from tgate_compile._cli.options import EMBEDDED_NAMES, EMBEDDED_PREFIX, MSG_CONFIG_ALONE, embedded_name
from tgate_compile._cli.settings import print_chosen, settings_for
from tgate_compile._demo import DEMO_VARIANTS
from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.bench.methods import COMPARED, ComparedMethod
from tgate_compile.study.comparison.page import check_page_can_be_made, page_of
from tgate_compile.study.comparison.result import Comparison, ModelFigures, Pictures

if TYPE_CHECKING:
    from tgate_compile.study.comparison.run import Progress

logger = logging.getLogger(__name__)

_PROMPTS = 5

#: For models that can draw more than coloured shapes.
DEFAULT_PROMPTS = (
    "a red fox in the snow",
    "a portrait of an old fisherman",
    "a street at night in the rain",
    "a bowl of fruit on a wooden table",
    "an astronaut riding a horse, oil painting",
)

MSG_UNKNOWN = "--method: expected one of {known}, but got {given!r}."
MSG_FAILED = "{model}: {reason}"


def compare(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A folder with a diffusers pipeline, a .safetensors file, a hub id, or an embedded model: "
            f"{EMBEDDED_NAMES}; repeatable.",
            show_default="all embedded models",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    *,
    loading: options.Loading,
    prompt: prompt_options.Prompt = None,
    prompts: prompt_options.Prompts = None,
    count: prompt_options.Count = None,
    seed: options.Seed = 0,
    image: options.Image,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"{', '.join(COMPARED)}; repeatable.", show_default="those that suit the model"
        ),
    ] = None,
    gate_step: options.GateStep = None,
    schedule: schedule_options.Files = None,
    backend: options.BackendOption = options.EAGER,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for comparison.html and comparison.json.", rich_help_panel=options.OUTPUT
        ),
    ] = Path("tgate-comparison"),
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Compare caching methods and fewer steps with the plain pipeline: images and timings."""
    names = model or [f"{EMBEDDED_PREFIX}{variant}" for variant in DEMO_VARIANTS]
    if loading.model_config is not None and not any(Path(name).is_file() for name in names):
        raise ConfigurationError(MSG_CONFIG_ALONE.format(given=", ".join(names)))
    chosen_backend = options.check_backend(backend)
    for each in method or ():
        if each not in COMPARED:
            raise ConfigurationError(MSG_UNKNOWN.format(known=", ".join(COMPARED), given=each))
    given = prompt_options.chosen_prompts(prompt, prompts, count, embedded=0)
    check_page_can_be_made()
    page, data = out / "comparison.html", out / "comparison.json"
    check_targets([page, data], force=force)
    settings: dict[str, Any] = {
        "count": _PROMPTS if count is None else count,
        "seed": seed,
        "image": image,
        "gate_step": gate_step,
        "backend": chosen_backend,
        "methods": tuple(method or ()),
        "more": schedule_options.methods_in(schedule),
    }
    figures: list[ModelFigures] = []
    pictures: dict[str, Pictures] = {}
    with make_progress(shown=not json) as progress:
        for name in dict.fromkeys(names):
            bar = progress.add_task(f"{name}: loading", total=None)
            # Only single files take a configuration.
            own = loading if Path(name).is_file() else replace(loading, model_config=None)

            def show(done: int, total: int, what: str, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total, description=what)

            try:
                of_model, pictures[name] = _compare_one(name, own, given, progress=show, **settings)
            except Exception as error:
                if len(names) == 1:
                    raise
                # A model that fails is reported, and the results of the others are kept.
                logger.info("%s failed", name, exc_info=True)
                of_model = ModelFigures(name, error=f"{type(error).__name__}: {error}")
                print_note(MSG_FAILED.format(model=name, reason=error))
            figures.append(of_model)
            progress.update(bar, completed=1, total=1, description=name)
    from tgate_compile._cli.loading import choose_device
    from tgate_compile.study.bench.measure import machine_of

    command = shlex.join(["tgate-compile", *sys.argv[1:]])
    result = Comparison(command, machine_of(choose_device(loading.device)), tuple(figures), pictures)
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
    loading: options.Loading,
    given: list[str],
    *,
    count: int,
    seed: int,
    image: options.Image,
    gate_step: float | None,
    backend: str,
    methods: tuple[str, ...],
    more: tuple[ComparedMethod, ...],
    progress: Progress,
) -> tuple[ModelFigures, Pictures]:
    from tgate_compile._cli.loading import load
    from tgate_compile.study.comparison.run import Task, compare_model, seeds_for

    loaded = load(name, **loading.arguments())
    settings = settings_for(loaded, steps=image.steps, guidance=image.guidance, gate_step=gate_step)
    print_chosen(loaded, loading, image, settings, Schedule(settings.gate_step) if gate_step is None else None)
    own = prompt_options.chosen_prompts(None, None, count, embedded=_PROMPTS) if loaded.is_embedded else []
    texts = tuple(given or own or DEFAULT_PROMPTS[:count])
    task = Task(
        prompts=texts,
        seeds=seeds_for(texts, seed),
        steps=settings.steps,
        gate=settings.gate,
        call={**loaded.call, **loaded.guided(settings.guidance), **image.size},
        backend=backend,
        methods=methods,
        more=more,
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
