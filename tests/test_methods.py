"""Methods and their composition, and Pyramid Attention Broadcast against diffusers' own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_pyramid_attention_broadcast

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.tiny_pipelines import pixart, pixart_prompt, run, stable_diffusion
from tests.tiny_video import latte, latte_call
from tgate_compile import PAB, AdaptiveGuidance, ConfigurationError, DeepCache, FrozenText, Schedule, TGate
from tgate_compile.bundle.plan_rows import MAX_STEPS, plan_from, plans_of
from tgate_compile.methods.method import DECIDED, GRAPH_NAMES, REUSED, Kind, Method, Phase, Share, Timeline, methods
from tgate_compile.methods.schedule_file import load_schedule, read_schedule, save_schedule, schedule_data

STEPS = 10


@pytest.mark.parametrize(
    ("methods", "short"),
    [
        (TGate(10) + DeepCache(3), Schedule(10, deepcache_interval=3)),
        (DeepCache(3, branch=1) + TGate(10), Schedule(10, deepcache_interval=3, deepcache_branch=1)),
        (Schedule.of(TGate(0.4, sp_interval=5, warm_up=3)), Schedule(0.4, sp_interval=5, warm_up=3)),
        (Schedule.of(AdaptiveGuidance(step=10)), Schedule(None, guidance_step=10)),
        (
            AdaptiveGuidance(similarity=0.991) + DeepCache(2),
            Schedule(None, guidance_similarity=0.991, deepcache_interval=2),
        ),
        (PAB(4, 2) + TGate(6), Schedule(6, others=(PAB(4, 2),))),
        (TGate(6) + PAB(4, 2), Schedule(6, others=(PAB(4, 2),))),
    ],
)
def test_methods_and_the_short_form_are_the_same(methods: Schedule, short: Schedule) -> None:
    assert methods == short
    assert hash(methods) == hash(short)
    assert methods.plan(25, guided=True) == short.plan(25, guided=True)


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: TGate(10) + TGate(5), "T-GATE is given twice"),
        (lambda: TGate(10) + AdaptiveGuidance(step=5), "Guidance can end in only one way"),
        (lambda: DeepCache(3) + TGate(10, sp_interval=5), "DeepCache cannot be combined with cached self-attention"),
        (lambda: DeepCache(3) + PAB(4, 1), "DeepCache cannot be combined with PAB"),
        (lambda: TGate(10, fi_interval=2) + PAB(4, 2), "both cache the values of kind 'self'"),
        (lambda: Schedule.of(DeepCache(1)), "computes everything in every step"),
        (lambda: AdaptiveGuidance(), "a step or a similarity"),
        (lambda: PAB(1, 1), "caches nothing"),
        (lambda: PAB(0, 1), "at least 1"),
        (lambda: PAB(begin=0.5, end=0.5), "begin < end"),
        (lambda: Schedule(None), "Nothing to do"),
        (lambda: FrozenText(10, text="values"), 'must be "keys" or "hidden", but got \'values\''),
    ],
)
def test_impossible_combinations(make: Callable[[], Any], telling: str) -> None:
    with pytest.raises(ConfigurationError, match=telling):
        make()


def test_every_set_of_reused_kinds_has_a_distinct_letter_and_name() -> None:
    letters = Counter(Phase(guided, reuse=reuse).character for reuse in REUSED for guided in (True, False))
    assert len(letters) == 2 * len(REUSED) == 2 * 23
    # Steps whose other half is estimated have a letter of their own, but run the graph of a full step.
    assert len(set(GRAPH_NAMES.values())) == len(GRAPH_NAMES) - 1 == len(REUSED) + len(DECIDED)


def test_the_methods_of_the_package_are_found() -> None:
    assert set(methods()) == {
        "tgate", "deepcache", "guidance", "pab", "frozentext", "references", "fora", "blockcache", "deltadit",
        "magcache", "fastercache", "firstblock", "dbcache", "teacache",
    }  # fmt: skip


def test_pab_within_its_window() -> None:
    assert Schedule.of(PAB(3, 2, begin=0.2, end=0.9)).strip(STEPS) == "FFPSPQFQPF"
    # The step before a gate computes everything for it; self-attention is reused again after it.
    assert (PAB(3, 2, begin=0.0, end=1.0) + TGate(5)).strip(STEPS) == "FQPSFpqpqp"
    assert (PAB(3, 1, begin=0.0, end=1.0) + AdaptiveGuidance(step=4)).strip(STEPS) == "FPPFfppfpp"


def test_files_hold_further_methods(tmp_path: Path) -> None:
    schedule = PAB(4, 2, begin=0.25) + TGate(6)
    save_schedule(schedule, tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json") == schedule
    assert json.loads((tmp_path / "a.json").read_text())["schedule"]["pab"]["begin"] == 0.25
    assert set(schedule_data(Schedule(6))) == {name for name in schedule_data(schedule) if name != "pab"}
    with pytest.raises(ConfigurationError, match="unknown key 'window' in \"pab\""):
        read_schedule({"pab": {"window": 3}})
    with pytest.raises(ConfigurationError, match=r"a\.json: PAB needs 0 <= begin"):
        read_schedule({"pab": {"begin": 3}}, "a.json")


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(10),
        Schedule(0.4, sp_interval=5, fi_interval=3),
        DeepCache(3) + TGate(7),
        Schedule(None, guidance_step=0.5),
        PAB(4, 2) + TGate(12),
        PAB(2, 3, 5, begin=0.1, end=1.0) + AdaptiveGuidance(step=31),  # more phases than there are lower-case digits
    ],
    ids=str,
)
def test_rows_of_a_manifest_agree_with_the_rules(schedule: Schedule, guided: bool) -> None:
    plans = plans_of(schedule, {})
    assert plans is not None
    for steps in (1, 7, 25, MAX_STEPS):
        assert [one.letter for one in plan_from(plans, steps, guided=guided)] == list(
            schedule.strip(steps, guided=guided)
        )
        assert plans.gates[steps - 1] == (None if schedule.gate_step is None else min(schedule.gate(steps), steps))
    if plans.gated_guided is None:
        assert schedule.gate_step is None or schedule.others
    else:
        moved = Schedule(5, sp_interval=schedule.sp_interval, fi_interval=schedule.fi_interval,
                         deepcache_interval=schedule.deepcache_interval)  # fmt: skip
        row = plan_from(plans, 25, guided=guided, gate_step=5)
        assert [one.letter for one in row] == list(moved.strip(25, guided=guided))


def test_no_rows_where_steps_are_decided_as_they_run() -> None:
    assert plans_of(Schedule(None, guidance_similarity=0.99), {}) is None


def pixart_call() -> dict[str, Any]:
    return {**pixart_prompt(), "guidance_scale": 4.0}


@pytest.mark.parametrize(
    ("build", "call", "method"),
    [
        (stable_diffusion, lambda: {"prompt": "a fox"}, PAB(4, 2)),
        (pixart, pixart_call, PAB(3, 2)),
        (pixart, pixart_call, PAB(1, 3)),
        (latte, latte_call, PAB(4, 2, 3)),
        (latte, latte_call, PAB(1, 1, 2)),
    ],
    ids=["stable diffusion", "pixart", "pixart, self alone", "latte", "latte, temporal alone"],
)
def test_pab_is_as_in_diffusers(build: Callable[[], Any], call: Callable[[], Any], method: PAB) -> None:
    def images(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**call(), num_inference_steps=STEPS, generator=generator, output_type="latent")[0])

    pipe = build()
    pipe.scheduler = DDIMScheduler(steps_offset=1)  # timesteps 901, 801, ..., 1: steps 2 to 8 are within (100, 800)
    plain = images(pipe)
    tgate_compile.optimize(pipe, method, backend="eager")
    ours = images(pipe)
    tgate_compile.restore(pipe)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    timestep: list[int] = []
    pipe_forward = denoiser.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        given = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timestep[:] = [int(torch.as_tensor(given).flatten()[0])]
        return pipe_forward(*args, **kwargs)

    denoiser.forward = noting
    intervals = {
        "cross": method.cross_interval, "spatial": method.self_interval, "temporal": method.temporal_interval
    }  # fmt: skip
    config = PyramidAttentionBroadcastConfig(
        **{f"{kind}_attention_block_skip_range": n for kind, n in intervals.items() if n > 1},
        spatial_attention_block_identifiers=(r"(?<!temporal_)transformer_blocks",),
        current_timestep_callback=lambda: timestep[0],
    )
    apply_pyramid_attention_broadcast(denoiser, config)
    theirs = images(pipe)
    assert_same(ours, theirs)
    assert_differ(ours, plain)


def test_pab_with_a_gate_serves_every_step_from_few_graphs() -> None:
    pipe = stable_diffusion()
    tgate_compile.optimize(pipe, PAB(3, 2, begin=0.0, end=1.0) + TGate(5), backend="eager")
    run(pipe, steps=STEPS)
    described = tgate_compile.describe(pipe)
    assert described.strip == "FQPSFpqpqp"
    run(pipe, steps=STEPS)
    assert tgate_compile.describe(pipe).variants == described.variants


def test_refusals_name_what_is_missing() -> None:
    pipe = stable_diffusion()
    tgate_compile.optimize(pipe, PAB(1, 1, 2), backend="eager")
    with pytest.raises(tgate_compile.UnsupportedModelError, match="no attention between frames"):
        run(pipe, steps=3)
    with pytest.raises(ConfigurationError, match="sp_interval is given as well"):
        tgate_compile.optimize(stable_diffusion(), TGate(3), sp_interval=2)


@dataclass(frozen=True)
class Forgetful(Method):
    """A method that emits values that its graphs do not return."""

    key: ClassVar[str] = "forgetful"
    title: ClassVar[str] = "Forgetful"

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"self"})

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        return Share(emit=self.kinds) if step == 0 else Share(reuse=self.kinds)

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share()


def test_a_method_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"step 0 emits self, which hands_on\(\)"):
        Schedule.of(Forgetful()).plan(3, guided=True)


@pytest.mark.heavy
def test_a_bundle_runs_pab(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pipe = stable_diffusion(layout="small")
    tgate_compile.optimize(pipe, PAB(3, 2, begin=0.0, end=1.0) + TGate(4), backend="eager")
    expected = run(pipe, steps=6)
    call = {"prompt": "", "num_inference_steps": 6}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=call, dynamic=False)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe, steps=6), expected) < 1e-4
    graphs = json.loads((folder / "manifest.json").read_text())["graphs"]
    assert {"full", "pruned", "pruned-guided", "pruned-self-reused-guided"} <= set(graphs)
