"""The settings that `findings.py` measures: the paper's tables on the embedded models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import diffusers

from tgate_compile import Schedule

#: Prompts of each image set: held-out captions, which were never used for training.
SINGLES, PAIRS, CAPTION_SEED = 8, 24, 2028
SEEDS = (0, 1, 2)

# As configured in Stable Diffusion's repositories. With "leading" spacing they start below the last training step,
# whose noise level is unbounded in the embedded models' noise schedule (the DPM++ configuration clips it).
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS: Mapping[str, tuple[type[diffusers.SchedulerMixin], Mapping[str, object]]] = MappingProxyType(
    {
        "Euler": (diffusers.EulerDiscreteScheduler, _LEADING),
        "DDIM": (diffusers.DDIMScheduler, {**_LEADING, "clip_sample": False, "set_alpha_to_one": False}),
    }
)


@dataclass(frozen=True)
class Setting:
    """An evaluation: a plain pipeline and the schedules that are compared with it.

    Attributes:
        model: name of the embedded model.
        steps: number of denoising steps.
        scheduler: name in `SCHEDULERS`, or "own" for the model's own scheduler.
        contenders: schedules, or numbers of steps of the plain pipeline, by label.
    """

    model: str
    steps: int
    scheduler: str = "own"
    contenders: Mapping[str, Schedule | int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The unique name of the setting."""
        return f"{self.model}, {self.steps} steps" + ("" if self.scheduler == "own" else f", {self.scheduler}")


def _gates(*gates: int) -> dict[str, Schedule | int]:
    return {f"T-GATE {g}": Schedule(g) for g in gates}


def _cond_cached(*gates: int) -> dict[str, Schedule | int]:
    return {f"T-GATE {g}, cond cached": Schedule(g, anchor_weight=1.0) for g in gates}


def _guidance_drop(*steps: int) -> dict[str, Schedule | int]:
    """Return schedules of Adaptive Guidance with a fixed step."""
    return {f"guidance drop {g}": Schedule(None, guidance_step=g) for g in steps}


def _fewer(*steps: int) -> dict[str, Schedule | int]:
    return {f"{n} steps": n for n in steps}


_DEEPCACHE: Mapping[str, Schedule | int] = MappingProxyType(
    {
        "DeepCache 3": Schedule(None, deepcache_interval=3),
        "DeepCache 3 + T-GATE 10": Schedule(10, deepcache_interval=3),
    }
)


def _methods(*fewer: int) -> dict[str, Schedule | int]:
    """Return all methods except DeepCache, and the plain pipeline with `fewer` steps.

    `fewer` are the numbers of steps whose cost is closest to that of T-GATE with the gates 10, 5 and 3.
    """
    return {
        **_gates(3, 5, 10),
        **_cond_cached(3, 5, 10),
        "T-GATE v2 10": Schedule(10, sp_interval=5),
        **_guidance_drop(5, 10),
        **_fewer(*fewer),
    }


_LCM = {**_gates(1, 2), **_cond_cached(1), "DeepCache 3": Schedule(None, deepcache_interval=3), **_fewer(3, 2)}
_ON_A_SCHEDULER = {**_gates(5, 10), **_cond_cached(5), **_guidance_drop(10), **_fewer(17, 14)}

SETTINGS: tuple[Setting, ...] = (
    Setting("sd", 25, contenders={**_methods(17, 14, 13), **_DEEPCACHE, **_fewer(8)}),
    Setting("sdxl", 25, contenders={**_methods(17, 14, 13), **_DEEPCACHE, **_fewer(8)}),
    Setting("lcm", 4, contenders=_LCM),
    # A gate at step 10 for any number of steps, and one at 40 % of the steps.
    Setting("sdxl", 15, contenders=_gates(6, 10)),
    Setting("sdxl", 50, contenders={**_gates(10, 20), **_fewer(29)}),
    Setting("sdxl", 100, contenders=_gates(10, 40)),
    *(Setting("sdxl", 25, name, _ON_A_SCHEDULER) for name in SCHEDULERS),
    *(Setting("sd", 25, name, _ON_A_SCHEDULER) for name in SCHEDULERS),
    Setting("pixart", 25, contenders={**_methods(16, 13, 12), **_gates(8), **_fewer(15)}),
)
