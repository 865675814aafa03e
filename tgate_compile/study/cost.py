"""Count the cost of graphs and whole images on models of real size, for comparison with the paper's tables."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.methods.method import BLOCKS, CROSS, FF, REAR, SELF, Part, Phase
from tgate_compile.methods.schedule import Schedule, Sought
from tgate_compile.study.architectures import PIXELS_PER_LATENT, Architecture, Geometry, Model, Shape

if TYPE_CHECKING:
    import torch

    from tgate_compile.passes.count_macs import Macs
    from tgate_compile.passes.graphs import Captured, Variant

MSG_TEXT_TOKENS = (
    "text_tokens is for models with joint attention, where the text's tokens are computed like the image's. "
    "{model} has cross-attention."
)
MSG_JOINT_ALONE = (
    "{model} has joint attention, where only the text's keys and values can be cached: leave sp_interval and "
    "fi_interval at 1, and do not use DeepCache."
)


@dataclass(frozen=True)
class GraphCost:
    """The cost of one call of a graph.

    Attributes:
        macs: multiply-accumulates.
        parameters: number of elements of each parameter that the graph reads, by name.
        cross_attention: names of the parameters that belong to cross-attentions.
    """

    macs: Macs
    parameters: Mapping[str, int]
    cross_attention: frozenset[str]


@cache
def graph_cost(
    architecture: Architecture, geometry: Geometry, phase: Phase, branch: int | None, sought: Sought | None = None
) -> GraphCost:
    """Return the cost of the graph of `phase`, with DeepCache's `branch` (None: without DeepCache).

    `sought` says which sites to find; None means the attentions.

    Raises:
        UnsupportedModelError: `branch` is given, but the denoiser is not a UNet.
        ConfigurationError: the UNet has no such branch.
    """
    # Not above: the command line reads the models' names for its help, and PyTorch takes seconds.
    from tgate_compile.engine.capture import deep_layer
    from tgate_compile.passes.count_macs import count_macs
    from tgate_compile.passes.find_sites import find_deep_feature
    from tgate_compile.passes.specialize import specialize

    # Report a wrong branch before the capture, which takes a while.
    layer = None if branch is None else deep_layer(_denoiser(architecture), branch)
    captured = _captured(architecture, geometry, sought)
    if layer is not None:
        deep = find_deep_feature(captured.program.graph_module, layer)
        captured = dataclasses.replace(captured, sites=(*captured.sites, deep))
    variant = specialize(captured, phase)
    program = variant.program
    parameters = {name: program.state_dict[name].numel() for name in _parameters(variant)}
    cross = tuple(f"{site.name}." for site in captured.sites if site.kind == "cross")
    return GraphCost(
        count_macs(program.graph), parameters, frozenset(name for name in parameters if name.startswith(cross))
    )


@cache
def _denoiser(architecture: Architecture) -> torch.nn.Module:
    import torch

    with torch.device("meta"):
        denoiser: torch.nn.Module = architecture.denoiser(**architecture.config)
    return denoiser.eval()


@lru_cache(maxsize=4)  # SDXL's captures have thousands of nodes each
def _captured(architecture: Architecture, geometry: Geometry, sought: Sought | None = None) -> Captured:
    import torch

    from tgate_compile.engine.call import Call
    from tgate_compile.engine.capture import capture

    denoiser = _denoiser(architecture)
    sizes = {
        "batch": geometry.batch,
        "height": geometry.height // PIXELS_PER_LATENT,
        "width": geometry.width // PIXELS_PER_LATENT,
        "patches": geometry.height // (2 * PIXELS_PER_LATENT) * (geometry.width // (2 * PIXELS_PER_LATENT)),
        "text": geometry.text or architecture.text,
    }

    def tensor(shape: Shape) -> torch.Tensor | None:
        if shape is None:
            return None
        return torch.zeros([size if isinstance(size, int) else sizes[size] for size in shape])

    with torch.device("meta"):
        inputs = {
            name: {key: tensor(below) for key, below in shape.items()} if isinstance(shape, Mapping) else tensor(shape)
            for name, shape in architecture.inputs.items()
        }
        constants = architecture.constants(geometry) if callable(architecture.constants) else architecture.constants
        call = Call.of((), {**inputs, **constants, "return_dict": False})
        if sought is not None:
            return capture(denoiser, denoiser.forward, call, **sought._asdict())
        return capture(denoiser, denoiser.forward, call, CROSS if architecture.is_joint else CROSS | SELF)


def _sought(schedule: Schedule | None) -> Sought | None:
    """Return what to find for a schedule that needs more than attentions, which all others find in one capture."""
    if schedule is None or not (schedule.kinds & (FF | BLOCKS | REAR) or schedule.sought.hidden):
        return None
    return schedule.sought


@dataclass(frozen=True)
class ImageCost:
    """The cost of the denoiser over all steps of one generation.

    Attributes:
        strip: one character per step, as in `docs/reference/schedules.md`.
        macs: multiply-accumulates in linear and convolution layers, which is the paper's convention. Steps that are
            decided while they run are counted as computed.
        macs_with_attention: `macs` plus the matrix products inside attention.
        least_macs: `macs` if the blocks are skipped in all steps that are decided while they run. A limit on how many
            may be skipped is not considered.
        least_macs_with_attention: the same for `macs_with_attention`.
        parameters: parameters of the denoiser. With a gate, the weights of the cross-attentions are not counted, as in
            the paper, nor those that only the text's tokens of a joint attention need.
        parameters_at_end: parameters that the graphs from the gate on actually read (without a gate: the graphs of all
            steps). Smaller than `parameters`, because layers that only feed cross-attentions are removed as well.
    """

    strip: str
    macs: int
    macs_with_attention: int
    least_macs: int
    least_macs_with_attention: int
    parameters: int
    parameters_at_end: int


def image_cost(
    model: Model,
    schedule: Schedule | None,
    *,
    steps: int | None = None,
    guided: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    text_tokens: int | None = None,
) -> ImageCost:
    """Return the cost of `batch` images under `schedule` (None: every step runs in full).

    Arguments that are None take the model's own value. One denoiser call per step is counted, as first-order
    schedulers make.

    Raises:
        UnsupportedModelError: the schedule uses DeepCache, but the denoiser is not a UNet; or it caches self-attention,
            but the denoiser has joint attention.
        ConfigurationError: the UNet does not have the schedule's DeepCache branch; or a number of tokens is given for a
            denoiser without joint attention.
    """
    if text_tokens is not None and not model.architecture.is_joint:
        raise ConfigurationError(MSG_TEXT_TOKENS.format(model=model.architecture.denoiser_class))
    sought = _sought(schedule)
    if sought is None and schedule is not None and model.architecture.is_joint and schedule.kinds - CROSS:
        raise UnsupportedModelError(MSG_JOINT_ALONE.format(model=model.architecture.denoiser_class))
    steps = model.steps if steps is None else steps
    guided = model.guided if guided is None else guided
    height, width = height or model.architecture.size, width or model.architecture.size

    def cost(phase: Phase) -> GraphCost:
        geometry = Geometry(2 * batch if phase.guided else batch, height, width, text_tokens or 0)
        branch = schedule.deepcache_branch if schedule is not None and "deep" in schedule.kinds else None
        return graph_cost(
            model.architecture, geometry, phase if schedule is None else schedule.graph_phase(phase), branch, sought
        )

    def costs(phase: Phase, last: Part = "tail") -> list[GraphCost]:
        """Return the costs of the graphs that run in a step; one that is decided while it runs ends with `last`."""
        if not phase.decided:
            return [cost(phase)]
        return [cost(phase.of_part("head")), cost(phase.of_part(last))]

    plan = (Phase(guided),) * steps if schedule is None else schedule.plan(steps, guided=guided)
    gate = steps if schedule is None else schedule.gate(steps)
    lasts: tuple[Part, Part] = ("tail", "finish")
    most, least = (
        [(each.macs, count) for phase, count in Counter(plan).items() for each in costs(phase, last)] for last in lasts
    )
    whole = cost(plan[0])
    at_end = {
        name: size
        for phase in set(plan[gate:] or plan)
        for each in costs(phase)
        for name, size in each.parameters.items()
    }
    without_text = sum(at_end.values())
    return ImageCost(
        strip="".join(phase.character for phase in plan),
        macs=sum(macs.layers * count for macs, count in most),
        macs_with_attention=sum(macs.total * count for macs, count in most),
        least_macs=sum(macs.layers * count for macs, count in least),
        least_macs_with_attention=sum(macs.total * count for macs, count in least),
        parameters=without_text
        if model.architecture.is_joint and gate < steps
        else sum(size for name, size in whole.parameters.items() if gate >= steps or name not in whole.cross_attention),
        parameters_at_end=without_text,
    )


@dataclass(frozen=True)
class BindingTimes:
    """The parameters of a model by binding time: how often the work that reads them has to run.

    Attributes:
        parameters: the number of all parameters of the denoiser.
        prompt: parameters that are read once per generation.
        timestep: parameters that are read once per timestep, for a row of values.
        step: the other parameters, most of which the step reads for each timestep and its latents.
        unread: parameters in `step` that nothing reads, like the end of the text stream in Qwen-Image's last block.
        pruned_step: parameters that the step reads after the gate.
        prelude_bytes: the size of the values that are computed once per generation, for one image.
        row_bytes: the size of the values of one timestep, for one image.
    """

    parameters: int
    prompt: int
    timestep: int
    step: int
    unread: int
    pruned_step: int
    prelude_bytes: int
    row_bytes: int


def binding_times(model: Model) -> BindingTimes:
    """Split the graph of a full step of `model` by binding time, and count the parameters of each part."""
    from tgate_compile.passes.binding_times import SplitVariant, split_by_binding
    from tgate_compile.passes.graphs import outputs_of
    from tgate_compile.passes.specialize import specialize

    size = model.architecture.size
    captured = _captured(model.architecture, Geometry(model.rows, size, size))

    def split(phase: Phase) -> SplitVariant:
        return split_by_binding(specialize(captured, phase), captured.roles)

    def read(part: Variant | None) -> dict[str, int]:
        return {} if part is None else {name: part.program.state_dict[name].numel() for name in _parameters(part)}

    def values(part: Variant | None) -> int:
        return 0 if part is None else sum(node.meta["val"].nbytes for node in outputs_of(part.program.graph))

    full = split(Phase(model.rows > 1))
    prelude, table, step = (read(part) for part in (full.prelude, full.table, full.step))
    pruned = split(Phase(model.rows > 1, reuse=CROSS)).step
    everything = sum(parameter.numel() for parameter in _denoiser(model.architecture).parameters())
    of_prompt = sum(count for name, count in prelude.items() if name not in {**table, **step})
    of_timestep = sum(count for name, count in table.items() if name not in step)
    return BindingTimes(
        parameters=everything,
        prompt=of_prompt,
        timestep=of_timestep,
        step=everything - of_prompt - of_timestep,
        unread=everything - sum({**prelude, **table, **step}.values()),
        pruned_step=sum(read(pruned).values()),
        prelude_bytes=values(full.prelude),
        row_bytes=values(full.table),
    )


def _parameters(variant: Variant) -> list[str]:
    """Return the names of the parameters that `variant` reads."""
    from torch.export.graph_signature import InputKind

    specs = variant.program.graph_signature.input_specs
    return [str(spec.target) for spec in specs if spec.kind is InputKind.PARAMETER]


NOTE_BRANCH = (
    "Counted with deepcache_branch=1: the authors used DeepCache's own SDXL pipeline, whose branch 0 computes one more "
    "layer on either side than branch 0 of DeepCacheSDHelper, whose numbering we use."
)
NOTE_GATE = (
    "Counted with gate_step=13: the authors' code of that time (gate_idx=4) caches the cross-attentions at the "
    "DeepCache update with index 4, step 12, and reuses them from step 13 on. Gate step 10 comes from their later "
    "package."
)
NOTE_GUIDANCE = "Counted with guidance_step=10 (of 25), which the paper's row does not specify."

#: The index, from 0, of the DeepCache update at which the authors' first code caches the cross-attentions.
_GATE_INDEX = 4


def paper_tables() -> dict[str, Any]:
    """Return the paper's tables: source, counting convention, image size, parameters and rows."""
    text = resources.files(__package__).joinpath("paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def schedule_of(row: Mapping[str, Any]) -> tuple[Schedule | None, tuple[str, ...]]:
    """Return the schedule that reproduces a row of the paper's tables, and notes on where it differs from the row.

    The schedule is None if the row runs every step in full.

    Sources: the authors' repository at 133e445^, DeepCache/generate.py and DeepCache/README.md, for both rows with
    DeepCache; DeepCache 0.1.1, sdxl/unet_2d_condition.py and extension/deepcache.py, for the two branch numberings.
    """
    method = row["method"]
    if method == "none":
        return None, ()
    if method == "tgate":
        intervals = {name: row[name] for name in ("sp_interval", "fi_interval", "warm_up") if name in row}
        return Schedule(row["gate_step"], **intervals), ()
    if method == "adaptive_guidance":
        return Schedule(None, guidance_step=10), (NOTE_GUIDANCE,)
    interval, branch = row["cache_interval"], row["cache_branch_id"] + 1
    if method == "deepcache":
        return Schedule(None, deepcache_interval=interval, deepcache_branch=branch), (NOTE_BRANCH,)
    assert method == "deepcache+tgate", method
    gate = _GATE_INDEX * interval + 1
    return Schedule(gate, deepcache_interval=interval, deepcache_branch=branch), (NOTE_BRANCH, NOTE_GATE)
