"""Commands that show information about models, bundles and the disk cache.

`describe` shows the effect of a schedule on a model, `strip` its effect on each step, `inspect` the contents of a
bundle, and `cache` the contents of the cache on disk.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import tgate_compile
from tgate_compile._cache import FOLDER_VARIABLE, disk_cache
from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, check_targets, coloured, print_json
from tgate_compile._cli.settings import ScheduleOptions, chosen_for
from tgate_compile._errors import check_installed
from tgate_compile.methods.method import GRAPH_NAMES
from tgate_compile.methods.schedule_file import read_schedule
from tgate_compile.study.figures import check_figure, strip_picture

if TYPE_CHECKING:
    from tgate_compile._cli.console import Work
    from tgate_compile.bundle.manifest import Components, Graph
    from tgate_compile.bundle.read import Bundle
    from tgate_compile.pipeline.describe import Description


def describe(
    model: options.Model = None,
    *,
    loading: options.Loading,
    image: options.Image,
    schedule: ScheduleOptions,
    json: options.Json = False,
) -> None:
    """Show what a schedule does to a model: sites, graphs, parameters, multiply-accumulates. Runs no denoising step."""
    schedule.check_known_in_advance()
    loaded = loading.load(model)
    settings, chosen = chosen_for(loaded, loading, image, schedule, shown=not json)
    pipe = tgate_compile.optimize(loaded.pipe, schedule=chosen, backend="eager")
    call: dict[str, Any] = {"prompt": "", "output_type": "latent", **loaded.call, **image.size}
    call |= loaded.guided(settings.guidance)
    with ERR.status("Capturing the graphs"):
        from tgate_compile._cli.console import planned_calls, work_of

        description = tgate_compile.describe(pipe, **call, num_inference_steps=settings.steps)
    strip = description.strip
    work = work_of(description, planned_calls(pipe.scheduler, strip, settings.steps))
    if json:
        about = {k: v for k, v in description.as_dict().items() if k not in ("last_steps", "strip")}
        plan: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance, "strip": strip}
        plan |= {"gate": chosen.gate(settings.steps)} | work.as_dict()
        print_json({"model": loaded.source, "family": loaded.family.name} | about | {"plan": plan})
    else:
        _print_tables(description, chosen.kinds, work)


def _print_tables(description: Description, kinds: Collection[str], work: Work) -> None:
    what = "cross-attention sites" if kinds == {"cross"} else "sites"
    OUT.print(
        f"[bold]{description.pipeline}[/]: {description.denoiser}, {description.parameters / 1e6:.3f} M parameters, "
        f"{len(description.sites)} {what}",
        soft_wrap=True,
    )
    graphs = Table("graph", "latents", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("operators", "params/M", "MACs/G", "with\nattention", "caches/MB"):
        graphs.add_column(heading, justify="right", no_wrap=True)
    for variant in description.variants:
        graphs.add_row(
            variant.name,
            "x".join(map(str, variant.latents)),
            f"{variant.nodes}",
            f"{variant.parameters / 1e6:.3f}",
            f"{variant.macs / 1e9:.3f}",
            f"{variant.macs_total / 1e9:.3f}",
            f"{variant.cache_bytes / 1e6:.3f}",
        )
    OUT.print(graphs)
    sites = Table("block", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    sites.add_column("sites", justify="right")
    for block, count in Counter(_block(site) for site in description.sites).items():
        sites.add_row(block, f"{count}")
    OUT.print(sites)
    strip = description.strip
    counted = ", ".join(f"{count} {GRAPH_NAMES[letter]}" for letter, count in Counter(strip.upper()).items())
    OUT.print(Text.assemble("plan: ", coloured(strip), f"  {counted}"), soft_wrap=True)
    OUT.print(
        f"MACs per image: {work.plain / 1e9:.1f} G plain, {work.guidance_dropped / 1e9:.1f} G with guidance dropped at "
        f"the same step, {work.gated / 1e9:.1f} G with this schedule",
        soft_wrap=True,
    )


def _block(site: str) -> str:
    """Return the block of the denoiser that a site is in: down_blocks.1, mid_block, transformer_blocks."""
    first, second, *_ = site.split(".")
    return f"{first}.{second}" if second.isdigit() and first.endswith(("down_blocks", "up_blocks")) else first


def inspect(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle.", show_default=False)],
    json: options.Json = False,
) -> None:
    """Verify a bundle and show its contents: graphs, sizes, and the deviation from PyTorch when it was written."""
    check_installed("pydantic", what="inspect")
    from tgate_compile.bundle.read import read_bundle

    with ERR.status("Verifying the files"):
        read = read_bundle(bundle)
    if json:
        print_json(
            {"folder": str(bundle), "bytes": read.size, "verified": True, "manifest": read.manifest.model_dump()}
        )
    else:
        _print_bundle(read)


def _print_bundle(bundle: Bundle) -> None:
    manifest = bundle.manifest
    schedule = read_schedule(manifest.method.schedule)
    lines = [
        f"{manifest.pipeline.class_name}: {manifest.denoiser.component}, a {manifest.denoiser.class_name}",
        f"{schedule}, keeps {manifest.method.keep}; {manifest.scheduler.class_name}",
        f"for example {manifest.example.strip}",
    ]
    if manifest.quantization is not None:
        quantization = manifest.quantization
        kept = f", except {', '.join(quantization.keep)}" if quantization.keep else ""
        lines.append(f"quantized: {quantization.scheme} in {', '.join(quantization.graphs)}{kept}")
        if quantization.calibration is not None:
            lines.append(
                f"calibrated on {', '.join(map(repr, quantization.calibration.prompts)) or 'the example call'}"
            )
    for line in lines:
        OUT.print(escape(line), soft_wrap=True)
    table = Table("graph", "inputs", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("caches\nin, out", "operators", "params/M", "MACs/G", "from\nPyTorch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, graph in manifest.graphs.items():
        table.add_row(name, *_cells(graph))
    OUT.print(table)
    if manifest.components is not None:
        _print_components(manifest.components)
    for name, file in manifest.files.items():
        OUT.print(f"{file.size / 1e6:10.3f} MB  {escape(name)}", soft_wrap=True)
    versions = manifest.versions
    OUT.print(
        f"made with tgate_compile {versions.tgate_compile}, torch {versions.torch}, diffusers "
        f"{manifest.pipeline.diffusers}, for {versions.runtime}",
        soft_wrap=True,
    )
    OUT.print(f"verified: {len(manifest.files)} files, {bundle.size / 1e6:.1f} MB, unchanged since they were written")


def _print_components(components: Components) -> None:
    """Print a table like that of the graphs, and the settings that `run` uses by default."""
    table = Table("component", "model", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("from\nPyTorch", justify="right", no_wrap=True)
    for encoder in components.text_encoders:
        model = f"{encoder.class_name}, {encoder.tokenizer.length} tokens"
        table.add_row(escape(encoder.component), escape(model), f"{encoder.parity.relative:.0e}")
    decoder = components.vae_decoder
    model = f"{decoder.class_name}, {decoder.scale_factor} pixels per latent"
    table.add_row("vae_decoder", escape(model), f"{decoder.parity.relative:.0e}")
    OUT.print(table)
    OUT.print(
        f"tgate-compile run makes images of {components.width}x{components.height} in "
        f"{components.num_inference_steps} steps, guidance {components.guidance_scale:g}\n",
        soft_wrap=True,
    )


def _cells(graph: Graph) -> list[str]:
    lines = [f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}" for spec in graph.inputs]
    early = Counter(spec.graph for spec in graph.early_inputs)
    lines += [f"{count} value{'s' * (count > 1)} of {name}" for name, count in early.items()]
    inputs = "\n".join(lines)
    return [
        escape(inputs),
        f"{len(graph.cache_inputs)}, {len(graph.cache_outputs)}",
        f"{graph.facts.nodes}",
        f"{graph.facts.parameters / 1e6:.3f}",
        f"{graph.facts.macs / 1e9:.3f}",
        "not run" if graph.parity is None else f"{graph.parity.relative:.0e}",
    ]


_KINDS = {
    "graph": "captured graphs",
    "onnx": "graphs converted to ONNX",
    "verdict": "comparisons with PyTorch",
}


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all entries.")] = False,
    json: options.Json = False,
) -> None:
    """Show or delete the captured and converted graphs that are kept on disk for later processes.

    The folder is ~/.cache/tgate_compile, or the one in the environment variable TGATE_COMPILE_CACHE, which also
    switches the cache off: TGATE_COMPILE_CACHE=off. TGATE_COMPILE_CACHE_SIZE=500MB sets its maximum size.
    """
    found = disk_cache()
    if found is None:
        if json:
            print_json({"folder": None})
        else:
            OUT.print(f"The cache is switched off ({FOLDER_VARIABLE}={os.environ.get(FOLDER_VARIABLE, '')}).")
        return
    deleted = found.clear() if clear else 0
    entries = sorted(found.entries(), key=lambda entry: -entry.used)
    size = sum(entry.nbytes for entry in entries)
    if json:
        listed = [{"kind": each.kind, "label": each.label, "bytes": each.nbytes, "used": each.used} for each in entries]
        about = {"folder": str(found.folder), "bytes": size, "limit": found.limit, "deleted": deleted}
        print_json({**about, "entries": listed})
        return
    if clear:
        OUT.print(f"deleted {deleted} entries of {escape(str(found.folder))}", soft_wrap=True)
        return
    OUT.print(f"{escape(str(found.folder))}: {size / 1e6:.1f} MB of at most {found.limit / 1e6:.0f} MB", soft_wrap=True)
    table = Table("kept", "of", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("number", "MB", "last used"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups = dict.fromkeys((each.kind, each.label) for each in entries)
    for kind, label in groups:
        own = [each for each in entries if (each.kind, each.label) == (kind, label)]
        used = datetime.fromtimestamp(max(each.used for each in own)).strftime("%Y-%m-%d %H:%M")
        total = sum(each.nbytes for each in own) / 1e6
        table.add_row(_KINDS.get(kind, escape(kind)), escape(label), f"{len(own)}", f"{total:.2f}", used)
    if entries:
        OUT.print(table)


def strip(
    *,
    schedule: ScheduleOptions,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.", rich_help_panel=options.IMAGE)] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Guidance scale; up to 1 means no guidance.",
            show_default="with guidance",
            rich_help_panel=options.IMAGE,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the strip into this .png, .svg or .pdf file. Needs matplotlib.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Show a schedule, one character per step. Runs nothing and needs no model."""
    schedule.check_known_in_advance()
    chosen = schedule.schedule(None)
    guided = guidance is None or guidance > 1
    if plot is not None:
        check_figure(plot)
        check_targets([plot], force=force)
    plan = chosen.plan(steps, guided=guided)
    letters = "".join(phase.character for phase in plan)
    if plot is not None:
        strip_picture({str(chosen): letters}, plot)
    if json:
        picture = None if plot is None else str(plot)
        print_json({"schedule": str(chosen), "steps": steps, "strip": letters, "picture": picture})
        return
    OUT.print(f"{chosen}, {steps} steps{'' if guided else ' without guidance'}", soft_wrap=True)
    OUT.print(coloured(letters), soft_wrap=True)
    meanings = {phase.character: phase for phase in plan}
    for letter, count in Counter(letters).items():
        phase = meanings[letter]
        without = "the other half estimated" if phase.estimated else "no guidance"
        words = f"{phase.name}, {'guided' if phase.guided else without + ': half the batch'}"
        OUT.print(Text.assemble("  ", coloured(letter), f"  {count:3} x {words}"), soft_wrap=True)
    if plot is not None:
        OUT.print(f"written {plot}", soft_wrap=True)
