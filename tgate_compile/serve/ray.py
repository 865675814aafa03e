"""A Ray Serve application: replicas of the engine on one or many machines behind the HTTP API of one server.

    serve run tgate_compile.serve.ray:build model=embedded:sd gate_step=10 replicas=2

A gateway accepts the HTTP requests and forwards each to a replica, which answers it like a single server. If the
replica dies, the gateway sends the request to another one, once. It fixes the seed before the first try, so the second
try makes the same images; events of a stream that the client has already received are not sent again.
"""

from __future__ import annotations

import asyncio
import json
import logging.config
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.types import Message

from tgate_compile._errors import BackendName, ConfigurationError, Precision
from tgate_compile.methods.method import checked_gate_step
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.observability import log_config
from tgate_compile.serve.ray_gateway import Forwarded, Gateway, State, api_key_in
from tgate_compile.serve.requests import EngineClosedError, NewSizes
from tgate_compile.serve.schemas import ImageRequest, Limits
from tgate_compile.serve.server import SEED, create_app

if TYPE_CHECKING:
    from tgate_compile.serve.jobs import ServedModel

#: The number of combinations of LoRAs and weights that a replica keeps prepared, as far as Serve keeps track.
ADAPTERS_PER_REPLICA = 16


def _number(given: object) -> object:
    """Return the number in a string, because `serve run` passes all arguments as strings."""
    if not isinstance(given, str):
        return given
    return int(given) if given.isdecimal() else float(given)


class Autoscaling(BaseModel):
    """Settings for a number of replicas that follows the number of requests.

    Attributes:
        min_replicas: the smallest number.
        max_replicas: the largest number.
        target_ongoing_requests: the number of requests per replica, waiting ones included, to aim for. The default is
            the size of a batch.
        upscale_delay_s: seconds for which there must be too many requests before replicas are added.
        downscale_delay_s: seconds for which there must be too few before replicas are removed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)]
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _check(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is less than min_replicas ({self.min_replicas})")
        return self


class Arguments(BaseModel):
    """The arguments of the application, in Python or under `args` in a configuration file.

    Attributes:
        model: a folder with a diffusers pipeline, a checkpoint, a hub id, or an embedded model (`embedded:sd`).
        bundle: the folder of a bundle, instead of `model`. Each node must have it, or share it.
        name: the model's name for clients; the default is made from `model` or `bundle`.
        gate_step: steps to run in full: a number, or a fraction of the steps. The default depends on the model.
        steps: denoising steps of requests that do not set them; the default depends on the model.
        guidance: guidance scale of requests that do not set it; the default depends on the model.
        device: the device; `auto` is the best one of the replica.
        dtype: the number format of the weights.
        scheduler: the short name of a scheduler, such as `dpm++`; the default is the model's own.
        backend: the backend of `optimize`.
        precision: the number format that graphs compute in.
        adapters: LoRA weights that requests may choose: for each name, a file, a folder or a hub id.
        warm_up: image sizes (`512x512`) to prepare before a replica is ready; the default is the model's own.
        new_sizes: what to do with a request of another size, as for `Engine`.
        max_batch: images per batch.
        max_waiting: requests that may wait in a gateway for a replica; further ones get 429.
        max_ongoing_requests: requests in a replica at a time; the default is twice `max_batch`.
        memory: gigabytes for the caches of all images in progress in a replica.
        timeout: seconds for an image, from its arrival in a replica.
        max_images: images per request.
        max_steps: denoising steps of a request.
        max_side: width and height of an image, in pixels.
        max_body: bytes of a request's body.
        api_key_variable: the environment variable that contains the API key, for gateways and replicas; None lets
            anybody generate images.
        replicas: the number of replicas, if it is fixed.
        autoscaling: the number of replicas, if it follows the load.
        gateways: the number of gateways. They need neither a model nor PyTorch.
        num_cpus: CPUs of a replica, which are also its threads.
        num_gpus: GPUs of a replica.
        drain: seconds that a replica or gateway gets to finish its requests when it is replaced or removed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str | None = None
    bundle: str | None = None
    name: str | None = None
    gate_step: Annotated[int | float, BeforeValidator(_number), AfterValidator(checked_gate_step)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    device: str = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    scheduler: str | None = None
    backend: BackendName | None = None
    precision: Precision = "auto"
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    warm_up: tuple[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")], ...] = ()
    new_sizes: NewSizes = "capture"
    max_batch: Annotated[int, Field(ge=1)] = 8
    max_waiting: Annotated[int, Field(ge=1)] = 64
    max_ongoing_requests: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[float, Field(gt=0)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    max_images: Annotated[int, Field(ge=1)] = 8
    max_steps: Annotated[int, Field(ge=1)] = 200
    max_side: Annotated[int, Field(ge=8)] = 2048
    max_body: Annotated[int, Field(ge=100)] = 65536
    api_key_variable: str | None = None
    replicas: Annotated[int, Field(ge=1)] = 1
    autoscaling: Autoscaling | None = None
    gateways: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    drain: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _check(self) -> Arguments:
        if (self.model is None) == (self.bundle is None):
            raise ValueError("give either model or bundle")
        of_model = {"gate_step", "steps", "guidance", "scheduler", "backend", "adapters"} & self.model_fields_set
        if self.bundle is not None and of_model:
            raise ValueError(f"a bundle has fixed settings; leave out {', '.join(sorted(of_model))}")
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError("give either replicas or autoscaling")
        return self

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The widths and heights to prepare."""
        pairs = (size.split("x") for size in self.warm_up)
        return [(int(width), int(height)) for width, height in pairs]

    @property
    def ongoing(self) -> int:
        """The number of requests in a replica at a time."""
        return 2 * self.max_batch if self.max_ongoing_requests is None else self.max_ongoing_requests


def build(args: Mapping[str, Any] | Arguments) -> serve.Application:
    """Return the application, for `serve run`, `serve deploy` and `ray.serve.run`.

    Args:
        args: the arguments of the application; the fields of `Arguments`.

    Raises:
        ConfigurationError: an argument is wrong.
    """
    try:
        given = args if isinstance(args, Arguments) else Arguments.model_validate(dict(args))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc'])) or 'args'}: {each['msg']}" for each in error.errors())
        raise ConfigurationError(f"The arguments of the application are wrong. {'; '.join(problems)}.") from None
    stopping = {"graceful_shutdown_timeout_s": given.drain, "graceful_shutdown_wait_loop_s": 0.5}
    replicas = serve.deployment(
        Replica,
        name="images",
        max_ongoing_requests=given.ongoing,
        max_queued_requests=given.max_waiting,
        ray_actor_options={"num_cpus": given.num_cpus, "num_gpus": given.num_gpus},
        health_check_period_s=5,
        **_number_of_replicas(given),
        **stopping,
    )
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=given.gateways,
        max_ongoing_requests=10_000,  # the replicas limit the requests
        ray_actor_options={"num_cpus": 0},
        **stopping,
    )
    # Each gets only the arguments that it needs, because changing an argument replaces every deployment that has it.
    of_serve = {"replicas", "autoscaling", "gateways", "max_waiting", "num_cpus", "num_gpus"}
    return gateway.bind(
        replicas.bind(given.model_dump(exclude=of_serve, exclude_defaults=True)),
        max_body=given.max_body,
        api_key_variable=given.api_key_variable,
        adapters=tuple(sorted(given.adapters)),
    )


def _number_of_replicas(given: Arguments) -> dict[str, Any]:
    if given.autoscaling is None:
        return {"num_replicas": given.replicas}
    options = given.autoscaling.model_dump()
    if given.autoscaling.target_ongoing_requests is None:
        options["target_ongoing_requests"] = float(given.max_batch)
    return {"autoscaling_config": AutoscalingConfig(**options)}


class Replica:
    """An engine, and the server's application, which answers requests that a gateway has accepted."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        logging.config.dictConfig(log_config("warning"))  # the gateway logs the requests
        given = Arguments.model_validate(arguments)
        key = api_key_in(given.api_key_variable)
        self._engine, self._model, multiple = _started(given)
        self._sizes: list[tuple[int, int] | None] = [*given.sizes] or [None]
        self._drain = given.drain
        limits = Limits(
            body=given.max_body,
            images=given.max_images,
            steps=given.max_steps,
            side=given.max_side,
            multiple=multiple,
        )
        self._app = create_app(self._engine, model=self._model, api_key=key, limits=limits, drain=None)

    async def answer(self, request: Forwarded) -> AsyncIterator[Message]:
        """Yield the ASGI messages of the response. Closing the iterator cancels the request."""
        adapters = serve.get_multiplexed_model_id()
        if adapters:
            await self.prepare(adapters)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        unread: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if not unread:
                await asyncio.Event().wait()  # the gateway cancels the call if the client goes away
            return unread.pop()

        async def run() -> None:
            try:
                await self._app({**request.scope, SEED: request.seed}, receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running  # raises its error, if any
        finally:
            running.cancel()

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS_PER_REPLICA)  # type: ignore[untyped-decorator]
    async def prepare(self, adapters: str) -> str:
        """Compile the graphs for LoRAs, given as JSON. Serve prefers this replica for further requests with them."""
        request, lora = ImageRequest(prompt=""), json.loads(adapters)
        calls = [{**self._model.call_for(request, size, seed=0), "lora": lora} for size in self._sizes]
        await asyncio.to_thread(self._engine.prepare, calls)
        return adapters

    def state(self) -> State:
        """Return the state of the replica."""
        replica = serve.get_replica_context().replica_id.unique_id
        return State(replica, os.getpid(), self._engine.ready, self._engine.stats())

    def check_health(self) -> None:
        """Raise EngineClosedError if the engine accepts no requests. Serve then replaces the replica."""
        if not self._engine.ready:
            raise EngineClosedError("The engine of this replica accepts no requests.")

    def __del__(self) -> None:
        """Close the engine. Serve calls this when it stops the replica, whose requests have ended by then."""
        if hasattr(self, "_engine"):  # otherwise the constructor has failed
            self._engine.close(drain=True, timeout=self._drain)


def _started(given: Arguments) -> tuple[Engine, ServedModel, int]:
    """Return an engine, its model, and the number that the sides of its images must be multiples of."""
    # The command line knows the defaults of the models. These imports take seconds, and a gateway does not need them.
    from tgate_compile._cli import options
    from tgate_compile._cli.serve import EngineOptions, Policy, engine_for_bundle, engine_for_model, load_adapters
    from tgate_compile._cli.settings import ScheduleOptions

    engine = EngineOptions(
        warm_up_size=given.sizes or None,
        new_sizes=Policy(given.new_sizes),
        max_batch=given.max_batch,
        max_waiting=given.ongoing * given.max_images,  # Serve limits the requests
        memory=given.memory,
        timeout=given.timeout,
    )
    if given.bundle is not None:
        return engine_for_bundle(Path(given.bundle), given.name, engine)
    loading = options.Loading(device=given.device, dtype=options.Dtype(given.dtype), scheduler=given.scheduler)
    loaded = loading.load(given.model)
    load_adapters(loaded, list(given.adapters.items()))
    return engine_for_model(
        loaded,
        given.name,
        loading,
        options.Image(steps=given.steps, guidance=given.guidance),
        ScheduleOptions(gate_step=given.gate_step),
        engine,
        backend=given.backend,
        precision=options.Precision(given.precision),
        with_loras=False,  # a replica prepares them when they are first asked for
    )
