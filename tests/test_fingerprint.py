"""Changes that make a captured graph stale, and changes that do not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor

from tests.tiny_pipelines import add_lora, load_ip_adapter, stable_diffusion
from tgate_compile.engine.weights import Watch, fingerprint, live_tensors
from tgate_compile.study.architectures import MODELS


def unet_with_lora() -> Any:
    unet = stable_diffusion(layout="small").unet
    add_lora(unet)
    return unet


def nothing(unet: Any) -> None:
    pass


def values_in_place(unet: Any) -> None:
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(2)


def data_replaced(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()


def parameter_replaced(unet: Any) -> None:
    unet.conv_in.weight = torch.nn.Parameter(unet.conv_in.weight.detach().clone())


def grad_wanted(unet: Any) -> None:
    unet.requires_grad_(True)


def run_once(unet: Any) -> None:
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), torch.tensor(1), torch.randn(1, 16, 32))


def hooked(unet: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(unet).register_hook(ModelHook(), "ours")


@pytest.mark.parametrize(
    "change", [nothing, values_in_place, data_replaced, parameter_replaced, grad_wanted, run_once, hooked]
)
def test_the_graph_still_holds(change: Callable[[Any], None]) -> None:
    unet = unet_with_lora()
    before, watch = fingerprint(unet), Watch(unet)
    change(unet)
    after = fingerprint(unet)
    assert after == before
    assert hash(after) == hash(before)
    watch.refresh()
    assert watch.fingerprint == before
    assert is_live(watch, unet)
    assert watch.refresh()


def is_live(watch: Watch, unet: Any) -> bool:
    """Return whether the watch has the present tensors."""
    live = live_tensors(unet)
    return list(watch.live) == list(live) and all(watch.live[name] is tensor for name, tensor in live.items())


def lora_scale(unet: Any) -> None:
    unet.set_adapters("default", 0.5)


def lora_off(unet: Any) -> None:
    unet.disable_adapters()


def lora_more(unet: Any) -> None:
    add_lora(unet, "other")


def lora_fused(unet: Any) -> None:
    unet.fuse_lora()


def lora_gone(unet: Any) -> None:
    unet.delete_adapters("default")


def processors(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor())


def one_processor(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())


def fused_qkv(unet: Any) -> None:
    unet.fuse_qkv_projections()


def freeu(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def dtype(unet: Any) -> None:
    unet.to(torch.bfloat16)


def device(unet: Any) -> None:
    unet.to("meta")


def layout(unet: Any) -> None:
    unet.to(memory_format=torch.channels_last)


def training(unet: Any) -> None:
    unet.train()


def module_replaced(unet: Any) -> None:
    unet.conv_act = torch.nn.ReLU()


def number_changed(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.rescale_output_factor = 2.0


def forward_replaced(unet: Any) -> None:
    unet.mid_block.forward = lambda sample, *args, **kwargs: sample


def torch_hook(unet: Any) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, output: output * 2)


def weight_of_other_shape(unet: Any) -> None:
    unet.conv_in = torch.nn.Conv2d(9, 32, 3, padding=1)


@pytest.mark.parametrize(
    "change",
    [
        lora_scale,
        lora_off,
        lora_more,
        lora_fused,
        lora_gone,
        processors,
        one_processor,
        fused_qkv,
        freeu,
        dtype,
        device,
        layout,
        training,
        module_replaced,
        number_changed,
        forward_replaced,
        torch_hook,
        weight_of_other_shape,
    ],
)
def test_the_graph_is_out_of_date(change: Callable[[Any], None]) -> None:
    unet = unet_with_lora()
    before, watch = fingerprint(unet), Watch(unet)
    assert watch.fingerprint == before
    assert watch.refresh()
    change(unet)
    after = fingerprint(unet)
    assert after != before
    assert not watch.refresh()
    assert watch.fingerprint == after
    assert is_live(watch, unet)
    assert watch.refresh() or change in FOREIGN


#: Changes that bring foreign code into the model, which may read values from anywhere: nothing counts as unchanged.
FOREIGN = (forward_replaced, torch_hook)


def test_scale_of_an_ip_adapter() -> None:
    pipe = stable_diffusion(layout="small")
    load_ip_adapter(pipe)
    before = fingerprint(pipe.unet)
    pipe.set_ip_adapter_scale(0.1)
    assert fingerprint(pipe.unet) != before
    pipe.set_ip_adapter_scale(0.8)
    assert fingerprint(pipe.unet) == before


def test_equal_models_have_equal_fingerprints() -> None:
    assert fingerprint(unet_with_lora()) == fingerprint(unet_with_lora())


class Holder:
    """An object that holds a list, as attention processors hold their settings."""

    def __init__(self) -> None:
        self.settings = [{"scale": 1.0}]


def test_a_change_deep_inside_is_noticed() -> None:
    unet = stable_diffusion(layout="small").unet
    unet.mid_block.holder = holder = Holder()
    unet.mid_block.table = table = torch.ones(3)
    watch = Watch(unet)
    for change in (
        lambda: holder.settings[0].update(scale=2.0),
        lambda: holder.settings.append({}),
        lambda: setattr(holder, "other", 1),
        lambda: table.mul_(2),
        lambda: unet.mid_block._modules.update(attentions=unet.mid_block._modules.pop("attentions")),
    ):
        assert watch.refresh()
        before = watch.fingerprint
        change()
        assert not watch.refresh()
        assert watch.fingerprint != before
        assert watch.fingerprint == fingerprint(unet)
    same_memory = unet.conv_in.weight.data
    unet.conv_in.weight = torch.nn.Parameter(same_memory)  # at the same address, but another object
    assert not watch.refresh()
    assert is_live(watch, unet)


def test_patches_of_classes_and_functions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = stable_diffusion(layout="small").unet
    watch = Watch(unet)
    before = watch.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: args[0])
        assert not watch.refresh()
        assert watch.fingerprint != before
    assert not watch.refresh()
    assert watch.refresh()
    with monkeypatch.context() as patch:
        patch.setattr(type(unet.mid_block), "forward", lambda self, sample, *args, **kwargs: sample)
        assert not watch.refresh()
        assert watch.fingerprint != before
        assert not watch.refresh()  # it is foreign code now
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    watch.refresh()
    assert watch.fingerprint != before
    hook.remove()
    watch.refresh()
    assert watch.fingerprint == before


def calls_in(run: Callable[[], object]) -> int:
    """Return how many functions of Python `run` calls: a measure of its time that a busy machine does not change."""
    calls = 0

    def count(frame: Any, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def test_a_large_model_is_compared_in_a_fraction_of_the_work() -> None:
    with torch.device("meta"):
        unet = MODELS["sdxl"].architecture.denoiser(**MODELS["sdxl"].architecture.config)
    watch = Watch(unet)
    assert watch.refresh()
    assert calls_in(watch.refresh) < calls_in(lambda: (hash(fingerprint(unet)), live_tensors(unet))) / 4


def test_the_work_is_in_proportion_to_the_model() -> None:
    # It runs once per image: the number of calls per module must not grow with the number of modules.
    def per_module(model: torch.nn.Module) -> float:
        return calls_in(lambda: fingerprint(model)) / len(list(model.modules()))

    unet = unet_with_lora()
    fingerprint(unet)
    with torch.device("meta"):
        large = MODELS["sdxl"].architecture.denoiser(**MODELS["sdxl"].architecture.config)
    fingerprint(large)
    assert per_module(large) < 2 * per_module(unet)
