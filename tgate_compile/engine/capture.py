"""Capture a denoiser as one graph, on the inputs of a real call."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.export import ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import config as fx_config

from tgate_compile._errors import CaptureError, ConfigurationError, UnsupportedModelError
from tgate_compile.engine.call import BatchDims, Call
from tgate_compile.engine.halves import LATENTS_NAMES, fits, is_time, latents_of, named_leaves
from tgate_compile.engine.traffic import exclusive
from tgate_compile.methods.method import Kind
from tgate_compile.passes.attention_core import attention_cores
from tgate_compile.passes.editing import is_mutable, outputs_of
from tgate_compile.passes.find_sites import Inputs, count_roles, find_attention, find_deep_feature, is_inside
from tgate_compile.passes.graphs import Captured, Site

logger = logging.getLogger(__name__)

MSG_EXPORT_FAILED = (
    "Could not capture {model} as a graph with torch.export ({error}). The model must run without data-dependent "
    "Python control flow; a custom attention processor, a hook or a patched forward is the usual cause."
)
_CHANGES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
MSG_NO_SITES = (
    "{model} has no cross-attention that can be cached: no attention in it takes its queries from the latents and "
    "its keys and values from the text alone. Joint attention (SD3, Flux) mixes both in one sequence. "
    "What works instead: fewer steps, or dropping guidance after some steps."
)
MSG_WHAT_WAS_FOUND = (
    "Found in its graph: {count} attentions, of which {own} take keys and values that follow the latents, and {others} "
    "have queries that do not, or keys and values that follow no input. The latents are taken to be {latents}. "
    "docs/guides/own-denoiser.md says which forms of attention are recognized."
)


@exclusive()
def capture(
    denoiser: torch.nn.Module,
    forward: Callable[..., Any],
    call: Call,
    kinds: Collection[Kind] = frozenset({"cross"}),
    deep_layer: str | None = None,
    *,
    only: Sequence[str] | None = None,
    cache_dtype: torch.dtype | None = None,
    shapes: ShapesCollection | None = None,
    required: bool = True,
) -> Captured:
    """The graph of `denoiser` for inputs like those of `call`, with its sites.

    Args:
        denoiser: the module; its parameters become the graph's, not copies.
        forward: its original forward, without our hook.
        call: the inputs, [2B, ...] under guidance.
        kinds: the kinds of site to look for.
        deep_layer: for the kind `deep`, the up layer at which the shallow part begins.
        only: patterns of the names of the attentions to cache; None means all.
        cache_dtype: what they are cached in; None means their own dtype.
        shapes: sizes of the call's tensors that are left free; None means that all are those of `call`.
        required: refuse a denoiser that has no site of one of `kinds`.

    Raises:
        CaptureError: torch.export failed.
        UnsupportedModelError: there is no cross-attention, or not every one of the model's was found; or there is no
            self-attention, and the kind `self` is asked for.
        ConfigurationError: a pattern of `only` matches nothing.
    """
    model = type(denoiser).__name__
    args, kwargs = call.arguments
    began = time.perf_counter()
    with _forward_of(denoiser, forward), without_stack_traces(), torch.no_grad():
        try:
            program = torch.export.export(
                denoiser,
                args,
                kwargs,
                strict=False,
                dynamic_shapes=shapes,  # type: ignore[arg-type]  # which it takes, but does not say so
            )
        except Exception as error:  # torch.export raises whatever the model's code raises
            raise CaptureError(
                MSG_EXPORT_FAILED.format(model=model, error=f"{type(error).__name__}: {error}")
            ) from error
    program = _functional(program)
    names = tuple(spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT)
    if len(names) != len(call.leaves) or not all(
        isinstance(spec.arg, TensorArgument) and spec.kind is OutputKind.USER_OUTPUT
        for spec in program.graph_signature.output_specs
    ):
        changed = [spec.target for spec in program.graph_signature.output_specs if spec.kind in _CHANGES]
        shown = ", ".join(map(str, changed[:3]))
        what = f"it changes {shown} when it runs" if changed else "it returns something else than plain tensors"
        raise CaptureError(MSG_EXPORT_FAILED.format(model=model, error=what))

    inputs = _inputs_of(program, forward, call)
    batch_dims = None if _is_from_diffusers(denoiser) else BatchDims(program, call, inputs.latents[0]).of
    attention = find_attention(program.graph_module, inputs, kinds, batch_dims)
    sites = tuple(sorted(attention, key=lambda site: site.kind))  # stable: cross, then self, each in graph order
    if required and "cross" in kinds:
        _check_sites(denoiser, program, inputs, sites)
    if required and "self" in kinds and not any(site.kind == "self" for site in sites):
        raise UnsupportedModelError(
            f"sp_interval and fi_interval cache self-attention, and {model} has none that could be found. Leave "
            "them at 1."
        )
    if required and "temporal" in kinds and not any(site.kind == "temporal" for site in sites):
        raise UnsupportedModelError(
            f"{model} has no attention between frames that could be found, to cache. Leave temporal_interval at 1."
        )
    if only is not None:
        sites = _selected(sites, only)
    if "deep" in kinds and deep_layer is not None:
        sites = (*sites, find_deep_feature(program.graph_module, deep_layer))
    if cache_dtype is not None:
        sites = tuple(dataclasses.replace(site, cache_dtype=cache_dtype) for site in sites)
    logger.info(
        "captured %s: %d nodes, %d sites, in %.1f s",
        model, len(program.graph.nodes), len(sites), time.perf_counter() - began,
    )  # fmt: skip
    out_spec = program.module_call_graph[0].signature.out_spec
    return Captured(program, names, inputs.latents[0].name, out_spec, sites)


def _selected(sites: tuple[Site, ...], patterns: Sequence[str]) -> tuple[Site, ...]:
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ConfigurationError(
                f"sites: {pattern!r} matches none of the attentions that can be cached: "
                f"{', '.join(site.name for site in sites)}."
            )
    return tuple(site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns))


def _functional(program: ExportedProgram) -> ExportedProgram:
    """`program` without in-place operators: their results may have no users, and would be removed as dead."""
    if not any(is_mutable(node) for node in program.graph.nodes):
        return program
    # An empty table decomposes nothing else, so that the numbers stay the same to the bit.
    functional: ExportedProgram = program.run_decompositions({})
    return functional


def cross_attention_modules(denoiser: torch.nn.Module) -> list[str]:
    """The paths of the modules that call themselves cross-attentions: diffusers' `Attention`, most of its relatives."""
    return [name for name, module in denoiser.named_modules() if getattr(module, "is_cross_attention", False) is True]


def denies_cross_attention(denoiser: torch.nn.Module) -> bool:
    """Whether it is a fact, without a graph, that `denoiser` has no cross-attention.

    It is if it has attentions of diffusers' kind, and all say of themselves that they are none, or compute joint
    attention. One that says nothing may be one, and a denoiser without such attentions may have others: then only the
    graph tells.
    """
    attentions = [module for module in denoiser.modules() if hasattr(module, "to_k")]
    if any(vars(module).get("self_attn") is False for module in denoiser.modules()):
        return False  # Würstchen's blocks give an attention the text alone if this is off, whatever that says of itself
    is_unet = type(denoiser).__module__.startswith("diffusers.models.unets.")  # which have no others
    return bool(attentions or is_unet) and all(
        getattr(module, "is_cross_attention", None) is False or _is_joint(module) for module in attentions
    )


def _is_joint(attention: torch.nn.Module) -> bool:
    """Whether an attention puts the text's keys beside the latents' own: Kandinsky 2's, DeepFloyd IF's, unCLIP's."""
    processor = type(getattr(attention, "processor", None)).__name__
    return processor.startswith("AttnAddedKV") and not getattr(attention, "only_cross_attention", False)


def check_patterns(denoiser: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Raise ConfigurationError for a pattern that no module's path matches; what it selects is seen at the capture."""
    names = [name for name, _ in denoiser.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join((cross_attention_modules(denoiser) or names)[:2])
            raise ConfigurationError(
                f"sites: {pattern!r} matches no module of {type(denoiser).__name__}. Its attentions are called "
                f"{examples}, for example."
            )


def deep_layer(denoiser: torch.nn.Module, branch: int) -> str:
    """The path of the up layer at which DeepCache's shallow part begins, for cache branch `branch`.

    Branches count skip connections from the outside, three to a block, as the authors' package does.

    Raises:
        UnsupportedModelError: the denoiser is no UNet.
        ConfigurationError: it has no such branch.
    """
    up_blocks = getattr(denoiser, "up_blocks", None)
    if up_blocks is None or not all(hasattr(block, "resnets") for block in up_blocks):
        raise UnsupportedModelError(
            "DeepCache needs a UNet laid out as diffusers' are, with `up_blocks` that have `resnets`: by these its "
            f"branch is found. {type(denoiser).__name__} has none. Leave deepcache_interval out."
        )
    block, layer = divmod(branch, 3)
    if block < len(up_blocks) and layer < len(up_blocks[-1 - block].resnets):
        up_block = len(up_blocks) - 1 - block
        return f"up_blocks.{up_block}.resnets.{len(up_blocks[up_block].resnets) - 1 - layer}"
    raise ConfigurationError(
        f"deepcache_branch={branch} is not there: {type(denoiser).__name__} has {len(up_blocks)} up blocks, and "
        "branches are counted three to a block from the outside, as far as the block has layers. Take a smaller "
        "one; 0 saves the most."
    )


def _inputs_of(program: ExportedProgram, forward: Callable[..., Any], call: Call) -> Inputs:
    """The graph's inputs by what they are for.

    Raises:
        UnsupportedModelError: what has been taken for the latents cannot be them.
    """
    args, kwargs = call.arguments
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    latents = latents_of(arguments)
    names = {id(leaf): name for name, leaf in named_leaves(arguments)}
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [
        (nodes[name], leaf) for name, leaf in zip(program.graph_signature.user_inputs, call.leaves, strict=True)
        if torch.is_tensor(leaf)
    ]  # fmt: skip
    main = next(node for node, leaf in tensors if leaf is latents)
    outputs = [_sizes(node) for node in outputs_of(program.graph)]
    others = [node for node, leaf in tensors if node is not main and leaf.is_floating_point()]
    better = [node for node in others if _sizes(node) in outputs]
    if better and _sizes(main) not in outputs and names[id(latents)] not in LATENTS_NAMES:
        shape = ", ".join(_sizes(better[0]))
        raise UnsupportedModelError(
            f"It is not clear which input of the denoiser carries the latents: {main.name!r} was taken for them, "
            f"but the prediction has the shape of {better[0].name!r}, [{shape}]. Call the parameter `sample` or "
            "`hidden_states`, as diffusers' models do."
        )
    of_main = next((shape for shape in outputs if fits(_sizes(main), shape)), None)
    if of_main is not None:
        outputs.remove(of_main)
    # A denoiser of several modalities predicts each.
    further = [node for node in others if _sizes(node) in outputs]
    return Inputs(
        latents=(main, *further),
        times=tuple(node for node, leaf in tensors if is_time(names[id(leaf)]) or leaf.ndim <= 1),
        conditions=tuple(
            node for node, leaf in tensors if node not in (main, *further) and not is_time(names[id(leaf)])
        ),
    )


def _sizes(node: torch.fx.Node) -> tuple[str, ...]:
    # As text: to compare free sizes would fix them.
    value = node.meta["val"]
    return tuple(str(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def _is_from_diffusers(denoiser: torch.nn.Module) -> bool:
    """Whether the class is one of diffusers' own, in all of which the batch is the first dimension."""
    return type(denoiser).__module__.partition(".")[0] == "diffusers"


def _check_sites(denoiser: torch.nn.Module, program: ExportedProgram, inputs: Inputs, sites: tuple[Site, ...]) -> None:
    model = type(denoiser).__name__
    # What an attention says of itself is no more than a reason to look: is there an attention in its part of the graph?
    expected = [name for name in cross_attention_modules(denoiser) if _runs(program, name)]
    cores = [core.node for core in attention_cores(program.graph)]
    missing = [name for name in expected if not any(is_inside(node, name) for node in cores)]
    if missing:
        found = len(expected) - len(missing)
        raise UnsupportedModelError(
            f"Found {found} cross-attentions in the graph of {model}, but {len(expected)} of its modules call "
            f"themselves so. In these, no attention was recognized: {', '.join(missing)}. docs/guides/own-denoiser.md "
            "says which forms are; please report the model class and its attention processors."
        )
    if not any(site.kind == "cross" for site in sites):
        counts = count_roles(program.graph, inputs)
        raise UnsupportedModelError(
            MSG_NO_SITES.format(model=model) + " " + MSG_WHAT_WAS_FOUND.format(
                count=counts.total(), own=counts["self"], others=counts["other"],
                latents=" and ".join(repr(node.name) for node in inputs.latents),
            )
        )  # fmt: skip


def _runs(program: ExportedProgram, name: str) -> bool:
    return any(is_inside(node, name) for node in program.graph.nodes)


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Do not record which lines of Python led to each node: nothing reads it, and it takes a sixth of a capture."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)  # torch 2.11 may not have it
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward` in place of the hooked one while the module is traced, so that names have no prefix.

    The module's own torch hooks stay out of the graph: they run around it, in each call.
    """
    replaced = {"forward": forward, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    before = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    module.__dict__.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            if name not in before:
                del module.__dict__[name]
        module.__dict__.update(before)
