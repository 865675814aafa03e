"""Phases as a manifest says them."""

from __future__ import annotations

from tgate_compile._bundle.manifest import PhaseSpec
from tgate_compile._schedule import Phase


def phase_spec(phase: Phase) -> PhaseSpec:
    """`phase` as plain data."""
    return PhaseSpec(guided=phase.guided, reuse=sorted(phase.reuse), emit=sorted(phase.emit), merge=sorted(phase.merge))


def phase_of(spec: PhaseSpec) -> Phase:
    """And back."""
    return Phase(spec.guided, emit=frozenset(spec.emit), merge=frozenset(spec.merge), reuse=frozenset(spec.reuse))
