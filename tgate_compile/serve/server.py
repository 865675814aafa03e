"""The HTTP server: OpenAI's images API over an engine, with health, metrics and a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import logging
import math
import random
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tgate_compile import __version__
from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.methods.method import GRAPH_NAMES
from tgate_compile.serve.engine import Engine, EngineBusyError, EngineClosedError, Progress, Ticket
from tgate_compile.serve.front import RECORD, Front, Record, internal_error, unless_gone
from tgate_compile.serve.observability import Metrics
from tgate_compile.serve.schemas import (
    ApiError,
    ErrorResponse,
    Health,
    ImageData,
    ImageRequest,
    ImagesResponse,
    Json,
    Limits,
    ModelCard,
    ModelDefaults,
    ModelList,
    RunningRequest,
    Status,
    invalid_request,
    request_model,
)

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: Seconds after which a silent stream sends a comment, before proxies take the connection for dead.
KEEP_ALIVE = 15.0
#: Paths that need no API key: they tell nothing about requests.
_OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/openapi.json"})
_LARGEST_RANDOM_SEED = 2**31 - 1
