"""Bundles in an engine, without PyTorch."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tgate_compile
from tests.programs import noise, program
from tests.tiny_pipelines import PROMPT
from tgate_compile.runtime import BundlePipeline
from tgate_compile.serve import Engine, Progress, Ticket

HANGS = 60

WITHOUT_TORCH = """
import sys
from tgate_compile.serve import Engine

with Engine.from_bundle(sys.argv[1], threads=1) as engine:
    tickets = [engine.submit({"prompt": prompt, "seed": 3}) for prompt in ("red cat", "blue dog")]
    assert [ticket.result().size for ticket in tickets] == [(16, 16)] * 2
assert not {"torch", "diffusers"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def bundle() -> Path:
    return program()


def test_requests_of_a_bundle(bundle: Path) -> None:
    calls = [
        {"prompt": PROMPT, "latents": noise(), "output": "numpy"},
        {"prompt": PROMPT, "seed": 1, "num_inference_steps": 5, "gate_step": 1, "output": "numpy"},
        {"prompt": "blue dog", "seed": 2, "scheduler": "euler", "output": "numpy"},
    ]
    pipe = BundlePipeline(bundle, threads=1)
    expected = [pipe(**call) for call in calls]
    seen: list[Progress] = []
    with Engine.from_bundle(bundle, warm_up=calls[:1], threads=1) as engine:
        tickets = [engine.submit(call, on_step=seen.append) for call in calls]
        for ticket, target in zip(tickets, expected, strict=True):
            np.testing.assert_allclose(ticket.result(HANGS), target, atol=1e-5)
        assert {each.phase for each in seen} == {"F", "p"}
        assert engine.stats().completed == len(calls)
        assert engine.decode(noise())[0].size == (16, 16)

        def leave(progress: Progress) -> None:
            assert submitted.wait(HANGS)
            left[0].cancel()

        left: list[Ticket] = []
        submitted = threading.Event()
        left.append(engine.submit({**calls[1], "num_inference_steps": 50}, on_step=leave))
        submitted.set()
        with pytest.raises(CancelledError):
            left[0].result(HANGS)
        with pytest.raises(tgate_compile.ConfigurationError, match="callback"):
            engine.submit({"prompt": PROMPT, "callback": print})
        with pytest.raises(tgate_compile.ConfigurationError, match="lora"):
            engine.submit({"prompt": PROMPT}, lora={"first": 1.0})


def test_steps_of_several_requests_are_run_together(bundle: Path) -> None:
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 1, "num_inference_steps": 40, "gate_step": 20},
        {"prompt": "blue dog", "seed": 2, "num_inference_steps": 40, "gate_step": 20, "guidance_scale": 3.0},
        {"prompt": ["green bird", "a"], "seed": 3, "num_inference_steps": 38, "gate_step": 20},
    ]
    pipe = BundlePipeline(bundle, threads=1)
    expected = [pipe(**call, output="numpy") for call in calls]
    with Engine.from_bundle(bundle, max_batch=4, threads=1) as engine:
        for _ in range(2):
            tickets = [engine.submit({**call, "output": "numpy"}) for call in calls]
            for ticket, target in zip(tickets, expected, strict=True):
                np.testing.assert_allclose(ticket.result(HANGS), target, atol=1e-5)
        batches = engine.stats().batches
        # A request alone has at most two images. Whether all three ever meet depends on the machine.
        assert min(max(batches["F"]), max(batches["p"])) >= 3
        assert not engine.stats().one_at_a_time


@pytest.mark.heavy
def test_a_bundle_with_a_fixed_batch(caplog: pytest.LogCaptureFixture) -> None:
    fixed = program(dynamic=False, call=(("guidance_scale", 1.0),))
    with Engine.from_bundle(fixed, threads=1) as engine:
        for ticket in [engine.submit({"prompt": prompt, "guidance_scale": 1.0}) for prompt in (PROMPT, "blue dog")]:
            assert ticket.result(HANGS).size == (16, 16)
        (reason,) = engine.stats().one_at_a_time
        assert all({*sizes} == {1} for sizes in engine.stats().batches.values())
    assert "the batch size of its graphs is fixed" in reason
    assert reason in caplog.text


def test_a_bundle_needs_no_pytorch(bundle: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(bundle)], check=True)
