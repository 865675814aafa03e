"""Compiled variants, which a generation runs, the values it keeps, and the interface of the stores that provide them.

A variant that is split by binding time (`passes/binding_times.py`) runs in up to three parts. Its prelude and its table
run ATen operators one by one, on the shapes of the unsplit graph; `EarlyValues` keeps their values as long as possible.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from tgate_compile._errors import ConfigurationError
from tgate_compile.engine.backends import Divided, EarlyPart, Parts, Runner
from tgate_compile.engine.call import Call
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.binding_times import SplitVariant
from tgate_compile.passes.graphs import Binding, Captured, Emission, Variant

logger = logging.getLogger(__name__)

#: Cached values by the kind and name of their sites.
CachedValues = Mapping[tuple[Kind, str], torch.Tensor]


class Runnable(Protocol):
    """The graph of one phase, ready to run on inputs of one shape."""

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values the graph returns for later steps, in order."""
        ...

    def run(
        self, call: Call, caches: CachedValues, early: EarlyValues
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the denoiser's flat outputs for `call`, and the values of `emitted`; `early` keeps other values."""
        ...

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """Return the denoiser's return value, assembled from its flat outputs."""
        ...


class Store(Protocol):
    """Provides a generation with graphs; `image_rows` is what `ReferenceRows` has learnt."""

    denoiser: torch.nn.Module
    image_rows: dict[Hashable, tuple[int, int, int] | None]

    @property
    def folder(self) -> str | None:
        """The bundle that the graphs are loaded from; None if they are captured in this process."""
        ...

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names of the sites that can be cached, if already known."""
        ...

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants captured in this process, each with the capture that it was derived from."""
        ...

    def refresh(self, *, begins: bool = True) -> None:
        """Check the denoiser for changes, at the start of a generation or, if not `begins`, in the middle of one."""
        ...

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """Return what the graph of `phase` emits for inputs like those of `call`, without compiling it."""
        ...

    def get(self, phase: Phase, call: Call, caches: CachedValues, forward: Callable[..., Any]) -> Runnable:
        """Return the graph of `phase` for inputs like those of `call`; `forward` is the denoiser's original one."""
        ...


@dataclass(frozen=True)
class CompiledVariant:
    """A variant that is ready to run on inputs of one shape.

    Attributes:
        variant: the graph.
        captured: the capture that it was derived from.
        runner: runs `step`.
        weights: the weights of `variant`.
        split: the parts of the graph by binding time; None if it is not split.
        weights_of_parts: the weights of each of `parts`, if it is split.
    """

    variant: Variant
    captured: Captured
    runner: Runner
    weights: Sequence[torch.Tensor]
    split: SplitVariant | None = None
    weights_of_parts: tuple[Sequence[torch.Tensor], ...] = ()

    @property
    def early_weights(self) -> tuple[Sequence[torch.Tensor], ...]:
        """The weights of the prelude and the table, if they exist."""
        return self.weights_of_parts[:-1]

    ahead = False  # rows are computed when they are needed

    @property
    def roles(self) -> Mapping[str, Binding]:
        """How often each input changes, by name."""
        return self.captured.roles

    def run_early(self, position: int, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the values of a part before the step."""
        assert self.split is not None
        program, weights = self.split.early[position].program, self.early_weights[position]
        results: Sequence[torch.Tensor] = program.graph_module(*weights, *inputs)
        return results

    @property
    def step_weights(self) -> Sequence[torch.Tensor]:
        """The weights of `step`."""
        return self.weights if self.split is None else self.weights_of_parts[-1]

    @property
    def step(self) -> Variant:
        """The graph that runs in every step: the variant without its prelude and table."""
        return self.variant if self.split is None else self.split.step

    @property
    def parts(self) -> tuple[Variant, ...]:
        """The graphs that run: the step, and the prelude and the table if they exist."""
        return (self.variant,) if self.split is None else self.split.parts

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values the graph returns for later steps, in order."""
        return self.variant.emitted

    def run(
        self, call: Call, caches: CachedValues, early: EarlyValues
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the denoiser's flat outputs for `call`, and the values of `emitted`; `early` keeps other values."""
        outputs = list(self.runner(self.step_weights, self.inputs(call, caches, early)))
        count = self.captured.outputs_of(self.variant.phase)
        return outputs[:count], outputs[count:]

    def inputs(self, call: Call, caches: CachedValues, early: EarlyValues) -> list[torch.Tensor]:
        """Return the inputs of `step` for `call`, in its order."""
        values = {} if self.split is None else early.of(self, _by_name(self.captured, call))
        return inputs_for(self.step, self.captured, call, caches, values)

    def with_weights(self, live: Mapping[str, torch.Tensor] | None) -> CompiledVariant:
        """Return this variant with new lists of weights: the tensors of `live`, or None for the present ones.

        Runners look for changed values in lists that they have not seen.
        """
        if live is None:
            of_parts = tuple(list(weights) for weights in self.weights_of_parts)
            return replace(self, weights=list(self.weights), weights_of_parts=of_parts)
        parts = () if self.split is None else self.split.parts
        of_parts = tuple(tensors_of(part.program, live) for part in parts)
        return replace(self, weights=tensors_of(self.variant.program, live), weights_of_parts=of_parts)

    def without_weights(self) -> CompiledVariant:
        """Return this variant without its weights, which may then be freed."""
        return replace(self, weights=[], weights_of_parts=tuple([] for _ in self.weights_of_parts))

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """Return the denoiser's return value, assembled from its flat outputs."""
        return pytree.tree_unflatten(outputs, self.captured.out_spec)


class Compiler(Protocol):
    """Compiles a variant for weights and inputs like those given (`engine/trust.py`)."""

    def compile(self, variant: Variant, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Runner: ...


def compile_variant(
    variant: Variant,
    captured: Captured,
    split: SplitVariant | None,
    compiler: Compiler,
    live: Mapping[str, torch.Tensor],
    call: Call,
    caches: CachedValues,
) -> CompiledVariant:
    """Return `variant` compiled for inputs like those of `call`, in parts if `split` has any before the step."""
    if split is not None and not split.early:
        split = None

    def not_yet(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        raise AssertionError("the step is not compiled yet")

    compiled = CompiledVariant(variant, captured, not_yet, (), split).with_weights(live)
    with torch.no_grad():
        inputs = compiled.inputs(call, caches, EarlyValues())
    return replace(compiled, runner=compiler.compile(compiled.step, compiled.step_weights, inputs))


def inputs_for(
    variant: Variant,
    captured: Captured,
    call: Call,
    caches: CachedValues,
    early: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Return the inputs of `variant` in its order: tensors of `call` and values of `early`, then the reused values."""
    by_name = {**_by_name(captured, call), **(early or {})}
    reused = [caches[site.kind, site.name] for site in variant.reused]
    return [*(by_name[name] for name in variant.inputs), *reused]


def _by_name(captured: Captured, call: Call) -> dict[str, Any]:
    return dict(zip(captured.input_names, call.leaves, strict=True))


def tensors_of(program: ExportedProgram, live: Mapping[str, torch.Tensor]) -> list[Any]:
    """Return the parameters, buffers and constants that `program` takes before its inputs."""
    specs = program.graph_signature.input_specs
    names = [str(spec.target) for spec in specs if spec.kind is not InputKind.USER_INPUT]
    return [live[name] if name in live else program.constants[name] for name in names]


#: The number of prompts whose values a generation keeps for a graph. A pipeline that evaluates the guidance halves in
#: calls of their own has two.
PROMPTS_KEPT = 4
#: The number of rows that are kept for each of them. Second-order schedulers repeat a timestep within a few calls.
ROWS_KEPT = 4
#: The largest number of elements of a timestep that is compared by value: one for each image, or for each frame.
_FEW = 1024


@dataclass
class _Prompt:
    """The values of one graph for one prompt.

    Attributes:
        inputs: the inputs that depend on the prompt.
        weights: the weights that the values are computed from, and their versions.
        values: the values of the prelude.
        rows: the values of the table, by the timestep.
        last: the timestep of the last row, if its value has not been read from the device.
    """

    inputs: list[Seen]
    weights: list[tuple[torch.Tensor, int | None]]
    values: dict[str, torch.Tensor]
    rows: OrderedDict[Hashable, dict[str, torch.Tensor]] = field(default_factory=OrderedDict)
    last: list[Seen] = field(default_factory=list)


class EarlyValues:
    """The values of preludes and tables that one generation has computed.

    A prelude's values are used as long as the inputs that depend on the prompt are unchanged: the same tensors, not
    changed in place, or others with equal elements. A row of a table is used for calls with the same timestep. All are
    computed again once a weight has been replaced or changed in place.

    Args:
        timesteps: returns the scheduler's timesteps, for which rows are computed in advance if `parking` is given.
        parking: where the weights of preludes and tables go when they are not needed; None leaves them in place.
    """

    def __init__(self, timesteps: Callable[[], Any] | None = None, parking: Parking | None = None) -> None:
        self._timesteps = timesteps
        self._parking = parking
        self._prompts: dict[tuple[int, Hashable], tuple[Parts, list[_Prompt]]] = {}
        self._ready: set[Hashable] = set()
        self._used: dict[int, Divided] = {}
        self.runs = {"prelude": 0, "table": 0}  # how often each has run

    def clear(self) -> None:
        """Free all values, and bring back the weights."""
        self._prompts.clear()
        self._used.clear()
        self.bring_back()

    def bring_back(self) -> None:
        """Bring all weights back to their device, until the next step."""
        if self._parking is not None:
            self._parking.bring_back()

    def prepare(self, key: Hashable) -> None:
        """Bring back the weights if the graph called `key` has not been used yet, since it may have to be captured."""
        if self._parking is not None and key not in self._ready:
            self._parking.bring_back()
            self._ready.add(key)

    def of(self, compiled: Divided, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the values of the prelude and the table of `compiled` for the inputs `given`, by name."""
        split = compiled.split
        assert split is not None
        prompt = self._prompt(compiled, split, given)
        row = {} if split.table is None else self._row(compiled, split.table, prompt, given)
        if self._parking is not None:
            self._park(compiled, split)
        return {**prompt.values, **row}

    def _prompt(self, compiled: Divided, split: Parts, given: Mapping[str, Any]) -> _Prompt:
        """Return the values for the present prompt; run the prelude if there are none."""
        roles = compiled.roles
        names = dict.fromkeys(name for part in split.early for name in part.inputs if name in given)
        inputs = [given[name] for name in names if roles.get(name) == "prompt"]
        # Other inputs of the prelude and the table are only used for their sizes.
        sizes = tuple(given[name].shape for name in names if roles.get(name) not in ("prompt", "timestep"))
        weights = [(tensor, _version(tensor)) for part in compiled.early_weights for tensor in part]
        _, prompts = self._prompts.setdefault((id(split), sizes), (split, []))  # keeps the split, so its id is unique
        for prompt in prompts:
            if _are_same(prompt.weights, weights) and all(map(Seen.equals, prompt.inputs, inputs)):
                return prompt
        values: dict[str, torch.Tensor] = {}
        if split.prelude is not None:
            values = self._run(compiled, 0, given)
            self.runs["prelude"] += 1
        made = _Prompt([_seen_by_value(tensor) for tensor in inputs], weights, values)
        prompts.insert(0, made)
        del prompts[PROMPTS_KEPT:]
        return made

    def _row(
        self, compiled: Divided, table: EarlyPart, prompt: _Prompt, given: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Return the table's row for the present timestep; run the table if there is none."""
        roles = compiled.roles
        times = {name: given[name] for name in table.inputs if roles.get(name) == "timestep"}
        ahead = self._parking is not None or compiled.ahead
        moment = _moment(times.values(), read=ahead)
        if moment is None and not (prompt.last and all(map(Seen.is_same, prompt.last, times.values()))):
            prompt.rows.clear()
            prompt.last = [Seen(tensor) for tensor in times.values()]
        row = prompt.rows.get(moment)
        if row is not None:
            prompt.rows.move_to_end(moment)
            return row

        def run(at: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.runs["table"] += 1
            return self._run(compiled, -1, {**given, **prompt.values, **at})

        row = prompt.rows[moment] = run(times)
        if not ahead:
            while len(prompt.rows) > ROWS_KEPT:
                prompt.rows.popitem(last=False)
        else:
            for later in self._foreseen(times):
                key = _moment(later.values(), read=True)
                if key not in prompt.rows:
                    prompt.rows[key] = run(later)
        return row

    def _run(self, compiled: Divided, position: int, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        assert compiled.split is not None
        part = compiled.split.early[position]
        if self._parking is not None:
            self._parking.bring_back(compiled.early_weights[position])
        results = compiled.run_early(position, [given[name] for name in part.inputs])
        return dict(zip(part.outputs, results, strict=True))

    def _foreseen(self, times: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the timesteps of later calls, if `times` is the scheduler's timestep, or a thousandth of it."""
        scheduled = None if self._timesteps is None else self._timesteps()
        if scheduled is None or len(times) != 1:
            return
        ((name, now),) = times.items()
        scheduled = torch.as_tensor(scheduled).to(now.device)
        same = [each.expand(now.shape).to(now.dtype) for each in scheduled]
        for inputs in (same, [each / 1000 for each in same]):
            if any(torch.equal(each, now) for each in inputs):
                yield from ({name: each} for each in inputs)
                return

    def _park(self, compiled: Divided, split: Parts) -> None:
        """Move away the weights of all preludes and tables used so far, except for those that `compiled` needs."""
        assert self._parking is not None
        self._used[id(split)] = compiled
        foreseen = split.table is None or any(len(prompt.rows) > 1 for prompt in self._prompts_of(split))
        needed = [*compiled.step_weights, *(() if foreseen else compiled.early_weights[-1])]
        self._parking.bring_back(needed)
        for each in self._used.values():
            for weights in each.early_weights:
                self._parking.park(weights, keep=needed)

    def _prompts_of(self, split: Parts) -> Iterator[_Prompt]:
        for (number, _), (_, prompts) in self._prompts.items():
            if number == id(split):
                yield from prompts


def _are_same(
    weights: Sequence[tuple[torch.Tensor, int | None]], others: Sequence[tuple[torch.Tensor, int | None]]
) -> bool:
    """Return whether two lists have the same tensors, not changed in place in between."""
    return all(
        mine is other and version is not None and version == now
        for (mine, version), (other, now) in zip(weights, others, strict=True)
    )


def _moment(times: Iterable[torch.Tensor], *, read: bool) -> Hashable:
    """Return the values of timesteps; None if they would have to be read from a device, unless `read` is set."""
    tensors = list(times)
    if any(tensor.numel() > _FEW or (tensor.device.type != "cpu" and not read) for tensor in tensors):
        return None
    return tuple(repr(tensor.tolist()) for tensor in tensors)


class Seen:
    """A tensor as it was when it was used, to find out whether a later one is the same or has equal elements."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._version = _version(tensor)

    def is_same(self, other: torch.Tensor) -> bool:
        """Return whether `other` is the same part of the same memory, not changed in place since then."""
        mine = self._tensor
        return (
            self._version is not None
            and self._version == _version(mine)
            and mine.data_ptr() == other.data_ptr()
            and (mine.shape, mine.stride(), mine.dtype, mine.device)
            == (other.shape, other.stride(), other.dtype, other.device)
        )

    def equals(self, other: torch.Tensor) -> bool:
        """Return whether `other` is the same tensor, or has equal elements."""
        mine = self._tensor
        return self.is_same(other) or (
            self._version == _version(mine)
            and (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
            and torch.equal(mine, other)
        )


def _seen_by_value(tensor: torch.Tensor) -> Seen:
    """Return `tensor` as it is now; a copy if it belongs to inference mode, where changes in place are not counted."""
    return Seen(tensor.clone() if tensor.is_inference() else tensor)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


MSG_NOWHERE = (
    "offload_prelude=True moves weights from the pipeline's device to the CPU, but this pipeline's denoiser is on the "
    "CPU already. Leave it out, or move the pipeline to an accelerator."
)


class Parking:
    """Moves weights to the CPU while no graph needs them, and back to their device.

    The module's own tensors are moved: everything that refers to them sees them on the CPU meanwhile. A weight that
    shares its memory with another tensor is left where it is, since moving it would free nothing.
    """

    def __init__(self) -> None:
        self._parked: dict[int, tuple[torch.Tensor, Any]] = {}

    def park(self, weights: Iterable[torch.Tensor], keep: Iterable[torch.Tensor]) -> None:
        """Move `weights` away, except for those in `keep`."""
        kept = {id(tensor) for tensor in keep}
        storages = {tensor.untyped_storage().data_ptr() for tensor in keep}
        for tensor in weights:
            if id(tensor) in kept or id(tensor) in self._parked:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages and storage.nbytes() == tensor.nbytes:
                self._parked[id(tensor)] = tensor, self.send(tensor)

    def bring_back(self, weights: Iterable[torch.Tensor] | None = None) -> None:
        """Bring back `weights`, or everything."""
        wanted = list(self._parked) if weights is None else [id(t) for t in weights if id(t) in self._parked]
        for number in wanted:
            tensor, home = self._parked[number]
            self.fetch(tensor, home)
            del self._parked[number]

    def send(self, tensor: torch.Tensor) -> Any:
        """Move `tensor` away, and return what `fetch` needs to bring it back.

        Raises:
            ConfigurationError: it is on the CPU.
        """
        home = tensor.device
        if home.type == "cpu":
            raise ConfigurationError(MSG_NOWHERE)
        tensor.data = tensor.data.to("cpu")
        return home

    def fetch(self, tensor: torch.Tensor, home: Any) -> None:
        """Bring `tensor` back."""
        tensor.data = tensor.data.to(home)
