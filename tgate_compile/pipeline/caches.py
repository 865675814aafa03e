"""The cached values of a generation, and the calls that they can be used in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch

from tgate_compile._errors import INSTEAD, UnsupportedModelError
from tgate_compile.methods.method import Half, Kind, Phase, forecast_weights
from tgate_compile.methods.schedule import Schedule
from tgate_compile.passes.graphs import Emission

Key = tuple[Kind, str]
#: The layout of a value: both halves in one tensor, [2B, ...], a separate tensor for each half, or one, [B, ...].
Layout = Literal["both", "separate", "one"]

MSG_GUIDANCE_SWITCHED_ON = (
    "Guidance has been switched on in the middle of a generation, but the cached values were computed without it. "
    "Switch it on from the start. " + INSTEAD
)


#: The values of a site at several steps, newest first, each with its step.
Values = list[tuple[int, torch.Tensor]]


class Caches:
    """Cached values by kind and site. All sites of a kind have the layout of the step that computed them.

    Args:
        forecasts: the order of the forecast for each kind that is forecast. The values of the last `order + 1` steps
            are kept for it.
    """

    def __init__(self, forecasts: Mapping[Kind, int] | None = None) -> None:
        self._forecasts = dict(forecasts or {})
        self._values: dict[tuple[Half | None, Key], Values] = {}
        self._layouts: dict[Kind, Layout] = {}

    @property
    def nbytes(self) -> int:
        """The size of all values together, in bytes."""
        return sum(value.nbytes for values in self._values.values() for _, value in values)

    def put(self, key: Key, value: torch.Tensor, layout: Layout, half: Half | None = None, *, step: int = 0) -> None:
        """Store `value`, computed at `step`; `half` is the half that it belongs to, if the layout is `separate`."""
        kind = key[0]
        if self._layouts.get(kind, layout) != layout:
            self.drop(kind)
        self._layouts[kind] = layout
        older = [pair for pair in self._values.get((half, key), []) if pair[0] != step]
        self._values[half, key] = [(step, value), *older[: self._forecasts.get(kind, 0)]]

    def keep(
        self,
        emissions: Sequence[Emission],
        values: Sequence[torch.Tensor],
        phase: Phase,
        half: Half | None,
        step: int,
        kinds: Collection[Kind],
    ) -> None:
        """Store the values of `kinds` that a graph has emitted in a `step` of `phase`, or in its call for one half."""
        self.keep_only(kinds, {(emission.site.kind, emission.site.name) for emission in emissions})
        for emission, value in zip(emissions, values, strict=True):
            kind = emission.site.kind
            wanted = phase.merge if emission.merged else phase.emit
            if kind in kinds and kind in (wanted if half is None else phase.emit | phase.merge):
                self.put((kind, emission.site.name), value, layout_of(phase, emission, half), half, step=step)

    def keep_only(self, kinds: Collection[Kind], keys: Collection[Key]) -> None:
        """Free the values of `kinds` except those of `keys`."""
        others = [address for address in self._values if address[1][0] in kinds and address[1] not in keys]
        for address in others:
            del self._values[address]

    def merge_halves(self, anchor: float) -> None:
        """Change the layout of values whose batch has turned out to have both halves, and merge cross-attentions'."""
        for kind, layout in list(self._layouts.items()):
            if layout != "one":
                continue
            self._layouts[kind] = "both"
            if kind == "cross":
                for _, key in [address for address in self._values if address[1][0] == kind]:
                    pairs = [(step, value.chunk(2)) for step, value in self._values.pop((None, key))]
                    for position, half in enumerate(_HALVES):
                        self._values[half, key] = [(step, pair[position]) for step, pair in pairs]
                    self.merge(key, anchor)

    def merge(self, key: Key, anchor: float) -> None:
        """Replace the halves' values with the weighted mean, accumulated in at least fp32."""
        # Only the newest values: what is merged stays as it is from then on, even if it has been forecast before.
        uncond, cond = (self._values.pop((half, key))[:1] for half in _HALVES)
        self._layouts[key[0]] = "one"
        if anchor in (0.0, 1.0):  # the halves may have texts of different lengths
            self._values[None, key] = cond if anchor else uncond
            return
        weights = (1.0 - anchor, anchor)
        self._values[None, key] = [
            (step, _weighted_sum((first, second), weights))
            for (step, first), (_, second) in zip(uncond, cond, strict=True)
        ]

    def fit(self, kind: Kind, *, guided: bool, keep: Half, order: tuple[Half, Half]) -> None:
        """Prepare the values of `kind` for a step: unless it is `guided`, reduce them to those of the half `keep`.

        `order` is the order of the halves in a value that has both. A model may have no values of a kind.

        Raises:
            UnsupportedModelError: the values were computed without guidance, but the step is guided.
        """
        layout = self._layouts.get(kind)
        if guided and layout == "one":
            raise UnsupportedModelError(MSG_GUIDANCE_SWITCHED_ON)
        if guided or layout in ("one", None):
            return
        for half, key in [address for address in self._values if address[1][0] == kind]:
            values = self._values.pop((half, key))
            if half in (None, keep):
                part = order.index(keep)
                self._values[None, key] = (
                    [(step, value.chunk(2)[part]) for step, value in values] if layout == "both" else values
                )
        self._layouts[kind] = "one"

    def restart(self) -> None:
        """Forget the values that forecasts are made from, at a gate: the denoiser is another one from then on.

        Of cross-attention, the newest values stay, which the gate freezes: they are reused as they are.
        """
        for kind in self._forecasts:
            if kind != "cross":
                self.drop(kind)
        for address, values in self._values.items():
            if address[1][0] in self._forecasts:
                del values[1:]

    def has(self, kind: Kind) -> bool:
        """Return whether there are values of `kind`."""
        return any(key[0] == kind for _, key in self._values)

    def drop(self, kind: Kind) -> None:
        """Free the values of `kind`."""
        self._values = {address: values for address, values in self._values.items() if address[1][0] != kind}

    def values(self, half: Half | None, kinds: Collection[Kind], step: int) -> Mapping[Key, torch.Tensor]:
        """Return the values of `kinds` for a call of one `half` at `step`, forecast from those of earlier steps.

        A `half` of None stands for a call of both, or without guidance.
        """
        return {
            key: _forecast(values, step)
            for (owner, key), values in self._values.items()
            if key[0] in kinds and (owner is None or owner == half)
        }

    def clear(self) -> None:
        """Free all values."""
        self._values.clear()


_HALVES: tuple[Half, Half] = ("uncond", "cond")


class CacheSizes:
    """The sizes of the caches of a generation that has not run.

    Args:
        schedule: the schedule.
        num_steps: the number of steps, for each of which `put` is called in order.

    Attributes:
        most: the largest size of all values together so far, in bytes.
    """

    def __init__(self, schedule: Schedule, num_steps: int) -> None:
        self._forecasts = schedule.forecasts
        self._gate = schedule.gate(num_steps)
        self._step = -1
        # For each kind: whether its values have both halves and which sites they have, and the sizes, newest first.
        self._held: dict[Kind, tuple[tuple[bool, set[str]], list[int]]] = {}
        self.most = 0

    def put(self, phase: Phase, emitted: Sequence[Emission], half: Half | None) -> None:
        """Add what the next step, of `phase`, keeps; `half` is the half of its first call, if it makes two."""
        self._step += 1
        if self._step == self._gate:
            for kind in self._forecasts.keys() & self._held.keys():
                form, sizes = self._held[kind]
                self._held[kind] = form, sizes[:1] if kind == "cross" else []
        for kind in phase.emit | phase.merge:
            of_kind = [emission for emission in emitted if emission.site.kind == kind]
            size = sum(e.nbytes for e in of_kind if half or e.merged == (kind in phase.merge))
            form = phase.guided and kind not in phase.merge, {e.site.name for e in of_kind}
            older = self._held[kind][1] if kind in self._held and self._held[kind][0] == form else []
            older = older[: self._forecasts.get(kind, 0)]
            self._held[kind] = form, [2 * size if half and kind in phase.emit else size, *older]
        self.most = max(self.most, sum(sum(sizes) for _, sizes in self._held.values()))


def _forecast(values: Values, step: int) -> torch.Tensor:
    if len(values) == 1:
        return values[0][1]
    weights = forecast_weights([computed for computed, _ in values], step)
    return _weighted_sum([value for _, value in values], weights)


def _weighted_sum(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted sum of values of one dtype in that dtype, without overflow, accumulated in at least fp32."""
    dtype = values[0].dtype
    accumulated = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    total = weights[0] * values[0].to(accumulated)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + weight * value.to(accumulated)
    limit = torch.finfo(dtype).max
    return total.clamp_(-limit, limit).to(dtype)


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


MSG_NO_FREQUENCIES = (
    "FasterCache estimates predictions by their spatial frequencies, so they must be images [batch, channels, height, "
    "width] or videos with height and width last, but {model} returns {given}. Leave FasterCache out."
)
MSG_COND_FIRST = (
    "FasterCache computes the prompt's half only, but this pipeline calls the denoiser for the other half first, so "
    "that half cannot be estimated. Leave FasterCache out."
)


class Estimates:
    """Estimates the unconditional prediction from the cond half's at steps that compute only the latter (FasterCache).

    The difference between the halves' last predictions is kept in fp32, split into low and high spatial frequencies.

    Args:
        schedule: the schedule; without an estimating method, nothing is kept.
        calls: the order of the halves if each has its own denoiser call.
        model: the name of the denoiser in messages.
    """

    def __init__(self, schedule: Schedule, calls: Sequence[Half], model: str) -> None:
        self._method = schedule.estimating
        self._calls = calls
        self._model = model
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = None  # low and high frequencies: second half - first
        self._weights = (1.0, 1.0)

    @property
    def ready(self) -> bool:
        """Whether the predictions of both halves are known."""
        return self._parts is not None

    def clear(self) -> None:
        """Forget the predictions."""
        self._parts = None

    def keep_both(self, outputs: Sequence[torch.Tensor]) -> None:
        """Keep what the denoiser has returned for a batch of both halves; raises what `keep` raises."""
        if self._method is not None:
            self.keep(*zip(*(torch.tensor_split(output, 2) for output in outputs), strict=True))

    def keep(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
        """Keep what the denoiser has returned for the two halves, in the order of a batch of both.

        Raises:
            UnsupportedModelError: the predictions cannot be split by frequency, or the half that is left out at
                estimated steps is the first to be called.
        """
        if self._method is None:
            return
        if self._calls and self._calls[0] != "cond":
            raise UnsupportedModelError(MSG_COND_FIRST)
        if len(first) != 1 or first[0].ndim not in (4, 5):
            given = " and ".join(str(list(output.shape)) for output in first)
            raise UnsupportedModelError(MSG_NO_FREQUENCIES.format(model=self._model, given=given))
        difference = second[0].float() - first[0].float()
        low = _low_frequencies(difference)
        self._parts = low, difference - low
        self._weights = (1.0, 1.0)

    def uncond(
        self, cond: Sequence[torch.Tensor], step: int, num_steps: int, order: tuple[Half, Half]
    ) -> list[torch.Tensor]:
        """Return an estimate of the unconditional prediction at `step`, whose prediction for the prompt is `cond`.

        `order` is the order of the halves in a batch of both.
        """
        assert self._method is not None
        assert self._parts is not None
        weights = self._method.frequency_weights(step, num_steps)
        low, high = self._weights = (self._weights[0] * weights[0], self._weights[1] * weights[1])
        difference = low * self._parts[0] + high * self._parts[1]
        sign = 1.0 if order[0] == "cond" else -1.0
        return [(cond[0].float() + sign * difference).to(cond[0].dtype)]

    def both(
        self, cond: Sequence[torch.Tensor], step: int, num_steps: int, order: tuple[Half, Half]
    ) -> list[torch.Tensor]:
        """Return the predictions for both halves at `step` as one batch; the arguments are those of `uncond`."""
        uncond = self.uncond(cond, step, num_steps, order)
        halves: Mapping[Half, Sequence[torch.Tensor]] = {"uncond": uncond, "cond": cond}
        return [torch.cat(pair) for pair in zip(*(halves[half] for half in order), strict=True)]


def _low_frequencies(value: torch.Tensor) -> torch.Tensor:
    """Return the part of `value`, [..., height, width], with spatial frequencies up to a fifth of the shorter side."""
    height, width = value.shape[-2:]
    # The distances from frequency zero, which is in the middle after the shift.
    rows = torch.arange(height, device=value.device)[:, None] - height // 2
    columns = torch.arange(width, device=value.device) - width // 2
    is_low = rows**2 + columns**2 <= (min(height, width) // 5) ** 2
    shifted = torch.fft.fftshift(torch.fft.fft2(value), dim=(-2, -1))
    low: torch.Tensor = torch.fft.ifft2(torch.fft.ifftshift(shifted * is_low, dim=(-2, -1))).real
    return low
