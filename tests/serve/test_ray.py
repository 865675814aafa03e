"""The Ray Serve application: its arguments, and a local cluster whose replicas share load, die and are replaced."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.packages import need
from tests.programs import program
from tests.serve.serving import pixels
from tgate_compile import ConfigurationError

if TYPE_CHECKING:
    from tgate_compile.serve.ray import Arguments
    from tgate_compile.serve.ray_gateway import State

# Imported by the functions that use them, as are our modules that need Ray: each takes a second.
need("ray", "openai")

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
PROMPT = "a large red circle on a blue background"
#: Seconds after which something that should happen has not: a replica of a busy machine takes a while to start.
PATIENCE = 240.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give either model or bundle"),
        ({"model": "sd", "bundle": "x"}, "give either model or bundle"),
        ({"bundle": "x", "gate_step": 3}, "leave out gate_step"),
        ({"model": "sd", "gate_step": 1.5}, "gate_step"),
        ({"model": "sd", "gate_step": "many"}, "gate_step"),
        ({"model": "sd", "gate": 3}, "gate: Extra inputs are not permitted"),
        ({"model": "sd", "adapters": {"a-b": "x"}}, "adapters"),
        ({"model": "sd", "warm_up": ["64"]}, "warm_up.0"),
        ({"model": "sd", "replicas": 2, "autoscaling": {"max_replicas": 2}}, "either replicas or autoscaling"),
        ({"model": "sd", "autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "less than min_replicas"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(given: Mapping[str, Any], said: str) -> None:
    from tgate_compile.serve.ray import build

    with pytest.raises(ConfigurationError, match=said):
        build(given)


def test_arguments_may_be_texts_as_on_the_command_line() -> None:
    from tgate_compile.serve.ray import Arguments

    given = Arguments.model_validate({"model": "sd", "gate_step": "10", "replicas": "2", "num_cpus": "0.5"})
    assert (given.gate_step, given.replicas, given.num_cpus) == (10, 2, 0.5)
    assert Arguments.model_validate({"model": "sd", "gate_step": "0.4"}).gate_step == 0.4


def test_the_example_for_serve_deploy_fits_the_application() -> None:
    check_config((EXAMPLES / "ray.yaml").read_text())


def test_the_example_for_kuberay_fits_the_application() -> None:
    import ray

    manifest = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    given = check_config(manifest["spec"]["serveConfigV2"])
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert given.api_key_variable in [each["name"] for each in container["env"]]
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert given.autoscaling is not None
    cpus = int(container["resources"]["limits"]["cpu"])
    assert cpus >= given.num_cpus
    assert workers["maxReplicas"] * (cpus // given.num_cpus) >= given.autoscaling.max_replicas
    assert cluster["enableInTreeAutoscaling"] is True


def check_config(text: str) -> Arguments:
    """Check a configuration file, and return the arguments of its application."""
    from ray.serve.schema import ServeDeploySchema

    from tgate_compile.serve.ray import Arguments, build

    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert application.import_path == "tgate_compile.serve.ray:build"
    build(application.args)
    return Arguments.model_validate(application.args)


@contextmanager
def cluster(port: int, **more: str) -> Iterator[None]:
    """Run a cluster of this machine alone, which listens on `port`, with more environment variables."""
    import ray
    from ray import serve

    folder = tempfile.mkdtemp(prefix="ray-")  # short, because the paths of its sockets must be
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **more}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        ray.init(
            "local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def deploy(given: Mapping[str, Any]) -> None:
    """Start the application with these arguments, or update it."""
    from ray import serve

    from tgate_compile.serve.ray import build

    serve.run(build(given), name="app", route_prefix="/")


class Client:
    """A client of an application, which looks at its replicas, too."""

    def __init__(self, url: str) -> None:
        import openai

        self.http = httpx2.Client(base_url=url, timeout=PATIENCE)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=PATIENCE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()

    def image(self, seed: int, steps: int, **more: Any) -> str:
        """Return an image as base64."""
        answer = self.openai.images.generate(prompt=PROMPT, extra_body={"seed": seed, "steps": steps, **more})
        assert answer.data[0].b64_json is not None
        return answer.data[0].b64_json

    def stream(self, steps: int, request_id: str) -> Any:
        """Return an iterator over the events of an image with three previews and a random seed."""
        return self.openai.images.generate(
            prompt=PROMPT,
            stream=True,
            partial_images=3,
            extra_body={"steps": steps},
            extra_headers={"X-Request-Id": request_id},
        )

    def metric(self, name: str) -> float:
        """Return the sum of the values of a metric."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(each.value for family in families for each in family.samples if each.name == name)

    def name(self) -> str:
        """Return the name of the model."""
        name: str = self.http.get("/v1/models").json()["data"][0]["id"]
        return name


def states() -> list[State]:
    """Return the states of the replicas."""
    from ray import serve

    from tgate_compile.serve.ray_gateway import State

    found = serve.get_deployment_handle("images", "app").broadcast("state").results(return_exceptions=True)
    return [state for state in found if isinstance(state, State)]


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def same(image: str, other: str) -> bool:
    """Return whether two images are equal but for rounding, which depends on the batches that they were made in."""
    return int(np.abs(pixels(image) - pixels(other)).max()) <= 1


@pytest.mark.parametrize(
    "kind", [pytest.param("bundle", marks=pytest.mark.heavy), pytest.param("model", marks=pytest.mark.sweep)]
)
def test_replicas_share_the_load_die_and_are_replaced(kind: str, free_port: int) -> None:
    # A replica of a bundle starts in a few seconds, one of a pipeline takes half a minute of processor time.
    given: dict[str, Any] = {"bundle": str(program())} if kind == "bundle" else {"model": "embedded:sd", "gate_step": 2}
    updated: dict[str, Any] = {"name": "second"} | ({} if kind == "bundle" else {"gate_step": 0.9})
    given |= {"name": "first", "replicas": 2, "num_cpus": 0.5, "max_batch": 4, "max_steps": 1000, "drain": 120.0}
    steps = 200 if kind == "bundle" else 40
    with cluster(free_port):
        deploy(given)
        with Client(f"http://127.0.0.1:{free_port}") as client:
            check_the_api(client)
            with ThreadPoolExecutor(16) as pool:
                expected = {seed: client.image(seed, steps) for seed in range(2)}
                assert not same(expected[0], expected[1])
                check_that_load_is_shared(client, pool, steps, expected)
                check_that_a_death_loses_nothing(client, pool, steps, expected)
                check_that_an_update_loses_nothing(client, pool, steps, {**given, **updated}, expected)


def check_the_api(client: Client) -> None:
    assert client.name() == "first"
    for path in ("/healthz", "/readyz"):
        assert client.http.get(path).json() == {"status": "ok"}
    answer = client.http.get("/status", headers={"X-Request-Id": "mine"})
    assert answer.json()["ready"] is True
    assert answer.headers.get_list("X-Request-Id") == ["mine"]
    assert "/v1/images/generations" in client.http.get("/openapi.json").json()["paths"]
    assert "script" in client.http.get("/").text
    wrong = client.http.post("/v1/images/generations", json={"prompt": "x", "steps": 0})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "steps")
    assert client.http.post("/v1/images/generations", content=b"x" * 70_000).status_code == 413
    assert client.http.get("/nothing").status_code == 404


def check_that_load_is_shared(client: Client, pool: ThreadPoolExecutor, steps: int, expected: dict[int, str]) -> None:
    before = client.metric("tgate_engine_completed_total")
    images = list(pool.map(lambda number: client.image(number % 2, steps), range(12)))
    assert all(same(image, expected[number % 2]) for number, image in enumerate(images))
    assert client.metric("tgate_engine_completed_total") == before + 12
    assert min(state.stats.completed for state in states()) >= 3


def check_that_a_death_loses_nothing(
    client: Client, pool: ThreadPoolExecutor, steps: int, expected: dict[int, str]
) -> None:
    stream = client.stream(steps, "watched")
    events = [next(stream)]
    images = [pool.submit(client.image, number % 2, steps) for number in range(8)]
    (victim,) = (
        state for state in states() if any(each.request_id.startswith("watched") for each in state.stats.running)
    )
    os.kill(victim.pid, signal.SIGKILL)
    events += stream
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    (seed,) = {event.seed for event in events}
    assert same(events[-1].b64_json, client.image(seed, steps))
    for number, image in enumerate(images):
        assert same(image.result(), expected[number % 2])
    # The stream, and the others that were in the replica.
    assert 1 <= client.metric("tgate_retries_total") <= 9
    eventually(lambda: len(states()) == 2)
    assert victim.pid not in [state.pid for state in states()]


def check_that_an_update_loses_nothing(
    client: Client, pool: ThreadPoolExecutor, steps: int, given: dict[str, Any], expected: dict[int, str]
) -> None:
    before = {state.pid for state in states()}
    is_updated = threading.Event()

    def keep_asking(number: int) -> list[str]:
        images = []
        while not is_updated.is_set():
            images.append(client.image(number % 2, steps))
        return images

    asking = [pool.submit(keep_asking, number) for number in range(4)]
    try:
        deploy(given)
        eventually(lambda: client.name() == "second" and len(states()) == 2)
    finally:
        is_updated.set()
    for number, images in enumerate(map(Future.result, asking)):
        allowed = expected[number % 2], client.image(number % 2, steps)
        assert len(images) > 1
        assert all(any(same(image, each) for each in allowed) for image in images)
    assert "bundle" in given or not same(expected[0], client.image(0, steps))
    assert before.isdisjoint(state.pid for state in states())
    # The gateway is new as well. None of its requests had to be sent again: the old replicas have finished theirs.
    assert client.metric("tgate_retries_total") == 0


@pytest.mark.sweep
def test_requests_with_a_lora_go_where_it_is_prepared(tmp_path: Path, free_port: int) -> None:
    import openai

    adapters = {name: lora_weights(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    given = {"model": "embedded:sd", "gate_step": 2, "steps": 4, "max_batch": 2, "replicas": 2, "num_cpus": 0.5}
    with cluster(free_port):
        deploy({**given, "adapters": adapters, "new_sizes": "refuse"})
        with Client(f"http://127.0.0.1:{free_port}") as client:
            assert client.http.get("/v1/models").json()["data"][0]["loras"] == ["first", "second"]
            plain = client.image(0, 4)
            made = {name: client.image(0, 4, lora=name) for name in adapters}
            assert not same(plain, made["first"])
            assert not same(made["first"], made["second"])
            time.sleep(5)  # until the gateway knows which replica has prepared what
            before = {state.pid: state.stats.completed for state in states()}
            assert all(same(client.image(0, 4, lora="first"), made["first"]) for _ in range(8))
            assert sorted(state.stats.completed - before[state.pid] for state in states()) == [0, 8]
            with pytest.raises(openai.BadRequestError, match="third"):
                client.image(0, 4, lora="third")


def lora_weights(folder: Path, seed: int) -> str:
    """Save weights of a LoRA for the embedded model, and return their folder."""
    import peft
    import torch

    from tgate_compile._cli.loading import load

    pipe: Any = load("embedded:sd").pipe
    torch.manual_seed(seed)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False))
    type(pipe).save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return str(folder)


@pytest.mark.sweep
def test_replicas_are_added_under_load_and_removed_later(free_port: int) -> None:
    scaling = {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 1}
    given = {"bundle": str(program()), "autoscaling": scaling, "num_cpus": 0.5, "max_batch": 4, "max_steps": 1000}
    is_enough = threading.Event()
    with cluster(free_port):
        deploy(given)
        with Client(f"http://127.0.0.1:{free_port}") as client:
            expected = client.image(0, 200)

            def keep_asking(number: int) -> None:
                while not is_enough.is_set():
                    assert same(client.image(0, 200), expected)

            with ThreadPoolExecutor(8) as pool:
                assert len(states()) == 1
                asking = [pool.submit(keep_asking, number) for number in range(8)]
                try:
                    eventually(lambda: len(states()) == 2)
                finally:
                    is_enough.set()
                for each in asking:
                    each.result()
            eventually(lambda: len(states()) == 1)
            assert same(client.image(0, 200), expected)


@pytest.mark.heavy
def test_a_full_queue_and_a_key(free_port: int) -> None:
    given = {"bundle": str(program()), "num_cpus": 0.5, "max_ongoing_requests": 1, "max_waiting": 1, "max_steps": 1000}
    with cluster(free_port, TEST_KEY="secret"):
        deploy({**given, "api_key_variable": "TEST_KEY"})
        body = {"prompt": PROMPT, "steps": 300}
        with httpx2.Client(base_url=f"http://127.0.0.1:{free_port}", timeout=PATIENCE) as http:
            assert http.post("/v1/images/generations", json=body).status_code == 401
            assert "securitySchemes" in http.get("/openapi.json").json()["components"]
            http.headers["Authorization"] = "Bearer secret"
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(lambda _: http.post("/v1/images/generations", json=body), range(6)))
            assert {answer.status_code for answer in answers} == {200, 429}
            assert all(answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in answers if answer.is_error)
            assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.is_error)
            # A client that goes away cancels its image.
            with pytest.raises(httpx2.TimeoutException):
                http.post("/v1/images/generations", json={**body, "steps": 1000}, timeout=0.5)
            eventually(lambda: [state.stats.cancelled for state in states()] == [1])


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
