"""Record what determines a denoiser's output besides its class, configuration and weights, and compare such records.

This includes LoRA scales and active adapters, FreeU factors, attention processors and their settings, hooks, patched
forwards and changed attributes: whatever differs from a new model of the same configuration. The record is plain data
that is the same in every process: objects are described by their types and attributes, never by identity.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, DiffusionPipeline

from tgate_compile.bundle import manifest as m

Baseline = Literal["config", "none"]
#: Plain data, which JSON can represent.
Json = None | bool | int | float | str | list[Any] | dict[str, Any]

# Attributes that do not affect a module's output: bookkeeping, where weights are, how attention is implemented.
_IGNORED = frozenset(vars(torch.nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"} | {
    "_attention_backend",
    "_diffusers_hook",  # `optimize` and `load` reject all hooks of this kind except their own
    "_gradient_checkpointing_func",
    "_hf_hook",  # they also reject these, except those of `enable_model_cpu_offload`
    "_internal_dict",  # the configuration, which the manifest contains
    "_is_hf_initialized",
    "_old_forward",
    "_parallel_config",
    "forward",
    "gradient_checkpointing",
}
# On the denoiser itself: notes of LoRA loaders, and hooks, which run around the graph whatever it computes.
_IGNORED_ON_ROOT = _IGNORED | {
    "_forward_hooks",
    "_forward_pre_hooks",
    "_hf_peft_config_loaded",
    "_safe_fusing",
    "lora_scale",
    "peft_config",
}
# Keys inside an attribute that are not state: tomesd stores the size of the latents and a generator, peft the name of
# each layer.
_IGNORED_KEYS = {"_tome_info": {"size", "hooks", "generator"}, "kwargs": {"target_name"}}
# These libraries are versioned, so their code is described by name only, other code also by content.
_LIBRARIES = frozenset({"torch", "diffusers", "transformers", "peft", "accelerate", "torchao", "optimum", "tomesd"})
_DEPTH = 5
#: The longest value in characters; a longer one is truncated and followed by a digest of the whole.
_LONGEST = 400


@dataclass(frozen=True)
class Difference:
    """An attribute of some modules whose value differs from that in a new denoiser.

    Attributes:
        attribute: the name of the attribute. `type` stands for the class of the module, and is None where the module
            is missing.
        value: plain data. None stands for a missing, false or empty value.
        modules: the number of modules with this value.
        first: the name of the first of these modules in alphabetical order; empty for the denoiser itself.
        digest: the SHA-256 digest of the sorted names of these modules, each followed by a newline.
    """

    attribute: str
    value: Json
    modules: int
    first: str
    digest: str


@dataclass(frozen=True)
class DenoiserState:
    """Everything in which a denoiser differs from a new one.

    Attributes:
        baseline: `config` if the denoiser was compared with a new model of the same class and configuration; `none` if
            no such model could be created, so that everything is recorded as a difference.
        differences: the differences, sorted by attribute.
    """

    baseline: Baseline
    differences: tuple[Difference, ...]


def state_of_denoiser(
    denoiser: torch.nn.Module, *, forward: Callable[..., Any] | None = None, baseline: Baseline | None = None
) -> DenoiserState:
    """Return what determines the output of `denoiser` besides its class, configuration and weights.

    Args:
        denoiser: the model, with or without our hook.
        forward: the original forward of a hooked denoiser.
        baseline: the baseline of the record to compare with. The default is `config` if a new model can be created,
            and `none` otherwise.
    """
    new = None if baseline == "none" else _new_one(denoiser)
    by_path = {} if new is None else dict(new.named_modules())
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, module in denoiser.named_modules():
        reference = by_path.pop(path, None)
        own = dict(_attributes(module, path, forward))
        usual = {} if reference is None else dict(_attributes(reference, path, None))
        for name in {**usual, **own}:
            if name in module._modules:
                continue  # a module has replaced the attribute, and is visited under its own path
            if own.get(name) != usual.get(name):
                found[name, _canonical(own.get(name))].append(path)
    for path in by_path:
        found["type", _canonical(None)].append(path)
    return DenoiserState(
        "none" if new is None else "config", tuple(_difference(*item) for item in sorted(found.items()))
    )


def what_differs(
    here: DenoiserState, recorded: DenoiserState, *, there: str = "in the bundle", most: int = 3
) -> list[str]:
    """Return a phrase for each difference between two states, the most informative first; empty if they are equal."""
    if here.baseline != recorded.baseline:
        return [
            "its state was recorded as the differences from a new model, but no new model of its class and "
            "configuration can be created here"
        ]
    own, other = (
        {(d.attribute, _canonical(_as_number(d.value)), d.digest): d for d in side.differences}
        for side in (here, recorded)
    )
    only_own = [difference for key, difference in own.items() if key not in other]
    only_other = [difference for key, difference in other.items() if key not in own]
    names = sorted({difference.attribute for difference in (*only_own, *only_other)}, key=_rank)
    phrases: list[str] = []
    for name in names:
        mine, theirs = ([each for each in side if each.attribute == name] for side in (only_own, only_other))
        phrases += [phrase for phrase in _phrases(name, mine, theirs, there) if phrase not in phrases]
        if name == "scaling" and not (mine and theirs):
            return phrases  # only one side has adapters, and all other differences follow from them
    return phrases if len(phrases) <= most else [*phrases[:most], f"and {len(phrases) - most} more"]


def recorded_state(state: m.DenoiserState) -> DenoiserState:
    """Return the state that a manifest has recorded."""
    return DenoiserState(state.baseline, tuple(Difference(**each.model_dump()) for each in state.differences))


def as_recorded(state: DenoiserState) -> m.DenoiserState:
    """Return `state` in the form in which a manifest stores it."""
    differences = [m.StateDifference(**asdict(difference)) for difference in state.differences]
    return m.DenoiserState(baseline=state.baseline, differences=differences)


def settings_that_differ(denoiser: torch.nn.Module, recorded: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each setting in which the denoiser's configuration differs from `recorded`.

    A setting that is missing on one side has its default: versions of diffusers differ in the settings that they have.
    """
    own = plain_config(getattr(denoiser, "config", {}))
    arguments = inspect.signature(type(denoiser).__init__).parameters.values() if own else ()
    defaults = plain_config({each.name: each.default for each in arguments if each.default is not each.empty})
    phrases = []
    for name in defaults.keys() | (own.keys() & recorded.keys()):
        here, there = (config.get(name, defaults.get(name)) for config in (own, recorded))
        if here != there:
            phrases.append(f"{name} is {here!r} here and {there!r} in the bundle")
    return sorted(phrases)


def _new_one(denoiser: torch.nn.Module) -> torch.nn.Module | None:
    """Return a model of the same class and configuration, without weights, or None if it cannot be created."""
    if not isinstance(denoiser, ConfigMixin):
        return None
    try:
        # Initializing weights draws random numbers; the caller's generator must not change.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            new = type(denoiser).from_config(denoiser.config)
    except Exception:  # a constructor may do things that need weights; the baseline is then unknown
        return None
    assert isinstance(new, torch.nn.Module)
    return new.eval()


def _difference(key: tuple[str, str], paths: list[str]) -> Difference:
    attribute, value = key
    paths = sorted(paths)
    digest = hashlib.sha256("".join(f"{path}\n" for path in paths).encode()).hexdigest()
    return Difference(attribute, json.loads(value), len(paths), paths[0], digest)


def _attributes(module: torch.nn.Module, path: str, forward: Callable[..., Any] | None) -> Iterator[tuple[str, Json]]:
    """Yield the relevant attributes of a module itself, except missing, false and empty values."""
    kind = type(module)
    yield "type", _type_name(kind)  # type: ignore[arg-type]
    if module.training and _asks_for_training(kind) and getattr(module, "p", None) != 0:  # type: ignore[arg-type]
        yield "training", True
    hooked = "_diffusers_hook" in vars(module)  # then the module's `forward` is that of the hook
    patched = forward if path == "" and forward is not None else None if hooked else vars(module).get("forward")
    if patched is not None and getattr(patched, "__func__", None) is not kind.forward:
        yield "forward", _plain(patched, _DEPTH)
    ignored = _IGNORED if path else _IGNORED_ON_ROOT
    for name, value in vars(module).items():
        if name in ignored:
            continue
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            value = list(value.values())
        elif name in _IGNORED_KEYS and isinstance(value, Mapping):
            value = _without(value, _IGNORED_KEYS[name])
        plain = _plain(value, _DEPTH)
        if not _is_nothing(plain):
            yield name, plain
        elif getattr(kind, name, None):  # the instance hides an attribute of the class
            yield name, False


def _without(value: Mapping[Any, Any], names: Iterable[str]) -> dict[Any, Any]:
    return {
        key: _without(item, names) if isinstance(item, Mapping) else item
        for key, item in value.items()
        if key not in names
    }


@functools.cache
def _asks_for_training(kind: type) -> bool:
    """Return whether the code of a module's class reads `training`, as dropout does."""
    functions = (
        function
        for base in kind.__mro__[: kind.__mro__.index(torch.nn.Module)]
        for function in vars(base).values()
        if isinstance(function, FunctionType) and function.__name__ not in ("__init__", "train", "eval")
    )
    return any("training" in function.__code__.co_names for function in functions)


def _is_nothing(value: Json) -> bool:
    return value is None or value is False or value in ("", [], {})


def _plain(value: Any, depth: int) -> Json:
    """Return `value` as plain data that is the same in every process."""
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, torch.Tensor):
        return _summary(value)
    if isinstance(value, (torch.device, torch.Generator)):
        return None  # the device and the random numbers are not part of the state
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, type):
        return _type_name(value)
    if isinstance(value, enum.Enum):
        return f"{_type_name(type(value))}.{value.name}"
    if isinstance(value, (torch.nn.Module, DiffusionPipeline)) or depth == 0:
        return _type_name(type(value))  # type: ignore[arg-type]
    return _shortened(_structure(value, depth - 1))


def _structure(value: Any, depth: int) -> Json:
    if isinstance(value, Mapping):
        return _items(value.items(), depth)
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, depth) for item in value), key=_canonical)
    if isinstance(value, functools.partial):
        return [_plain(part, depth) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return {"function": _function_name(value.__func__), "of": _plain(value.__self__, depth)}
    if isinstance(value, FunctionType):
        return _function(value, depth)
    if isinstance(value, BuiltinFunctionType):
        return value.__qualname__
    array = getattr(value, "__array__", None)
    if array is not None:
        return _summary(torch.as_tensor(array()))
    slots = {name for base in type(value).__mro__ for name in _listed(vars(base).get("__slots__", ()))}
    attributes = {
        **{name: getattr(value, name) for name in slots if hasattr(value, name)},
        **getattr(value, "__dict__", {}),
    }
    attributes = {name: item for name, item in attributes.items() if name not in _IGNORED and name != "__dict__"}
    return {"type": _type_name(type(value)), **_items(attributes.items(), depth)}  # type: ignore[arg-type]


def _listed(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _items(pairs: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
    plain = ((str(key), _plain(item, depth)) for key, item in pairs)
    return {key: item for key, item in plain if not _is_nothing(item)}


def _summary(tensor: torch.Tensor) -> Json:
    """Return a scalar as a number, or else the norms of `tensor`: tables differ in their last bits between machines."""
    if tensor.is_meta:
        return _shape_of(tensor)
    if tensor.numel() == 1 and not tensor.is_complex():
        return _plain(tensor.item(), 1)
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    values = values.cpu().to(torch.float64).flatten()
    ramp = torch.linspace(-1, 1, values.numel(), dtype=torch.float64)
    norms = (values.norm().item(), (values + ramp).norm().item())
    return f"{_shape_of(tensor)} of norms {' and '.join(f'{norm:.3e}' for norm in norms)}"


def _shape_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _function(function: FunctionType, depth: int) -> Json:
    """Return the name of a function, with its defaults and the values in its closure."""
    held = []
    for cell in function.__closure__ or ():
        try:
            held.append(_plain(cell.cell_contents, depth))
        except ValueError:  # an empty cell
            held.append(None)
    about = {"defaults": _plain(function.__defaults__, depth), "holds": held}
    about = {key: value for key, value in about.items() if not _is_nothing(value)}
    return {"function": _function_name(function), **about} if about else _function_name(function)


def _function_name(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    package = str(getattr(function, "__module__", None)).partition(".")[0]
    if package in _LIBRARIES or not isinstance(function, FunctionType):
        return f"{package}:{name}"
    return f"{name} #{_code_digest([function.__code__])}"


@functools.cache
def _type_name(kind: type) -> str:
    """Return the package and name of a class, not its module: libraries move classes between modules."""
    package = kind.__module__.partition(".")[0]
    if package in _LIBRARIES or package == "builtins":
        return f"{package}:{kind.__qualname__}"
    functions = [value for _, value in sorted(vars(kind).items(), key=str) if isinstance(value, FunctionType)]
    digest = f" #{_code_digest([function.__code__ for function in functions])}" if functions else ""
    return f"{kind.__qualname__}{digest}"


def _code_digest(codes: Sequence[CodeType]) -> str:
    """Return a digest of the names and numbers in `codes`: bytecode itself differs between versions of Python."""

    def parts(code: CodeType) -> Iterator[str]:
        yield " ".join(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from parts(constant)
            elif isinstance(constant, (bool, int, float, complex)):
                yield repr(constant)

    text = "\n".join(part for code in codes for part in parts(code))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _shortened(value: Json) -> Json:
    text = _canonical(value)
    if len(text) <= _LONGEST:
        return value
    return f"{text[:100]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()})"


def _canonical(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def _as_number(value: Json) -> Json:
    """Return `value` with 1 instead of 1.0: a scale may be given as either."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_as_number(item) for item in value]
    return {key: _as_number(item) for key, item in value.items()} if isinstance(value, dict) else value


# Descriptions of differences.

_FREEU = ("s1", "s2", "b1", "b2")
# The attributes that are reported first, in this order; the others follow by name.
_REPORTED_FIRST = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters", *_FREEU, "processor", "type")
_WORDS = {
    "_active_adapter": "the active adapter",
    "_forward_hooks": "the forward hook",
    "_forward_pre_hooks": "the forward pre-hook",
    "_disable_adapters": "disabling of adapters",
    "merged_adapters": "the adapter that is fused into the weights",
    "processor": "the attention processor",
    "type": "the class",
    "training": "training mode",
    "forward": "the forward",
}


def _rank(name: str) -> tuple[int, str]:
    return (_REPORTED_FIRST.index(name) if name in _REPORTED_FIRST else len(_REPORTED_FIRST), name)


def _phrases(name: str, here: list[Difference], recorded: list[Difference], there: str) -> Iterator[str]:
    if name == "scaling":
        mine, theirs = (_scales(side) for side in (here, recorded))
        for adapter in sorted({*mine, *theirs}):
            if mine.get(adapter) == theirs.get(adapter) and adapter in mine:
                yield f"adapter {adapter!r} is in other modules here than {there}"
                continue
            own = f"has scale {_shown_all(mine[adapter])} here" if adapter in mine else "is not here"
            other = f"{_shown_all(theirs[adapter])} {there}" if adapter in theirs else f"is not {there}"
            if adapter not in mine:
                other = f"has scale {other}"
            yield f"adapter {adapter!r} {own} and {other}"
        return
    example = (here or recorded)[0]
    count = max(sum(difference.modules for difference in side) for side in (here, recorded))
    where = f" of {example.first}" if example.first else ""
    where += f" and {count - 1} more" if count > 1 else ""
    words = f"FreeU's {name}" if name in _FREEU else _WORDS.get(name, name)
    values = [_shown_all([difference.value for difference in side]) for side in (here, recorded)]
    usual = "not set" if name in _FREEU else "as in a new model"
    values = [usual if text is None else text for text in values]
    if values[0] == values[1]:
        yield f"{words} {values[0]} is on other modules here than {there}"
        return
    yield f"{words}{where} is {values[0]} here and {values[1]} {there}"


def _scales(side: list[Difference]) -> dict[str, list[Json]]:
    scales: dict[str, list[Json]] = {}
    for difference in side:
        for adapter, scale in (difference.value if isinstance(difference.value, dict) else {}).items():
            if scale not in scales.setdefault(adapter, []):
                scales[adapter].append(scale)
    return scales


def _shown_all(values: Sequence[Json]) -> str | None:
    texts = list(dict.fromkeys(_shown(value) for value in values))
    return " or ".join(texts[:3]) + (" or others" if len(texts) > 3 else "") if texts else None


def _shown(value: Json) -> str:
    if isinstance(value, dict) and set(value) == {"type"}:
        return str(value["type"])
    if isinstance(value, list) and len(value) == 1:
        return _shown(value[0])
    text = value if isinstance(value, str) else "off" if _is_nothing(value) else "on" if value is True else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` as plain data, without diffusers' private entries, such as the model's path on this machine."""
    return {str(name): _plain_value(value) for name, value in config.items() if not str(name).startswith("_")}


def _plain_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity: "inf", "-inf", "nan"
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain_value(item) for item in value]
    tolist = getattr(value, "tolist", None)  # numpy's arrays and numbers
    return _plain_value(tolist()) if tolist is not None else str(value)
