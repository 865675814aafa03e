"""What a pipeline's call changes, so that it can be repeated from the beginning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tgate_compile._loop import is_callback
from tgate_compile._purity import remember


@contextmanager
def rewindable(
    arguments: Mapping[str, Any], denoisers: Sequence[torch.nn.Module], scheduler: Any = None, *, keep: bool
) -> Iterator[Callable[[], bool]]:
    """Give a function that puts things back to what they are now; it does nothing unless `keep`.

    These are torch's random number generators and those among a call's `arguments`, and the scheduler; and, if there
    are callbacks among the arguments, the Python state of the `denoisers`, on which they may put hooks. It returns
    whether the call can be repeated: not if tensors among the arguments have been changed meanwhile.
    """
    if not keep:
        yield lambda: False
        return
    leaves = pytree.tree_leaves(list(arguments.values()))
    tensors = [leaf for leaf in leaves if torch.is_tensor(leaf) and not leaf.is_inference()]
    versions = [tensor._version for tensor in tensors]
    attributes = {name: copy.copy(value) for name, value in getattr(scheduler, "__dict__", {}).items()}
    generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
    own = [(generator, generator.get_state()) for generator in generators]
    calls_back = any(is_callback(name, value) for name, value in arguments.items())
    restores = [remember(denoiser) for denoiser in denoisers] if calls_back else []
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def rewind() -> bool:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in own:
            generator.set_state(state)
        for restore in restores:
            restore()
        if attributes:
            vars(scheduler).clear()
            vars(scheduler).update({name: copy.copy(value) for name, value in attributes.items()})
        return [tensor._version for tensor in tensors] == versions

    yield rewind
