"""Describe an optimized pipeline: its sites, its graphs and its last call."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch.export.graph_signature import InputKind

from tgate_compile._errors import check_call
from tgate_compile.engine.config import AnyPipeline
from tgate_compile.engine.trust import Served
from tgate_compile.engine.variants import VariantStore
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.graphs import Captured, Variant
from tgate_compile.pipeline.decisions import strip_of
from tgate_compile.pipeline.generation import Generation
from tgate_compile.pipeline.hook import GatedDenoiser
from tgate_compile.pipeline.optimized import preview, required_state_of
from tgate_compile.pipeline.progress import Plan


@dataclass(frozen=True)
class VariantDescription:
    """The description of one graph.

    Attributes:
        denoiser: the name of the denoiser component, such as `unet` or `transformer`.
        name: the name of the phase, such as `full` or `pruned`.
        batch: the batch size of the latents (2B under guidance).
        latents: the shape of the latents.
        dtype: the dtype of the latents.
        nodes: the number of operators.
        parameters: the number of elements of the parameters that the graph uses.
        macs: the multiply-accumulates of a call in linear and convolution layers (the paper's convention).
        macs_total: the same, including the matrix products of attention.
        cache_bytes: the size in bytes of the caches that the graph takes or returns.
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
    """The result of `describe`. Print it for a readable summary, or call `as_dict` for plain data.

    Attributes:
        pipeline: the class name of the pipeline.
        denoiser: the class name of the denoiser.
        backend: the selected backend.
        served_by: the backends that run the graphs compiled so far, which shows what `"auto"` has chosen.
        schedule: the schedule in words, such as `gate step 10, sp interval 5`.
        gate_step: the gate step passed to `optimize`.
        keep: the guidance half that is kept after the gate.
        parameters: the number of parameter elements of all denoisers.
        sites: the names of the cached sites, in graph order; empty before the first call.
        variants: the graphs captured so far.
        last_steps: the step and the graph's name for each denoiser call of the last generation, in order.
        strip: the last generation, or the one described, with one character per step: `F` for full, `p` for pruned;
            `docs/reference/schedules.md` lists them all. `B` and `C` are steps that are decided while they run; after a
            call, the letters of these steps show what was decided. A `|` separates the steps of two denoisers.
        cache_bytes: the largest size in bytes of the caches kept between two steps of that generation.
        plain_because: the reason why the last call, or the one described, ran without the schedule
            (`on_unsupported="plain"`); None if it ran with it.
        bundle: the folder of the bundle that the graphs are loaded from (`tgate-compile inspect` describes them);
            None if they are captured in this process.
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
        """Return the description as plain data that can be written as JSON."""
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
            last_call = f"last call: {self.strip}  ({len(self.last_steps)} denoiser calls)"
            lines.append(last_call if self.last_steps else f"such a call: {self.strip}")
            lines.append(f"caches: {self.cache_bytes / 1e6:.3f} MB at most")
        if self.plain_because is not None:
            lines.append(f"runs in full: {self.plain_because}")
        return "\n".join(lines)


def describe(pipe: AnyPipeline, **call: Any) -> Description:
    """Describe the sites and graphs of an optimized pipeline, and its last call.

    With arguments for the pipeline, as in `describe(pipe, prompt="a fox", height=480, width=832, num_frames=81)`, it
    describes what that call would run, and in particular how large its caches would be. The graphs for the call are
    captured, which saves time when it is made, but nothing is compiled and no step is computed.

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
            _describe_variant(name, variant, captured)
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


def _describe_variant(denoiser: str, variant: Variant, captured: Captured) -> VariantDescription:
    program = variant.program
    graph = program.graph
    # Not of the variant's graph: a part of a step may not take the latents.
    latents = next(node for node in captured.program.graph.nodes if node.name == captured.latents).meta["val"]
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
