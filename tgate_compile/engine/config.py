"""The validated configuration of one `optimize` call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from tgate_compile._errors import ConfigurationError
from tgate_compile.engine.choice import check_precision, precision_dtype
from tgate_compile.engine.families import Family
from tgate_compile.methods.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: A pipeline, or a similar object. `Any` is needed because mypy resolves the pipelines that diffusers exports to the
#: placeholders in `diffusers.utils.dummy_torch_and_transformers_objects`; these do not derive from DiffusionPipeline.
AnyPipeline: TypeAlias = "DiffusionPipeline | Any"

#: Default prompts for measurements on a few generations.
AUTO_PROMPTS = (
    "a red fox in the snow",
    "a portrait of an old fisherman",
    "a street at night in the rain",
    "a bowl of fruit on a wooden table",
)


#: The dtypes that caches can be stored in. fp8 is used without a scale, since attention outputs are of order one.
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


#: The backends whose graphs are split by binding time unless the user decides: there it was measured not to be slower.
SPLIT_BY_DEFAULT = frozenset({"eager"})


@dataclass(frozen=True)
class Config:
    """The configuration of an optimized denoiser.

    Attributes:
        schedule: the schedule, which assigns a phase to each step.
        family: the properties of the pipeline's class.
        sites: shell-style patterns (`up_blocks.*`) of the names of the attentions to cache; None means all.
        cache_dtype: the dtype of the caches; None means the model's own.
        backend: the name of a backend, or `auto`.
        precision: the dtype that the graphs compute in; `auto` means the pipeline's own.
        backend_options: options of the backend's compiler, such as Inductor's configuration.
        graph_memory: the estimated number of bytes that the graphs may take; None means a quarter of the machine's
            memory.
        binding_times: whether to split the graphs by binding time; None means where it pays.
        offload_prelude: whether to move the weights of preludes and tables off the device while they are not needed.
    """

    schedule: Schedule
    family: Family = Family()  # noqa: RUF009 (it is frozen)
    sites: Sequence[str] | None = None
    cache_dtype: torch.dtype | None = None
    backend: str = "auto"
    precision: str = "auto"
    backend_options: Mapping[str, object] = field(default_factory=dict)
    graph_memory: int | None = None
    binding_times: bool | None = None
    offload_prelude: bool = False

    @property
    def cached_in(self) -> torch.dtype | None:
        """The dtype of the caches: that of the computation if it is a shorter one; None means the model's own."""
        chosen = precision_dtype(self.precision)
        shorter = chosen is not None and chosen.itemsize < torch.float32.itemsize
        return chosen if self.cache_dtype is None and shorter else self.cache_dtype

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.sites is not None:
            given = (self.sites,) if isinstance(self.sites, str) else self.sites
            if not (isinstance(given, Sequence) and given and all(isinstance(pattern, str) for pattern in given)):
                raise ConfigurationError(
                    'sites must be patterns of module names, such as ["up_blocks.*"], or None for all, but got '
                    f"{self.sites!r}."
                )
            object.__setattr__(self, "sites", tuple(given))
        memory = self.graph_memory
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0):
            raise ConfigurationError(
                "graph_memory must be a positive number of bytes, or None for a quarter of the machine's memory, "
                f"but got {memory!r}."
            )
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            expected = ", ".join(map(str, CACHE_DTYPES))
            raise ConfigurationError(
                f"cache_dtype must be one of {expected}, or None for the model's own, but got {self.cache_dtype!r}."
            )
        if self.binding_times not in (True, False, None) or self.offload_prelude not in (True, False):
            raise ConfigurationError(
                "binding_times must be True, False or None, and offload_prelude True or False, but got "
                f"{self.binding_times!r} and {self.offload_prelude!r}."
            )
        if self.offload_prelude and self.binding_times is False:
            raise ConfigurationError(
                "offload_prelude=True moves the weights of the prelude, which binding_times=False switches off. Leave "
                "one of them out."
            )
        if not isinstance(self.backend_options, Mapping):
            raise ConfigurationError(
                f"backend_options must be a mapping of option names to values, but got {self.backend_options!r}."
            )

    def splits(self, backend: str, *, constant_text: bool = False) -> bool:
        """Return whether to split graphs that `backend` runs by binding time.

        By default they are where it was measured to pay, and if the text's tokens are the same in all steps
        (`constant_text`): then they are computed once. The parts before the step compute in the pipeline's dtype, so
        they are not split off by default if another precision was chosen.
        """
        if self.binding_times is None:
            pays = backend in SPLIT_BY_DEFAULT or constant_text
            return self.offload_prelude or (pays and self.precision == "auto")
        return self.binding_times
