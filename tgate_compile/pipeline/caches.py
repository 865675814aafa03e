"""The sites' values that are at hand in a generation, and which calls they are good for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from tgate_compile._errors import (
    INSTEAD,
    UnsupportedModelError,
)
from tgate_compile.methods.method import Half, Kind, Phase
from tgate_compile.passes.graphs import Emission

Key = tuple[Kind, str]
#: A value has both halves in one tensor, [2B, ...]; or each half has its own; or there is one for all, [B, ...].
Layout = Literal["both", "separate", "one"]

MSG_GUIDANCE_SWITCHED_ON = (
    "Guidance has been switched on in the middle of a generation, and what is cached was made without it. "
    "Switch it on from the start. " + INSTEAD
)


class Caches:
    """Values by kind and site. All sites of a kind have the layout of the step that made them."""

    def __init__(self) -> None:
        self._values: dict[tuple[Half | None, Key], torch.Tensor] = {}
        self._layouts: dict[Kind, Layout] = {}

    @property
    def nbytes(self) -> int:
        """Of all values together."""
        return sum(value.nbytes for value in self._values.values())

    def put(self, key: Key, value: torch.Tensor, layout: Layout, half: Half | None = None) -> None:
        """Keep `value`; `half` says whose it is, if the layout is `separate`."""
        self._values[half, key] = value
        self._layouts[key[0]] = layout

    def merge_halves(self, anchor: float) -> None:
        """Take the values of a call whose batch, as it turns out, has both halves: merge those of cross-attentions."""
        for kind, layout in list(self._layouts.items()):
            if layout != "one":
                continue
            self._layouts[kind] = "both"
            if kind == "cross":
                for _, key in [address for address in self._values if address[1][0] == kind]:
                    first, second = self._values.pop((None, key)).chunk(2)
                    self._values.update({("uncond", key): first, ("cond", key): second})
                    self.merge(key, anchor)

    def merge(self, key: Key, anchor: float) -> None:
        """Make one value of the halves' own: their weighted mean, accumulated in fp32 at least."""
        uncond, cond = (self._values.pop((half, key)) for half in ("uncond", "cond"))
        accumulated = torch.promote_types(uncond.dtype, torch.float32) if uncond.itemsize > 1 else torch.float32
        mean = (1.0 - anchor) * uncond.to(accumulated) + anchor * cond.to(accumulated)
        limit = torch.finfo(uncond.dtype).max
        self._values[None, key] = mean.clamp(-limit, limit).to(uncond.dtype)
        self._layouts[key[0]] = "one"

    def fit(self, kind: Kind, *, guided: bool, keep: Half, order: tuple[Half, Half]) -> None:
        """Make the values of `kind` suit a step that is `guided`, or else keep those of the half `keep` alone.

        `order` is that of the halves where a value has both.

        Raises:
            UnsupportedModelError: they have been made without guidance, which is on now.
        """
        layout = self._layouts[kind]
        if guided and layout == "one":
            raise UnsupportedModelError(MSG_GUIDANCE_SWITCHED_ON)
        if guided or layout == "one":
            return
        for half, key in [address for address in self._values if address[1][0] == kind]:
            value = self._values.pop((half, key))
            if half in (None, keep):
                self._values[None, key] = value.chunk(2)[order.index(keep)] if layout == "both" else value
        self._layouts[kind] = "one"

    def values(self, half: Half | None) -> Mapping[Key, torch.Tensor]:
        """What a call of one `half`, of both or of no guidance (None), can use."""
        return {key: value for (owner, key), value in self._values.items() if owner is None or owner == half}

    def clear(self) -> None:
        """Free them all."""
        self._values.clear()


def layout_of(phase: Phase, emission: Emission, half: Half | None) -> Layout:
    if half is not None:
        return "separate"
    return "both" if phase.guided and not emission.merged else "one"


def batch_ratio(batch: torch.Size, sample: torch.Size) -> float:
    """How many latents the denoiser sees, of shape `batch`, for each that the scheduler steps, of shape `sample`."""
    ratio = batch[0] / max(sample[0], 1)
    if ratio not in (1, 2) and len(batch) != len(sample):  # a video whose frames are steps of their own
        return batch.numel() / max(sample.numel(), 1)
    return ratio
