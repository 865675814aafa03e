"""A text encoder or a VAE's decoder as an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import Dim

from tgate_compile._backends.closeness import TOLERANCES, coarsest, relative_difference
from tgate_compile._backends.onnx_session import open_session, run_bound, session_options
from tgate_compile._bundle import manifest as m
from tgate_compile._bundle.onnx_file import check_model, save_model
from tgate_compile._bundle.sizes import shape_at, solve
from tgate_compile._bundle.weights_file import WeightsFile
from tgate_compile._errors import BundleError
from tgate_compile.exports.causes import cause_of
from tgate_compile.exports.to_onnx import program_to_onnx

MSG_NOT_CONVERTED = "The {name} cannot be converted to ONNX: {problem}. Nothing has been written."
MSG_TOO_FAR = (
    "The {name} in {provider} is {relative:.1e} from PyTorch's, relative to the largest value, and {tolerance:.0e} is "
    "allowed for {dtype}. Nothing has been written. Please report this."
)


class TextEncoding(torch.nn.Module):
    """What a pipeline takes of a text encoder: `(hidden_states,)` or `(hidden_states, pooled)`."""

    def __init__(self, model: Any, hidden_state: Literal[-1, -2], *, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self._hidden_state = hidden_state
        self._pooled = pooled

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Of numbered tokens, [b, tokens], and a mask of the same shape."""
        penultimate = self._hidden_state == -2
        outputs = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=penultimate)
        hidden_states = outputs.hidden_states[-2] if penultimate else outputs.last_hidden_state
        return (hidden_states, outputs.text_embeds) if self._pooled else (hidden_states,)


class Decoding(torch.nn.Module):
    """An AutoencoderKL's way from latents to images, without slices or tiles."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        """Of latents, [b, channels, h, w]."""
        quantised = latents if self.model.post_quant_conv is None else self.model.post_quant_conv(latents)
        return (self.model.decoder(quantised),)


def write_component(
    module: torch.nn.Module,
    name: str,
    inputs: Sequence[m.TensorSpec],
    outputs: Sequence[m.TensorSpec],
    examples: Sequence[Sequence[torch.Tensor]],
    path: Path,
    weights: WeightsFile,
) -> None:
    """Write `module` to `path`, and its weights to `weights`.

    Args:
        module: returns a tuple.
        name: what the graph is called.
        inputs: of the graph; their shapes say which sizes are free.
        outputs: likewise.
        examples: inputs of the module; the first are those that it is traced with.
        path: of the ONNX file.
        weights: of the file beside it.

    Raises:
        BundleError: it cannot be converted.
    """
    import onnx_ir

    free = tuple({i: Dim.DYNAMIC for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs)
    try:
        with torch.no_grad():
            program = torch.export.export(module, tuple(examples[0]), dynamic_shapes=free)
        graph = program_to_onnx(program, list(program.state_dict))
    except Exception as error:  # torch.export and torch.onnx raise whatever they meet
        raise BundleError(MSG_NOT_CONVERTED.format(name=name, problem=cause_of(error))) from error
    model = graph.model
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = onnx_ir.Shape(spec.shape)
    model.graph.name = name
    save_model(model, path, {key: program.state_dict[key] for key in graph.weights}, weights)


def component_parity(
    module: torch.nn.Module,
    name: str,
    inputs: Sequence[m.TensorSpec],
    outputs: Sequence[m.TensorSpec],
    examples: Sequence[Sequence[torch.Tensor]],
    path: Path,
) -> m.Parity:
    """How far the file at `path`, whose weights are complete, is from `module` for all of the `examples`.

    Raises:
        BundleError: by more than rounding, or ONNX refuses the file.
    """
    check_model(name, path)
    session = open_session(path, session_options({}), ["CPUExecutionProvider"])
    provider = str(session.get_providers()[0])
    dtype = coarsest({getattr(torch, spec.dtype) for spec in outputs})
    tolerance = TOLERANCES[dtype]
    measured = []
    for example in examples:
        sizes = solve([spec.shape for spec in inputs], [tensor.shape for tensor in example])
        assert sizes is not None
        with torch.no_grad():
            expected = module(*example)
        results = run_bound(
            session,
            {spec.name: tensor.cpu() for spec, tensor in zip(inputs, example, strict=True)},
            [(spec.name, shape_at(spec.shape, sizes), getattr(torch, spec.dtype)) for spec in outputs],
            torch.device("cpu"),
        )
        relative = max(relative_difference(a, b.cpu()) for a, b in zip(results, expected, strict=True))
        if not relative <= tolerance:  # NaN is not
            raise BundleError(
                MSG_TOO_FAR.format(name=name, provider=provider, relative=relative, tolerance=tolerance, dtype=dtype)
            )
        measured.append(m.Deviation(sizes=sizes, relative=relative))
    relative = max(deviation.relative for deviation in measured)
    return m.Parity(relative=relative, tolerance=tolerance, provider=provider, measured=measured)
