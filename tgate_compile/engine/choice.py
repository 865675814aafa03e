"""Choose the backends of a denoiser, and the dtype that they compute in."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch

from tgate_compile._errors import BackendError, ConfigurationError, Precision, UnsupportedModelError, did_you_mean
from tgate_compile._runtimes import BACKENDS, automatic_backends, is_backend_installed, ranked_backends
from tgate_compile.engine.backends import Backend, Runner, backend_class
from tgate_compile.engine.disk import versions_of
from tgate_compile.engine.samples import WeightSamples
from tgate_compile.engine.trust import MOST_CHANGES, Candidate, ChosenBackend
from tgate_compile.engine.weights import wrapped_weight
from tgate_compile.passes.graphs import Variant, copy_graph, flat_program
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
            return ChosenBackend([self._candidate(self._name, self._options, self._name)])
        candidates = [
            self._candidate(name, options, _title(name, options))
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

    def _candidate(self, name: str, options: Mapping[str, object], title: str) -> Candidate:
        versions = versions_of(*BACKENDS[name].needs)
        settings = (name, repr(sorted(options.items())), self._precision, versions)
        return Candidate(make_backend(name, options, self._precision), title, settings)

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
    if setting is not None:
        return backend_class(name)(options if dtype is None else {**options, setting: precision})
    if dtype is None and not any(name == backend and not copied for backend, _, copied in _CHANNELS_LAST):
        return backend_class(name)(options)
    return WithOwnWeights(backend_class(name)(options), dtype)


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


#: Where convolutions are faster with weights in the channels-last format, by backend, type of device, and whether the
#: weights are copied anyway, for another dtype. On a CPU eager steps in bfloat16 were 3 to 8 % faster, and those in
#: float32 were not. Not measured on a GPU: Inductor's code for it otherwise copies such weights in every step.
_CHANNELS_LAST = {
    ("eager", "cpu", True),
    ("eager", "cuda", True),
    ("inductor", "cuda", True),
    ("inductor", "cuda", False),
}
_HALF = (torch.bfloat16, torch.float16)
_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding, torch.ops.aten.convolution.default}


class WithOwnWeights:
    """A backend that runs graphs with another one, on a copy of the weights with another dtype and layout.

    All graphs share the copy, which follows changes of the weights. The pipeline's own weights are left alone.

    Args:
        backend: the backend that runs the graphs.
        dtype: the dtype that the graphs are rewritten to compute in; None means that of the model.
    """

    def __init__(self, backend: Backend, dtype: torch.dtype | None) -> None:
        self._backend = backend
        self._dtype = dtype
        self._copies = _Copies()

    @property
    def name(self) -> str:
        """The name of the backend that runs the graphs."""
        return self._backend.name

    @property
    def packs_weights(self) -> bool:
        """Whether each graph holds a copy of the weights, besides the one that they share."""
        return self._backend.packs_weights

    @property
    def is_reference(self) -> bool:
        """Whether the results are PyTorch's own, in the model's dtype."""
        return self._dtype is None and self._backend.is_reference

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        """Accept all options, which the other backend has checked."""

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        return self._dtype or self._backend.lowered_to(device)

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        own, device = model_dtype(variant), inputs[0].device.type
        dtype = self._dtype or own
        reason = why_not_in(self.name, device, str(dtype).removeprefix("torch."))
        if reason is not None and self._dtype is not None:
            raise BackendError(f'backend="{self.name}" cannot compute in {dtype}: {reason}')
        names = [node.name for node in _weights_of(variant)]
        changed, given = copy_graph(variant.program.graph_module), frozenset[str]()
        if dtype != own:
            changed, given = change_precision(variant.program.graph_module, names, own, dtype)
        laid_out: frozenset[str] = frozenset()
        if dtype in _HALF and (self.name, device, dtype != own) in _CHANNELS_LAST:
            laid_out = _to_channels_last(changed, names)
        if not given | laid_out:
            return self._backend.compile(variant, inputs)
        program = flat_program(variant.program, changed)
        if not self._backend.is_reference:  # converters read the weights in the program
            for spec in program.graph_signature.input_specs:
                if spec.arg.name in given:
                    name = str(spec.target)
                    holder = program.state_dict if name in program.state_dict else program.constants
                    holder[name] = _changed(holder[name], dtype)
        runner = self._backend.compile(dataclasses.replace(variant, program=program), inputs)
        program.state_dict.clear()
        forms = {
            position: _Form(dtype if name in given else None, name in laid_out)
            for position, name in enumerate(names)
            if name in given | laid_out
        }
        return _WithCopies(runner, self._copies, variant.weights, forms)


def _to_channels_last(graph_module: torch.fx.GraphModule, weights: Sequence[str]) -> frozenset[str]:
    """Mark the weights of convolutions as channels-last in `graph_module`, and return their names.

    Results of convolutions then have this layout too, and not every view of them exists, so views become reshapes.
    """
    names = set()
    for node in graph_module.graph.find_nodes(op="placeholder"):
        is_weight = node.name in weights and isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].ndim == 4
        if is_weight and all(user.target in _CONVOLUTIONS and user.args[1] is node for user in node.users):
            with node.meta["val"].fake_mode:
                node.meta["val"] = node.meta["val"].contiguous(memory_format=torch.channels_last)
            names.add(node.name)
    if names:
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        graph_module.recompile()
    return frozenset(names)


def _changed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    copy = tensor.detach().to(dtype)
    return torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy


@dataclass(frozen=True)
class _Form:
    """The form of a copy of a weight: its dtype, if that differs, and whether it is channels-last."""

    dtype: torch.dtype | None
    channels_last: bool

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` in this form: the weight itself if it has this form already."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        changed = weight.detach().to(self.dtype or weight.dtype)
        return changed.contiguous(memory_format=layout) if self.channels_last else changed


@dataclass
class _Copy:
    """A copy of a weight, and the sample of the weight that it was made from."""

    tensor: torch.Tensor
    sample: tuple[int, int]
    is_weight: bool  # the weight had the right form already, and is not ours to write to


class _Copies:
    """Copies of a denoiser's weights, by name and form. The copy of a changed weight is written to the same place.

    Graphs usually take a weight in the same form and share its copy, but one graph may use it in fewer places.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, _Form], _Copy] = {}
        self._samplers: dict[tuple[str, ...], WeightSamples] = {}  # by the weights' names: graphs have different ones

    def of(self, names: Sequence[str], weights: Sequence[torch.Tensor], forms: Sequence[_Form]) -> list[torch.Tensor]:
        """Return the copies of `weights`, which have these names, in these forms."""
        samples = self._samplers.setdefault(tuple(names), WeightSamples()).of(weights)
        return [self._one(*each) for each in zip(names, weights, forms, samples, strict=True)]

    def release(self) -> None:
        self._held, self._samplers = {}, {}

    @torch.no_grad()
    def _one(self, name: str, weight: torch.Tensor, form: _Form, sample: tuple[int, int]) -> torch.Tensor:
        held = self._held.get((name, form))
        if held is None or held.is_weight or (held.tensor.shape, held.tensor.device) != (weight.shape, weight.device):
            made = form.of(weight)
            self._held[name, form] = held = _Copy(made, sample, made.data_ptr() == weight.data_ptr())
        elif held.sample != sample:
            held.tensor.copy_(weight)
            held.sample = sample
        return held.tensor


class _WithCopies:
    """Runs a runner on copies of the weights at the positions in `forms`."""

    def __init__(self, runner: Runner, copies: _Copies, names: Sequence[str], forms: Mapping[int, _Form]) -> None:
        self._runner = runner
        self._copies = copies
        self._names = names
        self._forms = forms
        self._seen: Sequence[torch.Tensor] | None = None
        self._given: list[torch.Tensor] = []

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        self._take(weights)
        return self._runner(self._given, inputs)

    def prepare(self, weights: Sequence[torch.Tensor]) -> None:
        """Copy the weights that have changed before the next call, which will pass the same list."""
        self._take(weights)
        prepare = getattr(self._runner, "prepare", None)
        if prepare is not None:
            prepare(self._given)

    def _take(self, weights: Sequence[torch.Tensor]) -> None:
        # The library passes a new list at the start of each generation; only then can a weight have changed.
        if weights is self._seen:
            return
        self._given, self._seen = list(weights), weights
        chosen = list(self._forms)
        copies = self._copies.of(
            [self._names[position] for position in chosen],
            [weights[position] for position in chosen],
            [self._forms[position] for position in chosen],
        )
        for position, copy in zip(chosen, copies, strict=True):
            self._given[position] = copy

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
