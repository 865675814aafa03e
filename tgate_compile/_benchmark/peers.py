"""Other people's packages that do the same, and diffusers' own ways, as they say that they are to be used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import diffusers

from tgate_compile._errors import UnsupportedModelError

MSG_NO_LOADER = "tgate {version} has no loader for {pipeline}. It has them for {known}."
MSG_NO_MIXIN = "{denoiser} takes none of diffusers' cache hooks (it is no CacheMixin)."
MSG_NO_HELPER = "DeepCache's helper is for UNets, and {pipeline} has none."
MSG_NO_CUTOFF = "diffusers' callback that stops guidance is for SD and SDXL, not for {pipeline}."

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
        prepare: changes a pipeline, for a gate step.
        method: the key of our own method that does the same, if one does.
    """

    key: str
    title: str
    package: str
    prepare: Callable[[Any, int], Ready]
    method: str | None = None

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
            MSG_NO_LOADER.format(version=version("tgate"), pipeline=name, known=", ".join(known))
        )
    return getattr(importlib.import_module("tgate"), f"{_LOADERS[name]}{suffix}Loader")


def _deepcache(pipe: Any, gate: int) -> Ready:
    if not hasattr(pipe, "unet"):
        raise UnsupportedModelError(MSG_NO_HELPER.format(pipeline=type(pipe).__name__))
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
        raise UnsupportedModelError(MSG_NO_CUTOFF.format(pipeline=type(pipe).__name__))
    cutoff = kinds[type(pipe).__name__](cutoff_step_ratio=None, cutoff_step_index=gate - 1)
    return Ready(partial(pipe, callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=cutoff.tensor_inputs))


def _cache_hook(pipe: Any, gate: int, *, make: Callable[[Any], Any]) -> Ready:
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if not hasattr(denoiser, "enable_cache"):
        raise UnsupportedModelError(MSG_NO_MIXIN.format(denoiser=type(denoiser).__name__))
    denoiser.enable_cache(make(pipe))
    return Ready(pipe, denoiser.disable_cache)


def _first_block(pipe: Any) -> Any:
    return diffusers.FirstBlockCacheConfig()


def _pyramid(pipe: Any) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=6,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _faster(pipe: Any) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )


PEERS: tuple[Peer, ...] = (
    Peer("tgate_authors", "tgate {version}, v1", "tgate", partial(_authors, sp_interval=1), "tgate"),
    Peer("tgate_v2_authors", "tgate {version}, v2", "tgate", partial(_authors, sp_interval=5), "tgate_v2"),
    Peer("deepcache_authors", "DeepCache {version}", "DeepCache", _deepcache, "deepcache"),
    Peer("deepcache_tgate_authors", "tgate {version} + DeepCache", "tgate", _authors_with_deepcache, "deepcache_tgate"),
    Peer("cache_dit", "cache-dit {version}", "cache-dit", _cache_dit),
    Peer("guidance_cutoff", "diffusers guidance cutoff", "diffusers", _guidance_cutoff, "adaptive_guidance"),
    Peer("first_block_cache", "diffusers FirstBlockCache", "diffusers", partial(_cache_hook, make=_first_block)),
    Peer("pyramid_attention", "diffusers PyramidAttention", "diffusers", partial(_cache_hook, make=_pyramid)),
    Peer("faster_cache", "diffusers FasterCache", "diffusers", partial(_cache_hook, make=_faster)),
)


def of_its_own_class(pipe: Any) -> Any:
    """`pipe`, with a class that nothing else has: some packages change the class of what they are given."""
    kind = type(pipe)
    pipe.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    return pipe
