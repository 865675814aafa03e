"""`describe` against numbers counted by other means."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tgate_compile
from tests.tiny_pipelines import (
    PROMPTS,
    latent_consistency,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd1": (stable_diffusion, {"prompt": PROMPTS}),
    "sdxl": (sdxl, {}),
    "pixart": (pixart, pixart_prompt()),
    "lcm": (latent_consistency, {}),
}


def denoiser_of(pipe: Any) -> Any:
    return pipe.transformer if "transformer" in pipe.components else pipe.unet


class HookCounter:
    """Multiply-accumulates of a plain denoiser while it runs, in total and inside its cross-attentions.

    Attributes:
        layers: counts of linear and convolution layers, [all, in cross-attentions].
        attention: counts of the attentions' matrix products, [all, in cross-attentions].
    """

    def __init__(self, denoiser: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers = [0, 0]
        self.attention = [0, 0]
        self.running: list[torch.nn.Module] = []
        self.denoiser = denoiser
        for name, module in denoiser.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.register_forward_hook(self.count_layer)
            if module is denoiser or name.endswith("attn2"):
                module.register_forward_pre_hook(lambda module, args: self.running.append(module))
                module.register_forward_hook(lambda module, args, output: self.running.remove(module))
        original = torch.nn.functional.scaled_dot_product_attention

        def counted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            batch, heads, queries, width = query.shape
            if self.running:  # the text encoder also has attentions
                self.add(self.attention, 2 * batch * heads * queries * key.shape[2] * width)
            return original(query, key, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)

    def count_layer(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.add(self.layers, output.numel() * module.weight[0].numel())

    def add(self, counts: list[int], products: int) -> None:
        counts[0] += products
        counts[1] += products if len(self.running) > 1 else 0


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, call = CASES[name]
    pipe = build()
    denoiser = denoiser_of(pipe)
    guided = name != "lcm"

    tgate_compile.optimize(pipe, 1, backend="eager")
    run(pipe, **{**call, "steps": 2})
    description = tgate_compile.describe(pipe)
    full, pruned = description.variants

    # Sites: by diffusers' names of its cross-attentions.
    assert set(description.sites) == {name for name, _ in denoiser.named_modules() if name.endswith("attn2")}
    assert len(set(description.sites)) == len(description.sites)

    # Parameters: all, and all except those of the cross-attentions, of the norms before them (PixArt's block has one
    # norm for its feed-forward, also called norm2, which stays), and of the projection of the text.
    parameters = {name: p.numel() for name, p in denoiser.named_parameters()}
    assert description.parameters == full.parameters == sum(parameters.values())
    is_pixart = name == "pixart"
    gone = [
        name
        for name in parameters
        if ".attn2." in name
        or ((".norm2." in name and not is_pixart) and "transformer_blocks" in name)
        or "caption_projection" in name
    ]
    assert gone
    assert pruned.parameters == full.parameters - sum(parameters[name] for name in gone)

    # Batches.
    batch = 2 if call.get("prompt") == PROMPTS else 1
    assert (full.name, pruned.name) == ("full", "pruned")
    assert (full.batch, pruned.batch) == ((2 * batch, batch) if guided else (batch, batch))
    assert full.latents == (full.batch, 4, 8, 8)
    assert pruned.latents == (pruned.batch, 4, 8, 8)
    assert full.dtype == pruned.dtype == "float32"

    # Nodes.
    assert full.nodes > pruned.nodes > 50

    # Multiply-accumulates: a full step has the plain model's; a pruned one has them at half the batch, and
    # without those of the cross-attentions and PixArt's projection of the text (its batch is 1 here).
    tgate_compile.restore(pipe)
    counter = HookCounter(denoiser, monkeypatch)
    run(pipe, **{**call, "steps": 2})
    (layers, cross_layers), (attention, cross_attention) = counter.layers, counter.attention
    assert full.macs == layers // 2
    assert full.macs_total == (layers + attention) // 2
    half = 2 if guided else 1
    projection = sum(
        module.weight.numel() * call["prompt_embeds"].shape[1]
        for name, module in denoiser.named_modules()
        if "caption_projection" in name and isinstance(module, torch.nn.Linear)
    )
    assert cross_layers > 0
    assert pruned.macs == (layers - cross_layers) // 2 // half - projection
    assert pruned.macs_total - pruned.macs == (attention - cross_attention) // 2 // half

    # Caches: one value per site, for one half.
    expected = cache_bytes(denoiser, description.sites, pipe, call) // half
    assert full.cache_bytes == pruned.cache_bytes == expected


def cache_bytes(denoiser: Any, sites: tuple[str, ...], pipe: Any, call: dict[str, Any]) -> int:
    """Count the bytes of the outputs of all cross-attentions of the plain model."""
    sizes: dict[str, int] = {}
    handles = [
        denoiser.get_submodule(site).register_forward_hook(
            lambda module, args, output, site=site: sizes.__setitem__(site, output.numel() * output.element_size())
        )
        for site in sites
    ]
    run(pipe, **{**call, "steps": 2})
    for handle in handles:
        handle.remove()
    return sum(sizes.values())


def test_caches_have_the_described_size() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    sizes = []

    def measure(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        sizes.append(pipe._tgate_compile.hook._hook._active._caches.nbytes)
        return tensors

    run(pipe, callback_on_step_end=measure)
    full, pruned = tgate_compile.describe(pipe).variants
    assert sizes[:2] == [0, 0], "nothing is kept that will not be reused"
    assert set(sizes[2:]) == {full.cache_bytes} == {pruned.cache_bytes}


def test_half_precision_halves_the_caches() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    run(pipe)
    before = tgate_compile.describe(pipe).variants
    pipe.to(torch.bfloat16)
    run(pipe)
    after = tgate_compile.describe(pipe).variants
    assert [v.dtype for v in after] == ["bfloat16", "bfloat16"]
    assert [v.cache_bytes for v in after] == [v.cache_bytes // 2 for v in before]
    assert [v.macs for v in after] == [v.macs for v in before]


def test_before_the_first_call() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 0.4, keep="cond", backend="eager")
    description = tgate_compile.describe(pipe)
    assert description.pipeline == "StableDiffusionPipeline"
    assert description.denoiser == "UNet2DConditionModel"
    assert (description.backend, description.gate_step, description.keep) == ("eager", 0.4, "cond")
    assert description.sites == description.variants == description.last_steps == ()
    assert description.strip == ""
    assert "call the pipeline once" in str(description)


def test_steps_of_the_last_call() -> None:
    from diffusers import HeunDiscreteScheduler

    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager")
    run(pipe, steps=4)
    steps = tgate_compile.describe(pipe).last_steps
    assert steps == ((0, "full"), (1, "full"), (2, "pruned"), (3, "pruned"))
    pipe.scheduler = HeunDiscreteScheduler()
    run(pipe, steps=3)
    description = tgate_compile.describe(pipe)
    assert description.last_steps == ((0, "full"), (0, "full"), (1, "full"), (1, "full"), (2, "pruned"))
    assert description.strip == "FFp"
    run(pipe, steps=3, gate_step=1000)
    assert tgate_compile.describe(pipe).strip == "FFF"


def test_printed_and_as_data() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 2, backend="eager")
    run(pipe, steps=4)
    description = tgate_compile.describe(pipe)
    page = str(description)
    for part in ("StableDiffusionPipeline", "UNet2DConditionModel", "gate step 2", "eager", *description.sites):
        assert part in page
    for variant in description.variants:
        assert variant.name in page
        assert "x".join(map(str, variant.latents)) in page
        assert f"{variant.macs / 1e9:.3f}" in page
    assert "FFpp" in page
    data = json.loads(json.dumps(description.as_dict()))
    assert data["strip"] == "FFpp"
    assert data["variants"][1]["name"] == "pruned"
    assert data["sites"] == list(description.sites)
