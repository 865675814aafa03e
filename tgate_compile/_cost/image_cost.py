"""The cost of whole images: the graph of each step, added up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tgate_compile._cost.graph_cost import Geometry, GraphCost, graph_cost
from tgate_compile._cost.models import Model
from tgate_compile._schedule import Phase, Schedule


@dataclass(frozen=True)
class ImageCost:
    """The cost of the denoiser over all steps of one generation.

    Attributes:
        strip: one character a step, as in `docs/schedules.md`.
        macs: multiply-accumulates in linear and convolution layers: the paper's convention.
        macs_with_attention: the same with attention's own products.
        parameters: of the denoiser; with a gate without the cross-attentions' own weights, as the paper counts them.
        parameters_at_end: those that the graphs of the steps from the gate on really take (of all steps without a
            gate). Fewer than `parameters`: what only feeds the cross-attentions is gone, too.
    """

    strip: str
    macs: int
    macs_with_attention: int
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
) -> ImageCost:
    """The cost of `batch` images under `schedule` (None: every step in full); what is None is the model's own.

    One denoiser call a step is counted, as first-order schedulers make.

    Raises:
        UnsupportedModelError: DeepCache was asked for, and the denoiser is no UNet.
        ConfigurationError: it has no such branch.
    """
    steps = model.steps if steps is None else steps
    guided = model.guided if guided is None else guided
    height, width = height or model.architecture.size, width or model.architecture.size

    def cost(phase: Phase) -> GraphCost:
        geometry = Geometry(2 * batch if phase.guided else batch, height, width)
        branch = schedule.deepcache_branch if schedule is not None and "deep" in schedule.kinds else None
        return graph_cost(model.architecture, geometry, phase if schedule is None else schedule.graph(phase), branch)

    plan = (Phase(guided),) * steps if schedule is None else schedule.plan(steps, guided=guided)
    gate = steps if schedule is None else schedule.gate(steps)
    counts = [(cost(phase), count) for phase, count in Counter(plan).items()]
    whole = cost(plan[0])
    at_end = {name: size for phase in set(plan[gate:] or plan) for name, size in cost(phase).parameters.items()}
    return ImageCost(
        strip="".join(phase.character for phase in plan),
        macs=sum(each.macs.layers * count for each, count in counts),
        macs_with_attention=sum(each.macs.total * count for each, count in counts),
        parameters=sum(
            size for name, size in whole.parameters.items() if gate >= steps or name not in whole.cross_attention
        ),
        parameters_at_end=sum(at_end.values()),
    )
