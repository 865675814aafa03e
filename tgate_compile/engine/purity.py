"""Check that the Python code inside a denoiser can be part of a graph.

A graph records what the code did while it was captured. Code that counts its calls, stores what it sees, or reads
something that other code changes behaves differently later on, whereas a graph does not. So forward hooks, attention
processors and replaced forwards from outside the known libraries are analysed before they are captured. Code that
depends on nothing but its arguments and its own plain settings is accepted; the rest is refused, unless its author
marks it as `pure`.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict

from tgate_compile._errors import INSTEAD, ConfigurationError, UnsupportedModelError
from tgate_compile.engine.read_code import (
    _LIBRARIES,
    PLAIN_VALUES,
    PURE_MARK,
    Code,
    Reader,
    is_function,
    is_known,
    is_trusted,
)

MSG_IMPURE = (
    "{what} {where} cannot be part of a graph: {reason}. A graph would repeat what it did while it was captured. "
    "Remove it or, if its result depends on its arguments alone, mark it: tgate_compile.pure({name}). " + INSTEAD
)
MSG_STATEFUL = "{model} keeps state from call to call, which a graph cannot do: {reason}. " + INSTEAD
#: Packages that put their code into a denoiser, with the way to remove it.
_PATCHES = {
    "DeepCache": "Disable it (helper.disable()); optimize(pipe, ..., deepcache_interval=3) does the same",
    "cache_dit": "Disable it: cache_dit.disable_cache(pipe)",
    "para_attn": "Load the pipeline again, without it",
    "tgate": "Load the pipeline again, without that package's loader; optimize(pipe, gate_step=10) does the same",
}
MSG_PATCHED = (
    "The package {package} has changed {where} so that it decides at every step what to compute, which cannot be part "
    "of a graph. {remedy}. " + INSTEAD
)
MSG_GLOBAL_HOOKS = (
    "torch has forward hooks for all modules (torch.nn.modules.module.register_module_forward_hook), which cannot be "
    "part of a graph. Remove them. " + INSTEAD
)


def pure(code: Code) -> Code:
    """Declare that a forward hook, an attention processor or a replaced forward is safe to capture.

    Its result must depend only on its arguments, the weights, and plain values that it reads (numbers and strings,
    also in lists and dictionaries); a change of these values leads to a new capture. It must not have side effects.
    It is captured once, on symbolic tensors, and the graph repeats what it did then.

    Args:
        code: a function, a bound method, a callable object, or the class of callable objects.

    Returns:
        `code` itself, so that it can be used as a decorator.

    Raises:
        ConfigurationError: `code` is not callable, or cannot have attributes.
    """
    if not callable(code):
        raise ConfigurationError(
            "pure() needs a hook, an attention processor or a forward: a function, a method, a callable object or "
            f"a class, but got a {type(code).__name__}."
        )
    try:
        setattr(code.__func__ if isinstance(code, types.MethodType) else code, PURE_MARK, True)
    except (AttributeError, TypeError):
        raise ConfigurationError(
            f"pure() cannot mark {code!r}, which does not accept attributes. Wrap it in a function, or mark its class."
        ) from None
    return code


def check_python(denoiser: torch.nn.Module) -> None:
    """Check the Python code inside `denoiser` that is not part of the known libraries.

    Hooks on the denoiser itself are allowed: they stay outside of the graph, and act as in the plain pipeline.

    Raises:
        UnsupportedModelError: some of the code cannot be part of a graph. The message names it, its place and the
            reason.
    """
    if has_global_hooks():
        raise UnsupportedModelError(MSG_GLOBAL_HOOKS)
    _check_patches(denoiser)
    own = {id(module) for module in denoiser.modules()}
    for foreign in foreign_code(denoiser):
        reason = Reader(own).impurity(foreign.code)
        if reason is not None:
            what, where = foreign.described
            raise UnsupportedModelError(MSG_IMPURE.format(what=what, where=where, reason=reason, name=foreign.kind))
    for kind in _own_classes(denoiser):
        reader = _read(kind)
        if reader.rebinds:
            raise UnsupportedModelError(MSG_STATEFUL.format(model=kind.__name__, reason=reader.rebinds[0]))


def _check_patches(denoiser: torch.nn.Module) -> None:
    for path, module in denoiser.named_modules():
        forward: Any = vars(module).get("forward")
        while isinstance(forward, functools.partial):
            forward = forward.func
        origins = (getattr(forward, "__globals__", {}).get("__name__", ""), type(module).__module__)
        for package in (origin.partition(".")[0] for origin in origins):
            if package in _PATCHES:
                where = _place(path, module)
                raise UnsupportedModelError(MSG_PATCHED.format(package=package, where=where, remedy=_PATCHES[package]))


def _place(path: str, module: torch.nn.Module) -> str:
    return f"{path!r} ({type(module).__name__})" if path else type(module).__name__


def has_global_hooks() -> bool:
    """Return whether torch has global forward hooks, which apply to all modules."""
    return bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)


def settings_of(code: object) -> tuple[Hashable, ...]:
    """Return the functions that `code` consists of, and the plain values that they read from outside."""
    reader = Reader()
    reader.impurity(code)
    return tuple(reader.read)


def settings_of_classes(denoiser: torch.nn.Module) -> tuple[Hashable, ...]:
    """Return the same as `settings_of` for the classes of modules that are not part of the known libraries."""
    return tuple((kind, *_read(kind).read) for kind in _own_classes(denoiser))


def has_foreign_code(denoiser: torch.nn.Module) -> bool:
    """Return whether anything in `denoiser` is not part of the known libraries."""
    return bool(_own_classes(denoiser)) or next(foreign_code(denoiser), None) is not None


def _own_classes(denoiser: torch.nn.Module) -> list[type[torch.nn.Module]]:
    kinds = dict.fromkeys(type(module) for module in denoiser.modules())
    return [kind for kind in kinds if not is_trusted(kind.__module__)]


def _read(kind: type[torch.nn.Module]) -> Reader:
    """Analyse the forward of a class, and return the reader with its findings."""
    reader = Reader()
    if isinstance(kind.forward, types.FunctionType):
        reader.function(kind.forward, kind)
    return reader


@dataclass(frozen=True)
class Foreign:
    """Code inside a denoiser that is not part of a known library.

    Attributes:
        kind: `hook`, `processor`, `forward`, `method`, or `attention` for a replacement of PyTorch's function.
        path: the path of the module that it is attached to.
        module: that module.
        code: the callable.
    """

    kind: str
    path: str
    module: torch.nn.Module
    code: object

    @property
    def described(self) -> tuple[str, str]:
        """A description of the code and of its place."""
        where = _place(self.path, self.module)
        if self.kind == "attention":
            return f"The function {_name(self.code)}", "in place of torch's scaled_dot_product_attention"
        if self.kind == "method":
            return f"The function {_name(self.code)}", f"in place of a method of {where}"
        if self.kind == "hook":
            return f"The forward hook {_name(self.code)}", f"on {where}"
        if self.kind == "forward":
            return f"The function {_name(self.code)}", f"in place of the forward of {where}"
        return f"The attention processor {_name(self.code)}", f"of {where}"


def code_owners(denoiser: torch.nn.Module) -> set[type]:
    """Return the classes of modules and attention processors in `denoiser`, with their base classes."""
    return {base for kind in _kinds(denoiser) for base in kind.__mro__ if base.__module__ != "builtins"}


def _kinds(denoiser: torch.nn.Module) -> set[type]:
    return {type(owner) for module in denoiser.modules() for owner in (module, *_processors(module))}


def foreign_code(denoiser: torch.nn.Module) -> Iterator[Foreign]:
    """Yield the hooks, attention processors and replaced forwards in `denoiser` that known libraries do not define."""
    kinds = _kinds(denoiser)
    patched = {
        kind for kind in kinds if _is_patched(kind, "forward" if issubclass(kind, torch.nn.Module) else "__call__")
    }
    for path, module in denoiser.named_modules():
        attributes = module.__dict__
        if path and (attributes["_forward_pre_hooks"] or attributes["_forward_hooks"]):
            for hooks in (attributes["_forward_pre_hooks"], attributes["_forward_hooks"]):
                for hook in hooks.values():
                    if is_function(hook) or not is_trusted(type(hook).__module__):
                        yield Foreign("hook", path, module, hook)
        forward = attributes.get("forward")
        # Forwards replaced by accelerate and diffusers are checked in `check_weights_stay`.
        if forward is not None and "_hf_hook" not in attributes and not _has_diffusers_hooks(module):
            yield Foreign("forward", path, module, forward)
        elif not path and (below := _replaced_forward_below_hook(module)) is not None:
            yield Foreign("forward", path, module, below)
        elif type(module) in patched:
            yield Foreign("forward", path, module, type(module).forward)
        for name, value in attributes.items():
            if name != "forward" and isinstance(value, types.MethodType) and _is_foreign(value.__func__):
                yield Foreign("method", path, module, value)
        for processor in _processors(module):
            if not is_trusted(type(processor).__module__):
                yield Foreign("processor", path, module, processor)
            elif type(processor) in patched and not isinstance(processor, torch.nn.Module):
                yield Foreign("processor", path, module, type(processor).__call__)

    for kind in kinds:
        for name, method in _patched_methods(kind):
            if name != ("forward" if issubclass(kind, torch.nn.Module) else "__call__"):
                yield Foreign("method", "", denoiser, method)
    attention = torch.nn.functional.scaled_dot_product_attention
    if isinstance(attention, types.FunctionType) and _is_foreign(attention):
        yield Foreign("attention", "", denoiser, attention)


def _patched_methods(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield functions from elsewhere that have been put into a known library's class, for all of its objects."""
    for base in kind.__mro__:
        if is_trusted(base.__module__) and base is not torch.nn.Module:
            own = sys.modules[base.__module__].__dict__
            for name, value in vars(base).items():
                if type(value) is types.FunctionType and value.__globals__ is not own and _is_foreign(value):
                    yield name, value


def _is_foreign(function: object) -> bool:
    # Not by `__module__`, which `functools.wraps` copies. The globals of generated methods (dataclasses) have no name.
    module = getattr(function, "__globals__", {}).get("__name__")
    package = (module or "").partition(".")[0]
    return bool(package) and not is_known(module) and package not in _LIBRARIES


def _replaced_forward_below_hook(denoiser: torch.nn.Module) -> object | None:
    """Return the replacement of the denoiser's forward below our hook; None if it is the class's own forward."""
    hooks = getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {})
    forward = getattr(hooks.get("tgate_compile"), "own_forward", None)
    own = forward is None or getattr(forward, "__func__", None) is type(denoiser).forward
    return None if own else forward


def _processors(module: torch.nn.Module) -> tuple[Callable[..., Any], ...]:
    """Return a module's attention processor, if it has one."""
    processor = module.__dict__.get("processor", module._modules.get("processor"))
    return (processor,) if callable(processor) else ()


def _is_patched(kind: type, name: str) -> bool:
    """Return whether a class of a known library has a function from elsewhere under this name."""
    function = getattr(kind, name, None)
    return (
        isinstance(function, types.FunctionType)
        and is_trusted(kind.__module__)
        and not is_known(function.__globals__.get("__name__"))
    )


def _has_diffusers_hooks(module: torch.nn.Module) -> bool:
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def _name(code: object) -> str:
    function = code.func if isinstance(code, functools.partial) else code
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} ({getattr(function, '__module__', None) or type(function).__module__})"


def check_stateless(denoiser: torch.nn.Module, run: Callable[[], object]) -> None:
    """Check that running the denoiser does not change its state, if it has code outside the known libraries.

    `run` calls the denoiser once, on real inputs. Values that the first call computes and keeps (tables) may change
    once. If anything changes again, the original state is restored.

    Raises:
        UnsupportedModelError: the denoiser counts calls, collects results, or keeps other state.
    """
    if not has_foreign_code(denoiser):
        return
    held = [value for kind in _own_classes(denoiser) for _, value in _read(kind).held]
    restores = [remember(denoiser), *(restore for value in held for restore in _contents(value, 3))]
    before = _state(denoiser)
    for _ in range(2):
        run()
        after = _state(denoiser)
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        if not changed:
            return
        before = after
    for restore in restores:
        restore()
    reason = f"running it changes {', '.join(changed[:3])}" + (", ..." if len(changed) > 3 else "")
    raise UnsupportedModelError(MSG_STATEFUL.format(model=type(denoiser).__name__, reason=reason))


def remember(denoiser: torch.nn.Module) -> Callable[[], None]:
    """Return a function that restores the present Python state of `denoiser`.

    The state consists of hooks, processors, attributes with their contents, and buffers, but not of parameter values.
    """
    restores: list[Callable[[], None]] = []
    for module in denoiser.modules():
        for owner in (module, *_processors(module)):
            attributes = getattr(owner, "__dict__", None)
            if isinstance(attributes, dict):
                restores.append(functools.partial(_refill, attributes, dict(attributes)))
                inside = (value for name, value in attributes.items() if name not in _HOOK_NAMES)
                restores += [restore for value in inside for restore in _contents(value, 3)]

    def restore() -> None:
        for each in restores:
            each()

    return restore


#: Attributes in which accelerate and diffusers keep their hooks, which have their own state.
_HOOK_NAMES = ("_hf_hook", "_diffusers_hook", "_internal_dict")


def _state(denoiser: torch.nn.Module) -> dict[str, object]:
    """Return the state that the code in `denoiser` may change: attributes, and values that its functions read."""
    ignored = vars(torch.nn.Module()).keys() | {*_HOOK_NAMES, "forward", "processor"}
    state: dict[str, object] = {}
    for path, module in denoiser.named_modules():
        # torch's weight_norm and spectral_norm recompute these attributes in each call.
        computed = {getattr(hook, "name", None) for hook in module._forward_pre_hooks.values()}
        owners = {path: module, f"{path}.processor": getattr(module, "processor", None)}
        for where, owner in owners.items():
            attributes = getattr(owner, "__dict__", {})
            for name, value in {**attributes, **attributes.get("_buffers", {})}.items():
                if name not in ignored and name not in computed:
                    state[f"{where}.{name}".lstrip(".")] = _Snapshot(value)
    for kind in _own_classes(denoiser):
        for what, value in _read(kind).held:
            state[f"{what} of {kind.__name__}"] = _Snapshot(value)
    return state


class _Snapshot:
    """A snapshot of a value, which equals a later one if the value has been neither replaced nor changed."""

    def __init__(self, value: object) -> None:
        self._held = value  # kept alive, so that ids stay unique
        self._seen = _seen(value, 3)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Snapshot) and self._seen == other._seen

    __hash__ = None  # type: ignore[assignment]


def _contents(value: object, depth: int) -> list[Callable[[], None]]:
    """Return functions that restore the contents of a container or a tensor, and of everything inside it."""
    if torch.is_tensor(value):
        is_weight = isinstance(value, torch.nn.Parameter)
        return [] if is_weight else [functools.partial(_copy, value, value.detach().clone())]
    if not depth or isinstance(value, (*PLAIN_VALUES, torch.nn.Module, type, FrozenDict)):
        return []
    if isinstance(value, (dict, list, set, tuple, frozenset)):
        items = value.values() if isinstance(value, dict) else value
        inside = [restore for item in items for restore in _contents(item, depth - 1)]
        return inside if isinstance(value, (tuple, frozenset)) else [_refilling(value), *inside]
    attributes = getattr(value, "__dict__", None)
    return _contents(attributes, depth) if isinstance(attributes, dict) else []


def _refilling(container: Any) -> Callable[[], None]:
    return functools.partial(_refill, container, container.copy())


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if isinstance(container, list) else container.update(contents)


def _copy(tensor: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _seen(value: object, depth: int) -> object:
    if isinstance(value, PLAIN_VALUES):
        return type(value), value
    if torch.is_tensor(value):
        return id(value), value._version if not value.is_inference() else None
    if depth and isinstance(value, dict):
        return id(value), [(str(key), _seen(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return id(value), [_seen(item, depth - 1) for item in value]
    attributes = None if isinstance(value, (torch.nn.Module, type)) else getattr(value, "__dict__", None)
    return id(value), _seen(attributes, depth - 1) if depth and isinstance(attributes, dict) else None
