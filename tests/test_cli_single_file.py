"""`--model` with a checkpoint in a single file, in the original layout of its weights."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests import tiny_pipelines
from tests.single_file import same_weights, save_single_file
from tgate_compile import ConfigurationError
from tgate_compile._cli.app import _MODULES, COMMANDS, app, with_groups
from tgate_compile._cli.loading import load

run = CliRunner().invoke


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipelines.stable_diffusion(layout="small")


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pipeline's folder and its checkpoint, `model.safetensors`, next to an SDXL pipeline's folder."""
    home = tmp_path_factory.mktemp("checkpoints")
    pipe.save_pretrained(home / "sd")
    save_single_file(pipe, home / "model.safetensors")
    tiny_pipelines.sdxl().save_pretrained(home / "sdxl")
    return home


def test_a_checkpoint_with_a_folders_configuration(pipe: Any, folder: Path) -> None:
    loaded = load(str(folder / "model.safetensors"), model_config=str(folder / "sd"))
    assert type(loaded.pipe) is type(pipe)
    assert same_weights(pipe, loaded.pipe)
    assert loaded.family.name == "Stable Diffusion"
    loaded.pipe.scheduler = pipe.scheduler
    assert torch.equal(tiny_pipelines.run(loaded.pipe), tiny_pipelines.run(pipe))


def test_another_unet(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="could not be loaded"):
        load(str(folder / "model.safetensors"), model_config=str(folder / "sd"), unet=str(folder / "nothing"))
    loaded = load(str(folder / "model.safetensors"), model_config=str(folder / "sd"), unet=str(folder / "sd" / "unet"))
    assert type(loaded.pipe.unet).__name__ == "UNet2DConditionModel"


def test_generate(folder: Path, tmp_path: Path) -> None:
    model = ["--model", str(folder / "model.safetensors"), "--model-config", str(folder / "sd")]
    quick = ["--steps", "4", "--gate-step", "2", "--seed", "3", "--prompt", "red cat", "--json", "--backend", "eager"]
    result = run(app, ["generate", *model, *quick, "--out", str(tmp_path / "cat.png")])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["pipeline"], told["strip"]) == ("StableDiffusionPipeline", "FFpp")
    assert (tmp_path / "cat.png").is_file()


def test_every_command_with_a_model_takes_one() -> None:
    modules = {name: importlib.import_module(f"tgate_compile._cli.{_MODULES.get(name, name)}") for name in COMMANDS}
    options = {
        name: inspect.signature(with_groups(getattr(module, name))).parameters for name, module in modules.items()
    }
    # `report --model` selects a row: it captures models of real size, without weights.
    taking = {name for name, own in options.items() if "model" in own and name != "report"}
    assert taking == {
        "analyze",
        "bench",
        "compare",
        "describe",
        "evaluate",
        "export",
        "generate",
        "serve",
        "tune",
        "web",
    }
    for name in taking:
        assert "model_config" in options[name], name
        assert re.search(r"loading\.load\(|loading\.arguments\(|\.load\(model\)", inspect.getsource(modules[name])), (
            name
        )


@pytest.mark.parametrize(
    ("file", "config", "words"),
    [
        ("none.safetensors", None, "The file .*none.safetensors does not exist"),
        ("damaged.safetensors", "sd", "cannot be read as a checkpoint"),
        ("damaged.ckpt", "sd", "cannot be read as a checkpoint"),
        ("notes.txt", "sd", r"notes.txt is not a checkpoint.*\.safetensors or \.ckpt"),
        ("lora.safetensors", "sd", "weights of a LoRA.*--lora"),
        ("part.safetensors", None, r"not the checkpoint of a whole pipeline.*model\.diffusion_model\.\*.*part\.weight"),
        ("part.safetensors", "sd", "do not fit the configuration of .*sd.*missing in the checkpoint"),
        ("model.safetensors", "sdxl", "do not fit the configuration of .*sdxl"),
        ("model.safetensors", "notes.txt", "--model-config .*notes.txt is a file.*tokenizer"),
        ("model.safetensors", "nothing", "There is no folder .*nothing"),
        ("model.safetensors", "", "does not contain a diffusers pipeline"),
        ("sd", "sd", "--model-config is the configuration for a --model that is a single-file checkpoint"),
    ],
)
def test_what_cannot_be_loaded(folder: Path, file: str, config: str | None, words: str) -> None:
    for name in ("damaged.safetensors", "damaged.ckpt", "notes.txt"):
        (folder / name).write_bytes(b"nothing of the kind")
    save_file({"unet.to_q.lora_A.weight": torch.zeros(2)}, folder / "lora.safetensors")
    save_file({"part.weight": torch.zeros(2)}, folder / "part.safetensors")
    with pytest.raises(ConfigurationError, match=words):
        load(str(folder / file), model_config=None if config is None else str(folder / config))


def test_a_configuration_for_an_embedded_model(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="the embedded model is not one"):
        load(None, model_config=str(folder / "sd"))
    result = run(app, ["compare", "--model", "embedded:sd", "--model-config", str(folder / "sd")])
    assert result.exit_code == 1
    assert "embedded:sd is not one" in " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # from diffusers
def test_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError) as caught:
        load(str(folder / "model.safetensors"))
    for part in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "could not be loaded: no network",
        "--model-config",
        "save_pretrained",
    ):
        assert part in str(caught.value)
