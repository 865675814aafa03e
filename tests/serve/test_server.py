"""The HTTP server over a real engine: OpenAI's client, streams, limits, keys, disconnects, metrics, fuzzing."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.browsing import chromium, show_at
from tests.serve.serving import eventually, picture, pixels, serving
from tests.tiny_pipelines import SIZE, stable_diffusion
from tgate_compile import ConfigurationError, UnsupportedCallError, optimize
from tgate_compile.serve import Engine, EngineBusyError, EngineClosedError, EngineCrashedError, EngineTimeoutError
from tgate_compile.serve.jobs import ServedModel, as_api_error, preview_steps
from tgate_compile.serve.observability import JsonFormatter, log_config
from tgate_compile.serve.schemas import Limits
from tgate_compile.serve.server import create_app

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

MODEL = ServedModel(name="tiny", steps=4, guidance=5.0, size=(SIZE, SIZE))
LIMITS = Limits(images=20, steps=1000, side=64, prompt=100, body=2000)
#: Steps that take longer than a test.
ENDLESS = 900
MAX_BATCH, MAX_WAITING = 2, 4


@pytest.fixture(scope="module")
def expected() -> dict[int, Image.Image]:
    """Return the images of the pipeline itself, by seed."""
    import torch

    pipe = optimize(stable_diffusion(layout="small"), 2, backend="eager")
    call = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": SIZE, "width": SIZE}
    return {seed: pipe("red cat", generator=torch.Generator().manual_seed(seed), **call).images[0] for seed in (5, 6)}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    pipe = optimize(stable_diffusion(layout="small"), 2, backend="eager")
    call = {"prompt": "", "num_inference_steps": 4, "guidance_scale": 5.0, "height": SIZE, "width": SIZE}
    options: dict[str, Any] = {"max_batch": MAX_BATCH, "max_waiting": MAX_WAITING, "new_sizes": "refuse"}
    with Engine(pipe, warm_up=[call], **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    """Return the address of a server that is open to anybody."""
    with serving(create_app(engine, model=MODEL, limits=LIMITS, drain=None)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """See that each test leaves the engine without requests."""
    yield
    if "engine" in request.fixturenames:
        engine: Engine = request.getfixturevalue("engine")
        eventually(lambda: not engine.stats().waiting and not engine.stats().running)


def test_openais_client_gets_the_images_of_the_pipeline(
    client: openai.OpenAI, expected: dict[int, Image.Image]
) -> None:
    answer = client.images.generate(prompt="red cat", model="tiny", n=2, size=f"{SIZE}x{SIZE}", extra_body={"seed": 5})
    assert answer.size == f"{SIZE}x{SIZE}"
    assert answer.output_format == "png"
    assert [each.seed for each in answer.data] == [5, 6]
    for each, image in zip(answer.data, expected.values(), strict=True):
        assert each.b64_json is not None
        assert np.abs(pixels(each.b64_json) - pixels(image)).max() <= 1
    assert np.abs(pixels(expected[5]) - pixels(expected[6])).max() > 10


def test_the_parameters_reach_the_pipeline(client: openai.OpenAI) -> None:
    def made(**more: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        answer = client.images.generate(prompt="red cat", extra_body={"seed": 5, **more})
        assert answer.data[0].b64_json is not None
        return pixels(answer.data[0].b64_json)

    usual = made()
    assert np.array_equal(usual, made())
    for other in ({"steps": 3}, {"guidance": 2.0}, {"gate_step": 3}, {"gate_step": 0.9}, {"negative_prompt": "dog"}):
        assert np.abs(usual - made(**other)).max() > 1, other
    for same in ({"steps": 4}, {"guidance": 5}, {"gate_step": 2}, {"gate_step": 0.5}, {"user": "me"}, {"size": "auto"}):
        assert np.array_equal(usual, made(**same)), same


def test_without_a_seed_the_answer_says_which_was_taken(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt="red cat").data[0] for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt="red cat", extra_body={"seed": first.seed}).data[0]
    assert again.b64_json == first.b64_json


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats(client: openai.OpenAI, output_format: Any) -> None:
    sizes = []
    for compression in (5, 100):
        answer = client.images.generate(
            prompt="red cat", output_format=output_format, output_compression=compression, extra_body={"seed": 5}
        )
        file = answer.data[0].b64_json
        assert file is not None
        assert picture(file).format == output_format.upper()
        sizes.append(len(file))
    assert sizes[0] < sizes[1]


def test_a_stream_has_previews_and_then_the_image(client: openai.OpenAI, expected: dict[int, Image.Image]) -> None:
    events = list(
        client.images.generate(prompt="red cat", stream=True, partial_images=3, n=2, extra_body={"seed": 5, "steps": 4})
    )
    for index, seed in enumerate((5, 6)):
        own = [event for event in events if event.image_index == index]
        assert [event.type.rpartition(".")[2] for event in own] == ["partial_image"] * 3 + ["completed"]
        assert [event.partial_image_index for event in own[:3]] == [0, 1, 2]
        assert all(event.size == f"{SIZE}x{SIZE}" and event.output_format == "png" for event in own)
        assert np.abs(pixels(own[-1].b64_json) - pixels(expected[seed])).max() <= 1
        assert len({event.b64_json for event in own}) == 4
        assert own[-1].usage.total_tokens == 0


def test_previews_are_spread_evenly() -> None:
    assert preview_steps(25, 3) == {6, 12, 19}
    assert preview_steps(2, 3) == {1}
    assert preview_steps(1, 3) == set()


def test_a_stream_that_cannot_begin_is_an_ordinary_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="32") as caught:
        client.images.generate(prompt="red cat", stream=True, size="32x16")
    assert caught.value.code == "unsupported_request"


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    pipe = optimize(stable_diffusion(layout="small"), 2, backend="eager")
    with (
        Engine(pipe, max_batch=1) as engine,
        serving(create_app(engine, model=MODEL, drain=None, limits=LIMITS)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        events = client.images.generate(
            prompt="red cat", stream=True, partial_images=3, extra_body={"steps": ENDLESS, "gate_step": 2}
        )
        assert next(events).type == "image_generation.partial_image"
        engine.close(drain=False)
        with pytest.raises(openai.APIError, match="closed") as caught:
            list(events)
        assert caught.value.code == "unavailable"


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "said"),
    [
        ({}, 400, "missing_required_parameter", "prompt", "Missing required parameter: 'prompt'"),
        ({"prompt": ""}, 400, "invalid_value", "prompt", "at least 1 character"),
        ({"prompt": "x" * 101}, 400, "invalid_value", "prompt", "at most 100 characters"),
        ({"prompt": 7}, 400, "invalid_value", "prompt", "valid string"),
        ({"prompt": "x", "n": 0}, 400, "invalid_value", "n", "greater than or equal to 1"),
        ({"prompt": "x", "n": 21}, 400, "invalid_value", "n", "less than or equal to 20"),
        ({"prompt": "x", "n": "2"}, 400, "invalid_value", "n", "valid integer"),
        ({"prompt": "x", "steps": 1001}, 400, "invalid_value", "steps", "less than or equal to 1000"),
        ({"prompt": "x", "seed": -1}, 400, "invalid_value", "seed", "greater than or equal to 0"),
        ({"prompt": "x", "seed": 2**53}, 400, "invalid_value", "seed", "less than or equal to"),
        ({"prompt": "x", "size": "big"}, 400, "invalid_value", "size", "512x512"),
        ({"prompt": "x", "size": "72x16"}, 400, None, "size", "at most 64x64"),
        ({"prompt": "x", "size": "20x16"}, 400, None, "size", "multiples of 8"),
        ({"prompt": "x", "size": "32x16"}, 400, "unsupported_request", None, "32"),
        ({"prompt": "x", "gate_step": 0}, 400, "invalid_value", "gate_step", "a fraction of the steps"),
        ({"prompt": "x", "gate_step": 1.5}, 400, "invalid_value", "gate_step", "a fraction of the steps"),
        ({"prompt": "x", "guidance": -1}, 400, "invalid_value", "guidance", "greater than or equal to 0"),
        ({"prompt": "x", "response_format": "url"}, 400, "invalid_value", "response_format", "keeps no files"),
        ({"prompt": "x", "quality": "hd"}, 400, "invalid_value", "quality", "steps"),
        ({"prompt": "x", "style": "vivid"}, 400, "invalid_value", "style", "'style' is not supported. Describe"),
        (
            {"prompt": "x", "moderation": "low"},
            400,
            "invalid_value",
            "moderation",
            "'moderation' is not supported. The server does not",
        ),
        ({"prompt": "x", "partial_images": 1}, 400, None, "partial_images", "stream"),
        ({"prompt": "x", "output_compression": 9}, 400, None, "output_compression", "lossless"),
        (
            {"prompt": "x", "lora": "/etc/passwd"},
            400,
            "unsupported_request",
            None,
            'no LoRA "/etc/passwd". No LoRA is loaded',
        ),
        ({"prompt": "x", "image": "http://localhost/x.png"}, 400, "unknown_parameter", "image", "Unknown"),
        ({"prompt": "x", "model": "other"}, 404, "model_not_found", "model", "'tiny'"),
    ],
)
def test_what_is_wrong_is_said(
    http: httpx2.Client, body: dict[str, Any], status: int, code: str | None, param: str | None, said: str
) -> None:
    answer = http.post("/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"[" * 1999, "application/json", "not valid JSON"),
        (b"\xff\xfe", "application/json", "not valid JSON"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'{"prompt": "x"}', "text/plain", "must be a JSON object"),
        (b"", "application/json", "must be a JSON object"),
        (b'{"prompt": "x", "guidance": NaN}', "application/json", "finite"),
        (b'{"prompt": "\\ud800"}', "application/json", "valid string"),
        (b'{"prompt": "x", "\\ud800": 1}', "application/json", "must be a JSON object"),
    ],
)
def test_malformed_bodies(http: httpx2.Client, content: bytes, kind: str, said: str) -> None:
    answer = http.post("/v1/images/generations", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_other_paths_and_methods(http: httpx2.Client) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/images/generations", 405)):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert "/openapi.json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (EngineBusyError("full"), 429, "rate_limit_exceeded", 5),
        (EngineClosedError("closing"), 503, "unavailable", 1),
        (EngineCrashedError("again"), 503, "unavailable", 1),
        (CancelledError(), 503, "unavailable", 1),
        (EngineTimeoutError("late"), 504, "timeout", None),
        (UnsupportedCallError("never"), 400, "unsupported_request", None),
        (ValueError("7 is not divisible by 8"), 400, "unsupported_request", None),
        (RuntimeError("a secret path"), 500, "internal_error", None),
    ],
)
def test_errors_of_the_engine(error: Exception, status: int, code: str, retry_after: int | None) -> None:
    answer = as_api_error(error, typical_seconds=10.0)
    assert (answer.status, answer.code, answer.retry_after) == (status, code, retry_after)
    assert ("secret" not in answer.message) if status == 500 else (str(error) in answer.message)
    assert answer.response().status_code == status


def test_a_large_body_is_not_read_to_its_end(engine: Engine) -> None:
    read, sent = [], []

    async def receive() -> dict[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/images/generations", "headers": [], "query_string": b""}
    app = create_app(engine, model=MODEL, limits=LIMITS, drain=None)
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert len(read) == 3  # 2000 bytes are allowed
    read.clear()
    asyncio.run(app({**scope, "headers": [(b"content-length", b"2001")]}, receive, send))
    assert sent[2]["status"] == 413
    assert not read


def test_a_body_that_does_not_arrive(engine: Engine) -> None:
    app = create_app(engine, model=MODEL, limits=Limits(body_seconds=0.1), drain=None)
    with serving(app) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_too_many_requests(client: openai.OpenAI, engine: Engine) -> None:
    before = engine.stats().completed
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="red cat", n=20, extra_body={"steps": ENDLESS})
    assert caught.value.type == "rate_limit_error"
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 30
    # None of the images goes on, and the engine serves the next request.
    eventually(lambda: not engine.stats().running and not engine.stats().waiting)
    assert client.images.generate(prompt="red cat").data
    assert engine.stats().completed == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_images(
    url: str, engine: Engine, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cancelled = engine.stats().cancelled
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "red cat", "n": 2, "steps": ENDLESS, "stream": stream}).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with caplog.at_level(logging.INFO, logger="tgate_compile"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\nX-Request-Id: gone\r\n\r\n".encode() + body)
            eventually(lambda: any(each.step > 2 for each in engine.stats().running))
        eventually(lambda: engine.stats().cancelled == cancelled + 2)
        eventually(lambda: [record for record in caplog.records if record.getMessage() == "request"])
    (line,) = (record.fields for record in caplog.records if record.getMessage() == "request")  # type: ignore[attr-defined]
    assert line["status"] == 499


def test_a_cancelled_stream(client: openai.OpenAI, engine: Engine) -> None:
    cancelled = engine.stats().cancelled
    with client.images.generate(
        prompt="red cat", stream=True, partial_images=3, extra_body={"steps": ENDLESS}
    ) as stream:
        eventually(lambda: engine.stats().running)
        stream.close()
    eventually(lambda: engine.stats().cancelled == cancelled + 1)


def test_the_status_shows_who_is_in_which_phase(http: httpx2.Client, client: openai.OpenAI) -> None:
    seen = []

    def look() -> bool:
        seen.extend(http.get("/status").json()["running"])
        return {"full", "pruned"} <= {each["graph"] for each in seen}

    headers = {"X-Request-Id": "mine"}
    body = {"steps": ENDLESS, "gate_step": 250}
    with client.images.generate(prompt="red cat", stream=True, extra_body=body, extra_headers=headers) as stream:
        eventually(look)
        stream.close()
    assert all(each["request_id"].startswith("mine-") for each in seen)
    steps = {each["phase"]: each["step"] for each in seen if each["phase"]}
    assert steps["F"] < 250 <= steps["p"] < ENDLESS


def test_an_api_key(engine: Engine) -> None:
    client = TestClient(create_app(engine, model=MODEL, api_key="secret", drain=None))
    body = {"prompt": "red cat"}
    for authorization in ("", "Bearer", "Bearer wrong", "Basic secret", "Bearer secret2", "Bearer \xfc"):
        answer = client.post(
            "/v1/images/generations", json=body, headers={"Authorization": authorization.encode("latin-1")}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/v1/models", "/status"):
        assert client.get(path).status_code == 401
    for path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert client.get(path).status_code == 200
    right = {"Authorization": "Bearer secret"}
    assert client.post("/v1/images/generations", json=body, headers=right).status_code == 200
    assert client.get("/v1/models", headers=right).status_code == 200
    with pytest.raises(ConfigurationError, match="empty"):
        create_app(engine, model=MODEL, api_key=" ")


def test_the_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tgate_compile")
    assert model.defaults == {"steps": 4, "guidance": 5.0, "size": f"{SIZE}x{SIZE}"}
    assert model.limits["images"] == 20


def test_health_and_ids(http: httpx2.Client) -> None:
    for path in ("/healthz", "/readyz"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    given = http.get("/healthz", headers={"X-Request-Id": "abc-1"})
    assert given.headers["X-Request-Id"] == "abc-1"
    for bad in ("a b", "x" * 65, '"}'):
        made = http.get("/healthz", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert len(made) == 32


def test_metrics(http: httpx2.Client, client: openai.OpenAI, engine: Engine) -> None:
    def metric(name: str, **labels: str) -> float:
        return sum(value for found, given, value in samples() if found == name and labels.items() <= given.items())

    def samples() -> list[tuple[str, dict[str, str], float]]:
        answer = http.get("/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(answer.text)
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    path = "/v1/images/generations"
    before = {name: metric(name) for name in ("tgate_images_total", "tgate_engine_completed_total")}
    requests = metric("tgate_http_requests_total", path=path, status="200")
    images = {phase: metric("tgate_batch_images_sum", phase=phase) for phase in "Fp"}
    client.images.generate(prompt="red cat", n=2)
    assert metric("tgate_images_total") == before["tgate_images_total"] + 2
    assert metric("tgate_engine_completed_total") == before["tgate_engine_completed_total"] + 2
    assert metric("tgate_http_requests_total", path=path, status="200") == requests + 1
    # Two images with two full steps and two pruned ones.
    assert {phase: metric("tgate_batch_images_sum", phase=phase) - images[phase] for phase in "Fp"} == {"F": 4, "p": 4}
    assert metric("tgate_batch_images_bucket", phase="F", le="2.0") == metric("tgate_batch_images_count", phase="F")
    assert metric("tgate_step_seconds_count", phase="p") == metric("tgate_batch_images_count", phase="p")
    assert metric("tgate_step_seconds_sum", phase="p") > 0
    assert metric("tgate_captures_total") == engine.stats().captures > 0
    assert metric("tgate_http_request_seconds_count", path=path) >= 1
    assert metric("tgate_first_image_seconds_count") >= 1
    assert (metric("tgate_ready"), metric("tgate_waiting"), metric("tgate_running")) == (1, 0, 0)
    assert {"tgate_cache_bytes", "tgate_engine_cancelled_total"} <= {name for name, _, _ in samples()}
    http.get("/a-path-that-any-client-may-invent")
    assert metric("tgate_http_requests_total", path="other", status="404") >= 1


def test_logs_are_json_with_the_requests_id(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(JsonFormatter())
    with caplog.at_level(logging.INFO, logger="tgate_compile"):
        http.post("/v1/images/generations", json={"prompt": "a secret", "seed": 3}, headers={"X-Request-Id": "abc"})
        eventually(lambda: '"request"' in caplog.text)
    (line,) = (line for line in map(json.loads, caplog.text.splitlines()) if line["message"] == "request")
    assert {"time", "seconds", "first_image_seconds"} <= line.keys()
    expected = {"level": "info", "request_id": "abc", "path": "/v1/images/generations", "status": 200}
    assert expected | {"images": 1, "seed": 3, "method": "POST"} == {
        name: line[name] for name in (*expected, "images", "seed", "method")
    }
    assert "secret" not in caplog.text
    assert log_config("debug")["loggers"]["tgate_compile"]["level"] == "DEBUG"


def test_the_shutdown_waits_for_requests() -> None:
    pipe = optimize(stable_diffusion(layout="small"), 2, backend="eager")
    engine = Engine(pipe, max_batch=1)
    answers: list[httpx2.Response] = []
    app = create_app(engine, model=MODEL, drain=30.0)
    with serving(app) as (url, server):

        def ask() -> None:
            body = {"prompt": "red cat", "steps": 100}
            answers.append(httpx2.post(f"{url}/v1/images/generations", json=body, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        eventually(lambda: any(each.step > 1 for each in engine.stats().running))
        server.should_exit = True
        thread.join()
    assert [answer.status_code for answer in answers] == [200]
    assert not engine.ready
    closed = TestClient(app)
    assert closed.get("/readyz").status_code == 503
    assert closed.get("/healthz").status_code == 200
    answer = closed.post("/v1/images/generations", json={"prompt": "red cat"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


def fuzz(url: str, examples: int) -> None:
    """Send requests that the schema allows and others, and compare the answers with the schema."""
    import schemathesis
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    chosen = [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
    ]
    cases = st.one_of(schema.as_strategy(GenerationMode.POSITIVE), schema.as_strategy(GenerationMode.NEGATIVE))
    quiet = settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )

    @quiet
    @given(case=cases)
    def check(case: Any) -> None:
        case.call_and_validate(checks=chosen)

    check()


@pytest.fixture
def small(engine: Engine) -> Iterator[str]:
    """Return the address of a server whose largest request is quick."""
    limits = Limits(images=2, steps=2, side=64, prompt=100)
    with serving(create_app(engine, model=MODEL, limits=limits, drain=None)) as (url, _):
        yield url


def test_fuzzed(small: str) -> None:
    fuzz(small, 15)


@pytest.mark.heavy
def test_fuzzed_for_long(small: str) -> None:
    fuzz(small, 150)


def test_the_page_loads_nothing_from_elsewhere(http: httpx2.Client) -> None:
    answer = http.get("/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert 'src="' not in answer.text


def test_the_page_makes_an_image(url: str) -> None:
    with chromium() as browser:
        browser.get(url)
        eventually(lambda: browser.find_element("id", "model").text == "tiny")
        browser.find_element("id", "prompt").send_keys("red cat")
        browser.execute_script("document.getElementById('steps').value = 300; document.getElementById('n').value = 2")
        browser.find_element("id", "go").click()
        eventually(lambda: len(browser.find_elements("css selector", "#running tr.mine .strip i[data-letter]")) > 2)
        eventually(lambda: browser.find_element("id", "status").text.startswith("Done"))
        images = browser.find_elements("css selector", "#images img")
        assert [image.get_property("naturalWidth") for image in images] == [SIZE] * 2
        assert browser.get_log("browser") == []


def test_the_page_shows_errors_and_stops(url: str) -> None:
    with chromium() as browser:
        show_at(browser, 390, 800)
        browser.get(url)
        eventually(lambda: browser.find_element("id", "model").text == "tiny")
        browser.find_element("id", "prompt").send_keys("red cat")
        browser.execute_script("document.getElementById('size').value = '9992x9992'")
        browser.find_element("id", "go").click()
        eventually(lambda: "size" in browser.find_element("id", "error").text)
        assert browser.find_element("id", "go").text == "Generate"
        browser.execute_script(
            f"document.getElementById('size').value = ''; document.getElementById('steps').value = {ENDLESS}"
        )
        browser.find_element("id", "go").click()
        eventually(lambda: browser.find_elements("css selector", "#running tr.mine .strip i[data-letter]"))
        assert not browser.find_element("id", "error").is_displayed()
        browser.find_element("id", "go").click()
        eventually(lambda: browser.find_element("id", "status").text == "Stopped")
        eventually(lambda: not browser.find_elements("css selector", "#running tr.mine"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        (refused,) = browser.get_log("browser")
        assert "400" in refused["message"]
