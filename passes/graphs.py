"""The graphs that everything else is about: a captured denoiser, and the variants made of it."""

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
        kind: what it is.
        name: the path of the module that produces it, e.g. `mid_block.attentions.0.transformer_blocks.0.attn2`;
            with a number, `block#2`, where that module has several attentions or is called several times.
        node: the name of its node in the captured graph.
        shape: its shape as it is cached, [batch, tokens, dim] (batch 2B under guidance).
        dtype: its dtype.
        cache_dtype: the dtype that it is cached in.
        batch: the dimension of the batch in the graph, which comes first in the cache.
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
        """Of the value, as it is cached."""
        return prod(self.shape) * self.cache_dtype.itemsize


@dataclass(frozen=True)
class Captured:
    """A denoiser as one graph, for inputs of one shape.

    Attributes:
        program: the exported program. Its parameters are those of the user's module, not copies.
        input_names: for each leaf of the call's (args, kwargs), in pytree order, the graph's name for it.
        latents: the name of the input that carries the latents.
        out_spec: how the graph's flat outputs make up what the denoiser returns.
        sites: what can be cached: cross-attentions, then self-attentions, then the deep feature; each in graph order.
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
        site: which.
        anchor: the weight of the second half of the batch (the cond half, as a rule) where the guidance halves are
            merged into one; None hands on the value as it is.
    """

    site: Site
    anchor: float | None = None

    @property
    def merged(self) -> bool:
        """Whether its batch is half the site's."""
        return self.anchor is not None

    @property
    def nbytes(self) -> int:
        """Of what is handed on."""
        return self.site.nbytes // (2 if self.merged else 1)


@dataclass(frozen=True)
class Variant:
    """The graph of one phase, for inputs of one shape.

    Its program takes flat tensors, `inputs` then the caches of `reused`, and returns a flat tuple: what the
    denoiser returns, then the caches of `emitted`.

    Attributes:
        phase: the phase that it serves.
        program: the graph with its parameters, which are shared with the user's module.
        inputs: the names of its inputs, caches left out. An input that nothing uses is not among them.
        reused: the sites whose values are inputs, in order. A reused site that nothing needs, since all that it feeds
            is reused as well, is not among them.
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
