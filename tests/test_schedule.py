"""From step to phase."""

from __future__ import annotations

import dataclasses

import pytest

from tgate_compile._schedule import Phase, TGate

EMITTING = frozenset({"cross"})


@pytest.mark.parametrize(
    ("gate_step", "num_steps", "strip"),
    [
        (10, 25, "F" * 10 + "p" * 15),
        (1, 4, "Fppp"),
        (4, 4, "FFFF"),
        (5, 4, "FFFF"),
        (0.4, 25, "F" * 10 + "p" * 15),
        (0.5, 5, "FFppp"),  # half to even, as Python rounds
        (0.01, 4, "Fppp"),  # never none at all
        (0.99, 4, "FFFF"),
        (0.99, 1, "F"),
        (10, 1, "F"),
    ],
)
def test_strip(gate_step: int | float, num_steps: int, strip: str) -> None:
    assert TGate(gate_step).strip(num_steps) == strip


def test_full_phase_under_guidance() -> None:
    phase = TGate(3).phase(2, 6, guided=True)
    assert phase == Phase(guided=True, emit=EMITTING)
    assert phase.name == "full"


def test_gated_phase_needs_no_guidance() -> None:
    phase = TGate(3).phase(3, 6, guided=True)
    assert phase == Phase(guided=False, reuse=EMITTING)
    assert phase.name == "pruned"


def test_without_guidance() -> None:
    schedule = TGate(3)
    assert schedule.phase(0, 6, guided=False) == Phase(guided=False, emit=EMITTING)
    assert schedule.phase(5, 6, guided=False) == schedule.phase(5, 6, guided=True)


@pytest.mark.parametrize("gate_step", [1, 3, 0.5, 7])
def test_two_phases_serve_a_generation_and_nothing_is_reused_before_it_was_emitted(gate_step: int | float) -> None:
    phases = [TGate(gate_step).phase(step, 6, guided=True) for step in range(6)]
    assert len(set(phases)) <= 2
    emitted: set[str] = set()
    for phase in phases:
        assert phase.reuse <= emitted
        emitted |= phase.emit


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TGate(3).gate_step = 4  # type: ignore[misc]
    assert TGate(3) == TGate(3)
    assert hash(TGate(3)) == hash(TGate(3))
