"""TeaCache: skip all blocks while the input of the first one, or the timestep, has changed little in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

from tgate_compile._errors import ConfigurationError, did_you_mean
from tgate_compile.methods.decisions import Deciding, Rule, check_deciding
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
            measured change itself.
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
                f"itself, but got model={self.model!r} and coefficients={self.coefficients!r}."
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
