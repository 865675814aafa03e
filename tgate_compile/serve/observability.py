"""Logs as JSON lines, and metrics for Prometheus."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter as Counts
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from tgate_compile.serve.engine import Engine
from tgate_compile.serve.requests import EngineStats

#: The id of the request that the current task serves; log lines carry it.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)

#: Bounds of the histograms in seconds, from an image of a tiny model to one of a large model on a CPU.
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
#: The label of everything that a bundle computes outside its steps.
_OTHER = "none"
#: The weight of the last image in the moving average of the time that images take.
_SHARE_OF_LAST = 0.1


class JsonFormatter(logging.Formatter):
    """Write each log record as one line of JSON, with the id of the request that it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_config(level: str = "info") -> dict[str, Any]:
    """Return a configuration for `logging.config.dictConfig`: this library's and uvicorn's logs as JSON on stderr."""
    # uvicorn's own access log would repeat ours without the request's id.
    loggers = {name: {"level": level.upper()} for name in ("tgate_compile", "uvicorn", "uvicorn.error")}
    handled: dict[str, Any] = {
        name: {**logger, "handlers": ["stderr"], "propagate": False} for name, logger in loggers.items()
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": handled,
    }


class Metrics:
    """The metrics of one server, in a separate registry, so that several servers can run in one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineMetrics(engine))
        self._requests = Counter(
            "tgate_http_requests",
            "HTTP requests; the status 499 means that the client closed its connection first.",
            ("path", "status"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "tgate_http_request_seconds",
            "Seconds from a request to the end of its response.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._first_image_seconds = Histogram(
            "tgate_first_image_seconds",
            "Seconds from a request to its first image or preview.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._images = Counter("tgate_images", "Images that were sent, without previews.", registry=self.registry)
        self._typical_seconds = 0.0

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def first_image(self, seconds: float) -> None:
        """Note how long the first image or preview of a request took."""
        self._first_image_seconds.observe(seconds)

    def sent_image(self, seconds: float) -> None:
        """Count an image that was sent `seconds` after its request arrived."""
        self._images.inc()
        self._typical_seconds += _SHARE_OF_LAST * (seconds - self._typical_seconds)

    @property
    def typical_seconds(self) -> float:
        """The time that recent images took, waiting included."""
        return self._typical_seconds

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineMetrics(Collector):
    """The engine's state and totals, read when Prometheus asks for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Return nothing, so that registering this collector does not read the engine's state."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        stats = self._engine.stats()
        yield GaugeMetricFamily("tgate_ready", "1 if the engine accepts requests.", float(self._engine.ready))
        yield GaugeMetricFamily("tgate_waiting", "Images that are waiting.", float(stats.waiting))
        running = GaugeMetricFamily(
            "tgate_running", "Images in progress, by the letter of their phase.", labels=["phase"]
        )
        for phase, count in Counts(each.phase or _OTHER for each in stats.running).items():
            running.add_metric([phase], float(count))
        yield running
        yield GaugeMetricFamily(
            "tgate_cache_bytes", "Memory reserved for the caches of images in progress.", float(stats.cache_bytes)
        )
        yield GaugeMetricFamily(
            "tgate_one_at_a_time",
            "Reasons why requests are not batched in some graphs.",
            float(len(stats.one_at_a_time)),
        )
        yield CounterMetricFamily("tgate_captures", "Graphs that were captured or compiled.", float(stats.captures))
        yield CounterMetricFamily("tgate_engine_completed", "Images that were completed.", float(stats.completed))
        yield CounterMetricFamily("tgate_engine_cancelled", "Images that were cancelled.", float(stats.cancelled))
        errors = CounterMetricFamily(
            "tgate_engine_errors", "Images that failed, by the error's class.", labels=["error"]
        )
        for name, count in stats.errors.items():
            errors.add_metric([name], float(count))
        yield errors
        yield from _batches(stats)


def _batches(stats: EngineStats) -> Iterator[Metric]:
    """Yield how large the batches of each graph and component were, and how long those of graphs took."""
    sizes = HistogramMetricFamily("tgate_batch_images", "Images per batch, by the phase's letter.", labels=["phase"])
    seconds = SummaryMetricFamily("tgate_step_seconds", "Seconds per batch, by the phase's letter.", labels=["phase"])
    for phase, batches in stats.batches.items():
        sizes.add_metric([phase or _OTHER], *_histogram(batches))
        seconds.add_metric([phase or _OTHER], batches.total(), stats.seconds.get(phase, 0.0))
    yield sizes
    yield seconds
    rows = HistogramMetricFamily(
        "tgate_component_batch_rows", "Prompts or images per batch of a text encoder or VAE.", labels=["component"]
    )
    for component, batches in stats.components.items():
        rows.add_metric([component], *_histogram(batches))
    yield rows


def _histogram(batches: Counts[int]) -> tuple[list[tuple[str, int]], int]:
    """Return the buckets of a histogram of the sizes of batches, and the sum of the sizes."""
    buckets = [(f"{bound:.1f}", sum(n for size, n in batches.items() if size <= bound)) for bound in _BATCH_SIZES]
    return [*buckets, ("+Inf", batches.total())], sum(size * n for size, n in batches.items())
