"""The cost of one graph of a real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch.export.graph_signature import InputKind

from tgate_compile._call import Call
from tgate_compile._capture import capture, deep_layer
from tgate_compile._cost.models import Architecture, Shape
from tgate_compile._graphs import Captured
from tgate_compile._schedule import Phase
from tgate_compile.passes.count_macs import Macs, count_macs
from tgate_compile.passes.find_deep_feature import find_deep_feature
from tgate_compile.passes.specialize import specialize

#: Pixels of the image for one of the latents, in each direction: the autoencoders of all the models.
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Geometry:
    """The shape of one call: `batch` as the denoiser sees it (2B under guidance), height and width in pixels."""

    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class GraphCost:
    """The cost of one call of a graph.

    Attributes:
        macs: its multiply-accumulates.
        parameters: the elements of each parameter that it takes, by name.
        cross_attention: the names of the parameters that belong to cross-attentions.
    """

    macs: Macs
    parameters: Mapping[str, int]
    cross_attention: frozenset[str]


@cache
def graph_cost(architecture: Architecture, geometry: Geometry, phase: Phase, branch: int | None) -> GraphCost:
    """The cost of the graph of `phase`; `branch` is DeepCache's, None without it.

    Raises:
        UnsupportedModelError: DeepCache was asked for, and the denoiser is no UNet.
        ConfigurationError: it has no such branch.
    """
    # A wrong branch is told before the capture, which takes a while.
    layer = None if branch is None else deep_layer(_denoiser(architecture), branch)
    captured = _captured(architecture, geometry)
    if layer is not None:
        deep = find_deep_feature(captured.program.graph_module, layer)
        captured = dataclasses.replace(captured, sites=(*captured.sites, deep))
    variant = specialize(captured, phase)
    program = variant.program
    parameters = {
        str(spec.target): program.state_dict[str(spec.target)].numel()
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER
    }
    cross = tuple(f"{site.name}." for site in captured.sites if site.kind == "cross")
    return GraphCost(
        count_macs(program.graph), parameters, frozenset(name for name in parameters if name.startswith(cross))
    )


@cache
def _denoiser(architecture: Architecture) -> torch.nn.Module:
    with torch.device("meta"):
        denoiser: torch.nn.Module = architecture.denoiser(**architecture.config)
    return denoiser.eval()


@lru_cache(maxsize=4)  # of SDXL's, with thousands of nodes each
def _captured(architecture: Architecture, geometry: Geometry) -> Captured:
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
        call = Call.of((), {**inputs, "return_dict": False})
        return capture(denoiser, denoiser.forward, call, {"cross", "self"})
