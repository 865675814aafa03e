"""The schedules whose quality `quality.py` measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A schedule to measure.

    Attributes:
        name: unique name, for `--only`.
        method: method, which is one line of the plot.
        label: label of the point in that line.
        options: arguments of `tgate_compile.optimize`, without the backend; None for the plain pipeline.
        call: arguments of the pipeline's call that differ from those of the other contenders.
        batch: captions per call. It must be 1 where guidance stops by similarity, because that stops it for the whole
            batch.
    """

    name: str
    method: str
    label: str
    options: Mapping[str, Any] | None
    call: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 32


def _optimized(name: str, method: str, label: str, **options: object) -> Contender:
    return Contender(name, method, label, options)


def _steps(steps: int) -> Contender:
    return Contender(f"steps {steps}", "fewer steps", f"{steps}", None, {"num_inference_steps": steps})


def _adaptive(similarity: float) -> Contender:
    options = {"gate_step": None, "guidance_similarity": similarity}
    return Contender(f"adaptive {similarity}", "Adaptive Guidance", f"{similarity}", options, batch=1)


def _anchored(gate: int, name: str, method: str, label: str, **call: object) -> Contender:
    """Return a contender for T-GATE that caches the cond half's outputs, with other arguments of the call."""
    return Contender(name, method, label, {"gate_step": gate, "anchor_weight": 1.0}, call)


CONTENDERS: tuple[Contender, ...] = (
    Contender("plain", "plain", "25", None),  # first: the others are compared with it
    *(_steps(n) for n in (20, 18, 15, 12, 10, 8, 6)),
    *(_optimized(f"tgate {g}", "T-GATE", f"{g}", gate_step=g) for g in (3, 5, 8, 10, 15)),
    *(_optimized(f"drop {g}", "guidance drop", f"{g}", gate_step=None, guidance_step=g) for g in (3, 5, 8, 10, 15)),
    # Thresholds that stop guidance after 5 and 10 steps on average, found with other captions.
    *(_adaptive(similarity) for similarity in (0.993, 0.997)),
    *(
        _optimized(f"tgate2 {g} sp {n}", "T-GATE v2", f"{g}, sp {n}", gate_step=g, sp_interval=n)
        for g, n in ((10, 5), (10, 3), (15, 3))
    ),
    _optimized("tgate2 10 fi 2", "T-GATE v2", "10, fi 2", gate_step=10, fi_interval=2),
    *(_optimized(f"deepcache {n}", "DeepCache", f"{n}", gate_step=None, deepcache_interval=n) for n in (2, 3, 5)),
    *(
        _optimized(f"deepcache 3 tgate {g}", "DeepCache + T-GATE", f"3, {g}", gate_step=g, deepcache_interval=3)
        for g in (5, 10)
    ),
    # Cache the cond half's outputs instead of the mean of both halves.
    *(
        _optimized(f"tgate {g} anchor 1.0", "T-GATE, cond cached", f"{g}", gate_step=g, anchor_weight=1.0)
        for g in (2, 3, 5, 10)
    ),
    *(
        _anchored(
            g,
            f"steps {n} tgate {g} anchor 1.0",
            "fewer steps + T-GATE, cond cached",
            f"{n}, {g}",
            num_inference_steps=n,
        )
        for n, g in ((20, 5), (15, 4), (12, 3), (10, 3))
    ),
    Contender(
        "steps 15 drop 4",
        "fewer steps + guidance drop",
        "15, 4",
        {"gate_step": None, "guidance_step": 4},
        {"num_inference_steps": 15},
    ),
    _anchored(3, "tgate 3 anchor 1.0 guidance 8.0", "stronger guidance", "3, 8", guidance_scale=8.0),
    _optimized(
        "deepcache 3 tgate 5 anchor 1.0",
        "DeepCache + T-GATE, cond cached",
        "3, 5",
        gate_step=5,
        deepcache_interval=3,
        anchor_weight=1.0,
    ),
    *(
        _optimized(f"tgate 5 anchor {w}", "other anchors", f"{w}", gate_step=5, anchor_weight=w)
        for w in (0.0, 0.75, 1.25, 2.0, 5.0)
    ),
    # Without text after the gate both halves are equal, so the images must be equal too.
    _optimized("tgate 5 cond", "other anchors", "0.5", gate_step=5, keep="cond"),
    # Smaller caches, with fewer bits or fewer sites.
    *(
        _optimized(
            f"tgate 5 anchor 1.0 {dtype}", "smaller caches", dtype, gate_step=5, anchor_weight=1.0, cache_dtype=dtype
        )
        for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    ),
    *(
        _optimized(
            f"tgate 5 anchor 1.0 {name}, keep {keep}",
            "smaller caches",
            f"{name}, {keep}",
            gate_step=5,
            anchor_weight=1.0,
            keep=keep,
            sites=sites,
        )
        for name, sites in (("up blocks", ["up_blocks.*"]), ("without up_blocks.2", ["[dm]*", "up_blocks.[01]*"]))
        # Sites that are not cached continue with the text of the half that is kept.
        for keep in ("uncond", "cond")
    ),
)
