"""What a benchmark measured: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from tgate_compile.study.timings import MOST_GAIN, MOST_GAIN_OF_BACKEND, spread_of, why_unreliable

FORMAT = "tgate_compile.benchmark"
VERSION = 1


@dataclass
class Row:
    """One contender.

    Attributes:
        key: for programs.
        title: for people.
        backend: what runs its graphs; empty where it has none.
        baseline: the key of the plain row of the same kind.
        error: why there are no figures.
        first_seconds: of the first call: capture and compilation, too.
        seconds: of each later image.
        steps: seconds of each denoiser call of each later image, with what belongs to it.
        early: of a step before the gate: the median of each image.
        late: of a step after it.
        macs: multiply-accumulates of an image in the denoiser's linear and convolution layers; None if not known.
        peak_bytes: of memory in an image of its own: torch's own on a GPU, on a CPU what comes on top of the process's.
        cache_bytes: the most that is kept from one step to the next, of our own schedules.
        strip: one character a step, of our own schedules.
    """

    key: str
    title: str
    backend: str
    baseline: str
    error: str | None = None
    first_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    early: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    macs: float | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    strip: str = ""

    @property
    def image(self) -> float | None:
        """Seconds of an image: the median."""
        return median(self.seconds) if self.seconds else None

    @property
    def extra(self) -> float | None:
        """Seconds that the first call took longer."""
        return None if self.first_seconds is None or self.image is None else max(self.first_seconds - self.image, 0.0)


@dataclass(frozen=True)
class Benchmark:
    """All rows of one run, `plain` first.

    Attributes:
        setting: what ran: words by name.
        machine: on what.
        steps: denoising steps.
        gate: the first gated step.
        rows: the contenders.
    """

    setting: Mapping[str, str]
    machine: Mapping[str, str]
    steps: int
    gate: int
    rows: tuple[Row, ...]

    def speedup(self, row: Row, over: str = "plain") -> float | None:
        """The time of the row with the key `over`, divided by this row's."""
        other = next((each.image for each in self.rows if each.key == over), None)
        return None if other is None or row.image is None else other / row.image

    def macs_ratio(self, row: Row) -> float | None:
        """The plain pipeline's operations, divided by this row's."""
        plain = self.rows[0].macs
        return None if plain is None or not row.macs else plain / row.macs

    def efficiency(self, row: Row) -> float | None:
        """The speedup over the plain row of the same kind, divided by the ratio of the operations: 1 means that all
        that was saved in operations was saved in time."""
        speedup, ratio = self.speedup(row, row.baseline), self.macs_ratio(row)
        return None if speedup is None or ratio is None or row.key == row.baseline else speedup / ratio

    def why_unreliable(self, row: Row) -> str | None:
        """Why this row's times, and its speed-ups, should not be believed; None if nothing speaks against them."""
        if not row.seconds:
            return None
        baseline = next((each for each in self.rows if each.key == row.baseline), row)
        ratio = self.macs_ratio(row)
        # A baseline on the same backend; otherwise the backend has its part in the gain.
        same = row.baseline != "plain" or row.backend == "eager"
        reason = why_unreliable(
            row.seconds,
            baseline.seconds,
            speedup=self.speedup(row, row.baseline),
            cost=None if ratio is None else 1 / ratio,
            most_gain=MOST_GAIN if same else MOST_GAIN_OF_BACKEND,
        )
        return reason or why_unreliable(row.seconds, self.rows[0].seconds)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; speed-ups that are not reliable are None."""
        reasons = [self.why_unreliable(row) for row in self.rows]
        rows = [
            {name: value for name, value in asdict(row).items() if name != "steps"}
            | {
                "step_seconds": [median(times) for times in zip(*row.steps, strict=True)],
                "image_seconds": row.image,
                "first_call_extra_seconds": row.extra,
                "spread": spread_of(row.seconds),
                "unreliable": reason,
                "speedup": self.speedup(row) if reason is None else None,
                "speedup_over_baseline": self.speedup(row, row.baseline) if reason is None else None,
                "macs_ratio": self.macs_ratio(row),
                "efficiency": self.efficiency(row) if reason is None else None,
            }
            for row, reason in zip(self.rows, reasons, strict=True)
        ]
        head = {"format": FORMAT, "version": VERSION, "setting": dict(self.setting), "machine": dict(self.machine)}
        return head | {"steps": self.steps, "gate": self.gate, "rows": rows}
