"""The cached values of a generation, and the calls that they can be used in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from tgate_compile._errors import INSTEAD, UnsupportedModelError
from tgate_compile.methods.method import Half, Kind, Phase
from tgate_compile.passes.graphs import Emission

Key = tuple[Kind, str]
#: The layout of a value: both halves in one tensor, [2B, ...], a separate tensor for each half, or one, [B, ...].
Layout = Literal["both", "separate", "one"]

MSG_GUIDANCE_SWITCHED_ON = (
    "Guidance has been switched on in the middle of a generation, but the cached values were computed without it. "
    "Switch it on from the start. " + INSTEAD
)


class Caches:
    """Cached values by kind and site. All sites of a kind have the layout of the step that computed them."""

    def __init__(self) -> None:
        self._values: dict[tuple[Half | None, Key], torch.Tensor] = {}
        self._layouts: dict[Kind, Layout] = {}

    @property
    def nbytes(self) -> int:
        """The size of all values together, in bytes."""
        return sum(value.nbytes for value in self._values.values())

    def put(self, key: Key, value: torch.Tensor, layout: Layout, half: Half | None = None) -> None:
        """Store `value`; `half` is the half that it belongs to, if the layout is `separate`."""
        self._values[half, key] = value
        self._layouts[key[0]] = layout

    def merge_halves(self, anchor: float) -> None:
        """Change the layout of values whose batch has turned out to have both halves, and merge cross-attentions'."""
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
        """Replace the halves' values with the weighted mean, accumulated in at least fp32."""
        uncond, cond = (self._values.pop((half, key)) for half in ("uncond", "cond"))
        self._layouts[key[0]] = "one"
        if anchor in (0.0, 1.0):  # the halves may have texts of different lengths
            self._values[None, key] = cond if anchor else uncond
            return
        accumulated = torch.promote_types(uncond.dtype, torch.float32) if uncond.itemsize > 1 else torch.float32
        mean = (1.0 - anchor) * uncond.to(accumulated) + anchor * cond.to(accumulated)
        limit = torch.finfo(uncond.dtype).max
        self._values[None, key] = mean.clamp(-limit, limit).to(uncond.dtype)

    def fit(self, kind: Kind, *, guided: bool, keep: Half, order: tuple[Half, Half]) -> None:
        """Prepare the values of `kind` for a step: unless it is `guided`, reduce them to those of the half `keep`.

        `order` is the order of the halves in a value that has both.

        Raises:
            UnsupportedModelError: the values were computed without guidance, but the step is guided.
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

    def has(self, kind: Kind) -> bool:
        """Return whether there are values of `kind`."""
        return any(key[0] == kind for _, key in self._values)

    def drop(self, kind: Kind) -> None:
        """Free the values of `kind`."""
        self._values = {address: value for address, value in self._values.items() if address[1][0] != kind}

    def values(self, half: Half | None) -> Mapping[Key, torch.Tensor]:
        """Return the values for a call of one `half`; None stands for a call of both, or without guidance."""
        return {key: value for (owner, key), value in self._values.items() if owner is None or owner == half}

    def clear(self) -> None:
        """Free all values."""
        self._values.clear()


def layout_of(phase: Phase, emission: Emission, half: Half | None) -> Layout:
    """Return the layout of an emitted value in a call of `phase` for `half`, or for both or no guidance (None)."""
    if half is not None:
        return "separate"
    return "both" if phase.guided and not emission.merged else "one"


def batch_ratio(batch: torch.Size, sample: torch.Size) -> float:
    """Return how many latents the denoiser sees (shape `batch`) for each latent of the scheduler (shape `sample`)."""
    ratio = batch[0] / max(sample[0], 1)
    if ratio not in (1, 2) and len(batch) != len(sample):  # the scheduler steps the frames of a video separately
        return batch.numel() / max(sample.numel(), 1)
    return ratio
