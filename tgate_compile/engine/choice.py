"""Choose the backends of a denoiser, and the dtype that they compute in."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import torch

from tgate_compile._errors import BackendError, ConfigurationError, Precision, UnsupportedModelError, did_you_mean
from tgate_compile._runtimes import BACKENDS, automatic_backends, is_backend_installed, ranked_backends
from tgate_compile.engine.backends import Backend, Runner, backend_class
from tgate_compile.engine.trust import MOST_CHANGES, Candidate, ChosenBackend, weight_sample
from tgate_compile.engine.weights import wrapped_weight
from tgate_compile.passes.graphs import Variant, flat_program
from tgate_compile.passes.legalize import change_precision

if TYPE_CHECKING:
    from tgate_compile.engine.config import Config

logger = logging.getLogger(__name__)

MSG_STATES_CHANGE = (
    "{model} has been changed before each of the last {count} calls, and it compiles every graph again each time"
)


def check_precision(given: object) -> None:
    """Raise ConfigurationError unless `given` is one of the values of `precision`."""
    if given not in get_args(Precision):
        names = ", ".join(f'"{name}"' for name in get_args(Precision))
        text = str(given).removeprefix("torch.")
        hint = f' Use precision="{text}".' if text in get_args(Precision) else did_you_mean(given, get_args(Precision))
        raise ConfigurationError(f"precision must be one of {names}, but got {given!r}.{hint}")


def precision_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype to compute in; None for the pipeline's own."""
    return None if precision == "auto" else getattr(torch, precision)


def model_dtype(variant: Variant) -> torch.dtype:
    """Return the dtype of most of the floating-point weights of `variant`."""
    sizes: Counter[torch.dtype] = Counter()
    for node in _weights_of(variant):
        value = node.meta["val"]
        if value.is_floating_point():
            sizes[value.dtype] += value.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


class Chooser:
    """Makes the backends for the states of a denoiser, such as those with and without a LoRA.

    Args:
        config: names a backend, or `auto`, its options and the precision.
        model: the name of the denoiser's class, for messages.
    """

    def __init__(self, config: Config, model: str) -> None:
        self._name = config.backend
        self._options = config.backend_options
        self._precision = config.precision
        self._model = model
        self._last = self._states = 0

    def backend(self, device: torch.device, generation: int) -> ChosenBackend:
        """Return the backend for a new state; for `auto`, those that support the type of `device`, fastest first."""
        if self._name != "auto":
            return ChosenBackend([Candidate(make_backend(self._name, self._options, self._precision), self._name)])
        candidates = [
            Candidate(make_backend(name, options, self._precision), _title(name, options))
            for name in automatic_backends(device.type)
            if why_not_in(name, device.type, self._precision) is None
            for options in BACKENDS[name].attempts.get(device.type, ({},))
        ]
        chosen = ChosenBackend(candidates, functools.partial(self._report, device))
        # In the first two states the user may only be setting the pipeline up.
        self._states = self._states + 1 if generation == self._last + 1 else 1
        self._last = generation
        if self._states > MOST_CHANGES:
            chosen.avoid_copies(MSG_STATES_CHANGE.format(model=self._model, count=self._states))
        return chosen

    def _report(self, device: torch.device, candidate: Candidate, failures: Mapping[str, str]) -> None:
        parts = []
        for name in ranked_backends(device.type):
            if not is_backend_installed(name):
                parts.append(f"{name} (not installed: pip install 'tgate_compile[{BACKENDS[name].extra}]')")
                continue
            reason = why_not_in(name, device.type, self._precision)
            if reason is not None:
                parts.append(f"{name} (not used: {reason})")
                continue
            for options in BACKENDS[name].attempts.get(device.type, ({},)):
                title = _title(name, options)
                parts.append(f"{title} (not used: {failures[title]})" if title in failures else title)
        logger.info(
            'backend="auto" runs %s with %s. Fastest first, on "%s": %s',
            self._model, candidate.title, device.type, "; ".join(parts),
        )  # fmt: skip


def make_backend(name: str, options: Mapping[str, object], precision: str) -> Backend:
    """Return the backend `name`, which computes in `precision`."""
    dtype = precision_dtype(precision)
    setting = BACKENDS[name].precision_option
    if dtype is None or setting is not None:
        return backend_class(name)(options if dtype is None or setting is None else {**options, setting: precision})
    return ChangedPrecision(backend_class(name)(options), dtype)


def why_not_in(name: str, device: str, precision: str) -> str | None:
    """Return why the backend `name` does not compute in `precision` on a type of device; None if it does."""
    return BACKENDS[name].lacks.get(f"{device} {precision}")


def check_computes_in(name: str, options: Mapping[str, object], precision: str) -> None:
    """Raise ConfigurationError if the options of the backend `name` contradict `precision`."""
    setting = None if name == "auto" else BACKENDS[name].precision_option
    if setting is not None and setting in options:
        raise ConfigurationError(
            f'The option {setting} of the backend "{name}" is an argument of optimize: optimize(pipe, '
            f'backend="{name}", precision={options[setting]!r}).'
        )


def check_can_change_precision(denoiser: torch.nn.Module, precision: str) -> None:
    """Raise UnsupportedModelError if the weights of `denoiser` are quantized, and `precision` is not `auto`."""
    quantized = None if precision == "auto" else wrapped_weight(denoiser)
    if quantized is not None:
        raise UnsupportedModelError(
            f"{type(denoiser).__name__} is quantized ({quantized}, for example), and computing in another dtype needs "
            "weights in floating point. Leave precision out, or quantize the model after pipe.to(torch.bfloat16)."
        )


def _title(name: str, options: Mapping[str, object]) -> str:
    return f"{name} ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else name


class ChangedPrecision:
    """A backend that rewrites graphs to compute in `dtype`, and runs them with another backend.

    The graphs share one copy of the weights in that dtype, which is kept and updated when the weights change.
    """

    is_reference = False

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self._backend = backend
        self._dtype = dtype
        self._copies = _Copies(dtype)

    @property
    def name(self) -> str:
        """The name of the backend that runs the graphs."""
        return self._backend.name

    @property
    def packs_weights(self) -> bool:
        """Whether each graph holds a copy of the weights, besides the one that they share."""
        return self._backend.packs_weights

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        """Accept all options, which the other backend has checked."""

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        return self._dtype

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        names = [node.name for node in _weights_of(variant)]
        reason = why_not_in(self.name, inputs[0].device.type, str(self._dtype).removeprefix("torch."))
        if reason is not None:
            raise BackendError(f'backend="{self.name}" cannot compute in {self._dtype}: {reason}')
        own = model_dtype(variant)
        if own == self._dtype:
            return self._backend.compile(variant, inputs)
        changed, given = change_precision(variant.program.graph_module, names, own, self._dtype)
        program = flat_program(variant.program, changed)
        if not self._backend.is_reference:  # converters read the weights in the program
            for spec in program.graph_signature.input_specs:
                if spec.arg.name in given:
                    name = str(spec.target)
                    holder = program.state_dict if name in program.state_dict else program.constants
                    holder[name] = self._changed(holder[name])
        runner = self._backend.compile(dataclasses.replace(variant, program=program), inputs)
        program.state_dict.clear()
        positions = [position for position, name in enumerate(names) if name in given]
        return _WithCopies(runner, self._copies, variant.weights, positions)

    def _changed(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.detach().to(self._dtype)
        return torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy


class _Copies:
    """The weights of a denoiser in another dtype, by name; one that has changed is copied again, to the same place."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[str, tuple[tuple[int, int], torch.Tensor]] = {}

    def of(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        sample = weight_sample(weight)
        before, copy = self._held.get(name, (None, None))
        if copy is None or copy.shape != weight.shape or copy.device != weight.device:
            copy = weight.detach().to(self._dtype)
        elif sample != before:
            with torch.no_grad():
                copy.copy_(weight)
        self._held[name] = sample, copy
        return copy

    def release(self) -> None:
        self._held = {}


class _WithCopies:
    """Runs a runner on copies of the weights at `positions`."""

    def __init__(self, runner: Runner, copies: _Copies, names: Sequence[str], positions: Sequence[int]) -> None:
        self._runner = runner
        self._copies = copies
        self._names = names
        self._positions = positions
        self._seen: Sequence[torch.Tensor] | None = None
        self._given: list[torch.Tensor] = []

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # The library passes a new list at the start of each generation; only then can a weight have changed.
        if weights is not self._seen:
            given = list(weights)
            for position in self._positions:
                given[position] = self._copies.of(self._names[position], weights[position])
            self._given, self._seen = given, weights
        return self._runner(self._given, inputs)

    def release(self) -> None:
        """Release the weights and their copies."""
        self._seen, self._given = None, []
        self._copies.release()
        release = getattr(self._runner, "release", None)
        if release is not None:
            release()


@functools.cache
def fast_bfloat16() -> str | None:
    """Return the name of this CPU's instructions for bfloat16; None if it has none that PyTorch uses."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None


@functools.cache
def _say_once(instructions: str) -> None:
    logger.info(
        "This CPU has instructions for bfloat16 (%s), which make a step of a large model about twice as fast. The "
        'pipeline computes in float32. optimize(..., precision="bfloat16") uses them, and changes the images slightly.',
        instructions,
    )  # fmt: skip


def note_precision(denoiser: torch.nn.Module, precision: str) -> None:
    """Log once in this process what bfloat16 would bring to a float32 `denoiser`, if the precision is `auto`."""
    parameter = next((each for each in denoiser.parameters() if each.is_floating_point()), None)
    if precision != "auto" or parameter is None or parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        return
    instructions = fast_bfloat16()
    if instructions is not None:
        _say_once(instructions)


def _weights_of(variant: Variant) -> list[torch.fx.Node]:
    placeholders: list[torch.fx.Node] = variant.program.graph.find_nodes(op="placeholder")
    return placeholders[: len(variant.weights)]
