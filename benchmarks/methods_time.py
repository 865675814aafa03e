"""Measure the time of caching methods beside diffusers' hooks and cache-dit, for the same method on the same model.

    python benchmarks/methods_time.py --out benchmarks/results/methods_time.json

Each method runs in five ways: the other implementation, as it is and with its denoiser compiled by `torch.compile`; and
this library's graphs in eager, Inductor and OpenVINO. All ways make the same images from the same noise, in turns, and
the plain pipeline takes part in eager and compiled form. `agreement` is ||x - y|| / ||y|| for the final latents of both
implementations: a method that skips other steps would not be comparable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import cache_dit
import torch
from methods_pareto import captions_of, contenders, hook, start
from torch._dynamo.utils import counters

import tgate_compile
from tgate_compile import DEMO_VARIANTS, DBCache, FirstBlockCache, Schedule
from tgate_compile.study.bench.measure import machine_of
from tgate_compile.study.bench.methods import with_private_class

BACKENDS = ("eager", "inductor", "openvino")


@dataclass(frozen=True)
class Pair:
    """A method, in this library and elsewhere.

    Attributes:
        name: the name in tables.
        schedule: the schedule here; None for the plain pipeline.
        apply: applies the other implementation to a pipeline.
        begin: prepares the other implementation for a generation.
    """

    name: str
    schedule: Schedule | None
    apply: Callable[[Any], None]
    begin: Callable[[Any], None] = lambda pipe: None


def pairs(model: str, steps: int, blocks: int, ratios: tuple[float, ...]) -> list[Pair]:
    """Return the methods that another implementation has for a model with so many blocks."""
    found = [Pair("plain", None, lambda pipe: None)]
    by_name = {each.name: each for each in contenders(model, steps, blocks, ratios)}
    for each in by_name.values():
        if each.hook is not None and (each.like is None or each.like in by_name):
            ours = by_name[each.like].schedule if each.like else Schedule.of(FirstBlockCache(0.08))
            found.append(Pair(each.name, ours, partial(hook, apply=each.hook), start))
    method = DBCache(0.12, front=1, warm_up=max(2, steps // 5))

    def dual(pipe: Any) -> None:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=method.front,
            Bn_compute_blocks=method.back,
            max_warmup_steps=method.warm_up,
            max_cached_steps=-1,
            residual_diff_threshold=method.threshold,
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    return [*found, Pair("cache-dit DBCache", Schedule.of(method), dual)]


class Way:
    """One way to make the images of a pair: `theirs`, `theirs, compiled`, or the name of a backend."""

    def __init__(self, pair: Pair, name: str, model: str) -> None:
        self.pair = pair
        self.name = name
        self.seconds: list[float] = []
        self.latents = torch.empty(0)
        self._pipe = tgate_compile.load_demo_pipeline(model)
        self._pipe.set_progress_bar_config(disable=True)
        self._theirs = name.startswith("theirs")
        if self._theirs:
            with_private_class(self._pipe)
            pair.apply(self._pipe)
        if name == "theirs, compiled":
            self._pipe.transformer.compile()
        if not self._theirs and pair.schedule is not None:
            tgate_compile.optimize(self._pipe, pair.schedule, backend=name)

    def run(self, call: dict[str, Any], captions: Sequence[str]) -> float:
        """Make the images once, and return the seconds for each."""
        if self._theirs:
            self.pair.begin(self._pipe)
        noise = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        began = time.perf_counter()
        self.latents = self._pipe(list(captions), generator=noise, output_type="latent", **call).images
        return (time.perf_counter() - began) / len(captions)


def measure(model: str, count: int, rounds: int, only: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of measurements for each method."""
    demo, captions = DEMO_VARIANTS[model], captions_of(count, 7)
    pipe = tgate_compile.load_demo_pipeline(model)
    call = {**demo.call, "num_inference_steps": demo.steps, "guidance_scale": demo.guidance}
    ratios = tgate_compile.calibrate_mag_cache(
        pipe, captions_of(2, 9), num_inference_steps=demo.steps, call={**demo.call, "guidance_scale": demo.guidance}
    ).ratios
    ways: list[Way] = []
    rows: dict[str, dict[str, Any]] = {}
    for pair in pairs(model, demo.steps, len(pipe.transformer.transformer_blocks), ratios):
        if not any(fnmatch(pair.name, pattern) for pattern in ("plain", *only)):
            continue
        rows[pair.name] = {"name": pair.name, "schedule": None if pair.schedule is None else str(pair.schedule)}
        for name in ("theirs", "theirs, compiled", *(() if pair.schedule is None else BACKENDS)):
            before = counters["stats"]["unique_graphs"]
            try:
                way = Way(pair, name, model)
                for _ in range(2):  # compiles, and shows whether a second generation compiles again
                    way.run(call, captions)
            except Exception as error:
                if not name.startswith("theirs"):
                    raise
                rows[pair.name][f"{name}, error"] = f"{type(error).__name__}: {error}"[:200]
                continue
            ways.append(way)
            if name == "theirs, compiled":
                rows[pair.name]["graphs of torch.compile"] = counters["stats"]["unique_graphs"] - before
            print(f"{pair.name}: {name} is ready", file=sys.stderr, flush=True)
    for number in range(rounds):
        for way in ways[::-1] if number % 2 else ways:
            way.seconds.append(way.run(call, captions))
    for pair_name, row in rows.items():
        own = {way.name: way for way in ways if way.pair.name == pair_name}
        row["seconds"] = {name: statistics.median(way.seconds) for name, way in own.items()}
        if "eager" in own and "theirs" in own:
            theirs = own["theirs"].latents
            row["agreement"] = float((own["eager"].latents - theirs).norm() / theirs.norm())
            row["eager to eager"] = ratio(own["theirs"], own["eager"])
        if "theirs, compiled" in own:
            for name in own.keys() & {"inductor", "openvino"}:
                row[f"compiled to {name}"] = ratio(own["theirs, compiled"], own[name])
    return list(rows.values())


def ratio(theirs: Way, ours: Way) -> float:
    """Return how many times as long the other implementation takes, as the median over the rounds."""
    return statistics.median(a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pixart", "sd3"], choices=["pixart", "sd3"])
    parser.add_argument("--captions", type=int, default=4, help="images of one call")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names; plain is always measured")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = {
        "command": " ".join(["python", "benchmarks/methods_time.py", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        "cache_dit": cache_dit.__version__,
        "models": {},
    }
    for model in given.models:
        rows = results["models"][model] = measure(model, given.captions, given.rounds, given.only)
        for row in rows:
            print(model, json.dumps(row))
        if given.out is not None:
            given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
