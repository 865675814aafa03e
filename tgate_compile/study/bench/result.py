"""The results of a benchmark, as plain data, and which of its times are reliable on a machine that may be busy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

FORMAT = "tgate_compile.benchmark"
VERSION = 1

#: How far the median of several times may exceed the shortest, as a fraction of the shortest. Beyond that, most of the
#: runs were disturbed.
MOST_SPREAD = 0.25
#: The largest credible speedup of a schedule over the plain pipeline on the same backend, relative to the saving in
#: counted operations. It exceeds 1 because a schedule also saves operations that are not counted (the matrix products
#: inside attention, elementwise operations) and fixed costs per step.
MOST_GAIN = 2.0
#: The same if the backend itself is also faster than the plain pipeline.
MOST_GAIN_OF_BACKEND = 8.0

MSG_SPREAD = "{whose} times range from {least:.3g} s to {most:.3g} s, with a median of {median:.3g} s"
MSG_GAIN = (
    "{speedup:.2f} times as fast at {cost:.2f} of the operations is more than the saved operations can explain; "
    "something else must have slowed the plain pipeline down"
)


def spread_of(seconds: Sequence[float]) -> float | None:
    """Return how far the median of `seconds` exceeds the shortest, as a fraction of it; None for fewer than two."""
    return median(seconds) / min(seconds) - 1 if len(seconds) > 1 else None


def why_unreliable(
    seconds: Sequence[float],
    reference: Sequence[float],
    *,
    speedup: float | None = None,
    cost: float | None = None,
    most_gain: float = MOST_GAIN,
) -> str | None:
    """Return why a comparison of `seconds` with `reference` is unreliable; None if it is reliable.

    Args:
        seconds: times of several runs of the same work.
        reference: times to compare with.
        speedup: time of the reference divided by the time of this work.
        cost: operations of this work divided by those of the reference.
        most_gain: the largest credible value of `speedup * cost`.
    """
    for whose, times in (("its", seconds), ("the plain pipeline's", reference)):
        spread = spread_of(times)
        if spread is not None and spread > MOST_SPREAD:
            return MSG_SPREAD.format(whose=whose, least=min(times), most=max(times), median=median(times))
    if speedup is not None and cost is not None and speedup * cost > most_gain:
        return MSG_GAIN.format(speedup=speedup, cost=cost)
    return None


@dataclass
class BenchmarkRow:
    """The measurements of one way to run the pipeline.

    Attributes:
        key: identifier for programs.
        title: name for people.
        backend: backend that runs the graphs; empty for a row without graphs.
        baseline: key of the plain row to compare with.
        error: the error that prevented measurements, if any.
        first_seconds: time of the first call, which includes capture and compilation. It is shorter if compiled code is
            found in a cache: of this machine, or of an earlier row.
        seconds: time of each later image.
        steps: times of the steps of each later image, in seconds.
        early: median time of a step before the gate, for each image.
        late: median time of a step after the gate, for each image.
        macs: multiply-accumulates of an image in the denoiser's linear and convolution layers; None if unknown.
        peak_bytes: peak memory, measured with an additional image: of torch's allocator on a GPU, increase of the
            process's memory on a CPU.
        cache_bytes: largest total size of the values kept from one step to the next, for this library's schedules.
        strip: one character per step, for this library's schedules.
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
        """The median time of an image in seconds."""
        return median(self.seconds) if self.seconds else None

    @property
    def extra(self) -> float | None:
        """The additional time of the first call in seconds."""
        return None if self.first_seconds is None or self.image is None else max(self.first_seconds - self.image, 0.0)


@dataclass(frozen=True)
class Benchmark:
    """All rows of one run, `plain` first.

    Attributes:
        setting: classes, dtype and versions of what ran.
        machine: hardware and versions.
        steps: number of denoising steps.
        gate: first gated step.
        rows: measurements, `plain` first.
    """

    setting: Mapping[str, str]
    machine: Mapping[str, str]
    steps: int
    gate: int
    rows: tuple[BenchmarkRow, ...]

    def speedup(self, row: BenchmarkRow, over: str = "plain") -> float | None:
        """Return the time of the row with the key `over` divided by the time of `row`."""
        other = next((each.image for each in self.rows if each.key == over), None)
        return None if other is None or row.image is None else other / row.image

    def macs_ratio(self, row: BenchmarkRow) -> float | None:
        """Return the operations of the plain pipeline divided by those of `row`."""
        plain = self.rows[0].macs
        return None if plain is None or not row.macs else plain / row.macs

    def efficiency(self, row: BenchmarkRow) -> float | None:
        """Return the speedup of `row` over its baseline divided by the ratio of the operations.

        1 means that time was saved in full proportion to the operations.
        """
        speedup, ratio = self.speedup(row, row.baseline), self.macs_ratio(row)
        return None if speedup is None or ratio is None or row.key == row.baseline else speedup / ratio

    def why_unreliable(self, row: BenchmarkRow) -> str | None:
        """Return why the times and speedups of `row` are unreliable; None if they are reliable."""
        if not row.seconds:
            return None
        baseline = next((each for each in self.rows if each.key == row.baseline), row)
        ratio = self.macs_ratio(row)
        # Unless the baseline runs on the same backend, the backend contributes to the gain.
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
        """Return plain data for JSON, with None for unreliable speedups."""
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
