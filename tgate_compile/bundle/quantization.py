"""The quantization of a bundle, as requested from `export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from tgate_compile._errors import ConfigurationError

#: `int8`: 8-bit weights with a scale per output channel, dequantized where they are used. `int4`: the same in 4 bits,
#: with a scale per block, for the weights of linear layers (others have 8 bits). `int8-dynamic`: linear layers multiply
#: integers; the ranges of activations are measured at run time. `int8-static`: activations also have 8 bits, in ranges
#: that were measured on real generations when the bundle was written.
Scheme = Literal["int8", "int4", "int8-dynamic", "int8-static"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
#: The schemes that need a calibration.
CALIBRATED: tuple[Scheme, ...] = ("int8-static",)

#: `pruned`: only graphs that reuse values of earlier steps. The others compute these values.
Graphs = Literal["all", "pruned"]

#: The block sizes that runtimes have kernels for: the number of weights that share a scale.
BLOCKS = (16, 32, 64, 128, 256)

#: The first and the last layer and the time embedding: few of the bytes, but half of the pruned graph's error.
SKIPPED = ("conv_in", "conv_out", "time_embedding.*", "pos_embed.*", "proj_out")


@dataclass(frozen=True)
class Quantization:
    """How graphs are quantized.

    Attributes:
        scheme: the scheme; see `Scheme`.
        graphs: which graphs are quantized.
        skip: shell-style patterns of layers whose weights are not quantized.
        block: for `int4`, the number of consecutive weights that share a scale.
        calibration_prompts: for `int8-static`, the prompts of the generations in which activations are measured. If
            empty, the prompt of the call that the bundle is exported with.
        calibration_steps: for `int8-static`, the number of steps per graph and prompt at which activations are
            measured, spread evenly over the generation.
    """

    scheme: Scheme
    graphs: Graphs = "all"
    skip: tuple[str, ...] = SKIPPED
    block: int = 32
    calibration_prompts: tuple[str, ...] = ()
    calibration_steps: int = 6

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigurationError(f"scheme of quantize must be one of {_listed(SCHEMES)}, but got {self.scheme!r}.")
        if self.graphs not in get_args(Graphs):
            raise ConfigurationError(f'graphs of quantize must be "all" or "pruned", but got {self.graphs!r}.')
        if not _are_texts(self.skip):
            raise ConfigurationError(
                "skip of quantize must be a list of layer name patterns, such as ['conv_in', 'up_blocks.*'], but got "
                f"{self.skip!r}."
            )
        if isinstance(self.block, bool) or self.block not in BLOCKS:
            raise ConfigurationError(
                f"block of quantize must be one of {', '.join(map(str, BLOCKS))}, but got {self.block!r}."
            )
        if not _are_texts(self.calibration_prompts):
            raise ConfigurationError(
                f"calibration_prompts of quantize must be a list of strings, but got {self.calibration_prompts!r}."
            )
        steps = self.calibration_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigurationError(f"calibration_steps of quantize must be a positive integer, but got {steps!r}.")
        if self.calibration_prompts and not self.calibrated:
            raise ConfigurationError(
                f"calibration_prompts of quantize is only for {_listed(CALIBRATED)}, but the scheme is "
                f'"{self.scheme}", which needs no calibration.'
            )

    @property
    def calibrated(self) -> bool:
        """Whether the scheme needs a calibration on real generations."""
        return self.scheme in CALIBRATED

    def skips(self, weight: str) -> bool:
        """Return whether the weight with this name, such as `conv_in.weight`, is not quantized."""
        layer = weight.rpartition(".")[0]
        return any(fnmatchcase(name, pattern) for pattern in self.skip for name in (layer, weight))


def read_quantization(given: object, format: str, schemes: Sequence[str]) -> Quantization | None:
    """Return the quantization for the argument `quantize` of `export`, for a format that supports `schemes`.

    Raises:
        ConfigurationError: `given` is not valid.
    """
    if given is None:
        return None
    settings = {"scheme": given} if isinstance(given, str) else given
    if not isinstance(settings, Mapping) or "scheme" not in settings:
        raise ConfigurationError(
            f"quantize must be None, one of {_listed(SCHEMES)}, or a mapping with one of these as its `scheme`, but "
            f"got {given!r}."
        )
    known = [field.name for field in fields(Quantization)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigurationError(f"quantize has unknown settings: {_listed(unknown)}. It accepts {', '.join(known)}.")
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    quantization = Quantization(**chosen)
    if quantization.scheme not in schemes:
        supported = f"only quantize={' or '.join(map(repr, schemes))}" if schemes else "no quantization"
        raise ConfigurationError(f'format="{format}" supports {supported}, but got quantize={quantization.scheme!r}.')
    return quantization


def _are_texts(given: object) -> bool:
    return isinstance(given, tuple) and all(isinstance(text, str) and text for text in given)


def _listed(names: Sequence[object]) -> str:
    return ", ".join(f'"{name}"' for name in names)
