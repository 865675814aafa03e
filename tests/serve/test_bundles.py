"""Bundles in an engine, without PyTorch."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path

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
            assert np.array_equal(ticket.result(HANGS), target)
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


def test_a_bundle_needs_no_pytorch(bundle: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(bundle)], check=True)
