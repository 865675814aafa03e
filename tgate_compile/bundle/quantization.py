"""What of a bundle's weights and values is put into fewer bits, as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from tgate_compile._errors import ConfigurationError

#: `int8`: weights in 8 bits for each output channel, which are made into floats again where they are used; `int4`: the
#: same in 4 bits for blocks of the linear layers' weights (the others are in 8); `int8-dynamic`: linear layers that
#: multiply integers, with values measured as they come; `int8-static`: values in 8 bits, too, with ranges that were
#: measured on real generations when the bundle was written.
Scheme = Literal["int8", "int4", "int8-dynamic", "int8-static"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
#: Those that need `Quantization.prompts`.
CALIBRATED: tuple[Scheme, ...] = ("int8-static",)

#: `pruned`: those that reuse values from earlier steps. The others make the values that these reuse.
Graphs = Literal["all", "pruned"]

#: Sizes of a block of weights that share a scale, which runtimes have kernels for.
BLOCKS = (16, 32, 64, 128, 256)

#: Little of the size, and of the pruned graph's error half: the first and the last layer, and what is told of the time.
KEPT = ("conv_in", "conv_out", "time_embedding.*", "pos_embed.*", "proj_out")


@dataclass(frozen=True)
class Quantization:
    """How graphs are quantized.

    Attributes:
        scheme: see `Scheme`.
        graphs: which graphs.
        keep: patterns, as in a shell, of the layers whose weights stay as they are.
        block: of `int4`: how many weights in a row share a scale.
        calibration_prompts: of `int8-static`: what the generations show that values are measured on. Empty: the prompt
            of the call that the bundle is made with.
        calibration_steps: for each graph and prompt, at how many of its steps they are measured, spread over all.
    """

    scheme: Scheme
    graphs: Graphs = "all"
    keep: tuple[str, ...] = KEPT
    block: int = 32
    calibration_prompts: tuple[str, ...] = ()
    calibration_steps: int = 6

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigurationError(
                f"The scheme of quantize must be one of {_listed(SCHEMES)}, but got {self.scheme!r}."
            )
        if self.graphs not in get_args(Graphs):
            raise ConfigurationError(f'graphs of quantize must be "all" or "pruned", but got {self.graphs!r}.')
        if not _are_texts(self.keep):
            raise ConfigurationError(
                "keep of quantize must be a list of patterns of layers, such as ['conv_in', 'up_blocks.*'], but "
                f"got {self.keep!r}."
            )
        if isinstance(self.block, bool) or self.block not in BLOCKS:
            raise ConfigurationError(
                f"block of quantize must be one of {', '.join(map(str, BLOCKS))}, but got {self.block!r}."
            )
        if not _are_texts(self.calibration_prompts):
            raise ConfigurationError(
                f"calibration_prompts of quantize must be a list of texts, but got {self.calibration_prompts!r}."
            )
        steps = self.calibration_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigurationError(
                f"calibration_steps of quantize must be a whole number from 1 on, but got {steps!r}."
            )
        if self.calibration_prompts and not self.calibrated:
            raise ConfigurationError(
                f'calibration_prompts are for the schemes {_listed(CALIBRATED)}, and "{self.scheme}" measures no '
                "values."
            )

    @property
    def calibrated(self) -> bool:
        """Whether it needs values of real generations."""
        return self.scheme in CALIBRATED

    def keeps(self, weight: str) -> bool:
        """Whether the weight of this name, such as `conv_in.weight`, stays as it is."""
        layer = weight.rpartition(".")[0]
        return any(fnmatchcase(name, pattern) for pattern in self.keep for name in (layer, weight))


def read_quantization(given: object, format: str, schemes: Sequence[str]) -> Quantization | None:
    """What `export` is given as `quantize`, for a format that takes these schemes.

    Raises:
        ConfigurationError: it is none of what it may be.
    """
    if given is None:
        return None
    told = {"scheme": given} if isinstance(given, str) else given
    if not isinstance(told, Mapping) or "scheme" not in told:
        raise ConfigurationError(
            f"quantize must be None, one of {_listed(SCHEMES)}, or a mapping with one of these as its `scheme`, but "
            f"got {given!r}."
        )
    known = [field.name for field in fields(Quantization)]
    unknown = [name for name in told if name not in known]
    if unknown:
        raise ConfigurationError(f"quantize does not know {_listed(unknown)}. It knows {', '.join(known)}.")
    chosen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    quantization = Quantization(**chosen)
    if quantization.scheme not in schemes:
        takes = f"quantize={' or '.join(map(repr, schemes))}" if schemes else "no quantize"
        raise ConfigurationError(f'format="{format}" takes {takes}, but got quantize={quantization.scheme!r}.')
    return quantization


def _are_texts(given: object) -> bool:
    return isinstance(given, tuple) and all(isinstance(text, str) and text for text in given)


def _listed(names: Sequence[object]) -> str:
    return ", ".join(f'"{name}"' for name in names)
