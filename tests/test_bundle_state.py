"""A bundle is loaded only into a pipeline set up like the exported one, beyond its class and weights."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import tgate_compile
from tests.denoiser_cases import CASES
from tests.exported import exported, plain
from tests.tiny_pipelines import add_lora, load_ip_adapter, run, stable_diffusion
from tgate_compile import BundleError
from tgate_compile.bundle.denoiser_state import DenoiserState, state_of_denoiser, what_differs


class Doubling(AttnProcessor2_0):  # type: ignore[misc]
    """A custom attention processor."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = super().__call__(*args, **kwargs)
        return self.factor * result


def with_lora(scale: float = 1.0, active: str = "a") -> Any:
    """Return a pipeline with two adapters of the same shapes, one of them active."""
    pipe = plain()
    add_lora(pipe.unet, "a")
    add_lora(pipe.unet, "b", seed=11)
    pipe.unet.set_adapters([active], [scale])
    return pipe


@pytest.fixture(scope="module")
def of_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a bundle of `with_lora()`."""
    pipe = tgate_compile.optimize(with_lora(), 2, backend="eager")
    folder = tmp_path_factory.mktemp("lora") / "bundle"
    return tgate_compile.export(
        pipe, folder, call={"prompt": "", "num_inference_steps": 4, "height": 16, "width": 16}, dynamic=False
    )


def refused(pipe: Any, folder: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        tgate_compile.load(pipe, folder)
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(tgate_compile.ConfigurationError, match="not optimized"):
        tgate_compile.restore(pipe)


def test_the_same_adapters_load(of_lora: Path) -> None:
    call = {"steps": 4, "height": 16, "width": 16}
    expected = run(tgate_compile.optimize(with_lora(), 2, backend="eager"), **call)
    loaded = run(tgate_compile.load(with_lora(1), of_lora), **call)
    assert torch.allclose(loaded, expected, atol=1e-4)


def test_another_scale(of_lora: Path) -> None:
    refused(with_lora(0.2), of_lora, "adapter 'a' has scale 0.2 here and 1.0 in the bundle", str(of_lora), "unet")


def test_another_active_adapter(of_lora: Path) -> None:
    refused(with_lora(active="b"), of_lora, "the active adapter", "is b here and a in the bundle")


def test_adapters_that_are_off(of_lora: Path) -> None:
    pipe = with_lora()
    pipe.unet.disable_adapters()
    refused(pipe, of_lora, "disabling of adapters", "on here")


def test_no_adapters_at_all(of_lora: Path) -> None:
    refused(plain(), of_lora, "adapter 'a' is not here and has scale 1.0 in the bundle")
    refused(with_lora(), exported(), "adapter 'a' has scale 1.0 here and is not in the bundle")


def freeu(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def other_freeu(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.6)


def no_freeu(unet: Any) -> None:
    freeu(unet)
    unet.disable_freeu()


def own_processor(unet: Any) -> None:
    unet.set_attn_processor(Doubling())


def own_processor_of_three(unet: Any) -> None:
    unet.set_attn_processor(Doubling(3.0))


def dropout(unet: Any) -> None:
    unet.mid_block.resnets[0].dropout.p = 0.1
    unet.train()


def hook(unet: Any) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, output: output * 2)


def other_hook(unet: Any) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, output: output * 3)


def hook_with_a_closure(unet: Any, factor: float = 2.0) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, output: output * factor)


def hook_with_another_closure(unet: Any) -> None:
    hook_with_a_closure(unet, 3.0)


def patched_forward(unet: Any) -> None:
    own = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: own(*args, **kwargs) * 2


def patched_root(unet: Any) -> None:
    own = unet.forward
    unet.forward = lambda *args, **kwargs: own(*args, **kwargs)


def number(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.rescale_output_factor = 2.0


def activation(unet: Any) -> None:
    unet.conv_act = torch.nn.ReLU()


def table(unet: Any) -> None:
    unet.time_proj.table = torch.linspace(0, 1, 5)


def other_table(unet: Any) -> None:
    unet.time_proj.table = torch.linspace(1, 0, 5)


def dropped(unet: Any) -> None:
    unet.mid_block.resnets[0].nonlinearity = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (freeu, "FreeU's b1 of up_blocks.0 is 1.5 here and not set in the bundle"),
        (own_processor, "the attention processor of down_blocks.0.attentions.0.transformer_blocks.0.attn1 and 3 more"),
        (dropout, "training mode"),
        (hook, "the forward hook of mid_block"),
        (patched_forward, "the forward of mid_block"),
        (patched_root, "the forward is"),
        (number, "rescale_output_factor of mid_block.attentions.0.transformer_blocks.0.attn1 is 2.0 here"),
        (activation, "the class of conv_act is torch:ReLU here"),
        (dropped, "the class of mid_block.resnets.0.nonlinearity is torch:Identity here"),
    ],
)
def test_a_changed_denoiser_is_refused(change: Callable[[Any], None], words: str) -> None:
    pipe = plain()
    change(pipe.unet)
    refused(pipe, exported(), words)


def test_another_configuration_with_the_same_weights() -> None:
    pipe = plain()
    pipe.unet.register_to_config(flip_sin_to_cos=False)
    refused(pipe, exported(), "flip_sin_to_cos is False here and True in the bundle")


def state_after(change: Callable[[Any], None]) -> DenoiserState:
    unet = plain().unet
    change(unet)
    return state_of_denoiser(unet)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (freeu, other_freeu, "FreeU's b1 of up_blocks.0 is 1.5 here and 1.1 in the bundle"),
        (own_processor, own_processor_of_three, "'factor': 2.0"),
        (hook, other_hook, "the forward hook of mid_block"),
        (hook_with_a_closure, hook_with_another_closure, "the forward hook of mid_block"),
        (table, other_table, "table of time_proj is float32[5]"),
    ],
)
def test_settings_differ(one: Callable[[Any], None], other: Callable[[Any], None], words: str) -> None:
    differs = what_differs(state_after(one), state_after(other))
    assert words in "; ".join(differs)
    assert what_differs(state_after(one), state_after(one)) == []


def test_scale_of_an_ip_adapter() -> None:
    pipe = plain()
    load_ip_adapter(pipe)
    before = state_of_denoiser(pipe.unet)
    pipe.set_ip_adapter_scale(0.1)
    (words,) = what_differs(state_of_denoiser(pipe.unet), before)
    assert words.startswith(
        "scale of down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor and 1 more is 0.1"
    )
    pipe.set_ip_adapter_scale(0.8)
    assert what_differs(state_of_denoiser(pipe.unet), before) == []


def nothing(unet: Any) -> None:
    pass


def run_once(unet: Any) -> None:
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), torch.tensor(1), torch.randn(1, 16, 32))


def trained(unet: Any) -> None:
    unet.requires_grad_(True)
    unet.enable_gradient_checkpointing()


def the_usual_processor(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor2_0())


def hook_on_the_denoiser(unet: Any) -> None:
    unet.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize("change", [nothing, run_once, no_freeu, trained, the_usual_processor, hook_on_the_denoiser])
def test_nothing_to_record(change: Callable[[Any], None]) -> None:
    assert state_after(change) == DenoiserState("config", ())


@pytest.mark.parametrize("name", list(CASES))
def test_a_generation_leaves_the_state_as_it_is(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    before = [state_of_denoiser(getattr(pipe, component)) for component in case.denoisers]
    pipe(**case.call(1), num_inference_steps=2, output_type="latent")
    after = [state_of_denoiser(getattr(pipe, component)) for component in case.denoisers]
    assert after == before
    assert {state.baseline for state in after} == {"config"}


def test_the_caller_draws_the_same_numbers() -> None:
    unet = plain().unet
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    state_of_denoiser(unet)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_is_not_made_from_a_configuration() -> None:
    one = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)).eval()
    state = state_of_denoiser(one)
    assert state.baseline == "none"
    other: Any = copy.deepcopy(one)
    assert what_differs(state_of_denoiser(other), state) == []
    other[1].p = 0.2
    assert what_differs(state_of_denoiser(other), state) == ["p of 1 is 0.2 here and 0.1 in the bundle"]


@pytest.mark.heavy
def test_it_is_the_same_in_every_process() -> None:
    def recorded() -> DenoiserState:
        pipe = with_lora(0.3)
        load_ip_adapter(pipe)
        freeu(pipe.unet)
        hook_with_a_closure(pipe.unet)
        pipe.unet.mid_block.attentions[0].names = {"one", "two", "three", "four"}
        return state_of_denoiser(pipe.unet)

    code = (
        "import json; from dataclasses import asdict; from tests.test_bundle_state import *; "
        "pipe = with_lora(0.3); load_ip_adapter(pipe); freeu(pipe.unet); hook_with_a_closure(pipe.unet); "
        "pipe.unet.mid_block.attentions[0].names = {'one', 'two', 'three', 'four'}; "
        "print(json.dumps(asdict(state_of_denoiser(pipe.unet))))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(asdict(recorded())))


def test_it_is_small(of_lora: Path) -> None:
    """A value is reported once for all modules that have it."""
    state = json.loads((of_lora / "manifest.json").read_text())["denoiser"]["state"]
    assert len(json.dumps(state)) < 6000
    manifest = json.loads((exported() / "manifest.json").read_text())
    assert manifest["denoiser"]["state"] == {"baseline": "config", "differences": []}


def test_a_bundle_without_a_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(exported(), tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["denoiser"]["state"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING, logger="tgate_compile"):
        tgate_compile.load(plain(), folder)
    (record,) = caplog.records
    assert "did not record LoRA scales" in record.getMessage()
    pipe = stable_diffusion(layout="small")
    add_lora(pipe.unet)
    refused(pipe, folder, "other weights")


def test_a_change_after_loading_is_named() -> None:
    pipe = tgate_compile.load(plain(), exported())
    freeu(pipe.unet)
    with pytest.raises(BundleError, match=r"changed since .*FreeU's s1 of up_blocks\.0 is 0\.9 here and not set then"):
        run(pipe)
    pipe.unet.disable_freeu()
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(
        BundleError, match=r"attention processor .*AttnProcessor here and diffusers:AttnProcessor2_0 then"
    ):
        run(pipe)
