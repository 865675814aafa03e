"""`tgate-compile serve`: what it refuses, and a server as its users start and stop it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import typer
import yaml
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests import tiny_pipelines
from tests.programs import program
from tests.serve.serving import PATIENCE, eventually, picture
from tgate_compile import optimize
from tgate_compile._cache import FOLDER_VARIABLE
from tgate_compile._cli.app import app
from tgate_compile._cli.options import FAMILIES, Image, Loading, Precision, embedded_name
from tgate_compile._cli.serve import (
    API_KEY_VARIABLE,
    EngineOptions,
    _adapters,
    _limit_threads,
    engine_for_model,
    load_adapters,
)
from tgate_compile._cli.settings import ScheduleOptions
from tgate_compile._errors import UnsupportedCallError
from tgate_compile.serve import Engine
from tgate_compile.serve.jobs import ServedModel
from tgate_compile.serve.server import OPEN_PATHS, create_app

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"

run = CliRunner().invoke


def test_the_number_of_threads_is_limited_in_all_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        _limit_threads(None)
        assert torch.get_num_threads() == before
        _limit_threads(1)
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *found] == [1, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--bundle", "x", "--gate-step", "3", "--model", "y"], 1, "Leave out --model and --gate-step"),
        (["--height", "64"], 1, "--height and --width belong together"),
        (["--warm-up-size", "64"], 2, "width x height"),
        (["--warm-up-size", "64x60"], 2, "60 is not a multiple of 8"),
        (["--adapter", "style"], 2, "NAME=FILE"),
        (["--bundle", "nothing", "--port", "0"], 1, "is not a bundle"),
        (["--host", "256.0.0.1", "--port", "0"], 1, "cannot listen on 256.0.0.1"),
    ],
)
def test_what_is_wrong_is_said_first(arguments: list[str], code: int, said: str) -> None:
    result = run(app, ["serve", *arguments])
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_caches_are_limited() -> None:
    loading, image = Loading(device="cpu"), Image(steps=4)
    started = engine_for_model(
        loading.load("sd"), None, loading, image, ScheduleOptions(gate_step=2), EngineOptions(max_batch=1),
        backend="eager", precision=Precision.auto,
    )[0]  # fmt: skip
    started.close()
    with pytest.raises(UnsupportedCallError, match=r"the engine's limit for all requests together is 0\.0 MB"):
        engine_for_model(
            loading.load("sd"), None, loading, image, ScheduleOptions(gate_step=2),
            EngineOptions(max_batch=1, memory=1e-6), backend="eager", precision=Precision.auto,
        )  # fmt: skip


def test_an_embedded_model_needs_no_prefix_unless_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (embedded_name("sd"), embedded_name("embedded:sd"), embedded_name("owner/sd")) == ("sd", "sd", None)
    Path("sd").mkdir()
    assert embedded_name("sd") is None


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert "Choose another --host or --port" in result.stderr


@contextmanager
def process(
    *arguments: str, without: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str, list[dict[str, Any]]]]:
    """Start `tgate-compile serve`, and return the process, its address, and the lines of its log as they come.

    The modules `without` cannot be imported in it.
    """
    code = f"import sys; sys.modules.update(dict.fromkeys({[*without]})); from tgate_compile._cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", *arguments]
    environment = {**os.environ, "TGATE_COMPILE_API_KEY": "secret"}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines: list[dict[str, Any]] = []
    others: list[str] = []

    def collect() -> None:
        assert started.stderr is not None
        for line in started.stderr:
            if line.startswith("{"):
                lines.append(json.loads(line))
            else:
                others.append(line)

    reader = threading.Thread(target=collect)
    reader.start()
    try:
        # Importing PyTorch and capturing take long on a busy machine.
        eventually(
            lambda: started.poll() is not None or any("startup complete" in line["message"] for line in lines), 300
        )
        assert started.poll() is None, others
        (address,) = (line["page"] for line in lines if line["message"] == "serving")
        yield started, address, lines
    finally:
        started.kill()
        started.wait()
        reader.join()
        assert started.stderr is not None
        started.stderr.close()


@pytest.mark.heavy
def test_the_embedded_model_is_served_and_stopped() -> None:
    with process("--model", "sd", "--gate-step", "2", "--steps", "4", "--max-batch", "1") as (server, url, lines):
        headers = {"Authorization": "Bearer secret", "X-Request-Id": "first"}
        body = {"prompt": "a large red circle on a blue background", "seed": 7}
        answer = httpx2.post(f"{url}v1/images/generations", json=body, headers=headers, timeout=60).json()
        _, green, blue = picture(answer["data"][0]["b64_json"]).resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        assert blue > green
        assert answer["size"] == "64x64"
        assert httpx2.post(f"{url}v1/images/generations", json=body).status_code == 401
        (model,) = httpx2.get(f"{url}v1/models", headers=headers).json()["data"]
        assert (model["id"], model["defaults"]["steps"]) == ("sd", 4)
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE)
    assert any(line.get("request_id") == "first" and line.get("status") == 200 for line in lines)
    assert any("closing the engine" in line["message"] for line in lines)


@pytest.mark.heavy
def test_a_bundle_is_served_without_pytorch() -> None:
    with process("--bundle", str(program()), without=("torch", "diffusers", "transformers")) as (_, url, _):
        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "red cat", "seed": 7, "n": 2}
        answer = httpx2.post(f"{url}v1/images/generations", json=body, headers=headers, timeout=60).json()
        assert len(answer["data"]) == 2


def test_the_manifest_for_kubernetes_fits_the_server() -> None:
    deployment, service, budget = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert [each["kind"] for each in (deployment, service, budget)] == ["Deployment", "Service", "PodDisruptionBudget"]
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels.items()
    assert budget["spec"]["selector"] == deployment["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["path"] in OPEN_PATHS  # probes have no API key
        assert get["port"] == port["name"]
    assert pod["metadata"]["annotations"]["prometheus.io/path"] in OPEN_PATHS
    options = dict(each.removeprefix("--").split("=") for each in container["args"])
    assert {f"--{name}" for name in options} <= known_options()
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > int(pause) + int(options["drain"])
    volumes = {each["name"] for each in pod["spec"]["volumes"]}
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts.keys() == volumes
    assert API_KEY_VARIABLE in [each["name"] for each in container["env"]]
    # The image that the Dockerfile makes.
    lines = (EXAMPLES / "Dockerfile").read_text().splitlines()
    words = {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}
    assert int(words["EXPOSE"]) == port["containerPort"]
    started = [*json.loads(words["ENTRYPOINT"]), *json.loads(words["CMD"])]
    assert started[:2] == ["tgate-compile", "serve"]
    assert {word for word in started if word.startswith("--")} <= known_options()
    (user,) = (re.findall(r"--uid (\d+)", line) for line in lines if "useradd" in line)
    assert user == [str(pod["spec"]["securityContext"]["runAsUser"])]
    for variable in (FOLDER_VARIABLE, "HF_HOME"):
        (path,) = (re.findall(rf"\b{variable}=(\S+)", line)[0] for line in lines if f"{variable}=" in line)
        assert path.startswith(mounts["cache"])


def known_options() -> set[str]:
    command = typer.main.get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_adapters_are_chosen_by_name(tmp_path: Path) -> None:
    import peft
    import torch

    from tgate_compile._cli.loading import Loaded

    pipe = tiny_pipelines.stable_diffusion(layout="small")
    sources = []
    for number, name in enumerate(("sketch", "ink")):
        tuned = tiny_pipelines.stable_diffusion(layout="small")
        tiny_pipelines.add_lora(tuned.unet, seed=number)
        type(tuned).save_lora_weights(tmp_path / name, peft.get_peft_model_state_dict(tuned.unet))
        sources.append((name, str(tmp_path / name)))
    plain = tiny_pipelines.run(pipe)
    load_adapters(Loaded(pipe, FAMILIES[-1], "tiny", torch.device("cpu"), "fp32"), sources)
    assert _adapters(pipe) == ["ink", "sketch"]
    assert torch.equal(tiny_pipelines.run(pipe), plain)  # none is active

    served = ServedModel(name="tiny", steps=4, guidance=5.0, loras=("ink", "sketch"))
    with Engine(optimize(pipe, 2, backend="eager"), max_batch=1) as engine:
        client = TestClient(create_app(engine, model=served, drain=None))

        def made(**more: Any) -> tuple[int, Any]:
            answer = client.post("/v1/images/generations", json={"prompt": "red cat", "seed": 3, **more})
            return answer.status_code, answer.json().get("data", answer.json().get("error"))

        choices: list[Any] = [None, "sketch", "ink", {"sketch": 0.5}, {"sketch": 1, "ink": 1}]
        images = [made(lora=choice) for choice in choices]
        assert [status for status, _ in images] == [200] * 5
        assert len({data[0]["b64_json"] for _, data in images}) == 5
        assert made(lora={}) == images[0]
        assert made(lora={"sketch": 1.0}) == images[1]
        status, error = made(lora="oil")
        assert (status, error["code"]) == (400, "unsupported_request")
        assert client.get("/v1/models").json()["data"][0]["loras"] == ["ink", "sketch"]
