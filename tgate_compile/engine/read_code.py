"""Analyse the bytecode of functions for reads, stores and calls that a graph would not repeat."""

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

Code = TypeVar("Code", bound=Callable[..., Any])


#: Packages whose functions appear in the classes of known libraries, for example as decorators.
_LIBRARIES = sys.stdlib_module_names | {"huggingface_hub", "accelerate", "numpy", "typing_extensions"}


PURE_MARK = "__tgate_compile_pure__"


#: Packages whose code inside a denoiser is known to work in a graph, except for the modules in `_NOT_TRUSTED`.
TRUSTED = ("torch", "diffusers", "transformers", "peft", "optimum", "torchao", "tomesd", "tgate_compile", "xformers")


_NOT_TRUSTED = ("diffusers.pipelines", "diffusers.modular_pipelines", "diffusers.guiders", "diffusers.hooks")


#: Modules that code may use, since their results depend on the arguments alone.
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


@functools.cache
def is_trusted(module_name: str | None) -> bool:
    """Return whether code of the Python module `module_name` is known to work in a graph."""
    name = module_name or ""
    return name.partition(".")[0] in TRUSTED and not name.startswith(_NOT_TRUSTED)


class Reader:
    """Follows the references of a callable, and collects the values that it reads.

    Args:
        own: the ids of the denoiser's modules, which the code may refer to.
    """

    def __init__(self, own: Collection[int] = ()) -> None:
        self.read: list[Hashable] = []  # code and plain values, which become part of a graph's key
        self.held: list[tuple[str, object]] = []  # the other values, which may change from call to call
        self.rebinds: list[str] = []  # assignments to variables outside of the code
        self._own = own
        self._seen: dict[int, object] = {}  # kept alive, so that ids stay unique

    def impurity(self, code: object) -> str | None:
        """Return why a graph cannot repeat `code`; None if it can."""
        if id(code) in self._seen:
            return None
        self._seen[id(code)] = code
        reason = self._impurity(code)
        return None if _is_marked(code) else reason

    def function(self, function: types.FunctionType, owner: type | None = None) -> str | None:
        """Return the same as `impurity` for a function; the methods that it calls are looked up in `owner`."""
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
            # Not by `__module__`, which `functools.wraps` copies from the wrapped function.
            if is_known(code.__globals__.get("__name__")):
                return _first([self._value(value, "a function") for _, value in _cells(code) if is_function(value)])
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
        """Return why `function` cannot be repeated when it is called as a method of the object or class `owner`."""
        kind = owner if isinstance(owner, type) else type(owner)
        if isinstance(function, types.FunctionType) and not is_known(function.__globals__.get("__name__")):
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
        # A method of a list or of a random number generator, for example.
        return None if owner is None or isinstance(owner, type) else self._value(owner, f"{code.__name__}()'s owner")

    def _attributes(self, owner: object) -> str | None:
        """Return why a graph cannot depend on an object's own attributes, or on the plain ones of its class."""
        found = dict(getattr(owner, "__dict__", {}))
        for base in _own_bases(type(owner)):
            plain = {name: value for name, value in vars(base).items() if isinstance(value, PLAIN_VALUES)}
            found = {**{name: value for name, value in plain.items() if not name.startswith("__")}, **found}
        return _first(
            [self._value(value, f"its attribute {name!r}") for name, value in found.items() if name != PURE_MARK]
        )

    def _class(self, kind: type, names: Collection[str]) -> str | None:
        """Return why a graph cannot depend on the attributes `names` of a class (functions to call, values to read)."""
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
        """Return why a graph cannot depend on `value`; `names` are the attributes that the code looks up."""
        if isinstance(value, PLAIN_VALUES):
            self.read.append((what, type(value), value))
            return None
        if isinstance(value, types.ModuleType):
            return None if is_known(value.__name__) else f"it uses the module {value.__name__!r}"
        if isinstance(value, (tuple, frozenset)):
            return _first([self._value(item, what) for item in value])
        if isinstance(value, type):
            return self._class(value, names)
        if is_function(value) or isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return self.impurity(value)
        if isinstance(value, torch.nn.Module):
            return None if id(value) in self._own else f"it reads {what}, a module that is not part of the denoiser"
        if _is_marked(value) or (callable(value) and is_trusted(type(value).__module__)):
            return self.impurity(value)
        self.held.append((what, value))
        self.read.append((what, _frozen(value, 3)))
        return f"it reads {what}, a {type(value).__name__}, which may change from call to call"


PLAIN_VALUES = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


#: Functions whose effects cannot be seen in the bytecode.
_OPAQUE = frozenset({"setattr", "delattr", "exec", "eval", "globals", "vars", "next", "open", "input", "print"})


_NOTES = (PURE_MARK, "__wrapped__", "__signature__")


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _is_marked(code: object) -> bool:
    """Return whether `code`, its function or its class is marked as pure. Subclasses do not inherit the mark."""
    owners = (code.__func__ if isinstance(code, types.MethodType) else code, type(code))
    return any(PURE_MARK in getattr(owner, "__dict__", ()) for owner in owners)


def is_function(value: object) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial))


def is_known(module_name: str | None) -> bool:
    """Return whether code may use the functions of the Python module `module_name`."""
    return is_trusted(module_name) or (module_name or "").partition(".")[0] in _PURE_MODULES


def _own_bases(kind: type) -> Iterator[type]:
    """Yield a class and its bases, except for those of known libraries."""
    return (base for base in kind.__mro__ if base is not object and not is_trusted(base.__module__))


def _cells(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """Yield the variables that `function` uses of its enclosing functions, with their values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # the variable has no value yet
            yield name, cell.cell_contents


def _frozen(value: object, depth: int) -> Hashable:
    """Return the plain values in `value` in a hashable form, and the type of everything else."""
    if isinstance(value, PLAIN_VALUES):
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
    """The findings in the instructions of a function.

    Attributes:
        reasons: the reasons why a graph cannot repeat it.
        rebinds: the reasons that are assignments to variables outside of it.
        globals: the global names that it reads.
        attributes: the names of the attributes that it reads, of any object.
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
            case "IMPORT_NAME" if not is_known(name):
                reasons.append(f"it uses the module {name!r}")
            case "LOAD_GLOBAL" | "LOAD_NAME":
                loaded.add(name)
            case "LOAD_ATTR" | "LOAD_METHOD" | "LOAD_SUPER_ATTR":
                attributes.add(name)
    reasons += [f"it calls {name}()" for name in sorted(loaded & _OPAQUE)]
    return _Instructions((*rebinds, *reasons), tuple(rebinds), tuple(sorted(loaded)), frozenset(attributes))


def _all_instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield the instructions of `code`, and of the functions and comprehensions inside it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_instructions(constant)
