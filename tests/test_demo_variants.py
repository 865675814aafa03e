"""Every embedded model loads as the diffusers pipeline it is, follows captions, and runs with T-GATE."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import tgate_compile
from tgate_compile import ConfigurationError, load_demo_pipeline
from tgate_compile._cli.loading import load
from tgate_compile._demo import DEMO_VARIANTS
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.pipeline import WEIGHTS

RESULTS = Path(__file__).parents[1] / "docs" / "results"
OTHERS = [name for name in DEMO_VARIANTS if name != "sd"]

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

CAPTIONS = [
    "a large red circle on a white background",
    "a small yellow square at the left of a blue background",
    "a large black triangle at the right of a green background",
    "a white background with a large purple star",
    "a red square left of a yellow circle on a black background",
    "a white star above a green triangle on a purple background",
]

# Well below the rates measured on hundreds of captions.
LEAST = {
    "sdxl": {"all": 4 / 6},
    "pixart": {"all": 4 / 6},
    "lcm": {"all": 4 / 6},
    "sd3": {"all": 4 / 6},
}


@pytest.fixture(scope="module", params=OTHERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(name: str) -> Any:
    pipeline = load_demo_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: Any, name: str, **options: Any) -> torch.Tensor:
    """Return one image per caption, [6, 3, 64, 64]."""
    variant = DEMO_VARIANTS[name]
    noise = [torch.Generator().manual_seed(i) for i in range(len(CAPTIONS))]
    settings = {"num_inference_steps": variant.steps, "guidance_scale": variant.guidance, **variant.call, **options}
    out: torch.Tensor = pipeline(CAPTIONS, generator=noise, output_type="pt", **settings).images
    return out


@pytest.fixture(scope="module")
def plain(pipeline: Any, name: str) -> torch.Tensor:
    return images(pipeline, name)


def test_it_loads_without_a_word_and_without_the_hub(
    name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capfd.readouterr()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        pipeline: Any = load_demo_pipeline(name, torch_dtype=torch.float16)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert not caplog.records
    assert isinstance(pipeline, getattr(diffusers, DEMO_VARIANTS[name].pipeline))
    assert type(pipeline).__name__ == DEMO_VARIANTS[name].pipeline
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float16}


def test_a_plain_call_runs_without_a_word(
    name: str, pipeline: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    capfd.readouterr()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        # diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
        warnings.filterwarnings("ignore", "__array__ implementation")
        image = pipeline("a large red circle on a blue background", num_inference_steps=2).images[0]
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.records) == ("", "", [])
    assert image.size == (64, 64)


def test_defaults_may_be_overridden_and_are_this_objects_own(pipeline: Any, name: str) -> None:
    if name != "pixart":
        pytest.skip("it has no default of its own")
    assert inspect.signature(pipeline.__call__).parameters["clean_caption"].default is False
    plain = inspect.signature(diffusers.PixArtAlphaPipeline.__call__).parameters
    assert plain["clean_caption"].default is True
    with pytest.raises(ValueError, match="Invalid sample size"):
        pipeline("a star", num_inference_steps=1, use_resolution_binning=True)


def test_the_folder_is_small_and_has_only_its_own_parts(name: str) -> None:
    variant = DEMO_VARIANTS[name]
    folder = WEIGHTS.parent / variant.folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 9 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    parts = {path.name for path in folder.iterdir() if path.is_dir()}
    assert not parts & set(variant.shared)
    assert "vae" in variant.shared
    for path in files:
        if path.suffix == ".json":
            assert '"/' not in path.read_text(), path


def check_follows_captions(name: str, pictures: torch.Tensor) -> None:
    score = AttributeReader.load().score(pictures, CAPTIONS)
    for attribute, least in LEAST[name].items():
        assert score[attribute] >= least, (attribute, score)


def test_it_follows_captions(name: str, plain: torch.Tensor) -> None:
    check_follows_captions(name, plain)


# The smallest.
@pytest.mark.parametrize(
    "name",
    [name if name == "lcm" else pytest.param(name, marks=pytest.mark.heavy) for name in OTHERS],
    indirect=True,
)
def test_gated_it_still_follows_them(name: str, pipeline: Any, plain: torch.Tensor) -> None:
    steps = DEMO_VARIANTS[name].steps
    gate = round(0.4 * steps)
    gated, strip = gated_images(pipeline, name, gate)
    ungated, _ = gated_images(pipeline, name, steps)
    assert strip.upper() == "F" * gate + "P" * (steps - gate)
    assert not torch.equal(gated, plain)
    assert torch.equal(ungated, plain)
    check_follows_captions(name, gated)


def gated_images(pipeline: Any, name: str, gate: int) -> tuple[torch.Tensor, str]:
    """Return the images of the optimized pipeline, and the phases of its steps."""
    tgate_compile.optimize(pipeline, gate, backend="eager")
    try:
        return images(pipeline, name), tgate_compile.describe(pipeline).strip
    finally:
        tgate_compile.restore(pipeline)


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sd, sdxl, pixart, lcm, sd3, but got 'flux'"):
        load_demo_pipeline("flux")


def test_sdxl_receives_size_and_pooled_text() -> None:
    config = load_demo_pipeline("sdxl").unet.config
    assert config.addition_embed_type == "text_time"
    assert config.down_block_types[0] == "DownBlock2D"
    assert list(config.transformer_layers_per_block) == [1, 1, 2]


def test_sd3_has_joint_attention_and_straight_paths() -> None:
    pipeline = load_demo_pipeline("sd3")
    assert isinstance(pipeline.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    blocks = pipeline.transformer.transformer_blocks
    assert [block.context_pre_only for block in blocks] == [False] * 5 + [True]
    # Two text encoders side by side, each with one token per word, and no T5.
    text, *_ = pipeline.encode_prompt("a red circle", None, None, max_sequence_length=0)
    assert text.shape == (1, 16, pipeline.transformer.config.joint_attention_dim)


def test_lcm_receives_the_guidance_scale() -> None:
    pipeline = load_demo_pipeline("lcm")
    assert pipeline.unet.config.time_cond_proj_dim is not None
    assert isinstance(pipeline.scheduler, diffusers.LCMScheduler)


@pytest.mark.skipif(not RESULTS.exists(), reason="the results are in the repository, not in the source archive")
def test_the_model_card_tells_the_measured_figures(name: str) -> None:
    card = (WEIGHTS / "README.md").read_text()
    results = json.loads((RESULTS / "demo_pipelines.json").read_text())[name]
    column = DEMO_VARIANTS[name]
    assert (results["steps"], results["guidance"]) == (column.steps, column.guidance)
    for kind in ("single", "pair"):
        shares = [f"{100 * share:.1f} %" for share in results[kind]["accuracy"].values()]
        row = next(line for line in card.splitlines() if line.startswith(f"| `{name}`, {kind} "))
        assert [cell.strip() for cell in row.split("|")[2:-1] if cell.strip()] == shares


@pytest.mark.parametrize("name", OTHERS)
def test_the_command_line_knows_them(name: str) -> None:
    loaded = load(f"embedded:{name}", device="cpu")
    variant = DEMO_VARIANTS[name]
    assert loaded.is_embedded
    assert (loaded.source, loaded.family.name) == (f"embedded:{name}", f"embedded {name}")
    assert (loaded.family.steps, loaded.family.guidance) == (variant.steps, variant.guidance)
    assert loaded.call == variant.call
    assert type(loaded.pipe).__name__ == variant.pipeline


def test_the_command_line_refuses_another_name_and_another_unet() -> None:
    with pytest.raises(ConfigurationError, match="but got 'flux'"):
        load("embedded:flux")
    with pytest.raises(ConfigurationError, match="--unet"):
        load("embedded:sdxl", unet="somewhere")
