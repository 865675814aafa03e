"""`tgate-compile serve`: an HTTP server for a model or a bundle, with OpenAI's images API."""

from __future__ import annotations

import importlib.util
import logging
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tgate_compile._cli import options
from tgate_compile._cli.console import ERR
from tgate_compile._cli.settings import ScheduleOptions
from tgate_compile._errors import BackendName, ConfigurationError, check_installed, first_line

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tgate_compile._cli.loading import Loaded
    from tgate_compile.serve import Engine
    from tgate_compile.serve.jobs import ServedModel

logger = logging.getLogger(__name__)

MSG_BUNDLE_ALONE = "--bundle contains a model with all settings. Leave out {given}, or leave out --bundle."
MSG_NOT_BOUND = "The server cannot listen on {host}, port {port}: {reason}. Choose another --host or --port."
MSG_BOTH_SIDES = "--height and --width belong together: add the other one."

SERVER, LIMITS = "Server", "Limits of requests"

#: The environment variable with the API key. On the command line, other users could read the key.
API_KEY_VARIABLE = "TGATE_COMPILE_API_KEY"


class Policy(str, Enum):
    """What to do with a request for images of a size that was not prepared."""

    capture = "capture"
    background = "background"
    background_plain = "background-plain"
    plain = "plain"
    refuse = "refuse"


class LogLevel(str, Enum):
    """The lowest level of log messages to write."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def parse_size(text: object) -> tuple[int, int]:
    """Parse a size such as `512x512` as (width, height)."""
    sides = str(text).split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise typer.BadParameter(f"expected width x height in pixels (512x512), got {str(text)!r}.")
    width, height = map(int, sides)
    options.check_size(width)
    options.check_size(height)
    return width, height


def parse_adapter(text: object) -> tuple[str, str]:
    """Parse a LoRA with a name, such as `sketch=sketch.safetensors`, as (name, source)."""
    name, _, source = str(text).partition("=")
    if not name.isidentifier() or not source:
        raise typer.BadParameter(f"expected NAME=FILE, NAME=FOLDER or NAME=HUB-ID, got {str(text)!r}.")
    return name, source


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the engine. A command's argument that is annotated with this class becomes these options."""

    warm_up_size: Annotated[
        list[Any] | None,
        typer.Option(
            "--warm-up-size",
            parser=parse_size,
            metavar="WxH",
            help="Image size to prepare before the server is ready; repeatable.",
            show_default="the model's",
            rich_help_panel=SERVER,
        ),
    ] = None
    new_sizes: Annotated[
        Policy,
        typer.Option(
            "--new-sizes",
            metavar="NAME",
            help="For other sizes: capture (all requests wait), background (requests of this size wait), "
            "background-plain (they run without T-GATE meanwhile), plain (without T-GATE) or refuse.",
            rich_help_panel=SERVER,
        ),
    ] = Policy.capture
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads per operator.",
            show_default="all cores; 1 for an embedded model",
            rich_help_panel=SERVER,
        ),
    ] = None
    max_batch: Annotated[int, typer.Option(min=1, help="Images per batch.", rich_help_panel=SERVER)] = 8
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Images that may wait; further requests get 429.", rich_help_panel=SERVER)
    ] = 64
    memory: Annotated[
        float | None,
        typer.Option(
            "--cache-memory",
            min=0.001,
            help="Gigabytes for the caches of all images in progress.",
            show_default="no limit",
            rich_help_panel=SERVER,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Seconds for an image, waiting included.", show_default="no limit", rich_help_panel=SERVER
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return the options that engines for models and for bundles have in common, as their arguments."""
        return {"max_batch": self.max_batch, "max_waiting": self.max_waiting, "timeout": self.timeout}

    def for_models(self) -> dict[str, Any]:
        """Return the other options, as arguments of an engine for a model."""
        memory = None if self.memory is None else round(self.memory * 1e9)
        return {"memory": memory, "new_sizes": self.new_sizes.value}


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits of requests. A command's argument that is annotated with this class becomes these options."""

    max_images: Annotated[int, typer.Option(min=1, help="Maximum number of images.", rich_help_panel=LIMITS)] = 8
    max_steps: Annotated[int, typer.Option(min=1, help="Maximum number of steps.", rich_help_panel=LIMITS)] = 200
    max_side: Annotated[int, typer.Option(min=8, help="Maximum width and height.", rich_help_panel=LIMITS)] = 2048
    max_body: Annotated[int, typer.Option(min=100, help="Maximum body in bytes.", rich_help_panel=LIMITS)] = 65536


def serve(
    model: options.Model = None,
    *,
    loading: options.Loading,
    adapter: Annotated[
        list[Any] | None,
        typer.Option(
            "--adapter",
            parser=parse_adapter,
            metavar="NAME=LORA",
            help="LoRA weights that requests may choose by this name; repeatable. Needs peft.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="A bundle written by `export --components all`, instead of --model.", rich_help_panel=options.MODEL
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The model's name for clients.", show_default="from --model", rich_help_panel=options.MODEL),
    ] = None,
    image: options.Image,
    schedule: ScheduleOptions,
    backend: options.BackendForOne = None,
    precision: options.PrecisionOption = options.OWN,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.", rich_help_panel=SERVER)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_VARIABLE,
            help=f"API key that requests must send. Prefer the environment variable {API_KEY_VARIABLE}.",
            show_default="none",
            rich_help_panel=SERVER,
        ),
    ] = None,
    engine: EngineOptions,
    limits: LimitOptions,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that requests get to finish at shutdown.", rich_help_panel=SERVER)
    ] = 30,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", metavar="NAME", help="debug, info, warning or error.")
    ] = LogLevel.info,
) -> None:
    """Serve a model or a bundle over HTTP with OpenAI's images API, batching the requests of many clients."""
    check_installed("fastapi", "uvicorn", "prometheus_client", extra="serve", what="serve")
    of_model = {"model": model, **_changed(loading), "adapter": adapter, **_changed(image), **schedule.given}
    of_model |= {"schedule": schedule.file, "backend": backend, "cache_memory": engine.memory}
    given = [f"--{option.replace('_', '-')}" for option, value in of_model.items() if value is not None]
    if bundle is not None and given:
        raise ConfigurationError(MSG_BUNDLE_ALONE.format(given=" and ".join(given)))
    if (image.height is None) != (image.width is None):
        raise ConfigurationError(MSG_BOTH_SIDES)
    with _bound(host, port) as listener:  # before anything is loaded, in case the port is taken
        if bundle is not None:
            started, served, multiple = engine_for_bundle(bundle, name, engine)
        else:
            check_installed("torch", "diffusers", "transformers", extra="cli", what="serve without --bundle")
            backend_name = None if backend is None else options.check_backend(backend)
            if adapter:
                from tgate_compile._cli.loading import check_peft

                check_peft()
            loaded = loading.load(model)
            _limit_threads(engine.threads or (1 if loaded.is_embedded else None))
            load_adapters(loaded, adapter or [])
            started, served, multiple = engine_for_model(
                loaded, name, loading, image, schedule, engine, backend=backend_name, precision=precision
            )
        from tgate_compile.serve.schemas import Limits
        from tgate_compile.serve.server import create_app

        sizes = {"side": limits.max_side, "multiple": multiple}
        limited = Limits(body=limits.max_body, images=limits.max_images, steps=limits.max_steps, **sizes)
        with started:
            app = create_app(started, model=served, api_key=api_key, limits=limited, drain=float(drain))
            _run(app, listener, served.name, drain=drain, log_level=log_level)


def _limit_threads(threads: int | None) -> None:
    """Let PyTorch, and the runtimes that follow it, compute with this many threads; None: the default."""
    if threads is not None:
        import torch

        # The operators of small models are so short that threads spend their time waiting for each other, and for those
        # that run the pipelines' code.
        torch.set_num_threads(threads)


def engine_for_bundle(bundle: Path, name: str | None, engine: EngineOptions) -> tuple[Engine, ServedModel, int]:
    """Return an engine for a bundle, its model, and the number that image sides must be multiples of."""
    check_installed("pydantic", "onnxruntime", "tokenizers", extra="runtime", what="serve --bundle")
    from tgate_compile.bundle.read_manifest import read_manifest
    from tgate_compile.serve import Engine
    from tgate_compile.serve.jobs import ServedModel

    components = read_manifest(bundle, hashes=False).components
    served = ServedModel(
        name=name or bundle.resolve().name,
        steps=None if components is None else components.num_inference_steps,
        guidance=None if components is None else components.guidance_scale,
        size=None if components is None else (components.width, components.height),
        is_bundle=True,
    )
    with ERR.status("Opening the bundle"):
        options = {} if engine.threads is None else {"threads": engine.threads}
        started = Engine.from_bundle(bundle, warm_up=_warm_up(served, engine), **engine.arguments(), **options)
    return started, served, 8


def engine_for_model(
    loaded: Loaded,
    name: str | None,
    loading: options.Loading,
    image: options.Image,
    schedule: ScheduleOptions,
    engine: EngineOptions,
    *,
    backend: BackendName | None,
    precision: options.Precision,
    with_loras: bool = True,
) -> tuple[Engine, ServedModel, int]:
    """Return an engine for a loaded model, the model, and the number that image sides must be multiples of.

    Without `with_loras`, no graphs are prepared for its LoRA adapters.
    """
    import math

    import tgate_compile
    from tgate_compile._cli.settings import chosen_for
    from tgate_compile.serve import Engine
    from tgate_compile.serve.jobs import ServedModel

    settings, chosen = chosen_for(loaded, loading, image, schedule, shown=True)
    # The embedded models generate an image in less time than another runtime needs to compile them.
    default: BackendName = "eager" if loaded.is_embedded else "auto"
    tgate_compile.optimize(loaded.pipe, schedule=chosen, backend=backend or default, precision=precision.value)
    pipe: Any = loaded.pipe
    served = ServedModel(
        name=name or _name_of(loaded.source),
        steps=settings.steps,
        guidance=settings.guidance,
        size=None if image.width is None or image.height is None else (image.width, image.height),
        call=loaded.call,
        loras=tuple(_adapters(pipe)),
    )
    with ERR.status("Preparing the graphs"):
        calls = _warm_up(served, engine, loras=served.loras if with_loras else ())
        started = Engine(pipe, warm_up=calls, **engine.arguments(), **engine.for_models())
    patch = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "patch_size", None)
    scale = getattr(pipe, "vae_scale_factor", 8)
    return started, served, math.lcm(8, scale * patch if isinstance(patch, int) else scale)


def _warm_up(served: ServedModel, engine: EngineOptions, loras: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the calls to prepare for: each size, without and with each of `loras`."""
    from tgate_compile.serve.schemas import ImageRequest

    request = ImageRequest(prompt="")
    calls = [served.call_for(request, size, seed=0) for size in engine.warm_up_size or [None]]
    return [*calls, *({**call, "lora": {name: 1.0}} for name in loras for call in calls)]


def _name_of(source: str) -> str:
    """Return a name for clients. It does not reveal the path of a folder."""
    embedded = options.embedded_name(None if source == "embedded" else source)
    return embedded or (Path(source).resolve().name if Path(source).exists() else source)


def load_adapters(loaded: Loaded, adapters: list[tuple[str, str]]) -> None:
    """Load LoRA weights under their names. None is active unless a request chooses it."""
    if not adapters:
        return
    from tgate_compile._cli.loading import load_lora

    pipe: Any = loaded.pipe
    before = _adapters(pipe)
    for adapter, source in adapters:
        load_lora(pipe, source, name=adapter)
    if before:
        pipe.set_adapters(before)
    else:
        pipe.disable_lora()


def _adapters(pipe: Any) -> list[str]:
    """Return the names of the LoRA adapters that are loaded."""
    if importlib.util.find_spec("peft") is None or not hasattr(pipe, "get_list_adapters"):
        return []
    return sorted({name for names in pipe.get_list_adapters().values() for name in names})


def _changed(given: options.Loading | options.Image) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    values = ((field, getattr(given, field.name)) for field in fields(given))
    return {field.name: value for field, value in values if value != field.default}


def _bound(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet, so that clients are refused until the server is ready."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            undo.pop_all()
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ConfigurationError(MSG_NOT_BOUND.format(host=host, port=port, reason=reason)) from error
    return listener


def _run(app: FastAPI, listener: socket.socket, name: str, *, drain: int, log_level: LogLevel) -> None:
    import uvicorn

    from tgate_compile.serve.observability import log_config

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    started = {"model": name, "api": f"http://{shown}:{port}/v1", "page": f"http://{shown}:{port}/"}
    config = uvicorn.Config(
        app,
        log_config=log_config(log_level.value),
        access_log=False,
        timeout_graceful_shutdown=drain,
        server_header=False,
    )
    logger.info("serving", extra={"fields": started})
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
        uvicorn.Server(config).run(sockets=[listener])
