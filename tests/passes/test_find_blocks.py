"""Residuals over ranges of transformer blocks, and the outputs of feed-forward modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch.export import Dim, ShapesCollection

from tests.comparing import ROUNDING, assert_differ, difference
from tests.joint_denoisers import DENOISERS
from tests.passes.tiny_denoiser import tiny_denoiser, tiny_inputs
from tests.tiny_pipelines import TEXT_DIM, _pixart_transformer, _unet
from tgate_compile import UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.methods.method import Blocks, Kind, Phase
from tgate_compile.passes.graphs import Captured, Variant
from tgate_compile.passes.specialize import specialize

BLOCKS = frozenset({"blocks"})
BOTH = frozenset({"blocks", "rear"})


def captured_of(denoiser: torch.nn.Module, call: dict[str, Any], kinds: Collection[Kind], **ranges: Blocks) -> Captured:
    pairs = tuple(sorted(ranges.items()))
    given = Call.of((), {**call, "return_dict": False})
    return capture(denoiser, denoiser.forward, given, frozenset(kinds), ranges=pairs)  # type: ignore[arg-type]


def results_of(variant: Variant, captured: Captured, call: dict[str, Any], caches: Sequence[Any] = ()) -> list[Any]:
    state = variant.program.state_dict | variant.program.constants
    leaves = Call.of((), {**call, "return_dict": False}).leaves
    inputs = dict(zip(captured.input_names, leaves, strict=True))
    with torch.no_grad():
        weights = [state[name] for name in variant.weights]
        return list(variant.program.graph_module(*weights, *(inputs[name] for name in variant.inputs), *caches))


def reused_after_itself(captured: Captured, call: dict[str, Any], kinds: frozenset[Kind]) -> tuple[Any, Any, Variant]:
    """Return the prediction of the whole graph, and that with the values that this graph has handed on."""
    full = specialize(captured, Phase(False, emit=kinds))
    results = results_of(full, captured, call)
    prediction, kept = results[0], results[captured.out_spec.num_leaves :]
    by_name = {(e.site.kind, e.site.name): value for e, value in zip(full.emitted, kept, strict=True)}
    skipping = specialize(captured, Phase(False, reuse=kinds))
    caches = [by_name[site.kind, site.name] for site in skipping.reused]
    return prediction, results_of(skipping, captured, call, caches)[0], skipping


def paths_in(weights: Collection[str]) -> set[str]:
    """Return the blocks that weights belong to."""
    parts = (name.split(".") for name in weights)
    return {".".join(part[:2]) for part in parts if len(part) > 1 and part[1].isdigit()}


def tiny_call(batch: int = 2) -> dict[str, Any]:
    return dict(zip(("sample", "timestep", "text"), tiny_inputs(batch), strict=True))


@pytest.mark.parametrize(
    ("chosen", "name", "left"),
    [
        (Blocks(1), "blocks.1-3", {"blocks.0"}),
        (Blocks(1, -1), "blocks.1-2", {"blocks.0", "blocks.3"}),
        (Blocks(0, 1), "blocks.0", {"blocks.1", "blocks.2", "blocks.3"}),
        (Blocks(-1), "blocks.3", {"blocks.0", "blocks.1", "blocks.2"}),
        (Blocks(), "blocks.0-3", set()),
    ],
)
def test_a_range_is_skipped(chosen: Blocks, name: str, left: set[str]) -> None:
    denoiser, call = tiny_denoiser(blocks=4), tiny_call()
    captured = captured_of(denoiser, call, BLOCKS, blocks=chosen)
    (site,) = captured.sites
    assert (site.kind, site.name, site.shape) == ("blocks", name, tuple(call["sample"].shape))
    prediction, again, skipping = reused_after_itself(captured, call, BLOCKS)
    assert torch.equal(prediction, denoiser(**call)[0])
    assert paths_in(skipping.weights) == left
    assert difference(again, prediction) <= ROUNDING


def test_the_residual_is_added_to_the_present_input() -> None:
    denoiser, call = tiny_denoiser(blocks=3), tiny_call()
    captured = captured_of(denoiser, call, BLOCKS, blocks=Blocks(1))
    (kept,) = results_of(specialize(captured, Phase(False, emit=BLOCKS)), captured, call)[1:]
    other = {**call, "sample": 2.0 * call["sample"]}
    with torch.no_grad():
        hidden = other["sample"] + denoiser.time(other["timestep"].float().reshape(1, 1))
        expected = denoiser.blocks[0](hidden, other["text"]) + kept
    skipping = specialize(captured, Phase(False, reuse=BLOCKS))
    assert torch.equal(results_of(skipping, captured, other, [kept])[0], expected)


def test_adjacent_ranges() -> None:
    denoiser, call = tiny_denoiser(blocks=4), tiny_call()
    captured = captured_of(denoiser, call, BOTH, blocks=Blocks(0, 2), rear=Blocks(-2))
    prediction, again, skipping = reused_after_itself(captured, call, BOTH)
    assert not paths_in(skipping.weights)
    assert difference(again, prediction) <= ROUNDING
    assert paths_in(specialize(captured, Phase(False, reuse=frozenset({"rear"}))).weights) == {"blocks.0", "blocks.1"}


STREAMS = {  # the sites of a range that begins with the second block
    "sd3": ["transformer_blocks.1-2"],
    "flux": ["transformer_blocks.1-single_transformer_blocks.1"],
}


@pytest.mark.parametrize("name", [pytest.param("sd3", marks=pytest.mark.sweep), "flux"])
def test_two_streams_of_which_one_is_used_afterwards(name: str) -> None:
    tiny = DENOISERS[name]
    denoiser, call = tiny.build(), tiny.call(2, 0)
    captured = captured_of(denoiser, call, BLOCKS, blocks=Blocks(1))
    assert [site.name for site in captured.sites] == STREAMS[name]
    assert captured.sites[0].shape[1] == tiny.image
    prediction, again, skipping = reused_after_itself(captured, call, BLOCKS)
    assert torch.equal(prediction, denoiser(**call)[0])
    assert paths_in(skipping.weights) == {"transformer_blocks.0"}
    assert difference(again, prediction) <= ROUNDING


def test_two_streams_that_are_both_used_afterwards() -> None:
    tiny = DENOISERS["flux"]
    denoiser, call = tiny.build(), tiny.call(2, 0)
    captured = captured_of(denoiser, call, BLOCKS, blocks=Blocks(1, -1))
    assert [site.shape[1] for site in captured.sites] == [tiny.text, tiny.image]
    assert len({site.name for site in captured.sites}) == 2
    prediction, again, skipping = reused_after_itself(captured, call, BLOCKS)
    assert paths_in(skipping.weights) == {"transformer_blocks.0", "single_transformer_blocks.1"}
    assert difference(again, prediction) <= ROUNDING


def test_a_stream_is_not_mistaken_for_another_of_the_same_length() -> None:
    tiny = DENOISERS["flux"]
    call = tiny.call(1, 0)
    text = {key: value[:, : tiny.text] for key, value in call.items() if key == "hidden_states"}
    same = {**call, **text, "img_ids": call["img_ids"][: tiny.text]}
    captured = captured_of(tiny.build(), same, BLOCKS, blocks=Blocks(1, -1))
    prediction, again, _ = reused_after_itself(captured, same, BLOCKS)
    assert difference(again, prediction) <= ROUNDING
    nodes = {node.name: node for node in captured.program.graph.nodes}
    assert len({nodes[site.base] for site in captured.sites if site.base}) == 2


def test_each_stack_of_a_unet() -> None:
    unet = _unet("small")
    call = {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 5, unet.config["cross_attention_dim"]),
    }  # fmt: skip
    captured = captured_of(unet, call, BLOCKS, blocks=Blocks())
    stacks = {name for name, _ in unet.named_modules() if name.endswith("transformer_blocks")}
    assert {site.name.rpartition(".")[0] for site in captured.sites} == stacks
    prediction, again, skipping = reused_after_itself(captured, call, BLOCKS)
    assert not any("transformer_blocks" in name for name in skipping.weights)
    assert difference(again, prediction) <= ROUNDING


def test_free_sizes() -> None:
    denoiser = tiny_denoiser(blocks=3)
    call = tiny_call(4)
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    given = Call.of((), {**call, "return_dict": False})
    batch = Dim("b", min=1, max=31)
    for leaf in (call["sample"], call["text"]):
        shapes[next(each for each in given.leaves if torch.is_tensor(each) and each.shape == leaf.shape)] = {0: batch}
    captured = capture(denoiser, denoiser.forward, given, BLOCKS, ranges=(("blocks", Blocks(1)),), shapes=shapes)
    prediction, again, _ = reused_after_itself(captured, tiny_call(3), BLOCKS)
    assert torch.equal(prediction, denoiser(**tiny_call(3))[0])
    assert difference(again, prediction) <= ROUNDING


def test_feed_forwards() -> None:
    denoiser = _pixart_transformer(False)
    captured = captured_of(denoiser, pixart_inputs(), {"ff"})
    assert [site.name for site in captured.sites] == ["transformer_blocks.0.ff", "transformer_blocks.1.ff"]
    prediction, again, skipping = reused_after_itself(captured, pixart_inputs(), frozenset({"ff"}))
    assert torch.equal(again, prediction)
    assert not any(".ff." in name for name in skipping.weights)
    assert_differ(
        results_of(skipping, captured, pixart_inputs(), [torch.zeros(s.shape) for s in captured.sites])[0], again
    )


def pixart_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, TEXT_DIM, generator=generator),
        "timestep": torch.tensor([7, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def test_feed_forwards_of_both_streams() -> None:
    tiny = DENOISERS["flux"]
    captured = captured_of(tiny.build(), tiny.call(1, 0), {"ff"})
    assert [site.name for site in captured.sites] == [
        f"transformer_blocks.{i}.{name}" for i in range(2) for name in ("ff", "ff_context")
    ]


@pytest.mark.parametrize(
    ("blocks", "chosen", "telling"),
    [
        (2, Blocks(2), "is empty: its stacks of transformer blocks have 2 blocks"),
        (0, Blocks(), "no stack of transformer"),
    ],
)
def test_what_cannot_be_skipped(blocks: int, chosen: Blocks, telling: str) -> None:
    with pytest.raises(UnsupportedModelError, match=telling):
        captured_of(tiny_denoiser(blocks=blocks), tiny_call(), BLOCKS, blocks=chosen)


class PostNorm(torch.nn.Module):
    """Normalizes what leaves its blocks, and hands on a value from the middle of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_denoiser(blocks=3)
        self.wider = torch.nn.Linear(8, 12)

    def forward(self, sample: Any, timestep: Any, text: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        hidden = self.inner.blocks[0](sample, text)
        middle = self.wider(self.inner.blocks[1](hidden, text))
        return (self.inner.blocks[2](middle[..., :8], text) + middle[..., 8:].repeat(1, 1, 2),)


def test_a_value_that_is_used_after_the_range_and_continues_no_input() -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="does not continue one of their inputs"):
        captured_of(PostNorm().eval(), tiny_call(), BLOCKS, blocks=Blocks(1))


@pytest.mark.sweep
@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_with_joint_attention(name: str) -> None:
    tiny = DENOISERS[name]
    call = tiny.call(2, 0)
    for chosen in (Blocks(), Blocks(1)):
        captured = captured_of(tiny.build(), call, BLOCKS, blocks=chosen)
        prediction, again, skipping = reused_after_itself(captured, call, BLOCKS)
        assert difference(again, prediction) <= ROUNDING, (chosen, [site.name for site in captured.sites])
        assert len(skipping.weights) < len(specialize(captured, Phase(False)).weights)
