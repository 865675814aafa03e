"""What a bundle has beyond the denoiser: text encoders, tokenizers, the VAE's decoder, and how they go together."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._bundle import manifest as m
from tgate_compile._bundle.component_graph import Decoding, TextEncoding, component_parity, write_component
from tgate_compile._bundle.component_recipes import Recipe
from tgate_compile._bundle.component_tokenizer import TEXTS, tokenized, write_tokenizer
from tgate_compile._bundle.formats import Progress
from tgate_compile._bundle.weights_digest import dtype_name
from tgate_compile._bundle.weights_file import WeightsFile

#: Latents, h and w, that a decoder is traced and checked with: small, and no square.
LATENTS = (8, 12)


@dataclass(frozen=True)
class Request:
    """What is asked for with `components="all"`.

    Attributes:
        pipeline: the pipeline's class.
        recipe: that of the pipeline.
        call: the arguments of the pipeline's call that the bundle is made with.
    """

    pipeline: type[DiffusionPipeline]
    recipe: Recipe
    call: Mapping[str, Any]


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
    request: Request,
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


def _length(pipe: Any, name: str, request: Request) -> int:
    if request.recipe.length is None:
        return int(getattr(pipe, name).model_max_length)
    return int(_argument(request, request.recipe.length))


def _argument(request: Request, name: str) -> Any:
    """What `name` is in the call: as given, or the pipeline's default."""
    default = inspect.signature(request.pipeline.__call__).parameters[name].default
    return request.call.get(name, default)
