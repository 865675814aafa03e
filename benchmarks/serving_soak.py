"""Send thousands of requests to a server, of which many are wrong or go away, and check every answer.

    python -m benchmarks.serving_soak --requests 10000 --out benchmarks/results/serving_soak.json

A server with an engine runs in a process of its own. Most requests are ordinary ones with a prompt, size, seed, number
of steps and gate of their own, some of them streams; each image is compared with the one that the pipeline makes alone.
Others close their connection while their image is made, cancel a stream, or have a body that is malformed or too large.
In the middle of the run the engine's worker crashes: the requests in it must end with status 503, and are sent again,
as OpenAI's client does by itself. The result has the number of each kind, the largest difference of any image, and the
server's memory over the run with its slope.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import torch
from PIL import Image

import tgate_compile
from benchmarks.serving import WORDS, call_of
from benchmarks.serving_http import free_port, is_ready
from tgate_compile.study.bench.measure import machine_of

MODEL = "sd"
SIZES = ((64, 64), (64, 32))
STEPS = (3, 4, 6)
GATES = (1, 2, 0.5)
#: The largest body that the server accepts, in bytes.
BODY = 4096
#: The largest difference of a pixel from the image made alone, of 255. Larger batches round differently.
TOLERANCE = 2
#: Each kind of request, with its share.
KINDS = {"image": 68, "stream": 8, "goes away": 8, "cancelled stream": 4, "malformed": 8, "oversized": 4}

MALFORMED: tuple[Any, ...] = (
    b"{",
    b"",
    b"\xff\xfe",
    b"[]",
    b'{"prompt": 1}',
    b'{"prompt": "x", "steps": "many"}',
    b'{"prompt": "x", "steps": 100000}',
    b'{"prompt": "x", "size": "9999999x8"}',
    b'{"prompt": "x", "gate_step": -1}',
    b'{"prompt": "x", "image": "file:///etc/passwd"}',
    b'{"prompt": "x", "seed": 1e400}',
    b'{"prompt": "x", "response_format": "url"}',
)


def serve(port: int) -> None:
    """Run the server; SIGUSR1 crashes the engine's worker."""
    import logging

    import uvicorn

    from tgate_compile.serve import Engine
    from tgate_compile.serve.jobs import ServedModel
    from tgate_compile.serve.schemas import Limits
    from tgate_compile.serve.server import create_app

    torch.set_num_threads(1)
    logging.getLogger("tgate_compile").setLevel(logging.ERROR)
    pipe: Any = tgate_compile.load_demo_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, 2, backend="eager")
    few = {"num_inference_steps": 4, "gate_step": 2}
    warm_up = [call_of(MODEL, "x", 0) | few | {"width": width, "height": height} for width, height in SIZES]
    variant = tgate_compile.DEMO_VARIANTS[MODEL]
    served = ServedModel(name=MODEL, guidance=variant.guidance, call=dict(variant.call))
    with Engine(pipe, warm_up=warm_up, max_batch=16, max_waiting=200, new_sizes="refuse") as engine:
        app = create_app(engine, model=served, limits=Limits(body=BODY))
        signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=crash, args=(engine,)).start())
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def crash(engine: Any) -> None:
    from tgate_compile.serve.worker import Job

    def fail() -> None:
        raise SystemExit("crashed by the benchmark")

    with suppress(tgate_compile.serve.EngineCrashedError):
        engine.compute(Job(fail))


class Soak:
    """The client's side.

    Attributes:
        ended: how often each kind of request ended in which way.
        wrong: what was not as expected.
        worst: the largest difference of a pixel.
        memory: the number of requests sent, and the server's memory in megabytes, over the run.
    """

    def __init__(self, url: str, pid: int, *, seed: int) -> None:
        self.url, self.pid = url, pid
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.http = httpx2.Client(base_url=url, timeout=600, limits=httpx2.Limits(max_connections=None))
        self.chance = random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.worst = 0
        self.memory: list[tuple[int, float]] = []
        self.lock = threading.Lock()
        self.expected = images_made_alone()

    def run(self, count: int, in_flight: int) -> None:
        """Send `count` requests, `in_flight` at a time, and crash the worker in the middle."""
        kinds = self.chance.choices([*KINDS], [*KINDS.values()], k=count)
        chances = [random.Random(self.chance.random()) for _ in kinds]
        free = threading.Semaphore(in_flight)
        with ThreadPoolExecutor(in_flight) as threads:
            for number, (kind, chance) in enumerate(zip(kinds, chances, strict=True)):
                free.acquire()
                if number == count // 2:
                    os.kill(self.pid, signal.SIGUSR1)
                if number % max(count // 100, 1) == 0:
                    self.memory.append((number, self.memory_mb()))
                    print(number, f"{self.memory[-1][1]:.0f} MB", dict(self.ended), flush=True)
                threads.submit(self.one, kind, chance).add_done_callback(lambda _: free.release())
        self.memory.append((count, self.memory_mb()))

    def one(self, kind: str, chance: random.Random) -> None:
        """Send a request, again while the server asks for that, and note how it ended."""
        send = getattr(self, "send_" + kind.replace(" ", "_"))
        for _ in range(100):
            try:
                end = send(chance)
            except (openai.RateLimitError, openai.InternalServerError) as error:
                if error.status_code not in (429, 503):
                    self.note(kind, f"status {error.status_code}", wrong=True)
                    return
                self.note(kind, f"status {error.status_code}, sent again")
                time.sleep(chance.uniform(0.1, 0.5))
                continue
            except openai.APIError as error:
                # An error in the middle of a stream is an event, which has no status.
                is_crash = isinstance(error.body, dict) and error.body.get("code") == "unavailable"
                self.note(kind, "ended by the crash, sent again" if is_crash else f"lost: {error}", wrong=not is_crash)
                if not is_crash:
                    return
                continue
            except Exception as error:  # the run goes on; the result says what was lost
                self.note(kind, f"lost: {type(error).__name__}: {error}"[:200], wrong=True)
                return
            self.note(kind, *end)
            return
        self.note(kind, "never answered", wrong=True)

    def note(self, kind: str, end: str, wrong: bool = False) -> None:
        with self.lock:
            self.ended[f"{kind}: {end}"] += 1
            if wrong:
                self.wrong.append(f"{kind}: {end}")

    def body(self, chance: random.Random) -> tuple[Any, dict[str, Any]]:
        key = chance.choice([*self.expected])
        prompt, (width, height), steps, gate, seed = key
        return key, {
            "prompt": prompt,
            "size": f"{width}x{height}",
            "extra_body": {"steps": steps, "gate_step": gate, "seed": seed},
        }

    def check(self, key: Any, data: str | None) -> tuple[str, bool]:
        given = np.asarray(Image.open(io.BytesIO(base64.b64decode(data or ""))), dtype=np.int64)
        expected = self.expected[key]
        difference = int(abs(given - expected).max()) if given.shape == expected.shape else 255
        with self.lock:
            self.worst = max(self.worst, difference)
        return ("right", False) if difference <= TOLERANCE else (f"{key} differs by {difference}", True)

    def send_image(self, chance: random.Random) -> tuple[str, bool]:
        key, body = self.body(chance)
        answer = self.client.images.generate(**body)
        return self.check(key, answer.data[0].b64_json if answer.data else None)

    def send_stream(self, chance: random.Random) -> tuple[str, bool]:
        key, body = self.body(chance)
        last: Any = None
        with self.client.images.generate(**body, stream=True, partial_images=1) as events:
            for event in events:
                last = event
        if last is None or last.type != "image_generation.completed":
            return (f"last event {last}", True)
        return self.check(key, last.b64_json)

    def send_cancelled_stream(self, chance: random.Random) -> tuple[str, bool]:
        _, body = self.body(chance)
        with self.client.images.generate(**body, stream=True, partial_images=3) as events:
            for _ in zip(range(chance.randrange(3)), events, strict=False):
                pass
        return ("cancelled", False)

    def send_goes_away(self, chance: random.Random) -> tuple[str, bool]:
        _, body = self.body(chance)
        content = json.dumps({**body, **body.pop("extra_body")}).encode()
        host, port = self.url.removeprefix("http://").split(":")
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            time.sleep(chance.uniform(0.0, 0.5))
        return ("gone", False)

    def send_malformed(self, chance: random.Random) -> tuple[str, bool]:
        content = chance.choice(MALFORMED)
        headers = {"Content-Type": "application/json"}
        answer = self.http.post("/v1/images/generations", content=content, headers=headers)
        return (f"status {answer.status_code}", answer.status_code != 400 or "message" not in answer.json()["error"])

    def send_oversized(self, chance: random.Random) -> tuple[str, bool]:
        content = json.dumps({"prompt": "x" * (BODY + chance.randrange(3 * BODY))}).encode()
        answer = self.http.post("/v1/images/generations", content=content)
        return (f"status {answer.status_code}", answer.status_code != 413)

    def memory_mb(self) -> float:
        """Return the memory that belongs to the server's process, without the pages of files."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        return int(status.split("RssAnon:")[1].split()[0]) / 1024


def images_made_alone() -> dict[Any, Any]:
    """Return the images of some requests, each made by a call of the optimized pipeline."""
    pipe: Any = tgate_compile.load_demo_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, 2, backend="eager")
    chance, made = random.Random(0), {}
    for seed in range(60):
        key = (chance.choice(WORDS), chance.choice(SIZES), chance.choice(STEPS), chance.choice(GATES), seed)
        prompt, (width, height), steps, gate, _ = key
        call = call_of(MODEL, prompt, height) | {"num_inference_steps": steps, "gate_step": gate}
        generator = torch.Generator().manual_seed(seed)
        image = pipe(**call, width=width, height=height, generator=generator).images[0]
        made[key] = np.asarray(image, dtype=np.int64)
    return made


def slope(memory: list[tuple[int, float]]) -> float:
    """Return the slope of the memory in megabytes per thousand requests, over the second half of the run."""
    numbers, sizes = zip(*memory[len(memory) // 2 :], strict=True)
    return float(np.polyfit(numbers, sizes, 1)[0]) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--in-flight", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--server", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.server:
        serve(arguments.server)
        return
    # The operators of such a small model are too short for several threads; `tgate-compile serve` takes one as well.
    torch.set_num_threads(1)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.serving_soak", "--server", str(port)])
    try:
        soak = Soak(url, server.pid, seed=arguments.seed)
        while not is_ready(url):
            if server.poll() is not None:
                raise SystemExit(f"The server ended with {server.returncode}.")
            time.sleep(0.5)
        began = time.perf_counter()
        soak.run(arguments.requests, arguments.in_flight)
        seconds = time.perf_counter() - began
        deadline = time.monotonic() + 60  # requests whose clients went away end before their next step
        while (status := soak.http.get("/status").json())["running"] or status["waiting"]:
            if time.monotonic() > deadline:
                soak.wrong.append(f"requests of clients that went away are still running: {status}")
                break
            time.sleep(0.2)
        metrics = soak.http.get("/metrics").text
    finally:
        server.terminate()
        server.wait(60)
    captures = [line for line in metrics.splitlines() if line.startswith("tgate_captures_total")]
    result = {
        "command": " ".join(["python", "-m", "benchmarks.serving_soak", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        "requests": arguments.requests,
        "seconds": seconds,
        "ended": dict(sorted(soak.ended.items())),
        "wrong": soak.wrong,
        "largest_difference": soak.worst,
        "captures": captures,
        "status": status,
        "memory_mb": soak.memory,
        "slope_mb_per_1000": slope(soak.memory),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "memory_mb"}, indent=1))
    if soak.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
