"""What a command runs with: steps, guidance and schedule, as given or as the model needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tgate_compile._cli.console import ERR, make_progress, print_note
from tgate_compile.methods.schedule import Schedule

if TYPE_CHECKING:
    from tgate_compile._cli.loading import Loaded
    from tgate_compile._cli.options import Image, Loading, ScheduleOptions

MSG_NEVER_GATED = (
    "Gate step {gate} is at or beyond the last of {steps} steps, so that nothing is gated. "
    "Give a smaller --gate-step, or --no-tgate."
)


@dataclass(frozen=True)
class Settings:
    """Of one generation.

    Attributes:
        steps: denoising steps.
        guidance: guidance scale.
        gate_step: as `optimize` takes it.
        gate: the first gated step.
    """

    steps: int
    guidance: float
    gate_step: int | float
    gate: int


def settings_for(
    loaded: Loaded, *, steps: int | None, guidance: float | None, gate_step: float | None, tgate: bool = True
) -> Settings:
    """What is None is the family's; its gate moves along with the number of steps."""
    family = loaded.family
    chosen_steps = family.steps if steps is None else steps
    if gate_step is None:
        gate_step = max(1, round(chosen_steps * family.gate_step / family.steps))
    gate = Schedule(gate_step).gate(chosen_steps)
    if tgate and gate >= chosen_steps:
        print_note(MSG_NEVER_GATED.format(gate=gate, steps=chosen_steps))
    return Settings(chosen_steps, family.guidance if guidance is None else guidance, gate_step, gate)


def schedule_for(
    loaded: Loaded, options: ScheduleOptions, settings: Settings, size: Mapping[str, int], *, shown: bool
) -> Schedule:
    """The schedule of the options, measured on the model for `--gate-step auto`.

    Args:
        loaded: the model, plain.
        options: as they were given.
        settings: of the generations to come, whose gate is the family's unless one is given.
        size: height and width, as far as they are given.
        shown: whether to show the progress of a measurement.
    """
    if not options.is_automatic:
        return options.schedule(settings.gate_step)
    from tgate_compile._cli.loading import demo_prompts
    from tgate_compile.engine.config import AUTO_PROMPTS
    from tgate_compile.study.tuning.search import tune

    prompts = demo_prompts(len(AUTO_PROMPTS)) if loaded.is_embedded else list(AUTO_PROMPTS)
    with make_progress(shown=shown) as progress:
        bar = progress.add_task("Measuring schedules", total=None)
        return tune(
            loaded.pipe,
            prompts,
            num_inference_steps=settings.steps,
            call={**loaded.call, "guidance_scale": settings.guidance, **size},
            progress=lambda done, total, what: progress.update(
                bar, completed=done, total=total, description=f"Measuring schedules: {what}"
            ),
        ).schedule


def chosen_for(
    loaded: Loaded, loading: Loading, image: Image, options: ScheduleOptions, *, shown: bool
) -> tuple[Settings, Schedule]:
    """The settings and the schedule of a command's generations. What the user has not given is printed.

    Args:
        loaded: the model, plain.
        loading: the options that it was loaded with.
        image: the options for images.
        options: the options for the schedule.
        shown: whether to show the progress of a measurement.
    """
    gate_step = None if options.is_automatic else options.gate_step
    settings = settings_for(loaded, steps=image.steps, guidance=image.guidance, gate_step=gate_step, tgate=False)
    schedule = schedule_for(loaded, options, settings, image.size, shown=shown)
    gate = schedule.gate(settings.steps)
    if schedule.gate_step is not None and gate >= settings.steps:
        print_note(MSG_NEVER_GATED.format(gate=gate, steps=settings.steps))
    print_chosen(loaded, loading, image, settings, None if options.is_chosen_by_user else schedule)
    return settings, schedule


def print_chosen(
    loaded: Loaded, loading: Loading, image: Image, settings: Settings, schedule: Schedule | None = None
) -> None:
    """One line on stderr with what the user has left open, and what was taken."""
    given: dict[str, Any] = {**loading.arguments(), "steps": image.steps, "guidance": image.guidance}
    chosen = {
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "scheduler": type(loaded.pipe.scheduler).__name__,
        "steps": settings.steps,
        "guidance": f"{settings.guidance:g}",
    }
    taken = [f"{name} {value}" for name, value in chosen.items() if given[name] in (None, "auto")]
    taken += [str(schedule)] if schedule is not None else []
    if taken:
        ERR.print(f"[dim]Chosen for {loaded.source} ({loaded.family.name}): {', '.join(taken)}[/]", soft_wrap=True)
