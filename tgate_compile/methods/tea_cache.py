"""TeaCache: skip all blocks while the input of the first one, or the timestep, has changed little in total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, NamedTuple, get_args

import numpy as np

from tgate_compile._errors import ConfigurationError, did_you_mean
from tgate_compile.methods.decisions import Decider, Deciding, Rule, check_deciding
from tgate_compile.methods.method import Blocks, Kind, Timeline, ValueOfBlocks, checked_number, option


class Fitted(NamedTuple):
    """A polynomial that was fitted for a model: the measured value and the coefficients, highest power first."""

    measured: ValueOfBlocks
    coefficients: tuple[float, ...]


#: The polynomials that TeaCache's authors fitted (github.com/ali-vilab/TeaCache, folders TeaCache4FLUX, TeaCache4LTX-
#: Video, TeaCache4HunyuanVideo, TeaCache4Mochi, TeaCache4CogVideoX1.5 and TeaCache4Wan2.1 without `use_ret_steps`).
FITTED: Mapping[str, Fitted] = {
    "flux": Fitted("modulated input", (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)),
    "ltx-video": Fitted(
        "modulated input", (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03)
    ),
    "hunyuan-video": Fitted(
        "modulated input", (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02)
    ),
    "mochi": Fitted(
        "modulated input", (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03)
    ),
    "cogvideox-2b": Fitted(
        "time embedding", (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03)
    ),
    "cogvideox-5b": Fitted(
        "time embedding", (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)
    ),
    "wan2.1-t2v-1.3b": Fitted(
        "time embedding", (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01)
    ),
    "wan2.1-t2v-14b": Fitted(
        "time embedding", (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404)
    ),
    "wan2.1-i2v-14b-480p": Fitted(
        "time embedding", (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01)
    ),
    "wan2.1-i2v-14b-720p": Fitted(
        "time embedding", (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TeaCache(Deciding):
    """TeaCache (arXiv 2411.19108, section 3.3).

    Before the first block, the relative change of its normalized and modulated input since the previous step is
    measured, and rescaled by a polynomial that estimates the change of the model's output from it. While the sum of
    these estimates since the last computed step is below `threshold`, all blocks are skipped, and their last residual
    is added to the present input. The first and the last step are computed. For some models, the authors measure the
    embedding of the timestep instead.

    Attributes:
        threshold: the blocks are skipped while the accumulated change is below this.
        model: the model whose polynomial is used: flux, ltx-video, hunyuan-video, mochi, cogvideox-2b, cogvideox-5b,
            wan2.1-t2v-1.3b, wan2.1-t2v-14b, wan2.1-i2v-14b-480p or wan2.1-i2v-14b-720p.
        coefficients: instead of `model`: the coefficients of the polynomial, highest power first; (1, 0) uses the
            measured change itself. `tgate_compile.calibrate_tea_cache` fits them to a model.
        measured: the value whose change is measured, "modulated input" or "time embedding"; empty means that of
            `model`, or the modulated input.
        forecast: the order of the forecast: 0 reuses the last residual, 1 and 2 extrapolate it (TaylorSeer).
    """

    key: ClassVar[str] = "teacache"
    title: ClassVar[str] = "TeaCache"

    threshold: float = option(0.25, "Skip the blocks while the accumulated change is below this.")
    model: str = option("", f"The model whose polynomial is used: {', '.join(FITTED)}.")
    coefficients: tuple[float, ...] = option((), "The coefficients of another polynomial, highest power first.")
    measured: str = option("", 'The measured value, "modulated input" or "time embedding"; by default, the model\'s.')
    forecast: int = option(0, "The order of the forecast of skipped blocks: 0, 1 or 2.", least=0)

    def __post_init__(self) -> None:
        if not isinstance(self.coefficients, (list, tuple)) or bool(self.coefficients) == bool(self.model):
            raise ConfigurationError(
                "TeaCache needs either the model whose polynomial is used, one of "
                f"{', '.join(FITTED)}, or the coefficients of another one, such as (1, 0) for the measured change "
                f"itself, but got model={self.model!r} and coefficients={self.coefficients!r}. To fit a polynomial to "
                "your model, call tgate_compile.calibrate_tea_cache(pipe, prompts), which returns TeaCache with it."
            )
        if self.model and self.model not in FITTED:
            raise ConfigurationError(
                f"TeaCache has no polynomial for model={self.model!r}. It has those of {', '.join(FITTED)}."
                f"{did_you_mean(self.model, FITTED)}"
            )
        numbers = tuple(checked_number(number, "each of the coefficients") for number in self.coefficients)
        object.__setattr__(self, "coefficients", numbers)
        values = [value for value in get_args(ValueOfBlocks) if value != "residual"]
        if self.measured and self.measured not in values:
            raise ConfigurationError(f"measured must be one of {', '.join(values)}, but got {self.measured!r}.")
        check_deciding(self)

    @property
    def rule(self) -> Rule:
        coefficients = FITTED[self.model].coefficients if self.model else self.coefficients
        threshold = checked_number(self.threshold, "threshold")
        return Rule(threshold, coefficients=coefficients, accumulates=True, since="previous")

    @property
    def ranges(self) -> Mapping[Kind, Blocks]:
        fitted: ValueOfBlocks = FITTED[self.model].measured if self.model else "modulated input"
        return {"blocks": Blocks(0), "measured": Blocks(0, 1, self.measured or fitted)}  # type: ignore[arg-type]

    def must_compute(self, step: int, timeline: Timeline) -> bool:
        return step == timeline.num_steps - 1

    def __str__(self) -> str:
        polynomial = f"model {self.model}" if self.model else " ".join(f"{each:.4g}" for each in self.coefficients)
        chosen = [f"threshold {self.threshold:g}", polynomial if self.model else f"coefficients {polynomial}"]
        chosen += [self.measured] * bool(self.measured) + [f"forecast {self.forecast}"] * bool(self.forecast)
        return f"{self.title} ({', '.join(chosen)})"


#: What was recorded in a plain generation, or for one guidance half in it, at each step from the second one on: the
#: change of the measured value and that of the residual over the blocks.
Series = Sequence[tuple[float, float]]

#: The highest degree of a fitted polynomial, which is that of the authors' polynomials.
MAX_DEGREE = 4

#: A polynomial of a lower degree is preferred if its R² is at most this much lower.
_TOLERANCE = 0.01

#: The shares of the steps for which thresholds are reported.
_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class PolynomialFit(NamedTuple):
    """A polynomial that was fitted to recorded changes.

    Attributes:
        coefficients: the coefficients, highest power first.
        r_squared: the coefficient of determination (1: perfect, 0: no better than a constant) on points that the
            polynomial was not fitted to, see `fit_polynomial`.
    """

    coefficients: tuple[float, ...]
    r_squared: float


def fit_polynomial(groups: Sequence[Series]) -> PolynomialFit:
    """Fit a polynomial that estimates the change of the residual from that of the measured value, by least squares.

    The degree is chosen by cross-validation: each of the `groups`, which should be different generations, is estimated
    from the others; if there is only one, it is divided into five. A polynomial that is negative anywhere, or that
    decreases where changes were recorded or beyond, is not used, because blocks would then be skipped just where much
    changes. The simplest one, which multiplies the change by a number, is always possible.

    Raises:
        ConfigurationError: the changes cannot be used.
    """
    points = np.array([point for group in groups for point in group], dtype=np.float64).reshape(-1, 2)
    if len(points) < 2 or not np.isfinite(points).all() or not (points.max(axis=0) > 0).all():
        raise ConfigurationError(
            "A polynomial for TeaCache cannot be fitted to these changes: they must be at least 2, finite, and not all "
            f"zero, but got {len(points)}: {points[:5].tolist()}. Use more steps, and check that the pipeline makes "
            "images."
        )
    several = [np.array(group, dtype=np.float64) for group in groups if group]
    folds = (
        several if len(several) > 1 else [points[start :: min(5, len(points))] for start in range(min(5, len(points)))]
    )
    spread = ((points[:, 1] - points[:, 1].mean()) ** 2).sum()
    found: list[PolynomialFit] = []
    for degree in range(MAX_DEGREE + 1):  # 0 stands for a multiple of the change
        coefficients = _least_squares(points, degree)
        if coefficients is None or not _is_usable(coefficients, points[:, 0]):
            continue
        error = 0.0
        for held_out in range(len(folds)):
            others = np.concatenate([fold for index, fold in enumerate(folds) if index != held_out])
            own = _least_squares(others, degree)
            if own is None:
                break
            error += ((np.polyval(own, folds[held_out][:, 0]) - folds[held_out][:, 1]) ** 2).sum()
        else:
            r_squared = float(1.0 - error / spread) if spread else 0.0
            found.append(PolynomialFit(tuple(float(each) for each in coefficients), r_squared))
    best = max(fit.r_squared for fit in found)
    return next(fit for fit in found if fit.r_squared >= best - _TOLERANCE)


def _least_squares(points: np.ndarray[tuple[int, ...], np.dtype[np.float64]], degree: int) -> np.ndarray | None:
    """Return the coefficients of a polynomial; for degree 0, of a multiple. None if there are too few points."""
    x, y = points[:, 0], points[:, 1]
    if degree == 0:
        return np.array([(x @ y) / (x @ x), 0.0])
    if len(np.unique(x)) < 2 * (degree + 1):
        return None
    scale = x.max()  # so that the powers are of similar size
    coefficients, _, rank, _ = np.linalg.lstsq(np.vander(x / scale, degree + 1), y)
    return coefficients / scale ** np.arange(degree, -1, -1) if rank == degree + 1 else None


def _is_usable(coefficients: np.ndarray, changes: np.ndarray) -> bool:
    """Return whether the polynomial is never negative, and does not decrease from the smallest of `changes` on."""
    below = np.linspace(0.0, changes.min(), 100)
    beyond = np.geomspace(max(changes.min(), 1e-6 * changes.max()), 100.0 * changes.max(), 2000)
    values = np.polyval(coefficients, beyond)
    return bool(
        (np.polyval(coefficients, below) >= 0.0).all() and (values >= 0.0).all() and (np.diff(values) >= 0).all()
    )


def skipped_share(rule: Rule, series: Sequence[Series]) -> float:
    """Return the share of the steps that `rule` would have skipped, had the recorded changes remained the same.

    The first and the last step are computed.
    """
    skipped = 0
    for each in series:
        decider = Decider(rule)
        skipped += sum(decider.skips(measured) for measured, _ in each[:-1])
    return skipped / sum(len(each) + 1 for each in series)


def threshold_for(coefficients: tuple[float, ...], series: Sequence[Series], share: float) -> float:
    """Return the lowest threshold at which at least this share of the steps would have been skipped.

    Raises:
        ConfigurationError: there is none, because the first and the last step are always computed.
    """
    # A decision can only change where the threshold passes a sum of successive estimates.
    estimates = [[float(np.polyval(coefficients, measured)) for measured, _ in each[:-1]] for each in series]
    sums = sorted({total for each in estimates for start in range(len(each)) for total in accumulate(each[start:])})
    between = [(low + high) / 2 for low, high in pairwise(sums)] + [1.05 * total for total in sums[-1:]]
    candidates = between if len(between) <= 500 else [*between[:: len(between) // 500], between[-1]]
    for threshold in (float(f"{candidate:.4g}") for candidate in candidates):
        if skipped_share(Rule(threshold, coefficients=coefficients, accumulates=True), series) >= share:
            return threshold
    steps = min(len(each) + 1 for each in series)
    raise ConfigurationError(
        f"skip must be at most {(steps - 2) / steps:.2f} for {steps} steps, of which the first and the last are always "
        f"computed, but got {share:g}."
    )


def skipped_by_threshold(
    coefficients: tuple[float, ...], series: Sequence[Series], chosen: float
) -> dict[float, float]:
    """Return the share of the steps that would have been skipped, for the `chosen` threshold and some others."""
    most = min((len(each) - 1) / (len(each) + 1) for each in series)
    thresholds = {threshold_for(coefficients, series, share) for share in _SHARES if share <= most} | {chosen}
    rules = [Rule(threshold, coefficients=coefficients, accumulates=True) for threshold in sorted(thresholds)]
    return {rule.threshold: skipped_share(rule, series) for rule in rules}
