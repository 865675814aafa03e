"""Capture a denoiser as a graph with its sites, for calls whose sizes may be left free."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from tgate_compile._errors import CaptureError, ConfigurationError, UnsupportedModelError
from tgate_compile.engine.call import BatchDims, Call
from tgate_compile.engine.families import Family, has_joint_attention
from tgate_compile.engine.halves import LATENTS_NAMES, binding_of, fits, is_time, latents_of, leaves_at, named_leaves
from tgate_compile.engine.tracing import KnownValues, traced
from tgate_compile.engine.traffic import exclusive
from tgate_compile.methods.method import REFERENCE, Blocks, Kind
from tgate_compile.passes.attention_core import attention_cores
from tgate_compile.passes.find_blocks import find_feed_forward, find_ranges
from tgate_compile.passes.find_sites import Inputs, count_roles, find_attention, find_deep_feature, is_inside
from tgate_compile.passes.graphs import Binding, Captured, Site, flat_program, outputs_of
from tgate_compile.passes.separate_tokens import Joint, find_joint_attention

FreeSize = Literal["batch", "height", "width", "text"]

#: The symbol of each free size in shapes: `[2*b, 4, 8*h, 8*w]`, and `[2*b, t, 768]` for a text of any length.
SYMBOLS: Mapping[FreeSize, str] = {"batch": "b", "height": "h", "width": "w", "text": "t"}
#: The argument whose second dimension is the length of the text.
TEXT_ARGUMENT = "encoder_hidden_states"
#: The upsampling layers of diffusers branch at a batch of 64, which 31 prompts under guidance do not reach.
LARGEST: Mapping[FreeSize, int] = {"batch": 31, "height": 1024, "width": 1024, "text": 1024}


@dataclass(frozen=True)
class FreeShapes:
    """A call to capture with some of its sizes left free.

    Attributes:
        call: the arguments. A free batch has at least 2 prompts, since torch.export specializes on a size of 1.
        shapes: the free dimensions of each tensor; None if there are none.
        units: the factor of each symbol in the latents' shape, such as `{"b": 2, "h": 8, "w": 8}`: the batch of a
            guided call is twice the number of prompts, and a UNet with three downsamplings takes multiples of 8.
    """

    call: Call
    shapes: ShapesCollection | None
    units: Mapping[str, int]


def free_shapes(
    denoiser: torch.nn.Module,
    forward: Callable[..., Any],
    call: Call,
    family: Family,
    *,
    guided: bool,
    free: Collection[FreeSize],
) -> FreeShapes:
    """Return `call` with the sizes `free` left free; `guided` means that its batch has both guidance halves.

    A tensor has the batch in its first dimension if that has the size of the latents' batch, unless both halves share
    the tensor. A tensor with as many dimensions as the latents has their height and width, or a whole fraction of them
    (a ControlNet's residuals). A tensor of the text has its length in its second dimension, or in its first if it has
    no batch.

    Raises:
        CaptureError: the length of the text is to be left free, but the denoiser takes no text of a known form.
    """
    if not free:
        return FreeShapes(call, None, {})
    args, kwargs = call.opened_arguments
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    latents = latents_of(arguments)
    of_text = _text_dims(denoiser, arguments) if "text" in free else {}
    per_prompt = 2 if guided else 1
    batch = latents.shape[0]
    repeated, shared = (
        {id(leaf) for path in paths for leaf in leaves_at(call, path)} for paths in (family.repeated, family.shared)
    )
    step = downsampling(denoiser)
    dims = {name: Dim(symbol, min=1, max=LARGEST[name]) for name, symbol in SYMBOLS.items() if name in free}
    tiles = 2 if batch == per_prompt and "batch" in free else 1

    leaves: list[Any] = []
    specs: list[tuple[torch.Tensor, dict[int, Any]]] = []
    for leaf in call.leaves:
        if not torch.is_tensor(leaf):
            leaves.append(leaf)
            continue
        spec: dict[int, Any] = {of_text[id(leaf)]: dims["text"]} if id(leaf) in of_text else {}
        has_batch = leaf.ndim > 0 and leaf.shape[0] == batch and id(leaf) not in shared
        if "batch" in free and (has_batch or id(leaf) in repeated):
            spec[0] = _times(leaf.shape[0] // batch * per_prompt, dims["batch"])
            leaf = leaf.repeat(tiles, *[1] * (leaf.ndim - 1))
        else:
            leaf = leaf.clone()  # ShapesCollection identifies tensors by id
        if leaf.ndim == latents.ndim >= 4:
            for name, position in (("height", -2), ("width", -1)):
                size, whole = leaf.shape[position], latents.shape[position]
                if name in free and whole % size == 0 and step % (whole // size) == 0:
                    spec[leaf.ndim + position] = _times(step // (whole // size), dims[name])  # type: ignore[index]
        leaves.append(leaf)
        specs.append((leaf, spec))
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, spec in specs:
        if spec:
            shapes[tensor] = spec
    units = {"batch": per_prompt, "height": step, "width": step, "text": 1}
    free_call = dataclasses.replace(call, leaves=tuple(leaves))
    return FreeShapes(free_call, shapes, {SYMBOLS[name]: units[name] for name in dims})


def _text_dims(denoiser: torch.nn.Module, arguments: Mapping[str, Any]) -> dict[int, int]:
    """Return the dimension of the text's tokens in each tensor that has it, by the id of the tensor."""
    states = arguments.get(TEXT_ARGUMENT)
    if not torch.is_tensor(states) or states.ndim != 3:
        raise CaptureError(
            f"The length of the text cannot be left free: {type(denoiser).__name__} is not called with a tensor of "
            f'three dimensions called {TEXT_ARGUMENT}. Leave "text" out of dynamic.'
        )
    found = {id(states): 1}
    for name, leaf in named_leaves(arguments):
        if torch.is_tensor(leaf) and leaf.ndim >= 2 and binding_of(name) == "prompt" and "pooled" not in name:
            dim = next((dim for dim in (1, 0) if leaf.shape[dim] == states.shape[1]), None)
            if dim is not None:
                found.setdefault(id(leaf), dim)
    return found


def downsampling(denoiser: torch.nn.Module) -> int:
    """Return the number that the latents' height and width must be multiples of.

    It comes from a UNet's downsampling and a transformer's patch size.
    """
    blocks = getattr(denoiser, "down_blocks", ())
    halvings = sum(1 for block in blocks if getattr(block, "downsamplers", None) is not None)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    return int(math.prod((2**halvings, patch if isinstance(patch, int) else 1)))


def _times(factor: int, dim: Any) -> Any:
    return dim if factor == 1 else factor * dim


logger = logging.getLogger(__name__)

MSG_EXPORT_FAILED = (
    "Could not capture {model} as a graph with torch.export ({error}). The model must run without Python control flow "
    "that depends on data. The usual cause is a custom attention processor, a hook or a patched forward."
)
#: The kinds of sites that are keys and values of tokens in joint attention.
OF_TOKENS: frozenset[Kind] = frozenset({"cross", "reference"})
_CHANGES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
MSG_NO_SITES = (
    "{model} has no cross-attention that can be cached: no attention in it takes its queries from the latents and "
    "its keys and values from the text alone. Joint attention (SD3, Flux) mixes both in one sequence. "
    "What works instead: fewer steps, or dropping guidance after some steps."
)
MSG_JOINT_AND_MORE = (
    "{model} has joint attention, where the text's keys and values are cached. That cannot be combined with caching "
    "other values ({kinds}): leave sp_interval and fi_interval at 1, cache cross-attention alone with PAB, and "
    "combine FORA with AdaptiveGuidance instead of T-GATE."
)
MSG_MISSING: Mapping[Kind, str] = {
    "self": "sp_interval and fi_interval cache self-attention, but none was found in {model}. Leave them at 1.",
    "temporal": "temporal_interval caches attention between frames, but no attention between frames was found in "
    "{model}. Leave it at 1.",
    "ff": "No feed-forward module was found in the blocks of {model}.",
}
MSG_NOTHING_FOUND = "{model} has no attention and no feed-forward module whose output could be cached."
MSG_WHAT_WAS_FOUND = (
    "Its graph has {count} attentions, of which {own} take keys and values that depend on the latents, and {others} "
    "have queries that do not, or keys and values that depend on no input. The latents were assumed to be {latents}. "
    "docs/guides/own-denoiser.md describes which forms of attention are recognized."
)


@exclusive()
def capture(
    denoiser: torch.nn.Module,
    forward: Callable[..., Any],
    call: Call,
    kinds: Collection[Kind] = frozenset({"cross"}),
    deep_layer: str | None = None,
    *,
    ranges: Sequence[tuple[Kind, Blocks]] = (),
    optional: Collection[Kind] = frozenset(),
    hidden: bool = False,
    only: Sequence[str] | None = None,
    cache_dtype: torch.dtype | None = None,
    shapes: ShapesCollection | None = None,
    required: bool = True,
) -> Captured:
    """Return the graph of `denoiser` for inputs like those of `call`, with its sites.

    Args:
        denoiser: the module; the graph shares its parameters.
        forward: its original forward, without our hook.
        call: the inputs, [2B, ...] under guidance.
        kinds: the kinds of sites to find.
        deep_layer: for the kind `deep`, the path of the up layer at which the shallow part begins.
        ranges: for the kinds `blocks`, `rear` and `measured`, the range of blocks of each.
        optional: those of `kinds` that the denoiser may lack. If cross-attention is one of them, a joint attention
            counts as self-attention.
        hidden: whether the text's sites, in joint attention, are its hidden states before each attention instead of its
            keys and values.
        only: shell-style patterns of the names of the attentions to cache; None means all.
        cache_dtype: the dtype of the caches; None means the sites' own.
        shapes: the sizes of the call's tensors that are left free; None means that all are fixed.
        required: whether to refuse a denoiser that lacks sites of one of `kinds`.

    Raises:
        CaptureError: torch.export failed.
        UnsupportedModelError: the model has no cross-attention, or not all of its cross-attentions were found, or
            `kinds` has another kind of attention that the model lacks.
        ConfigurationError: a pattern of `only` matches nothing.
    """
    model = type(denoiser).__name__
    began = time.perf_counter()
    try:
        program = traced(denoiser, forward, call, shapes)
    except Exception as error:  # torch.export raises whatever the model's code raises
        raise CaptureError(MSG_EXPORT_FAILED.format(model=model, error=f"{type(error).__name__}: {error}")) from error
    names = tuple(spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT)
    if len(names) != len(call.leaves) or not all(
        isinstance(spec.arg, TensorArgument) and spec.kind is OutputKind.USER_OUTPUT
        for spec in program.graph_signature.output_specs
    ):
        changed = [spec.target for spec in program.graph_signature.output_specs if spec.kind in _CHANGES]
        shown = ", ".join(map(str, changed[:3]))
        reason = f"it changes {shown} when it runs" if changed else "it returns something other than plain tensors"
        raise CaptureError(MSG_EXPORT_FAILED.format(model=model, error=reason))

    inputs = _inputs_of(program, forward, call)
    batch_dims = None if _is_from_diffusers(denoiser) else BatchDims(program, call, inputs.latents[0]).of
    attention = find_attention(program.graph_module, inputs, kinds, batch_dims)
    joint = None
    in_ranges = set(dict(ranges)) if batch_dims is None else set()
    of_tokens = (OF_TOKENS & set(kinds)) - set(optional)
    has_cross = any(site.kind == "cross" for site in attention)
    # In a model with cross-attention, tokens in a sequence with those of the latents need not be text: in Stable Audio,
    # one of them holds the timestep and the duration.
    may_be_constant = not of_tokens and has_joint_attention(type(denoiser)) and set(kinds) <= in_ranges
    if may_be_constant or (of_tokens and (not has_cross or has_joint_attention(type(denoiser)))):
        joint = find_joint_attention(
            program.graph_module,
            inputs,
            model,
            of_tokens or {"cross"},
            has_cross=has_cross,
            only_constant=not of_tokens,
            hidden=hidden,
            image=call.image,
            known=KnownValues(program, call),
        )
    if joint is not None and of_tokens:
        others = set(kinds) - OF_TOKENS - in_ranges
        if others:
            raise UnsupportedModelError(MSG_JOINT_AND_MORE.format(model=model, kinds=", ".join(sorted(others))))
        attention = list(joint.sites)
    sites = list(attention)
    if "ff" in kinds:
        sites += find_feed_forward(program.graph_module, inputs.latents, batch_dims)
    if required:
        needed = set(kinds) - set(optional)
        if "cross" in needed and joint is None:
            _check_sites(denoiser, program, inputs, sites)
        _check_kinds(model, needed, sites)
    if only is not None:
        sites = _selected(sites, only)
    if "deep" in kinds and deep_layer is not None:
        sites.append(find_deep_feature(program.graph_module, deep_layer))
    separated_sites = [] if joint is None or not ranges else _ranges_without_text(joint, inputs, dict(ranges), model)
    if joint is not None and joint.whole is joint.separated:
        sites += separated_sites
    elif ranges:
        sites += find_ranges(program.graph_module, inputs.latents, dict(ranges), model, batch_dims, inputs.times)
    if required and set(kinds) - REFERENCE and not sites:
        raise UnsupportedModelError(MSG_NOTHING_FOUND.format(model=model))
    sites.sort(key=lambda site: get_args(Kind).index(site.kind))  # stable: each kind in graph order
    if cache_dtype is not None:
        sites, separated_sites = (
            [site if site.kind == "measured" else dataclasses.replace(site, cache_dtype=cache_dtype) for site in each]
            for each in (sites, separated_sites)
        )
    logger.info(
        "captured %s: %d nodes, %d sites, in %.1f s",
        model, len(program.graph.nodes), len(sites), time.perf_counter() - began,
    )  # fmt: skip
    out_spec = program.module_call_graph[0].signature.out_spec
    roles = _roles_of(names, inputs, forward, call)
    captured = Captured(program, names, inputs.latents[0].name, out_spec, tuple(sites), roles)
    if joint is None:
        return captured
    return dataclasses.replace(
        captured,
        program=flat_program(program, joint.whole),
        separated=joint.separated,
        origins=joint.origins if only is None else None,  # if not all sites are cached, all tokens are still needed
        constant=joint.constant,
        separated_sites=tuple(separated_sites),
    )


def _ranges_without_text(joint: Joint, inputs: Inputs, ranges: Mapping[Kind, Blocks], model: str) -> list[Site]:
    """Return the residuals of blocks in the graph without the text. Their names differ from those of both streams."""
    nodes = {node.name: node for node in joint.pruned.graph.nodes}
    latents, times = (
        [nodes[node.name] for node in each if node.name in nodes] for each in (inputs.latents, inputs.times)
    )
    found = find_ranges(joint.pruned, latents, ranges, model, times=times)
    return [dataclasses.replace(site, name=f"{site.name}.image") for site in found]


def _check_kinds(model: str, needed: Collection[Kind], sites: Sequence[Site]) -> None:
    """Check that there is a site of each of the kinds `needed` that are found by looking for modules."""
    found = {site.kind for site in sites}
    for kind, message in MSG_MISSING.items():
        if kind in needed and kind not in found:
            raise UnsupportedModelError(message.format(model=model))


def _roles_of(names: Sequence[str], inputs: Inputs, forward: Callable[..., Any], call: Call) -> dict[str, Binding]:
    """Return how often each input of the graph changes, which follows from the names of the call's arguments."""
    args, kwargs = call.opened_arguments
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    bindings = {id(leaf): binding_of(name) for name, leaf in named_leaves(arguments) if torch.is_tensor(leaf)}
    latents = {node.name for node in inputs.latents}
    return {
        name: bindings[id(leaf)]
        for name, leaf in zip(names, call.leaves, strict=True)
        if torch.is_tensor(leaf) and name not in latents
    }


def _selected(sites: Sequence[Site], patterns: Sequence[str]) -> list[Site]:
    for pattern in patterns:
        if not any(_is_selected(site, pattern) for site in sites):
            raise ConfigurationError(
                f"sites: {pattern!r} matches none of the attentions that can be cached: "
                f"{', '.join(site.name for site in sites)}."
            )
    return [site for site in sites if any(_is_selected(site, pattern) for pattern in patterns)]


def _is_selected(site: Site, pattern: str) -> bool:
    """Return whether `pattern` matches the name of `site`, or the attention whose keys or values it is."""
    attention = site.name.rpartition(".")[0] if site.of_text else site.name
    return fnmatchcase(site.name, pattern) or fnmatchcase(attention, pattern)


def cross_attention_modules(denoiser: torch.nn.Module) -> list[str]:
    """Return the paths of the modules that set `is_cross_attention`, such as diffusers' `Attention`."""
    return [name for name, module in denoiser.named_modules() if getattr(module, "is_cross_attention", False) is True]


def denies_cross_attention(denoiser: torch.nn.Module) -> bool:
    """Return whether it is certain, without a graph, that `denoiser` has no cross-attention.

    That is the case if it has attentions like diffusers', and each of them sets `is_cross_attention` to False or
    computes joint attention. An attention without that attribute may be a cross-attention, and a denoiser without such
    modules may have attentions of another form, which can be found only in the graph.
    """
    attentions = [module for module in denoiser.modules() if hasattr(module, "to_k")]
    if any(vars(module).get("self_attn") is False for module in denoiser.modules()):
        return False  # Würstchen's blocks then give the attention only the text, whatever `is_cross_attention` is
    # diffusers' UNets have no other attentions.
    is_unet = type(denoiser).__module__.startswith("diffusers.models.unets.")
    return bool(attentions or is_unet) and all(
        getattr(module, "is_cross_attention", None) is False or _is_joint(module) for module in attentions
    )


def _is_joint(attention: torch.nn.Module) -> bool:
    """Return whether an attention appends the text's keys to the latents' (Kandinsky 2, DeepFloyd IF, unCLIP)."""
    processor = type(getattr(attention, "processor", None)).__name__
    return processor.startswith("AttnAddedKV") and not getattr(attention, "only_cross_attention", False)


def check_patterns(denoiser: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Raise ConfigurationError if a pattern matches no module's path. `capture` checks that it matches a site."""
    names = [name for name, _ in denoiser.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join((cross_attention_modules(denoiser) or names)[:2])
            raise ConfigurationError(
                f"sites: {pattern!r} matches no module of {type(denoiser).__name__}. Its attentions have names such as "
                f"{examples}."
            )


def deep_layer(denoiser: torch.nn.Module, branch: int) -> str:
    """Return the path of the up layer at which DeepCache's shallow part begins, for cache branch `branch`.

    Branches count skip connections from the outside, three per block, as in the authors' package.

    Raises:
        UnsupportedModelError: the denoiser is not a UNet.
        ConfigurationError: the denoiser does not have that branch.
    """
    up_blocks = getattr(denoiser, "up_blocks", None)
    if up_blocks is None or not all(hasattr(block, "resnets") for block in up_blocks):
        raise UnsupportedModelError(
            "DeepCache needs a UNet with the layout of diffusers' UNets, whose `up_blocks` have `resnets`, but "
            f"{type(denoiser).__name__} has a different layout. Leave deepcache_interval out."
        )
    block, layer = divmod(branch, 3)
    if block < len(up_blocks) and layer < len(up_blocks[-1 - block].resnets):
        up_block = len(up_blocks) - 1 - block
        return f"up_blocks.{up_block}.resnets.{len(up_blocks[up_block].resnets) - 1 - layer}"
    raise ConfigurationError(
        f"deepcache_branch={branch} does not exist: {type(denoiser).__name__} has {len(up_blocks)} up blocks, and "
        "branches are counted from the outside, three per block, as far as the block has layers. Choose a smaller "
        "one; 0 saves the most."
    )


def _inputs_of(program: ExportedProgram, forward: Callable[..., Any], call: Call) -> Inputs:
    """Return the graph's inputs by role.

    Raises:
        UnsupportedModelError: the prediction does not have the shape of the supposed latents.
    """
    args, kwargs = call.opened_arguments
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
            f"It is not clear which input of the denoiser carries the latents: {main.name!r} was chosen, but the "
            f"prediction has the shape of {better[0].name!r}, [{shape}]. Name the parameter `sample` or "
            "`hidden_states`, as diffusers' models do."
        )
    of_main = next((shape for shape in outputs if fits(_sizes(main), shape)), None)
    if of_main is not None:
        outputs.remove(of_main)
    # A denoiser of several modalities makes a prediction for each.
    further = [node for node in others if _sizes(node) in outputs]
    return Inputs(
        latents=(main, *further),
        times=tuple(node for node, leaf in tensors if is_time(names[id(leaf)]) or leaf.ndim <= 1),
        conditions=tuple(
            node for node, leaf in tensors if node not in (main, *further) and not is_time(names[id(leaf)])
        ),
    )


def _sizes(node: torch.fx.Node) -> tuple[str, ...]:
    # As strings, because comparing free sizes would fix them.
    value = node.meta["val"]
    return tuple(str(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def _is_from_diffusers(denoiser: torch.nn.Module) -> bool:
    """Return whether the class is part of diffusers, where the batch is always the first dimension."""
    return type(denoiser).__module__.partition(".")[0] == "diffusers"


def _check_sites(denoiser: torch.nn.Module, program: ExportedProgram, inputs: Inputs, sites: Sequence[Site]) -> None:
    model = type(denoiser).__name__
    # `is_cross_attention` alone proves nothing: look for an attention in the module's part of the graph.
    nodes = program.graph.nodes
    expected = [name for name in cross_attention_modules(denoiser) if any(is_inside(node, name) for node in nodes)]
    cores = [core.node for core in attention_cores(program.graph)]
    missing = [name for name in expected if not any(is_inside(node, name) for node in cores)]
    if missing:
        found = len(expected) - len(missing)
        raise UnsupportedModelError(
            f"Found {found} cross-attentions in the graph of {model}, but {len(expected)} of its modules have "
            f"is_cross_attention set. In these, no attention was recognized: {', '.join(missing)}. "
            "docs/guides/own-denoiser.md describes which forms are recognized; please report the model class and its "
            "attention processors."
        )
    if not any(site.kind == "cross" for site in sites):
        counts = count_roles(program.graph, inputs)
        raise UnsupportedModelError(
            MSG_NO_SITES.format(model=model) + " " + MSG_WHAT_WAS_FOUND.format(
                count=counts.total(), own=counts["self"], others=counts["other"],
                latents=" and ".join(repr(node.name) for node in inputs.latents),
            )
        )  # fmt: skip
