"""The latents among a call's arguments, and the two halves of classifier-free guidance."""

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

#: Names under which denoisers take the latents, the surest first.
LATENTS_NAMES = ("sample", "hidden_states", "latents", "noisy_latents", "latent", "x", "x_t", "z", "z_t")

_TIME = re.compile(r"^[trs]$|(^|_)(time|times|time_?steps?|sigmas?|noise_levels?|noise_labels?|log_?snr)($|_)|^t_")
_CONDITION = re.compile(
    r"encoder|context|ctx|text|txt|prompt|cond|caption|cap_|emb|label|class|mask|guid|pool|control|memory|hint|ref|adapter"
    r"|^[cy]$"
)


def named_leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a call's bound `arguments`, each with its innermost name: a key's in a dict, or the parameter's."""
    for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        yield next(key for key in reversed(keys) if isinstance(key, str)), leaf


def latents_of(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The latents among a denoiser call's bound `arguments`, which may be nested.

    They are the argument with one of `LATENTS_NAMES`, else the first tensor of floating-point numbers with two
    dimensions or more whose name is not one for time, text or another condition.

    Raises:
        UnsupportedModelError: there is no such tensor.
    """
    leaves = list(named_leaves(arguments))
    tensors: list[tuple[str, torch.Tensor]] = [(name, leaf) for name, leaf in leaves if _may_be_latents(leaf)]
    for wanted in LATENTS_NAMES:
        for name, leaf in tensors:
            if name == wanted:
                return leaf
    unnamed = [leaf for name, leaf in tensors if not is_time(name) and _CONDITION.search(name.lower()) is None]
    if not tensors:
        given = ", ".join(f"{name}: {_in_words(leaf)}" for name, leaf in leaves) or "nothing"
        raise UnsupportedModelError(
            f"The denoiser was called without a tensor that could be its latents: {given}. It must take them as a "
            "tensor of at least two dimensions, the batch first."
        )
    return (unnamed or [leaf for _, leaf in tensors])[0]


def timestep_of(arguments: Mapping[str, Any]) -> Any:
    """The timestep among a denoiser call's bound `arguments`: a tensor, or a number; None if nothing looks like one.

    It is called `timestep`, or has another name for time, or is a tensor of no dimensions.
    """
    leaves = [
        (name, leaf)
        for name, leaf in named_leaves(arguments)
        # One for each frame, in more dimensions, is told by its name alone.
        if (torch.is_tensor(leaf) and (leaf.ndim <= 2 or name == "timestep"))
        or (isinstance(leaf, (int, float)) and not isinstance(leaf, bool))
    ]
    exact = [leaf for name, leaf in leaves if name == "timestep"]
    named = [leaf for name, leaf in leaves if is_time(name)]
    scalars = [leaf for _, leaf in leaves if torch.is_tensor(leaf) and leaf.ndim == 0]
    return next(iter([*exact, *named, *scalars]), None)


def is_time(name: str) -> bool:
    """Whether an argument called `name` is a timestep or a noise level."""
    return _TIME.search(name.lower()) is not None


def fits(latents: Sequence[str], output: Sequence[str]) -> bool:
    """Whether a prediction of these sizes may be one for `latents`: they differ in the channels at most."""
    return len(latents) == len(output) and sum(a != b for a, b in zip(latents, output, strict=True)) <= 1


def _may_be_latents(leaf: object) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.ndim >= 2


def _in_words(leaf: object) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if torch.is_tensor(leaf) else repr(leaf)


MSG_NOT_TWO_HALVES = (
    "Guidance is on, but the denoiser's batch {shape} is not [uncond; cond] over the same latents, so its halves "
    "cannot be merged at the gate. " + INSTEAD
)

MSG_ROWS = (
    "The call's extra arguments for attention have tensors with as many rows as the batch ({shapes}), and the denoiser "
    "does not compute the same for one half of them as for both. " + INSTEAD
)

#: Arguments of denoisers that are passed on to attention processors.
_EXTRA = ("cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs")
#: SDXL's sizes and crops, whose halves some pipelines concatenate before they repeat them for the images.
_TIME_IDS = ("added_cond_kwargs", "time_ids")


def check_halves(latents: torch.Tensor, *, same: bool) -> None:
    """Check that `latents`, [2B, ...], are two halves; with `same`, of the same latents.

    Raises:
        UnsupportedModelError: they are not.
    """
    if not are_halves(latents, same=same):
        raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))


def are_halves(latents: torch.Tensor, *, same: bool) -> bool:
    """Whether `latents`, [2B, ...], can be two halves; with `same`, of the same latents."""
    batch = latents.shape[0]
    return batch % 2 == 0 and (not same or torch.equal(latents[: batch // 2], latents[batch // 2 :]))


def are_two_of_each(latents: torch.Tensor) -> bool:
    """Whether `latents` are two equal blocks, and these no blocks again: two predictions of each of B latents."""
    return are_halves(latents, same=True) and not are_halves(latents[: latents.shape[0] // 2], same=True)


def first_is_cond(halves: torch.Tensor, prediction: torch.Tensor) -> bool:
    """Whether the first of `halves`, [2B, ...], is the prompt's, judging by the `prediction`, [B, ...], made of them.

    Guidance goes from the negative prompt's prediction to the prompt's and beyond. So the prediction is on the far side
    of one of them, seen from the other, and that one is the prompt's. Guidance rescale does not change the side.
    """
    first, second = halves.float().chunk(2)
    if first.shape != prediction.shape:
        if first.ndim != prediction.ndim or first.shape[0] != prediction.shape[0]:
            return False
        first, second = first[:, : prediction.shape[1]], second[:, : prediction.shape[1]]  # without a learned variance
        if first.shape != prediction.shape:
            return False
    difference = second - first
    along = ((prediction.float() - first) * difference).sum() / difference.square().sum()
    return bool(along < 0)


def alternating(call: Call, batch: int, family: Family) -> frozenset[int]:
    """The ids of the tensors of `call` whose rows alternate between the halves, [uncond, cond, uncond, cond, ...].

    Sizes and crops are the same for all images of a call, so that their rows tell how they are laid out. Other inputs
    are those that the `family` names.
    """
    ids = {id(leaf) for path in family.interleaved for leaf in leaves_at(call, path)}
    for leaf in leaves_at(call, _TIME_IDS):
        if torch.is_tensor(leaf) and leaf.ndim > 0 and leaf.shape[0] == batch and batch > 2:
            halves = torch.stack(leaf.chunk(2))  # [2, B, ...]
            pairs = torch.stack([leaf[0::2], leaf[1::2]])
            in_halves, in_turn = (bool((rows == rows[:, :1]).all()) for rows in (halves, pairs))
            if in_halves != in_turn:  # else all rows are equal, or neither explains them
                ids = ids | {id(leaf)} if in_turn else ids - {id(leaf)}
    return frozenset(ids)


def one_half(
    call: Call, batch: int, keep: Half, family: Family, shared_positions: Collection[int] = frozenset()
) -> Call:
    """`call`, whose latents have a batch of `batch` = 2B, for its half `keep` alone.

    The tensors at `shared_positions` among its leaves are both halves' alike, besides those that the `family` names.
    """
    position = family.order.index(keep)
    interleaved = alternating(call, batch, family)
    repeated, shared = (
        {id(leaf) for path in paths for leaf in leaves_at(call, path)} for paths in (family.repeated, family.shared)
    )

    shared |= {id(call.leaves[place]) for place in shared_positions}

    def half(leaf: torch.Tensor) -> torch.Tensor:
        has_halves = leaf.ndim > 0 and leaf.shape[0] == batch and id(leaf) not in shared
        if not has_halves and id(leaf) not in repeated:
            return leaf  # both halves' alike: a timestep, a mask
        return leaf[position::2].contiguous() if id(leaf) in interleaved else leaf.chunk(2)[position]

    return call.map_tensors(half)


def uncertain_rows(call: Call, batch: int) -> tuple[int, ...]:
    """The positions of tensors that have as many rows as the batch, and of which only the user knows what these are.

    Those are the extra arguments of attention processors: masks of regions, for example.
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
    """Which of the `uncertain` tensors are both halves' alike, found by running the denoiser on one half.

    Raises:
        UnsupportedModelError: it does not compute for one half what it does for both, whichever they are.
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


def similarity(prediction: torch.Tensor, channels: int) -> float:
    """The cosine similarity of the halves of `prediction`, [2B, channels or more, ...]: the least in the batch.

    Source: arXiv 2312.12487, equation 7. Channels beyond the latents' own are a learned variance, and left out.
    """
    uncond, cond = prediction[:, :channels].float().flatten(1).chunk(2)
    return float(torch.cosine_similarity(uncond, cond, dim=1).min())


def leaves_at(call: Call, path: tuple[str, ...]) -> list[Any]:
    """What is at `path` of the call's keyword arguments, e.g. ("added_cond_kwargs", "time_ids")."""
    value: Any = call.arguments[1]
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return pytree.tree_leaves(value)
