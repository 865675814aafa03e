"""Logs as JSON lines, and metrics for Prometheus."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tgate_compile.serve.engine import Engine

#: The id of the request that the current task serves; log lines carry it.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)

#: Seconds, from a tiny model's image to a large one's on a CPU.
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


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
    """The metrics of one server, in a registry of its own, so that several servers can run in one process."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(engine))
        self._requests = Counter(
            "tgate_http_requests",
            "HTTP requests that were answered; 499 means that the client went away first.",
            ("path", "status"),
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "tgate_http_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_image_seconds = Histogram(
            "tgate_first_image_seconds",
            "Seconds from a request to its first image or preview.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._images = Counter("tgate_images", "Images that were sent, without previews.", registry=self._registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def first_image(self, seconds: float) -> None:
        """Note how long the first image or preview of a request took."""
        self._first_image_seconds.observe(seconds)

    def sent_image(self) -> None:
        """Count an image."""
        self._images.inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
