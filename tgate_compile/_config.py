"""The choices of one `optimize` call, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tgate_compile._errors import ConfigurationError
from tgate_compile._schedule import Schedule


@dataclass(frozen=True)
class Config:
    """What `optimize` was asked for.

    Attributes:
        schedule: from step to phase.
        backend: the name of a backend, or `auto`.
        backend_options: options for the backend's compiler, e.g. Inductor's configuration.
    """

    schedule: Schedule
    backend: str = "inductor"
    backend_options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.backend_options, Mapping):
            raise ConfigurationError(
                f"backend_options must be a mapping of option names to values, but got {self.backend_options!r}."
            )
