"""Join the denoiser calls of several requests into one, and split its results.

A guided call has its rows in two halves, [uncond...; cond...]. The joined call has the rows of all requests in each
half. Inputs without rows are shared, and must be equal in all requests. A batch may be padded with copies of the first
image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CachedValues, EarlyValues, Seen
from tgate_compile.engine.families import Family
from tgate_compile.engine.halves import is_time, latents_of, leaves_at, named_leaves, rows_of, timestep_of
from tgate_compile.engine.trust import TOLERANCES, coarsest, relative_difference
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.graphs import Emission
from tgate_compile.serve.components import Weights

#: Where a leaf of a call has the rows of its images: the dimension; "time" for a timestep, which is expanded to one
#: element for each row; None for leaves without rows.
Rows = int | Literal["time"] | None


@dataclass(frozen=True)
class Form:
    """The form of a denoiser call, which determines whether it can be joined with others.

    Attributes:
        images: the number of images.
        halves: the number of rows for each image, 2 under guidance.
        rows: where each leaf has its rows.
        key: equal for calls that can be joined; it contains everything except the number of images and the values.
    """

    images: int
    halves: int
    rows: tuple[Rows, ...]
    key: Hashable

    def per_image(self, leaf: torch.Tensor, dim: int = 0) -> int:
        """Return how many rows of a half of `leaf` belong to each image."""
        return leaf.shape[dim] // (self.images * self.halves)


def form_of(call: Call, signature: inspect.Signature, family: Family, *, guided: bool) -> Form | None:
    """Return the form of a call of a denoiser with this `signature`; None if it cannot be joined with others.

    An input has rows if its first dimension, or the one that `family` names, is as large as the number of rows of the
    latents. This may be wrong for an input that has the same size by chance; the comparison of the first joined call
    with single calls then fails.
    """
    args, kwargs = call.arguments
    arguments = signature.bind(*args, **kwargs).arguments
    latents = latents_of(arguments)
    halves = 2 if guided else 1
    if call.by_value or rows_of(arguments, latents) is not None or latents.shape[0] % halves:
        return None  # the graph depends on values, or the denoiser takes lists of rows
    count = latents.shape[0]
    times = {id(leaf) for name, leaf in named_leaves(arguments) if torch.is_tensor(leaf) and is_time(name)}
    times.add(id(timestep_of(arguments)))
    shared = {id(leaf) for path in family.shared for leaf in leaves_at(call, path)}
    repeated = {id(leaf) for path in family.repeated for leaf in leaves_at(call, path)}
    dims = {id(leaf): dim for path, dim in family.batch_dims for leaf in leaves_at(call, path)}

    def rows(leaf: Any) -> Rows:
        if not torch.is_tensor(leaf) or id(leaf) in shared:
            return None
        if id(leaf) in times and leaf.ndim <= 1 and leaf.numel() in (1, count):
            return "time"
        if id(leaf) in dims:
            return dims[id(leaf)]
        if leaf.ndim and (leaf.shape[0] == count or (id(leaf) in repeated and leaf.shape[0] % count == 0)):
            return 0
        return None

    found = tuple(map(rows, call.leaves))
    parts = tuple(_part(leaf, where, count) for leaf, where in zip(call.leaves, found, strict=True))
    return Form(count // halves, halves, found, (call.spec, call.image, halves, parts))


def _part(leaf: Any, rows: Rows, count: int) -> Hashable:
    if not torch.is_tensor(leaf):
        return type(leaf), leaf if isinstance(leaf, Hashable) else repr(leaf)
    shape: tuple[int, ...] = tuple(leaf.shape)
    if rows == "time":
        shape = ()
    elif rows is not None:
        shape = (*shape[:rows], shape[rows] // count, *shape[rows + 1 :])
    return rows, shape, leaf.dtype, leaf.device


@dataclass(eq=False)
class Step:
    """A denoiser call of a request.

    Attributes:
        name: the component that is called.
        phase: the phase of the graph.
        call: the arguments.
        caches: the cached values.
        form: how it can be joined with others; None if it cannot.
        lora: the weights of the adapters.
        is_last: whether it is the last call of the loop.
        key: see `Work`.
    """

    name: str
    phase: Phase
    call: Call
    caches: CachedValues
    form: Form | None
    lora: Weights
    is_last: bool
    key: Hashable = None

    component = ""

    @property
    def images(self) -> int:
        """The number of images."""
        return 1 if self.form is None else self.form.images

    @property
    def letter(self) -> str:
        """The letter of the phase."""
        return self.phase.character

    @property
    def place(self) -> tuple[str, Phase, Hashable]:
        """Identifies its graphs, apart from the number of images and the adapters."""
        return self.name, self.phase, self.call.key if self.form is None else self.form.key


@dataclass(frozen=True)
class Results:
    """The results of one request's denoiser call, with the interface of the graph that computed them.

    Attributes:
        outputs: the denoiser's flat outputs.
        values: the values of `emitted`.
        emitted: the sites whose values were returned.
        put: packs flat outputs into the type that the denoiser returns.
        runner: what ran the graph.
    """

    outputs: list[torch.Tensor]
    values: list[torch.Tensor]
    emitted: tuple[Emission, ...]
    put: Callable[[list[torch.Tensor]], Any]
    runner: object = None

    def run(
        self, call: Call, caches: CachedValues, early: EarlyValues
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the results, which were computed for this call."""
        return self.outputs, self.values

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """Return the denoiser's return value, assembled from its flat outputs."""
        return self.put(outputs)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All results."""
        return [each for each in (*self.outputs, *self.values) if torch.is_tensor(each)]


class Memo:
    """Keeps the last joined tensors of each place, because prompts and caches stay the same from step to step."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[list[Seen], Hashable, torch.Tensor]] = {}

    def get(
        self, place: Hashable, parts: Sequence[torch.Tensor], layout: Hashable, join: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return the result of `join`, or the previous result if `parts` and `layout` are the same."""
        made = self._made.get(place)
        if made is not None and made[1] == layout and all(map(Seen.is_same, made[0], parts)):
            return made[2]
        joined = join()
        self._made[place] = [Seen(part) for part in parts], layout, joined
        return joined

    def clear(self) -> None:
        """Free the tensors."""
        self._made.clear()


def joined(calls: Sequence[Call], forms: Sequence[Form], images: int, memo: Memo, place: Hashable) -> Call:
    """Return one call for all of `calls`, padded to `images` images."""
    layout = tuple(form.images for form in forms), images
    leaves: list[Any] = []
    for position, rows in enumerate(forms[0].rows):
        parts = [call.leaves[position] for call in calls]
        if rows is None:
            leaves.append(parts[0])
            continue
        dim = 0 if rows == "time" else rows
        if rows == "time":
            counts = [form.images * form.halves for form in forms]
            parts = [part.reshape(-1).expand(count) for part, count in zip(parts, counts, strict=True)]
        leaves.append(_joined(parts, forms, images, dim, memo, (place, position), layout))
    return replace(calls[0], leaves=tuple(leaves))


def joined_caches(
    caches: Sequence[CachedValues], forms: Sequence[Form], images: int, memo: Memo, place: Hashable
) -> dict[tuple[Kind, str], torch.Tensor]:
    """Return the cached values of several requests as those of one call, padded to `images` images."""
    layout = tuple(form.images for form in forms), images
    return {
        key: _joined([each[key] for each in caches], forms, images, 0, memo, (place, key), layout) for key in caches[0]
    }


def _joined(
    parts: Sequence[torch.Tensor],
    forms: Sequence[Form],
    images: int,
    dim: int,
    memo: Memo,
    place: Hashable,
    layout: Hashable,
) -> torch.Tensor:
    halves, padding = forms[0].halves, images - sum(form.images for form in forms)
    if len(parts) == 1 and not padding:
        return parts[0]

    def join() -> torch.Tensor:
        pieces: list[torch.Tensor] = []
        for half in range(halves):
            pieces += [part.chunk(halves, dim)[half] for part in parts]
            first = pieces[-len(parts)].narrow(dim, 0, forms[0].per_image(parts[0], dim))
            pieces += [first] * padding
        return torch.cat(pieces, dim)

    return memo.get(place, parts, layout, join)


def share_of(value: torch.Tensor, start: int, count: int, images: int, halves: int) -> torch.Tensor:
    """Return the rows of `count` images from image `start` on, in a value with `images` images in each of its halves.

    Raises:
        ValueError: the value does not have the same number of rows for each image.
    """
    if not value.ndim or value.shape[0] % (images * halves):
        raise ValueError(f"a result of shape {list(value.shape)} has no rows for {images * halves} inputs")
    if count == images:
        return value
    size = value.shape[0] // (images * halves)
    parts = [value.narrow(0, (half * images + start) * size, count * size) for half in range(halves)]
    return parts[0].clone() if halves == 1 else torch.cat(parts)


def shared_equal(call: Call, other: Call, rows: Sequence[Rows]) -> bool:
    """Return whether the inputs without rows are equal in two calls of the same form."""
    return all(
        left is right or torch.equal(left, right)
        for left, right, where in zip(call.leaves, other.leaves, rows, strict=True)
        if where is None and torch.is_tensor(left)
    )


def differing(calls: Sequence[Call], rows: Sequence[Rows]) -> frozenset[int]:
    """Return the positions of the leaves with rows that are not the same in all of `calls`."""

    def differs(position: int) -> bool:
        first, *others = (call.leaves[position] for call in calls)
        return any(not _has_equal_rows(first, other) for other in others)

    return frozenset(position for position, where in enumerate(rows) if where is not None and differs(position))


def _has_equal_rows(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or (left.shape == right.shape and torch.equal(left, right))


def varied(call: Call, form: Form, number: int) -> Call:
    """Return `call` with different values in its rows, to test whether rows are independent of each other.

    Values are only moved along the last dimension, so that masks remain masks and magnitudes stay the same.
    """
    if not number:
        return call

    def moved(leaf: Any, rows: Rows) -> Any:
        if rows == "time":
            return (leaf * (1 - 0.01 * number)).to(leaf.dtype)
        return leaf if rows is None or leaf.ndim < 2 else leaf.roll(number, -1)

    leaves = (moved(leaf, rows) for leaf, rows in zip(call.leaves, form.rows, strict=True))
    return replace(call, leaves=tuple(leaves))


def distance(
    results: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], computed_in: torch.dtype | None = None
) -> str | None:
    """Return how results differ from the expected ones beyond rounding; None if they do not."""
    for result, target in zip(results, expected, strict=True):
        if not target.is_floating_point():
            if not torch.equal(result, target):
                return "different integers"
            continue
        dtypes = {target.dtype, computed_in or target.dtype} & TOLERANCES.keys()
        relative, allowed = relative_difference(result, target), TOLERANCES[coarsest(dtypes)]
        if relative > allowed:
            return f"a relative difference of {relative:.1e}, where {allowed:.0e} is allowed for {target.dtype}"
    return None


def sizes_in_words(call: Call) -> str:
    """Return the shapes of the tensors of a call, for messages."""
    return ", ".join(str(list(leaf.shape)) for leaf in call.leaves if torch.is_tensor(leaf))
