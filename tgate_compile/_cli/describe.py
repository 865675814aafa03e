"""`tgate-compile describe`: what T-GATE does to a model, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, print_json
from tgate_compile._cli.options import ScheduleOptions
from tgate_compile._cli.pictures import coloured
from tgate_compile._cli.settings import chosen_for
from tgate_compile.methods.method import GRAPH_NAMES

if TYPE_CHECKING:
    from tgate_compile._cli.console import Work
    from tgate_compile.pipeline.describe import Description


def describe(
    model: options.Model = None,
    *,
    loading: options.Loading,
    image: options.Image,
    schedule: ScheduleOptions,
    json: options.Json = False,
) -> None:
    """Show what a schedule does to a model: sites, graphs, parameters, multiply-accumulates. Computes no step."""
    schedule.check_known_in_advance()
    loaded = loading.load(model)
    settings, chosen = chosen_for(loaded, loading, image, schedule, shown=not json)
    pipe = tgate_compile.optimize(loaded.pipe, schedule=chosen, backend="eager")
    call: dict[str, Any] = {"prompt": "", "guidance_scale": settings.guidance, "output_type": "latent", **loaded.call}
    call |= image.size
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
    """The block of the denoiser that a site is in: down_blocks.1, mid_block, transformer_blocks."""
    first, second, *_ = site.split(".")
    return f"{first}.{second}" if second.isdigit() and first.endswith(("down_blocks", "up_blocks")) else first
