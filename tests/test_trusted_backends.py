"""A backend is used for a graph only after its results were compared with PyTorch's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.tiny_pipelines import run, stable_diffusion
from tgate_compile import BackendError
from tgate_compile.engine.samples import WeightSamples, sums_of_bits
from tgate_compile.engine.trust import coarsest, relative_difference
from tgate_compile.exports.onnx.live import OnnxRuntimeBackend
from tgate_compile.exports.openvino.live import OpenVinoBackend
from tgate_compile.exports.tensorrt.live import TensorRTBackend

CLOSE = 1e-4
INF, NAN = float("inf"), float("nan")


class _Times(torch.nn.Module):
    """Multiplies a time embedding by a function of the timestep, which is exact in any order of summation."""

    def __init__(self, inner: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(time) * self.function(time)[:, None]
        return result


def hashed(time: torch.Tensor) -> torch.Tensor:
    """A hash that is wrong in OpenVINO, which multiplies 64-bit integers in 32 bits."""
    return ((time.long() * 2_654_435_761) % 1000).float() / 1000


def in_64_bits(time: torch.Tensor) -> torch.Tensor:
    """A sine that is wrong in OpenVINO, which computes the sine of a double in 32 bits."""
    return torch.sin(time.double() * 1e7).float()


def without_onnx(time: torch.Tensor) -> torch.Tensor:
    """A function that the ONNX converter does not support."""
    return torch.special.i0(time.float() / 1000)


def pipeline(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    pipe = stable_diffusion(layout="small")
    pipe.unet.time_proj = _Times(pipe.unet.time_proj, function)
    return pipe


def eager(pipe: Any, gate: int = 2) -> torch.Tensor:
    tgate_compile.optimize(pipe, gate, backend="eager")
    result: torch.Tensor = run(pipe, steps=3)
    tgate_compile.restore(pipe)
    return result


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about backends."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("tgate_compile.engine.trust")]


@pytest.mark.parametrize("function", [hashed, pytest.param(in_64_bits, marks=pytest.mark.heavy)])
def test_a_named_backend_that_is_wrong(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    pytest.importorskip("openvino")
    pipe = pipeline(function)
    tgate_compile.optimize(pipe, 2, backend="openvino")
    with pytest.raises(BackendError, match=r"full graph .*\"openvino\" is \d\.\de-0\d .*1e-04 .*float32") as error:
        run(pipe, steps=3)
    assert 'backend="eager"' in str(error.value)
    with pytest.raises(BackendError, match="openvino"):  # also the second time
        run(pipe, steps=3)


def test_automatic_goes_on_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    pipe = pipeline(hashed)
    expected = run(pipe, steps=2)
    tgate_compile.optimize(pipe, 1000, backend="auto")
    with caplog.at_level(logging.WARNING, "tgate_compile"):
        assert difference(run(pipe, steps=2), expected) < CLOSE
        assert difference(run(pipe, steps=2), expected) < CLOSE
    (message,) = warnings_of(caplog)
    for part in ("full graph", '"openvino" is', '"onnxruntime"'):
        assert part in message
    assert 'backend="inductor"' not in message  # no advice if there is nothing to do


@pytest.mark.heavy
def test_automatic_ends_at_eager(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    pipe = pipeline(without_onnx)
    expected = eager(pipe)
    tgate_compile.optimize(pipe, 2, backend="auto")
    with caplog.at_level(logging.WARNING, "tgate_compile"):
        assert torch.equal(run(pipe, steps=3), expected)
    first, second = warnings_of(caplog)
    assert '"onnxruntime"' in first
    assert '"eager"' in second
    assert "i0" in first
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 2, backend="onnxruntime")
    with pytest.raises(BackendError, match="bessel_i0"):
        run(pipe, steps=3)


def only_alone(time: torch.Tensor) -> torch.Tensor:
    """A function that OpenVINO computes correctly for the guided batch of two, but not for a batch of one."""
    return hashed(time) if time.shape[0] == 1 else torch.ones_like(time, dtype=torch.float32)


@pytest.mark.heavy
def test_a_graph_that_was_right_stays(caplog: pytest.LogCaptureFixture) -> None:
    """The backend fails at the second graph, and the generation continues with the same caches."""
    pytest.importorskip("openvino")
    pipe = pipeline(only_alone)
    expected = eager(pipe)
    tgate_compile.optimize(pipe, 2, backend="auto")
    with caplog.at_level(logging.WARNING, "tgate_compile"):
        assert difference(run(pipe, steps=3), expected) < CLOSE
    (message,) = warnings_of(caplog)
    assert "pruned graph" in message
    compiled = {item.variant.phase.name: item.runner for item in pipe._tgate_compile.hook.store.compiled}
    names = {name: runner.backend.name for name, runner in compiled.items()}
    assert names == {"full": "openvino", "pruned": "onnxruntime"}


def test_a_graph_without_finite_values_is_compared_later() -> None:
    """Values that are NaN in PyTorch may be NaN, and prove nothing about the backend."""
    pytest.importorskip("openvino")
    pipe = stable_diffusion(layout="small")
    good = pipe.unet.conv_out.bias.clone()
    pipe.unet.conv_out.bias.fill_(NAN)
    tgate_compile.optimize(pipe, 1000, backend="onnxruntime")
    assert run(pipe, steps=1).isnan().all()
    (compiled,) = pipe._tgate_compile.hook.store.compiled
    assert not compiled.runner.compared
    pipe.unet.conv_out.bias.copy_(good)
    assert run(pipe, steps=1).isfinite().all()
    (compiled,) = pipe._tgate_compile.hook.store.compiled
    assert compiled.runner.compared


@pytest.mark.parametrize(
    ("result", "expected", "relative"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.0, 4.0], INF),
        ([1.0, 4.0], [1.0, NAN], INF),
        ([1.0, INF], [2.0, INF], 0.5),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, INF], [1.0, 3.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([0.0], [0.0], 0.0),
    ],
)
def test_distances(result: list[float], expected: list[float], relative: float) -> None:
    assert relative_difference(torch.tensor(result), torch.tensor(expected)) == relative


def test_no_distance_where_nothing_is_finite() -> None:
    nothing = torch.tensor([NAN, NAN])
    assert relative_difference(nothing, nothing) != relative_difference(nothing, nothing)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (OpenVinoBackend({}), None),
        (OpenVinoBackend({"precision": "float32"}), None),
        (OpenVinoBackend({"precision": "bfloat16"}), torch.bfloat16),
        (OnnxRuntimeBackend({"providers": ["CPUExecutionProvider"]}), None),
        (OnnxRuntimeBackend({"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}), None),  # without TF32
        (OnnxRuntimeBackend({"providers": ["TensorrtExecutionProvider"]}), torch.float16),
        (TensorRTBackend({}), None),
        (TensorRTBackend({"disable_tf32": False}), torch.float16),
        (TensorRTBackend({"enabled_precisions": {torch.float16, torch.float32}}), torch.float16),
        (TensorRTBackend({"autocast_low_precision_type": torch.bfloat16}), torch.bfloat16),
    ],
)
def test_options_that_lower_the_precision(backend: Any, dtype: torch.dtype | None) -> None:
    assert backend.lowered_to(torch.device("cpu")) is dtype
    assert coarsest({torch.float32, torch.float64, dtype or torch.float32}) is (dtype or torch.float32)


def test_changes_of_all_weights_are_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are fetched from a device together: a large denoiser has more than a thousand weights."""
    joined: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda views: joined.append(len(views)) or cat(views))
    weights = [torch.randn(3000), torch.randn(4, 4).bfloat16(), torch.tensor(3, dtype=torch.int8), torch.empty(0)]
    weights += [torch.randn(9)[1:], torch.randn(7).half()[1:]]  # in memory that int64 cannot be read from
    weights += [torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(4, 4)[:, :2]]
    sampler = WeightSamples()
    before = sampler.of(weights)
    assert sum(joined) == len(weights) - 1
    assert sampler.of(weights) == before == WeightSamples().of(weights)
    for weight in (*weights[:3], *weights[4:]):
        weight.data += 1  # behind the version counter
        changed = sampler.of(weights)
        assert [one != other for one, other in zip(changed, before, strict=True)].count(True) == 1
        before = changed
    weights[0].data = weights[0].data.clone().neg()  # elsewhere in memory
    assert sampler.of(weights)[0] != before[0]
    assert sampler.of(weights)[1:] == before[1:]
    assert sums_of_bits([]) == []
