"""Measure many requests at a time: the engine beside a lock around the pipeline, plain and optimized.

    python -m benchmarks.serving --out benchmarks/results/serving.json
    python -m benchmarks.serving --model random:sd15 --sizes 256x256 --steps 6 8 10 --requests 8 --in-flight 4 \
        --max-batch 4 --rounds 2 --rates --out benchmarks/results/serving_sd15.json

Requests differ in size, steps and gate. Two loads are measured, with the same requests for each contender:

- a closed loop, which keeps a number of requests in flight. Rounds of all contenders take turns, and each is compared
  with the others of its round, so that other work on the machine affects all of them;
- an open loop, in which requests arrive at random (a Poisson process), whether others are done or not. Rates are
  multiples of the plain pipeline's throughput in the closed loop.

Contenders: `plain` and `optimized` make one call at a time, behind a lock, as a simple server does; `engine` batches.
A contender is a function from a request to a future, so that a client of a server can take its place.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tgate_compile
from tgate_compile._demo import demo_variant
from tgate_compile.serve import Engine
from tgate_compile.study.bench.measure import machine_of
from tgate_compile.study.bench.methods import random_pipeline

WORDS = ("a large red circle on a blue background", "a small green square", "a blue triangle", "two yellow circles")


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    number: int
    steps: int
    gate: float
    height: int
    width: int

    def call(self, model: str) -> dict[str, Any]:
        """Return the arguments of the pipeline's call, without the gate."""
        return {
            **call_of(model, WORDS[self.number % len(WORDS)], self.height),
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            "generator": torch.Generator().manual_seed(self.number),
        }


#: Starts a request; the future is done when its image is there.
Submit = Callable[[Request], "Future[Any]"]
#: Starts a contender, and stops it when the context is left.
Contender = Callable[[argparse.Namespace], AbstractContextManager[Submit]]


def call_of(model: str, prompt: str, size: int) -> dict[str, Any]:
    """Return the arguments that do not depend on the request; a random model takes embeddings instead of a prompt."""
    if model.startswith("random:"):
        return {**random_model(model, size)[1], "guidance_scale": 7.5}
    variant = demo_variant(model)
    return {**variant.call, "prompt": prompt, "guidance_scale": variant.guidance}


@cache
def random_model(model: str, size: int) -> tuple[Any, dict[str, Any]]:
    return random_pipeline(model.removeprefix("random:"), torch.device("cpu"), torch.bfloat16, size=size)


def load_pipeline(arguments: argparse.Namespace, *, optimized: bool) -> Any:
    if arguments.model.startswith("random:"):
        original = random_model(arguments.model, requests_of(arguments)[0].height)[0]
        # The weights are shared, except those of the denoiser: each contender optimizes its own.
        components = {**original.components, "unet": copy.deepcopy(original.unet)}
        pipe = type(original)(**components, requires_safety_checker=False)
    else:
        pipe = tgate_compile.load_demo_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    return tgate_compile.optimize(pipe, 0.4, backend=arguments.backend) if optimized else pipe


def behind_a_lock(pipe: Any, arguments: argparse.Namespace, *, gated: bool) -> Iterator[Submit]:
    lock = threading.Lock()

    def make(request: Request) -> Any:
        call = request.call(arguments.model) | ({"gate_step": request.gate} if gated else {})
        with lock:
            return pipe(**call)

    with ThreadPoolExecutor(256) as threads:
        yield lambda request: threads.submit(make, request)


@contextmanager
def plain(arguments: argparse.Namespace) -> Iterator[Submit]:
    yield from behind_a_lock(load_pipeline(arguments, optimized=False), arguments, gated=False)


@contextmanager
def optimized(arguments: argparse.Namespace) -> Iterator[Submit]:
    yield from behind_a_lock(load_pipeline(arguments, optimized=True), arguments, gated=True)


@contextmanager
def engine(arguments: argparse.Namespace) -> Iterator[Submit]:
    pipe = load_pipeline(arguments, optimized=True)
    sizes = {(request.height, request.width) for request in requests_of(arguments)}
    few = {"num_inference_steps": 4, "gate_step": 2}
    warm_up = [Request(0, 4, 0.5, *size).call(arguments.model) | few for size in sorted(sizes)]
    with Engine(
        pipe, warm_up=warm_up, max_batch=arguments.max_batch, max_running=arguments.max_running, max_waiting=100_000
    ) as serving:

        def submit(request: Request) -> Future[Any]:
            future: Future[Any] = Future()
            ticket = serving.submit(request.call(arguments.model) | {"gate_step": request.gate})

            def end(_: Any) -> None:
                error = ticket.exception()
                future.set_exception(error) if error else future.set_result(ticket.result())

            ticket.add_done_callback(end)
            return future

        submit.stats = serving.stats  # type: ignore[attr-defined]
        yield submit


CONTENDERS: dict[str, Contender] = {"plain": plain, "optimized": optimized, "engine": engine}


def requests_of(arguments: argparse.Namespace) -> list[Request]:
    """Return the requests, which are the same for all contenders."""
    chance = random.Random(arguments.seed)
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    return [
        Request(number, chance.choice(arguments.steps), chance.choice(arguments.gates), *chance.choice(sizes))
        for number in range(arguments.requests)
    ]


def closed_loop(submit: Submit, requests: Sequence[Request], in_flight: int) -> dict[str, Any]:
    """Keep `in_flight` requests in flight until all are done; return the throughput and the latencies."""
    free = threading.Semaphore(in_flight)
    return measured(submit, requests, lambda number: free.acquire() and None, free.release)


def open_loop(submit: Submit, requests: Sequence[Request], rate: float, seed: int) -> dict[str, Any]:
    """Send requests at random times, `rate` in a second on average; return the throughput and the latencies."""
    chance, began = random.Random(seed), time.perf_counter()
    due = [began]
    for _ in requests:
        due.append(due[-1] + chance.expovariate(rate))

    def wait(number: int) -> float:
        time.sleep(max(due[number] - time.perf_counter(), 0.0))
        return due[number]  # the latency counts from here, even if this thread was late

    return measured(submit, requests, wait, lambda: None)


def measured(
    submit: Submit, requests: Sequence[Request], wait: Callable[[int], float | None], done: Callable[[], object]
) -> dict[str, Any]:
    latencies: list[float] = [0.0] * len(requests)
    futures: list[Future[Any]] = []
    began = time.perf_counter()

    def note(number: int, sent: float) -> None:
        latencies[number] = time.perf_counter() - sent
        done()

    for number, request in enumerate(requests):
        sent = wait(number) or time.perf_counter()
        future = submit(request)
        future.add_done_callback(lambda _, number=number, sent=sent: note(number, sent))  # type: ignore[misc]
        futures.append(future)
    for future in futures:
        future.result()
    seconds = time.perf_counter() - began
    per_step = [latency / request.steps for latency, request in zip(latencies, requests, strict=True)]
    return {
        "throughput": len(requests) / seconds,
        "latency": {f"p{percent}": quantile(latencies, percent / 100) for percent in (50, 95, 99)},
        # Jain's index of the latency for each step: 1 if it is the same for all requests.
        "fairness": sum(per_step) ** 2 / (len(per_step) * sum(value**2 for value in per_step)),
        "memory_mb": memory_mb(),
    }


def quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def memory_mb() -> float:
    """Return the memory of this process, with all contenders in it."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd", help="an embedded model, or random:sd15")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], choices=[*CONTENDERS])
    parser.add_argument("--requests", type=int, default=64, help="requests in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-running", type=int)
    parser.add_argument("--sizes", nargs="+", default=["64x64"], help="heights and widths, such as 64x64 64x96")
    parser.add_argument("--steps", nargs="+", type=int, default=[15, 20, 25])
    parser.add_argument("--gates", nargs="+", type=float, default=[0.3, 0.4, 0.5])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.5, 1.0, 2.0, 3.0], help="relative to `plain`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    requests = requests_of(arguments)
    started: dict[str, Submit] = {}
    contexts = []
    for name in arguments.contenders:
        contexts.append(CONTENDERS[name](arguments))
        started[name] = contexts[-1].__enter__()
        closed_loop(started[name], requests[: arguments.in_flight], arguments.in_flight)  # captures, and warms up
    rounds: list[dict[str, Any]] = []
    for turn in range(arguments.rounds):
        names = arguments.contenders[turn % len(started) :] + arguments.contenders[: turn % len(started)]
        rounds.append({name: closed_loop(started[name], requests, arguments.in_flight) for name in names})
        print(json.dumps({name: round(row["throughput"], 2) for name, row in rounds[-1].items()}), flush=True)
    base = arguments.contenders[0]
    capacity = median(each[base]["throughput"] for each in rounds)
    opened = {
        str(rate): {
            name: open_loop(submit, requests, rate * capacity, arguments.seed) for name, submit in started.items()
        }
        for rate in arguments.rates
    }
    result = {
        "command": " ".join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        "closed": rounds,
        "ratios": {
            f"{name}/{other}": median(each[name]["throughput"] / each[other]["throughput"] for each in rounds)
            for name in started
            for other in started
            if name != other
        },
        "open": opened,
        "batches": {
            letter: dict(sorted(sizes.items()))
            for letter, sizes in (started["engine"].stats().batches if "engine" in started else {}).items()  # type: ignore[attr-defined]
        },
    }
    for context in contexts:
        context.__exit__(None, None, None)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("ratios", "batches")}, indent=1))
    for rate, rows in opened.items():
        for name, row in rows.items():
            latency = "  ".join(f"{key} {value:6.2f} s" for key, value in row["latency"].items())
            print(f"rate {rate:>4}  {name:>9}  {row['throughput']:6.2f}/s  {latency}  fairness {row['fairness']:.2f}")


if __name__ == "__main__":
    main()
