"""Which part of the work is this process's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tgate_compile._errors import ConfigurationError

Item = TypeVar("Item")

MSG_RANK = (
    "The environment says RANK={rank} and WORLD_SIZE={world}: expected whole numbers with 0 <= RANK < WORLD_SIZE."
)


@dataclass(frozen=True)
class Share:
    """One of several processes that share a results folder. They do not talk to each other.

    Attributes:
        rank: which one, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """As torchrun, `accelerate launch` and others say it, by RANK and WORLD_SIZE; alone if they say nothing.

        Raises:
            ConfigurationError: they say nonsense.
        """
        rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ConfigurationError(MSG_RANK.format(rank=rank, world=world))
        return cls(int(rank), int(world))

    def of(self, items: Sequence[Item]) -> list[Item]:
        """This process's items: every `world`-th, so that nobody waits long for anybody."""
        return list(items[self.rank :: self.world])
