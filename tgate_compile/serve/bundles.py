"""Serve a bundle without PyTorch. Steps of several requests are run together if the bundle's batch size is free."""

from __future__ import annotations

import functools
import hashlib
import logging
import operator
import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tgate_compile._errors import ConfigurationError, UnsupportedCallError, check_names
from tgate_compile.bundle.manifest import Graph, Manifest, TensorSpec, phase_of
from tgate_compile.bundle.read_manifest import inputs_of, names_in, outputs_of
from tgate_compile.runtime._denoiser import Graphs
from tgate_compile.runtime._pipeline import BundlePipeline, Step
from tgate_compile.runtime._session import Session, ort_value
from tgate_compile.runtime._text_and_images import pil_images
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.requests import Request
from tgate_compile.serve.worker import Job, RunApart, Work

if TYPE_CHECKING:
    from onnxruntime import OrtValue

logger = logging.getLogger(__name__)

#: The arguments of a call of the bundle's pipeline that a request may have.
ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "latents",
    "height",
    "width",
    "scheduler",
    "gate_step",
    "output",
)


#: The name of the batch in the shapes of a manifest.
_BATCH = "b"
#: The largest difference that rounding can explain, relative to an output's largest value, by dtype.
_TOLERANCES: Mapping[str, float] = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2}
#: The most bytes of an input without rows that is compared by value.
_LARGEST_SHARED = 1 << 20

MSG_FIXED = (
    "the batch size of its graphs is fixed, or is not the first dimension of their inputs; export it with dynamic=True"
)


@dataclass(frozen=True)
class Form:
    """How the calls of a graph can be joined.

    Attributes:
        name: the graph's name.
        inputs: for each input by name, its number of rows for each image; 0 for inputs without rows.
        outputs: the specification of each output, and its number of rows for each image.
        most: the largest batch.
    """

    name: str
    inputs: Mapping[str, int]
    outputs: Sequence[tuple[TensorSpec, int]]
    most: int


@dataclass(eq=False)
class Turn:
    """A call of a graph of the denoiser.

    Attributes:
        session: runs it.
        inputs: the inputs by name.
        kept: the number of outputs, at the end, that are kept for another run.
        form: how it can be joined with others.
        images: the number of images.
        place: equal for calls that can be joined, except that it ignores inputs without rows.
        letter: the letter of the phase.
        is_last: whether it is the last call of the loop.
        key: see `Work`.
    """

    session: Session
    inputs: Mapping[str, OrtValue]
    kept: int
    form: Form
    images: int
    place: Hashable
    letter: str
    is_last: bool
    key: Hashable = field(default=None)

    component = ""

    def run(self) -> list[OrtValue]:
        """Run it alone."""
        return Session.run(self.session, self.inputs, kept=self.kept)


class ServedBundle:
    """A bundle as an engine serves it. The steps of several requests are run together if the batch size is free.

    Args:
        folder: the folder of the bundle.
        options: options of `BundlePipeline`.

    Raises:
        BundleError: the bundle is damaged or unsuitable.
        ConfigurationError: an option is wrong.
    """

    captures = 0  # the bundle has all graphs

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        check_names(options, ("providers", "threads", "verify"), "Engine.from_bundle")
        self._pipeline = BundlePipeline(folder, **options)
        manifest = self._pipeline.manifest
        self._forms = {name: form_of(name, graph, manifest) for name, graph in manifest.graphs.items()}
        self._apart: dict[Hashable, str] = {}
        steps = [name for name, graph in manifest.graphs.items() if graph.stage == "step"]
        if not any(self._forms[name] for name in steps):
            self._apart[None] = MSG_FIXED
            logger.warning("Requests for the bundle %s are run one at a time: %s.", folder, MSG_FIXED)
        # By place and number of images: the inputs that differed in a batch that was compared with single runs.
        self._compared: dict[Hashable, set[frozenset[str]]] = defaultdict(set)
        # The last joined inputs: text, caches and early values stay the same from step to step.
        self._made: dict[Hashable, tuple[list[OrtValue], OrtValue]] = {}

    @property
    def apart(self) -> Mapping[Hashable, str]:
        """The graphs that run one request at a time, with the reason for each."""
        return self._apart

    def check(self, call: Mapping[str, Any], lora: Mapping[str, float] | None) -> None:
        """Raise ConfigurationError if the pipeline does not know these arguments."""
        check_names(call, ARGUMENTS, "call: a bundle's pipeline")
        if lora is not None:
            raise ConfigurationError(
                "A bundle has fixed weights and does not support lora. Fuse the adapter before exporting, or "
                "serve the pipeline itself."
            )

    def run(self, request: Request, engine: Engine) -> Any:
        """Run the pipeline's call for `request`, in whose thread it is called."""

        def note(step: Step) -> None:
            request.step, request.steps, request.phase = step.number, step.steps, step.letter
            request.report(step.latents.copy)

        graphs = _Turns(self, self._pipeline, request, engine)
        return self._pipeline.with_graphs(graphs)(**request.call, callback=note)

    def turn(self, session: Session, name: str, inputs: Mapping[str, OrtValue], kept: int, request: Request) -> Work:
        """Return the work item of a call of the graph `name`."""
        graph = self._pipeline.manifest.graphs[name]
        letter, form = phase_of(graph.phase).character if graph.stage == "step" else "", self._forms[name]
        found = None if form is None or not letter else _images_and_shapes(form, inputs)
        if form is None or found is None:
            return Job(functools.partial(Session.run, session, inputs, kept=kept), letter=letter)
        images, shapes = found
        is_last = bool(request.steps) and request.step + 2 >= request.steps
        work = Turn(session, inputs, kept, form, images, (name, shapes), letter, is_last)
        shared = _shared(form, inputs)
        if shared is not None and work.place not in self._apart:
            work.key = work.place, shared
        return work

    def execute(self, works: Sequence[Work]) -> Sequence[Any]:
        """Run work items with equal keys together, and return the result of each."""
        first = works[0]
        if isinstance(first, Job):
            return [first.function()]
        turns = [work for work in works if isinstance(work, Turn)]
        if len(turns) == 1:
            return [turns[0].run()]
        assert isinstance(first, Turn)
        if first.place in self._apart:
            raise RunApart([[position] for position in range(len(turns))])
        total = sum(turn.images for turn in turns)
        if total > first.form.most:
            raise RunApart(list(_chunks([turn.images for turn in turns], first.form.most)))
        results = self._together(turns, total)
        known, differing = self._compared[first.place, total], _differing(turns)
        if any(differing <= each for each in known):
            return results
        singles = [turn.run() for turn in turns]
        problem = next(filter(None, map(_difference, results, singles)), None)
        if problem is None:
            known.add(differing)
        else:
            self.keep_apart(first, f"the results of a batch differ from those of separate runs ({problem})")
        return singles

    def keep_apart(self, work: Work, reason: str) -> None:
        """Run requests one at a time with the graph of `work`."""
        if isinstance(work, Turn) and work.place not in self._apart:
            self._apart[work.place] = reason
            logger.warning("Requests are run one at a time in the graph %s: %s.", work.form.name, reason)

    def decode(self, latents: Any) -> list[Any]:
        """Return PIL images of `latents`."""
        if np.ndim(latents) != 4:
            raise UnsupportedCallError(f"Latents must have four dimensions, but have {np.ndim(latents)}.")
        return pil_images(self._pipeline.decode(latents))

    def warm_up(self, engine: Engine, calls: Sequence[Mapping[str, Any]]) -> None:
        """Make the calls, which opens the graphs that they need."""
        for call in calls:
            self.check(call, None)
            engine.accept(call, None, records={}).ticket.result()  # not counted

    def rest(self) -> None:
        """Free what is kept from batch to batch."""
        self._made.clear()

    def close(self) -> None:
        """Close the graphs."""
        self.rest()
        self._pipeline.close()

    def _together(self, turns: Sequence[Turn], total: int) -> list[list[OrtValue]]:
        """Run turns as one call, and split its results."""
        first = turns[0]
        inputs = {
            name: self._joined((first.form.name, name), [turn.inputs[name] for turn in turns], rows)
            if rows
            else first.inputs[name]
            for name, rows in first.form.inputs.items()
        }
        outputs = Session.run(first.session, inputs, kept=first.kept)
        results: list[list[OrtValue]] = []
        start = 0
        for turn in turns:
            results.append(
                [
                    ort_value(_share(value, start, turn.images, total, rows), spec)
                    for value, (spec, rows) in zip(outputs, first.form.outputs, strict=True)
                ]
            )
            start += turn.images
        return results

    def _joined(self, place: Hashable, parts: list[OrtValue], rows: int) -> OrtValue:
        """Return the rows of all `parts`: of each half, those of all requests."""
        made = self._made.get(place)
        if made is not None and len(made[0]) == len(parts) and all(map(operator.is_, made[0], parts)):
            return made[1]
        import onnxruntime

        halves = [np.split(part.numpy(), rows) for part in parts]
        value = np.concatenate([half[position] for position in range(rows) for half in halves])
        joined: OrtValue = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        self._made[place] = parts, joined
        return joined


class _Turns(Graphs):
    """The graphs of a bundle for one request, which an engine's worker runs in turn with those of other requests."""

    def __init__(self, served: ServedBundle, pipeline: BundlePipeline, request: Request, engine: Engine) -> None:
        vars(self).update(vars(pipeline.graphs))
        self._served = served
        self._request = request
        self._engine = engine

    def session(self, name: str) -> Session:
        return _Turn(super().session(name), name, self._served, self._request, self._engine)


class _Turn(Session):
    """A session that waits for its turn."""

    def __init__(self, session: Session, name: str, served: ServedBundle, request: Request, engine: Engine) -> None:
        vars(self).update(vars(session))
        self._name = name
        self._served = served
        self._request = request
        self._engine = engine

    def run(self, inputs: Mapping[str, OrtValue], *, kept: int = 0) -> list[OrtValue]:
        work = self._served.turn(self, self._name, inputs, kept, self._request)
        outputs: list[OrtValue] = self._engine.compute(work, self._request)
        return outputs


def form_of(name: str, graph: Graph, manifest: Manifest) -> Form | None:
    """Return how the calls of a graph can be joined; None if they cannot.

    A tensor has its rows in the first dimension: one for each image, or one in each of the two guidance halves.
    """
    batch = manifest.sizes.get(_BATCH)
    if batch is None:
        return None
    # The rows of these arguments are in a different order.
    others = tuple(path[-1] for path in (*manifest.family.interleaved, *manifest.family.repeated) if path)
    inputs = {spec.name: _rows(spec, guided=graph.phase.guided) for spec in inputs_of(graph)}
    outputs = [(spec, _rows(spec, guided=graph.phase.guided)) for spec in outputs_of(graph)]
    rows = [*inputs.values(), *(rows for _, rows in outputs)]
    if None in rows or not any(inputs.values()) or not all(rows for _, rows in outputs):
        return None
    if any(each.endswith(others) for each in inputs):
        return None
    return Form(
        name,
        {each: count for each, count in inputs.items() if count is not None},
        [(spec, count) for spec, count in outputs if count is not None],
        batch.most,
    )


def _rows(spec: TensorSpec, *, guided: bool) -> int | None:
    """Return the number of rows of a tensor for each image; None if its batch has another place or form."""
    sizes = [str(size) for size in spec.shape]
    if not any(_BATCH in names_in([size]) for size in sizes):
        return 0
    counts = {_BATCH: 1, f"2*{_BATCH}": 2} if guided else {_BATCH: 1}
    known = sizes[0] in counts and not any(_BATCH in names_in([size]) for size in sizes[1:])
    return counts[sizes[0]] if known and spec.dtype in (*_TOLERANCES, "int64", "int32", "bool") else None


def _images_and_shapes(form: Form, inputs: Mapping[str, OrtValue]) -> tuple[int, Hashable] | None:
    """Return the number of images of a call, and its other sizes; None if its values are not in the CPU's memory."""
    if any(value.device_name() != "cpu" for value in inputs.values()):
        return None
    shapes = {name: value.shape() for name, value in inputs.items()}
    counts = {shapes[name][0] // rows for name, rows in form.inputs.items() if rows}
    if len(counts) != 1:
        return None
    return counts.pop(), tuple(tuple(shapes[name][bool(rows) :]) for name, rows in form.inputs.items())


def _shared(form: Form, inputs: Mapping[str, OrtValue]) -> Hashable | None:
    """Return a digest of the inputs without rows, which must be equal in calls that are joined; None if too large."""
    arrays = [inputs[name].numpy() for name, rows in form.inputs.items() if not rows]
    if sum(array.nbytes for array in arrays) > _LARGEST_SHARED:
        return None
    return tuple(hashlib.blake2b(array.tobytes()).digest() for array in arrays)


def _chunks(images: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield groups of positions, in order, with at most `most` images together."""
    group: list[int] = []
    for position, count in enumerate(images):
        if group and sum(images[each] for each in group) + count > most:
            yield group
            group = []
        group.append(position)
    yield group


def _differing(turns: Sequence[Turn]) -> frozenset[str]:
    """Return the names of the inputs with rows that are not the same in all turns."""
    first, *others = turns

    def differs(name: str) -> bool:
        mine = first.inputs[name].numpy()
        return any(not np.array_equal(mine, other.inputs[name].numpy()) for other in others)

    return frozenset(name for name, rows in first.form.inputs.items() if rows and differs(name))


def _share(value: OrtValue, start: int, count: int, total: int, rows: int) -> Any:
    """Return the rows of `count` images from the image `start` on, in each of the halves of a value."""
    array = value.numpy()
    if array.shape[0] != total * rows:
        raise ValueError(f"a result of shape {list(array.shape)} has no rows for {total} images")
    return np.concatenate([half[start : start + count] for half in np.split(array, rows)])


def _difference(results: Sequence[OrtValue], singles: Sequence[OrtValue]) -> str | None:
    """Return how results of a batch differ from those of a single run beyond rounding; None if they do not."""
    for result, single in zip(results, singles, strict=True):
        given, target = result.numpy(), single.numpy()
        allowed = _TOLERANCES.get(str(target.dtype), 0.0)
        largest = float(np.abs(target).max(initial=0.0, where=np.isfinite(target)))
        found = np.abs(given.astype(np.float64) - target.astype(np.float64)).max(initial=0.0)
        if not found <= allowed * largest:  # also if it is NaN
            return f"{found:.1e}, where {allowed * largest:.1e} is allowed"
    return None
