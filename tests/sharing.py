"""Share the graphs that `torch.export` makes between the tests of one process.

Most tests build the same few tiny models, each of which takes up to a second to trace. A graph depends only on
`fingerprint` and the call's key, as the library itself assumes from call to call: a second model for
which both are equal reuses the first one's graph, with its own weights. Everything after the tracing is repeated
in each test: finding the sites, the passes, the verification and the backends.

Modules that test the capture, or when it becomes stale, do not share graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram

from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import _functional
from tgate_compile.engine.weights import fingerprint, live_tensors

#: Dependencies -> the program and its model, which is kept since the key contains ids of the model's parts.
_PROGRAMS: dict[Hashable, tuple[ExportedProgram, torch.nn.Module]] = {}


@contextmanager
def shared_programs() -> Iterator[None]:
    """Make `torch.export.export` trace equal models only once within the block."""
    export = torch.export.export

    def shared(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Any = None, **options: Any) -> ExportedProgram:
        if options != {"strict": False, "dynamic_shapes": None}:
            return export(module, args, kwargs, **options)
        key = _key(module, args, kwargs)
        if key not in _PROGRAMS:
            # `capture` would do this to each copy, which would trace it again.
            _PROGRAMS[key] = _functional(export(module, args, kwargs, **options)), module
        program, _ = _PROGRAMS[key]
        return _with_tensors_of(module, program)

    torch.export.export = shared
    try:
        yield
    finally:
        torch.export.export = export


def _key(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    forward: Callable[..., Any] = module.forward
    call = Call.of(args, kwargs)
    strides = tuple(leaf.stride() for leaf in call.leaves if torch.is_tensor(leaf))
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
    return type(module), getattr(forward, "__func__", forward), fingerprint(module), call.key, strides, modes


def _with_tensors_of(module: torch.nn.Module, program: ExportedProgram) -> ExportedProgram:
    """Return a separate program for `module`; its graph, which is never changed in place, is shared."""
    live = live_tensors(module)
    result = copy.copy(program)
    result._state_dict = {name: live[name] for name in program.state_dict}
    result._constants = {name: live.get(name, value) for name, value in program.constants.items()}
    return result
