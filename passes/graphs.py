"""The central data types: a captured denoiser, its sites, and the variants derived from it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from tgate_compile.methods.method import Kind, Phase


@dataclass(frozen=True)
class Site:
    """A value inside the denoiser that can be cached and reused.

    Attributes:
        kind: the kind of the value.
        name: the path of the module that produces it, e.g. `mid_block.attentions.0.transformer_blocks.0.attn2`;
            with a number, as in `block#2`, if that module has several attentions or is called several times.
        node: the name of its node in the captured graph.
        shape: the shape of the cached value, [batch, tokens, dim] (batch 2B under guidance).
        dtype: the dtype of the value in the graph.
        cache_dtype: the dtype of the cached value.
        batch: the batch dimension in the graph; in the cached value it is always the first.
    """

    kind: Kind
    name: str
    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    batch: int = 0

    @property
    def nbytes(self) -> int:
        """The size of the cached value, in bytes."""
        return prod(self.shape) * self.cache_dtype.itemsize


@dataclass(frozen=True)
class Captured:
    """A denoiser as one graph, for inputs of one shape.

    Attributes:
        program: the exported program, which shares the parameters of the user's module.
        input_names: the names of the graph's inputs, for each leaf of the call's (args, kwargs) in pytree order.
        latents: the name of the input that carries the latents.
        out_spec: the pytree structure of the denoiser's return value.
        sites: the values that can be cached, grouped by kind and in graph order, with the deep feature last.
    """

    program: ExportedProgram
    input_names: tuple[str, ...]
    latents: str
    out_spec: pytree.TreeSpec
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Emission:
    """A site whose value is an output of a graph.

    Attributes:
        site: the site.
        anchor: the weight of the second half of the batch (usually the cond half) if the guidance halves are merged;
            None means that the value is emitted unchanged.
    """

    site: Site
    anchor: float | None = None

    @property
    def merged(self) -> bool:
        """Whether the guidance halves are merged, so that the batch is half the site's."""
        return self.anchor is not None

    @property
    def nbytes(self) -> int:
        """The size of the emitted value, in bytes."""
        return self.site.nbytes // (2 if self.merged else 1)


@dataclass(frozen=True)
class Variant:
    """The graph of one phase, for inputs of one shape.

    Its program takes flat tensors, `inputs` followed by the caches of `reused`, and returns a flat tuple: the
    denoiser's outputs, followed by the caches of `emitted`.

    Attributes:
        phase: the phase that it serves.
        program: the graph with its parameters, which are shared with the user's module.
        inputs: the names of its inputs without the caches. Unused inputs are left out.
        reused: the sites whose values are inputs, in order. A reused site is left out if everything that depends on it
            is reused as well.
        emitted: the sites whose values are outputs, in order.
    """

    phase: Phase
    program: ExportedProgram
    inputs: tuple[str, ...]
    reused: tuple[Site, ...]
    emitted: tuple[Emission, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The qualified names of the parameters, buffers and constants that the graph takes, in its order."""
        specs = self.program.graph_signature.input_specs
        return tuple(str(spec.target) for spec in specs if spec.kind is not InputKind.USER_INPUT)
