"""Activate LoRA adapters for the request whose turn it is, and restore those that the pipeline had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tgate_compile._errors import is_installed

#: The weights of adapters by name, in a form that can be compared; None means those that the pipeline had.
Weights = frozenset[tuple[str, float]] | None


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
        """Activate adapters in the denoisers; return whether others were active."""
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
        """Activate the adapters that the pipeline had."""
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
        self._as_given = layer._active_adapter  # a string or a list, which are different keys of graphs
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
