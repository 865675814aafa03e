"""Graphs for a GPU, captured without one: `torch.export` needs no values, so fake tensors on `cuda:0` are enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests import tiny_pipelines
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.exports.inductor.live import _example_inputs
from tgate_compile.methods.schedule import Schedule
from tgate_compile.passes.graphs import Captured, Variant
from tgate_compile.passes.specialize import specialize

STEPS, GATE = 4, 2

#: Operators that wait for the GPU, since their result is a number or has a size that depends on values.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal")


class WithoutGuards(TorchFunctionMode):
    """Replaces two methods which, in a build of PyTorch without CUDA, refuse fake tensors on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].device.type == "cuda":
            return indexed(*args)
        if func is torch.Tensor.contiguous and args[0].device.type == "cuda":
            return torch.ops.aten.contiguous.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def indexed(tensor: torch.Tensor, items: Any) -> torch.Tensor:
    items = items if isinstance(items, tuple) else (items,)
    dim = 0
    for position, item in enumerate(items):
        if item is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif item is Ellipsis:
            dim = tensor.ndim - sum(after is not None for after in items[position + 1 :])
        elif isinstance(item, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, item.start, item.stop, item.step or 1)
            dim += 1
        else:
            tensor = tensor.select(dim, item)
    return tensor


@pytest.fixture(scope="module", params=[tiny_pipelines.stable_diffusion, tiny_pipelines.sdxl], ids=["sd", "sdxl"])
def graphs(request: pytest.FixtureRequest) -> tuple[Captured, list[Variant]]:
    """Return the capture of a UNet on a GPU in bfloat16 and channels-last format, and its variants."""
    build: Callable[[], Any] = request.param
    pipe = build()
    unet, config = pipe.unet, pipe.unet.config
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda:0"}
    schedule = Schedule(GATE)
    with WithoutGuards():
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in unet.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        fake = torch.empty(parameter.shape, **like)
                        if fake.ndim == 4:
                            fake = fake.to(memory_format=torch.channels_last)
                        module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
            inputs = {
                "sample": torch.empty(2, 4, 8, 8, **like),
                "timestep": torch.empty((), dtype=torch.int64, device="cuda:0"),
                "encoder_hidden_states": torch.empty(2, 16, config.cross_attention_dim, **like),
            }
            if config.addition_embed_type is not None:
                pooled = torch.empty(2, pipe.text_encoder_2.config.projection_dim, **like)
                inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(2, 6, **like)}
            captured = capture(unet, unet.forward, Call.of((), {**inputs, "return_dict": False}))
        phases = dict.fromkeys(schedule.graph_phase(phase) for phase in schedule.plan(STEPS, guided=True))
        return captured, [specialize(captured, phase) for phase in phases]


def values_of(variant: Variant) -> dict[str, torch.Tensor]:
    values = {node.name: node.meta.get("val") for node in variant.program.graph.nodes}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def test_nothing_is_on_the_cpu(graphs: tuple[Captured, list[Variant]]) -> None:
    captured, variants = graphs
    assert not [name for name, constant in captured.program.constants.items() if torch.is_tensor(constant)]
    assert [len(variant.reused) > 0 for variant in variants] == [False, True]
    for variant in variants:
        assert {str(value.device) for value in values_of(variant).values()} == {"cuda:0"}


def test_nothing_waits_for_the_gpu(graphs: tuple[Captured, list[Variant]]) -> None:
    for variant in graphs[1]:
        targets = [node.target for node in variant.program.graph.nodes if node.op == "call_function"]
        names = {target._schema.name.partition("::")[2] for target in targets if hasattr(target, "_schema")}
        assert not names & set(WAITING)
        assert "convolution" in str(names) or "conv2d" in names


def test_weights_stay_channels_last(graphs: tuple[Captured, list[Variant]]) -> None:
    for variant in graphs[1]:
        placeholders = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"]
        kernels = [value for value in placeholders[: len(variant.weights)] if value.ndim == 4 and value.shape[-1] > 1]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        assert not any(kernel.is_contiguous() for kernel in kernels)


def test_inductor_compiles_for_the_layout_of_the_weights(graphs: tuple[Captured, list[Variant]]) -> None:
    """Code for other strides would copy the weights in each step; inputs are made contiguous before each step."""
    for variant in graphs[1]:
        examples = _example_inputs(variant)
        placeholders = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"]
        weights = len(variant.weights)
        assert [each.stride() for each in examples[:weights]] == [each.stride() for each in placeholders[:weights]]
        assert all(each.is_contiguous() for each in examples[weights:])


def test_caches_are_contiguous(graphs: tuple[Captured, list[Variant]]) -> None:
    """They are copied to the buffers of a CUDA graph, all with one kernel if their strides agree."""
    full, pruned = graphs[1]
    (returned,) = full.program.graph.output_node().args
    emitted = [node.meta["val"] for node in returned[-len(full.emitted) :]]
    placeholders = [node.meta["val"] for node in pruned.program.graph.nodes if node.op == "placeholder"]
    reused = placeholders[-len(pruned.reused) :]
    assert len(emitted) == len(reused) > 0
    assert all(value.shape[0] == 1 for value in emitted)  # the mean of the halves
    assert all(value.is_contiguous() for value in (*emitted, *reused))
