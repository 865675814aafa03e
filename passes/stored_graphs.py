"""Write exported programs of fixed sizes as JSON, without their weights, and read them again.

This is several times as fast as `torch.export.save` and `torch.export.load`, and nothing is pickled. It covers what
captures of denoisers consist of: ATen operators on tensors and plain constants.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._export.verifier import load_verifier
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tgate_compile.passes.graphs import flat_call

#: Types whose values are stored by name, by tag, each with the object that has an attribute of that name.
_NAMED: Mapping[str, tuple[type, object]] = {
    "dtype": (torch.dtype, torch),
    "layout": (torch.layout, torch),
    "format": (torch.memory_format, torch),
}
_SEQUENCES: Mapping[str, type[list[Any] | tuple[Any, ...]]] = {"list": list, "tuple": tuple}
_PLAIN = (bool, int, float, str, type(None))


class NotStorableError(Exception):
    """A program has parts that cannot be written, such as free sizes."""


class NotReadableError(Exception):
    """The data is not a program that `to_json` has written."""


def to_json(program: ExportedProgram) -> dict[str, Any]:
    """Return `program` as plain data, without its weights and constants.

    Raises:
        NotStorableError: it has free sizes, submodules, or operators and arguments of other kinds.
    """
    stacks: dict[str, int] = {}
    numbers = {node: number for number, node in enumerate(program.graph.nodes)}
    signature = program.graph_signature
    return {
        "dialect": program.dialect,
        "nodes": [_written_node(node, numbers, stacks) for node in program.graph.nodes],
        "stacks": list(stacks),
        "inputs": [
            [spec.kind.name, _written_argument(spec.arg), spec.target, spec.persistent]
            for spec in signature.input_specs
        ],
        "outputs": [
            [spec.kind.name, _written_argument(spec.arg), spec.target, None] for spec in signature.output_specs
        ],
    }


def from_json(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """Return the program that `to_json` has written, with its weights, buffers and constants from `tensors`.

    Like `flat_program`'s, it takes flat inputs and returns a flat tuple.

    Raises:
        NotReadableError: `data` is not of this form, or `tensors` do not fit.
    """
    try:
        return _read_program(data, tensors)
    except NotReadableError:
        raise
    except Exception as error:  # of any class: the data may have been written by another version, or by anyone
        raise NotReadableError(f"{type(error).__name__}: {error}") from error


def digest_of(program: ExportedProgram) -> str:
    """Return a hash of what `program` computes from its weights and inputs, including its constants' values.

    Raises:
        NotStorableError: as `to_json`.
    """
    data = to_json(program)
    del data["stacks"]
    nodes = [node[:-1] for node in data.pop("nodes")]
    hashed = hashlib.sha256(json.dumps([data, nodes], sort_keys=True).encode())
    for name in constants_of(program):
        hashed.update(contents_of(program.constants[name]))
    return hashed.hexdigest()


def constants_of(program: ExportedProgram) -> list[str]:
    """Return the names of the tensors of `program` that belong to its code, and not to the module."""
    return [
        str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind not in (InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER)
    ]


def contents_of(value: object) -> bytes:
    """Return the elements of a tensor as bytes.

    Raises:
        NotStorableError: it is not a plain tensor with elements.
    """
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_meta:
        raise NotStorableError(f"the elements of a {type(value).__name__} are not known")
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _written_node(node: Node, numbers: Mapping[Node, int], stacks: dict[str, int]) -> list[Any]:
    """Return a node as [operation, name, target, arguments, keyword arguments, value, number of its module stack]."""
    if node.op not in ("placeholder", "call_function", "output"):
        raise NotStorableError(f"it has a node {node.op}")
    stack = [[str(call), str(path), str(kind)] for call, (path, kind) in node.meta.get("nn_module_stack", {}).items()]
    return [
        node.op,
        node.name,
        _written_target(node),
        [_written(value, numbers) for value in node.args],
        {name: _written(value, numbers) for name, value in node.kwargs.items()},
        _written_value(node.meta.get("val")),
        stacks.setdefault(json.dumps(stack), len(stacks)),
    ]


def _written_target(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target is operator.getitem:
        return "getitem"
    raise NotStorableError(f"it calls {target}")


def _written(value: object, numbers: Mapping[Node, int]) -> Any:
    """Return an argument; what JSON does not have is a list that begins with a tag."""
    if isinstance(value, Node):
        return ["node", numbers[value]]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise NotStorableError("it has free sizes")
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return ["tuple" if isinstance(value, tuple) else "list", *(_written(each, numbers) for each in value)]
    if isinstance(value, slice):
        return ["slice", *(_written(each, numbers) for each in (value.start, value.stop, value.step))]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    for tag, (kind, _) in _NAMED.items():
        if isinstance(value, kind):
            return [tag, str(value).removeprefix("torch.")]
    raise NotStorableError(f"it has an argument of type {type(value).__name__}")


def _written_value(value: object) -> Any:
    """Return the shape, strides, dtype, device and class of a fake tensor; other values are arguments."""
    if isinstance(value, torch.Tensor):
        if type(value).__name__ not in ("FakeTensor", "Parameter") or value.layout is not torch.strided:
            raise NotStorableError(f"it has a {type(value).__name__}")
        sizes = [*value.shape, *value.stride()]
        if not all(type(size) is int for size in sizes):
            raise NotStorableError("it has free sizes")
        dtype, is_parameter = str(value.dtype).removeprefix("torch."), isinstance(value, torch.nn.Parameter)
        return ["tensor", list(value.shape), list(value.stride()), dtype, str(value.device), is_parameter]
    if isinstance(value, (list, tuple)):
        return ["tuple" if isinstance(value, tuple) else "list", *(_written_value(each) for each in value)]
    return _written(value, {})


def _written_argument(argument: object) -> list[Any]:
    if isinstance(argument, TensorArgument):
        return ["tensor", argument.name]
    if isinstance(argument, ConstantArgument) and isinstance(argument.value, _PLAIN):
        return ["constant", argument.name, argument.value]
    raise NotStorableError(f"it has a {type(argument).__name__}")


def _read_program(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> ExportedProgram:
    # Like that of `torch.export`: without a ShapeEnv Inductor would leave out its caches.
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph = torch.fx.Graph()
    stacks = [{call: (path, kind) for call, path, kind in json.loads(stack)} for stack in data["stacks"]]
    nodes: list[Node] = []
    targets: dict[str, Any] = {}
    for op, name, target, args, kwargs, value, stack in data["nodes"]:
        if op == "call_function" and target not in targets:
            targets[target] = _target(target)
        node = graph.create_node(
            op,
            targets[target] if op == "call_function" else target,
            tuple(_read(each, nodes) for each in args),
            {key: _read(each, nodes) for key, each in kwargs.items()},
            name=name,
        )
        if node.name != name:
            raise NotReadableError(f"the name {name} is taken")
        if op != "output":
            node.meta["val"] = _read_value(value, mode)
        if stacks[stack]:
            node.meta["nn_module_stack"] = stacks[stack]
        nodes.append(node)
    inputs = [
        InputSpec(InputKind[kind], _read_argument(argument), target, persistent)
        for kind, argument, target, persistent in data["inputs"]
    ]
    outputs = [
        OutputSpec(OutputKind[kind], _read_argument(argument), target) for kind, argument, target, _ in data["outputs"]
    ]
    state, constants = _placed(inputs, {node.name: node for node in nodes}, tensors)
    return ExportedProgram(
        root={},
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints={},
        module_call_graph=flat_call(inputs, outputs),
        constants=constants,
        verifiers=[load_verifier(data["dialect"])],
    )


def _placed(
    inputs: list[InputSpec], nodes: Mapping[str, Node], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and the constants of a program: the tensors that it takes, which must fit its graph."""
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for spec in inputs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        name, fake = str(spec.target), nodes[spec.arg.name].meta["val"]
        tensor = tensors.get(name)
        if tensor is None or (tensor.shape, tensor.dtype, tensor.device) != (fake.shape, fake.dtype, fake.device):
            raise NotReadableError(f"the tensor {name} is missing or has another form")
        in_state = spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent)
        (state if in_state else constants)[name] = tensor
    return state, constants


def _target(name: str) -> Callable[..., Any]:
    if name == "getitem":
        return operator.getitem
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise NotReadableError(f"{name} is not an operator")
    return found


def _read(value: Any, nodes: list[Node]) -> Any:
    if not isinstance(value, list):
        return value
    tag, *parts = value
    if tag == "node":
        return nodes[parts[0]]
    if tag == "device":
        return torch.device(parts[0])
    if tag in _NAMED:
        kind, owner = _NAMED[tag]
        found = getattr(owner, parts[0])
        if not isinstance(found, kind):
            raise NotReadableError(f"{parts[0]} is not a {tag}")
        return found
    read = [_read(each, nodes) for each in parts]
    return slice(*read) if tag == "slice" else _SEQUENCES[tag](read)


def _read_value(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, list):
        return value
    if value[0] == "tensor":
        _, shape, strides, dtype, device, is_parameter = value
        on_meta = torch.empty_strided(shape, strides, dtype=_read(["dtype", dtype], []), device="meta")
        fake = FakeTensor(mode, on_meta, torch.device(device))  # several times as fast as a call under `mode`
        return torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    if value[0] in _SEQUENCES:
        return _SEQUENCES[value[0]](_read_value(each, mode) for each in value[1:])
    return _read(value, [])


def _read_argument(argument: Any) -> TensorArgument | ConstantArgument:
    kind, name, *rest = argument
    return TensorArgument(name) if kind == "tensor" else ConstantArgument(name, rest[0])
