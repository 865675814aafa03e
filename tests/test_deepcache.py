"""DeepCache on SDXL against plain hooks that pass an older step's feature to the layer above the deep part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.hook_reference import hook_reference
from tests.tiny_pipelines import PROMPTS, run, sdxl, stable_diffusion

STEPS = 8


@contextmanager
def replayed(pipe: Any, layer: str, computed: set[int]) -> Iterator[None]:
    """Replace the deep feature that enters `layer` by that of the last step of `computed`; still run everything."""
    unet = pipe.unet
    resnet = unet.get_submodule(layer)
    feature: list[torch.Tensor] = []
    step = -1

    def count(module: Any, args: Any) -> None:
        nonlocal step
        step += 1

    def replace(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        joined, *others = args
        below = joined.shape[1] - _skip_channels(unet, layer)
        if step in computed:
            feature[:] = [joined[:, :below]]
        return (torch.cat([feature[0], joined[:, below:]], dim=1), *others)

    handles = [
        unet.conv_in.register_forward_pre_hook(count),
        resnet.register_forward_pre_hook(replace),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _skip_channels(unet: Any, layer: str) -> int:
    """Return the channels of the skip connection that joins at an up layer, as the UNet computes them."""
    _, block, _, index = layer.split(".")
    channels = list(unet.config.block_out_channels)[::-1]
    last = int(index) == len(unet.up_blocks[int(block)].resnets) - 1
    skip = channels[min(int(block) + 1, len(channels) - 1)] if last else channels[int(block)]
    return int(skip)


# The up blocks have two layers each but three branches, so every third branch has no layer.
BRANCHES = {0: "up_blocks.1.resnets.1", 1: "up_blocks.1.resnets.0", 3: "up_blocks.0.resnets.1"}


@pytest.mark.parametrize(
    ("branch", "interval"),
    [
        *((0, 2), (1, 3), (3, 2)),
        *(pytest.param(*case, marks=pytest.mark.heavy) for case in ((0, 3), (1, 2), (3, 3))),
    ],
)
def test_sdxl(branch: int, interval: int) -> None:
    pipe = sdxl()
    plain = run(pipe, PROMPTS, steps=STEPS)
    with replayed(pipe, BRANCHES[branch], set(range(0, STEPS, interval))):
        expected = run(pipe, PROMPTS, steps=STEPS)
    tgate_compile.optimize(pipe, None, deepcache_interval=interval, deepcache_branch=branch, backend="eager")
    assert_same(run(pipe, PROMPTS, steps=STEPS), expected)
    assert_same(run(pipe, PROMPTS, steps=STEPS), expected)
    assert_differ(expected, plain)


def test_sdxl_with_tgate() -> None:
    """The deep part is computed at the step before the gate, at the gate, and every third step from there."""
    pipe, gate = sdxl(), 4
    computed = {0, 3, 4, 7}
    with hook_reference(pipe, gate, interleaved=True), replayed(pipe, BRANCHES[0], computed):
        expected = run(pipe, steps=STEPS)
    tgate_compile.optimize(pipe, gate, deepcache_interval=3, backend="eager")
    assert_same(run(pipe, steps=STEPS), expected)
    assert tgate_compile.describe(pipe).strip == "FDDFprrp"


def test_the_deep_part_is_not_computed() -> None:
    pipe = sdxl()
    tgate_compile.optimize(pipe, None, deepcache_interval=3, backend="eager")
    run(pipe, steps=STEPS)
    full, shallow = tgate_compile.describe(pipe).variants
    assert (full.name, shallow.name) == ("full", "shallow")
    assert shallow.macs < 0.5 * full.macs
    assert shallow.parameters < 0.5 * full.parameters


def test_without_guidance() -> None:
    pipe = stable_diffusion(layout="small")
    call = {"steps": STEPS, "guidance_scale": 1.0}
    with replayed(pipe, "up_blocks.0.resnets.1", {0, 2, 4, 6}):
        expected = run(pipe, **call)
    tgate_compile.optimize(pipe, None, deepcache_interval=2, backend="eager")
    assert_same(run(pipe, **call), expected)
    assert tgate_compile.describe(pipe).strip == "fdfdfdfd"
