"""Compile graphs live with TensorRT, through Torch-TensorRT."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram

from tgate_compile._errors import BackendError, cause_of, check_names
from tgate_compile._runtimes import check_backend_installed
from tgate_compile.engine.backends import Runner
from tgate_compile.engine.samples import MadeOfWeights
from tgate_compile.engine.trust import coarsest
from tgate_compile.passes.graphs import Variant, copy_graph, flat_program

logger = logging.getLogger(__name__)

#: The default options: float32 is computed in float32, as in the other backends, and a mask is applied as it is. By
#: default Torch-TensorRT takes any mask of an attention with as many queries as keys for a causal one.
OPTIONS: Mapping[str, object] = {"disable_tf32": True, "attn_bias_is_causal": False}
#: The parameters of `compile` that the backend sets itself.
_GIVEN = frozenset({"exported_program", "inputs", "arg_inputs", "kwarg_inputs", "device", "kwargs"})
#: The options that name one or several dtypes to compute in.
_PRECISIONS = ("enabled_precisions", "autocast_low_precision_type")
#: The dtypes that round more than float32, by name in torch and Torch-TensorRT.
_LOWERED: Mapping[str, torch.dtype] = {
    **dict.fromkeys(("float16", "half", "f16", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float8_e4m3fn", "f8", "fp8"), torch.float8_e4m3fn),
}


class TensorRTBackend:
    """A backend that compiles graphs for the shapes of their inputs, again whenever the weights change.

    The engines contain the weights. Operators that TensorRT does not support run in PyTorch.
    """

    name: ClassVar[str] = "tensorrt"
    packs_weights: ClassVar[bool] = True
    is_reference: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = options

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        check_backend_installed("tensorrt")
        import torch_tensorrt

        known = [name for name in inspect.signature(torch_tensorrt.dynamo.compile).parameters if name not in _GIVEN]
        check_names(options, known, 'backend="tensorrt"', source="The signature of torch_tensorrt.dynamo.compile")

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        """Return the coarsest dtype that the options permit; TF32 rounds like float16."""
        names = {str(item).rpartition(".")[2] for name in _PRECISIONS for item in _items(self._options.get(name))}
        lowered = {_LOWERED[name] for name in names if name in _LOWERED}
        if not {**OPTIONS, **self._options}["disable_tf32"]:
            lowered.add(torch.float16)
        return coarsest(lowered) if lowered else None

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        device = inputs[0].device
        if device.type != "cuda":
            raise BackendError(
                f'The backend "tensorrt" needs an NVIDIA GPU, but the pipeline is on "{device}". Call pipe.to("cuda").'
            )
        return _Compiled(variant, [tensor.contiguous() for tensor in inputs], {**OPTIONS, **self._options})


class _Compiled:
    """A runner that is compiled when it first runs, and again when the weights have changed."""

    def __init__(self, variant: Variant, examples: Sequence[torch.Tensor], options: Mapping[str, object]) -> None:
        self._variant = variant
        self._examples = examples
        self._options = options
        self._module = MadeOfWeights(self._compile)

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs: Sequence[torch.Tensor] = self._module.of(weights)(*(tensor.contiguous() for tensor in inputs))
        return outputs

    def release(self) -> None:
        """Release the engine and the weights."""
        self._module.release()

    def _compile(self, weights: Sequence[torch.Tensor]) -> Any:
        import torch_tensorrt

        began = time.perf_counter()
        try:
            with torch.no_grad():
                compiled = torch_tensorrt.dynamo.compile(
                    _program(self._variant, weights),
                    arg_inputs=list(self._examples),
                    device=self._examples[0].device,
                    **self._options,
                )
        except Exception as error:  # TensorRT and the converters raise errors of any class
            raise BackendError(
                f"Torch-TensorRT could not compile the {self._variant.phase.name} graph ({cause_of(error)}). "
                'optimize(pipe, backend="inductor") or backend="eager" runs the same graph.'
            ) from error
        logger.info("compiled the %s graph in %.1f s", self._variant.phase.name, time.perf_counter() - began)
        return compiled


def _items(option: object) -> tuple[object, ...]:
    return tuple(option) if isinstance(option, (set, frozenset, list, tuple)) else (option,)


def _program(variant: Variant, weights: Sequence[torch.Tensor]) -> ExportedProgram:
    """Return a copy of the program with the current weights: Torch-TensorRT changes its input."""
    program = flat_program(variant.program, copy_graph(variant.program.graph_module))
    for name, tensor in zip(variant.weights, weights, strict=True):
        holder = program.state_dict if name in program.state_dict else program.constants
        holder[name] = tensor
    return program
