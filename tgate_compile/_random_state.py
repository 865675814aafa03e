"""The state of random number generators, so that a pipeline's call can be repeated from the beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree


@contextmanager
def random_state(arguments: Iterable[Any], *, keep: bool) -> Iterator[Callable[[], None]]:
    """Give a function that sets torch's generators, and those among `arguments`, back to what they are now.

    It does nothing unless `keep`.
    """
    if not keep:
        yield lambda: None
        return
    generators = [leaf for leaf in pytree.tree_leaves(list(arguments)) if isinstance(leaf, torch.Generator)]
    own = [(generator, generator.get_state()) for generator in generators]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in own:
            generator.set_state(state)

    yield rewind
