"""Count the cost of graphs and whole images on models of real size, for comparison with the paper's tables."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import CROSS, Phase
from tgate_compile.methods.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from tgate_compile.passes.count_macs import Macs
    from tgate_compile.passes.graphs import Captured, Variant

#: The dimensions of one input. Strings stand for the batch and the size of the latents. None: the input is None.
Shape = tuple[int | str, ...] | None


@dataclass(frozen=True, eq=False)
class Architecture:
    """A denoiser and the inputs of its call. Compared by identity, because models may share one architecture.

    Attributes:
        denoiser_class: name of the denoiser's class in diffusers.
        config: the configuration of the published checkpoint, without values that are the class's defaults.
        inputs: the shapes of the call's inputs; may be nested by one level of dicts.
        size: height and width, in pixels, of the images the model was trained on.
        constants: arguments of the call that are not tensors.
        is_joint: whether text and latents share their attentions, so that the model cannot be gated.
    """

    denoiser_class: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Shape | Mapping[str, Shape]]
    size: int
    constants: Mapping[str, Any] = field(default_factory=dict)
    is_joint: bool = False

    @property
    def denoiser(self) -> type[Any]:
        """The denoiser's class."""
        import diffusers  # not above: the command line reads the table for its help

        found: type[Any] = getattr(diffusers, self.denoiser_class)
        return found


@dataclass(frozen=True)
class Model:
    """A model as the paper's tables use it.

    Attributes:
        architecture: the denoiser.
        steps: number of denoising steps.
        guided: whether guidance is on, which doubles the batch.
    """

    architecture: Architecture
    steps: int = 25
    guided: bool = True


_LATENTS: Shape = ("batch", 4, "height", "width")


def _unet(size: int, text: Shape, inputs: Mapping[str, Shape | Mapping[str, Shape]], **config: Any) -> Architecture:
    call = {"sample": _LATENTS, "timestep": (), "encoder_hidden_states": text, **inputs}
    return Architecture("UNet2DConditionModel", config, call, size)


_SD15 = _unet(512, ("batch", 77, 768), {}, cross_attention_dim=768)
_SD21 = _unet(
    768, ("batch", 77, 1024), {}, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
)  # fmt: skip
_SDXL = _unet(
    1024,
    ("batch", 77, 2048),
    {"added_cond_kwargs": {"text_embeds": ("batch", 1280), "time_ids": ("batch", 6)}},
    cross_attention_dim=2048,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
# The guidance scale is a separate input, embedded in the same way as the timestep.
_LCM_SDXL = replace(
    _SDXL,
    config={**_SDXL.config, "time_cond_proj_dim": 256},
    inputs={**_SDXL.inputs, "timestep_cond": ("batch", 256)},
)


def _pixart(tokens: int, conditions: Mapping[str, Shape], **config: Any) -> Architecture:
    inputs: dict[str, Shape | Mapping[str, Shape]] = {
        "hidden_states": _LATENTS,
        "encoder_hidden_states": ("batch", tokens, 4096),
        "timestep": ("batch",),
        "added_cond_kwargs": conditions,
        "encoder_attention_mask": ("batch", tokens),
    }
    shared = {"sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 2}
    return Architecture("PixArtTransformer2DModel", {**shared, **config}, inputs, 1024)


_PIXART_ALPHA = _pixart(120, {"resolution": ("batch", 2), "aspect_ratio": ("batch", 1)})
_PIXART_SIGMA = _pixart(300, {"resolution": None, "aspect_ratio": None}, use_additional_conditions=False)

#: Models by name in the paper's tables (paper_tables.json).
MODELS: Mapping[str, Model] = {
    "sd15": Model(_SD15),
    "sd21": Model(_SD21),
    "sdxl": Model(_SDXL),
    "pixart_alpha": Model(_PIXART_ALPHA),
    "pixart_sigma": Model(_PIXART_SIGMA),
    "lcm_sdxl": Model(_LCM_SDXL, steps=4, guided=False),
    "lcm_pixart_alpha": Model(_PIXART_ALPHA, steps=4, guided=False),
}

_SD35_LARGE = Architecture(
    "SD3Transformer2DModel",
    {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    {
        "hidden_states": ("batch", 16, "height", "width"),
        "encoder_hidden_states": ("batch", 333, 4096),
        "pooled_projections": ("batch", 2048),
        "timestep": ("batch",),
    },
    1024,
    is_joint=True,
)  # fmt: skip
# Latents of 1024 x 1024 pixels, in patches of 2 x 2.
_PATCHES: Shape = ("batch", 4096, 64)
_FLUX1_DEV = Architecture(
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    {
        "hidden_states": _PATCHES,
        "encoder_hidden_states": ("batch", 512, 4096),
        "pooled_projections": ("batch", 768),
        "timestep": ("batch",),
        "img_ids": (4096, 3),
        "txt_ids": (512, 3),
        "guidance": ("batch",),
    },
    1024,
    is_joint=True,
)
_QWEN_IMAGE = Architecture(
    "QwenImageTransformer2DModel",
    {},
    {
        "hidden_states": _PATCHES,
        "encoder_hidden_states": ("batch", 128, 3584),
        "encoder_hidden_states_mask": ("batch", 128),
        "timestep": ("batch",),
    },
    1024,
    constants={"img_shapes": [[(1, 64, 64)]]},
    is_joint=True,
)

#: Models that cannot be gated, for `binding_time_rows`. The last two evaluate guidance in calls of their own, or not at
#: all.
JOINT_MODELS: Mapping[str, Model] = {
    "sd35_large": Model(_SD35_LARGE),
    "flux1_dev": Model(_FLUX1_DEV, guided=False),
    "qwen_image": Model(_QWEN_IMAGE, guided=False),
}


def model_named(name: str, models: Mapping[str, Model] = MODELS) -> Model:
    """Return the model called `name` among `models`.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if name not in models:
        raise ConfigurationError(f"The model must be one of {', '.join(models)}, but got {name!r}.")
    return models[name]


#: Image pixels per latent in each direction; the same for the autoencoders of all models.
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Geometry:
    """The size of one denoiser call.

    Attributes:
        batch: batch size as the denoiser sees it: twice the number of images under guidance.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """

    batch: int
    height: int
    width: int


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
def graph_cost(architecture: Architecture, geometry: Geometry, phase: Phase, branch: int | None) -> GraphCost:
    """Return the cost of the graph of `phase`, with DeepCache's `branch` (None: without DeepCache).

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
    captured = _captured(architecture, geometry)
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
def _captured(architecture: Architecture, geometry: Geometry) -> Captured:
    import torch

    from tgate_compile.engine.call import Call
    from tgate_compile.engine.capture import capture

    denoiser = _denoiser(architecture)
    sizes = {
        "batch": geometry.batch,
        "height": geometry.height // PIXELS_PER_LATENT,
        "width": geometry.width // PIXELS_PER_LATENT,
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
        call = Call.of((), {**inputs, **architecture.constants, "return_dict": False})
        return capture(denoiser, denoiser.forward, call, () if architecture.is_joint else ("cross", "self"))


@dataclass(frozen=True)
class ImageCost:
    """The cost of the denoiser over all steps of one generation.

    Attributes:
        strip: one character per step, as in `docs/reference/schedules.md`.
        macs: multiply-accumulates in linear and convolution layers, which is the paper's convention.
        macs_with_attention: `macs` plus the matrix products inside attention.
        parameters: parameters of the denoiser. With a gate, the weights of the cross-attentions are not counted, as in
            the paper.
        parameters_at_end: parameters that the graphs from the gate on actually read (without a gate: the graphs of all
            steps). Smaller than `parameters`, because layers that only feed cross-attentions are removed as well.
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
    """Return the cost of `batch` images under `schedule` (None: every step runs in full).

    Arguments that are None take the model's own value. One denoiser call per step is counted, as first-order
    schedulers make.

    Raises:
        UnsupportedModelError: the schedule uses DeepCache, but the denoiser is not a UNet.
        ConfigurationError: the UNet does not have the schedule's DeepCache branch.
    """
    steps = model.steps if steps is None else steps
    guided = model.guided if guided is None else guided
    height, width = height or model.architecture.size, width or model.architecture.size

    def cost(phase: Phase) -> GraphCost:
        geometry = Geometry(2 * batch if phase.guided else batch, height, width)
        branch = schedule.deepcache_branch if schedule is not None and "deep" in schedule.kinds else None
        return graph_cost(
            model.architecture, geometry, phase if schedule is None else schedule.graph_phase(phase), branch
        )

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


@dataclass(frozen=True)
class BindingTimes:
    """The parameters of a model by binding time: how often the work that reads them has to run.

    Attributes:
        parameters: the number of all parameters of the denoiser.
        prompt: parameters that are read once per generation.
        timestep: parameters that are read once per timestep, for a row of values.
        step: the other parameters, most of which the step reads for each timestep and its latents.
        unread: parameters in `step` that nothing reads, like the end of the text stream in Qwen-Image's last block.
        pruned_step: parameters that the step reads after the gate; None if the model cannot be gated.
        prelude_bytes: the size of the values that are computed once per generation, for one image.
        row_bytes: the size of the values of one timestep, for one image.
    """

    parameters: int
    prompt: int
    timestep: int
    step: int
    unread: int
    pruned_step: int | None
    prelude_bytes: int
    row_bytes: int


def binding_times(model: Model) -> BindingTimes:
    """Split the graph of a full step of `model` by binding time, and count the parameters of each part."""
    from tgate_compile.passes.binding_times import SplitVariant, split_by_binding
    from tgate_compile.passes.graphs import outputs_of
    from tgate_compile.passes.specialize import specialize

    size = model.architecture.size
    captured = _captured(model.architecture, Geometry(2 if model.guided else 1, size, size))

    def split(phase: Phase) -> SplitVariant:
        return split_by_binding(specialize(captured, phase), captured.roles)

    def read(part: Variant | None) -> dict[str, int]:
        return {} if part is None else {name: part.program.state_dict[name].numel() for name in _parameters(part)}

    def values(part: Variant | None) -> int:
        return 0 if part is None else sum(node.meta["val"].nbytes for node in outputs_of(part.program.graph))

    full = split(Phase(model.guided))
    prelude, table, step = (read(part) for part in (full.prelude, full.table, full.step))
    pruned = None if model.architecture.is_joint else split(Phase(model.guided, reuse=CROSS)).step
    everything = sum(parameter.numel() for parameter in _denoiser(model.architecture).parameters())
    of_prompt = sum(count for name, count in prelude.items() if name not in {**table, **step})
    of_timestep = sum(count for name, count in table.items() if name not in step)
    return BindingTimes(
        parameters=everything,
        prompt=of_prompt,
        timestep=of_timestep,
        step=everything - of_prompt - of_timestep,
        unread=everything - sum({**prelude, **table, **step}.values()),
        pruned_step=None if pruned is None else sum(read(pruned).values()),
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
