"""What a pipeline's call uses up, so that it can be repeated from the beginning: random numbers, scheduler state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree


@contextmanager
def random_state(arguments: Iterable[Any], scheduler: Any = None, *, keep: bool) -> Iterator[Callable[[], bool]]:
    """Give a function that sets torch's generators, those among `arguments`, and the scheduler back to what they are.

    It returns whether the call can be repeated: not if tensors among the arguments have been changed meanwhile. It does
    nothing unless `keep`.
    """
    if not keep:
        yield lambda: False
        return
    arguments = list(arguments)
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if torch.is_tensor(leaf) and not leaf.is_inference()]
    versions = [tensor._version for tensor in tensors]
    attributes = {name: copy.copy(value) for name, value in getattr(scheduler, "__dict__", {}).items()}
    generators = [leaf for leaf in pytree.tree_leaves(list(arguments)) if isinstance(leaf, torch.Generator)]
    own = [(generator, generator.get_state()) for generator in generators]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def rewind() -> bool:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in own:
            generator.set_state(state)
        if attributes:
            vars(scheduler).clear()
            vars(scheduler).update({name: copy.copy(value) for name, value in attributes.items()})
        return [tensor._version for tensor in tensors] == versions

    yield rewind
