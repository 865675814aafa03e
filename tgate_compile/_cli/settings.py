"""The settings of a command: steps, guidance and schedule, as given or with the defaults of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tgate_compile._cli.console import ERR, make_progress, print_note
from tgate_compile._cli.options import SCHEDULE, Keep, parse_gate_step
from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import Method, methods, options_of
from tgate_compile.methods.schedule import IN_SHORT, Schedule
from tgate_compile.methods.schedule_file import load_schedule
from tgate_compile.study.bench.methods import ComparedMethod

if TYPE_CHECKING:
    from tgate_compile._cli.loading import Loaded
    from tgate_compile._cli.options import Image, Loading

MSG_NEVER_GATED = (
    "Gate step {gate} is at or beyond the last of {steps} steps, so nothing is gated. "
    "Give a smaller --gate-step, or --no-tgate."
)


@dataclass(frozen=True)
class Settings:
    """The settings of one generation.

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
    """Return the settings, with the family's defaults for None; the default gate scales with the number of steps."""
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
    """Return the schedule of the options, measured on the model for `--gate-step auto`.

    Args:
        loaded: the model, plain.
        options: the options for the schedule.
        settings: the settings of the generations, whose gate is the family's unless one is given.
        size: height and width, if given.
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
            call={**loaded.call, **loaded.guided(settings.guidance), **size},
            progress=lambda done, total, what: progress.update(
                bar, completed=done, total=total, description=f"Measuring schedules: {what}"
            ),
        ).schedule


def chosen_for(
    loaded: Loaded, loading: Loading, image: Image, options: ScheduleOptions, *, shown: bool
) -> tuple[Settings, Schedule]:
    """Return the settings and the schedule of a command, and print those that the user has not given.

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
    """Print the values chosen for settings that the user has not given, in one line on stderr."""
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
        name = loaded.family.name
        family = "" if name == loaded.source.replace(":", " ") else f" ({name})"
        ERR.print(f"[dim]Chosen for {loaded.source}{family}: {', '.join(taken)}[/]", soft_wrap=True)


AUTO = "auto"


MSG_FILE_ALONE = "--schedule gives the whole schedule. Leave out {given}, or leave out --schedule."


MSG_AUTO_ALONE = "--gate-step auto chooses the whole schedule. Leave out {given}, or give a number of steps."


MSG_NO_MODEL = (
    "--gate-step auto measures schedules on a model, but this command does not load one. Find a schedule with "
    "`tgate-compile tune --out schedule.json`, and pass it as --schedule."
)


MSG_SIMILARITY = (
    "With a guidance similarity, the step at which guidance stops is known only while images are made. Use "
    "--guidance-step or --gate-step instead."
)


#: The methods for which `Schedule` has no fields, by key; their options are `--KEY-FIELD`.
_FURTHER: dict[str, type[Method]] = {key: kind for key, kind in methods().items() if kind not in IN_SHORT}


#: Methods that run without a gate unless one is given.
_ALONE = {"guidance_step", "guidance_similarity", "deepcache_interval", *_FURTHER}


MSG_TWICE = "Two schedule files are called {name!r}. Give them different names."


#: For commands that compare several schedules.
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--schedule",
        metavar="FILE",
        help="A schedule file to add to the comparison; repeatable.",
        rich_help_panel=SCHEDULE,
    ),
]


def parse_gate_step_or_auto(text: object) -> float | str:
    """Parse a gate step, or `auto`."""
    return AUTO if str(text) == AUTO else parse_gate_step(text)


@dataclass(frozen=True, kw_only=True)
class _ShortOptions:
    """The options that are fields of `Schedule`, and the schedule that all options define."""

    gate_step: Annotated[
        Any,
        typer.Option(
            "--gate-step",
            "-g",
            parser=parse_gate_step_or_auto,
            metavar="N",
            help="Steps to run in full: a number (10), a fraction of the steps (0.4), or auto, which measures "
            "schedules on a few prompts and uses the cheapest that is close enough.",
            show_default="the model's, unless another method is chosen",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    sp_interval: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compute self-attention only every N steps before the gate.",
            show_default="1",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    fi_interval: Annotated[
        int | None, typer.Option(min=1, help="The same after the gate.", show_default="1", rich_help_panel=SCHEDULE)
    ] = None
    warm_up: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps before --sp-interval takes effect.", show_default="2", rich_help_panel=SCHEDULE
        ),
    ] = None
    deepcache_interval: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compute a UNet's deep part only every N steps.",
            show_default="1",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    deepcache_branch: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The skip connection at which the deep part begins.",
            show_default="0",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    guidance_step: Annotated[
        float | None,
        typer.Option(
            parser=parse_gate_step,
            metavar="N",
            help="Steps with guidance: a number, or a fraction of the steps.",
            show_default="all",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    guidance_similarity: Annotated[
        float | None,
        typer.Option(
            help="Stop guidance when the two predictions are this similar, such as 0.991.",
            show_default="off",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    keep: Annotated[
        Keep | None,
        typer.Option(
            "--keep",
            help="The guidance half that continues once guidance has stopped.",
            show_default="the paper's",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    anchor_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the conditional half in the values cached at the gate.",
            show_default="0.5, the paper's",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    text_interval: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Recompute cross-attention, or the text in joint attention, at every n-th step after the gate.",
            show_default="never",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option("--schedule", help="A schedule file, instead of these options.", rich_help_panel=SCHEDULE),
    ] = None

    def __post_init__(self) -> None:
        others = [name for name in self.given if name != "gate_step"]
        if self.file is not None and self.given:
            raise ConfigurationError(MSG_FILE_ALONE.format(given=_options(self.given)))
        if self.is_automatic and others:
            raise ConfigurationError(MSG_AUTO_ALONE.format(given=_options(others)))
        if self.is_chosen_by_user:
            self.schedule(0.5)  # raises errors before anything is loaded

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name != "file")
        plain = ((name, value.value if isinstance(value, Keep) else value) for name, value in values)
        return {name: value for name, value in plain if value is not None}

    @property
    def others(self) -> tuple[Method, ...]:
        """The further methods for which any option was given."""
        given = self.given
        return tuple(
            kind(**{field.name: given[name] for name, field in options_of(kind).items() if name in given})
            for kind in _FURTHER.values()
            if any(name in given for name in options_of(kind))
        )

    @property
    def is_automatic(self) -> bool:
        """Whether the schedule is to be found by measuring."""
        return bool(self.gate_step == AUTO)

    @property
    def is_chosen_by_user(self) -> bool:
        """Whether the schedule needs no default and no measurement."""
        return self.file is not None or (bool(self.given) and not self.is_automatic)

    def check_known_in_advance(self) -> None:
        """Raise ConfigurationError if the phases of the steps are known only while they run."""
        similarity = self.guidance_similarity if self.file is None else load_schedule(self.file).guidance_similarity
        if similarity is not None:
            raise ConfigurationError(MSG_SIMILARITY)

    def schedule(self, default_gate: float | None) -> Schedule:
        """Return the schedule in the file, or the one that the options define.

        Args:
            default_gate: the gate step if neither a gate step nor another method is given; None: no gate.

        Raises:
            ConfigurationError: the file or the options do not define a valid schedule, or it has to be measured.
        """
        if self.file is not None:
            return load_schedule(self.file)
        if self.is_automatic:
            raise ConfigurationError(MSG_NO_MODEL)
        short = {name: value for name, value in self.given.items() if name in Schedule.__dataclass_fields__}
        gate = default_gate if _ALONE.isdisjoint(short) and not self.others else None
        return Schedule(**{"gate_step": gate, **short}, others=self.others)


def parse_numbers(text: object) -> tuple[float, ...]:
    """Parse numbers separated by commas."""
    try:
        return tuple(float(number) for number in str(text).split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,0.98,1.02") from None


#: How the values of options with a parser of their own are shown in the help.
_METAVARS: Mapping[object, str] = {parse_gate_step: "N", parse_numbers: "N,N,..."}


def _parser_of(field: Field[Any]) -> Callable[[object], Any] | None:
    """Return the parser of an option of a further method; None if typer has one for its type."""
    if field.metadata["is_gate"]:
        return parse_gate_step
    return parse_numbers if field.metadata["type"] is tuple else None


def _further_options() -> list[tuple[str, Any, Any]]:
    """Return a field for each option of the further methods: its name, its type with its help, its default."""
    return [
        (
            name,
            Annotated[
                Any if (parser := _parser_of(field)) else field.metadata["type"] | None,
                typer.Option(
                    parser=parser,
                    metavar=_METAVARS.get(parser),
                    min=field.metadata["least"],
                    help=f"{kind.title}: {field.metadata['help']}",
                    show_default=f"{field.default}, with any of {kind.title}'s options",
                    rich_help_panel=SCHEDULE,
                ),
            ],
            None,
        )
        for kind in _FURTHER.values()
        for name, field in options_of(kind).items()
    ]


if TYPE_CHECKING:

    class ScheduleOptions(_ShortOptions):
        """Options for a schedule. A command's argument annotated with this class becomes these options."""

else:
    ScheduleOptions = make_dataclass(
        "ScheduleOptions",
        _further_options(),
        bases=(_ShortOptions,),
        frozen=True,
        kw_only=True,
        namespace={"__module__": __name__},
    )


def methods_in(files: list[Path] | None) -> tuple[ComparedMethod, ...]:
    """Return the schedules in `files` as methods to compare, each named after the file.

    Raises:
        ConfigurationError: a file does not contain a valid schedule, or two have the same name.
    """
    compared: dict[str, ComparedMethod] = {}
    for file in files or ():
        if file.stem in compared:
            raise ConfigurationError(MSG_TWICE.format(name=file.stem))
        compared[file.stem] = ComparedMethod(f"schedule_{file.stem}", file.stem, load_schedule(file))
    return tuple(compared.values())


def _options(names: Any) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
