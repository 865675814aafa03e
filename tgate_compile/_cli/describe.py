"""`tgate-compile describe`: what T-GATE does to a model, in numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, Work, planned_calls, print_json, work_of
from tgate_compile._cli.loading import load, settings_for
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline import describe as _describe


def describe(
    model: options.Model = None,
    model_config: options.ModelConfig = None,
    gate_step: options.GateStep = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    height: options.Height = None,
    width: options.Width = None,
    scheduler: options.Scheduler = None,
    unet: options.Unet = None,
    lora: options.Lora = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    json: options.Json = False,
) -> None:
    """Show what T-GATE does to a model: sites, graphs, parameters, multiply-accumulates. Runs two denoising steps."""
    with ERR.status("Loading the model"):
        loaded = load(
            model, model_config=model_config, device=device, dtype=dtype, scheduler=scheduler, unet=unet, lora=lora
        )
    settings = settings_for(loaded, steps=steps, guidance=guidance, gate_step=gate_step)
    pipe = tgate_compile.optimize(loaded.pipe, settings.gate_step, backend="eager")
    call: dict[str, Any] = {"prompt": "", "guidance_scale": settings.guidance, "output_type": "latent", **loaded.call}
    call |= {name: value for name, value in {"height": height, "width": width}.items() if value is not None}
    with ERR.status("Capturing the graphs, on two steps"):
        # One step in full and one gated are every graph that there is, however many steps follow.
        pipe(**call, num_inference_steps=2, gate_step=1)
    description = tgate_compile.describe(pipe)
    schedule = Schedule(settings.gate_step)
    strip = schedule.strip(settings.steps)
    work = work_of(description, planned_calls(pipe.scheduler, schedule, settings.steps))
    if json:
        # The two steps of the capture say nothing about the model: the planned ones stand in their place.
        about = {k: v for k, v in description.as_dict().items() if k not in ("last_steps", "strip")}
        plan = {"steps": settings.steps, "guidance": settings.guidance, "gate": settings.gate, "strip": strip}
        print_json({"model": loaded.source, "family": loaded.family.name} | about | {"plan": plan | work.as_dict()})
    else:
        _print_tables(description, strip, work)


def _print_tables(description: _describe.Description, strip: str, work: Work) -> None:
    OUT.print(
        f"[bold]{description.pipeline}[/]: {description.denoiser}, {description.parameters / 1e6:.3f} M parameters, "
        f"{len(description.sites)} cross-attention sites",
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
    sites = Table("cross-attentions in", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    sites.add_column("sites", justify="right")
    for block, count in Counter(_block(site) for site in description.sites).items():
        sites.add_row(block, f"{count}")
    OUT.print(sites)
    full = strip.upper().count("F")
    OUT.print(
        f"plan: [bold cyan]{strip[:full]}[/][green]{strip[full:]}[/]  {full} full, {len(strip) - full} pruned",
        soft_wrap=True,
    )
    OUT.print(
        f"MACs per image: {work.plain / 1e9:.1f} G plain, {work.guidance_dropped / 1e9:.1f} G with guidance dropped "
        f"after the gate, {work.gated / 1e9:.1f} G with T-GATE",
        soft_wrap=True,
    )


def _block(site: str) -> str:
    """The block of the denoiser that a site is in: down_blocks.1, mid_block, transformer_blocks."""
    first, second, *_ = site.split(".")
    return f"{first}.{second}" if second.isdigit() and first.endswith(("down_blocks", "up_blocks")) else first
