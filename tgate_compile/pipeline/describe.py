"""What an optimized pipeline is made of, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch.export.graph_signature import InputKind

from tgate_compile._arguments import AnyPipeline, check_call
from tgate_compile.engine.trust import Served
from tgate_compile.engine.variants import VariantStore
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.graphs import Variant
from tgate_compile.pipeline.generation import Generation, Plan, strip_of
from tgate_compile.pipeline.hook import GatedDenoiser
from tgate_compile.pipeline.optimized import preview, required_state_of


@dataclass(frozen=True)
class VariantDescription:
    """One graph.

    Attributes:
        denoiser: the component that it is made of: `unet`, `transformer`.
        name: `full`, `pruned`, or another phase's name.
        batch: the batch of the latents that it takes (2B under guidance).
        latents: their shape.
        dtype: their dtype.
        nodes: operators of the graph.
        parameters: elements of the parameters that it uses.
        macs: multiply-accumulates of a call in linear and convolution layers (the paper's convention).
        macs_total: the same with attention's own products.
        cache_bytes: of the caches that it takes or hands on.
    """

    denoiser: str
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
        served_by: the backends that run the graphs compiled so far, which says what `"auto"` has chosen.
        schedule: what was chosen, in words: `gate step 10, sp interval 5`.
        gate_step: as given to `optimize`.
        keep: the guidance half that goes on after the gate.
        parameters: of the denoiser, or of both where there are two.
        sites: what is cached, in graph order; empty before the first call.
        variants: the graphs made so far.
        last_steps: for each graph that the last generation ran, in order, the step and the graph's name.
        strip: the last generation, or the one asked about, one character a step: `F` full, `p` pruned;
            `docs/reference/schedules.md` has them all. Two denoisers' steps have a `|` in between.
        cache_bytes: the most that this generation keeps from one step to the next.
        plain_because: why the last call, or the one asked about, ran in full although the schedule has more to it
            (`on_unsupported="plain"`); None if it was not for such a reason.
        bundle: the folder of the bundle that it is served from, which says itself what its graphs are
            (`tgate-compile inspect`); None if the graphs are made here.
    """

    pipeline: str
    denoiser: str
    backend: str
    served_by: tuple[str, ...]
    schedule: str
    gate_step: int | float | None
    keep: str
    parameters: int
    sites: tuple[str, ...]
    variants: tuple[VariantDescription, ...]
    last_steps: tuple[tuple[int, str], ...]
    strip: str
    cache_bytes: int
    plain_because: str | None
    bundle: str | None

    def _taken(self) -> str:
        return f" ({', '.join(self.served_by)})" if self.backend == "auto" and self.served_by else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.pipeline}: {self.denoiser}, {self.parameters / 1e6:.3f} M parameters",
            f"{self.schedule}, keeps {self.keep}, backend {self.backend}{self._taken()}",
        ]
        if self.bundle is not None:
            lines.append(f"{len(self.sites)} sites, graphs of the bundle {self.bundle}")
        elif not self.variants and self.plain_because is None:
            lines.append("Nothing captured yet: call the pipeline once.")
        elif self.variants:
            lines.append(f"{len(self.sites)} sites:")
            lines += [f"  {site}" for site in self.sites]
            wide = max(len(v.name) for v in self.variants)
            lines.append(
                f"{'graph':{wide}} latents             nodes  parameters/M     MACs/G  with attention/G  caches/MB"
            )
            lines += [
                f"{v.name:{wide}} {'x'.join(map(str, v.latents)):18} {v.nodes:6} {v.parameters / 1e6:13.3f} "
                f"{v.macs / 1e9:10.3f} {v.macs_total / 1e9:17.3f} {v.cache_bytes / 1e6:10.3f}"
                for v in self.variants
            ]
        if self.strip:
            what = f"last call: {self.strip}  ({len(self.last_steps)} denoiser calls)"
            lines.append(what if self.last_steps else f"such a call: {self.strip}")
            lines.append(f"caches: {self.cache_bytes / 1e6:.3f} MB at most")
        if self.plain_because is not None:
            lines.append(f"runs in full: {self.plain_because}")
        return "\n".join(lines)


def describe(pipe: AnyPipeline, **call: Any) -> Description:
    """The sites found, the graphs made and what the last call ran.

    With arguments of the pipeline's call, `describe(pipe, prompt="a fox", height=480, width=832, num_frames=81)`, what
    that call would run, beforehand: how large its caches are, above all. Its graphs are captured, which makes the
    call itself faster later on, but nothing is compiled and no step is computed.

    Raises:
        ConfigurationError: the pipeline is not optimized.
    """
    state = required_state_of(pipe)
    check_call(call, state.pipeline_class, argument="describe()")
    plans = preview(pipe, call) if call else {}
    hooks = state.hooks
    lasts = [hook.last for hook in hooks.values() if hook.last is not None and state.last_plain is None]
    shown: list[Plan] | list[Generation] = [*plans.values()] or lasts
    schedule = state.hook.config.schedule
    return Description(
        pipeline=state.pipeline_class.__name__,
        denoiser=type(state.hook.denoiser).__name__,
        backend=state.hook.config.backend,
        served_by=tuple(dict.fromkeys(name for hook in hooks.values() for name in _serving(hook))),
        schedule="; ".join(dict.fromkeys(str(hook.config.schedule) for hook in hooks.values())),
        gate_step=schedule.gate_step,
        keep=schedule.kept,
        parameters=sum(p.numel() for hook in hooks.values() for p in hook.denoiser.parameters()),
        sites=tuple(
            site for name, hook in hooks.items() for site in _sites(hook, f"{name}." if len(hooks) > 1 else "")
        ),
        variants=tuple(
            _describe_variant(name, variant, captured.latents)
            for name, hook in hooks.items()
            for variant, captured in hook.store.variants
        ),
        last_steps=() if plans else tuple((step, phase.name) for ran in shown for step, phase in ran.steps),
        strip="|".join(strip_of(ran.steps) for ran in shown if ran.steps),
        bundle=state.hook.store.folder,
        cache_bytes=max((each.cache_bytes for each in shown), default=0),
        plain_because=None if state.last_plain is None else str(state.last_plain),
    )


def _serving(hook: GatedDenoiser) -> list[str]:
    compiled = hook.store.compiled if isinstance(hook.store, VariantStore) else []
    return [each.runner.backend.name for each in compiled if isinstance(each.runner, Served)]


def _sites(hook: GatedDenoiser, prefix: str) -> list[str]:
    return [prefix + name for name in hook.store.site_names]


def _describe_variant(denoiser: str, variant: Variant, latents_name: str) -> VariantDescription:
    program = variant.program
    graph = program.graph
    latents = next(node for node in graph.nodes if node.name == latents_name).meta["val"]
    macs = count_macs(graph)
    used = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER]
    return VariantDescription(
        denoiser=denoiser,
        name=variant.phase.name,
        batch=latents.shape[0],
        latents=tuple(latents.shape),
        dtype=str(latents.dtype).removeprefix("torch."),
        nodes=sum(node.op == "call_function" for node in graph.nodes),
        parameters=sum(program.state_dict[str(spec.target)].numel() for spec in used),
        macs=macs.layers,
        macs_total=macs.total,
        cache_bytes=sum(emission.nbytes for emission in variant.emitted) + sum(site.nbytes for site in variant.reused),
    )
