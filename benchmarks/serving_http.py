"""Measure servers under load over HTTP, with OpenAI's client.

    python -m benchmarks.serving_http --out benchmarks/results/serving_http.json

Four contenders serve the same random requests, in turns, each as its own processes on the same machine:

- `plain` and `optimized`: a FastAPI application with a lock around a pipeline, without and with `optimize`;
- `engine`: `tgate-compile serve` with as many threads;
- `two`: two of these with half of the threads each, to which the client sends its requests in turn.

Each contender's capacity is measured with a constant number of requests in flight. Then requests arrive at random (a
Poisson process) at rising rates, until the contender's 95th percentile of the latency is above a limit, which is a
multiple of the time that the plain pipeline takes for one request alone. Every fourth request streams its image with
two previews where the server can; its first image counts for `first`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import openai
import torch

from benchmarks.serving import WORDS, Request, Submit, call_of, closed_loop, load_pipeline, open_loop, quantile
from tgate_compile.study.bench.measure import machine_of

CONTENDERS = ("plain", "optimized", "engine", "two")
#: A contender is overloaded if its 95th percentile is above this many times the latency of a plain request alone.
MOST = 5.0


def naive_app(arguments: argparse.Namespace, *, optimized: bool) -> Any:
    """Return the server that one writes first: a lock around the pipeline."""
    import io

    from fastapi import FastAPI

    pipe, lock, app = load_pipeline(arguments, optimized=optimized), threading.Lock(), FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        width, height = map(int, body["size"].split("x"))
        call = {
            **call_of(arguments.model, body["prompt"], height),
            "num_inference_steps": body["steps"],
            "generator": torch.Generator().manual_seed(body["seed"]),
            "height": height,
            "width": width,
        }
        if optimized:
            call["gate_step"] = body["gate_step"]
        with lock:
            image = pipe(**call).images[0]
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}

    return app


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_ready(url: str) -> bool:
    """Return whether the server at `url` accepts requests."""
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


class Server:
    """A server in a separate process."""

    def __init__(self, arguments: argparse.Namespace, name: str, threads: int) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        if name == "engine":
            command = [sys.executable, "-m", "tgate_compile", "serve", "--model", arguments.model, "--gate-step", "0.4"]
            command += ["--backend", arguments.backend, "--max-batch", str(arguments.max_batch), "--port", str(port)]
            command += ["--max-waiting", "100000", "--log-level", "error", "--threads", str(threads)]
            for size in arguments.sizes:
                command += ["--warm-up-size", size]
        else:
            command = [sys.executable, "-m", "benchmarks.serving_http", "--naive", name, "--port", str(port)]
            command += ["--model", arguments.model, "--backend", arguments.backend]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, env=environment)

    def wait(self) -> None:
        """Wait until the server is ready."""
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"The server at {self.url} ended with {self.process.returncode}.")
            if is_ready(self.url):
                return
            time.sleep(0.2)

    def memory_mb(self) -> float:
        """Return the process's memory, with that of the libraries' pages that it uses."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Client:
    """OpenAI's client, for a contender with one server or more.

    Attributes:
        first: seconds until the first image, or preview, of each request since the last `take_first`.
    """

    def __init__(self, servers: list[Server], *, streams: bool, threads: ThreadPoolExecutor) -> None:
        self._servers = servers
        self._clients = [
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=3600)
            for server in servers
        ]
        self._streams = streams
        self._threads = threads
        self.first: list[float] = []

    def submit(self, request: Request) -> Future[Any]:
        return self._threads.submit(self._ask, request)

    def _ask(self, request: Request) -> str:
        client = self._clients[request.number % len(self._clients)]
        body: dict[str, Any] = {"seed": request.number, "steps": request.steps, "gate_step": request.gate}
        # Of two servers, each gets as many streams as the other.
        streams = self._streams and request.number // len(self._clients) % 4 == 0
        size: Any = f"{request.width}x{request.height}"
        began = time.perf_counter()
        prompt = WORDS[request.number % len(WORDS)]
        if not streams:
            answer = client.images.generate(prompt=prompt, size=size, extra_body=body)
            assert answer.data
            assert answer.data[0].b64_json
            if not self._streams:
                self.first.append(time.perf_counter() - began)
            return answer.data[0].b64_json
        image = ""
        with client.images.generate(prompt=prompt, size=size, extra_body=body, stream=True, partial_images=2) as events:
            for number, event in enumerate(events):
                if number == 0:
                    self.first.append(time.perf_counter() - began)
                image = event.b64_json
        assert image
        return image

    def take_first(self) -> dict[str, float]:
        """Return percentiles of the time until the first image since the last call of this method."""
        first, self.first = self.first, []
        return {f"p{percent}": quantile(first, percent / 100) for percent in (50, 95)}

    def memory_mb(self) -> float:
        return sum(server.memory_mb() for server in self._servers)


@contextmanager
def contenders(arguments: argparse.Namespace) -> Iterator[dict[str, Client]]:
    """Start all servers, one after the other, and return their clients."""
    clients = {}
    half = max((os.cpu_count() or 2) // 2, 1)
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(512))
        for name in arguments.contenders:
            count = 2 if name == "two" else 1
            kind = "engine" if name == "two" else name
            started = [Server(arguments, kind, half if count == 2 else 2 * half) for _ in range(count)]
            for server in started:
                stack.callback(server.stop)
            for server in started:
                server.wait()
            clients[name] = Client(started, streams=kind == "engine", threads=threads)
            print(f"{name} is ready", file=sys.stderr, flush=True)
        yield clients


def requests_of(arguments: argparse.Namespace, count: int) -> list[Request]:
    chance = random.Random(arguments.seed)
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    requests = []
    for number in range(count):
        width, height = chance.choice(sizes)
        requests.append(Request(number, chance.choice(arguments.steps), chance.choice(arguments.gates), height, width))
    return requests


def measure(arguments: argparse.Namespace, clients: dict[str, Client]) -> dict[str, Any]:
    requests = requests_of(arguments, arguments.requests)

    def row(client: Client, of: dict[str, Any]) -> dict[str, Any]:
        return of | {"first": client.take_first(), "memory_mb": client.memory_mb()}

    def closed(client: Client, in_flight: int) -> dict[str, Any]:
        submit: Submit = client.submit
        return row(client, closed_loop(submit, requests, in_flight))

    for client in clients.values():
        closed_loop(client.submit, requests[: arguments.in_flight], arguments.in_flight)  # warms up
        client.take_first()
    base = next(iter(clients))
    alone = median(closed_loop(clients[base].submit, [request], 1)["latency"]["p50"] for request in requests[:8])
    clients[base].take_first()
    rounds = []
    for turn in range(arguments.rounds):
        names = [*clients][turn % len(clients) :] + [*clients][: turn % len(clients)]
        rounds.append({name: closed(clients[name], arguments.in_flight) for name in names})
        print(json.dumps({name: round(each["throughput"], 2) for name, each in rounds[-1].items()}), flush=True)
    capacity = {name: median(each[name]["throughput"] for each in rounds) for name in clients}
    opened: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
    for name, client in clients.items():
        for share in arguments.shares:
            # As many seconds for each, so that the slow ones do not take all of the time.
            rate = share * capacity[name]
            some = requests_of(arguments, max(round(rate * arguments.seconds), 24))
            found = row(client, open_loop(client.submit, some, rate, arguments.seed))
            found |= {"rate": rate, "requests": len(some), "within": found["latency"]["p95"] <= MOST * alone}
            opened[name].append(found)
            print(name, json.dumps(found), flush=True)
            if not found["within"]:
                break
    sustained = {
        name: max((found["rate"] for found in rows if found["within"]), default=None) for name, rows in opened.items()
    }
    return {
        "latency_alone": alone,
        "limit_p95": MOST * alone,
        "closed": rounds,
        "capacity_ratios": {
            f"{name}/{other}": median(each[name]["throughput"] / each[other]["throughput"] for each in rounds)
            for name in clients
            for other in clients
            if name != other
        },
        "open": opened,
        "sustained": sustained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], choices=CONTENDERS)
    parser.add_argument("--requests", type=int, default=48, help="requests in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--sizes", nargs="+", default=["64x64"], help="widths and heights, such as 64x64 96x64")
    parser.add_argument("--steps", nargs="+", type=int, default=[15, 20, 25])
    parser.add_argument("--gates", nargs="+", type=float, default=[0.3, 0.4, 0.5])
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.4, 0.6, 0.75, 0.9], help="rates, relative to its own capacity"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a load at random times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--naive", choices=("plain", "optimized"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.naive:
        import uvicorn

        app = naive_app(arguments, optimized=arguments.naive == "optimized")
        uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="error")
        return
    with contenders(arguments) as clients:
        found = measure(arguments, clients)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.serving_http", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        **found,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("capacity_ratios", "sustained")}, indent=1))


if __name__ == "__main__":
    main()
