"""Write a pipeline's text encoders, tokenizers and VAE decoder as ONNX files: a `ComponentsFormat`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch.export import Dim

from tgate_compile._errors import BundleError, cause_of
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.component_recipes import ComponentsRequest, Recipe
from tgate_compile.bundle.formats import Progress
from tgate_compile.bundle.read_manifest import shape_at, solve
from tgate_compile.bundle.weights import WeightsFile, dtype_name
from tgate_compile.engine.tracing import without_stack_traces
from tgate_compile.engine.trust import TOLERANCES, coarsest, relative_difference
from tgate_compile.exports.onnx.convert import program_to_onnx
from tgate_compile.exports.onnx.open import check_onnx_file
from tgate_compile.exports.onnx.quantize import check_model, save_model
from tgate_compile.exports.onnx.session import open_session, run_bound, session_options
from tgate_compile.passes.graphs import functional


class TextEncoding(torch.nn.Module):
    """A text encoder that returns what a pipeline uses: `(hidden_states,)` or `(hidden_states, pooled)`."""

    def __init__(self, model: Any, hidden_state: Literal[-1, -2], *, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self._hidden_state = hidden_state
        self._pooled = pooled

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Encode token ids, [b, tokens], with an optional mask of the same shape."""
        penultimate = self._hidden_state == -2
        outputs = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=penultimate)
        hidden_states = outputs.hidden_states[-2] if penultimate else outputs.last_hidden_state
        return (hidden_states, outputs.text_embeds) if self._pooled else (hidden_states,)


class Decoding(torch.nn.Module):
    """The decoder of an AutoencoderKL, without slicing or tiling."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        """Decode latents, [b, channels, h, w], to images."""
        quantized = latents if self.model.post_quant_conv is None else self.model.post_quant_conv(latents)
        return (self.model.decoder(quantized),)


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
        module: the module, which returns a tuple.
        name: the name of the graph.
        inputs: the inputs of the graph; sizes that are names in their shapes are free.
        outputs: the outputs of the graph.
        examples: example inputs of the module; the first ones are used for tracing.
        path: the path of the ONNX file.
        weights: the weights file in the same folder.

    Raises:
        BundleError: the module cannot be converted.
    """
    import onnx_ir

    free = tuple({i: Dim.DYNAMIC for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs)
    try:
        with without_stack_traces(), torch.no_grad():
            program = functional(torch.export.export(module, tuple(examples[0]), dynamic_shapes=free))
        graph = program_to_onnx(program, list(program.state_dict))
    except Exception as error:  # torch.export and torch.onnx raise errors of any class
        raise BundleError(
            f"The {name} cannot be converted to ONNX: {cause_of(error)}. Nothing has been written."
        ) from error
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
    """Compare the file at `path`, whose weights file is complete, with `module` on all of the `examples`.

    Raises:
        BundleError: the outputs differ by more than rounding, or ONNX rejects the file.
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
        if not relative <= tolerance:  # also true for NaN
            raise BundleError(
                f"The {name} in {provider} differs from PyTorch by {relative:.1e}, relative to the largest value; at "
                f"most {tolerance:.0e} is allowed for {dtype}. Nothing has been written. Please report this."
            )
        measured.append(m.Deviation(sizes=sizes, relative=relative))
    relative = max(deviation.relative for deviation in measured)
    return m.Parity(relative=relative, tolerance=tolerance, provider=provider, measured=measured)


def check_component(
    path: Path, inputs: Sequence[m.TensorSpec], outputs: Sequence[m.TensorSpec], weights_size: int
) -> None:
    """Check the ONNX file at `path`, whose weights are in a file of `weights_size` bytes, without trusting it.

    Raises:
        BundleError: as `check_onnx_file`.
    """
    check_onnx_file(path, inputs, outputs, weights_size)


#: The texts on which tokenizers and text encoders are compared when a bundle is written.
TEXTS = (
    "",
    "a red circle on a blue background",
    "  An Ünusual (prompt:1.2), with 日本語, <b>tags</b>, 3.14 & emoji 🙂; " * 20,
)


def write_tokenizer(tokenizer: Any, name: str, length: int, path: Path) -> None:
    """Write the fast `tokenizer` of transformers to `path`, for texts of `length` tokens.

    Raises:
        BundleError: the written file tokenizes some text differently from `tokenizer`.
    """
    from tokenizers import Tokenizer

    written = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    written.enable_truncation(length, direction=tokenizer.truncation_side)
    written.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, length=length
    )
    written.save(str(path))
    for text in TEXTS:
        expected = tokenized(tokenizer, [text], length, "np")
        encoded = Tokenizer.from_file(str(path)).encode(text)
        if [encoded.ids, encoded.attention_mask] != [expected[key][0].tolist() for key in expected]:
            raise BundleError(
                f"The tokenizer {name} tokenizes {text[:60]!r} differently in the tokenizers library and in "
                "transformers. Nothing has been written. Please report this."
            )


def tokenized(tokenizer: Any, texts: list[str], length: int, tensors: str) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask`, both [texts, length], tokenized as the pipelines do it."""
    made = tokenizer(
        texts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        return_tensors=tensors,
    )
    return {key: made[key] for key in ("input_ids", "attention_mask")}


#: Height and width of the latents with which a decoder is traced and checked: small, and not square.
LATENTS = (8, 12)


@dataclass(frozen=True)
class _Graph:
    """A graph to be written; the attributes are arguments of `write_component`."""

    file: str
    module: torch.nn.Module
    name: str
    inputs: Sequence[m.TensorSpec]
    outputs: Sequence[m.TensorSpec]
    examples: Sequence[Sequence[torch.Tensor]]

    def write(self, folder: Path, weights: WeightsFile) -> None:
        write_component(self.module, self.name, self.inputs, self.outputs, self.examples, folder / self.file, weights)

    def parity(self, folder: Path) -> m.Parity:
        return component_parity(self.module, self.name, self.inputs, self.outputs, self.examples, folder / self.file)


def write_components(
    pipe: DiffusionPipeline,
    request: ComponentsRequest,
    arguments: Sequence[str],
    latents: torch.Size,
    steps: int,
    folder: Path,
    progress: Progress,
) -> m.Components:
    """Write the text encoders, the tokenizers and the VAE decoder of `pipe` to the bundle at `folder`.

    Args:
        pipe: a pipeline of the class that the recipe is for.
        request: the recipe and the arguments of the call.
        arguments: the names of the tensors that the denoiser is called with; the recipe has a source for each.
        latents: the shape of the latents in the example.
        steps: the number of steps in the example.
        folder: the folder of the bundle.
        progress: called with a line of text at the start of each stage.

    Raises:
        BundleError: a component cannot be converted, or differs from PyTorch.
    """
    recipe = request.recipe
    (folder / m.COMPONENTS_FOLDER).mkdir()
    if getattr(pipe, "safety_checker", None) is not None or getattr(pipe, "watermark", None) is not None:
        progress("Leaving out the safety checker and the watermark, which bundles do not support")
    tokenizers = {
        encoder: _tokenizer(pipe, name, _length(pipe, name, request), recipe, folder)
        for encoder, name in recipe.encoders.items()
    }
    graphs = {encoder: _text_graph(pipe, encoder, tokenizers[encoder], recipe) for encoder in recipe.encoders}
    decoder = _decoder_graph(pipe, recipe)
    with (folder / m.COMPONENTS_WEIGHTS_FILE).open("xb") as file:
        _write([*graphs.values(), decoder], folder, file, progress)
    parities = {}
    for graph in (*graphs.values(), decoder):
        progress(f"Checking the {graph.name} against PyTorch")
        parities[graph.name] = graph.parity(folder)
    return m.Components(
        weights=m.COMPONENTS_WEIGHTS_FILE,
        text_encoders=[
            m.TextEncoder(
                component=name,
                class_name=type(getattr(pipe, name)).__name__,
                file=graph.file,
                inputs=list(graph.inputs),
                outputs=list(graph.outputs),
                hidden_state=recipe.hidden_state,
                tokenizer=tokenizers[name],
                parity=parities[name],
            )
            for name, graph in graphs.items()
        ],
        vae_decoder=_vae_decoder(pipe, recipe, decoder, parities[decoder.name]),
        arguments={name: recipe.sources[name] for name in arguments},
        negative="zeros" if pipe.config.get("force_zeros_for_empty_prompt") else "empty",
        num_inference_steps=steps,
        guidance_scale=float(_argument(request, "guidance_scale")),
        height=latents[-2] * pipe.vae_scale_factor,
        width=latents[-1] * pipe.vae_scale_factor,
    )


def _write(graphs: Sequence[_Graph], folder: Path, file: IO[bytes], progress: Progress) -> None:
    weights = WeightsFile(file)
    for graph in graphs:
        progress(f"Converting the {graph.name}")
        graph.write(folder, weights)


def _tokenizer(pipe: Any, name: str, length: int, recipe: Recipe, folder: Path) -> m.Tokenizer:
    tokenizer = getattr(pipe, name)
    file = f"{m.COMPONENTS_FOLDER}/{name}.json"
    write_tokenizer(tokenizer, name, length, folder / file)
    return m.Tokenizer(file=file, length=length, pad_id=tokenizer.pad_token_id, lower_case=recipe.lower_case)


def _text_graph(pipe: Any, name: str, tokenizer: m.Tokenizer, recipe: Recipe) -> _Graph:
    encoder = getattr(pipe, name)
    tokens = tokenized(getattr(pipe, recipe.encoders[name]), list(TEXTS), tokenizer.length, "pt")
    names = ("input_ids", "attention_mask") if recipe.masked else ("input_ids",)
    example = [tokens[key].to(encoder.device) for key in names]
    module = TextEncoding(encoder, recipe.hidden_state, pooled=name in recipe.pooled)
    with torch.no_grad():
        outputs = module(*example)
    return _Graph(
        file=f"{m.COMPONENTS_FOLDER}/{name}.onnx",
        module=module,
        name=name,
        inputs=[m.TensorSpec(name=key, dtype="int64", shape=["b", tokenizer.length]) for key in names],
        outputs=[
            m.TensorSpec(name=key, dtype=dtype_name(value.dtype), shape=["b", *value.shape[1:]])  # type: ignore[arg-type]
            for key, value in zip(("hidden_states", "pooled"), outputs, strict=False)
        ],
        examples=[example, [tensor[1:2] for tensor in example]],
    )


def _decoder_graph(pipe: Any, recipe: Recipe) -> _Graph:
    vae = pipe.vae
    if recipe.upcasts_vae and vae.dtype is torch.float16 and vae.config.force_upcast:
        vae = copy.deepcopy(vae).float()
    channels, scale, dtype = vae.config.latent_channels, pipe.vae_scale_factor, dtype_name(vae.dtype)
    noise = torch.randn((2, channels, *LATENTS), generator=torch.Generator().manual_seed(0)).to(vae.device, vae.dtype)
    image = ["b", vae.config.out_channels, f"{scale}*h", f"{scale}*w"]
    return _Graph(
        file=f"{m.COMPONENTS_FOLDER}/vae_decoder.onnx",
        module=Decoding(vae),
        name="vae_decoder",
        inputs=[m.TensorSpec(name="latents", dtype=dtype, shape=["b", channels, "h", "w"])],  # type: ignore[arg-type]
        outputs=[m.TensorSpec(name="image", dtype=dtype, shape=image)],  # type: ignore[arg-type]
        examples=[[noise], [noise[:1].mT]],
    )


def _vae_decoder(pipe: Any, recipe: Recipe, graph: _Graph, parity: m.Parity) -> m.VaeDecoder:
    config = pipe.vae.config
    return m.VaeDecoder(
        class_name=type(pipe.vae).__name__,
        file=graph.file,
        inputs=list(graph.inputs),
        outputs=list(graph.outputs),
        latent_channels=config.latent_channels,
        scale_factor=pipe.vae_scale_factor,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor if recipe.shifts_latents else 0.0,
        image_range=(-1.0, 1.0),
        parity=parity,
    )


def _length(pipe: Any, name: str, request: ComponentsRequest) -> int:
    if request.recipe.length is None:
        return int(getattr(pipe, name).model_max_length)
    return int(_argument(request, request.recipe.length))


def _argument(request: ComponentsRequest, name: str) -> Any:
    """Return the value of the argument `name` in the call, or else the pipeline's default."""
    default = inspect.signature(request.pipeline.__call__).parameters[name].default
    return request.call.get(name, default)
