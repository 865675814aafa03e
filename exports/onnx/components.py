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
from tgate_compile.engine.capture import without_stack_traces
from tgate_compile.engine.trust import TOLERANCES, coarsest, relative_difference
from tgate_compile.exports.onnx.convert import program_to_onnx
from tgate_compile.exports.onnx.file import check_model, save_model
from tgate_compile.exports.onnx.session import open_session, run_bound, session_options


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
        with without_stack_traces(), torch.no_grad():
            program = torch.export.export(module, tuple(examples[0]), dynamic_shapes=free)
        graph = program_to_onnx(program, list(program.state_dict))
    except Exception as error:  # torch.export and torch.onnx raise whatever they meet
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
                f"The {name} in {provider} is {relative:.1e} from PyTorch's, relative to the largest value, and "
                f"{tolerance:.0e} is allowed for {dtype}. Nothing has been written. Please report this."
            )
        measured.append(m.Deviation(sizes=sizes, relative=relative))
    relative = max(deviation.relative for deviation in measured)
    return m.Parity(relative=relative, tolerance=tolerance, provider=provider, measured=measured)


#: Tokenized by both libraries when a bundle is written, and what its text encoders are compared on.
TEXTS = (
    "",
    "a red circle on a blue background",
    "  An Ünusual (prompt:1.2), with 日本語, <b>tags</b>, 3.14 & emoji 🙂; " * 20,
)


def write_tokenizer(tokenizer: Any, name: str, length: int, path: Path) -> None:
    """Write the fast `tokenizer` of transformers to `path`, for texts of `length` tokens.

    Raises:
        BundleError: the file makes other tokens of some text than `tokenizer` does.
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
                f"The tokenizer {name} makes other tokens of {text[:60]!r} in the tokenizers library than in "
                "transformers. Nothing has been written. Please report this."
            )


def tokenized(tokenizer: Any, texts: list[str], length: int, tensors: str) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, both [texts, length], as the pipelines ask for them."""
    made = tokenizer(
        texts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        return_tensors=tensors,
    )
    return {key: made[key] for key in ("input_ids", "attention_mask")}


#: Latents, h and w, that a decoder is traced and checked with: small, and no square.
LATENTS = (8, 12)


@dataclass(frozen=True)
class _Graph:
    """A graph to be written: `arguments` are those of `write_component` but its last two."""

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
    """Write them to the bundle at `folder`.

    Args:
        pipe: a pipeline that the recipe is for.
        request: what is asked for.
        arguments: the tensors that the denoiser is called with; the recipe has them all.
        latents: their shape in the example.
        steps: of the example.
        folder: of the bundle.
        progress: told what is done.

    Raises:
        BundleError: something cannot be converted, or is not as in PyTorch.
    """
    recipe = request.recipe
    (folder / m.COMPONENTS_FOLDER).mkdir()
    if getattr(pipe, "safety_checker", None) is not None or getattr(pipe, "watermark", None) is not None:
        progress("Leaving out the safety checker and the watermark, which bundles do not have")
    tokenizers = {
        encoder: _tokenizer(pipe, name, _length(pipe, name, request), recipe, folder)
        for encoder, name in recipe.encoders.items()
    }
    last = list(recipe.encoders)[-1]
    graphs = {
        encoder: _text_graph(pipe, encoder, tokenizers[encoder], recipe, pooled=recipe.pooled and encoder == last)
        for encoder in recipe.encoders
    }
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
        vae_decoder=_vae_decoder(pipe, decoder, parities[decoder.name]),
        arguments={name: recipe.sources[name] for name in arguments},
        negative="zeros" if recipe.pooled and pipe.config.force_zeros_for_empty_prompt else "empty",
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


def _text_graph(pipe: Any, name: str, tokenizer: m.Tokenizer, recipe: Recipe, *, pooled: bool) -> _Graph:
    encoder = getattr(pipe, name)
    tokens = tokenized(getattr(pipe, recipe.encoders[name]), list(TEXTS), tokenizer.length, "pt")
    names = ("input_ids", "attention_mask") if recipe.masked else ("input_ids",)
    example = [tokens[key].to(encoder.device) for key in names]
    module = TextEncoding(encoder, recipe.hidden_state, pooled=pooled)
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


def _vae_decoder(pipe: Any, graph: _Graph, parity: m.Parity) -> m.VaeDecoder:
    config = pipe.vae.config
    return m.VaeDecoder(
        class_name=type(pipe.vae).__name__,
        file=graph.file,
        inputs=list(graph.inputs),
        outputs=list(graph.outputs),
        latent_channels=config.latent_channels,
        scale_factor=pipe.vae_scale_factor,
        scaling_factor=config.scaling_factor,
        shift_factor=0.0,  # these pipelines do not use the configuration's
        image_range=(-1.0, 1.0),
        parity=parity,
    )


def _length(pipe: Any, name: str, request: ComponentsRequest) -> int:
    if request.recipe.length is None:
        return int(getattr(pipe, name).model_max_length)
    return int(_argument(request, request.recipe.length))


def _argument(request: ComponentsRequest, name: str) -> Any:
    """What `name` is in the call: as given, or the pipeline's default."""
    default = inspect.signature(request.pipeline.__call__).parameters[name].default
    return request.call.get(name, default)
