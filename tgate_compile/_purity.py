"""Python code inside a denoiser: what can be part of a graph, and what cannot.

A graph holds what the code did while it was captured. Code that counts its calls, stores what it sees, or reads
something that others change does different things later on, and a graph would not. So forward hooks, attention
processors and replaced forwards from outside the known libraries are read before they are captured. Code that is seen
to depend on nothing but its arguments and its own plain settings is accepted; the rest is refused, unless its author
says that it is `pure`.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from tgate_compile._errors import INSTEAD, UnsupportedModelError

Code = TypeVar("Code", bound=Callable[..., Any])

_MARK = "__tgate_compile_pure__"

#: Packages whose code inside a denoiser is known to work in a graph, but for their pipelines' attention processors.
TRUSTED = ("torch", "diffusers", "transformers", "peft", "optimum", "torchao", "tomesd", "tgate_compile", "xformers")
_NOT_TRUSTED = ("diffusers.pipelines", "diffusers.hooks")

#: Modules that code may use: what they compute depends on the arguments alone.
_PURE_MODULES = frozenset(
    {"torch", "math", "einops", "functools", "operator", "typing", "types", "itertools", "inspect"}
)

MSG_IMPURE = (
    "{what} {where} cannot be part of a graph: {reason}. A graph would go on repeating what it did once. Remove it, "
    "or, if its result depends on its arguments alone, say so: tgate_compile.pure({name}). " + INSTEAD
)
MSG_STATEFUL = "{model} keeps state from call to call, which a graph cannot: running it changes {changes}. " + INSTEAD
MSG_GLOBAL_HOOKS = (
    "torch has forward hooks for all modules (torch.nn.modules.module.register_module_forward_hook), which cannot be "
    "part of a graph. Remove them. " + INSTEAD
)


def pure(code: Code) -> Code:
    """Say that a forward hook, an attention processor (its class or the object) or a forward is safe to capture.

    Its result must depend on its arguments, on the weights and on its plain attributes alone (numbers, strings), and it
    must not change anything else: it runs once, on symbolic tensors, and what it did then is what the graph does.
    Returns `code` itself, so that it can be used as a decorator.
    """
    setattr(code.__func__ if isinstance(code, types.MethodType) else code, _MARK, True)
    return code


def check_python(denoiser: torch.nn.Module) -> None:
    """Check the Python code that others have put inside of `denoiser`.

    Hooks on the denoiser itself are fine: they stay outside of the graph, and act as in the plain pipeline.

    Raises:
        UnsupportedModelError: some of it cannot be part of a graph; the message names it, where it is, and why.
    """
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        raise UnsupportedModelError(MSG_GLOBAL_HOOKS)
    for foreign in foreign_code(denoiser):
        reason = _Reader().impurity(foreign.code)
        if reason is not None:
            what, where = foreign.described
            raise UnsupportedModelError(MSG_IMPURE.format(what=what, where=where, reason=reason, name=foreign.kind))


def settings_of(code: object) -> tuple[tuple[str, object], ...]:
    """The values that `code` reads from outside: attributes, globals, variables of the functions around it."""
    reader = _Reader(all_of_it=True)
    reader.impurity(code)
    return tuple(reader.read)


def settings_of_class(kind: type[torch.nn.Module]) -> tuple[tuple[str, object], ...]:
    """What the methods of a module's class read from outside, and the plain attributes of the class itself."""
    reader = _Reader(all_of_it=True)
    for base in kind.__mro__:
        if is_trusted(base.__module__) or base is object:
            break
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and name != "__init__":
                reader.impurity(value)
            elif isinstance(value, _PLAIN) and not name.startswith("__"):
                reader.read.append((name, value))
    return tuple(reader.read)


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
        where = f"{self.path!r} ({type(self.module).__name__})" if self.path else type(self.module).__name__
        if self.kind == "hook":
            return f"The forward hook {_name(self.code)}", f"on {where}"
        if self.kind == "attention":
            return f"The function {_name(self.code)}", "in the place of torch's scaled_dot_product_attention"
        if self.kind == "method":
            return f"The function {_name(self.code)}", f"in the place of a method of {type(self.module).__name__}"
        if self.kind == "forward":
            return f"The function {_name(self.code)}", f"in the place of the forward of {where}"
        return f"The attention processor {type(self.code).__name__}", f"of {where}"


def foreign_code(denoiser: torch.nn.Module) -> Iterator[Foreign]:
    """Hooks, attention processors and replaced functions inside of `denoiser` that are not of known libraries."""
    seen: set[type] = set()
    for path, module in denoiser.named_modules():
        attributes = module.__dict__
        if path:
            for hooks in (attributes["_forward_pre_hooks"], attributes["_forward_hooks"]):
                for hook in hooks.values():
                    yield Foreign("hook", path, module, hook)
        forward = attributes.get("forward")
        # What accelerate and diffusers put there is looked at where offloading is.
        if forward is not None and "_hf_hook" not in attributes and not _has_diffusers_hooks(module):
            yield Foreign("forward", path, module, forward)
        elif not path and (below := _replaced_forward_below_hook(module)) is not None:
            yield Foreign("forward", path, module, below)
        for name, value in attributes.items():
            if name != "forward" and isinstance(value, types.MethodType) and _is_patch(value.__func__):  # type: ignore[arg-type]
                yield Foreign("method", path, module, value)
        processor = getattr(module, "processor", None)
        if callable(processor) and not is_trusted(type(processor).__module__):
            yield Foreign("processor", path, module, processor)
        for kind in {type(module), type(processor)} - seen if processor is not None else {type(module)} - seen:
            seen.add(kind)
            for patch in _patches(kind):
                yield Foreign("method", path, module, patch)
    attention = torch.nn.functional.scaled_dot_product_attention
    if isinstance(attention, types.FunctionType) and _is_patch(attention):
        yield Foreign("attention", "", denoiser, attention)


def _patches(kind: type) -> Iterator[types.FunctionType]:
    """Functions from elsewhere that have been put into a known library's class, for all of its objects."""
    for base in kind.__mro__:
        if is_trusted(base.__module__) and base is not torch.nn.Module:
            own = sys.modules[base.__module__].__dict__
            for value in vars(base).values():
                if type(value) is types.FunctionType and value.__globals__ is not own and _is_patch(value):
                    yield value


def _is_patch(function: types.FunctionType) -> bool:
    # Not by `__module__`, which `functools.wraps` takes over. Generated methods (dataclasses) have no module there.
    module = function.__globals__.get("__name__")
    package = (module or "").partition(".")[0]
    return bool(package) and not is_trusted(module) and package not in _LIBRARIES


def _replaced_forward_below_hook(denoiser: torch.nn.Module) -> object | None:
    """What stands in the place of the denoiser's forward under our hook; None: its class's own does."""
    hooks = getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {})
    forward = getattr(hooks.get("tgate_compile"), "own_forward", None)
    own = forward is None or getattr(forward, "__func__", None) is type(denoiser).forward
    return None if own else forward


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
    """Follows what a callable refers to, as long as it is not certain that it cannot be repeated.

    With `all_of_it`, it goes on then, and `read` has all values that matter.
    """

    def __init__(self, *, all_of_it: bool = False) -> None:
        self.read: list[tuple[str, object]] = []
        self._all_of_it = all_of_it
        self._seen: set[int] = set()

    def impurity(self, code: object) -> str | None:
        """Why `code` may not be repeated by a graph; None if nothing speaks against it."""
        if id(code) in self._seen or getattr(code, _MARK, False):
            return None
        self._seen.add(id(code))
        if isinstance(code, functools.partial):
            bound = (*code.args, *code.keywords.values())
            return self.impurity(code.func) or self._first((value, "a bound argument") for value in bound)
        if isinstance(code, types.MethodType):
            owner = code.__self__
            of_denoiser = isinstance(owner, (torch.nn.Module, type))
            return self.impurity(code.__func__) or (None if of_denoiser else self._attributes(owner))
        if isinstance(code, types.FunctionType):
            # Not by `__module__`, which `functools.wraps` takes over from the function that is wrapped.
            known = is_trusted(code.__globals__.get("__name__"))
            return self._first(_wrapped_functions(code)) if known else self._function(code)
        if isinstance(code, (type, *_BUILTIN)) or is_trusted(type(code).__module__):
            return None
        call = type(code).forward if isinstance(code, torch.nn.Module) else type(code).__call__
        return self._attributes(code) or self.impurity(call)

    def _function(self, function: types.FunctionType) -> str | None:
        reason, loaded = _instructions_of(function.__code__)
        if reason is not None and not self._all_of_it:
            return reason
        around: list[tuple[object, str]] = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # of a variable that has no value yet
                around.append((cell.cell_contents, f"the variable {name!r} of the function around it"))
        reason = self._first(around)
        if reason is not None:
            return reason
        in_module = [name for name in loaded if name in function.__globals__]
        reads = ((function.__globals__[name], f"the global variable {name!r}") for name in in_module)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        return self._first(reads) or self._first((value, "a default value") for value in defaults)

    def _attributes(self, owner: object) -> str | None:
        """An object's own attributes, and those of its class."""
        of_torch = vars(torch.nn.Module()).keys() if isinstance(owner, torch.nn.Module) else ()
        found = {name: value for name, value in getattr(owner, "__dict__", {}).items() if name not in of_torch}
        for base in type(owner).__mro__:
            if base is object or is_trusted(base.__module__):
                break
            plain = {name: value for name, value in vars(base).items() if isinstance(value, _PLAIN)}
            found = {**{name: value for name, value in plain.items() if not name.startswith("__")}, **found}
        return self._first((value, f"its attribute {name!r}") for name, value in found.items())

    def _value(self, value: object, what: str) -> str | None:
        if isinstance(value, _PLAIN):
            self.read.append((what, value))  # which is part of what identifies a graph
            return None
        if isinstance(value, types.ModuleType):
            known = value.__name__.partition(".")[0] in _PURE_MODULES or is_trusted(value.__name__)
            return None if known else f"it uses the module {value.__name__!r}"
        if self._all_of_it and _holds_values(value):
            self.read.append((what, value))
            return None
        if isinstance(value, (tuple, frozenset)):
            return self._first((item, what) for item in value)
        if isinstance(value, (type, types.FunctionType, types.MethodType, functools.partial, *_BUILTIN)):
            return self.impurity(value)
        if isinstance(value, torch.nn.Module):
            return f"it reads {what}, a module that is not part of the denoiser"
        if getattr(value, _MARK, False) or (callable(value) and is_trusted(type(value).__module__)):
            return None
        return f"it reads {what}, a {type(value).__name__}, which may change from call to call"

    def _first(self, values: Iterable[tuple[object, str]]) -> str | None:
        for value, what in values:
            reason = self._value(value, what)
            if reason is not None and not self._all_of_it:
                return reason
        return None


def _holds_values(value: object) -> bool:
    """Whether `value` is a container or a plain object, whose contents a graph may have been made from."""
    if isinstance(value, (dict, list, set, torch.Tensor, np.ndarray, np.generic)):
        return True
    return not isinstance(value, (type, torch.nn.Module)) and not callable(value) and _is_of_user(type(value))


def _is_of_user(kind: type) -> bool:
    package = kind.__module__.partition(".")[0]
    return kind is types.SimpleNamespace or (not is_trusted(kind.__module__) and package not in _LIBRARIES)


#: Packages whose functions known libraries have in their own classes, as decorators for example.
_LIBRARIES = sys.stdlib_module_names | {"huggingface_hub", "accelerate", "numpy", "typing_extensions"}
_BUILTIN = (types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: Functions that change or read something without showing it in the code.
_OPAQUE = frozenset({"setattr", "delattr", "exec", "eval", "globals", "vars", "next", "open", "input"})


def _wrapped_functions(function: types.FunctionType) -> Iterator[tuple[object, str]]:
    """The functions that a decorator of a known library has around it: `torch.no_grad()` on one of the user's."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            if isinstance(cell.cell_contents, (types.FunctionType, types.MethodType, functools.partial)):
                yield cell.cell_contents, "a function"


@functools.cache
def _instructions_of(code: types.CodeType) -> tuple[str | None, tuple[str, ...]]:
    """Why a function with this `code` may not be repeated, judging by its instructions; and the globals it reads."""
    loaded: set[str] = set()
    reasons: list[str] = []
    for instruction in _all_instructions(code):
        name = instruction.argval
        match instruction.opname:
            case "STORE_ATTR" | "DELETE_ATTR":
                reasons.append(f"it changes the attribute {name!r} in each call")
            case "STORE_GLOBAL" | "DELETE_GLOBAL":
                reasons.append(f"it changes the global variable {name!r}")
            case "STORE_DEREF" if name in code.co_freevars:
                reasons.append(f"it changes the variable {name!r} of the function around it")
            case "LOAD_GLOBAL" | "LOAD_NAME":
                loaded.add(name)
    reasons += [f"it calls {name}()" for name in sorted(loaded & _OPAQUE)]
    return (reasons[0] if reasons else None), tuple(sorted(loaded))


def _all_instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Those of `code`, and of the functions and comprehensions inside of it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_instructions(constant)


def check_stateless(denoiser: torch.nn.Module, run: Callable[[], object]) -> None:
    """Check that running the denoiser leaves its attributes as they are, if it has code that is not known here.

    `run` calls it once, on real inputs. What is computed in the first call and kept (tables) may change once.

    Raises:
        UnsupportedModelError: it counts calls, collects results, or keeps other state.
    """
    own_classes = any(not is_trusted(type(module).__module__) for module in denoiser.modules())
    if not own_classes and next(foreign_code(denoiser), None) is None:
        return
    changed: list[str] = []
    for _ in range(2):
        before = _state(denoiser)
        run()
        after = _state(denoiser)
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        if not changed:
            return
    shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    raise UnsupportedModelError(MSG_STATEFUL.format(model=type(denoiser).__name__, changes=shown))


def _state(denoiser: torch.nn.Module) -> dict[str, object]:
    """The attributes of all modules and processors; what they hold is kept alive, so that identities say something."""
    ignored = vars(torch.nn.Module()).keys() - {"_buffers"}
    state: dict[str, object] = {}
    for path, module in denoiser.named_modules():
        owners = {path: module, f"{path}.processor": getattr(module, "processor", None)}
        for where, owner in owners.items():
            for name, value in getattr(owner, "__dict__", {}).items():
                if name not in ignored and name not in ("_diffusers_hook", "forward", "processor"):
                    state[f"{where}.{name}".lstrip(".")] = _Snapshot(value)
    return state


class _Snapshot:
    """A value at a moment: equal to a later one if nothing has replaced or changed it."""

    def __init__(self, value: object) -> None:
        self._held = value
        self._seen = _seen(value, 3)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Snapshot) and self._seen == other._seen

    __hash__ = None  # type: ignore[assignment]


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
