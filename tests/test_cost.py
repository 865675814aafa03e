"""The costs of the real models, computed from their graphs on the meta device; no weights are ever allocated.

One test per model checks everything that needs its captures: they take seconds, and only one process shares them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from tgate_compile import AdaptiveGuidance, BlockCache, DeltaDiT, FasterCache, Fora, MagCache, Method
from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.methods.method import Phase
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.architectures import JOINT_MODELS, MODELS, Architecture, Geometry, Model, model_named
from tgate_compile.study.cost import (
    NOTE_BRANCH,
    NOTE_GATE,
    NOTE_GUIDANCE,
    binding_times,
    graph_cost,
    image_cost,
    paper_tables,
    schedule_of,
)

# The paper's counts in millions, and their tolerances. Its SD-2.1 is an eighth of a million smaller than the model,
# and its SDXL two and a half million larger, both before and after the gate: the removed parameters agree.
PARAMETERS = paper_tables()["params_millions"]
PARAMETERS_WITHIN = {"sd15": 3e-6, "sd21": 2e-4, "sdxl": 1.2e-3, "pixart_alpha": 3e-6}

# The figures in docs/evidence/costs.md, from `tgate-compile report --paper --json`, and their units.
KEPT = json.loads((Path(__file__).parents[1] / "docs" / "results" / "costs.json").read_text(encoding="utf-8"))
# The figures of `tgate-compile report --binding-times --json`, by model.
BINDING_TIMES = {
    row["model"]: row
    for row in json.loads(
        (Path(__file__).parents[1] / "docs" / "results" / "binding_times.json").read_text(encoding="utf-8")
    )
}
COUNTED = (
    ("ours_macs_t", 1e12),
    ("ours_macs_with_attention_t", 1e12),
    ("ours_params_m", 1e6),
    ("ours_params_at_end_m", 1e6),
)

# The largest shares of the parameters, in percent, that graphs without the text's tokens may read.
PRUNED_SHARES = {
    "sd35_large": 51,
    "flux1_dev": 73,
    "qwen_image": 50,
}

# Models with the same captures are grouped.
# Those after the first run with --heavy, and those that have a denoiser of a class before them with --sweep.
GROUPS = [("sd15",), ("sdxl",), ("pixart_alpha", "lcm_pixart_alpha"), ("sd21",), ("pixart_sigma",), ("lcm_sdxl",)]
MARKS: Mapping[tuple[str, ...], pytest.MarkDecorator] = {
    **dict.fromkeys(GROUPS[1:3], pytest.mark.heavy),
    **dict.fromkeys(GROUPS[3:], pytest.mark.sweep),
}


def test_no_row_is_left_out() -> None:
    rows = paper_tables()["rows"]
    assert len(rows) == 21
    assert {row["model"] for row in rows} == {name for group in GROUPS for name in group} == set(MODELS)


@pytest.mark.parametrize(
    "names",
    [pytest.param(names, id="+".join(names), marks=MARKS.get(names, ())) for names in GROUPS],
)
def test_the_papers_rows(names: tuple[str, ...]) -> None:
    for row, kept in zip(paper_tables()["rows"], KEPT, strict=True):
        if row["model"] not in names:
            continue
        schedule, _ = schedule_of(row)
        cost = image_cost(MODELS[row["model"]], schedule, steps=row.get("steps"))
        assert cost.macs / 1e12 == pytest.approx(row["macs_t"], rel=1e-3), row
        assert cost.macs_with_attention > cost.macs
        counted = (cost.macs, cost.macs_with_attention, cost.parameters, cost.parameters_at_end)
        assert [kept["model"], *counted] == [row["model"], *(pytest.approx(kept[key] * unit) for key, unit in COUNTED)]
        if row["model"] in PARAMETERS:
            expected = PARAMETERS[row["model"]]["pruned" if "tgate" in row["method"] else "full"]
            assert cost.parameters / 1e6 == pytest.approx(expected, rel=PARAMETERS_WITHIN[row["model"]]), row
    for name in names:
        model = MODELS[name]
        assert _full_step(model).layers == _counted_by_hooks(model.architecture, 2 if model.guided else 1)
        # Only dropping guidance, the baseline for all other savings.
        if model.guided:
            full, half = image_cost(model, None, guided=True), image_cost(model, None, guided=False)
            dropped = image_cost(model, Schedule(None, guidance_step=10))
            assert (full.macs, dropped.macs) == (2 * half.macs, half.macs * 35 // 25)
            assert dropped.parameters == full.parameters
    if "sdxl" in names:
        _check_what_the_deepcache_rows_are_not()
    if names[0] in BINDING_TIMES:
        _check_binding_times(names[0])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.heavy if name == "sd35_large" else pytest.mark.sweep)
        for name in JOINT_MODELS
    ],
)
def test_models_with_joint_attention(name: str) -> None:
    """The text's share of the parameters is gone after the gate; its share of the work depends on the sizes."""
    model = JOINT_MODELS[name]
    _check_binding_times(name)
    everything = round(BINDING_TIMES[name]["params_b"] * 1e9)
    gated, dropped = image_cost(model, Schedule(0.4)), image_cost(model, Schedule(None, guidance_step=0.4))
    assert gated.parameters == gated.parameters_at_end < dropped.parameters <= everything
    assert gated.macs < dropped.macs
    share = round(100 * gated.parameters / everything)
    assert share <= PRUNED_SHARES.get(name, 99)


def _check_binding_times(name: str) -> None:
    row, times = BINDING_TIMES[name], binding_times({**MODELS, **JOINT_MODELS}[name])
    counts = (times.parameters, times.prompt, times.timestep, times.step, times.unread)
    kept = [row[f"{key}_b"] for key in ("params", "prompt", "timestep", "step", "unread")]
    assert [count / 1e9 for count in counts] == pytest.approx(kept)
    assert times.parameters == times.prompt + times.timestep + times.step
    assert [times.prelude_bytes / 1e6, times.row_bytes / 1e6] == pytest.approx([row["prelude_mb"], row["row_mb"]])
    assert (times.pruned_step or 0) / 1e9 == pytest.approx(row.get("pruned_step_b", 0))


def _full_step(model: Model) -> Any:
    size = model.architecture.size
    return graph_cost(
        model.architecture, Geometry(2 if model.guided else 1, size, size), Phase(model.guided), None
    ).macs


def _check_what_the_deepcache_rows_are_not() -> None:
    """Taken literally, the rows would have other counts with our rules; docs/evidence/costs.md explains why."""
    tera = {}
    for gate, branch in [(None, 0), (10, 0), (10, 1), (13, 1)]:
        schedule = Schedule(gate, deepcache_interval=3, deepcache_branch=branch)
        tera[gate, branch] = image_cost(MODELS["sdxl"], schedule).macs / 1e12
    assert tera[None, 0] == pytest.approx(55.365, abs=1e-3)  # paper: 57.888
    assert tera[10, 0] == pytest.approx(38.626, abs=1e-3)  # paper: 43.868
    assert tera[10, 1] == pytest.approx(40.360, abs=1e-3)
    assert tera[13, 1] == pytest.approx(43.868, rel=1e-3)


def _counted_by_hooks(architecture: Architecture, batch: int) -> int:
    """Count as the paper's authors do: with hooks on every linear and convolution layer of a plain run."""
    sizes = {"batch": batch, "height": architecture.size // 8, "width": architecture.size // 8}
    total = 0

    def count(layer: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, torch.Tensor)
        total += output.numel() * prod(layer.weight.shape[1:])

    def tensors(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {name: tensors(below) for name, below in shape.items()}
        return None if shape is None else torch.zeros([sizes.get(size, size) for size in shape])

    with torch.device("meta"), torch.no_grad():
        denoiser = architecture.denoiser(**architecture.config).eval()
        for layer in denoiser.modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                layer.register_forward_hook(count)
        denoiser(**{name: tensors(shape) for name, shape in architecture.inputs.items()})
    return total


@pytest.mark.parametrize(
    ("method", "schedule", "notes"),
    [
        ("none", None, ()),
        ("tgate", Schedule(10, sp_interval=5, warm_up=2), ()),
        ("deepcache", Schedule(None, deepcache_interval=3, deepcache_branch=1), (NOTE_BRANCH,)),
        ("deepcache+tgate", Schedule(13, deepcache_interval=3, deepcache_branch=1), (NOTE_BRANCH, NOTE_GATE)),
        ("adaptive_guidance", Schedule(None, guidance_step=10), (NOTE_GUIDANCE,)),
    ],
)
def test_rows_counted_with_other_settings_have_a_note(
    method: str, schedule: Schedule | None, notes: tuple[str, ...]
) -> None:
    row = next(
        row
        for row in paper_tables()["rows"]
        if row["model"] == "sdxl" and row["method"] == method and (method != "tgate" or "sp_interval" in row)
    )
    assert schedule_of(row) == (schedule, notes)


# A UNet of two blocks, to check the sums themselves. The tests with its captures follow one another, since only the
# last few are kept.
TINY = Model(
    Architecture(
        "UNet2DConditionModel",
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": None,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        },
        {
            "sample": ("batch", 4, "height", "width"),
            "timestep": (),
            "encoder_hidden_states": ("batch", 7, 16),
        },
        64,
    ),
    steps=9,
)


def _call(phase: Phase, schedule: Schedule, batch: int) -> int:
    branch = schedule.deepcache_branch if "deep" in schedule.kinds else None
    return graph_cost(TINY.architecture, Geometry(batch, 64, 64), schedule.graph_phase(phase), branch).macs.layers


@pytest.mark.parametrize(
    ("schedule", "strip"),
    [
        (Schedule(4), "FFFFppppp"),
        (Schedule(5, sp_interval=2, fi_interval=2, warm_up=1), "FFFSFqpqp"),
        (Schedule(4, deepcache_interval=3), "FDDFprrpr"),
        (Schedule(None, deepcache_interval=2, guidance_step=3), "FDFfdfdfd"),
    ],
    ids=str,
)
def test_every_step_is_counted_by_its_own_graph(schedule: Schedule, strip: str) -> None:
    cost = image_cost(TINY, schedule)
    assert cost.strip == strip
    steps = [_call(phase, schedule, 2 if phase.guided else 1) for phase in schedule.plan(9, guided=True)]
    assert cost.macs == sum(steps)
    by_letter = dict(zip(strip, steps, strict=True))
    assert len(set(by_letter.values())) == len(by_letter), "two kinds of step cost the same"
    assert max(steps) == by_letter["F"]


def test_parameters_in_the_papers_convention_and_in_the_graph() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TINY.architecture.config)
    everything = sum(parameter.numel() for parameter in unet.parameters())
    own = sum(p.numel() for name, p in unet.named_parameters() if ".attn2." in name)
    norms = sum(p.numel() for name, p in unet.named_parameters() if ".norm2." in name and "transformer_blocks" in name)
    for schedule in (None, Schedule(100), Schedule(None, guidance_step=4)):
        cost = image_cost(TINY, schedule)
        assert cost.parameters == cost.parameters_at_end == everything
    gated = image_cost(TINY, Schedule(4))
    assert (gated.parameters, gated.parameters_at_end) == (everything - own, everything - own - norms)
    # With fi_interval some of the last steps still compute self-attention, so its weights stay.
    assert image_cost(TINY, Schedule(5, sp_interval=2, fi_interval=2)).parameters_at_end == gated.parameters_at_end


@pytest.mark.heavy
def test_size_batch_steps_and_guidance() -> None:
    schedule = Schedule(3)
    once = image_cost(TINY, schedule)
    assert image_cost(TINY, schedule, batch=3).macs == 3 * once.macs
    assert image_cost(TINY, schedule, guided=False).strip == "fffpppppp"
    assert image_cost(TINY, schedule, steps=4).strip == "FFFp"
    # Twice the latents need nearly twice the work: the text's and the timestep's part stays the same.
    assert 1.95 < image_cost(TINY, schedule, height=128).macs / once.macs < 2.0
    assert 1.95 < image_cost(TINY, schedule, width=128).macs / once.macs < 2.0


#: A transformer of six equal blocks, of which the methods below skip some or all.
BLOCKS_OF_TINY = 6
#: The projection of the text and the modulation by the timestep, for one row. Only the blocks read them.
ONLY_FOR_BLOCKS = 7 * (16 * 32 + 32 * 32) + 32 * 6 * 32
TINY_TRANSFORMER = Model(
    Architecture(
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": BLOCKS_OF_TINY,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        {
            "hidden_states": ("batch", 4, "height", "width"),
            "encoder_hidden_states": ("batch", 7, 16),
            "timestep": ("batch",),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": ("batch", 7),
        },
        64,
    ),
    steps=8,
)


@pytest.mark.parametrize(
    ("method", "strip", "skipped"),
    [
        pytest.param(BlockCache(2, front=0), "FKFKFKFK", BLOCKS_OF_TINY, marks=pytest.mark.sweep),
        (BlockCache(2, front=1, back=2), "FKFKFKFK", BLOCKS_OF_TINY - 3),
        (MagCache((1.0,)), "FFKKKFKK", BLOCKS_OF_TINY),
        pytest.param(DeltaDiT(2, blocks=2), "FMFMFKFK", 2, marks=pytest.mark.sweep),
        pytest.param(BlockCache(2, front=0) + AdaptiveGuidance(4), "FKFKfkfk", BLOCKS_OF_TINY, marks=pytest.mark.sweep),
        (FasterCache(2, begin=0.0), "FwFwFwFw", 0),
    ],
    ids=str,
)
def test_skipped_blocks_cost_nothing(method: Method | Schedule, strip: str, skipped: int) -> None:
    """All blocks cost the same, so the costs follow from that of one block, the difference of two tiny models."""
    schedule = method if isinstance(method, Schedule) else Schedule.of(method)
    config = {**TINY_TRANSFORMER.architecture.config, "num_layers": BLOCKS_OF_TINY - 1}
    shorter = dataclasses.replace(
        TINY_TRANSFORMER, architecture=dataclasses.replace(TINY_TRANSFORMER.architecture, config=config)
    )
    full = image_cost(TINY_TRANSFORMER, None, steps=1).macs
    block = full - image_cost(shorter, None, steps=1).macs
    cost = image_cost(TINY_TRANSFORMER, schedule)
    assert cost.strip == strip
    saved = skipped * block + (2 * ONLY_FOR_BLOCKS if skipped == BLOCKS_OF_TINY else 0)
    rows = {letter: full - saved * (letter in "KkMm") for letter in strip}
    assert cost.macs == sum(rows[letter] if letter.isupper() else rows[letter] // 2 for letter in strip)
    assert cost.parameters == image_cost(TINY_TRANSFORMER, None).parameters


def test_forecasts_cost_no_more_operations_and_fora_leaves_little() -> None:
    cost = image_cost(TINY_TRANSFORMER, Schedule.of(Fora(2)))
    assert cost.strip == "FHFHFHFH"
    assert cost.macs == image_cost(TINY_TRANSFORMER, Schedule.of(Fora(2, forecast=2))).macs
    # Half of the steps have no attentions and no feed-forwards; what is left of the model is small.
    assert 0.5 < cost.macs / image_cost(TINY_TRANSFORMER, None).macs < 0.6


def test_wrong_models_and_branches() -> None:
    with pytest.raises(ConfigurationError, match=r"sd15, sd21, sdxl, .*but got 'sd14'"):
        model_named("sd14")
    with pytest.raises(UnsupportedModelError, match="DeepCache needs a UNet"):
        image_cost(MODELS["pixart_alpha"], Schedule(None, deepcache_interval=2))
    with pytest.raises(ConfigurationError, match="deepcache_branch=7 does not exist"):
        image_cost(TINY, Schedule(None, deepcache_interval=2, deepcache_branch=7))
