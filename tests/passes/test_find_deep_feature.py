"""The deep feature of a UNet, and the rest of the UNet when that comes from a cache."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from tgate_compile import ConfigurationError, UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture, deep_layer
from tgate_compile.methods.method import Phase
from tgate_compile.passes.find_sites import find_deep_feature
from tgate_compile.passes.graphs import Captured
from tgate_compile.passes.specialize import specialize


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def _capture(unet: UNet2DConditionModel, branch: int) -> Captured:
    call = Call.of(
        (torch.randn(2, 4, 8, 8), torch.tensor(7)),
        {"encoder_hidden_states": torch.randn(2, 3, 8), "return_dict": False},
    )
    return capture(unet, unet.forward, call, ("deep",), deep_layer(unet, branch))


@pytest.mark.parametrize(("branch", "layer"), [(0, "up_blocks.1.resnets.1"), (1, "up_blocks.1.resnets.0")])
def test_the_feature_from_below_is_the_site(unet: UNet2DConditionModel, branch: int, layer: str) -> None:
    captured = _capture(unet, branch)
    (site,) = captured.sites
    assert (site.kind, site.name) == ("deep", layer)
    assert site.shape == (2, 8 if branch == 0 else 16, 8, 8)


@pytest.mark.parametrize("branch", [0, 1])
@torch.no_grad()
def test_reusing_it_leaves_the_shallow_part_alone(unet: UNet2DConditionModel, branch: int) -> None:
    captured = _capture(unet, branch)
    full = specialize(captured, Phase(True, emit=frozenset({"deep"})))
    shallow = specialize(captured, Phase(True, reuse=frozenset({"deep"})))
    state = unet.state_dict()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 3, 8))
    prediction, feature = full.program.graph_module(*(state[name] for name in full.weights), *inputs)
    arguments = {"sample": inputs[0], "timestep": inputs[1], "encoder_hidden_states": inputs[2]}
    again = shallow.program.graph_module(
        *(state[name] for name in shallow.weights), *(arguments[name] for name in shallow.inputs), feature
    )
    assert torch.equal(again[0], prediction)
    kept = {name.split(".resnets")[0].split(".attentions")[0] for name in shallow.weights}
    assert not kept & {"mid_block.", "mid_block", "down_blocks.1", "up_blocks.0"}
    assert ("down_blocks.0" in kept) == (branch == 1)


def test_a_layer_without_a_skip_connection_is_refused(unet: UNet2DConditionModel) -> None:
    captured = _capture(unet, 0)
    with pytest.raises(UnsupportedModelError, match=r"'mid_block\.resnets\.0' joins"):
        find_deep_feature(captured.program.graph_module, "mid_block.resnets.0")


def test_a_branch_that_is_not_there_is_refused(unet: UNet2DConditionModel) -> None:
    assert deep_layer(unet, 3) == "up_blocks.0.resnets.1"
    for branch in (2, 6):
        with pytest.raises(ConfigurationError, match=f"deepcache_branch={branch} does not exist"):
            deep_layer(unet, branch)
    with pytest.raises(UnsupportedModelError, match="needs a UNet"):
        deep_layer(torch.nn.Linear(1, 1), 0)
