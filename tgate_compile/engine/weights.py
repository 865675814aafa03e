"""A denoiser's weights: checks of quantization and offloading, and a fingerprint of what a graph depends on."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.engine.purity import (
    code_owners,
    foreign_code,
    has_global_hooks,
    settings_of,
    settings_of_classes,
)


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name; a tensor with several names is listed under each of them.

    A tensor subclass is listed itself, and so are the tensors inside it, under the names that `torch.export` gives
    them: `linear.parametrizations.weight.original0`, `...1` and so on. They are the module's tensors, not copies.
    """
    return {**_named(module), **plain_tensors(module)}


def plain_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return `live_tensors` without the tensor subclasses, whose data is in the plain tensors inside them."""
    live: dict[str, torch.Tensor] = {}
    for name, tensor in _named(module).items():
        if is_traceable_wrapper_subclass(tensor):
            path, _, attribute = name.rpartition(".")
            prefix = f"{path}." if path else ""
            inner = enumerate(_inner(tensor))
            live.update((f"{prefix}parametrizations.{attribute}.original{i}", each) for i, each in inner)
        else:
            live[name] = tensor
    return live


def is_same(live: torch.Tensor | None, held: torch.Tensor) -> bool:
    """Return whether a program's tensor is the denoiser's present one, or shares its memory (a quantized weight)."""
    if live is None or live is held or live.is_meta != held.is_meta:
        return live is held or (live is None and held.is_meta)
    return live.shape == held.shape and live.data_ptr() == held.data_ptr()


def make_up(tensor: torch.Tensor) -> Hashable:
    """Return the properties of a tensor subclass that a graph depends on; () for a plain tensor.

    They are its class, its settings, and the layout of the tensors inside it.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return ()
    settings = tensor.__tensor_flatten__()[1]
    inside = tuple((each.shape, each.stride(), each.dtype, each.device) for each in _inner(tensor))
    return type(tensor), repr(settings), inside


def rounded_input(module: torch.nn.Module) -> str | None:
    """Return the name of the first parameter whose layer also quantizes its input with torchao; None if none does."""
    for name, tensor in module.named_parameters():
        by_tensor = getattr(tensor, "act_quant_kwargs", None) is not None
        if by_tensor or type(tensor).__name__ == "LinearActivationQuantizedTensor":
            return name
    return None


def wrapped_weight(module: torch.nn.Module) -> str | None:
    """Return the name of the first parameter that is a tensor subclass with tensors inside; None if there is none."""
    return next((name for name, tensor in module.named_parameters() if is_traceable_wrapper_subclass(tensor)), None)


def check_quantization(module: torch.nn.Module) -> None:
    """Check that `torch.export` supports the quantization of the module's layers, if they are quantized.

    Raises:
        UnsupportedModelError: it does not.
    """
    model = type(module).__name__
    for name, layer in module.named_modules():
        if any(type(each).__module__.startswith("bitsandbytes") for each in layer.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"{model} was quantized by bitsandbytes (its layer {name}, for example). torch.export cannot follow "
                "the state that such weights keep beside their values, so the model cannot be captured as a graph. "
                "What works instead: torchao's quantize_(model, Int8WeightOnlyConfig()), optimum-quanto's weights, or "
                "the original model."
            )
        if getattr(layer, "activation_qtype", None) is not None:
            raise UnsupportedModelError(
                f"{model} was quantized by optimum-quanto with its layers' inputs (activations=..., in {name}, for "
                "example), which torch.export cannot follow, so the model cannot be captured as a graph. What works "
                "instead: quantize(model, weights=...) alone, or torchao's Int8DynamicActivationInt8WeightConfig."
            )


def _named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    modules = list(_paths(module))
    tables: list[tuple[str, Mapping[str, torch.Tensor | None]]] = [
        *((name, each._parameters) for name, each in modules),
        *((name, each._buffers) for name, each in modules),
    ]
    return {
        f"{name}.{key}" if name else key: tensor
        for name, table in tables
        for key, tensor in table.items()
        if tensor is not None
    }


def _paths(
    module: torch.nn.Module, name: str = "", above: tuple[torch.nn.Module, ...] = ()
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield all modules under all of their names, except inside themselves.

    `named_modules(remove_duplicate=False)` would not return if a module contains itself, as with cache-dit, whose
    blocks hold the denoiser.
    """
    yield name, module
    for key, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            yield from _paths(child, f"{name}.{key}" if name else key, (*above, module))


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors in `tensor`, in the order of `torch.export`."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))


HOOK_NAME = "tgate_compile"

#: Hooks that move the whole module before it runs: those of `enable_model_cpu_offload()`, and those of a
#: `ComponentsManager` with `enable_auto_cpu_offload()`.
_WHOLE = frozenset({"CpuOffload", "CustomOffloadHook"})

MSG_OFFLOADED = (
    "{denoiser} has {hook}, which moves or casts its weights layer by layer while it runs, so a graph cannot hold "
    "them. Remove the hook (for offloading: pipe.remove_all_hooks(), then pipe.to(device)). "
    "enable_model_cpu_offload(), which moves the denoiser as a whole, works."
)
MSG_HOOKED = (
    "{denoiser} has diffusers' hook {hook!r}, which decides at every step what to compute, so it cannot be part of a "
    "graph. Disable it first (disable_cache() for caches), and use a schedule of tgate_compile instead."
)

#: Prefixes of the names of diffusers' hooks that move or cast weights.
_MOVING = ("group_offloading", "layerwise_casting", "lazy_prefetch", "peft_autocast_disable")
#: Prefixes of the names of diffusers' hooks that skip or change computations.
_SKIPPING = (
    "faster_cache",
    "fbc_",
    "layer_skip",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "smoothed_energy_guidance",
    "taylorseer_cache",
    "text_kv_cache",
)


def check_weights_stay(denoiser: torch.nn.Module) -> None:
    """Check that no hook of accelerate or diffusers moves or casts weights, or skips layers, while `denoiser` runs.

    Raises:
        ConfigurationError: there is such a hook.
    """
    for module in denoiser.modules():
        problem = _problem(type(denoiser).__name__, module, is_root=module is denoiser)
        if problem is not None:
            raise ConfigurationError(problem)


def after_offload_hook(
    denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the hook of `enable_model_cpu_offload`, which moves the denoiser to its device, and return the arguments."""
    offload = getattr(denoiser, "_hf_hook", None)
    if offload is not None:
        args, kwargs = offload.pre_forward(denoiser, *args, **kwargs)
    return args, kwargs


def _problem(denoiser: str, module: torch.nn.Module, *, is_root: bool) -> str | None:
    """Return why `module` of the model `denoiser` cannot be captured; None if it can."""
    offload = getattr(module, "_hf_hook", None)
    if offload is not None and not (is_root and type(offload).__name__ in _WHOLE):
        return MSG_OFFLOADED.format(denoiser=denoiser, hook=f"accelerate's {type(offload).__name__}")
    registry = getattr(module, "_diffusers_hook", None)
    others = [] if registry is None else [(name, hook) for name, hook in registry.hooks.items() if name != HOOK_NAME]
    if not others:
        return None
    name, hook = others[0]
    if name.startswith(_MOVING):
        return MSG_OFFLOADED.format(denoiser=denoiser, hook=f"diffusers' hook {name!r}")
    if name.startswith(_SKIPPING):
        return MSG_HOOKED.format(denoiser=denoiser, hook=name)
    kind = f"{type(hook).__module__}.{type(hook).__qualname__}"
    return (
        f"{denoiser} has the hook {name!r} in diffusers' hook registry ({kind}), and its Python code cannot be part of "
        f"a graph. Remove it first: module._diffusers_hook.remove_hook({name!r})."
    )


# Attributes for the bookkeeping of torch and of the hook mechanism, which no graph depends on.
_IGNORED = frozenset(vars(torch.nn.Module())) - {"training", "_forward_hooks", "_forward_pre_hooks"} | {
    "_diffusers_hook",
    "_internal_dict",  # diffusers' configuration; that of the denoiser itself is read separately
    "forward",
}
# Ignored on the denoiser itself: notes of diffusers about LoRAs that it has fused and then unloaded, and the denoiser's
# hooks, which stay outside of the graph.
_NOTES = _IGNORED | {"_hf_peft_config_loaded", "_safe_fusing", "lora_scale", "_forward_hooks", "_forward_pre_hooks"}
# Attributes of UNet blocks. disable_freeu() leaves them at None, which diffusers reads like a missing attribute.
_FREEU = frozenset({"s1", "s2", "b1", "b2"})
_SCALARS = frozenset({bool, int, float, str, type(None)})
#: The depth to which containers and objects are inspected: a list in a list in a processor's attribute.
_DEPTH = 5
#: The largest number of elements of a tensor that is compared by value.
_FEW = 64


def fingerprint(denoiser: torch.nn.Module) -> Hashable:
    """Return a fingerprint of what a captured graph depends on. Graphs stay valid until the fingerprint changes.

    It covers the modules and their plain attributes (LoRA scales and active adapters, FreeU's factors, attention
    processors and their attributes), hooks inside the denoiser, plain values that foreign code reads, and each
    parameter's shape, strides, dtype, device and quantization. It does not cover the parameters' *values*: graphs read
    them live, so changing weights in place does not require a new capture.
    """
    return _structure(denoiser), _layouts(_unique_tensors(denoiser))


def _structure(denoiser: torch.nn.Module) -> Hashable:
    """Return the part of the fingerprint that does not concern the parameters and buffers."""
    modules = tuple(
        (
            name,
            type(module),
            _attributes(module, _IGNORED if name else _NOTES),
            bool(name) and "forward" in module.__dict__,
        )
        for name, module in denoiser.named_modules()
    )
    foreign = tuple((code.path, code.kind, settings_of(code.code)) for code in foreign_code(denoiser))
    config = dict(getattr(denoiser, "config", {})) if isinstance(denoiser, ConfigMixin) else {}
    named = tuple((name, _plain(value, _DEPTH)) for name, value in config.items() if not name.startswith("_"))
    # Some packages replace torch's attention function for all models (SageAttention, Flash Attention).
    attention = torch.nn.functional.scaled_dot_product_attention
    return modules, foreign, settings_of_classes(denoiser), has_global_hooks(), named, attention


def _unique_tensors(denoiser: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*denoiser.named_parameters(), *denoiser.named_buffers()]


def _layouts(tensors: Iterable[tuple[str, torch.Tensor]]) -> Hashable:
    return tuple(
        (name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, make_up(tensor)) for name, tensor in tensors
    )


class Watch:
    """The fingerprint and the tensors of a denoiser, computed again only if something may have changed.

    `fingerprint` describes thousands of modules, which takes longer than a step of a large model on a fast GPU. The
    check remembers instead which objects the modules, their attributes and containers held, and where the tensors are.
    It may see a change where the fingerprint stays the same, but not the other way round. Code from outside the known
    libraries may read values from anywhere; with such code, the whole fingerprint is computed each time.

    Attributes:
        fingerprint: as `fingerprint(denoiser)` returns it.
        live: as `live_tensors(denoiser)` returns it.
    """

    fingerprint: Hashable
    live: dict[str, torch.Tensor]

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self._denoiser = denoiser
        self._seen: _Objects | None = None
        self._places: list[Hashable] = []
        self.refresh()

    def refresh(self) -> bool:
        """Bring the attributes up to date. Returns whether nothing has changed since the last time."""
        same = self._seen is not None and self._seen.are_the_same()
        if not same:
            self._structure = _structure(self._denoiser)
            self._seen = _Objects(self._denoiser)
            self._named = _unique_tensors(self._denoiser)
        places = [_place(tensor) for _, tensor in self._named]
        if same and places == self._places:
            return True
        self._places = places
        self.fingerprint = self._structure, _layouts(self._named)
        self.live = live_tensors(self._denoiser)
        return False


def _place(tensor: torch.Tensor) -> Hashable:
    if is_traceable_wrapper_subclass(tensor):
        return make_up(tensor), *(_place(each) for each in _inner(tensor)), *map(id, _inner(tensor))
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _are(found: Iterable[object], expected: Iterable[object]) -> bool:
    """Return whether both have the same objects in the same order."""
    end = (_END,)
    return all(map(operator.is_, chain(found, end), chain(expected, end)))


_END = object()


class _Objects:
    """All objects in a denoiser that the structural part of its fingerprint depends on, compared by identity."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self._modules = list(denoiser.modules())
        self._types = [type(module) for module in self._modules]
        self._attention = torch.nn.functional.scaled_dot_product_attention
        # Views of dictionaries show their present contents.
        self._contents: list[Iterable[object]] = []
        self._tables: list[Iterable[object]] = []  # dictionaries, whose keys matter as well
        self._numbers: list[tuple[torch.Tensor | np.ndarray | np.generic, Hashable]] = []
        self._found: set[int] = set()
        hooks = torch.nn.modules.module
        self._add_tables(hooks._global_forward_hooks, hooks._global_forward_pre_hooks)
        self._add_tables(*map(vars, code_owners(denoiser)))
        for module in self._modules:
            self._add_tables(module.__dict__, module._modules, module._parameters, module._buffers)
            for name, value in module.__dict__.items():
                if name not in _IGNORED:
                    self._add(value, _DEPTH)
        self._add(getattr(denoiser, "config", None), _DEPTH)
        self._held = list(chain.from_iterable(self._contents))
        self._keys = list(chain.from_iterable(self._tables))
        self._is_complete = not settings_of_classes(denoiser) and next(foreign_code(denoiser), None) is None

    def are_the_same(self) -> bool:
        """Return whether nothing has been replaced, added, removed or changed."""
        return (
            self._is_complete
            and torch.nn.functional.scaled_dot_product_attention is self._attention
            and list(map(type, self._modules)) == self._types
            and _are(chain.from_iterable(self._contents), self._held)
            and _are(chain.from_iterable(self._tables), self._keys)
            and all(_numbers(value) == numbers for value, numbers in self._numbers)
        )

    def _add_tables(self, *tables: Mapping[Any, Any]) -> None:
        self._tables += tables
        self._contents += [table.values() for table in tables]

    def _add(self, value: object, depth: int) -> None:
        """Add what `_plain` reads of `value`, an attribute's value, at this depth."""
        if type(value) in _SCALARS or isinstance(value, (torch.dtype, torch.device, FunctionType, BuiltinFunctionType)):
            return
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
            self._numbers.append((value, _numbers(value)))
            return
        if depth == 0 or isinstance(value, (torch.nn.Module, type, int, float, complex, str, bytes, MethodType)):
            return
        if id(value) in self._found:
            return
        self._found.add(id(value))
        if isinstance(value, dict):
            self._add_tables(value)
            inside: Iterable[object] = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            self._contents.append(value)
            inside = value
        elif isinstance(value, functools.partial):
            inside = (value.args, value.keywords)
        else:
            attributes = getattr(value, "__dict__", {})
            self._add_tables(attributes)
            inside = attributes.values()
        for item in list(inside):
            self._add(item, depth - 1)


def _attributes(module: torch.nn.Module, ignored: frozenset[str]) -> Hashable:
    # Written for speed: a large denoiser has two thousand modules, and this runs once per image.
    return tuple(
        (name, value if type(value) in _SCALARS else _plain(value, _DEPTH))
        for name, value in module.__dict__.items()
        if name not in ignored and not (value is None and name in _FREEU)
    )


def _plain(value: Any, depth: int) -> Hashable:
    """Return `value` in a hashable form: numbers and strings themselves, objects by type and attributes."""
    if type(value) in _SCALARS or isinstance(value, (torch.dtype, torch.device, FunctionType, BuiltinFunctionType)):
        return value  # type: ignore[no-any-return]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _numbers(value)
    if depth == 0 or isinstance(value, torch.nn.Module):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (int, float, complex, str, bytes)):
        return type(value), repr(value)
    if isinstance(value, dict):
        return tuple((str(key), _plain(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(item, depth - 1) for item in value)
    if isinstance(value, functools.partial):
        return tuple(_plain(part, depth - 1) for part in (value.func, value.args, value.keywords))
    if isinstance(value, MethodType):
        return value.__func__, Identity(value.__self__)
    return type(value), _plain(getattr(value, "__dict__", {}), depth - 1)


def _numbers(value: torch.Tensor | np.ndarray | np.generic) -> Hashable:
    """Return the key of a tensor or array that is not a parameter or buffer: its values if they are few, or its id."""
    if isinstance(value, np.generic):
        return value.item()  # type: ignore[no-any-return]  # elements of NumPy's ranges and random numbers
    kind = type(value), str(value.dtype), tuple(value.shape)
    if isinstance(value, np.ndarray):
        return (*kind, value.tobytes() if value.dtype != object else Identity(value))
    if type(value) is torch.Tensor and value.numel() <= _FEW and value.device.type != "meta":
        return (*kind, repr(value.tolist()))
    return (*kind, Identity(value, None if value.is_inference() else value._version))


class Identity:
    """The key of an object that counts as another one even if its contents are the same. It does not keep the object.

    Args:
        value: the object.
        version: the number of its changes so far.
    """

    __slots__ = ("_hash", "_of", "_version")

    def __init__(self, value: object, version: int | None = None) -> None:
        self._hash = hash((id(value), version))
        self._version = version
        try:
            self._of: Callable[[], object] = weakref.ref(value)
        except TypeError:  # its class does not support weak references
            self._of = lambda: value

    @property
    def value(self) -> object:
        """The object; None if it no longer exists."""
        return self._of()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return NotImplemented
        value = self.value
        return self is other or (value is not None and value is other.value and self._version == other._version)

    def __hash__(self) -> int:
        return self._hash
