"""Denoisers with weights quantized by torchao, optimum-quanto or bitsandbytes before `optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, difference
from tests.hook_reference import hook_reference
from tests.tiny_pipelines import run, stable_diffusion
from tgate_compile import BackendError, UnsupportedModelError
from tgate_compile.bundle.manifest import WEIGHTS_FILE
from tgate_compile.bundle.read import read_bundle
from tgate_compile.engine.weights import fingerprint, live_tensors, plain_tensors

GATE, STEPS = 2, 4
CLOSE = 1e-4


def quantized(config: str = "Int8WeightOnlyConfig", layout: str = "small") -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    pipe = stable_diffusion(layout=layout)
    quantization.quantize_(pipe.unet, getattr(quantization, config)())
    return pipe


def reference(pipe: Any) -> torch.Tensor:
    with hook_reference(pipe, GATE):
        result: torch.Tensor = run(pipe, steps=STEPS)
    return result


@pytest.mark.heavy
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_as_with_hooks_to_the_bit(config: str) -> None:
    pipe = quantized(config)
    plain, gated = run(pipe, steps=STEPS), reference(pipe)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    assert torch.equal(run(pipe, steps=STEPS), gated)
    assert torch.equal(run(pipe, steps=STEPS, gate_step=1000), plain)
    (full, _), *_ = pipe._tgate_compile.hook.store.variants
    held = {tensor.data_ptr() for tensor in plain_tensors(pipe.unet).values()}
    live = live_tensors(pipe.unet)
    assert all(live[name].data_ptr() in held for name in full.weights if name in live)
    assert not [name for name in full.weights if name not in live]  # no copies
    # In-place changes.
    pipe.unet.conv_in.bias.add_(0.3)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight.scale.mul_(2)
    changed = run(pipe, steps=STEPS)
    assert_differ(changed, gated)
    tgate_compile.restore(pipe)
    assert torch.equal(changed, reference(pipe))


def test_the_fingerprint_sees_quantization() -> None:
    """It also distinguishes quantized weights from quantized activations, whose tensors are the same."""
    pipes = [stable_diffusion(layout="small"), quantized(), quantized("Int8DynamicActivationInt8WeightConfig")]
    prints = [fingerprint(pipe.unet)[1] for pipe in pipes]  # type: ignore[index]
    assert len(set(prints)) == 3
    assert prints[1] == fingerprint(quantized().unet)[1]  # type: ignore[index]


@pytest.mark.heavy
def test_quantized_after_the_first_image() -> None:
    pipe = stable_diffusion(layout="small")
    tgate_compile.optimize(pipe, GATE, backend="eager")
    before = run(pipe, steps=STEPS)
    pytest.importorskip("torchao.quantization").quantize_(pipe.unet, _weight_only())
    after = run(pipe, steps=STEPS)
    assert not torch.equal(after, before)
    tgate_compile.restore(pipe)
    assert torch.equal(after, reference(pipe))


@pytest.mark.heavy
def test_onnx_takes_the_integers(tmp_path: Path) -> None:
    """They stay 8-bit in the file, and the bundle recognizes them."""
    pipe = quantized()
    tgate_compile.optimize(pipe, 1000, backend="eager")
    expected = run(pipe, steps=1)
    call = {"prompt": "", "num_inference_steps": 1}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=call, dynamic=False)
    held = {name: tensor.nbytes for name, tensor in plain_tensors(pipe.unet).items()}
    assert read_bundle(folder).manifest.files[WEIGHTS_FILE].size < 1.2 * sum(held.values())
    served = quantized()
    tgate_compile.load(served, folder)
    assert difference(run(served, steps=1), expected) < CLOSE
    with pytest.raises(tgate_compile.BundleError):
        tgate_compile.load(stable_diffusion(layout="small"), folder)


@pytest.mark.parametrize("format", ["onnx", "openvino", "aoti", "executorch", "coreml", "tensorrt-rtx"])
def test_rounded_inputs_are_refused_before_any_work(format: str, tmp_path: Path) -> None:
    pipe = quantized("Int8DynamicActivationInt8WeightConfig")
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"round their inputs .*time_embedding.*Int8Weight"):
        tgate_compile.export(pipe, tmp_path / "bundle", format)
    assert not pipe._tgate_compile.hook.store.variants
    assert list(tmp_path.iterdir()) == []


def test_executorch_refuses_quantized_weights(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    pipe = quantized()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"executorch.*time_embedding.*int8-dynamic"):
        tgate_compile.export(pipe, tmp_path / "bundle", "executorch")
    assert not pipe._tgate_compile.hook.store.variants


@pytest.mark.heavy
def test_rounded_inputs_in_a_backend() -> None:
    pipe = quantized("Int8DynamicActivationInt8WeightConfig")
    expected = run(pipe, steps=1)
    tgate_compile.optimize(pipe, 1000, backend="onnxruntime")
    with pytest.raises(BackendError, match="round their inputs to int8 and multiply integers"):
        run(pipe, steps=1)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 1000, backend="auto")
    assert torch.equal(run(pipe, steps=1), expected)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "most"), [("Int8WeightOnlyConfig", CLOSE), ("Int8DynamicActivationInt8WeightConfig", 5e-2)]
)
def test_inductor(config: str, most: float) -> None:
    """A value between two integers may be rounded differently."""
    pipe = quantized(config, "least")
    expected = reference(pipe)
    tgate_compile.optimize(pipe, GATE, backend="inductor")
    assert difference(run(pipe, steps=STEPS), expected) < most


def test_quanto() -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    pipe = stable_diffusion(layout="small")
    quanto.quantize(pipe.unet, weights=quanto.qint8)
    quanto.freeze(pipe.unet)
    expected = reference(pipe)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    assert torch.equal(run(pipe, steps=STEPS), expected)


def test_quanto_with_activations_is_refused() -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    pipe = stable_diffusion(layout="small")
    quanto.quantize(pipe.unet, weights=quanto.qint8, activations=quanto.qint8)
    with pytest.raises(UnsupportedModelError, match="optimum-quanto with its layers' inputs"):
        tgate_compile.optimize(pipe, GATE)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes_is_refused(kind: str) -> None:
    modules = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").nn
    pipe = stable_diffusion(layout="small")
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    layer = getattr(modules, kind)(attention.to_q.in_features, attention.to_q.out_features, bias=False)
    layer.load_state_dict(attention.to_q.state_dict(), strict=False)
    attention.to_q = layer.to("cpu").requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"bitsandbytes .*attn1\.to_q.* torchao"):
        tgate_compile.optimize(pipe, GATE)


def _weight_only() -> Any:
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
