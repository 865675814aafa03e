"""From steps to phases: the rules of every method, without any graph."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tgate_compile import ConfigurationError
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.methods.schedule import Schedule, check_plan

CROSS: frozenset[Kind] = frozenset({"cross"})
SELF: frozenset[Kind] = frozenset({"self"})
DEEP: frozenset[Kind] = frozenset({"deep"})
AUTHORS = [
    case
    for case in json.loads((Path(__file__).parent / "data" / "authors" / "cases.json").read_text())["cases"]
    if not case["affected_by_official_bug"]  # their trace is also wrong there; test_authors_reference.py tests these
]


@pytest.mark.parametrize(
    ("gate_step", "num_steps", "strip"),
    [
        (10, 25, "F" * 10 + "p" * 15),
        (1, 4, "Fppp"),
        (4, 4, "FFFF"),
        (5, 4, "FFFF"),
        (0.4, 25, "F" * 10 + "p" * 15),
        (0.5, 5, "FFppp"),  # rounds half to even, like Python
        (0.01, 4, "Fppp"),  # at least one
        (0.99, 4, "FFFF"),
        (0.99, 1, "F"),
        (10, 1, "F"),
    ],
)
def test_gate(gate_step: int | float, num_steps: int, strip: str) -> None:
    assert Schedule(gate_step).strip(num_steps) == strip


@pytest.mark.parametrize(
    ("options", "strip"),
    [
        ({"gate_step": 9, "sp_interval": 5}, "FFFSSFSSFppp"),
        ({"gate_step": 9, "sp_interval": 3}, "FFFFSSFSFppp"),
        ({"gate_step": 7, "sp_interval": 3, "warm_up": 0}, "FSSFSSFppppp"),
        ({"gate_step": 3, "sp_interval": 2, "warm_up": 5}, "FFFppppppppp"),  # the gate closes before warm-up ends
        ({"gate_step": 6, "sp_interval": 3, "fi_interval": 2}, "FFFFSFpqpqpq"),
        ({"gate_step": 7, "sp_interval": 3, "fi_interval": 3, "warm_up": 1}, "FFSFSSFqqpqq"),
        ({"gate_step": 5, "fi_interval": 2}, "FFFFFqpqpqpq"),
        ({"gate_step": None, "deepcache_interval": 3}, "FDDFDDFDDFDD"),
        ({"gate_step": 6, "deepcache_interval": 3}, "FDDFDFprrprr"),
        ({"gate_step": 5, "deepcache_interval": 3}, "FDDFFprrprrp"),
        ({"gate_step": None, "guidance_step": 5}, "FFFFFfffffff"),
        ({"gate_step": None, "guidance_step": 0.25}, "FFFfffffffff"),
        ({"gate_step": None, "guidance_step": 5, "deepcache_interval": 3}, "FDDFDfddfddf"),
        ({"gate_step": None, "guidance_similarity": 0.99}, "FFFFFFFFFFFF"),
    ],
)
def test_strips_of_all_methods(options: dict[str, Any], strip: str) -> None:
    assert Schedule(**options).strip(12) == strip


@pytest.mark.parametrize("case", AUTHORS, ids=lambda case: case["name"])
def test_the_plan_agrees_with_the_authors_code(case: dict[str, Any]) -> None:
    """Their trace lists the batch of each denoiser call, and whether it computed self- (S) and cross-attention (C)."""
    guided = case["call_kwargs"].get("guidance_scale", 7.5) > 1
    plan = Schedule(**case["tgate"]).plan(case["num_inference_steps"], guided=guided)
    batch = case["B"] * case["num_images_per_prompt"]
    ours = []
    for phase in plan:
        computed = "".join("-" if kind in phase.reuse else letter for kind, letter in (("self", "S"), ("cross", "C")))
        ours.append(f"{batch * 2 if phase.guided else batch}{computed}")
    theirs = re.findall(r"\d+:(\S+)", case["trace"])
    if case["scheduler"] == "pndm":
        theirs = theirs[1:]  # the warm-up call does not count as a step
    assert ours == theirs


def test_v1_takes_the_cache_at_the_last_step_before_the_gate() -> None:
    plan = Schedule(3).plan(6, guided=True)
    assert plan == (*[Phase(True)] * 2, Phase(True, merge=CROSS), *[Phase(False, reuse=CROSS)] * 3)


def test_without_guidance_nothing_is_merged() -> None:
    plan = Schedule(3, sp_interval=2, fi_interval=2, warm_up=0).plan(6, guided=False)
    assert not any(phase.guided or phase.merge for phase in plan)
    assert plan[2].emit == CROSS | SELF


SCHEDULES = [
    Schedule(4),
    Schedule(9, sp_interval=5),
    Schedule(7, sp_interval=3, fi_interval=3, warm_up=1),
    Schedule(0.3, sp_interval=2, fi_interval=4, warm_up=0),
    Schedule(None, deepcache_interval=3),
    Schedule(6, deepcache_interval=2, deepcache_branch=1),
    Schedule(None, guidance_step=3, deepcache_interval=4),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("guided", [True, False])
def test_nothing_is_reused_that_is_not_there_for_any_number_of_steps(schedule: Schedule, guided: bool) -> None:
    for num_steps in range(1, 40):
        check_plan(schedule.plan(num_steps, guided=guided))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_graph_serves_all_of_its_phases_and_there_are_few(schedule: Schedule) -> None:
    graphs = set()
    for num_steps in range(1, 40):
        for phase in schedule.plan(num_steps, guided=True):
            graph = schedule.graph_phase(phase)
            assert (graph.guided, graph.reuse) == (phase.guided, phase.reuse)
            assert graph.emit >= phase.emit
            assert graph.merge >= phase.merge
            graphs.add(graph)
    assert len(graphs) <= 4  # for any number of steps, without recompilation


def test_reuse_without_emission_or_with_another_batch_is_noticed() -> None:
    with pytest.raises(ConfigurationError, match="Step 0 reuses the cross cache"):
        check_plan([Phase(False, reuse=CROSS)])
    with pytest.raises(ConfigurationError, match="Step 1 reuses the deep cache"):
        check_plan([Phase(True, emit=DEEP), Phase(False, reuse=DEEP)])
    check_plan([Phase(True, merge=CROSS), Phase(False, reuse=CROSS)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_step": 0}, "gate_step must be a whole number of steps.*got 0"),
        ({"gate_step": 1.5}, "got 1.5"),
        ({"gate_step": True}, "got True"),
        ({"gate_step": None, "guidance_step": -1}, "guidance_step must be.*got -1"),
        ({"sp_interval": 0}, "sp_interval must be a whole number, at least 1, but got 0"),
        ({"fi_interval": 2.0}, "fi_interval must be a whole number.*got 2.0"),
        ({"warm_up": -1}, "warm_up must be a whole number, at least 0"),
        ({"deepcache_interval": "3"}, "deepcache_interval must be a whole number.*got '3'"),
        ({"deepcache_branch": -1}, "deepcache_branch must be"),
        ({"gate_step": None}, "Nothing to do"),
        ({"gate_step": None, "sp_interval": 2}, "need a gate_step"),
        ({"deepcache_interval": 2, "sp_interval": 2}, "cannot be combined with cached self-attention"),
        ({"gate_step": 5, "guidance_step": 3}, "Set one of them"),
        ({"gate_step": None, "guidance_step": 3, "guidance_similarity": 0.9}, "Set one of them"),
        ({"gate_step": None, "guidance_similarity": 1.5}, "guidance_similarity must be.*got 1.5"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Schedule(**options)


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule(3).gate_step = 4  # type: ignore[misc]
    assert Schedule(3) == Schedule(3)
    assert hash(Schedule(3)) == hash(Schedule(3))


def test_every_graph_has_its_own_letter() -> None:
    phases = {phase for schedule in SCHEDULES for phase in schedule.plan(25, guided=True)}
    letters = {(phase.guided, phase.reuse): phase.character for phase in phases}
    assert len(set(letters.values())) == len(letters)


def test_a_schedule_prints_its_settings() -> None:
    assert str(Schedule()) == "gate step 10"
    assert str(Schedule(0.4, sp_interval=5, warm_up=1)) == "gate step 0.4, sp interval 5, warm up 1"
    assert str(Schedule(None, deepcache_interval=3)) == "deepcache interval 3"
