"""The prototype of phases apart: two processes, each with the graphs of one phase, make the images of one with both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.phases_apart import PAPER, REPLICAS, on_paper, run_apart
from tests.programs import program
from tests.tiny_pipelines import PROMPT
from tgate_compile.runtime import BundlePipeline


@pytest.fixture(scope="module")
def bundle() -> Path:
    return program()


def test_two_processes_make_the_images_of_one(bundle: Path) -> None:
    calls = [
        {"prompt": PROMPT, "seed": 1},
        {"prompt": "blue dog", "negative_prompt": "snow", "seed": 2, "num_inference_steps": 5, "scheduler": "dpm++"},
    ]
    pipe = BundlePipeline(bundle, threads=1)
    images, nbytes, held = run_apart(bundle, calls)
    for image, call in zip(images, calls, strict=True):
        assert np.array_equal(image, pipe(**call, output="numpy"))  # type: ignore[arg-type]
    assert nbytes > 0
    opened = {name: {graph.partition("-")[0] for graph in process.graphs} for name, process in held.items()}
    assert opened == {"planner": {"full"}, "finisher": {"pruned"}}


@pytest.mark.sweep
def test_the_model_on_paper() -> None:
    for row in on_paper("sdxl", PAPER["sdxl"]):
        assert all(row[f"speed_{replicas}"] <= 1 + 1e-9 for replicas in REPLICAS)
        assert row["finisher_parameters_b"] == pytest.approx(2.0216, abs=1e-3)
