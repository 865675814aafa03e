"""The schedules whose quality is measured, as data; the order is that of measuring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One row of the measurement.

    Attributes:
        name: unique; what `--only` selects by.
        method: what it belongs to: one line of the plot.
        options: the arguments of `tgate_compile.optimize`, without the backend; None leaves the pipeline as it is.
        call: arguments of the pipeline's call that differ from the others'.
        batch: captions per call. Guidance that stops by likeness stops for the whole batch at once: 1 there.
    """

    name: str
    method: str
    options: Mapping[str, Any] | None
    call: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 32


def _steps(steps: int) -> Contender:
    return Contender(f"steps {steps}", "fewer steps", None, {"num_inference_steps": steps})


def _tgate(gate: int) -> Contender:
    return Contender(f"tgate {gate}", "T-GATE", {"gate_step": gate})


def _drop(step: int) -> Contender:
    return Contender(f"drop {step}", "guidance drop", {"gate_step": None, "guidance_step": step})


def _adaptive(similarity: float) -> Contender:
    options = {"gate_step": None, "guidance_similarity": similarity}
    return Contender(f"adaptive {similarity}", "Adaptive Guidance", options, batch=1)


def _tgate2(gate: int, name: str, **intervals: int) -> Contender:
    return Contender(f"tgate2 {gate} {name}", "T-GATE v2", {"gate_step": gate, **intervals})


def _deepcache(interval: int) -> Contender:
    return Contender(f"deepcache {interval}", "DeepCache", {"gate_step": None, "deepcache_interval": interval})


def _deepcache_tgate(interval: int, gate: int) -> Contender:
    options = {"gate_step": gate, "deepcache_interval": interval}
    return Contender(f"deepcache {interval} tgate {gate}", "DeepCache + T-GATE", options)


def _anchor(gate: int, weight: float) -> Contender:
    method = "T-GATE, cond cached" if weight == 1 else "T-GATE, other anchors"
    return Contender(f"tgate {gate} anchor {weight}", method, {"gate_step": gate, "anchor_weight": weight})


def _reuse(gate: int, weight: float, scale: float) -> Contender:
    """Cond is kept: the halves of what the pipeline mixes are then `output - difference` and `output`."""
    options = {"gate_step": gate, "anchor_weight": weight, "keep": "cond", "guidance_reuse": scale}
    return Contender(f"tgate {gate} anchor {weight} reuse {scale}", "T-GATE, guidance reused", options)


def _drop_reuse(step: int, scale: float) -> Contender:
    options = {"gate_step": None, "guidance_step": step, "guidance_reuse": scale}
    return Contender(f"drop {step} reuse {scale}", "guidance reused", options)


def _anchor_guidance(gate: int, guidance: float) -> Contender:
    """Stronger guidance in the steps that have it."""
    options = {"gate_step": gate, "anchor_weight": 1.0}
    name = f"tgate {gate} anchor 1.0 guidance {guidance}"
    return Contender(name, "T-GATE, cond cached, other guidance", options, {"guidance_scale": guidance})


def _anchor_steps(steps: int, gate: int) -> Contender:
    options = {"gate_step": gate, "anchor_weight": 1.0}
    name = f"steps {steps} tgate {gate} anchor 1.0"
    return Contender(name, "fewer steps + T-GATE, cond cached", options, {"num_inference_steps": steps})


def _deepcache_anchor(interval: int, gate: int) -> Contender:
    options = {"gate_step": gate, "deepcache_interval": interval, "anchor_weight": 1.0}
    return Contender(f"deepcache {interval} tgate {gate} anchor 1.0", "DeepCache + T-GATE, cond cached", options)


CONTENDERS: tuple[Contender, ...] = (
    Contender("plain", "plain", None),  # first: the others are compared with it
    # What is asked first: at a gate of 5, what does each part of T-GATE cost, and what do the two weights bring?
    _tgate(5),
    Contender("tgate 5 cond", "T-GATE", {"gate_step": 5, "keep": "cond"}),  # the same: no text is left after the gate
    _drop(5),
    _steps(15),
    *(_anchor(5, weight) for weight in (1.0, 2.0, 5.0, 0.0)),
    *(_drop_reuse(5, scale) for scale in (0.5, 1.0)),
    *(_reuse(5, 0.5, scale) for scale in (0.5, 1.0)),
    # Then along the gates.
    _tgate(3),
    _drop(3),
    _anchor(3, 1.0),
    _steps(12),
    _anchor(10, 1.0),
    _tgate(10),
    _drop(10),
    _steps(10),
    _anchor_steps(15, 4),
    _anchor_guidance(3, 8.0),
    _deepcache(3),
    _deepcache_anchor(3, 5),
    _deepcache_tgate(3, 5),
    *(_anchor(5, weight) for weight in (0.75, 1.25)),
    _anchor_steps(20, 5),
    _reuse(5, 1.0, 0.25),
    _anchor(2, 1.0),
    # What is left of the methods themselves.
    _tgate2(10, "sp 5", sp_interval=5),
    _steps(8),
    _steps(20),
    _deepcache_tgate(3, 10),
    _tgate2(10, "fi 2", fi_interval=2),
    _deepcache(5),
    _deepcache(2),
    _adaptive(0.993),
    _drop_reuse(5, 0.25),
    _steps(6),
    _steps(18),
    _tgate2(10, "sp 3", sp_interval=3),
    _tgate(8),
    _tgate2(15, "sp 3", sp_interval=3),
    _drop(8),
    _anchor(5, 1.5),
    _drop_reuse(10, 0.25),
    _reuse(3, 1.0, 0.25),
    _tgate(15),
    _drop(15),
    _adaptive(0.997),
)
