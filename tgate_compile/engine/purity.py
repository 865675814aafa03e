"""Python code inside a denoiser: what can be part of a graph, and what cannot.

A graph holds what the code did while it was captured. Code that counts its calls, stores what it sees, or reads
something that others change does different things later on, and a graph would not. So forward hooks, attention
processors and replaced forwards from outside the known libraries are read before they are captured. Code that is seen
to depend on nothing but its arguments and its own plain settings is accepted; the rest is refused, unless its author
says that it is `pure`.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import FrozenDict

from tgate_compile._errors import INSTEAD, ConfigurationError, UnsupportedModelError

Code = TypeVar("Code", bound=Callable[..., Any])

#: Packages whose functions known libraries have in their own classes, as decorators for example.
_LIBRARIES = sys.stdlib_module_names | {"huggingface_hub", "accelerate", "numpy", "typing_extensions"}

_MARK = "__tgate_compile_pure__"

#: Packages whose code inside a denoiser is known to work in a graph, but for their pipelines' attention processors.
TRUSTED = ("torch", "diffusers", "transformers", "peft", "optimum", "torchao", "tomesd", "tgate_compile", "xformers")
_NOT_TRUSTED = ("diffusers.pipelines", "diffusers.modular_pipelines", "diffusers.guiders", "diffusers.hooks")

#: Modules that code may use: what they compute depends on the arguments alone.
_PURE_MODULES = frozenset(
    {
        "builtins",
        "contextlib",
        "einops",
        "functools",
        "inspect",
        "itertools",
        "math",
        "operator",
        "torch",
        "types",
        "typing",
    }
)

MSG_IMPURE = (
    "{what} {where} cannot be part of a graph: {reason}. A graph would go on repeating what it did once. Remove it, "
    "or, if its result depends on its arguments alone, say so: tgate_compile.pure({name}). " + INSTEAD
)
MSG_STATEFUL = "{model} keeps state from call to call, which a graph cannot: {reason}. " + INSTEAD
#: Packages that put code of their own into a denoiser, and how to be rid of it.
_PATCHES = {
    "DeepCache": "Disable it (helper.disable()): optimize(pipe, ..., deepcache_interval=3) does the same",
    "cache_dit": "Disable it: cache_dit.disable_cache(pipe)",
    "para_attn": "Load the pipeline again, without it",
    "tgate": "Load the pipeline again, without its loader: optimize(pipe, gate_step=10) does the same",
}
MSG_PATCHED = (
    "The package {package} has changed {where} so that it decides anew in every step what is computed, which cannot be "
    "part of a graph. {remedy}. " + INSTEAD
)
MSG_GLOBAL_HOOKS = (
    "torch has forward hooks for all modules (torch.nn.modules.module.register_module_forward_hook), which cannot be "
    "part of a graph. Remove them. " + INSTEAD
)


def pure(code: Code) -> Code:
    """Declare that a forward hook, an attention processor or a replaced forward is safe to capture.

    Its result must depend on nothing but its arguments, the weights, and plain values (numbers and strings, also in
    lists and dictionaries) that it reads; a change of these values leads to a new capture. It must not change anything
    else. It is captured once, on symbolic tensors, and the graph repeats what it did then.

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
        setattr(code.__func__ if isinstance(code, types.MethodType) else code, _MARK, True)
    except (AttributeError, TypeError):
        raise ConfigurationError(
            f"pure() cannot mark {code!r}, which takes no attributes. Put it into a function of your own, or mark "
            "its class."
        ) from None
    return code


def check_python(denoiser: torch.nn.Module) -> None:
    """Check the Python code that others have put inside `denoiser`.

    Hooks on the denoiser itself are fine: they stay outside of the graph, and act as in the plain pipeline.

    Raises:
        UnsupportedModelError: some of it cannot be part of a graph; the message names it, where it is, and why.
    """
    if has_global_hooks():
        raise UnsupportedModelError(MSG_GLOBAL_HOOKS)
    _check_patches(denoiser)
    own = {id(module) for module in denoiser.modules()}
    for foreign in foreign_code(denoiser):
        reason = _Reader(own).impurity(foreign.code)
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
    """Whether torch has forward hooks for all modules."""
    return bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)


def settings_of(code: object) -> tuple[Hashable, ...]:
    """The functions that `code` consists of, and the plain values that they read from outside."""
    reader = _Reader()
    reader.impurity(code)
    return tuple(reader.read)


def settings_of_classes(denoiser: torch.nn.Module) -> tuple[Hashable, ...]:
    """The same for the modules' classes that are not of known libraries."""
    return tuple((kind, *_read(kind).read) for kind in _own_classes(denoiser))


def _own_classes(denoiser: torch.nn.Module) -> list[type[torch.nn.Module]]:
    kinds = dict.fromkeys(type(module) for module in denoiser.modules())
    return [kind for kind in kinds if not is_trusted(kind.__module__)]


def _read(kind: type[torch.nn.Module]) -> _Reader:
    """What the forward of a class reads."""
    reader = _Reader()
    if isinstance(kind.forward, types.FunctionType):
        reader.function(kind.forward, kind)
    return reader


@dataclass(frozen=True)
class Foreign:
    """Code inside a denoiser that is not of a library known here.

    Attributes:
        kind: what it is: `hook`, `processor`, `forward`, `method`, or `attention` for PyTorch's own function.
        path: of the module that it is on.
        module: that module.
        code: the callable.
    """

    kind: str
    path: str
    module: torch.nn.Module
    code: object

    @property
    def described(self) -> tuple[str, str]:
        """What it is, and where."""
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


def foreign_code(denoiser: torch.nn.Module) -> Iterator[Foreign]:
    """Hooks, attention processors and replaced forwards inside `denoiser` that are not of known libraries."""
    kinds = {type(owner) for module in denoiser.modules() for owner in (module, *_processors(module))}
    patched = {
        kind for kind in kinds if _is_patched(kind, "forward" if issubclass(kind, torch.nn.Module) else "__call__")
    }
    for path, module in denoiser.named_modules():
        attributes = module.__dict__
        if path and (attributes["_forward_pre_hooks"] or attributes["_forward_hooks"]):
            for hooks in (attributes["_forward_pre_hooks"], attributes["_forward_hooks"]):
                for hook in hooks.values():
                    if _is_function(hook) or not is_trusted(type(hook).__module__):
                        yield Foreign("hook", path, module, hook)
        forward = attributes.get("forward")
        # What accelerate and diffusers put there is looked at where offloading is.
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
    """Functions of other authors that have been put into a known library's class, for all of its objects."""
    for base in kind.__mro__:
        if is_trusted(base.__module__) and base is not torch.nn.Module:
            own = sys.modules[base.__module__].__dict__
            for name, value in vars(base).items():
                if type(value) is types.FunctionType and value.__globals__ is not own and _is_foreign(value):
                    yield name, value


def _is_foreign(function: object) -> bool:
    # Not by `__module__`, which `functools.wraps` takes over. Generated methods (dataclasses) have no module there.
    module = getattr(function, "__globals__", {}).get("__name__")
    package = (module or "").partition(".")[0]
    return bool(package) and not _is_known(module) and package not in _LIBRARIES


def _replaced_forward_below_hook(denoiser: torch.nn.Module) -> object | None:
    """What stands in place of the denoiser's forward under our hook; None: its class's own does."""
    hooks = getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {})
    forward = getattr(hooks.get("tgate_compile"), "own_forward", None)
    own = forward is None or getattr(forward, "__func__", None) is type(denoiser).forward
    return None if own else forward


def _processors(module: torch.nn.Module) -> tuple[Callable[..., Any], ...]:
    """A module's attention processor, if it has one."""
    processor = module.__dict__.get("processor", module._modules.get("processor"))
    return (processor,) if callable(processor) else ()


def _is_patched(kind: type, name: str) -> bool:
    """Whether a class of a known library has a function of another author under this name."""
    function = getattr(kind, name, None)
    return (
        isinstance(function, types.FunctionType)
        and is_trusted(kind.__module__)
        and not _is_known(function.__globals__.get("__name__"))
    )


@functools.cache
def is_trusted(module_name: str | None) -> bool:
    """Whether code of the Python module called `module_name` is known to work in a graph."""
    name = module_name or ""
    return name.partition(".")[0] in TRUSTED and not name.startswith(_NOT_TRUSTED)


def _has_diffusers_hooks(module: torch.nn.Module) -> bool:
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def _name(code: object) -> str:
    function = code.func if isinstance(code, functools.partial) else code
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} ({getattr(function, '__module__', None) or type(function).__module__})"


class _Reader:
    """Follows what a callable refers to, and collects the values that it reads.

    Args:
        own: the denoiser's modules by their ids. Code may refer to these.
    """

    def __init__(self, own: Collection[int] = ()) -> None:
        self.read: list[Hashable] = []  # code and plain values, which are part of what identifies a graph
        self.held: list[tuple[str, object]] = []  # the other values, which may change from call to call
        self.rebinds: list[str] = []  # changes of variables outside of the code
        self._own = own
        self._seen: dict[int, object] = {}  # kept alive, so that no two have the same id

    def impurity(self, code: object) -> str | None:
        """Why `code` may not be repeated by a graph; None if nothing speaks against it."""
        if id(code) in self._seen:
            return None
        self._seen[id(code)] = code
        reason = self._impurity(code)
        return None if _is_marked(code) else reason

    def function(self, function: types.FunctionType, owner: type | None = None) -> str | None:
        """The same for a function; methods that it calls are looked for in `owner`."""
        self._seen[id(function)] = function
        found = _instructions_of(function.__code__)
        self.read.append(function.__code__)
        self.rebinds += found.rebinds
        values = [
            *((value, f"the variable {name!r} of the function around it") for name, value in _cells(function)),
            *(
                (function.__globals__[name], f"the global variable {name!r}")
                for name in found.globals
                if name in function.__globals__
            ),
            *((value, "a default value") for value in (function.__defaults__ or ())),
            *((value, "a default value") for value in (function.__kwdefaults__ or {}).values()),
            *((value, f"its attribute {name!r}") for name, value in vars(function).items() if name not in _NOTES),
        ]
        reasons = [
            *found.reasons,
            *(self._value(value, what, found.attributes) for value, what in values),
            None if owner is None else self._class(owner, found.attributes),
        ]
        return None if _is_marked(function) else _first(reasons)

    def _impurity(self, code: object) -> str | None:
        if isinstance(code, functools.partial):
            bound = (*code.args, *code.keywords.values())
            return _first([self.impurity(code.func), *(self._value(value, "a bound argument") for value in bound)])
        if isinstance(code, types.MethodType):
            return self._method(code.__func__, code.__self__)
        if isinstance(code, types.FunctionType):
            # Not by `__module__`, which `functools.wraps` takes over from the function that is wrapped.
            if _is_known(code.__globals__.get("__name__")):
                return _first([self._value(value, "a function") for _, value in _cells(code) if _is_function(value)])
            return self.function(code)
        if isinstance(code, types.BuiltinFunctionType):
            return self._builtin(code)
        if isinstance(code, (type, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return None
        if is_trusted(type(code).__module__):
            return None
        call = type(code).forward if isinstance(code, torch.nn.Module) else type(code).__call__
        return self._method(call, code)

    def _method(self, function: object, owner: object) -> str | None:
        """`function`, called as a method of the object or class `owner`."""
        kind = owner if isinstance(owner, type) else type(owner)
        if isinstance(function, types.FunctionType) and not _is_known(function.__globals__.get("__name__")):
            reason = self.function(function, kind)
        else:
            reason = self.impurity(function)
        if isinstance(owner, torch.nn.Module) and id(owner) not in self._own:
            return _first([reason, "it belongs to a module that is not part of the denoiser"])
        return _first([reason, None if isinstance(owner, (torch.nn.Module, type)) else self._attributes(owner)])

    def _builtin(self, code: types.BuiltinFunctionType) -> str | None:
        owner = code.__self__
        if code.__name__ in _OPAQUE:
            return f"it calls {code.__name__}()"
        # A method of a list or a generator of random numbers, say.
        return None if owner is None or isinstance(owner, type) else self._value(owner, f"{code.__name__}()'s owner")

    def _attributes(self, owner: object) -> str | None:
        """An object's own attributes, and the plain ones of its class."""
        found = dict(getattr(owner, "__dict__", {}))
        for base in _own_bases(type(owner)):
            plain = {name: value for name, value in vars(base).items() if isinstance(value, _PLAIN)}
            found = {**{name: value for name, value in plain.items() if not name.startswith("__")}, **found}
        return _first([self._value(value, f"its attribute {name!r}") for name, value in found.items() if name != _MARK])

    def _class(self, kind: type, names: Collection[str]) -> str | None:
        """What a class has under these names: functions that may be called, values that may be read."""
        found = [
            (getattr(value, "__func__", getattr(value, "fget", value)), f"the attribute {name!r} of {base.__name__}")
            for base in _own_bases(kind)
            for name, value in vars(base).items()
            if name in names
        ]
        return _first(
            [
                (None if id(value) in self._seen else self.function(value, kind))
                if isinstance(value, types.FunctionType)
                else self._value(value, what)
                for value, what in found
                if not isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
            ]
        )

    def _value(self, value: object, what: str, names: Collection[str] = ()) -> str | None:
        """A value that code refers to; `names` are the attributes that it looks up, of this value or of others."""
        if isinstance(value, _PLAIN):
            self.read.append((what, type(value), value))
            return None
        if isinstance(value, types.ModuleType):
            return None if _is_known(value.__name__) else f"it uses the module {value.__name__!r}"
        if isinstance(value, (tuple, frozenset)):
            return _first([self._value(item, what) for item in value])
        if isinstance(value, type):
            return self._class(value, names)
        if _is_function(value) or isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return self.impurity(value)
        if isinstance(value, torch.nn.Module):
            return None if id(value) in self._own else f"it reads {what}, a module that is not part of the denoiser"
        if _is_marked(value) or (callable(value) and is_trusted(type(value).__module__)):
            return self.impurity(value)
        self.held.append((what, value))
        self.read.append((what, _frozen(value, 3)))
        return f"it reads {what}, a {type(value).__name__}, which may change from call to call"


_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
#: Functions that change or read something without showing it in the code.
_OPAQUE = frozenset({"setattr", "delattr", "exec", "eval", "globals", "vars", "next", "open", "input", "print"})
_NOTES = (_MARK, "__wrapped__", "__signature__")


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _is_marked(code: object) -> bool:
    """Whether `code` itself, its function or its class is said to be pure; subclasses of the latter are not."""
    owners = (code.__func__ if isinstance(code, types.MethodType) else code, type(code))
    return any(_MARK in getattr(owner, "__dict__", ()) for owner in owners)


def _is_function(value: object) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial))


def _is_known(module_name: str | None) -> bool:
    """Whether the functions of a Python module may be used."""
    return is_trusted(module_name) or (module_name or "").partition(".")[0] in _PURE_MODULES


def _own_bases(kind: type) -> Iterator[type]:
    """A class and its bases, but for those of known libraries."""
    return (base for base in kind.__mro__ if base is not object and not is_trusted(base.__module__))


def _cells(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The variables of the functions around `function`, or those that a decorator has put around it."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # of a variable that has no value yet
            yield name, cell.cell_contents


def _frozen(value: object, depth: int) -> Hashable:
    """Plain values in `value`, in a form that can be compared; the rest by its type."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if depth and isinstance(value, dict):
        return tuple((str(key), _frozen(item, depth - 1)) for key, item in value.items())
    if depth and isinstance(value, (list, tuple)):
        return tuple(_frozen(item, depth - 1) for item in value)
    attributes = None if isinstance(value, (torch.Tensor, torch.nn.Module, type)) else getattr(value, "__dict__", None)
    inside = _frozen(attributes, depth - 1) if depth and isinstance(attributes, dict) else None
    return f"{type(value).__module__}.{type(value).__qualname__}", inside


@dataclass(frozen=True)
class _Instructions:
    """What the instructions of a function show.

    Attributes:
        reasons: why it may not be repeated.
        rebinds: those of them that change variables outside of it.
        globals: the global names that it reads.
        attributes: the names of the attributes that it reads, of whatever object.
    """

    reasons: tuple[str, ...]
    rebinds: tuple[str, ...]
    globals: tuple[str, ...]
    attributes: frozenset[str]


@functools.cache
def _instructions_of(code: types.CodeType) -> _Instructions:
    reasons, rebinds, loaded, attributes = [], [], set(), set()
    for instruction in _all_instructions(code):
        name = instruction.argval
        match instruction.opname:
            case "STORE_ATTR" | "DELETE_ATTR":
                reasons.append(f"it changes the attribute {name!r} in each call")
            case "STORE_GLOBAL" | "DELETE_GLOBAL":
                rebinds.append(f"it changes the global variable {name!r}")
            case "STORE_DEREF" if name in code.co_freevars:
                rebinds.append(f"it changes the variable {name!r} of the function around it")
            case "IMPORT_NAME" if not _is_known(name):
                reasons.append(f"it uses the module {name!r}")
            case "LOAD_GLOBAL" | "LOAD_NAME":
                loaded.add(name)
            case "LOAD_ATTR" | "LOAD_METHOD" | "LOAD_SUPER_ATTR":
                attributes.add(name)
    reasons += [f"it calls {name}()" for name in sorted(loaded & _OPAQUE)]
    return _Instructions((*rebinds, *reasons), tuple(rebinds), tuple(sorted(loaded)), frozenset(attributes))


def _all_instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Those of `code`, and of the functions and comprehensions inside of it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_instructions(constant)


def check_stateless(denoiser: torch.nn.Module, run: Callable[[], object]) -> None:
    """Check that running the denoiser changes nothing that it reads, if it has code that is not known here.

    `run` calls it once, on real inputs. What is computed in the first call and kept (tables) may change once. If there
    is more, everything is put back to what it was.

    Raises:
        UnsupportedModelError: it counts calls, collects results, or keeps other state.
    """
    if not _own_classes(denoiser) and next(foreign_code(denoiser), None) is None:
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
    """Give a function that puts the Python state of `denoiser` back to what it is now.

    That is hooks, processors, attributes and what is in them, and buffers; not the values of parameters.
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


#: Where accelerate and diffusers keep their hooks, which have state of their own.
_HOOK_NAMES = ("_hf_hook", "_diffusers_hook", "_internal_dict")


def _state(denoiser: torch.nn.Module) -> dict[str, object]:
    """What the code in `denoiser` may change: attributes of modules and processors, and what its functions read."""
    ignored = vars(torch.nn.Module()).keys() | {*_HOOK_NAMES, "forward", "processor"}
    state: dict[str, object] = {}
    for path, module in denoiser.named_modules():
        # What torch's own weight_norm and spectral_norm compute anew in each call.
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
    """A value at a moment: equal to a later one if nothing has replaced or changed it."""

    def __init__(self, value: object) -> None:
        self._held = value  # alive, so that identities say something
        self._seen = _seen(value, 3)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Snapshot) and self._seen == other._seen

    __hash__ = None  # type: ignore[assignment]


def _contents(value: object, depth: int) -> list[Callable[[], None]]:
    """What brings back the contents of a container, of a tensor, and of all inside it."""
    if torch.is_tensor(value):
        is_weight = isinstance(value, torch.nn.Parameter)
        return [] if is_weight else [functools.partial(_copy, value, value.detach().clone())]
    if not depth or isinstance(value, (*_PLAIN, torch.nn.Module, type, FrozenDict)):
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
    if isinstance(value, _PLAIN):
        return type(value), value
    if torch.is_tensor(value):
        return id(value), value._version if not value.is_inference() else None
    if depth and isinstance(value, dict):
        return id(value), [(str(key), _seen(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return id(value), [_seen(item, depth - 1) for item in value]
    attributes = None if isinstance(value, (torch.nn.Module, type)) else getattr(value, "__dict__", None)
    return id(value), _seen(attributes, depth - 1) if depth and isinstance(attributes, dict) else None
