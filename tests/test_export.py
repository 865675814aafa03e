"""`export` and `load`: the images of the eager graphs, or a clear error without side effects."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch.utils import _pytree as pytree

import tgate_compile
from tests.comparing import difference
from tests.exported import GATE, exported, plain
from tests.tiny_pipelines import add_lora, latent_consistency, pixart, pixart_prompt, run
from tests.tiny_transformers import sana, sana_call
from tgate_compile import BundleError, CaptureError, ConfigurationError, UnsupportedModelError
from tgate_compile.bundle import parity
from tgate_compile.bundle.plan import returns_of, unflatten_as
from tgate_compile.bundle.read import read_bundle

#: ONNX Runtime adds in a different order.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported()


@pytest.fixture(scope="module")
def optimized() -> Any:
    """Return a pipeline with captured graphs that are not converted."""
    pipe = plain()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    tgate_compile.describe(pipe, prompt="")
    return pipe


def eager(pipe: Any, **call: Any) -> torch.Tensor:
    tgate_compile.optimize(pipe, GATE, backend="eager")
    try:
        return run(pipe, **call)
    finally:
        tgate_compile.restore(pipe)


# Supported calls and pipelines.


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 50.0), pytest.param(torch.float16, 35.0, marks=pytest.mark.sweep)]
)
def test_the_embedded_pipeline_from_a_bundle(dtype: torch.dtype, least: float, tmp_path: Path) -> None:
    pipe = tgate_compile.load_demo_pipeline(torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a large red circle", "steps": 10, "output_type": "pt"}
    tgate_compile.optimize(pipe, 4, backend="eager")
    expected = run(pipe, **call)
    folder = tgate_compile.export(pipe, tmp_path / "bundle", dynamic=dtype is torch.float32)
    tgate_compile.restore(pipe)
    assert tgate_compile.load(pipe, folder) is pipe
    images = run(pipe, **call)
    assert images.shape == expected.shape
    error = (images.double() - expected.double()).square().mean().item()
    assert error == 0.0 or -10 * math.log10(error) >= least
    assert tgate_compile.describe(pipe).strip == "FFFFpppppp"


def test_as_after_optimize(bundle: Path) -> None:
    pipe = plain()
    before, expected = run(pipe), eager(pipe)
    tgate_compile.load(pipe, bundle, backend_options={"threads": 1, "prepacking": False})
    first = run(pipe)
    assert difference(first, expected) < CLOSE
    assert torch.equal(run(pipe), first)
    assert difference(run(pipe, gate_step=5), before) > difference(run(pipe, gate_step=6), before)
    description = tgate_compile.describe(pipe, prompt="", num_inference_steps=8)
    names = [name for name, _ in pipe.unet.named_modules()]
    assert sorted(description.sites) == sorted(name for name in names if name.endswith("attn2"))
    assert description.bundle == str(bundle)
    assert f"{len(description.sites)} sites, graphs of the bundle {bundle}" in str(description)
    assert (description.strip, description.gate_step) == ("FFFppppp", GATE)
    assert description.cache_bytes > 0
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe), before)
    assert type(pipe).__call__ is diffusers.StableDiffusionPipeline.__call__


@pytest.mark.heavy
def test_all_graphs_of_a_schedule(tmp_path: Path) -> None:
    """One graph emits caches both whole and merged."""
    pipe = plain()
    options: dict[str, Any] = {"gate_step": 5, "sp_interval": 2, "fi_interval": 2, "anchor_weight": 1.0}
    tgate_compile.optimize(pipe, **options, backend="eager")
    expected = run(pipe, steps=9)
    folder = tgate_compile.export(
        pipe, tmp_path / "bundle", call={"prompt": "", "num_inference_steps": 9}, dynamic=False
    )
    graphs = read_bundle(folder).manifest.graphs
    steps = {name for name, graph in graphs.items() if graph.stage == "step"}
    assert steps == {"full", "self-reused", "pruned", "pruned-self-reused"}
    outputs = [output.name for output in graphs["full"].cache_outputs]
    assert "cache.mid_block.attentions.0.transformer_blocks.0.attn1" in outputs
    assert "cache.mid_block.attentions.0.transformer_blocks.0.attn1.merged" in outputs
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe, steps=9), expected) < CLOSE


@pytest.mark.heavy
def test_an_epsilon_that_is_nearly_nothing(tmp_path: Path) -> None:
    """Sana's linear attention adds 1e-15 to a denominator that may be 0."""
    pipe = sana()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    folder = tgate_compile.export(
        pipe, tmp_path / "bundle", call={"num_inference_steps": 6, **sana_call()}, dynamic=False
    )
    for graph in read_bundle(folder).manifest.graphs.values():
        assert graph.parity is not None
        assert graph.parity.relative < 1e-5


def test_denoisers_that_return_an_output_class() -> None:
    """AnimateDiff's does."""
    unet = plain().unet
    returned = returns_of(pytree.tree_structure(UNet2DConditionOutput(sample=torch.zeros(1))))
    assert returned is not None
    assert (returned.class_name, returned.fields) == ("UNet2DConditionOutput", ["sample"])
    made = unflatten_as(returned, unet, "0")([torch.ones(1)])
    assert type(made) is UNet2DConditionOutput
    assert torch.equal(made.sample, torch.ones(1))
    other = returned.model_copy(update={"class_name": "UNet2DConditionModel"})
    with pytest.raises(BundleError, match="no such output class"):
        unflatten_as(other, unet, "0")


@pytest.mark.parametrize(
    "call",
    [{"prompt": ["red", "cat"]}, {"height": 32, "width": 16}, {"height": 24, "width": 8, "num_images_per_prompt": 3}],
    ids=["prompts", "size", "both"],
)
def test_sizes_that_each_call_chooses(bundle: Path, call: dict[str, Any]) -> None:
    pipe = plain()
    expected = eager(pipe, **call)
    tgate_compile.load(pipe, bundle)
    assert difference(run(pipe, **call), expected) < CLOSE


def test_schedulers_with_parts_of_timesteps(bundle: Path) -> None:
    """The bundle is made with DDIM's integer timesteps; Euler's are not integers."""
    pipe = plain()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    expected = eager(pipe)
    tgate_compile.load(pipe, bundle)
    assert difference(run(pipe), expected) < CLOSE


# Calls and bundles that are refused.


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (
            {"prompt": ["red", "cat"] * 16},
            ("sample float32[2*b, 4, h, w]", "b from 1 to 31", "sample float32[64, 4, 8, 8]"),
        ),
        ({"guidance_scale": 1.0}, ("full, without guidance", "It has full, pruned")),
        (
            {"cross_attention_kwargs": {"scale": 0.5}},
            ("cross_attention_kwargs=None", "cross_attention_kwargs.scale=0.5"),
        ),
    ],
)
def test_other_calls(bundle: Path, call: dict[str, Any], parts: tuple[str, ...]) -> None:
    pipe = tgate_compile.load(plain(), bundle)
    with pytest.raises(BundleError) as caught:
        run(pipe, **call)
    for part in (*parts, str(bundle)):
        assert part in str(caught.value)
    run(pipe)


@pytest.mark.heavy
def test_tables_of_positions(tmp_path: Path) -> None:
    """PixArt's graph is for one size, although torch.export does not complain."""
    pipe = pixart()
    call = {"num_inference_steps": 6, **pixart_prompt()}
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = run(pipe, **pixart_prompt(2))
    with pytest.raises(CaptureError, match=r"batch, height, width.*At b=2, h=2, w=4 its graph fails"):
        tgate_compile.export(pipe, tmp_path / "bundle", call=call, dynamic=["batch", "height", "width"])
    assert list(tmp_path.iterdir()) == []
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=call)
    assert set(read_bundle(folder).manifest.sizes) == {"b"}
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe, **pixart_prompt(2)), expected) < CLOSE


@pytest.mark.heavy
def test_sizes_that_are_fixed(tmp_path: Path) -> None:
    pipe = plain()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = run(pipe, prompt=["red", "cat"])
    none = tgate_compile.export(pipe, tmp_path / "none", dynamic=False)
    batch = tgate_compile.export(pipe, tmp_path / "batch", dynamic=["batch"])
    tgate_compile.restore(pipe)

    tgate_compile.load(pipe, none)
    with pytest.raises(BundleError, match=r"encoder_hidden_states float32\[2, 16, 32\].*float32\[4, 16, 32\]"):
        run(pipe, prompt=["red", "cat"])
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, batch)
    assert difference(run(pipe, prompt=["red", "cat"]), expected) < CLOSE
    with pytest.raises(BundleError, match="height must be 16 pixels, not 32"):
        run(pipe, height=32, width=16)


def not_loaded(pipe: Any, bundle: Path, *parts: str, error: type[Exception] = BundleError, **options: Any) -> None:
    before = dict(vars(pipe.unet))
    with pytest.raises(error) as caught:
        tgate_compile.load(pipe, bundle, **options)
    for part in parts:
        assert part in str(caught.value)
    assert dict(vars(pipe.unet)) == before
    assert "_tgate_compile" not in vars(pipe)


def test_other_pipelines(bundle: Path) -> None:
    not_loaded(latent_consistency(), bundle, "StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    pipe = plain()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1e-6
    not_loaded(pipe, bundle, "other weights", "unet")
    not_loaded(plain().to(torch.float16), bundle, "other weights", "dtype")
    lora = plain()
    add_lora(lora.unet)
    not_loaded(lora, bundle, "adapter 'default' has scale 1.0 here and is not in the bundle")


def test_another_model(bundle: Path) -> None:
    pipe = plain()
    pipe.unet = type("OtherUNet", (type(pipe.unet),), {}).from_config(pipe.unet.config)
    not_loaded(pipe, bundle, "UNet2DConditionModel", "OtherUNet")


def test_arguments_of_load(bundle: Path) -> None:
    pipe = plain()
    not_loaded(pipe, bundle, "onnxruntime", "'eager'", error=ConfigurationError, backend="eager")
    not_loaded(pipe, bundle, "provider", error=ConfigurationError, backend_options={"provider": "CPU"})
    not_loaded(pipe, 3, "folder", error=ConfigurationError)  # type: ignore[arg-type]
    not_loaded(pipe, bundle.parent / "nothing", "is not a bundle")
    with pytest.raises(ConfigurationError, match="pipeline"):
        tgate_compile.load(3, bundle)  # type: ignore[type-var]
    tgate_compile.load(pipe, bundle)
    with pytest.raises(ConfigurationError, match="already optimized"):
        tgate_compile.load(pipe, bundle)
    with pytest.raises(ConfigurationError, match="served from a bundle"):
        tgate_compile.export(pipe, bundle.parent / "copy")


def test_weights_changed_after_loading(bundle: Path) -> None:
    pipe = tgate_compile.load(plain(), bundle)
    pipe.unet.conv_out.bias.data[0] += 1e-3
    with pytest.raises(BundleError, match="have changed since"):
        run(pipe)


# Exports that are refused.


def not_exported(pipe: Any, folder: Any, *parts: str, error: type[Exception] = BundleError, **options: Any) -> None:
    with pytest.raises(error) as caught:
        tgate_compile.export(pipe, folder, **options)
    for part in parts:
        assert part in str(caught.value)


def test_arguments_of_export(optimized: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    not_exported(plain(), folder, "not optimized", error=ConfigurationError)
    not_exported(optimized, folder, "'trt'", '"onnx"', error=ConfigurationError, format="trt")
    not_exported(optimized, None, "folder", error=ConfigurationError)
    not_exported(optimized, folder, "dynamic", "'length'", error=ConfigurationError, dynamic=["length"])
    not_exported(optimized, folder, "no options", "'fast'", error=ConfigurationError, format_options={"fast": 1})
    similar = plain()
    tgate_compile.optimize(similar, None, guidance_similarity=0.99, backend="eager")
    not_exported(similar, folder, "guidance_similarity", error=UnsupportedModelError)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_taken(optimized: Any, bundle: Path, tmp_path: Path) -> None:
    not_exported(optimized, bundle, "already exists", "overwrite=True")
    (tmp_path / "mine.txt").write_text("mine")
    not_exported(optimized, tmp_path, "is not a bundle", overwrite=True)
    not_exported(optimized, tmp_path / "mine.txt", "is not a bundle", overwrite=True)
    not_exported(optimized, tmp_path / "nothing" / "bundle", "is not a folder")
    not_exported(optimized, tmp_path / "mine.txt" / "bundle", "is not a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk(optimized: Any, tmp_path: Path) -> None:
    with files_limited_to(100_000):
        not_exported(optimized, tmp_path / "bundle", "cannot be written", "Nothing has been written", dynamic=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_dtypes_that_onnx_runtime_does_not_run(tmp_path: Path) -> None:
    pipe = plain()
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    not_exported(pipe, tmp_path / "bundle", "The full-", "not bfloat16", dynamic=False)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_not_the_same(optimized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "TOLERANCES", {torch.float32: 0.0})
    not_exported(optimized, tmp_path / "bundle", "The full-", "0e+00 is allowed for float32", dynamic=False)
    assert list(tmp_path.iterdir()) == []
