"""What an optimized pipeline is made of, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from diffusers import DiffusionPipeline
from torch.export.graph_signature import InputKind

from tgate_compile._graphs import Site, Variant
from tgate_compile._optimize import required_state_of
from tgate_compile.passes.count_macs import count_macs


@dataclass(frozen=True)
class VariantDescription:
    """One compiled graph.

    Attributes:
        name: `full` or `pruned`.
        batch: the batch of the latents that it takes (2B under guidance).
        latents: their shape.
        dtype: their dtype.
        nodes: operators of the graph.
        parameters: elements of the parameters that it uses.
        macs: multiply-accumulates of a call in linear and convolution layers (the paper's convention).
        macs_total: the same with attention's own products.
        cache_bytes: of the caches that it takes or hands on.
    """

    name: str
    batch: int
    latents: tuple[int, ...]
    dtype: str
    nodes: int
    parameters: int
    macs: int
    macs_total: int
    cache_bytes: int


@dataclass(frozen=True)
class Description:
    """What `describe` says; printing it gives a page for a person, `as_dict` plain data for a program.

    Attributes:
        pipeline: class of the pipeline.
        denoiser: class of the denoiser.
        backend: the backend asked for.
        schedule: what was chosen, in words: `gate step 10, sp interval 5`.
        gate_step: as given to `optimize`.
        keep: the guidance half that goes on after the gate.
        parameters: of the denoiser.
        sites: what is cached, in graph order; empty before the first call.
        variants: the graphs compiled so far.
        last_steps: for each denoiser call of the last generation, the step and the graph that it ran.
        strip: the last generation, one character a step: `F` full, `p` pruned; `docs/schedules.md` has them all.
    """

    pipeline: str
    denoiser: str
    backend: str
    schedule: str
    gate_step: int | float | None
    keep: str
    parameters: int
    sites: tuple[str, ...]
    variants: tuple[VariantDescription, ...]
    last_steps: tuple[tuple[int, str], ...]
    strip: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.pipeline}: {self.denoiser}, {self.parameters / 1e6:.3f} M parameters",
            f"{self.schedule}, keeps {self.keep}, backend {self.backend}",
        ]
        if not self.variants:
            lines.append("Nothing captured yet: call the pipeline once.")
        else:
            lines.append(f"{len(self.sites)} sites:")
            lines += [f"  {site}" for site in self.sites]
            lines.append("graph   latents             nodes  parameters/M     MACs/G  with attention/G  caches/MB")
            lines += [
                f"{v.name:7} {'x'.join(map(str, v.latents)):18} {v.nodes:6} {v.parameters / 1e6:13.3f} "
                f"{v.macs / 1e9:10.3f} {v.macs_total / 1e9:17.3f} {v.cache_bytes / 1e6:10.3f}"
                for v in self.variants
            ]
        if self.strip:
            lines.append(f"last call: {self.strip}  ({len(self.last_steps)} denoiser calls)")
        return "\n".join(lines)


def describe(pipe: DiffusionPipeline) -> Description:
    """The sites found, the graphs compiled and what the last call ran.

    Raises:
        ConfigurationError: the pipeline is not optimized.
    """
    state = required_state_of(pipe)
    compiled = state.hook.store.compiled
    last = state.hook.last
    calls = last.steps if last is not None else []
    return Description(
        pipeline=state.pipeline_class.__name__,
        denoiser=type(state.denoiser).__name__,
        backend=state.config.backend,
        schedule=str(state.config.schedule),
        gate_step=state.config.schedule.gate_step,
        keep=state.config.schedule.kept,
        parameters=sum(parameter.numel() for parameter in state.denoiser.parameters()),
        sites=tuple(site.name for site in compiled[0].captured.sites) if compiled else (),
        variants=tuple(_describe_variant(c.variant, c.captured.latents) for c in compiled),
        last_steps=tuple((step, phase.name) for step, phase in calls),
        strip="".join({step: phase.character for step, phase in calls}.values()),
    )


def _describe_variant(variant: Variant, latents_name: str) -> VariantDescription:
    program = variant.program
    graph = program.graph
    latents = next(node for node in graph.nodes if node.name == latents_name).meta["val"]
    macs = count_macs(graph)
    used = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER]
    return VariantDescription(
        name=variant.phase.name,
        batch=latents.shape[0],
        latents=tuple(latents.shape),
        dtype=str(latents.dtype).removeprefix("torch."),
        nodes=sum(node.op == "call_function" for node in graph.nodes),
        parameters=sum(program.state_dict[str(spec.target)].numel() for spec in used),
        macs=macs.layers,
        macs_total=macs.total,
        cache_bytes=sum(_bytes(e.site, merged=e.merged) for e in variant.emitted)
        + sum(_bytes(site, merged=False) for site in variant.reused),
    )


def _bytes(site: Site, *, merged: bool) -> int:
    return prod(site.shape) * site.dtype.itemsize // (2 if merged else 1)
