"""The components of a served pipeline: which pipelines can be served, LoRA adapters, text encoders and the VAE.

The engine's worker runs text encoders and the VAE's decoder like the denoiser. Calls that wait at the same time and
have inputs of the same shapes are run as one batch.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils import _pytree as pytree

from tgate_compile._errors import ConfigurationError, UnsupportedCallError, is_installed
from tgate_compile.engine.call import Call
from tgate_compile.engine.trust import TOLERANCES, relative_difference
from tgate_compile.pipeline.modular import is_modular
from tgate_compile.serve.worker import RunApart

MSG_OTHER = "An Engine serves pipelines of diffusers, but got a {pipeline}."
MSG_OFFLOADED = (
    "The {name} of this {pipeline} is offloaded, so its weights move at every call. An Engine cannot serve it, because "
    "it runs several requests at a time. Remove the offloading (pipe.remove_all_hooks(), then pipe.to(device))."
)
MSG_PARKED = (
    "This {pipeline} was optimized with offload_prelude=True, which frees weights during the steps of a request. An "
    "Engine cannot serve it, because another request may need these weights at that time. Call restore(pipe), then "
    "optimize(pipe, ...) without it."
)
MSG_DECIDED = (
    "This {pipeline} was optimized with a method that decides at run time which blocks to skip ({schedule}). An Engine "
    "cannot serve it yet, because it would decide for a whole batch at once. Use a method whose steps are known in "
    "advance, such as BlockCache or MagCache, or serve a bundle (Engine.from_bundle), which decides for each request."
)
MSG_NO_LATENTS = (
    "Latents of shape {shape} of a {pipeline} cannot be decoded on their own: the pipeline has no VAE for images with "
    "such latents."
)

#: The VAEs of diffusers whose decoder is a function of its inputs. Those for video keep frames from call to call.
_DECODERS = frozenset({"AutoencoderDC", "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny"})
#: Arguments of a call that are not tensors, and cannot be changed by it.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)

#: The weights of adapters by name, in a form that can be compared; None means those that were active in the pipeline.
Weights = frozenset[tuple[str, float]] | None


def check_pipeline(pipe: Any, hooks: Mapping[str, Any]) -> None:
    """Raise ConfigurationError if an engine cannot serve the optimized pipeline `pipe`."""
    name_of_class = type(pipe).__name__
    if not is_modular(pipe) and not isinstance(pipe, DiffusionPipeline):
        raise ConfigurationError(MSG_OTHER.format(pipeline=name_of_class))
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and any(hasattr(each, "_hf_hook") for each in module.modules()):
            raise ConfigurationError(MSG_OFFLOADED.format(name=name, pipeline=name_of_class))
    if any(gated.config.offload_prelude for gated in hooks.values()):
        raise ConfigurationError(MSG_PARKED.format(pipeline=name_of_class))
    for gated in hooks.values():
        if gated.config.schedule.rule is not None:
            raise ConfigurationError(MSG_DECIDED.format(pipeline=name_of_class, schedule=gated.config.schedule))


def decoded(pipe: Any, pipeline: str, latents: Any) -> list[Any]:
    """Return PIL images of `latents`; `pipeline` is the name of the class of `pipe`.

    Raises:
        UnsupportedCallError: the pipeline's latents cannot be decoded on their own.
    """
    vae: Any = getattr(pipe, "vae", None)
    processor: Any = getattr(pipe, "image_processor", None)
    channels = None if vae is None else vae.config.get("latent_channels")
    factor = None if vae is None else vae.config.get("scaling_factor")
    if processor is None or factor is None or latents.ndim != 4 or latents.shape[1] != channels:
        raise UnsupportedCallError(MSG_NO_LATENTS.format(shape=list(latents.shape), pipeline=pipeline))
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
        latents = latents * std + mean * factor
    with torch.no_grad():
        pixels = vae.decode((latents / factor + (vae.config.get("shift_factor") or 0)).to(vae.dtype)).sample
    images: list[Any] = processor.postprocess(pixels.detach(), output_type="pil")
    return images


@dataclass(eq=False)
class ComponentCall:
    """A call of a text encoder or of the VAE's decoder.

    Attributes:
        component: the name of the component.
        call: the arguments.
        images: the number of rows.
        place: equal for calls that can be run together; None if this one runs alone.
        gradients: whether the caller records gradients.
        autocast: the caller's autocast, as a device and a dtype; None if it is off.
        key: see `Work`.
    """

    component: str
    call: Call
    images: int
    place: Hashable
    gradients: bool = False
    autocast: tuple[str, torch.dtype] | None = None
    key: Hashable = None

    letter = ""
    is_last = True  # the request's next call is unknown


class Components:
    """The text encoders of `pipe` and its VAE's decoder, whose calls are submitted to the engine's worker.

    Only calls inside the context `submitting` are submitted; all others run as usual.

    Args:
        pipe: the pipeline.
        denoisers: the names of its denoisers.
    """

    def __init__(self, pipe: Any, denoisers: Collection[str]) -> None:
        self._modules = dict(_submitted(pipe, denoisers))
        self._forwards = {name: module.forward for name, module in self._modules.items()}
        self._before = {
            name: vars(module)["forward"] for name, module in self._modules.items() if "forward" in vars(module)
        }
        self._submitting: dict[int, Callable[[ComponentCall], Any]] = {}  # by thread
        self._apart: set[Hashable] = set()  # calls that run one at a time
        # By form and number of rows: the inputs that differed in a batch that was compared with single runs.
        self._compared: dict[Hashable, set[frozenset[int]]] = defaultdict(set)
        for name, module in self._modules.items():
            vars(module)["forward"] = self._forward_of(name, self._forwards[name])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the components."""
        return tuple(self._modules)

    @contextmanager
    def submitting(self, submit: Callable[[ComponentCall], Any]) -> Iterator[None]:
        """Inside the context, pass this thread's calls to `submit`, which returns their results."""
        me = threading.get_ident()
        self._submitting[me] = submit
        try:
            yield
        finally:
            del self._submitting[me]

    def close(self) -> None:
        """Let all calls run as usual again."""
        for name, module in self._modules.items():
            if name in self._before:
                vars(module)["forward"] = self._before[name]
            else:
                del vars(module)["forward"]

    def keep_apart(self, work: ComponentCall) -> None:
        """Run calls like `work` one at a time."""
        self._apart.add(work.place)

    def run(self, works: Sequence[ComponentCall]) -> tuple[list[Any], str | None]:
        """Return the results of work items with equal keys, and how those of a batch differ from single runs, or None.

        Raises:
            RunApart: they cannot be run together.
        """
        first = works[0]
        if len(works) == 1:
            return [self._alone(first)], None
        if first.place in self._apart:
            raise RunApart([[position] for position in range(len(works))])
        total = sum(work.images for work in works)
        results = self._together(works, total)
        known = self._compared[first.place, total]
        differing = _differing(works)
        if any(differing <= each for each in known):
            return results, None
        singles = [self._alone(work) for work in works]
        problem = next(filter(None, map(_difference, results, singles)), None)
        if problem is None:
            known.add(differing)
        return singles, problem

    def _forward_of(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            submit = self._submitting.get(threading.get_ident())
            return own(*args, **kwargs) if submit is None else submit(self._work(name, args, kwargs))

        return forward

    def _work(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ComponentCall:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        call, rows = Call(tuple(leaves), spec), _rows(leaves)
        devices = {leaf.device.type for leaf in leaves if torch.is_tensor(leaf)}
        autocast = next(((each, torch.get_autocast_dtype(each)) for each in devices if _is_autocast(each)), None)
        work = ComponentCall(name, call, rows or 1, None, torch.is_grad_enabled(), autocast)
        constants = all(torch.is_tensor(leaf) or isinstance(leaf, _CONSTANTS) for leaf in leaves)
        if rows is not None and constants and not work.gradients:
            parts = tuple(
                (leaf.shape[1:], leaf.dtype, leaf.device) if torch.is_tensor(leaf) else (type(leaf), leaf)
                for leaf in leaves
            )
            work.place = name, spec, parts, autocast
            work.key = None if work.place in self._apart else work.place
        return work

    def _alone(self, work: ComponentCall) -> Any:
        args, kwargs = work.call.arguments
        with ExitStack() as stack:
            # Settings of the thread that made the call.
            stack.enter_context(torch.set_grad_enabled(work.gradients))
            if work.autocast is not None:
                device, dtype = work.autocast
                stack.enter_context(torch.autocast(device, dtype))
            return self._forwards[work.component](*args, **kwargs)

    def _together(self, works: Sequence[ComponentCall], total: int) -> list[Any]:
        """Run work items as one call, and split its result.

        Raises:
            ValueError: the result does not have a row for each row of the inputs.
        """
        calls = [work.call for work in works]
        leaves = [
            torch.cat([call.leaves[position] for call in calls]) if torch.is_tensor(leaf) else leaf
            for position, leaf in enumerate(calls[0].leaves)
        ]
        joined = self._alone(replace(works[0], call=replace(calls[0], leaves=tuple(leaves))))
        outputs, spec = pytree.tree_flatten(joined)
        results, start = [], 0
        for work in works:
            mine = [_share(output, start, work.images, total) for output in outputs]
            results.append(pytree.tree_unflatten(mine, spec))
            start += work.images
        return results


def _submitted(pipe: Any, denoisers: Collection[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules whose calls are submitted, with the names of their components.

    While such a call waits, other requests run the pipeline's code. So components that this code changes for a call are
    left out: VAEs that it casts to float32, and all text encoders if one has LoRA layers, because the active adapters
    are those of the request that is running.
    """
    modules = {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
    others = {name: module for name, module in modules.items() if name not in denoisers}
    adapted = any(map(_layers, others.values()))
    for name, module in others.items():
        library, kind = type(module).__module__.partition(".")[0], type(module).__name__
        if name.startswith("text_encoder") and library == "transformers" and not adapted:
            yield name, module
        elif name == "vae" and library == "diffusers" and kind in _DECODERS:
            vae: Any = module
            if not (vae.config.get("force_upcast") and vae.dtype == torch.float16):
                yield name, vae.decoder


def _rows(leaves: Sequence[Any]) -> int | None:
    """Return the number of rows that all tensors of a call have; None if it is 0 or differs between them."""
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves if torch.is_tensor(leaf)}
    return counts.pop() or None if len(counts) == 1 else None


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _differing(works: Sequence[ComponentCall]) -> frozenset[int]:
    """Return the positions of the tensors that are not the same in all work items."""
    first, *others = (work.call.leaves for work in works)

    def differs(position: int) -> bool:
        return any(not _equal(first[position], other[position]) for other in others)

    return frozenset(position for position, leaf in enumerate(first) if torch.is_tensor(leaf) and differs(position))


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _share(output: Any, start: int, count: int, total: int) -> Any:
    if not torch.is_tensor(output):
        if isinstance(output, _CONSTANTS):
            return output
        raise ValueError(f"a result of type {type(output).__name__} has no rows")
    if not output.ndim or output.shape[0] != total:
        raise ValueError(f"a result of shape {list(output.shape)} has no rows for {total} inputs")
    return output.narrow(0, start, count).clone()


def _difference(result: Any, single: Any) -> str | None:
    """Return how two results differ beyond rounding; None if they do not."""
    for left, right in zip(pytree.tree_leaves(result), pytree.tree_leaves(single), strict=True):
        if not torch.is_tensor(right) or not right.is_floating_point():
            if not (torch.equal(left, right) if torch.is_tensor(right) else left == right):
                return "different values"
        elif (found := relative_difference(left, right)) > TOLERANCES[right.dtype]:
            return f"a relative difference of {found:.1e}, where {TOLERANCES[right.dtype]:.0e} is allowed"
    return None


def weights_of(given: Mapping[str, float] | None) -> Weights:
    """Return the weights that a request has given."""
    return None if given is None else frozenset((name, float(weight)) for name, weight in given.items())


class Adapters:
    """The LoRA adapters that are loaded into the denoisers and the other components of `pipe`.

    Args:
        pipe: the pipeline.
        denoisers: the names of its denoisers.
    """

    def __init__(self, pipe: Any, denoisers: Sequence[str]) -> None:
        modules = {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
        found = {name: layers for name, module in modules.items() if (layers := _layers(module))}
        self._denoisers = [layers for name, layers in found.items() if name in denoisers]
        self._others = [layers for name, layers in found.items() if name not in denoisers]
        self._saved = {id(layer): _State(layer) for layers in found.values() for layer in layers}
        self._now: Weights = None
        self._now_for_text: Weights = None
        self.names = tuple(sorted({name for layers in found.values() for layer in layers for name in layer.scaling}))

    def use_for_denoisers(self, weights: Weights) -> bool:
        """Activate adapters in the denoisers; return whether this is a change."""
        if weights == self._now:
            return False
        self._activate(self._denoisers, weights)
        self._now = weights
        return True

    def use_for_text(self, weights: Weights) -> None:
        """Activate adapters in the text encoders, and in other components that are not denoisers."""
        if weights != self._now_for_text:
            self._activate(self._others, weights)
            self._now_for_text = weights

    def restore(self) -> None:
        """Activate the adapters that were active in the pipeline."""
        for state in self._saved.values():
            state.restore()
        self._now = self._now_for_text = None

    def _activate(self, components: Sequence[Sequence[Any]], weights: Weights) -> None:
        for layers in components:
            for layer in layers:
                mine = {name: weight for name, weight in sorted(weights or ()) if name in layer.scaling}
                if weights is None:
                    self._saved[id(layer)].restore()
                    continue
                layer.enable_adapters(bool(mine))
                if mine:
                    layer.set_adapter(list(mine))
                for name, weight in mine.items():
                    layer.set_scale(name, weight)


class _State:
    """The active adapters of a layer, and their scales."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._active = list(layer.active_adapters)
        self._as_given = layer._active_adapter  # a string or a list, which graphs tell apart
        self._enabled = not layer.disable_adapters
        self._scaling = dict(layer.scaling)
        self._gradients = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]

    def restore(self) -> None:
        """Restore them."""
        self.layer.set_adapter(self._active)
        self.layer.enable_adapters(self._enabled)
        self.layer.scaling.clear()
        self.layer.scaling.update(self._scaling)
        self.layer._active_adapter = self._as_given
        for parameter, needed in self._gradients:
            parameter.requires_grad_(needed)


def _layers(module: torch.nn.Module) -> list[Any]:
    """Return the layers of `module` that have LoRA adapters."""
    if not is_installed("peft"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [each for each in module.modules() if isinstance(each, BaseTunerLayer) and hasattr(each, "scaling")]
