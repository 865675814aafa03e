"""Trace a denoiser with torch.export, even if its code reads values from its inputs.

Some denoisers read, for example, the lengths of texts from their masks. Such code cannot be traced, because the sizes
of its tensors depend on values. Therefore the values that it reads in a run on real inputs are recorded, and returned
to it during tracing. The graph is then valid only for inputs with the same values, which are part of the key of a call
(`Call.key`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.fx import config as fx_config
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tgate_compile.engine.call import ByValue, Call, closed, forward_of, is_opened
from tgate_compile.engine.halves import named_leaves
from tgate_compile.passes.find_sites import depends_on, value_inputs
from tgate_compile.passes.graphs import drop_none, functional, inline_disabled_autocast

#: The denoisers of diffusers whose graphs depend on the values of arguments, and for each of these arguments, whether a
#: graph depends on all values or only on whether all are zero.
_READ: Mapping[str, Mapping[str, ByValue]] = {
    "HunyuanImageTransformer2DModel": {"encoder_attention_mask": "values", "encoder_attention_mask_2": "values"},
    "HunyuanVideo15Transformer3DModel": {
        "encoder_attention_mask": "values",
        "encoder_attention_mask_2": "values",
        "image_embeds": "zero",
    },
    "HunyuanVideoFramepackTransformer3DModel": {"encoder_attention_mask": "values"},
    "Lumina2Transformer2DModel": {"encoder_attention_mask": "values"},
    "MochiTransformer3DModel": {"encoder_attention_mask": "values"},
    "OmniGenTransformer2DModel": {"position_ids": "values", "attention_mask": "values"},
    "QwenImage21Transformer2DModel": {"img_mask": "values", "encoder_hidden_states_mask": "values"},
}

_MISSING = object()

MSG_OTHER_READINGS = (
    "its code reads values from inputs that are not known to be read, or reads other values during tracing than in a "
    "normal run"
)


def values_read(denoiser: torch.nn.Module) -> Mapping[str, ByValue]:
    """Return the names of the arguments whose values a graph of `denoiser` depends on."""
    kind = type(denoiser)
    return _READ.get(kind.__name__, {}) if kind.__module__.partition(".")[0] == "diffusers" else {}


def call_of(
    denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Mapping[str, Any]
) -> Call:
    """Return the call of `denoiser` with `args` and `kwargs`, which are bound to its parameters in `arguments`."""
    names = values_read(denoiser)
    leaves = named_leaves(arguments) if names else ()
    return Call.of(args, kwargs, by_value={id(leaf): names[name] for name, leaf in leaves if name in names})


def traced(
    denoiser: torch.nn.Module, forward: Callable[..., Any], call: Call, shapes: ShapesCollection | None
) -> ExportedProgram:
    """Return the program of `denoiser` for inputs like those of `call`; see `capture` for the arguments."""
    args, kwargs = call.opened_arguments
    with torch.no_grad():
        known = _with_closed(_with_known_readings(denoiser, forward, call), kwargs)

    def export() -> ExportedProgram:
        with forward_of(denoiser, known), without_stack_traces(), torch.no_grad():
            return torch.export.export(
                denoiser,
                args,
                kwargs,
                strict=False,
                dynamic_shapes=shapes,  # type: ignore[arg-type]  # accepted, but missing in the annotation
            )

    before = _attributes(denoiser)
    # torch.export changes the graph several times, and would generate its Python code anew each time.
    lazily = _use_lazy_graph_module(True)
    try:
        with lazily:
            try:
                program = export()
            except Exception:
                if not _put_back(before):
                    raise
                _run(forward, call)  # keeps real tensors
                program = export()
    finally:
        _put_back(before)
        _clear_function_caches(denoiser)
    inline_disabled_autocast(program.graph_module)
    program = functional(program)
    drop_none(program)
    return program


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Do not record which lines of Python led to each node: nothing reads it, and it takes a sixth of a capture."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)  # torch 2.11 may not have it
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


def _clear_function_caches(denoiser: torch.nn.Module) -> None:
    """Clear the caches of methods with `functools.lru_cache`, which keep the tensors of a trace for later calls."""
    for kind in {base for module in denoiser.modules() for base in type(module).__mro__}:
        for method in vars(kind).values():
            clear = getattr(method, "cache_clear", None)
            if callable(clear):
                clear()


def _attributes(denoiser: torch.nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Return the modules of `denoiser`, and the plain objects that they hold, with the attributes of each."""
    found: dict[int, Any] = {}
    for module in denoiser.modules():
        found[id(module)] = module
        for value in vars(module).values():
            if hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, torch.nn.Module, type)):
                found[id(value)] = value
    return [(holder, dict(vars(holder))) for holder in found.values()]


def _put_back(before: Iterable[tuple[Any, dict[str, Any]]]) -> bool:
    """Put back the attributes in which a trace has left tensors without data; return whether there were any.

    Some code computes a table, such as that of rotary embeddings, in its first call, and keeps it for later calls. If
    that call is a trace, the table has no data.
    """
    is_changed = False
    for holder, attributes in before:
        for name, value in list(vars(holder).items()):
            if value is not attributes.get(name, _MISSING) and _is_of_trace(value):
                is_changed = True
                if name in attributes:
                    vars(holder)[name] = attributes[name]
                else:
                    del vars(holder)[name]
    return is_changed


def _is_of_trace(value: Any) -> bool:
    return any(isinstance(leaf, (FakeTensor, FunctionalTensor)) for leaf in tree_leaves(value))


def _with_closed(forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """Return `forward` for arguments in which caches have been replaced with their contents."""
    if not any(map(is_opened, kwargs.values())):
        return forward

    @functools.wraps(forward)
    def known(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{name: closed(value) for name, value in kwargs.items()})

    return known


def _with_known_readings(denoiser: torch.nn.Module, forward: Callable[..., Any], call: Call) -> Callable[..., Any]:
    """Return `forward` for tracing: it reads the same values from tensors as in a run on the inputs of `call`."""
    if not values_read(denoiser):
        return forward
    readings = _recorded(forward, call)
    generator = torch.Generator().manual_seed(0)

    def altered(position: int, leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or not leaf.is_floating_point() or call.by_value.get(position) == "values":
            return leaf
        return leaf * (1.0 + torch.rand(leaf.shape, generator=generator).to(leaf))  # zeros remain zeros

    others = tuple(altered(position, leaf) for position, leaf in enumerate(call.leaves))
    if readings != _recorded(forward, replace(call, leaves=others)):
        raise ValueError(MSG_OTHER_READINGS)

    @functools.wraps(forward)
    def known(*args: Any, **kwargs: Any) -> Any:
        reader = _Reader(readings)
        with reader, _lists_read_by(reader):
            result = forward(*args, **kwargs)
        if reader.readings != readings:
            raise ValueError(MSG_OTHER_READINGS)
        return result

    return known


@contextmanager
def _lists_read_by(reader: _Reader) -> Iterator[None]:
    """Let `reader` answer `tolist()` of tensors during tracing, because some of them bypass function modes."""
    before = [(cls, vars(cls)["tolist"]) for cls in (FakeTensor, FunctionalTensor) if "tolist" in vars(cls)]
    for cls, method in before:
        cls.tolist = lambda tensor, read=method: reader.read("tolist", lambda: read(tensor))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, method in before:
            cls.tolist = method  # type: ignore[method-assign]


def _recorded(forward: Callable[..., Any], call: Call) -> list[tuple[str, Any]]:
    reader = _Reader()
    with reader:
        _run(forward, call)
    return reader.readings


def _run(forward: Callable[..., Any], call: Call) -> None:
    args, kwargs = call.arguments
    with torch.no_grad(), torch.random.fork_rng():
        forward(*args, **kwargs)


class _Reader(TorchFunctionMode):
    """Records the values that code reads from tensors, or returns those in `known`.

    Operators whose results have sizes that depend on values are replaced with others whose sizes are fixed.

    Attributes:
        readings: what has been read so far: the name of each operator, and the value.
    """

    def __init__(self, known: Sequence[tuple[str, Any]] | None = None) -> None:
        super().__init__()
        self._known = known
        self.readings: list[tuple[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _NUMBERS:
            return self.read(name, lambda: func(*args, **kwargs))
        if name in _FIXED:
            result = _FIXED[name](self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def read(self, name: str, value: Callable[[], Any]) -> Any:
        """Return the value that the operator `name` reads: `value()`, or the known value."""
        if self._known is None:
            reading = name, value()
        elif len(self.readings) < len(self._known) and self._known[len(self.readings)][0] == name:
            reading = self._known[len(self.readings)]
        else:
            raise ValueError(MSG_OTHER_READINGS)
        self.readings.append(reading)
        return reading[1]

    def runs(self, name: str, values: torch.Tensor) -> list[tuple[Any, int, int]]:
        """Return the runs of equal elements of the one-dimensional `values`: each value, its start and its length."""
        read = self.read(name, values.tolist)
        found, start = [], 0
        for value, run in groupby(read):
            length = len(list(run))
            found.append((value, start, length))
            start += length
        return found


#: Methods that return a number, or a list of numbers.
_NUMBERS = frozenset({"tolist", "item", "__bool__", "__int__", "__float__", "__index__"})


def _masked_dim(index: Any) -> int | None:
    """Return the dimension that `index` takes rows of, if it is a mask of one dimension and takes all of the others."""
    parts = index if isinstance(index, tuple) else (index,)
    masks = [i for i, part in enumerate(parts) if torch.is_tensor(part)]
    if len(masks) != 1 or parts[masks[0]].dtype is not torch.bool or parts[masks[0]].ndim != 1:
        return None
    others = [part for i, part in enumerate(parts) if i != masks[0]]
    return masks[0] if all(isinstance(part, slice) and part == slice(None) for part in others) else None


def _get_masked(reader: _Reader, source: torch.Tensor, index: Any) -> Any:
    dim = _masked_dim(index)
    if dim is None:
        return NotImplemented
    mask = index[dim] if isinstance(index, tuple) else index
    runs = [(start, length) for chosen, start, length in reader.runs("__getitem__", mask) if chosen]
    return _joined([source.narrow(dim, *run) for run in runs] or [source.narrow(dim, 0, 0)], dim)


def _set_masked(reader: _Reader, target: torch.Tensor, index: Any, value: Any) -> Any:
    dim = _masked_dim(index)
    if dim is None or not torch.is_tensor(value) or value.ndim != target.ndim:
        return NotImplemented
    mask = index[dim] if isinstance(index, tuple) else index
    done = 0
    for chosen, start, length in reader.runs("__setitem__", mask):
        if chosen:
            rows = value if value.shape[dim] == 1 else value.narrow(dim, done, length)
            place = (*[slice(None)] * dim, slice(start, start + length))
            target[place] = rows
            done += length
    return None


def _repeated(
    reader: _Reader, source: torch.Tensor, repeats: Any = None, dim: int | None = None, **options: Any
) -> Any:
    if not torch.is_tensor(repeats) or repeats.ndim != 1 or options.get("output_size") is not None:
        return NotImplemented
    source, along = (source.flatten(), 0) if dim is None else (source, dim)
    pieces = [
        source.narrow(along, start, length).repeat_interleave(times, dim=along)
        if times != 1
        else source.narrow(along, start, length)
        for times, start, length in reader.runs("repeat_interleave", repeats)
    ]
    return _joined(pieces, along)


def _nonzero(reader: _Reader, source: torch.Tensor, *, as_tuple: bool = False) -> Any:
    def places() -> list[list[int]]:
        found: list[list[int]] = source.nonzero().tolist()
        return found

    found = torch.tensor(reader.read("nonzero", places), dtype=torch.long, device=source.device)
    found = found.reshape(-1, source.ndim)
    return found.unbind(1) if as_tuple else found


def _joined(pieces: Iterable[torch.Tensor], dim: int) -> torch.Tensor:
    parts = list(pieces)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


#: Operators whose results have sizes that depend on values, with functions that compute the same for known values.
_FIXED: Mapping[str, Callable[..., Any]] = {
    "__getitem__": _get_masked,
    "__setitem__": _set_masked,
    "nonzero": _nonzero,
    "repeat_interleave": _repeated,
}


class KnownValues:
    """Evaluates nodes of a captured graph that depend on constants and on inputs whose values are part of its key."""

    def __init__(self, program: ExportedProgram, call: Call) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._values: dict[torch.fx.Node, Any] = {}
        leaves = iter(enumerate(call.leaves))
        unknown = []
        for spec in program.graph_signature.input_specs:
            node, value = self._nodes[spec.arg.name], None
            if spec.kind is InputKind.USER_INPUT:
                position, leaf = next(leaves)
                value = leaf if call.by_value.get(position) == "values" else None
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                value = program.constants.get(str(spec.target))
            if value is None:
                unknown.append(node)
            else:
                self._values[node] = value
        self._unknown = depends_on(program.graph, unknown)

    def __call__(self, node: torch.fx.Node) -> torch.Tensor | None:
        own = self._nodes.get(node.name)
        if own is None or own in self._unknown or own.op == "get_attr":
            return None
        needed, queue = {own}, [own]
        for each in queue:  # grows during the loop
            new = [source for source in value_inputs(each) if source not in needed and each not in self._values]
            needed.update(new)
            queue += new
        with torch.no_grad():
            for each in own.graph.nodes:  # in topological order
                if each in needed and each not in self._values:
                    self._values[each] = self._evaluate(each)
        value = self._values[own]
        return value if torch.is_tensor(value) else None

    def _evaluate(self, node: torch.fx.Node) -> Any:
        def value_of(source: torch.fx.Node) -> Any:
            if source in self._values:
                return self._values[source]
            like = source.meta["val"]  # only its dtype and shape matter
            return torch.empty(like.shape, dtype=like.dtype) if torch.is_tensor(like) else like

        assert callable(node.target)
        return node.target(*map_arg(node.args, value_of), **map_arg(node.kwargs, value_of))
