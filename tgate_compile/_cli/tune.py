"""`tgate-compile tune`: measure schedules on a few prompts, and keep the cheapest that is close enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli import options as prompt_options
from tgate_compile._cli.console import OUT, check_targets, coloured, make_progress, print_json
from tgate_compile._cli.options import embedded_name
from tgate_compile._cli.settings import print_chosen, settings_for
from tgate_compile.study.figures import check_figure
from tgate_compile.study.tuning import DEFAULT_TOLERANCE

if TYPE_CHECKING:
    from tgate_compile.study.tuning.calibrate import TeaCacheFit
    from tgate_compile.study.tuning.result import Tuning, TuningRow

_EMBEDDED_PROMPTS = 4


def tune(
    model: options.Model = None,
    *,
    loading: options.Loading,
    prompt: prompt_options.Prompt = None,
    prompts: prompt_options.Prompts = None,
    count: prompt_options.Count = None,
    seeds: prompt_options.Seeds = None,
    image: options.Image,
    tolerance: Annotated[
        float, typer.Option(help="Allowed drift of the final latents, as a fraction of their norm.")
    ] = DEFAULT_TOLERANCE,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Instead of --tolerance: the largest cost, as a fraction of the plain pipeline's operations, such as "
            "0.5. Also searches for the steps at which layers are best reused, which takes long.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the schedule to this .json file.", rich_help_panel=options.OUTPUT),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the measurements into this .png, .svg or .pdf file. Needs matplotlib.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    magcache: Annotated[
        bool,
        typer.Option(
            "--magcache", help="Measure only the ratios that MagCache needs, and write MagCache with them to --out."
        ),
    ] = False,
    teacache: Annotated[
        bool,
        typer.Option(
            "--teacache", help="Fit only the polynomial that TeaCache needs, and write TeaCache with it to --out."
        ),
    ] = False,
    skip: Annotated[
        float | None,
        typer.Option(
            help="With --teacache: the share of the steps that the threshold is chosen to skip.", show_default="0.5"
        ),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Find the cheapest schedule whose images stay close to the plain pipeline's, on a few prompts."""
    embedded = None if embedded_name(model) is None else _EMBEDDED_PROMPTS
    texts = prompt_options.chosen_prompts(prompt, prompts, count, embedded=embedded)
    if magcache and teacache:
        raise typer.BadParameter("--magcache and --teacache write different methods. Run the command twice.")
    if plot is not None and (magcache or teacache):
        given = "--magcache" if magcache else "--teacache"
        raise typer.BadParameter(f"{given} measures no schedules, so there is nothing for --plot to draw.")
    if skip is not None and not teacache:
        raise typer.BadParameter("--skip needs --teacache.")
    if plot is not None:
        check_figure(plot)
    check_targets([path for path in (out, plot) if path is not None], force=force)
    loaded = loading.load(model)
    settings = settings_for(loaded, steps=image.steps, guidance=image.guidance, gate_step=None, tgate=False)
    print_chosen(loaded, loading, image, settings)
    call: dict[str, Any] = {**loaded.call, **loaded.guided(settings.guidance), **image.size}
    common: dict[str, Any] = {"num_inference_steps": settings.steps, "seeds": seeds or (0,), "call": call}
    with make_progress(shown=not json) as progress:
        task = progress.add_task("plain", total=None)

        def update(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        if magcache:
            method = tgate_compile.calibrate_mag_cache(loaded.pipe, texts, **common, progress=update)
        elif teacache:
            from tgate_compile.study.tuning.calibrate import fit_tea_cache
            from tgate_compile.study.tuning.request import Runs

            runs = Runs(texts, **common, verb="tune")
            fit = fit_tea_cache(loaded.pipe, runs, skip=0.5 if skip is None else skip, progress=update)
        else:
            tuning = tgate_compile.tune(
                loaded.pipe, texts, tolerance=tolerance, budget=budget, **common, progress=update
            )
    if magcache:
        _report_ratios(loaded.source, method, settings.steps, out, json=json)
        return
    if teacache:
        _report_fit(loaded.source, fit, settings.steps, out, json=json)
        return
    if out is not None:
        tuning.save(out)
    if plot is not None:
        tuning.plot(plot)
    written = {name: str(path) for name, path in (("out", out), ("plot", plot)) if path is not None}
    if json:
        print_json({"model": loaded.source} | tuning.as_dict() | {"strip": tuning.chosen.strip, "written": written})
        return
    _print_table(tuning)
    for path in written.values():
        OUT.print(f"written {path}", soft_wrap=True)


def _report_ratios(source: str, method: tgate_compile.MagCache, steps: int, out: Path | None, *, json: bool) -> None:
    """Write and print MagCache with the ratios that were measured."""
    schedule = tgate_compile.Schedule.of(method)
    strip = schedule.strip(steps)
    if out is not None:
        tgate_compile.save_schedule(schedule, out, {"model": source, "num_inference_steps": steps})
    if json:
        written = {} if out is None else {"out": str(out)}
        print_json({"model": source, "ratios": list(method.ratios), "strip": strip, "written": written})
        return
    OUT.print(Text.assemble((str(schedule), "bold"), "  ", coloured(strip)), soft_wrap=True)
    OUT.print("ratios: " + ", ".join(f"{ratio:.4f}" for ratio in method.ratios), soft_wrap=True)
    if out is not None:
        OUT.print(f"written {out}", soft_wrap=True)


def _report_fit(source: str, fit: TeaCacheFit, steps: int, out: Path | None, *, json: bool) -> None:
    """Write and print TeaCache with the polynomial that was fitted, and what other thresholds would skip."""
    method = fit.method
    schedule = tgate_compile.Schedule.of(method)
    r_squared = {value: round(found.r_squared, 4) for value, found in fit.fits.items()}
    skipped = {f"{threshold:g}": round(share, 4) for threshold, share in fit.skipped.items()}
    found = {"model": source, "r_squared": r_squared, "skipped": skipped}
    if out is not None:
        tgate_compile.save_schedule(schedule, out, {**found, "num_inference_steps": steps})
    if json:
        written = {} if out is None else {"out": str(out)}
        fitted = {
            "coefficients": list(method.coefficients), "measured": method.measured, "threshold": method.threshold,
        }  # fmt: skip
        print_json(found | fitted | {"strip": schedule.strip(steps), "written": written})
        return
    OUT.print(Text.assemble((str(schedule), "bold"), "  ", coloured(schedule.strip(steps))), soft_wrap=True)
    for value, quality in r_squared.items():
        OUT.print(f"{value}: R² {quality:.3f}{' (chosen)' if value == method.measured else ''}", soft_wrap=True)
    table = Table("threshold", "steps skipped", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for threshold, share in fit.skipped.items():
        style = "bold green" if threshold == method.threshold else ""
        table.add_row(*(Text(cell, style, justify="right") for cell in (f"{threshold:g}", f"{share:.0%}")))
    OUT.print(table)
    if out is not None:
        OUT.print(f"written {out}", soft_wrap=True)


def _print_table(tuning: Tuning) -> None:
    table = Table("", "schedule", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("cost", "drift", "worst", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in tuning.table:
        table.add_row(*_cells(row, chosen=row is tuning.chosen))
    OUT.print(table)
    chosen = tuning.chosen
    OUT.print(Text.assemble((str(tuning.schedule), "bold"), "  ", coloured(chosen.strip)), soft_wrap=True)
    OUT.print(
        f"{chosen.cost:.3f} of the plain pipeline's operations, drift {chosen.drift:.3f}, "
        f"{tuning.limit}; {tuning.num_steps} steps of {tuning.setting['scheduler']}",
        soft_wrap=True,
    )
    for remark in tuning.remarks:
        OUT.print(remark, soft_wrap=True)


def _cells(row: TuningRow, *, chosen: bool) -> list[Text]:
    style = "bold green" if chosen else "" if row.within else "dim"
    time = "" if row.time is None else f"{row.time:.2f}"
    numbers = [f"{value:.3f}" for value in (row.cost, row.drift, row.worst)]
    return [Text(cell, style) for cell in ("*" if chosen else "", row.label, *numbers, time)]
