"""Measure every caching method on the embedded models: quality against operations and time, as a table and a plot.

    python benchmarks/methods_pareto.py --models pixart sd3 --out benchmarks/results/methods.json --plot methods.png
    python benchmarks/methods_pareto.py --models pixart --captions 8 --seeds 0 --only "plain" "steps *" "fora *"

All contenders draw the same held-out captions from the same noise, in turns: each round is one seed, and in each round
every contender makes all images once. The first round is repeated beforehand, untimed, to capture and compile graphs.

Beside the methods there are plain generations in fewer steps, and diffusers' own hooks for the same methods. Operations
are multiply-accumulates of the denoiser in linear and convolution layers, relative to the plain pipeline; for a hook of
diffusers they are those of the same method here. `drift` is ||x - plain x|| / ||plain x|| of an image's final latents;
`accuracy` is the fraction of images that show everything in their captions according to the attribute reader;
`against_fewer_steps` is the drift divided by that of fewer steps at the same operations, interpolated: below 1, a
method is worth its operations.

With `--budgets 0.5`, schedules that `tune` finds for half of the operations take part, which takes long. They are found
with other captions than they are measured with.

With `--decided`, the methods that decide at run time are measured instead, and all contenders make one image at a time,
because there is one decision for all images of a batch. TeaCache's polynomial is fitted with other captions.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context

import tgate_compile
from tgate_compile import (
    DEMO_VARIANTS,
    PAB,
    AdaptiveGuidance,
    BlockCache,
    DBCache,
    DeepCache,
    DeltaDiT,
    FasterCache,
    FirstBlockCache,
    Fora,
    FrozenText,
    MagCache,
    Method,
    Schedule,
    TeaCache,
    TGate,
    UnsupportedModelError,
)
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions
from tgate_compile.methods.tea_cache import threshold_for
from tgate_compile.study.bench.measure import cost_of_last
from tgate_compile.study.evaluation.features import Statistics, frechet_distance
from tgate_compile.study.evaluation.measure import right
from tgate_compile.study.tuning.calibrate import fit_tea_cache
from tgate_compile.study.tuning.request import Runs as FitRuns

FEWER = (0.8, 0.6, 0.5, 0.4, 0.3)

#: The shares of the steps that TeaCache skips with a fitted polynomial, and with none.
SKIPPED = (0.4, 0.5, 0.6, 0.7)


@dataclass
class Contender:
    """One way to make the images.

    Attributes:
        name: the name in tables.
        group: the line in the plot.
        schedule: the schedule; None for the plain pipeline and for diffusers' hooks.
        steps: the number of steps, if it is not the model's own.
        hook: applies diffusers' own implementation to a pipeline's denoiser.
        like: the contender whose operations a hook has.
    """

    name: str
    group: str
    schedule: Schedule | None = None
    steps: int | None = None
    hook: Callable[[Any], None] | None = None
    like: str | None = None


def plain_ones(steps: int) -> list[Contender]:
    """Return the plain pipeline, also in fewer steps."""
    fewer = sorted({round(share * steps) for share in FEWER}, reverse=True)
    return [Contender("plain", "plain"), *(Contender(f"steps {n}", "fewer steps", steps=n) for n in fewer)]


def contenders(model: str, steps: int, blocks: int, ratios: tuple[float, ...]) -> list[Contender]:
    """Return the contenders for a model with so many transformer blocks (0: a UNet)."""
    found = plain_ones(steps)

    def add(group: str, *schedules: Method | Schedule) -> None:
        for each in schedules:
            schedule = each if isinstance(each, Schedule) else Schedule.of(each)
            found.append(Contender(str(schedule), group, schedule))

    is_joint, gates = model == "sd3", [round(0.2 * steps), round(0.4 * steps)]
    add("T-GATE", *(TGate(gate) for gate in gates))
    add("Adaptive Guidance", *(AdaptiveGuidance(gate) for gate in gates))
    add("frozen text", *(FrozenText(gate) for gate in gates))
    add("FORA", Fora(2), Fora(3), Fora(3, forecast=1), Fora(4, warm_up=3, forecast=2))
    add("FasterCache", FasterCache(2, begin=0.2), FasterCache(5))
    ends = AdaptiveGuidance(gates[1])
    add("FORA + guidance end", Fora(2) + ends, Fora(3, forecast=1) + ends)
    if not is_joint:
        add("PAB", PAB(4, 2), PAB(6, 3, begin=0.1, end=1.0))
        add("FORA + T-GATE", Fora(2) + TGate(gates[1]), Fora(3, forecast=1) + TGate(gates[1]))
        add("FasterCache + T-GATE", FasterCache(2, begin=0.0) + TGate(gates[1]))
    if not blocks:
        add("DeepCache", DeepCache(2), DeepCache(3), DeepCache(3) + TGate(gates[1]))
        return found
    half = max(1, blocks // 2)
    gate = TGate(gates[1])
    add("block cache", BlockCache(2), BlockCache(3), BlockCache(3, 0), BlockCache(2, back=1))
    add("block cache, forecast", BlockCache(2, forecast=1), BlockCache(3, warm_up=3, forecast=1))
    add("block cache + T-GATE", BlockCache(2) + gate, BlockCache(2, forecast=1) + gate)
    add("Delta-DiT", DeltaDiT(2, blocks=half), DeltaDiT(3, blocks=half), DeltaDiT(2, blocks=half, forecast=1))
    mag = MagCache(ratios)
    add("MagCache", *mag.thresholds(), MagCache(ratios, threshold=0.12, forecast=1), mag + gate)
    return found + hooks(steps, ratios)


def hooks(steps: int, ratios: tuple[float, ...]) -> list[Contender]:
    """Return diffusers' own implementations, with the settings of the contenders above."""

    def mag(pipe: Any) -> None:
        config = MagCacheConfig(num_inference_steps=steps, mag_ratios=torch.tensor(ratios))
        apply_mag_cache(pipe.transformer, config)

    def taylor(pipe: Any) -> None:
        names = [r".*blocks\.\d+\.(attn|attn1|attn2|ff|ff_context)"]
        config = TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1, max_order=0, cache_identifiers=names
        )
        apply_taylorseer_cache(pipe.transformer, config)

    def first_block(pipe: Any) -> None:
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.08))

    def faster(pipe: Any) -> None:
        config = FasterCacheConfig(
            tensor_format="BCHW",
            spatial_attention_timestep_skip_range=(-1, -1),
            current_timestep_callback=lambda: 0 if pipe.transformer_calls > round(0.36 * steps) else 1000,
            _unconditional_conditional_input_kwargs_identifiers=[
                "hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "pooled_projections",
            ],
        )  # fmt: skip
        apply_faster_cache(pipe.transformer, config)

    def broadcast(pipe: Any) -> None:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=4,
            current_timestep_callback=lambda: (
                500 if round(0.2 * steps) < pipe.transformer_calls <= round(0.9 * steps) else 1000
            ),
        )
        apply_pyramid_attention_broadcast(pipe.transformer, config)

    group = "diffusers' hooks"
    return [
        Contender("diffusers MagCache", group, hook=mag, like=str(MagCache(ratios))),
        Contender("diffusers TaylorSeer, order 0", group, hook=taylor, like=str(Fora(2))),
        Contender("diffusers first-block cache 0.08", group, hook=first_block),
        Contender("diffusers FasterCache, guidance", group, hook=faster, like=str(FasterCache(5))),
        Contender("diffusers PAB", group, hook=broadcast, like=str(PAB(4, 2))),
    ]


class Runs:
    """The generations of one model.

    Args:
        name: the name of the embedded model.
        captions: the captions, all of them in one batch unless `apart`.
        steps: the number of steps.
        backend: the backend of the schedules.
        apart: whether each image is made by a call of its own.
    """

    def __init__(self, name: str, captions: Sequence[str], steps: int, backend: str, *, apart: bool = False) -> None:
        self.name = name
        self.apart = apart
        self._macs: dict[str, list[float]] = defaultdict(list)  # of each call of a schedule
        self.captions = list(captions)
        self.steps = steps
        self._backend: Any = backend
        self._pipes: dict[str, Any] = {}

    def plain_pipe(self) -> Any:
        pipe = tgate_compile.load_demo_pipeline(self.name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pipe(self, contender: Contender) -> Any:
        """Return the pipeline of a contender, made when it is first needed."""
        if contender.name not in self._pipes:
            pipe = self.plain_pipe()
            if contender.schedule is not None:
                tgate_compile.optimize(pipe, contender.schedule, backend=self._backend)
            if contender.hook is not None:
                hook(pipe, contender.hook)
            self._pipes[contender.name] = pipe
        return self._pipes[contender.name]

    def latents(self, contender: Contender, seed: int) -> tuple[torch.Tensor, float]:
        """Return the final latents, [captions, ...], and the seconds that they took."""
        pipe = self.pipe(contender)
        if contender.hook is not None:
            start(pipe)
        demo = DEMO_VARIANTS[self.name]
        call = {**demo.call, "num_inference_steps": contender.steps or self.steps, "guidance_scale": demo.guidance}
        everyone = range(len(self.captions))
        made, seconds = [], 0.0
        for chosen in [[i] for i in everyone] if self.apart else [list(everyone)]:
            noise = [torch.Generator().manual_seed(seed * 1_000_000 + i) for i in chosen]
            captions = [self.captions[i] for i in chosen]
            began = time.perf_counter()
            made.append(pipe(captions, generator=noise, output_type="latent", **call).images)
            seconds += time.perf_counter() - began
            if contender.schedule is not None:
                self._macs[contender.name].append(cost_of_last(pipe).macs)
        return torch.cat(made), seconds

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the decoded images in [0, 1]."""
        vae = next(iter(self._pipes.values())).vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        decoded = [vae.decode(x / vae.config.scaling_factor + shift).sample for x in latents.split(8)]
        return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)

    def macs(self, contender: Contender) -> float:
        """Return the multiply-accumulates of one of the contender's calls, on average."""
        if contender.schedule is None:
            return self._full() * (contender.steps or self.steps)
        return statistics.fmean(self._macs[contender.name])

    def _full(self) -> float:
        """Return the multiply-accumulates of a step of the plain pipeline."""
        pipe = tgate_compile.optimize(self.plain_pipe(), AdaptiveGuidance(2), backend="eager")
        demo, captions = DEMO_VARIANTS[self.name], self.captions[:1] if self.apart else self.captions
        pipe(captions, output_type="latent", **demo.call, num_inference_steps=2, guidance_scale=demo.guidance)
        return cost_of_last(pipe).macs / 2


def hook(pipe: Any, apply: Callable[[Any], None]) -> None:
    """Apply one of diffusers' implementations to a pipeline, whose denoiser's calls are counted for it."""

    def count(*given: Any) -> None:
        pipe.transformer_calls += 1

    pipe.transformer_calls = 0
    pipe.transformer.register_forward_pre_hook(count)
    apply(pipe)


def start(pipe: Any) -> None:
    """Prepare a pipeline with one of diffusers' implementations for a generation."""
    pipe.transformer_calls = 0
    for module in pipe.transformer.modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.reset_stateful_hooks()  # their state outlives a call, and not every pipeline does so
    _set_cache_context(pipe.transformer, CacheContext("inference"))  # which not every pipeline does


def drifts(latents: torch.Tensor, plain: torch.Tensor) -> list[float]:
    """Return ||x - plain x|| / ||plain x|| of each image."""
    found: list[float] = ((latents - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).tolist()
    return found


def measure(runs: Runs, chosen: Sequence[Contender], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the measurements of each contender, by name; those that a model does not support have a reason only."""
    rows: dict[str, Any] = {}
    latents: dict[str, list[torch.Tensor]] = {}
    seconds: dict[str, list[float]] = {}
    able: list[Contender] = []
    for contender in chosen:
        try:
            runs.latents(contender, seeds[0])
        except (UnsupportedModelError, ValueError, AttributeError, TypeError) as error:
            if contender.hook is None and not isinstance(error, UnsupportedModelError):
                raise
            rows[contender.name] = {"group": contender.group, "unsupported": f"{type(error).__name__}: {error}"[:300]}
            print(f"{runs.name}: {contender.name}: {rows[contender.name]['unsupported']}", flush=True)
            continue
        able.append(contender)
        latents[contender.name], seconds[contender.name] = [], []
    for seed in seeds:
        for contender in able:
            made, took = runs.latents(contender, seed)
            latents[contender.name].append(made)
            seconds[contender.name].append(took)
        print(f"{runs.name}: seed {seed} done", flush=True)
    reader = AttributeReader.load()
    plain = torch.cat(latents["plain"])
    plain_pixels = runs.pixels(plain)
    plain_features = Statistics.of(reader.features(plain_pixels))
    full = runs.macs(able[0])
    costs = {contender.name: runs.macs(contender) / full for contender in able if contender.hook is None}
    for contender in able:
        own = torch.cat(latents[contender.name])
        if contender.hook is not None and torch.equal(own, plain):
            raise RuntimeError(f"{contender.name} has no effect on {runs.name}.")
        pixels = runs.pixels(own)
        seen = right(reader, pixels, runs.captions * len(seeds))
        # Pixels are between 0 and 1; identical images have no finite ratio.
        errors = (pixels - plain_pixels).square().flatten(1).mean(1)
        ratios = [-10 * math.log10(error) for error in errors.tolist() if error > 0]
        of_images, by_seed = drifts(own, plain), seen.float().split(len(runs.captions))
        rows[contender.name] = {
            "group": contender.group,
            "strip": None
            if contender.schedule is None
            else tgate_compile.describe(runs.pipe(contender)).strip,
            "operations": round(costs.get(contender.like or contender.name, math.nan), 4),
            "seconds_per_image": statistics.median(seconds[contender.name]) / len(runs.captions),
            "time": round(statistics.median(a / b for a, b in zip(
                seconds[contender.name], seconds["plain"], strict=True)), 4),
            "drift": round(statistics.fmean(of_images), 5),
            "drift_spread": round(statistics.pstdev(of_images), 5),
            "accuracy": round(float(seen.float().mean()), 4),
            "accuracy_by_seed": [round(float(of_seed.mean()), 4) for of_seed in by_seed],
            "psnr": round(statistics.fmean(ratios), 3) if ratios else None,
            "frechet_to_plain": round(frechet_distance(plain_features, Statistics.of(reader.features(pixels))), 3),
        }  # fmt: skip
    against_fewer_steps(rows)
    return rows


def against_fewer_steps(rows: dict[str, Any]) -> None:
    """Add each row's drift relative to that of fewer steps at the same operations."""
    fewer = sorted((r["operations"], r["drift"]) for r in rows.values() if r["group"] in ("fewer steps", "plain"))
    for row in rows.values():
        cost = row.get("operations", math.nan)
        between = [(a, b) for a, b in pairwise(fewer) if a[0] <= cost <= b[0]]
        if not between or row["group"] in ("fewer steps", "plain"):
            continue
        (low, more), (high, less) = between[0]
        baseline = less + (more - less) * (high - cost) / max(high - low, 1e-9)
        row["against_fewer_steps"] = round(row["drift"] / baseline, 4) if baseline > 0 else None


def searched(name: str, steps: int, budget: float) -> list[Contender]:
    """Return the schedules with the least drift within the budget according to `tune`, of all and of plans of steps."""
    pipe, demo = tgate_compile.load_demo_pipeline(name), DEMO_VARIANTS[name]
    call = {**demo.call, "guidance_scale": demo.guidance}
    tuning = tgate_compile.tune(
        pipe, captions_of(4, 8), budget=budget, num_inference_steps=steps, seeds=(5,), call=call
    )
    print(tuning, flush=True)
    plans = [row for row in tuning.table if row.family == "plan of steps" and row.cost <= budget]
    rows = {row.label: row for row in (tuning.chosen, *sorted(plans, key=lambda row: row.drift)[:4])}
    return [Contender(row.label, f"tuned for {budget:g}", row.schedule) for row in rows.values()]


def deciding(name: str, steps: int, ratios: tuple[float, ...]) -> tuple[list[Contender], dict[str, Any]]:
    """Return the methods that decide at run time, with MagCache to compare, and the fit of TeaCache's polynomial."""
    unfitted = (1.0, 0.0)
    found = plain_ones(steps)
    pipe, demo = tgate_compile.load_demo_pipeline(name), DEMO_VARIANTS[name]
    call = {**demo.call, "guidance_scale": demo.guidance}
    fit = fit_tea_cache(pipe, FitRuns(captions_of(6, 9), steps, (5,), call, "decided"))
    methods: dict[str, list[Method]] = {
        "first-block cache": [*map(FirstBlockCache, (0.05, 0.08, 0.12)), FirstBlockCache(0.12, forecast=1)],
        "DBCache": [
            *(DBCache(threshold, front=1, warm_up=5) for threshold in (0.12, 0.2)),
            DBCache(0.2, front=1, warm_up=5, forecast=1),
        ],
        "TeaCache": [
            *(TeaCache(threshold, coefficients=unfitted) for threshold in (0.1, 0.2)),
            TeaCache(0.2, coefficients=unfitted, forecast=1),
        ],
        "MagCache": [MagCache(ratios, 0.12), MagCache(ratios, 0.12, forecast=1)],
    }
    # The thresholds make both polynomials skip as many steps.
    for group, coefficients in (("TeaCache", unfitted), ("TeaCache, fitted", fit.method.coefficients)):
        thresholds = [threshold_for(coefficients, fit.series, share) for share in SKIPPED]
        methods.setdefault(group, []).extend(
            TeaCache(round(threshold, 4), coefficients=coefficients, measured=fit.method.measured)
            for threshold in thresholds
        )
    for group, several in methods.items():
        for method in several:
            label = str(Schedule.of(method))
            if group == "TeaCache, fitted":
                assert isinstance(method, TeaCache)
                label = f"TeaCache (threshold {method.threshold:g}, fitted)"
            found.append(Contender(label, group, Schedule.of(method)))
    fitted = {"coefficients": fit.method.coefficients, "measured": fit.method.measured}
    return found, {**fitted, "r_squared": {value: each.r_squared for value, each in fit.fits.items()}}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw drift and wrong images against operations and time, a row of panels for each model."""
    import matplotlib

    matplotlib.use("Agg")  # write files without opening a window
    from matplotlib import pyplot as plt

    models = results["models"]
    panels = [("operations", "drift"), ("operations", "accuracy"), ("time", "drift")]
    figure, axes = plt.subplots(len(models), 3, figsize=(21, 7 * len(models)), squeeze=False, layout="constrained")
    markers = "osD^vP*XhdpH<>8"
    for row, (name, rows) in zip(axes, models.items(), strict=True):
        groups = dict.fromkeys(each["group"] for each in rows.values() if "drift" in each)
        for axis, (across, up) in zip(row, panels, strict=True):
            for number, group in enumerate(groups):
                points = [r for r in rows.values() if r["group"] == group and "drift" in r and math.isfinite(r[across])]
                points.sort(key=lambda point: point[across])
                line = "--" if group == "fewer steps" else ""
                style = {"marker": markers[number % len(markers)], "linestyle": line or "none"}
                colour = "black" if group in ("fewer steps", "plain") else f"C{number % 10}"
                axis.plot([p[across] for p in points], [p[up] for p in points], color=colour, label=group, **style)
            axis.set(xlabel=f"{across}, plain = 1", ylabel=up, title=f"{name}: {up}")
            axis.grid(alpha=0.3)
        row[0].legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def read(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the rows of several result files; where they have rows of the same group, the first file's."""
    models: dict[str, dict[str, Any]] = {}
    for path in paths:
        for name, rows in json.loads(path.read_text())["models"].items():
            own = models.setdefault(name, {})
            known = {row["group"] for row in own.values()}
            own.update(
                {row["name"]: row for row in rows if row["group"] not in known and "diffusers" not in row["name"]}
            )
    return {"models": models}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pixart", "sd3"], choices=[*DEMO_VARIANTS])
    parser.add_argument("--captions", type=int, default=32, help="half of them with one object, half with two")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="the default is each model's own")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names; plain is always measured")
    parser.add_argument("--budgets", nargs="*", type=float, default=[], help="also schedules tuned for these budgets")
    parser.add_argument("--decided", action="store_true", help="measure methods that decide at run time, instead")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--read", type=Path, nargs="+", help="draw the results in these files instead of measuring")
    given = parser.parse_args(arguments)
    if given.read is not None:
        draw(read(given.read), given.plot)
        return
    results: dict[str, Any] = {
        "settings": {"captions": given.captions, "seeds": given.seeds, "steps": given.steps, "backend": given.backend},
        "models": {},
    }
    for name in given.models:
        steps = given.steps or DEMO_VARIANTS[name].steps
        runs = Runs(name, captions_of(given.captions, 7), steps, given.backend, apart=given.decided)
        pipe = runs.plain_pipe()
        demo = DEMO_VARIANTS[name]
        transformer = getattr(pipe, "transformer", None)
        blocks = 0 if transformer is None else len(transformer.transformer_blocks)
        ratios: tuple[float, ...] = (1.0,)
        if blocks:
            call = {**demo.call, "guidance_scale": demo.guidance}
            found = tgate_compile.calibrate_mag_cache(pipe, captions_of(2, 9), num_inference_steps=steps, call=call)
            ratios = found.ratios
        if given.decided:
            every, results.setdefault("fits", {})[name] = deciding(name, steps, ratios)
        else:
            every = contenders(name, steps, blocks, ratios)
        chosen = [c for c in every if any(fnmatch(c.name, p) for p in given.only)]
        for budget in given.budgets:
            found = searched(name, steps, budget)
            chosen = [c for c in chosen if c.name not in {each.name for each in found}] + found
        chosen = [Contender("plain", "plain"), *(c for c in chosen if c.name != "plain")]
        rows = results["models"][name] = measure(runs, chosen, given.seeds)
        for label, row in rows.items():
            if "drift" in row:
                print(
                    f"{name:7} {label:60} operations {row['operations']:.3f} time {row['time']:.3f} drift "
                    f"{row['drift']:.4f} accuracy {row['accuracy']:.3f} against fewer steps "
                    f"{row.get('against_fewer_steps')}"
                )
        if given.out is not None:
            models = {m: listed(rows) for m, rows in results["models"].items()}
            given.out.write_text(json.dumps({**results, "models": models}, indent=1) + "\n")
    if given.plot is not None:
        draw(results, given.plot)


def listed(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with their names, cheapest first."""
    return sorted(({"name": n, **r} for n, r in rows.items()), key=_operations)


def _operations(row: Mapping[str, Any]) -> float:
    cost = row.get("operations", math.nan)
    return math.inf if math.isnan(cost) else cost


def captions_of(count: int, seed: int) -> list[str]:
    """Return held-out captions, half of them with one object and half with two."""
    return [*held_out_captions(count - count // 2, seed, objects=1), *held_out_captions(count // 2, seed, objects=2)]


if __name__ == "__main__":
    main()
