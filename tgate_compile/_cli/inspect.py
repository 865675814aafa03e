"""`tgate-compile inspect`: what is in a bundle, and whether it is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, print_json
from tgate_compile._errors import check_installed
from tgate_compile.methods.schedule_file import read_schedule

if TYPE_CHECKING:
    from tgate_compile.bundle.manifest import Components, Graph
    from tgate_compile.bundle.read import Bundle


def inspect(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle.", show_default=False)],
    json: options.Json = False,
) -> None:
    """Verify a bundle, and show what is in it: graphs, sizes, and how close to PyTorch it was when written."""
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
        kept = f", but for {', '.join(quantization.keep)}" if quantization.keep else ""
        lines.append(f"quantized: {quantization.scheme} in {', '.join(quantization.graphs)}{kept}")
        if quantization.calibration is not None:
            lines.append(f"measured on {', '.join(map(repr, quantization.calibration.prompts)) or 'its own call'}")
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
    OUT.print(f"verified: {len(manifest.files)} files, {bundle.size / 1e6:.1f} MB, are as they were written")


def _print_components(components: Components) -> None:
    """A table like that of the graphs, and what `run` does with it."""
    table = Table("component", "model", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("from\nPyTorch", justify="right", no_wrap=True)
    for encoder in components.text_encoders:
        model = f"{encoder.class_name}, {encoder.tokenizer.length} tokens"
        table.add_row(escape(encoder.component), escape(model), f"{encoder.parity.relative:.0e}")
    decoder = components.vae_decoder
    model = f"{decoder.class_name}, {decoder.scale_factor} pixels for one of the latents"
    table.add_row("vae_decoder", escape(model), f"{decoder.parity.relative:.0e}")
    OUT.print(table)
    OUT.print(
        f"tgate-compile run makes images of {components.width}x{components.height} in "
        f"{components.num_inference_steps} steps, guidance {components.guidance_scale:g}\n",
        soft_wrap=True,
    )


def _cells(graph: Graph) -> list[str]:
    inputs = "\n".join(
        f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}" for spec in graph.inputs
    )
    return [
        escape(inputs),
        f"{len(graph.cache_inputs)}, {len(graph.cache_outputs)}",
        f"{graph.facts.nodes}",
        f"{graph.facts.parameters / 1e6:.3f}",
        f"{graph.facts.macs / 1e9:.3f}",
        "not run" if graph.parity is None else f"{graph.parity.relative:.0e}",
    ]
