"""Bundles with all components: their manifests, and the bundles and exports that are refused."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import onnx
import pytest
import tokenizers
import torch
from diffusers import AutoencoderTiny

import tgate_compile
from tests.exported import GATE, exported
from tests.programs import LENGTH, PIPELINES, plain, program
from tests.tiny_pipelines import SIZE, latent_consistency, sdxl
from tgate_compile import BundleError, ConfigurationError, UnsupportedModelError
from tgate_compile.bundle.component_recipes import check_arguments, recipe_for
from tgate_compile.bundle.read import read_bundle
from tgate_compile.exports.onnx.components import write_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the bundle, to be damaged."""
    return Path(shutil.copytree(program(dynamic=True), tmp_path / "bundle"))


def change_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_file(folder: Path, name: str, content: bytes) -> None:
    """Change a file and put its new hash into the manifest."""
    (folder / name).write_bytes(content)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda manifest: manifest["files"].update({name: record}))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(folder)
    for part in parts:
        assert part in str(caught.value)


# Manifests.


def test_stable_diffusion() -> None:
    manifest = read_bundle(program(dynamic=True)).manifest
    components = manifest.components
    assert components is not None
    (encoder,) = components.text_encoders
    assert (encoder.component, encoder.class_name, encoder.hidden_state) == ("text_encoder", "CLIPTextModel", -1)
    assert [(spec.name, spec.dtype, spec.shape) for spec in encoder.inputs] == [("input_ids", "int64", ["b", 16])]
    assert [(spec.name, spec.dtype, spec.shape) for spec in encoder.outputs] == [
        ("hidden_states", "float32", ["b", 16, 32])
    ]
    assert encoder.tokenizer.length == 16
    decoder = components.vae_decoder
    assert [(spec.name, spec.shape) for spec in decoder.inputs] == [("latents", ["b", 4, "h", "w"])]
    assert [(spec.name, spec.shape) for spec in decoder.outputs] == [("image", ["b", 3, "2*h", "2*w"])]
    assert (decoder.scale_factor, decoder.scaling_factor, decoder.image_range) == (2, 0.18215, (-1.0, 1.0))
    for parity in (encoder.parity, decoder.parity):
        assert len(parity.measured) == 2
        assert 0 < parity.relative < 1e-5
    assert components.arguments == {
        "sample": "latents",
        "timestep": "timestep",
        "encoder_hidden_states": "hidden_states",
    }
    assert (components.negative, components.num_inference_steps, components.guidance_scale) == ("empty", 6, 7.5)
    assert (components.height, components.width) == (SIZE, SIZE)
    assert set(manifest.files) >= {
        "components/text_encoder.onnx",
        "components/tokenizer.json",
        "components/vae_decoder.onnx",
        "components/weights.bin",
    }


@pytest.mark.heavy
def test_sdxl() -> None:
    components = read_bundle(program("sdxl")).manifest.components
    assert components is not None
    assert [encoder.hidden_state for encoder in components.text_encoders] == [-2, -2]
    outputs = [[spec.name for spec in encoder.outputs] for encoder in components.text_encoders]
    assert outputs == [["hidden_states"], ["hidden_states", "pooled"]]
    assert components.arguments["added_cond_kwargs.text_embeds"] == "pooled"
    assert components.arguments["added_cond_kwargs.time_ids"] == "sizes"
    assert (components.negative, components.guidance_scale) == ("zeros", 5.0)


@pytest.mark.heavy
def test_pixart() -> None:
    components = read_bundle(program("pixart")).manifest.components
    assert components is not None
    (encoder,) = components.text_encoders
    assert [spec.name for spec in encoder.inputs] == ["input_ids", "attention_mask"]
    assert (encoder.tokenizer.length, encoder.tokenizer.lower_case) == (LENGTH, True)
    assert components.arguments["added_cond_kwargs.aspect_ratio"] == "aspect_ratio"


@pytest.mark.heavy
def test_the_denoiser_alone_has_none() -> None:
    assert read_bundle(exported()).manifest.components is None
    assert not (exported() / "components").exists()


@pytest.mark.parametrize("name", list(PIPELINES))
def test_the_same_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = PIPELINES[name]().tokenizer
    write_tokenizer(tokenizer, name, 10, tmp_path / "tokenizer.json")
    text = "a red cat, and\ta blue dog "
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text)
    expected = tokenizer(text, padding="max_length", max_length=10, truncation=True)
    assert (written.ids, written.attention_mask) == (expected.input_ids, expected.attention_mask)


def test_a_tokenizer_that_does_more(tmp_path: Path) -> None:
    class Shouting(type(plain().tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: list[str], **options: Any) -> Any:
            return super().__call__([f"x{text}" for text in texts], **options)

    tokenizer = copy.copy(plain().tokenizer)
    tokenizer.__class__ = Shouting
    with pytest.raises(BundleError, match="tokenizes '' differently"):
        write_tokenizer(tokenizer, "tokenizer", 10, tmp_path / "tokenizer.json")


# Bundles that are refused.


@pytest.mark.parametrize("name", ["text_encoder.onnx", "vae_decoder.onnx"])
@pytest.mark.parametrize("location", ["/etc/hostname", "../graphs/weights.bin"])
def test_weights_from_elsewhere(folder: Path, name: str, location: str) -> None:
    model = onnx.load_model(folder / "components" / name, load_external_data=False)
    next(tensor for tensor in model.graph.initializer if tensor.external_data).external_data[0].value = location
    change_file(folder, f"components/{name}", model.SerializeToString())
    refused(folder, name, repr(location), "weights.bin")


def test_other_graphs(folder: Path) -> None:
    shutil.copy(folder / "components/text_encoder.onnx", folder / "components/vae_decoder.onnx")
    change_file(folder, "components/vae_decoder.onnx", (folder / "components/text_encoder.onnx").read_bytes())
    refused(folder, "vae_decoder.onnx", "input_ids", "latents")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: m["files"].pop("components/tokenizer.json"), ("components/tokenizer.json", "does not list")),
        (lambda m: m["components"].update(weights="graphs/weights.bin"), ("components", "must be in the folder")),
        (lambda m: m["components"]["vae_decoder"].update(file="graphs/full.onnx"), ("components", "must be in the")),
        (lambda m: m["components"]["arguments"].pop("sample"), ("components.arguments", "not those of the denoiser")),
        (lambda m: m["components"]["arguments"].update(sample="noise"), ("components.arguments.sample",)),
        (lambda m: m["components"]["arguments"].update(sample="pooled"), ("nothing provides ['pooled']",)),
        (lambda m: m["components"]["vae_decoder"].update(scaling_factor=0.0), ("scaling_factor",)),
        (lambda m: m["components"].update(text_encoders=[]), ("text_encoders",)),
        (lambda m: m["components"]["text_encoders"][0]["outputs"][0].update(name="x"), ("text_encoder", "['x']")),
    ],
)
def test_manifests_that_are_not_valid(folder: Path, change: Callable[[Any], object], parts: tuple[str, ...]) -> None:
    change_manifest(folder, change)
    refused(folder, "manifest", *parts)


# Exports that are refused.


def not_exported(pipe: Any, tmp_path: Path, *parts: str, error: Any = UnsupportedModelError, **options: Any) -> None:
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(error) as caught:
        tgate_compile.export(pipe, tmp_path / "bundle", **{"components": "all", **options})
    for part in parts:
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_pipelines(tmp_path: Path) -> None:
    known = (
        "StableDiffusionPipeline, StableDiffusionXLPipeline, PixArtAlphaPipeline",
        "LatentConsistencyModelPipeline",
    )
    not_exported(latent_consistency(), tmp_path, *known)
    not_exported(plain(), tmp_path, "'some'", "'denoiser' or 'all'", error=ConfigurationError, components="some")


def test_other_components(tmp_path: Path) -> None:
    pipe = plain()
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    not_exported(pipe, tmp_path, "vae", "AutoencoderKL", "AutoencoderTiny")
    without = sdxl()
    without.register_modules(text_encoder_2=None)
    not_exported(without, tmp_path, "text_encoder_2", "NoneType")


def test_sdxl_with_one_text_encoder() -> None:
    pipe = sdxl()
    pipe.register_modules(text_encoder=None, tokenizer=None)
    assert recipe_for(pipe, {}).encoders == {"text_encoder_2": "tokenizer_2"}
    pipe.register_modules(tokenizer=pipe.tokenizer_2)
    with pytest.raises(UnsupportedModelError, match="needs text_encoder to be a text encoder"):
        recipe_for(pipe, {})


def test_sd3_with_t5_or_zeros_instead_of_it() -> None:
    pipe = PIPELINES["sd3"]()
    assert recipe_for(pipe, {"max_sequence_length": 0}).pooled == ("text_encoder", "text_encoder_2")
    with pytest.raises(UnsupportedModelError, match=r"without text_encoder_3.*max_sequence_length=0"):
        recipe_for(pipe, {})  # 256 zeros
    pipe.register_modules(text_encoder_3=PIPELINES["pixart"]().text_encoder)
    with pytest.raises(UnsupportedModelError, match=r"without text_encoder_3.*max_sequence_length=0"):
        recipe_for(pipe, {"max_sequence_length": 0})


def test_calls_that_bundles_cannot_make(tmp_path: Path) -> None:
    not_exported(plain(), tmp_path, "clip_skip=1", call={"prompt": "", "clip_skip": 1})


def test_arguments_that_no_prompt_makes() -> None:
    pipe = plain()
    recipe = recipe_for(pipe, {})
    check_arguments(pipe, recipe, ["sample", "timestep", "encoder_hidden_states"])
    with pytest.raises(UnsupportedModelError, match=r"down_block_additional_residuals\.0, mid_block.*cannot compute"):
        check_arguments(pipe, recipe, ["sample", "down_block_additional_residuals.0", "mid_block_additional_residual"])


def test_a_half_precision_vae_that_asks_for_float32() -> None:
    """SDXL's VAE does."""
    from tgate_compile.exports.onnx.components import _decoder_graph

    pipe = sdxl().to(torch.float16)
    assert isinstance(pipe, diffusers.StableDiffusionXLPipeline)
    recipe = recipe_for(pipe, {})
    assert _decoder_graph(pipe, recipe).inputs[0].dtype == "float32"
    assert pipe.vae.dtype is torch.float16
    pipe.vae.register_to_config(force_upcast=False)
    assert _decoder_graph(pipe, recipe).inputs[0].dtype == "float16"
