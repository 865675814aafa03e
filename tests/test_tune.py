"""`tune`: correct measurements, a choice that follows from them, and an unchanged pipeline."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny_pipelines
from tests.comparing import ROUNDING
from tests.denoiser_cases import CASES
from tests.hook_reference import hook_reference
from tests.test_static_methods import pixart_call
from tests.tiny_transformers import stable_diffusion_3
from tgate_compile import ConfigurationError, UnsupportedModelError, describe, load_demo_pipeline, optimize, restore
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import load_schedule
from tgate_compile.study.tuning import measure, plans
from tgate_compile.study.tuning.plans import SHAPES, fewer_steps, first_masks, grid_of, mask_of, next_gate, refined
from tgate_compile.study.tuning.result import Tuning
from tgate_compile.study.tuning.search import tune

STEPS = 6
PROMPTS = ["red cat", "blue dog"]
LOOSE = 0.5


def latents(pipe: Any, prompt: str, seed: int = 0, **call: Any) -> torch.Tensor:
    return tiny_pipelines.run(pipe, prompt, seed=seed, **{"steps": STEPS, **call})


def drift_of(x: torch.Tensor, plain: torch.Tensor) -> float:
    return ((x - plain).norm() / plain.norm()).item()


@pytest.fixture(scope="module")
def tuned() -> tuple[Any, Tuning]:
    """Return a plain pipeline and its tuning."""
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        return pipe, tune(pipe, PROMPTS, num_inference_steps=STEPS, tolerance=0.05, seeds=(0, 3))


def row_of(tuning: Tuning, schedule: Schedule | None, label: str = "") -> Any:
    return next(r for r in tuning.table if r.schedule == schedule and label in r.label)


def test_the_drift_is_the_one_between_plain_and_gated_latents(tuned: tuple[Any, Tuning]) -> None:
    pipe, tuning = tuned
    expected = []
    for prompt in PROMPTS:
        for seed in (0, 3):
            plain = latents(pipe, prompt, seed)
            with hook_reference(pipe, 4):
                expected.append(drift_of(latents(pipe, prompt, seed), plain))
    row = row_of(tuning, Schedule(4))
    mean = sum(expected) / 4
    assert row.drift == pytest.approx(mean, rel=1e-3)
    assert row.worst == pytest.approx(max(expected), rel=1e-3)
    assert row.spread == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in expected) / 4), rel=1e-2)
    assert row.strip == "FFFFpp"
    fewer = row_of(tuning, None, "5 steps")
    drifts = [drift_of(latents(pipe, p, s, steps=5), latents(pipe, p, s)) for p in PROMPTS for s in (0, 3)]
    assert fewer.drift == pytest.approx(sum(drifts) / 4, rel=1e-4)
    assert (fewer.cost, fewer.strip) == (pytest.approx(5 / 6), "FFFFF")


def test_the_cost_is_that_of_the_graphs(tuned: tuple[Any, Tuning]) -> None:
    pipe, tuning = tuned
    optimize(pipe, 4, backend="eager")
    latents(pipe, PROMPTS[0])
    macs = {variant.name: variant.macs for variant in describe(pipe).variants}
    restore(pipe)
    cost = (4 * macs["full"] + 2 * macs["pruned"]) / (STEPS * macs["full"])
    assert row_of(tuning, Schedule(4)).cost == pytest.approx(cost)
    assert row_of(tuning, Schedule(None, guidance_step=4)).cost == pytest.approx(5 / 6)  # two of six steps at half cost
    assert row_of(tuning, Schedule(4)).time == 1.0  # from the test's clock


def test_the_convergence_is_that_of_the_cross_attentions(tuned: tuple[Any, Tuning]) -> None:
    pipe, tuning = tuned
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs[name].append(output.clone())

    sites = {name: m for name, m in pipe.unet.named_modules() if name.endswith("attn2")}
    changes: list[list[float]] = [[] for _ in range(STEPS - 1)]
    for prompt in PROMPTS:
        for seed in (0, 3):
            outputs.clear()
            handles = [module.register_forward_hook(keep(name)) for name, module in sites.items()]
            latents(pipe, prompt, seed)
            for handle in handles:
                handle.remove()
            for values in outputs.values():
                for step in range(1, STEPS):
                    changes[step - 1].append(drift_of(values[step - 1], values[step]))
    assert len(tuning.convergence.mean) == STEPS - 1
    for step, of_step in enumerate(changes):
        assert len(of_step) == 4 * len(sites)
        found = torch.tensor(of_step)
        assert tuning.convergence.mean[step] == pytest.approx(found.mean().item(), rel=1e-4)
        assert tuning.convergence.spread[step] == pytest.approx(found.std(correction=0).item(), rel=1e-3)


def test_the_cheapest_within_the_tolerance_is_chosen(tuned: tuple[Any, Tuning]) -> None:
    _, tuning = tuned
    rows = [row for row in tuning.table if row.schedule is not None]
    families = {"T-GATE", "T-GATE, cond cached", "T-GATE v2", "guidance drop", "PAB", "FORA", "fewer steps"}
    assert {row.family for row in tuning.table} == families
    assert any(row.within for row in rows)
    assert not all(row.within for row in rows)
    assert tuning.chosen.cost == min(row.cost for row in rows if row.within)
    assert all(row.within == (row.drift <= 0.05) for row in tuning.table)
    assert [row.cost for row in tuning.table] == sorted(row.cost for row in tuning.table)
    # Neighbouring gates are on both sides of the tolerance: none in between is left out.
    gates = {row.schedule.gate_step: row.within for row in rows if row.family == "T-GATE"}
    first = min(gate for gate, within in gates.items() if within)
    assert first == 1 or gates[first - 1] is False
    # Equivalent schedules are measured once.
    assert len({(row.strip, row.schedule.anchor_weight) for row in rows}) == len(rows)


def test_the_printed_table(tuned: tuple[Any, Tuning]) -> None:
    _, tuning = tuned
    printed = str(tuning)
    lines = printed.splitlines()
    assert lines[0].startswith(f"{tuning.schedule}: ")
    assert "tolerance 0.05" in lines[0]
    assert "2 prompts, seeds 0, 3" in lines[1]
    assert sum(line.startswith("*") and not line.startswith("*:") for line in lines) == 1
    for row in tuning.table:
        assert row.label in printed
        assert row.strip in printed


def test_the_saved_schedule_drives_optimize(tuned: tuple[Any, Tuning], tmp_path: Path) -> None:
    pipe, tuning = tuned
    path = tmp_path / "schedule.json"
    tuning.save(path)
    assert load_schedule(path) == tuning.schedule
    about = json.loads(path.read_text())["about"]
    assert (about["prompts"], about["seeds"], about["tolerance"]) == (PROMPTS, [0, 3], 0.05)
    assert about["setting"]["pipeline"] == "StableDiffusionPipeline"
    assert len(about["table"]) == len(tuning.table)
    optimize(pipe, schedule=path, backend="eager")
    found = latents(pipe, PROMPTS[0])
    assert describe(pipe).strip == tuning.chosen.strip
    restore(pipe)
    assert 0 < drift_of(found, latents(pipe, PROMPTS[0])) <= tuning.chosen.worst * (1 + ROUNDING)


def test_it_is_drawn(tuned: tuple[Any, Tuning], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, tuning = tuned
    tuning.plot(tmp_path / "a.png")
    tuning.plot(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    lost = dataclasses.replace(tuning.table[0], drift=math.inf, spread=math.inf, worst=math.inf, within=False)
    other = dataclasses.replace(tuning, table=(lost, *tuning.table[1:]))
    other.plot(tmp_path / "c.svg")
    assert tuning.chosen.label in (tmp_path / "c.svg").read_text()
    other.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["about"]["table"][0]["drift"] is None
    with pytest.raises(ConfigurationError, match=r"c\.gif"):
        tuning.plot(tmp_path / "c.gif")


def test_without_matplotlib_all_but_the_plot_works(
    tuned: tuple[Any, Tuning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"tgate_compile\[plots\]"):
        tuned[1].plot(tmp_path / "a.png")


# The pipeline after tuning.


def state(pipe: Any) -> dict[str, Any]:
    modules = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in pipe.unet.named_modules()}
    return {
        "class": type(pipe),
        "attributes": {name: value for name, value in vars(pipe).items() if not name.startswith(("_guidance", "_num"))},
        "unet": dict(vars(pipe.unet)),
        "hooks": modules,
    }


@pytest.mark.parametrize(("runs", "error"), [(1, RuntimeError), (2, KeyboardInterrupt), (4, RuntimeError)])
def test_it_is_plain_again_after_an_error(runs: int, error: type[BaseException]) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    bar = io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=bar)
    before_run = latents(pipe, PROMPTS[0])
    before, shown = state(pipe), bar.getvalue()
    calls = 0

    def fail(self: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal calls
        calls += step == 2
        if calls == runs:
            raise error("stop")
        return tensors

    with pytest.raises(error, match="stop"):
        tune(pipe, PROMPTS[:1], num_inference_steps=4, tolerance=LOOSE, call={"callback_on_step_end": fail})
    after = state(pipe)
    assert bar.getvalue() == shown != ""
    # The pipeline's own call sets this attribute in any case.
    before["attributes"].pop("_interrupt"), after["attributes"].pop("_interrupt")
    assert after == before
    assert torch.equal(latents(pipe, PROMPTS[0]), before_run)


@pytest.mark.heavy
def test_it_is_plain_again_afterwards_with_its_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    before_run = latents(pipe, PROMPTS[0])
    del pipe._progress_bar_config
    before = state(pipe)
    seen: list[tuple[int, int, str]] = []
    tuning = tune(
        pipe, PROMPTS[:1], num_inference_steps=5, tolerance=LOOSE, progress=lambda *reported: seen.append(reported)
    )
    assert capsys.readouterr().err == ""
    assert state(pipe) == before
    assert torch.equal(latents(pipe, PROMPTS[0]), before_run)
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1] == 1 + len(tuning.table)
    assert {"plain", "gate step 2", "4 steps"} <= {what for _, _, what in seen}
    assert all(row.time is None for row in tuning.table)  # a single generation, which also made the graphs


def test_an_optimized_pipeline_is_refused_and_stays_optimized() -> None:
    pipe = optimize(tiny_pipelines.stable_diffusion(layout="small"), 2, backend="eager")
    with pytest.raises(ConfigurationError, match="already optimized"):
        tune(pipe, PROMPTS)
    assert latents(pipe, PROMPTS[0]).isfinite().all()
    assert describe(pipe).strip == "FFpppp"


# Arguments.


def test_given_candidates_are_measured_and_no_others() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    candidates = [
        Schedule(3),
        Schedule(None, deepcache_interval=2),
        Schedule(3, anchor_weight=1.0),
        Schedule(3),
        Schedule(4, deepcache_interval=2),
        Schedule(3, keep="cond"),
        Schedule(3, anchor_weight=0.0, keep="cond"),
    ]
    tuning = tune(pipe, PROMPTS[:1], num_inference_steps=STEPS, tolerance=1e6, candidates=candidates)
    measured = {row.schedule: row for row in tuning.table if row.schedule is not None}
    assert set(measured) == set(candidates)
    plain = latents(pipe, PROMPTS[0])
    for schedule, row in measured.items():
        if "deep" in schedule.kinds:
            continue
        with hook_reference(pipe, 3, keep=schedule.kept, anchor=schedule.anchor_weight):
            assert row.drift == pytest.approx(drift_of(latents(pipe, PROMPTS[0]), plain), rel=1e-3)
    optimize(pipe, schedule=candidates[4], backend="eager")
    row = measured[candidates[4]]
    assert row.drift == pytest.approx(drift_of(latents(pipe, PROMPTS[0]), plain), rel=1e-3)
    assert row.strip == describe(pipe).strip == "FDFFpr"


@pytest.mark.heavy
def test_without_guidance_there_is_none_to_drop() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    tuning = tune(pipe, PROMPTS[:1], num_inference_steps=STEPS, tolerance=LOOSE, call={"guidance_scale": 1.0})
    assert "guidance drop" not in {row.family for row in tuning.table}
    assert tuning.chosen.strip.islower()
    assert 0.5 < tuning.chosen.cost < 1.0


def test_schedules_that_save_nothing_are_not_chosen() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    never = [Schedule(4), Schedule(9)]
    with pytest.raises(ConfigurationError, match="None of the schedules costs less"):
        tune(pipe, PROMPTS[:1], num_inference_steps=4, candidates=never)
    tuning = tune(pipe, PROMPTS[:1], num_inference_steps=4, tolerance=1e6, candidates=[*never, Schedule(2)])
    assert tuning.schedule == Schedule(2)
    assert row_of(tuning, Schedule(4)).drift < ROUNDING


def test_if_none_is_within_the_tolerance_the_closest_is_named() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    with pytest.raises(ConfigurationError, match=r"No schedule .* tolerance=1e-09 .* closest is .*, with drift 0\."):
        tune(pipe, PROMPTS[:1], num_inference_steps=4, tolerance=1e-9)


@pytest.mark.heavy
def test_steps_that_image_to_image_leaves_out_do_not_count() -> None:
    pipe = tiny_pipelines.stable_diffusion("StableDiffusionImg2ImgPipeline", layout="small")
    call = {"image": tiny_pipelines.image(), "strength": 0.5}
    tuning = tune(pipe, PROMPTS[:1], num_inference_steps=8, tolerance=LOOSE, call=call)
    assert (tuning.num_inference_steps, tuning.num_steps) == (8, 4)
    assert all(len(row.strip) <= 4 for row in tuning.table)
    assert len(tuning.convergence.mean) == 3
    assert tuning.call == {"image": "Tensor[1, 3, 16, 16]", "strength": "0.5"}
    with pytest.raises(ConfigurationError, match="1 of 8 steps"):
        tune(pipe, PROMPTS[:1], num_inference_steps=8, call={**call, "strength": 0.13})


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_a_step_may_have_several_calls(scheduler: Any) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    tuning = tune(pipe, PROMPTS[:1], num_inference_steps=5, tolerance=1e6, candidates=[Schedule(3)])
    assert tuning.num_steps == 5
    assert len(tuning.convergence.mean) == 4
    assert tuning.chosen.strip == "FFFpp"
    assert 0.5 < tuning.chosen.cost < 1.0


@pytest.mark.parametrize(
    ("name", "strip", "steps", "changes"),
    [
        ("WanPipeline", "FFFppp", 6, 5),  # a separate call for each half
        ("WanPipeline, two transformers", "FFFp|FF", 4, 4),  # each counts its steps separately
        # Only one half can be kept; attentions that do not declare their kind.
        pytest.param("StableVideoDiffusionPipeline", "FFFppp", 6, 5, marks=pytest.mark.heavy),
        pytest.param("LTXPipeline", "FFFppp", 6, 5, marks=pytest.mark.heavy),
        pytest.param("CosmosTextToWorldPipeline", "FFFppp", 6, 5, marks=pytest.mark.heavy),
    ],
)
def test_other_denoisers(name: str, strip: str, steps: int, changes: int, tmp_path: Path) -> None:
    case = CASES[name]
    call = {key: value for key, value in case.call(1).items() if key != "num_inference_steps"}
    pipe = case.build()
    tuning = tune(pipe, call=call, num_inference_steps=6, tolerance=1e6, candidates=[Schedule(3)])
    assert (tuning.chosen.strip, tuning.num_steps, len(tuning.convergence.mean)) == (strip, steps, changes)
    assert 0.1 < tuning.chosen.cost < 1.0
    assert tuning.chosen.drift > 0.0
    tuning.plot(tmp_path / "a.svg")
    if name == "StableVideoDiffusionPipeline":  # like optimize(), it keeps the half that can be kept

        def frames() -> Any:
            arguments = {**call, "num_inference_steps": 6, "output_type": "latent", "return_dict": False}
            return pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]

        plain = frames()
        optimize(pipe, 3, backend="eager")
        drifts = [drift_of(frame, of_plain) for frame, of_plain in zip(frames(), plain, strict=True)]
        assert tuning.chosen.drift == pytest.approx(sum(drifts) / len(drifts), rel=1e-3)


@pytest.mark.heavy
def test_embedded_prompts_and_transformers() -> None:
    pipe = tiny_pipelines.pixart()
    tuning = tune(pipe, call=tiny_pipelines.pixart_prompt(), num_inference_steps=4, tolerance=LOOSE)
    assert tuning.prompts == ()
    assert tuning.setting["denoiser"] == "PixArtTransformer2DModel"
    assert tuning.call["prompt_embeds"] == "Tensor[1, 6, 32]"
    with pytest.raises(UnsupportedModelError, match="UNet"):
        tune(
            pipe,
            call=tiny_pipelines.pixart_prompt(),
            num_inference_steps=4,
            candidates=[Schedule(None, deepcache_interval=2)],
        )


def test_joint_attention_has_text_to_freeze_and_self_attention_to_cache() -> None:
    pipe = stable_diffusion_3()
    made = torch.Generator().manual_seed(0)
    shapes = {"prompt_embeds": (1, 5, 32), "pooled_prompt_embeds": (1, 32)}
    call = {half + name: torch.randn(s, generator=made) for name, s in shapes.items() for half in ("", "negative_")}
    tuning = tune(pipe, call={**call, "height": 64, "width": 64}, num_inference_steps=5, tolerance=1e6)
    families = {"T-GATE", "guidance drop", "PAB", "FORA", "MagCache", "fewer steps"}
    assert {row.family for row in tuning.table} == families
    gated = min((row for row in tuning.table if row.family == "T-GATE"), key=lambda row: row.cost)
    assert gated.strip == "Fpppp"
    assert gated.cost < 0.6  # guidance drop alone
    assert tuning.chosen.cost <= gated.cost
    assert len(tuning.convergence.mean) == 4
    with pytest.raises(UnsupportedModelError, match="oint attention"):
        tune(
            pipe,
            call={**call, "height": 64, "width": 64},
            num_inference_steps=5,
            candidates=[Schedule(3, sp_interval=2)],
        )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"prompts": "red cat"}, "'red cat'"),
        ({"prompts": []}, "prompts must"),
        ({"prompts": [""]}, "prompts must"),
        ({"prompts": ["red cat", 3]}, "prompts must"),
        ({"prompts": None}, "got None"),
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"tolerance": math.inf}, "tolerance"),
        ({"tolerance": "0.1"}, "tolerance"),
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"seeds": 3}, "seeds"),
        ({"seeds": (True,)}, "seeds"),
        ({"candidates": []}, "candidates"),
        ({"candidates": [10]}, "candidates"),
        ({"call": ["guidance_scale"]}, "call must"),
        ({"call": {"generator": None}}, "generator"),
        ({"call": {"prompt": "red cat"}}, "must not contain prompt"),
        ({"call": {"guidance": 5.0}}, 'has no option "guidance".'),
        ({"backend": "tensorrt"}, "tensorrt"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments: dict[str, Any], shown: str) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    pipe.unet.forward = None
    with pytest.raises(ConfigurationError, match=shown):
        tune(pipe, **{"prompts": PROMPTS, **arguments})


def test_other_objects_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="diffusers pipeline"):
        tune(torch.nn.Linear(1, 1), PROMPTS)  # type: ignore[arg-type]


def test_latents_that_are_not_finite_are_no_reference() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    pipe.unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(ConfigurationError, match="not finite"):
        tune(pipe, PROMPTS, num_inference_steps=2)


# Candidates.


@given(num_steps=st.integers(2, 200), first=st.integers(1, 200))
def test_the_search_ends_at_the_first_gate_within(num_steps: int, first: int) -> None:
    within = {gate: gate >= first for gate in grid_of(num_steps)}
    tried = len(within)
    while (gate := next_gate(within, num_steps)) is not None:
        assert 0 < gate < num_steps
        assert gate not in within
        within[gate] = gate >= first
    if first < num_steps:
        assert within[first]
        assert first == 1 or within[first - 1] is False
    else:
        assert not any(within.values())
    assert len(within) - tried <= math.log2(num_steps) + 1


@given(st.integers(2, 1000))
def test_grids_lie_within_the_steps(num_steps: int) -> None:
    for numbers in (grid_of(num_steps), fewer_steps(num_steps)):
        assert numbers == sorted(set(numbers))
        assert all(0 < number < num_steps for number in numbers)
    assert grid_of(25) == [3, 6, 10, 15, 20]


def test_the_embedded_pipeline() -> None:
    pipe = load_demo_pipeline()
    tuning = tune(
        pipe, ["a large red circle on a blue background"], num_inference_steps=6, tolerance=0.3,
        candidates=[Schedule(2), Schedule(5)],
    )  # fmt: skip
    assert tuning.chosen.within
    change = tuning.convergence.mean
    assert change[0] > 2 * change[-1]  # the paper's observation: cross-attentions converge in the first steps
    assert row_of(tuning, Schedule(2)).drift > row_of(tuning, Schedule(5)).drift


# Plans of steps, under a budget.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("steps", "computed"), [(8, 1), (8, 3), (20, 9), (25, 24)])
def test_masks(steps: int, computed: int, shape: float) -> None:
    mask = mask_of(steps, computed, shape)
    assert (len(mask), mask.count("1"), mask[0]) == (steps, computed, "1")
    assert (mask[: steps // 2].count("1") >= mask[steps // 2 :].count("1")) or shape < 1


def test_the_first_masks_use_the_budget() -> None:
    def cost(mask: str) -> float:
        return (mask.count("1") + 0.1 * mask.count("0")) / len(mask)

    masks = first_masks(20, cost, 0.5)
    assert {mask.count("1") for mask in masks} == {8}  # 8 + 1.2 of 20
    assert len(masks) == len(set(masks)) > 2
    assert first_masks(20, cost, 0.1) == []


def test_moving_steps_finds_the_best_mask() -> None:
    wanted = "1101011000"

    def drift(mask: str) -> float:
        return sum(abs(a - b) for a, b in zip(_places(mask), _places(wanted), strict=True))

    assert refined("1010101010", drift, lambda mask: 0.5, 0.5) == wanted
    dear = refined("1010101010", drift, lambda mask: 0.4 + 0.1 * int(mask[1]), 0.45)
    assert dear[1] == "0"


def _places(mask: str) -> list[int]:
    return [step for step, digit in enumerate(mask) if digit == "1"]


def test_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans are measured like other schedules, and the chosen one is the best of all within the budget."""
    monkeypatch.setattr(plans, "ENDS", (0.5,))
    monkeypatch.setattr(plans, "SHAPES", (1.0, 2.0))
    pipe, call = tiny_pipelines.pixart(), pixart_call()
    tuning = tune(pipe, call=call, num_inference_steps=STEPS, budget=0.7)
    searched = [row for row in tuning.table if row.family == "plan of steps"]
    assert {"FORA", "Block cache"} <= {row.label.split(" (")[0] for row in searched}
    assert any("guidance step" in row.label for row in searched)
    assert any("gate step" in row.label for row in searched)
    within = [row for row in tuning.table if row.schedule is not None and row.cost <= 0.7]
    assert tuning.chosen.drift == min(row.drift for row in within)
    assert [row.within for row in tuning.table] == [row.cost <= 0.7 for row in tuning.table]
    assert "budget 0.7" in str(tuning)
    assert any("With fewer steps, images drift more: 4 steps" in remark for remark in tuning.remarks)
    best = min((row for row in searched if row.within), key=lambda row: row.drift)
    plain = tiny_pipelines.run(pipe, steps=STEPS, **call)
    optimize(pipe, schedule=best.schedule, backend="eager")
    ours = tiny_pipelines.run(pipe, steps=STEPS, **call)
    assert drift_of(ours, plain) == pytest.approx(best.drift, rel=1e-3)
    assert describe(pipe).strip == best.strip


def test_budgets_that_nothing_meets() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    with pytest.raises(ConfigurationError, match="budget must be a number between 0 and 1"):
        tune(pipe, PROMPTS[:1], budget=1.5)
    with pytest.raises(ConfigurationError, match=r"No schedule costs at most budget=0.05.*The cheapest is"):
        tune(pipe, PROMPTS[:1], num_inference_steps=2, candidates=[Schedule(1)], budget=0.05)
