"""Serve many requests at a time with one pipeline: their denoiser calls are batched, step by step.

engine = tgate_compile.serve.Engine(pipe, warm_up=[{"prompt": "a red fox", "height": 512, "width": 512}])
image = engine.submit({"prompt": "a blue bird", "num_inference_steps": 25}).result().images[0]
"""

from __future__ import annotations

from tgate_compile.serve.engine import Engine as Engine
from tgate_compile.serve.requests import EngineBusyError as EngineBusyError
from tgate_compile.serve.requests import EngineClosedError as EngineClosedError
from tgate_compile.serve.requests import EngineCrashedError as EngineCrashedError
from tgate_compile.serve.requests import EngineStats as EngineStats
from tgate_compile.serve.requests import EngineTimeoutError as EngineTimeoutError
from tgate_compile.serve.requests import Progress as Progress
from tgate_compile.serve.requests import Running as Running
from tgate_compile.serve.requests import Ticket as Ticket
