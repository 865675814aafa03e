"""`backend="auto"`, the default: which backend it takes, what it logs, and when it abandons one."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.tiny_pipelines import add_lora, run, stable_diffusion
from tgate_compile import BackendError, Schedule
from tgate_compile._runtimes import automatic_backends, ranked_backends
from tgate_compile.engine import trust
from tgate_compile.engine.backends import EagerBackend
from tgate_compile.engine.choice import Chooser
from tgate_compile.engine.config import Config
from tgate_compile.engine.trust import Candidate, ChosenBackend
from tgate_compile.exports.inductor.live import InductorBackend
from tgate_compile.pipeline.attach import attach

CLOSE = 1e-4


def served_by(pipe: Any) -> tuple[str, ...]:
    return tgate_compile.describe(pipe).served_by


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level and "auto" in record.msg]


def small() -> Any:
    return stable_diffusion(layout="small")


def test_it_is_the_default_everywhere() -> None:
    for function in (tgate_compile.optimize, attach, Config):
        assert inspect.signature(function).parameters["backend"].default == "auto"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    pipe = tgate_compile.optimize(small(), 2)
    with caplog.at_level(logging.INFO, "tgate_compile.engine"):
        run(pipe, steps=3)
        run(pipe, steps=3)
    (message,) = messages(caplog, logging.INFO)
    assert message == (
        'backend="auto" runs UNet2DConditionModel with openvino. Fastest first, on "cpu": openvino; onnxruntime; eager'
    )
    assert served_by(pipe) == ("openvino",)
    assert not messages(caplog, logging.WARNING)


def test_faster_options_are_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = importlib.util.find_spec
    absent = ("openvino", "onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    assert ranked_backends("cpu") == ["openvino", "onnxruntime", "eager"]
    assert automatic_backends("cpu") == ["eager"]
    pipe = tgate_compile.optimize(small(), 2)
    with caplog.at_level(logging.INFO, "tgate_compile.engine"):
        run(pipe, steps=3)
    (message,) = messages(caplog, logging.INFO)
    assert "with eager" in message
    assert "openvino (not installed: pip install 'tgate_compile[openvino]')" in message


def test_weights_that_change_in_every_call_are_not_compiled_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    pipe = small()
    tgate_compile.optimize(pipe, 2)
    taken = []
    with caplog.at_level(logging.INFO, "tgate_compile.engine"):
        for call in range(5):
            pipe.unet.conv_out.bias.data.add_(0.01 * call)
            result = run(pipe, steps=3)
            taken.append(served_by(pipe))
    assert taken[:2] == [("openvino",)] * 2
    assert taken[3:] == [("eager",)] * 2
    (warning,) = messages(caplog, logging.WARNING)
    assert 'from "openvino" to "eager": the weights have changed in 2 calls in a row' in warning
    assert "with eager" in messages(caplog, logging.INFO)[-1]
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 2, backend="eager")
    assert torch.equal(run(pipe, steps=3), result)


@pytest.mark.heavy
def test_weights_that_change_now_and_then_stay_with_the_fastest_backend() -> None:
    pytest.importorskip("openvino")
    pipe = small()
    tgate_compile.optimize(pipe, 2)
    for call in range(6):
        if call % 2:
            pipe.unet.conv_out.bias.data.add_(0.01)
        run(pipe, steps=3)
    assert served_by(pipe) == ("openvino",)


def test_a_backend_selected_by_name_stays() -> None:
    pytest.importorskip("openvino")
    pipe = small()
    tgate_compile.optimize(pipe, 2, backend="openvino")
    for _ in range(4):
        pipe.unet.conv_out.bias.data.add_(0.01)
        run(pipe, steps=3)
    assert served_by(pipe) == ("openvino",)


@pytest.mark.heavy
def test_a_lora_with_another_scale_in_every_call(caplog: pytest.LogCaptureFixture) -> None:
    """The scale is a constant of the graph, so each scale is a separate state."""
    pytest.importorskip("openvino")
    pipe = small()
    add_lora(pipe.unet)
    tgate_compile.optimize(pipe, 2)
    taken = []
    with caplog.at_level(logging.WARNING, "tgate_compile.engine.trust"):
        for call in range(3):
            for module in pipe.unet.modules():
                for name in getattr(module, "scaling", {}):
                    module.scaling[name] = 1.0 + call
            result = run(pipe, steps=3)
            taken.append(served_by(pipe)[-1])
    assert taken == ["openvino", "openvino", "eager"]
    (warning,) = messages(caplog, logging.WARNING)
    assert "UNet2DConditionModel has been changed before each of the last 3 calls" in warning
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 2, backend="eager")
    assert torch.equal(run(pipe, steps=3), result)


def test_no_copy_of_weights_that_would_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trust, "available_memory", lambda: 1000)
    pipe = tgate_compile.optimize(small(), 2)
    with caplog.at_level(logging.WARNING, "tgate_compile.engine.trust"):
        run(pipe, steps=3)
    assert served_by(pipe) == ("eager",)
    assert "copy of its weights" in messages(caplog, logging.WARNING)[0]


def test_on_a_gpu_it_is_inductor_with_cuda_graphs() -> None:
    chosen = Chooser(Config(Schedule(2)), "UNet").backend(torch.device("cuda"), 1)
    titles = []
    while chosen.has_choice:
        titles.append(chosen.next.title)
        chosen.give_up(chosen.next, BackendError("it failed"), None)  # type: ignore[arg-type]
    assert titles == ["inductor (cuda_graphs=True)", "inductor"]
    assert chosen.next.title == "eager"


def test_without_cuda_graphs_where_they_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    """CUDA graphs refuse inputs that are not on one GPU, and the next candidate takes over."""
    pipe = tgate_compile.optimize(small(), 2, backend="eager")
    expected = run(pipe, steps=3)
    store = pipe._tgate_compile.hook.store
    (variant, _), *_ = store.variants
    weights = next(each.weights for each in store.compiled if each.variant is variant)
    fakes = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"][len(weights) :]
    inputs = [torch.ones(fake.shape, dtype=fake.dtype) for fake in fakes]
    graphs = Candidate(InductorBackend({"cuda_graphs": True}), "inductor (cuda_graphs=True)")
    chosen = ChosenBackend([graphs, Candidate(EagerBackend({}), "eager")])
    with caplog.at_level(logging.WARNING, "tgate_compile.engine.trust"):
        served = chosen.compile(variant, weights, inputs)
    assert served.backend.name == "eager"
    assert "one CUDA device" in messages(caplog, logging.WARNING)[0]
    assert difference(run(pipe, steps=3), expected) < CLOSE
