"""Bundles whose graphs are split by binding time: the same images, from a prelude, a table and a step."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import assert_differ, difference
from tests.exported import COMPILED_GATE, COMPILED_STEPS, GATE, STEPS, exported, exported_compiled, least, plain
from tests.programs import noise, program, psnr
from tests.test_bundle import change_manifest, refused
from tests.tiny_pipelines import PROMPT, PROMPTS, run
from tgate_compile import ConfigurationError
from tgate_compile._cli.app import app
from tgate_compile.bundle.component_recipes import FIXED, binding_in_bundle
from tgate_compile.bundle.plan_rows import plan_for
from tgate_compile.bundle.read import read_bundle
from tgate_compile.bundle.read_manifest import early_graphs
from tgate_compile.runtime import BundlePipeline
from tgate_compile.runtime._denoiser import Denoiser

#: The largest relative difference that rounding makes.
CLOSE = 1e-4
#: PSNR of float32 images that differ only by rounding.
SAME = 90.0


def whole() -> Path:
    """Return a bundle like `exported()` whose graphs are not split."""
    return exported(binding_times=False)


def weights_of(folder: Path, graph: str) -> set[str]:
    model = onnx.load_model(folder / f"graphs/{graph}.onnx", load_external_data=False)
    return {tensor.name for tensor in model.graph.initializer if tensor.external_data}


def runs_of(pipe: Any) -> dict[str, int]:
    """Return how often the last generation has run a prelude and a table."""
    runs: dict[str, int] = pipe._tgate_compile.hook.last.early.runs
    return runs


# Content.


def test_the_parts_of_a_bundle() -> None:
    manifest = read_bundle(exported()).manifest
    assert manifest.schema_version == 2
    assert {name: graph.stage for name, graph in manifest.graphs.items()} == {
        "full-prelude": "prelude",
        "full-table": "table",
        "full": "step",
        "pruned-table": "table",  # it takes no text
        "pruned": "step",
    }
    assert manifest.denoiser.bindings == {
        "sample": "latents",
        "timestep": "timestep",
        "encoder_hidden_states": "prompt",
    }
    full = manifest.graphs["full"]
    assert [spec.name for spec in full.inputs] == ["sample"]
    assert {spec.graph for spec in full.early_inputs} == {"full-prelude", "full-table"}
    assert early_graphs(manifest.graphs, "full") == ["full-prelude", "full-table"]
    assert early_graphs(manifest.graphs, "pruned") == ["pruned-table"]
    assert [spec.name for spec in manifest.graphs["full-prelude"].inputs] == ["encoder_hidden_states"]
    # The batch comes from the text, not from the latents; the pruned graph has no text.
    assert [spec.name for spec in manifest.graphs["full-table"].inputs] == ["timestep", "encoder_hidden_states"]
    assert [spec.name for spec in manifest.graphs["pruned-table"].inputs] == ["sample", "timestep"]
    assert {step.graph for step in manifest.example.steps} == {"full", "pruned"}
    for graph in manifest.graphs.values():
        assert graph.parity is not None
        assert graph.parity.relative < 1e-5


def test_each_part_has_its_own_weights() -> None:
    prelude, table, step = (weights_of(exported(), name) for name in ("full-prelude", "full-table", "full"))
    assert all(".attn2.to_" in name for name in prelude)
    assert all("time_emb" in name for name in table)
    assert not any("attn2.to_k" in name or "time_emb" in name for name in step)
    split, unsplit = (read_bundle(folder) for folder in (exported(), whole()))
    for name in ("full", "pruned"):
        parts = [split.manifest.graphs[part].facts for part in (*early_graphs(split.manifest.graphs, name), name)]
        expected = unsplit.manifest.graphs[name].facts
        assert sum(part.parameters for part in parts) == expected.parameters
        assert sum(part.macs for part in parts) == expected.macs
        assert sum(part.macs_total for part in parts) == expected.macs_total
    sizes = [(folder / "graphs/weights.bin").stat().st_size for folder in (exported(), whole())]
    assert sizes[0] <= 1.01 * sizes[1]


def test_only_arguments_that_are_certain_leave_the_step() -> None:
    assert binding_in_bundle("encoder_hidden_states") == "prompt"
    assert binding_in_bundle("timestep") == "timestep"
    for name in ("sample", "hidden_states", "down_block_additional_residuals.0", "encoder_hidden_states_2", "context"):
        assert binding_in_bundle(name) == "latents"
    assert not FIXED & {"sample", "hidden_states", "latents"}


# Version 1.


def test_a_bundle_that_is_not_split_has_version_1() -> None:
    data = json.loads((whole() / "manifest.json").read_text())
    assert data["schema_version"] == 1
    assert "bindings" not in data["denoiser"]
    assert set(data["graphs"]) == {"full", "pruned"}
    for graph in data["graphs"].values():
        assert set(graph) == {
            "file", "entry", "phase", "inputs", "cache_inputs", "outputs", "cache_outputs", "parity", "facts"
        }  # fmt: skip
    manifest = read_bundle(whole()).manifest
    assert all(graph.stage == "step" and not graph.early_inputs for graph in manifest.graphs.values())


def test_a_bundle_of_version_1_makes_the_same_images() -> None:
    latents = []
    for folder in (exported(), whole()):
        pipe = tgate_compile.load(plain(), folder)
        latents.append([run(pipe, steps=STEPS), run(pipe, PROMPTS, steps=STEPS, gate_step=2)])
    for one, other in zip(*latents, strict=True):
        assert difference(one, other) < CLOSE


@pytest.mark.heavy
def test_a_program_of_version_1() -> None:
    folder = program(dynamic=True, binding_times=False)
    assert read_bundle(folder).manifest.schema_version == 1
    split, unsplit, sequential = (
        BundlePipeline(one, threads=1, sequential=last)(PROMPT, latents=noise(), output="numpy")
        for one, last in ((program(dynamic=True), False), (folder, False), (folder, True))
    )
    assert psnr(split, unsplit) > SAME
    assert np.array_equal(unsplit, sequential)


def test_wrong_options(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    with pytest.raises(ConfigurationError, match="binding_times must be True, False or None, but got 'no'"):
        tgate_compile.export(pipe, tmp_path / "b", binding_times="no")  # type: ignore[arg-type]


# With PyTorch.


def test_how_often_the_parts_run() -> None:
    for sequential in (False, True):
        pipe = tgate_compile.load(plain(), exported(), sequential=sequential)
        for _ in range(2):
            run(pipe, steps=STEPS)
            ahead = 2 * STEPS if sequential else STEPS  # then each table has a row for every timestep
            assert runs_of(pipe) == {"prelude": 1, "table": ahead}


def test_only_one_graph_is_open(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tgate_compile.load(plain(), exported(), sequential=True)
    with caplog.at_level(logging.INFO, "tgate_compile.exports.onnx.open"):
        run(pipe, steps=STEPS)
    opened = [record.getMessage().split()[1] for record in caplog.records if "opened" in record.getMessage()]
    assert opened == ["full-prelude.onnx", "full-table.onnx", "full.onnx", "pruned-table.onnx", "pruned.onnx"]


@pytest.mark.parametrize("sequential", [False, True])
def test_prompts_and_timesteps_that_a_callback_changes(sequential: bool) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(1)
            pipe.scheduler.timesteps[3:] -= 7
        return tensors

    call: dict[str, Any] = {"steps": STEPS, "gate_step": STEPS - 1, "callback_on_step_end": change}
    call["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    expected = run(tgate_compile.optimize(plain(), GATE, backend="eager", binding_times=False), **call)
    pipe = tgate_compile.load(plain(), exported(), sequential=sequential)
    unchanged = run(pipe, steps=STEPS, gate_step=STEPS - 1)
    assert difference(run(pipe, **call), expected) < CLOSE
    assert_differ(expected, unchanged)
    assert runs_of(pipe)["prelude"] == 2


def test_a_prompt_of_another_length_is_refused() -> None:
    pipe = tgate_compile.load(plain(), exported())
    embeds = torch.zeros((1, 20, 32))
    with pytest.raises(
        tgate_compile.BundleError, match=r"encoder_hidden_states float32\[2\*b, 16, 32\].*\[2, 20, 32\]"
    ):
        run(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=embeds)


#: The modules that each format needs.
FORMATS = {
    "openvino": "openvino",
    "executorch": "executorch",
    "aoti": "torch",
    "coreml": "coremltools",
    "tensorrt-rtx": "tensorrt_rtx",
}


@pytest.mark.heavy
@pytest.mark.parametrize("format", FORMATS)
def test_other_formats(format: str) -> None:
    pytest.importorskip(FORMATS[format])
    manifest = read_bundle(exported_compiled(format, binding_times=True)).manifest
    assert early_graphs(manifest.graphs, "full") == ["full-prelude", "full-table"]
    assert early_graphs(manifest.graphs, "pruned") == ["pruned-table"]
    if format in ("coreml", "tensorrt-rtx"):  # these cannot run here
        return
    call: dict[str, Any] = {"steps": COMPILED_STEPS}
    expected = run(tgate_compile.optimize(least(), COMPILED_GATE, backend="eager"), **call)
    for sequential in (False, True):
        pipe = tgate_compile.load(least(), exported_compiled(format, binding_times=True), sequential=sequential)
        assert difference(run(pipe, **call), expected) < CLOSE
        assert runs_of(pipe)["prelude"] == 1


# Without PyTorch.


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_programs(name: str) -> None:
    unsplit = BundlePipeline(program(name, binding_times=False), threads=1)
    split = BundlePipeline(program(name), threads=1)
    sequential = BundlePipeline(program(name), threads=1, sequential=True)
    for prompt, latents in ((PROMPT, noise()), (PROMPTS, noise(2))):
        expected = unsplit(prompt, latents=latents, output="numpy")
        image = split(prompt, latents=latents, output="numpy")
        assert psnr(np.atleast_1d(image), expected) > SAME
        assert np.array_equal(sequential(prompt, latents=latents, output="numpy"), image)


def denoiser(folder: Path, *, sequential: bool) -> Denoiser:
    """Return the denoiser of a generation that expects other timesteps than `TIMES`."""
    pipe = BundlePipeline(folder, threads=1, sequential=sequential)
    conditions = pipe._conditions([PROMPT], None, noise().shape, guided=True)
    plan = plan_for(pipe.manifest, STEPS, guided=True)
    expected = [(step, 900.0 - 100 * step) for step in range(STEPS)]
    return Denoiser(pipe._graphs, pipe.manifest, pipe._folder, plan, conditions, expected)


TIMES = (900.0, 800.0, 123.0, 600.0, 456.0, 456.0)


@pytest.mark.heavy
def test_timesteps_that_were_not_expected() -> None:
    reference = denoiser(program(dynamic=True, binding_times=False), sequential=False)
    both = [denoiser(program(dynamic=True), sequential=sequential) for sequential in (False, True)]
    latents = noise()
    for step, time in enumerate(TIMES):
        expected = reference(step, latents, time, 5.0)
        made = [each(step, latents, time, 5.0) for each in both]
        assert np.array_equal(*made)
        assert np.abs(made[0] - expected).max() < CLOSE * np.abs(expected).max()
        latents = latents - np.float32(0.1) * expected


# Untrusted manifests.


def to_another(manifest: Any, key: str, value: Any) -> None:
    manifest["graphs"]["full"]["early_inputs"][0][key] = value


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: to_another(m, "graph", "nothing"), ("full", "'nothing' is not a prelude or a table of it")),
        (lambda m: to_another(m, "graph", "pruned"), ("full", "'pruned' is not a prelude or a table of it")),
        (
            lambda m: to_another(m, "graph", "pruned-table"),
            ("full", "'pruned-table' is not a prelude or a table of it"),
        ),
        (lambda m: to_another(m, "name", "other"), ("full", "returns no such 'other'")),
        (lambda m: to_another(m, "shape", [1]), ("full", "returns no such")),
        (
            lambda m: m["graphs"]["full-table"].update(stage="prelude"),
            ("full-table", "'timestep' may change more often"),
        ),
        (lambda m: m["denoiser"]["bindings"].pop("encoder_hidden_states"), ("'encoder_hidden_states' may change",)),
        (lambda m: m["denoiser"]["bindings"].update(other="prompt"), ("denoiser.bindings", "not arguments")),
        (lambda m: m["example"]["steps"][0].update(graph="full-table"), ("'full-table' is not the graph of a step",)),
        (
            lambda m: m["method"]["plans"]["phases"][0].update(graph="full-prelude"),
            ("'full-prelude' is not the graph",),
        ),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, change: Callable[[Any], object], parts: tuple[str, ...]) -> None:
    folder = Path(shutil.copytree(exported(), tmp_path / "bundle"))
    change_manifest(folder, change)
    refused(folder, "manifest", *parts)


def test_what_inspect_shows() -> None:
    shown = CliRunner().invoke(app, ["inspect", str(exported())])
    assert shown.exit_code == 0
    for text in ("full-prelude", "full-table", "pruned-table", "values of"):
        assert text in shown.output
