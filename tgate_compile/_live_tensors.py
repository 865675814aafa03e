"""The tensors of a module by the names that `torch.export` has for them, and what those mean.

A parameter of a tensor subclass, such as torchao's quantized weights, is exported as the plain tensors inside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tgate_compile._errors import UnsupportedModelError

MSG_BITSANDBYTES = (
    "{model} was quantized by bitsandbytes (its layer {layer}, for example), whose weights keep state beside their "
    "numbers that torch.export cannot follow, so that there is no graph to optimize. What works: torchao's "
    "quantize_(model, Int8WeightOnlyConfig()), optimum-quanto's weights, or the model as it was."
)
MSG_ACTIVATIONS = (
    "{model} was quantized by optimum-quanto with its layers' inputs (activations=..., in {layer}, for example), which "
    "torch.export cannot follow, so that there is no graph to optimize. What works: quantize(model, weights=...) "
    "alone, or torchao's Int8DynamicActivationInt8WeightConfig."
)


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by their names; those with several names are there several times.

    A tensor of a subclass is there as it is, and so are the tensors inside it, by the names that `torch.export` gives
    them: `linear.parametrizations.weight.original0`, `...1` and so on. They are the module's own, not copies.
    """
    return {**_named(module), **plain_tensors(module)}


def plain_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`live_tensors` without those of a subclass: each byte of the module is in a plain tensor here."""
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


def make_up(tensor: torch.Tensor) -> Hashable:
    """What a graph depends on of a subclass: its class, its settings, and the tensors inside; () for a plain tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return ()
    settings = tensor.__tensor_flatten__()[1]
    inside = tuple((each.shape, each.stride(), each.dtype, each.device) for each in _inner(tensor))
    return type(tensor), repr(settings), inside


def rounded_input(module: torch.nn.Module) -> str | None:
    """The name of the first parameter whose layer rounds its input to few bits as well, by torchao; None: none does."""
    for name, tensor in module.named_parameters():
        by_tensor = getattr(tensor, "act_quant_kwargs", None) is not None
        if by_tensor or type(tensor).__name__ == "LinearActivationQuantizedTensor":
            return name
    return None


def wrapped_weight(module: torch.nn.Module) -> str | None:
    """The name of the first parameter that is of a subclass with tensors inside it; None: none is."""
    return next((name for name, tensor in module.named_parameters() if is_traceable_wrapper_subclass(tensor)), None)


def check_quantization(module: torch.nn.Module) -> None:
    """Check that `torch.export` can follow what has quantized the module's layers, if anything has.

    Raises:
        UnsupportedModelError: it cannot.
    """
    model = type(module).__name__
    for name, layer in module.named_modules():
        if any(type(each).__module__.startswith("bitsandbytes") for each in layer.parameters(recurse=False)):
            raise UnsupportedModelError(MSG_BITSANDBYTES.format(model=model, layer=name))
        if getattr(layer, "activation_qtype", None) is not None:
            raise UnsupportedModelError(MSG_ACTIVATIONS.format(model=model, layer=name))


def _named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors in `tensor`, in the order of `torch.export`."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))
