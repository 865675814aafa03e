"""What an analysis has found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile._analysis.attentions import Attentions
from tgate_compile._analysis.curves import Curve
from tgate_compile._analysis.plot import draw_analysis, draw_pictures
from tgate_compile._errors import ConfigurationError
from tgate_compile._schedule import Kind

if TYPE_CHECKING:
    from PIL.Image import Image

MSG_NO_PICTURES = "This analysis has no pictures. Call analyze(..., pictures=True)."
MSG_NOT_WRITTEN = "The analysis cannot be written to {path}: {reason}."


@dataclass(frozen=True)
class Trajectories:
    """Generations that have their text in a part of the steps only, from the same noise as S, which has it in all.

    Source: arXiv 2404.02747 v1, figure 3.

    Attributes:
        text_first: S^F_m by m: the null text from step m on. Drift ||x - S|| / ||S|| of the final latents.
        text_last: S^L_m by m: the null text before step m.
    """

    text_first: Curve
    text_last: Curve


@dataclass(frozen=True)
class Analysis:
    """What `analyze` returns; printing it says the gist, `save` writes JSON, `plot` draws it.

    Attributes:
        kinds: the convergence of the cross-attentions, and of the self-attentions, by kind.
        trajectories: what the text still does after some steps; None if that could not be measured.
        gate: the first step from which on the cross-attentions' mean change stays close to its floor: within a fraction
            `converged_within` of the way from its smallest value to its largest; None if it never does. It says when a
            cache would be current, not what reusing it does to the images: `tune` measures that.
        converged_within: see `gate`.
        num_inference_steps: as passed to the pipeline's call.
        num_steps: how many the call really makes.
        prompts: as given, if they were.
        seeds: the noise of each prompt.
        call: further arguments of the call, described.
        setting: the classes of pipeline, denoiser and scheduler, device, dtype, versions.
        remarks: what else should be known.
        pictures: of the first prompt, by "S", "S^F_10", "S^L_10", ...; empty unless asked for.
    """

    kinds: Mapping[Kind, Attentions]
    trajectories: Trajectories | None
    gate: int | None
    converged_within: float
    num_inference_steps: int
    num_steps: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, str]
    setting: Mapping[str, str]
    remarks: tuple[str, ...]
    pictures: Mapping[str, Image] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; without the pictures."""
        trajectories = None if self.trajectories is None else asdict(self.trajectories)
        others = {
            name: value for name, value in vars(self).items() if name not in ("kinds", "trajectories", "pictures")
        }
        kinds = {kind: asdict(attentions) for kind, attentions in self.kinds.items()}
        return {**others, "kinds": kinds, "trajectories": trajectories}

    def save(self, path: str | Path) -> None:
        """Write everything but the pictures as JSON.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(MSG_NOT_WRITTEN.format(path=path, reason=error.strerror or error)) from error

    def plot(self, path: str | Path) -> None:
        """Draw the convergence, the norms and the trajectories to a .png, .svg or .pdf file.

        Raises:
            ConfigurationError: matplotlib is not installed (`pip install 'tgate_compile[plots]'`), or the file cannot
                be written.
        """
        draw_analysis(self, path)

    def plot_pictures(self, path: str | Path) -> None:
        """Draw the first prompt's images with text in a part of the steps to a .png, .svg or .pdf file.

        Raises:
            ConfigurationError: there are none, matplotlib is not installed, or the file cannot be written.
        """
        if not self.pictures:
            raise ConfigurationError(MSG_NO_PICTURES)
        draw_pictures(self.pictures, self.prompts[0] if self.prompts else "", path)

    def __str__(self) -> str:
        images = max(1, len(self.prompts)) * len(self.seeds)
        lines = [
            f"{self.setting['pipeline']}, {self.num_steps} steps of {self.setting['scheduler']}, {images} "
            f"image{'s' if images > 1 else ''}",
            self.gist,
        ]
        for kind, attentions in self.kinds.items():
            changes = attentions.relative
            shown = ", ".join(f"{s}: {m:.3f}" for s, m in zip(changes.steps, changes.mean, strict=True))
            lines.append(f"{kind}-attention, relative change at step {shown}")
        if self.trajectories is not None:
            for name, curve in (("S^F", self.trajectories.text_first), ("S^L", self.trajectories.text_last)):
                shown = ", ".join(f"{m}: {d:.3f}" for m, d in zip(curve.steps, curve.mean, strict=True))
                lines.append(f"{name}_m, drift from S by m {shown}")
        return "\n".join([*lines, *self.remarks])

    @property
    def gist(self) -> str:
        """What the convergence suggests, in a sentence."""
        if self.gate is None:
            return (
                "The cross-attentions do not converge: their change does not stay within "
                f"{self.converged_within:g} of the way from its smallest to its largest value."
            )
        return (
            f"From step {self.gate} on the cross-attentions' change stays close to its floor, which suggests gate step "
            f"{self.gate}. `tune` says what that does to the images."
        )
