"""What a benchmark compares: models, this library's methods, and other packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import ConfigurationError, UnsupportedModelError, is_installed
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.cost import MODELS, Architecture

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

#: Of `MODELS`, those whose pipelines are made here.
NAMES = ("sd15", "sd21", "sdxl", "pixart_alpha")


def check_random_model(name: str) -> None:
    """Raise ConfigurationError unless `name` is one of `NAMES`."""
    if name not in NAMES:
        raise ConfigurationError(f"The models with random weights are {', '.join(NAMES)}, but got {name!r}.")


def random_pipeline(
    name: str, device: torch.device, dtype: torch.dtype, *, size: int | None = None
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline with this denoiser, and the arguments of its call: embeddings for a prompt, latents for an image.

    Args:
        name: one of `NAMES`.
        device: where to.
        dtype: of the weights.
        size: height and width of the image in pixels; None is the model's own.

    Raises:
        ConfigurationError: there is no such model.
    """
    check_random_model(name)
    # Not above: the command line reads the names for its help.
    import torch
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    from tgate_compile.study.cost import PIXELS_PER_LATENT

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

    # Never run: it only tells the pipeline that latents are eight times smaller than images.
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )


PLAIN = "plain"
FEWER_STEPS = "fewer_steps"
#: The one whose cost "fewer steps" is to have.
TGATE = "tgate"

#: Of the authors of T-GATE v2 and of DeepCache, in their packages.
_SP_INTERVAL = 5
_DEEPCACHE_INTERVAL = 3

WHY_NO_UNET = "DeepCache needs a UNet, whose deep part it skips in most steps. {denoiser} is a transformer."
WHY_NO_GUIDANCE = "This model runs without guidance, so that there is none to stop."
WHY_SAME = "In {steps} steps of this model it would do the very same as {other}."
WHY_NO_STEP = "T-GATE saves {saved:.0%} of the operations here: less than half of one of the {steps} steps."
WHY_NO_COST = "What T-GATE costs here is not known, so neither are the steps that cost as much."


@dataclass(frozen=True)
class Method:
    """One way to run a model.

    Attributes:
        key: for programs.
        title: for people.
        schedule: None for the plain pipeline.
    """

    key: str
    title: str
    schedule: Schedule | None = None


def methods_for(gate: int) -> tuple[Method, ...]:
    """All methods, the plain pipeline first; guidance stops at the same step in all that stop it."""
    return (
        Method(PLAIN, "plain"),
        Method(TGATE, "T-GATE v1", Schedule(gate)),
        Method("tgate_v2", "T-GATE v2", Schedule(gate, sp_interval=_SP_INTERVAL)),
        Method("deepcache", "DeepCache", Schedule(None, deepcache_interval=_DEEPCACHE_INTERVAL)),
        Method("deepcache_tgate", "DeepCache + T-GATE", Schedule(gate, deepcache_interval=_DEEPCACHE_INTERVAL)),
        Method("adaptive_guidance", "Adaptive Guidance", Schedule(None, guidance_step=gate)),
        Method(FEWER_STEPS, "fewer steps"),
    )


def why_not(
    method: Method, methods: Sequence[Method], denoisers: Mapping[str, torch.nn.Module], *, steps: int, guided: bool
) -> str | None:
    """Why `method`, one of `methods`, does not apply to a model; None if it does."""
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
    for other in methods[: methods.index(method)]:
        plain = ("F" if guided else "f") * steps
        if strip == (plain if other.schedule is None else other.schedule.strip(steps, guided=guided)):
            return WHY_SAME.format(steps=steps, other=other.title)
    return None


def steps_at_equal_cost(steps: int, share: float | None) -> tuple[int, str | None]:
    """How many of `steps` plain steps cost `share` of them all; and why this is no comparison, if it is none."""
    if share is None:
        return steps, WHY_NO_COST
    fewer = max(1, round(steps * share))
    return fewer, WHY_NO_STEP.format(saved=1 - share, steps=steps) if fewer >= steps else None


#: The authors' loaders, by the pipeline's class; those with DeepCache are for the first two.
_LOADERS = {
    "StableDiffusionPipeline": "TgateSD",
    "StableDiffusionXLPipeline": "TgateSDXL",
    "PixArtAlphaPipeline": "TgatePixArtAlpha",
    "PixArtSigmaPipeline": "TgatePixArtSigma",
}
_WITH_DEEPCACHE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class Ready:
    """A pipeline that a peer has changed.

    Attributes:
        generate: makes images with the arguments of the pipeline's call.
        undo: takes back what reaches beyond this pipeline.
    """

    generate: Callable[..., Any]
    undo: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer:
    """Something to compare with.

    Attributes:
        key: for programs.
        title: for people, with a place for the version.
        package: that it is in: the name to install it by.
        modules: that must be there, by the names that they are imported by.
        prepare: changes a pipeline, for a gate step.
        method: the key of our own method that does the same, if one does.
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
        """The installed one; None if it is not installed."""
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
            f"tgate {version('tgate')} has no loader for {name}. It has them for {', '.join(known)}."
        )
    return getattr(importlib.import_module("tgate"), f"{_LOADERS[name]}{suffix}Loader")


def _deepcache(pipe: Any, gate: int) -> Ready:
    if not hasattr(pipe, "unet"):
        raise UnsupportedModelError(f"DeepCache's helper is for UNets, and {type(pipe).__name__} has none.")
    helper = importlib.import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)

    def generate(**call: Any) -> Any:
        helper.enable()  # a generation of its own: what it has cached is thrown away
        try:
            return pipe(**call)
        finally:
            helper.disable()

    return Ready(generate)


def _cache_dit(pipe: Any, gate: int) -> Ready:
    package = importlib.import_module("cache_dit")
    blocks = getattr(getattr(pipe, "transformer", None), "transformer_blocks", ())
    # Its defaults, which compute eight blocks in every step, or for a transformer that has no more than these, one.
    own = {"cache_config": package.DBCacheConfig(Fn_compute_blocks=1)} if 0 < len(blocks) <= 8 else {}
    package.enable_cache(pipe, **own)
    return Ready(pipe, partial(package.disable_cache, pipe))


def _guidance_cutoff(pipe: Any, gate: int) -> Ready:
    from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback

    kinds = {"StableDiffusionPipeline": SDCFGCutoffCallback, "StableDiffusionXLPipeline": SDXLCFGCutoffCallback}
    if type(pipe).__name__ not in kinds:
        raise UnsupportedModelError(
            f"diffusers' callback that stops guidance is for SD and SDXL, not for {type(pipe).__name__}."
        )
    cutoff = kinds[type(pipe).__name__](cutoff_step_ratio=None, cutoff_step_index=gate - 1)
    return Ready(partial(pipe, callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=cutoff.tensor_inputs))


def _cache_hook(pipe: Any, gate: int, *, make: Callable[[Any], Any]) -> Ready:
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if not hasattr(denoiser, "enable_cache"):
        raise UnsupportedModelError(
            f"{type(denoiser).__name__} takes none of diffusers' cache hooks (it is no CacheMixin)."
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


def of_its_own_class(pipe: Any) -> Any:
    """`pipe`, with a class that nothing else has: some packages change the class of what they are given."""
    kind = type(pipe)
    pipe.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    return pipe
