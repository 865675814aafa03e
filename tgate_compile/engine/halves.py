"""Find the latents among a call's arguments, and handle the two halves of classifier-free guidance."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tgate_compile._errors import INSTEAD, UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.families import Family
from tgate_compile.methods.method import Half
from tgate_compile.passes.graphs import Binding, Captured

#: Parameter names that denoisers use for the latents, the least ambiguous first.
LATENTS_NAMES = ("sample", "hidden_states", "latents", "noisy_latents", "latent", "x", "x_t", "z", "z_t")

_TIME = re.compile(r"^[trs]$|(^|_)(time|times|time_?steps?|sigmas?|noise_levels?|noise_labels?|log_?snr)($|_)|^t_")
_CONDITION = re.compile(
    r"encoder|context|ctx|text|txt|prompt|cond|caption|cap_|emb|label|class|mask|guid|pool|control|memory|hint|ref|adapter"
    r"|position|coord|rope|rotary|_ids$|^[cy]$"
)


def named_leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a call's bound `arguments` with their innermost names: a dict key or the parameter."""
    for name, value in arguments.items():
        if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):  # quickly: every step does this
            yield name, value
            continue
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
            yield next((key for key in reversed(keys) if isinstance(key, str)), name), leaf


def latents_of(arguments: Mapping[str, Any]) -> torch.Tensor:
    """Return the latents among a denoiser call's bound `arguments`, which may be nested.

    They are the argument with one of `LATENTS_NAMES`, else the first floating-point tensor with at least two
    dimensions whose name does not stand for a time, a position, a text or another condition.

    Raises:
        UnsupportedModelError: no tensor qualifies.
    """
    leaves = list(named_leaves(arguments))
    tensors: list[tuple[str, torch.Tensor]] = [(name, leaf) for name, leaf in leaves if _may_be_latents(leaf)]
    for expected in LATENTS_NAMES:
        for name, leaf in tensors:
            if name == expected:
                return leaf
    unnamed = [leaf for name, leaf in tensors if not is_time(name) and _CONDITION.search(name.lower()) is None]
    if not tensors:
        given = ", ".join(f"{name}: {_in_words(leaf)}" for name, leaf in leaves) or "nothing"
        raise UnsupportedModelError(
            f"The denoiser was called without a tensor that could be the latents: {given}. It must take them as a "
            "floating-point tensor of at least two dimensions, the batch first."
        )
    return (unnamed or [leaf for _, leaf in tensors])[0]


def batch_of(arguments: Mapping[str, Any]) -> torch.Tensor:
    """Return the latents among a denoiser call's bound `arguments` as one tensor, with the batch first.

    A denoiser may take the rows of its batch as a list (Z-Image), in which each row may be a list again: of reference
    images and, at the end, the latents.

    Raises:
        UnsupportedModelError: no tensor qualifies, or the rows of a list have different sizes.
    """
    latents = latents_of(arguments)
    rows = rows_of(arguments, latents)
    if rows is None:
        return latents
    ends = [pytree.tree_leaves(row)[-1] for row in rows]
    if len({end.shape for end in ends}) > 1:
        shapes = ", ".join(str(list(end.shape)) for end in ends)
        raise UnsupportedModelError(f"The denoiser's latents have different sizes: {shapes}. {INSTEAD}")
    return torch.stack(ends)


def rows_of(arguments: Mapping[str, Any], latents: torch.Tensor) -> Sequence[Any] | None:
    """Return the list among `arguments` that `latents` is in; None if it is an argument itself."""
    lists = [value for value in arguments.values() if isinstance(value, list)]  # a tuple: a forward's `*args`
    return next((rows for rows in lists if any(leaf is latents for leaf in pytree.tree_leaves(rows))), None)


def timestep_of(arguments: Mapping[str, Any]) -> Any:
    """Return the timestep among a denoiser call's bound `arguments`: a tensor or a number; None if there is none.

    It is the argument called `timestep`, else one with another name for a time, else a tensor without dimensions.
    """
    leaves = [
        (name, leaf)
        for name, leaf in named_leaves(arguments)
        # A tensor with more dimensions (one timestep for each frame) is recognized by name alone.
        if (torch.is_tensor(leaf) and (leaf.ndim <= 2 or name == "timestep"))
        or (isinstance(leaf, (int, float)) and not isinstance(leaf, bool))
    ]
    exact = [leaf for name, leaf in leaves if name == "timestep"]
    named = [leaf for name, leaf in leaves if is_time(name)]
    scalars = [leaf for _, leaf in leaves if torch.is_tensor(leaf) and leaf.ndim == 0]
    return next(iter([*exact, *named, *scalars]), None)


def check_halves_of_text(captured: Captured, cond_weight: float, kept: str) -> None:
    """Check that the text that a gate keeps, in joint attention, is that of the half that goes on.

    Raises:
        UnsupportedModelError: it is a mean of both texts, or that of the other half.
    """
    if any(site.of_text for site in captured.sites) and (cond_weight != 1.0 or kept != "cond"):
        raise UnsupportedModelError(
            "The denoiser has joint attention, where a gate keeps the keys and values of a text; the mean of two texts "
            'means nothing. Gate it with optimize(pipe, gate_step=10, keep="cond", anchor_weight=1.0).'
        )


def is_time(name: str) -> bool:
    """Return whether an argument called `name` is a timestep or a noise level."""
    return _TIME.search(name.lower()) is not None


#: Names of arguments that stay the same for a generation: text, sizes, guidance embeddings, reference images.
_PROMPT = re.compile(
    r"^(encoder_hidden_states|encoder_attention_mask|attention_mask|position_ids|img_mask|input_ids|input_img|text|prompt|pooled|caption|cap_|txt|guidance"
    r"|image_embeds|image_meta|ip_adapter|image_rotary_emb|img_ids|class_labels|resolution|aspect_ratio|timestep_cond)"
    r"|^(added_)?time_ids$|^(context|ctx|cond|conditioning|labels?|style|fps|[cy])$"
)


def binding_of(name: str) -> Binding:
    """Return how often the argument called `name` changes; at every call if the name is not known.

    A wrong answer costs time: a generation compares an argument of the prompt with that of the call before.
    """
    if _PROMPT.search(name.lower()) is not None:
        return "prompt"
    return "timestep" if is_time(name) else "latents"


def fits(latents: Sequence[str], output: Sequence[str]) -> bool:
    """Return whether `output` can be the sizes of a prediction for `latents`: at most one size differs (channels)."""
    return len(latents) == len(output) and sum(a != b for a, b in zip(latents, output, strict=True)) <= 1


def _may_be_latents(leaf: object) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.ndim >= 2


def _in_words(leaf: object) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if torch.is_tensor(leaf) else repr(leaf)


MSG_NOT_TWO_HALVES = (
    "Guidance is on, but the denoiser's batch {shape} does not consist of the halves [uncond; cond] for the same "
    "latents, so they cannot be merged at the gate. " + INSTEAD
)

MSG_ROWS = (
    "The call's extra arguments for attention have tensors with as many rows as the batch ({shapes}), and the "
    "denoiser's result for one half differs from that for both, however these tensors are split. " + INSTEAD
)

#: Arguments of denoisers that are passed on to attention processors.
_EXTRA = ("cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs")
#: SDXL's sizes and crops, which some pipelines concatenate into halves before they repeat them for each image.
_TIME_IDS = ("added_cond_kwargs", "time_ids")


def check_halves(latents: torch.Tensor, *, same: bool) -> None:
    """Check that `latents`, [2B, ...], consist of two halves, which must be equal if `same` is set.

    Raises:
        UnsupportedModelError: they do not.
    """
    if not are_halves(latents, same=same):
        raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))


def are_halves(latents: torch.Tensor, *, same: bool) -> bool:
    """Return whether `latents`, [2B, ...], can be two halves, which must be equal if `same` is set."""
    batch = latents.shape[0]
    return batch % 2 == 0 and (not same or torch.equal(latents[: batch // 2], latents[batch // 2 :]))


def are_two_of_each(latents: torch.Tensor) -> bool:
    """Return whether `latents` consist of two equal blocks that cannot be split into equal blocks again.

    Such a batch has two predictions for each of B latents.
    """
    return are_halves(latents, same=True) and not are_halves(latents[: latents.shape[0] // 2], same=True)


def first_is_cond(halves: torch.Tensor, prediction: torch.Tensor) -> bool:
    """Return whether the first of `halves`, [2B, ...], belongs to the prompt.

    This follows from the guided `prediction`, [B, ...], that was computed from them: guidance extrapolates from the
    prediction for the negative prompt through that for the prompt, so the guided prediction lies beyond the latter.
    Guidance rescale does not change that.
    """
    first, second = halves.float().chunk(2)
    if first.shape != prediction.shape:
        if first.ndim != prediction.ndim or first.shape[0] != prediction.shape[0]:
            return False
        # Leave out a learned variance.
        first, second = first[:, : prediction.shape[1]], second[:, : prediction.shape[1]]
        if first.shape != prediction.shape:
            return False
    difference = second - first
    along = ((prediction.float() - first) * difference).sum() / difference.square().sum()
    return bool(along < 0)


def alternating(call: Call, batch: int, family: Family) -> frozenset[int]:
    """Return the ids of the tensors of `call` whose rows alternate between the halves, [uncond, cond, uncond, ...].

    The sizes and crops are the same for all images of a call, so their layout can be read from their rows. The other
    inputs are those that `family` lists.
    """
    ids = {id(leaf) for path in family.interleaved for leaf in leaves_at(call, path)}
    for leaf in leaves_at(call, _TIME_IDS):
        if torch.is_tensor(leaf) and leaf.ndim > 0 and leaf.shape[0] == batch and batch > 2:
            halves = torch.stack(leaf.chunk(2))  # [2, B, ...]
            pairs = torch.stack([leaf[0::2], leaf[1::2]])
            in_halves, in_turn = (bool((rows == rows[:, :1]).all()) for rows in (halves, pairs))
            if in_halves != in_turn:  # else all rows are equal, or have neither layout
                ids = ids | {id(leaf)} if in_turn else ids - {id(leaf)}
    return frozenset(ids)


def one_half(
    call: Call, batch: int, keep: Half, family: Family, shared_positions: Collection[int] = frozenset()
) -> Call:
    """Return the part of `call` for the half `keep`; its latents have the batch `batch` = 2B.

    The tensors at `shared_positions` among its leaves are shared by both halves, as are those that `family` lists.
    """
    position = family.order.index(keep)
    interleaved = alternating(call, batch, family)
    repeated, shared = (
        {id(leaf) for path in paths for leaf in leaves_at(call, path)} for paths in (family.repeated, family.shared)
    )

    shared |= {id(call.leaves[place]) for place in shared_positions}
    dims = {id(leaf): dim for path, dim in family.batch_dims for leaf in leaves_at(call, path)}
    if family.listed:
        call, rows = _half_of_lists(call, batch, position)
        shared |= rows

    def half(leaf: torch.Tensor) -> torch.Tensor:
        if id(leaf) in dims:
            return leaf.chunk(2, dims[id(leaf)])[position]
        has_halves = leaf.ndim > 0 and leaf.shape[0] == batch and id(leaf) not in shared
        if not has_halves and id(leaf) not in repeated:
            return leaf  # shared by both halves: a timestep, a mask
        return leaf[position::2].contiguous() if id(leaf) in interleaved else leaf.chunk(2)[position]

    return call.map_tensors(half)


def _half_of_lists(call: Call, batch: int, position: int) -> tuple[Call, set[int]]:
    """Return `call` with one half of each list that has an entry for each of `batch` rows, and the ids of the rows."""

    def half(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != batch:
            return value
        kept = value[batch // 2 :] if position else value[: batch // 2]
        rows.update(id(leaf) for leaf in pytree.tree_leaves(kept))
        return kept

    rows: set[int] = set()
    args, kwargs = call.arguments
    leaves, spec = pytree.tree_flatten((tuple(map(half, args)), {name: half(value) for name, value in kwargs.items()}))
    return Call(tuple(leaves), spec), rows


def doubled(result: Any) -> Any:
    """Return a denoiser's `result`, which holds a list with one entry for each row, with every row twice."""
    if isinstance(result, list):
        return result + result
    if isinstance(result, tuple):
        return tuple(map(doubled, result))
    return type(result)(**{name: doubled(value) for name, value in result.items()})


def uncertain_rows(call: Call, batch: int) -> tuple[int, ...]:
    """Return the positions of tensors with as many rows as the batch whose rows may or may not be the halves.

    These are the extra arguments of attention processors, such as masks of regions.
    """
    extra = {id(leaf) for name in _EXTRA for leaf in leaves_at(call, (name,)) if torch.is_tensor(leaf)}
    return tuple(
        place
        for place, leaf in enumerate(call.leaves)
        if id(leaf) in extra and leaf.ndim > 0 and leaf.shape[0] == batch
    )


def shared_rows(
    call: Call, batch: int, keep: Half, family: Family, uncertain: Sequence[int], forward: Callable[..., Any]
) -> frozenset[int]:
    """Return which of the `uncertain` tensors both halves share, found by running the denoiser on one half.

    Raises:
        UnsupportedModelError: with no choice of them does the denoiser compute the same for one half as for both.
    """

    def predicted(inputs: Call) -> torch.Tensor:
        args, kwargs = inputs.arguments
        prediction: torch.Tensor = pytree.tree_leaves(forward(*args, **kwargs))[0]
        return prediction.float()

    with torch.random.fork_rng():
        expected = predicted(call).chunk(2)[family.order.index(keep)]
        tolerance = 0.02 * float((expected - expected.mean()).square().mean().sqrt())
        for number in range(len(uncertain) + 1):
            for shared in combinations(uncertain, number):
                try:
                    result = predicted(one_half(call, batch, keep, family, shared))
                except RuntimeError:
                    continue  # rows that do not fit
                if result.shape == expected.shape and float((result - expected).abs().max()) <= tolerance:
                    return frozenset(shared)
    names = ", ".join(str(list(call.leaves[place].shape)) for place in uncertain)
    raise UnsupportedModelError(MSG_ROWS.format(shapes=names))


def similarity(uncond: torch.Tensor, cond: torch.Tensor, sample: torch.Size, *, last_tokens: bool = False) -> float:
    """Return the smallest cosine similarity in the batch of the halves' predictions, [B, ...] each.

    Source: arXiv 2312.12487, equation 7.

    Args:
        uncond: the prediction for the negative prompt.
        cond: the prediction for the prompt.
        sample: the shape of the latents, [B, ...]. What a denoiser returns beyond their sizes is not compared: a
            learned variance, or tokens of the text or of reference images.
        last_tokens: whether the prediction is in the last of the tokens that the denoiser returns.
    """

    def predicted(half: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(sample[1:], 1):
            if half.ndim == len(sample) and half.shape[dim] > size:
                half = half.narrow(dim, half.shape[dim] - size if last_tokens else 0, size)
        return half.float().flatten(1)

    return float(torch.cosine_similarity(predicted(uncond), predicted(cond), dim=1).min())


def leaves_at(call: Call, path: tuple[str, ...]) -> list[Any]:
    """Return the leaves at `path` in the call's keyword arguments, e.g. ("added_cond_kwargs", "time_ids")."""
    value: Any = call.arguments[1]
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return pytree.tree_leaves(value)
