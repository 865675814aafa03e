"""The models, caching methods and other packages that benchmarks compare."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import ConfigurationError, UnsupportedModelError, is_installed
from tgate_compile.methods.adaptive_guidance import AdaptiveGuidance
from tgate_compile.methods.block_cache import BlockCache
from tgate_compile.methods.db_cache import DBCache
from tgate_compile.methods.deepcache import DeepCache
from tgate_compile.methods.delta_dit import DeltaDiT
from tgate_compile.methods.faster_cache import FasterCache
from tgate_compile.methods.first_block_cache import FirstBlockCache
from tgate_compile.methods.fora import Fora
from tgate_compile.methods.frozen_text import FrozenText
from tgate_compile.methods.method import Method
from tgate_compile.methods.pab import PAB
from tgate_compile.methods.schedule import Schedule, schedule_of
from tgate_compile.methods.tgate import TGate
from tgate_compile.study.architectures import MODELS, Architecture

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

#: The names in `MODELS` for which `random_pipeline` can make a pipeline.
NAMES = ("sd15", "sd21", "sdxl", "pixart_alpha")


def check_random_model(name: str) -> None:
    """Raise ConfigurationError unless `name` is one of `NAMES`."""
    if name not in NAMES:
        raise ConfigurationError(f"The models with random weights are {', '.join(NAMES)}, but got {name!r}.")


def random_pipeline(
    name: str, device: torch.device, dtype: torch.dtype, *, size: int | None = None
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return a pipeline with random weights and the arguments of its call.

    The call passes prompt embeddings instead of a prompt and returns latents instead of images.

    Args:
        name: one of `NAMES`.
        device: device of the weights.
        dtype: dtype of the weights.
        size: height and width of the image in pixels; None for the model's own size.

    Raises:
        ConfigurationError: the name is unknown.
    """
    check_random_model(name)
    # Not above: the command line reads the names for its help.
    import torch
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    from tgate_compile.study.architectures import PIXELS_PER_LATENT

    architecture = MODELS[name].architecture
    size = architecture.size if size is None else size
    latents = size // PIXELS_PER_LATENT
    _, tokens, width = _text_shape(architecture)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        denoiser = architecture.denoiser(**{**architecture.config, "sample_size": latents})
        text = torch.randn(1, tokens, width, dtype=dtype)
        pooled = torch.randn(1, 1280, dtype=dtype)
        mask = torch.ones(1, tokens, dtype=torch.long)
    denoiser = denoiser.to(dtype).eval().requires_grad_(False)
    call: dict[str, Any] = {
        "prompt_embeds": text,
        "negative_prompt_embeds": torch.zeros_like(text),
        "output_type": "latent",
        "height": size,
        "width": size,
    }
    if name == "pixart_alpha":
        call |= {"prompt_attention_mask": mask, "negative_prompt": None, "negative_prompt_attention_mask": mask}
        call |= {"use_resolution_binning": False}
        return PixArtAlphaPipeline(None, None, _vae(), denoiser, DDIMScheduler()), call
    if name == "sdxl":
        call |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
        return StableDiffusionXLPipeline(_vae(), None, None, None, None, denoiser, DDIMScheduler()), call
    pipe: Any = StableDiffusionPipeline(
        _vae(), None, None, denoiser, DDIMScheduler(), None, None, requires_safety_checker=False
    )
    return pipe, call


def _text_shape(architecture: Architecture) -> tuple[Any, ...]:
    shape = architecture.inputs["encoder_hidden_states"]
    assert isinstance(shape, tuple)
    return shape


def _vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    # It never runs; the pipeline only reads from it that latents are eight times smaller than images.
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )


PLAIN = "plain"
FEWER_STEPS = "fewer_steps"
#: The method whose cost determines the number of steps of "fewer steps".
TGATE = "tgate"

#: The defaults of the authors' packages for T-GATE v2 and DeepCache.
_SP_INTERVAL = 5
_DEEPCACHE_INTERVAL = 3

WHY_NO_UNET = "DeepCache needs a UNet, because it skips the UNet's deep layers. {denoiser} is a transformer."
WHY_NO_GUIDANCE = "This model runs without guidance, so guidance cannot be stopped."
WHY_SAME = "In {steps} steps of this model, it would be identical to {other}."
WHY_NO_STEP = "T-GATE saves {saved:.0%} of the operations here, which is less than half of one of the {steps} steps."
WHY_NO_COST = "The cost of T-GATE is unknown here, so the number of steps with equal cost is unknown too."


@dataclass(frozen=True)
class ComparedMethod:
    """A row of a comparison: a caching method with its settings, or the plain pipeline.

    Attributes:
        key: identifier for programs.
        title: name for people.
        schedule: the schedule; None for the plain pipeline.
        calibrated: whether the schedule is that of `CALIBRATED[key]`, which has to be measured on the model.
    """

    key: str
    title: str
    schedule: Schedule | None = None
    calibrated: bool = False


def methods_for(gate: int) -> tuple[ComparedMethod, ...]:
    """Return all compared methods, the plain pipeline first. Every method that stops guidance does so at `gate`."""
    tgate, deepcache = TGate(gate), DeepCache(_DEEPCACHE_INTERVAL)
    compared: dict[str, tuple[str, Method | Schedule]] = {
        TGATE: ("T-GATE v1", tgate),
        "tgate_v2": ("T-GATE v2", TGate(gate, sp_interval=_SP_INTERVAL)),
        "deepcache": ("DeepCache", deepcache),
        "deepcache_tgate": ("DeepCache + T-GATE", deepcache + tgate),
        "adaptive_guidance": ("Adaptive Guidance", AdaptiveGuidance(gate)),
    }
    return (
        ComparedMethod(PLAIN, "plain"),
        *(ComparedMethod(key, title, schedule_of(method)) for key, (title, method) in compared.items()),
        ComparedMethod(FEWER_STEPS, "fewer steps"),
    )


#: The methods of `caching_methods` with numbers that are measured on the model.
CALIBRATED: Mapping[str, str] = {"magcache": "MagCache", "teacache": "TeaCache"}

#: The methods that a comparison chooses for UNets, and for transformers, besides the plain pipeline.
FOR_UNETS = (TGATE, "tgate_v2", "deepcache", "deepcache_tgate", "adaptive_guidance", FEWER_STEPS)
FOR_TRANSFORMERS = (
    TGATE, "adaptive_guidance", "pab", "fora_forecast", "block_cache", "magcache", "first_block_cache", "teacache",
    FEWER_STEPS,
)  # fmt: skip

#: All methods that a comparison can choose from, in the order of its tables.
COMPARED = (
    *FOR_UNETS[:-1], "frozen_text", "pab", "fora", "fora_forecast", "block_cache", "delta_dit", "magcache",
    "first_block_cache", "dbcache", "teacache", "faster_cache", FEWER_STEPS,
)  # fmt: skip


def caching_methods(gate: int, denoiser: torch.nn.Module) -> tuple[ComparedMethod, ...]:
    """Return the methods that a comparison has besides those of `methods_for`, with settings for `denoiser`."""
    from torch.nn import ModuleList

    from tgate_compile.engine.families import has_joint_attention

    lists = [child for name, child in denoiser.named_children() if "blocks" in name and isinstance(child, ModuleList)]
    is_unet = hasattr(denoiser, "up_blocks")
    blocks = 2 if is_unet else max(2, sum(map(len, lists)))
    front = 0 if is_unet else 1
    compared: dict[str, tuple[str, Method]] = {
        "frozen_text": ("Frozen text", FrozenText(gate)),
        # In joint attention, the keys and values of the text are cached, and outputs of self-attentions do not exist.
        "pab": ("PAB", PAB(6, 1 if has_joint_attention(type(denoiser)) else 2)),
        "fora": ("FORA", Fora(2)),
        "fora_forecast": ("FORA, forecast", Fora(3, warm_up=3, forecast=1)),
        "block_cache": ("Block cache, forecast", BlockCache(2, front, warm_up=3, forecast=1)),
        "delta_dit": ("Delta-DiT", DeltaDiT(2, blocks=blocks // 2)),
        "first_block_cache": ("First-block cache", FirstBlockCache(0.12)),
        "dbcache": ("DBCache", DBCache(0.12, front=max(1, blocks // 8), warm_up=3)),
        "faster_cache": ("FasterCache", FasterCache(5)),
    }
    fixed = [ComparedMethod(key, title, schedule_of(method)) for key, (title, method) in compared.items()]
    return (*fixed, *(ComparedMethod(key, title, calibrated=True) for key, title in CALIBRATED.items()))


def _effect(schedule: Schedule, steps: int, *, guided: bool) -> tuple[Any, ...]:
    """Return what determines the images: what each step reuses, the blocks meant, the forecast, and the rule."""
    strip = schedule.strip(steps, guided=guided)
    return strip, dict(schedule.ranges), dict(schedule.forecasts), schedule.rule


def why_not(
    method: ComparedMethod,
    methods: Sequence[ComparedMethod],
    denoisers: Mapping[str, torch.nn.Module],
    *,
    steps: int,
    guided: bool,
) -> str | None:
    """Return why `method`, one of `methods`, does not apply to a model; None if it applies."""
    schedule = method.schedule
    if schedule is None:
        return None
    if "deep" in schedule.kinds:
        from tgate_compile.engine.capture import deep_layer  # not above: the command line reads the table for its help

        for denoiser in denoisers.values():
            try:
                deep_layer(denoiser, schedule.deepcache_branch)
            except UnsupportedModelError:
                return WHY_NO_UNET.format(denoiser=type(denoiser).__name__)
    if schedule.guidance_step is not None and not guided:
        return WHY_NO_GUIDANCE
    strip = schedule.strip(steps, guided=guided)
    effect = _effect(schedule, steps, guided=guided)
    for other in methods[: methods.index(method)]:
        if other.calibrated and other.schedule is None:
            continue
        plain = ("F" if guided else "f") * steps
        is_same = strip == plain if other.schedule is None else effect == _effect(other.schedule, steps, guided=guided)
        if is_same:
            return WHY_SAME.format(steps=steps, other=other.title)
    return None


def steps_at_equal_cost(steps: int, share: float | None) -> tuple[int, str | None]:
    """Return how many plain steps cost `share` of `steps`, and why they cannot be compared (None if they can)."""
    if share is None:
        return steps, WHY_NO_COST
    fewer = max(1, round(steps * share))
    return fewer, WHY_NO_STEP.format(saved=1 - share, steps=steps) if fewer >= steps else None


#: The authors' loaders by pipeline class; loaders with DeepCache exist for the first two only.
_LOADERS = {
    "StableDiffusionPipeline": "TgateSD",
    "StableDiffusionXLPipeline": "TgateSDXL",
    "PixArtAlphaPipeline": "TgatePixArtAlpha",
    "PixArtSigmaPipeline": "TgatePixArtSigma",
}
_WITH_DEEPCACHE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class Ready:
    """A pipeline that is ready to be measured.

    Attributes:
        generate: makes images; takes the arguments of the pipeline's call.
        undo: reverts changes that affect more than this pipeline.
    """

    generate: Callable[..., Any]
    undo: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer:
    """A method of another package to compare with.

    Attributes:
        key: identifier for programs.
        title: name for people, with a placeholder for the version.
        package: name of the package, as used by pip.
        modules: names of the modules that must be importable.
        prepare: applies the method to a pipeline, for a given gate step.
        method: key of this library's equivalent method, if there is one.
    """

    key: str
    title: str
    package: str
    modules: tuple[str, ...]
    prepare: Callable[[Any, int], Ready]
    method: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether everything that it needs is there."""
        return is_installed(*self.modules)

    @property
    def version(self) -> str | None:
        """The installed version of the package; None if it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _authors(pipe: Any, gate: int, *, sp_interval: int) -> Ready:
    loader = _loader(pipe, tuple(_LOADERS), "")
    return Ready(partial(loader(pipe).tgate, gate_step=gate, sp_interval=sp_interval, fi_interval=1, warm_up=2))


def _authors_with_deepcache(pipe: Any, gate: int) -> Ready:
    loader = _loader(pipe, _WITH_DEEPCACHE, "DeepCache")
    return Ready(partial(loader(pipe, cache_interval=3, cache_branch_id=0).tgate, gate_step=gate))


def _loader(pipe: Any, known: tuple[str, ...], suffix: str) -> Any:
    name = type(pipe).__name__
    if name not in known:
        raise UnsupportedModelError(
            f"tgate {version('tgate')} has no loader for {name}; it supports {', '.join(known)}."
        )
    return getattr(importlib.import_module("tgate"), f"{_LOADERS[name]}{suffix}Loader")


def _deepcache(pipe: Any, gate: int) -> Ready:
    if not hasattr(pipe, "unet"):
        raise UnsupportedModelError(f"DeepCache's helper needs a UNet, but {type(pipe).__name__} has none.")
    helper = importlib.import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)

    def generate(**call: Any) -> Any:
        helper.enable()  # anew for each generation, so that caches of the previous one are discarded
        try:
            return pipe(**call)
        finally:
            helper.disable()

    return Ready(generate)


def _cache_dit(pipe: Any, gate: int) -> Ready:
    package = importlib.import_module("cache_dit")
    blocks = getattr(getattr(pipe, "transformer", None), "transformer_blocks", ())
    # The defaults compute eight blocks in every step. A transformer with at most eight blocks computes one instead.
    own = {"cache_config": package.DBCacheConfig(Fn_compute_blocks=1)} if 0 < len(blocks) <= 8 else {}
    package.enable_cache(pipe, **own)
    return Ready(pipe, partial(package.disable_cache, pipe))


def _guidance_cutoff(pipe: Any, gate: int) -> Ready:
    from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback

    kinds = {"StableDiffusionPipeline": SDCFGCutoffCallback, "StableDiffusionXLPipeline": SDXLCFGCutoffCallback}
    if type(pipe).__name__ not in kinds:
        raise UnsupportedModelError(
            f"diffusers' guidance cutoff callback supports SD and SDXL only, not {type(pipe).__name__}."
        )
    cutoff = kinds[type(pipe).__name__](cutoff_step_ratio=None, cutoff_step_index=gate - 1)
    return Ready(partial(pipe, callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=cutoff.tensor_inputs))


def _cache_hook(pipe: Any, gate: int, *, make: Callable[[Any], Any]) -> Ready:
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if not hasattr(denoiser, "enable_cache"):
        raise UnsupportedModelError(
            f"{type(denoiser).__name__} does not support diffusers' cache hooks (it is not a CacheMixin)."
        )
    denoiser.enable_cache(make(pipe))
    return Ready(pipe, denoiser.disable_cache)


def _first_block(pipe: Any) -> Any:
    import diffusers

    return diffusers.FirstBlockCacheConfig()


def _pyramid(pipe: Any) -> Any:
    import diffusers

    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=6,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _faster(pipe: Any) -> Any:
    import diffusers

    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )


PEERS: tuple[Peer, ...] = (
    Peer("tgate_authors", "tgate {version}, v1", "tgate", ("tgate",), partial(_authors, sp_interval=1), "tgate"),
    Peer("tgate_v2_authors", "tgate {version}, v2", "tgate", ("tgate",), partial(_authors, sp_interval=5), "tgate_v2"),
    Peer("deepcache_authors", "DeepCache {version}", "DeepCache", ("DeepCache",), _deepcache, "deepcache"),
    Peer(
        "deepcache_tgate_authors",
        "tgate {version} + DeepCache",
        "tgate",
        ("tgate", "DeepCache"),
        _authors_with_deepcache,
        "deepcache_tgate",
    ),
    Peer("cache_dit", "cache-dit {version}", "cache-dit", ("cache_dit",), _cache_dit),
    Peer("guidance_cutoff", "diffusers guidance cutoff", "diffusers", (), _guidance_cutoff, "adaptive_guidance"),
    Peer("first_block_cache", "diffusers FirstBlockCache", "diffusers", (), partial(_cache_hook, make=_first_block)),
    Peer("pyramid_attention", "diffusers PyramidAttention", "diffusers", (), partial(_cache_hook, make=_pyramid)),
    Peer("faster_cache", "diffusers FasterCache", "diffusers", (), partial(_cache_hook, make=_faster)),
)


def with_private_class(pipe: Any) -> Any:
    """Give `pipe` a class that no other object has, because some packages modify the class of the pipeline."""
    kind = type(pipe)
    pipe.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    return pipe
