"""Complex arithmetic is lowered to arithmetic on parts with the same results; unknown operators are unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from tests.comparing import difference
from tests.passes.test_unfuse import _Calls, random, untouched
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.specialize import remove_dead

fft = torch.fft
VALUE, OTHER = random(2, 3, 6, 5), random(6, 5)
Function = Callable[..., torch.Tensor]


def turned(value: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions, as Lumina and others do."""
    pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def filtered(value: torch.Tensor) -> torch.Tensor:
    """Apply FreeU's filter."""
    from diffusers.utils.torch_utils import fourier_filter

    return fourier_filter(value, 1, 0.2)


def mixed(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Combine complex values, real ones and numbers in sums, differences, products and quotients."""
    left, right = fft.fft(value), torch.complex(other, 1 + other.abs())
    total = left * right - right + (left / right) * (2 - 3j) + value - left / 4 + torch.add(left, other, alpha=3) + 1j
    return total.abs() + total.angle().cos() + (total.conj() * 2).imag + (0.5 * total).real


def moved(value: torch.Tensor) -> torch.Tensor:
    """Apply operators that only change shapes."""
    left = fft.fft2(value).transpose(0, 1)[:, :1].reshape(3, 30)
    first, second = torch.cat([left, torch.stack([left[0], -left[1]])]).chunk(2)
    one, _ = first.split(2)
    return torch.view_as_real(one.roll(1, -1) + second.unsqueeze(0).squeeze(0)[:2].flip(0)).sum(-1)


CASES: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "FreeU": (filtered, (VALUE,)),
    "FreeU, a power of two": (filtered, (random(1, 2, 8, 4),)),
    "rotary": (turned, (random(2, 5, 8), random(5, 4))),
    "mixed": (mixed, (VALUE, OTHER)),
    "moved": (moved, (VALUE,)),
    "there and back": (lambda given: fft.ifft(fft.fft(given, norm="ortho"), norm="ortho").real, (VALUE,)),
    "forward norm": (lambda given: fft.ifftn(fft.fftn(given, norm="forward"), norm="backward").imag + given, (VALUE,)),
    "one dimension": (lambda given: fft.ifft(fft.fft(given, dim=1), dim=-2, norm="forward").real, (VALUE,)),
    "64 bits": (lambda given: fft.fft2(given.double()).real.float(), (VALUE,)),
    "cast": (lambda given: (given.to(torch.complex64) * 1j).imag, (VALUE,)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_without_complex_values(name: str) -> None:
    function, inputs = CASES[name]
    graph_module, constants = lowered(function, inputs)
    for node in graph_module.graph.nodes:
        values = [each for each in pytree.tree_leaves(node.meta.get("val")) if isinstance(each, torch.Tensor)]
        assert not any(value.is_complex() for value in values)
    assert lower_complex(graph_module).changes == 0
    expected = function(*inputs)
    (result,) = graph_module(*constants, *inputs)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert difference(result, expected) < 1e-5


def lowered(function: Function, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    """Return the graph of `function` after the pass, and the constants that it takes before its inputs."""
    program = torch.export.export(_Calls(function), inputs, strict=False).run_decompositions({})
    graph_module = program.graph_module
    remove_dead(graph_module)
    assert lower_complex(graph_module).changes > 0
    remove_dead(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, [value for value in program.constants.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    "function",
    [
        lambda given: given * 2,
        lambda given: fft.rfft(given).abs(),  # no rule
        lambda given: fft.fft(given, n=9).abs(),  # padded
        lambda given: fft.fft2(given, s=(4, 4)).abs(),
        lambda given: fft.fft(given).prod(-1).real,
        lambda given: fft.fft(given),  # a complex output
    ],
)
def test_left_alone(function: Function) -> None:
    untouched(lower_complex, function, VALUE)


def test_a_complex_input_is_left_alone() -> None:
    untouched(lower_complex, lambda given: (given * 2).real, torch.complex(VALUE, VALUE))


def test_free_sizes() -> None:
    """The DFT matrices depend on the size."""
    program = torch.export.export(
        _Calls(lambda given: fft.ifftn(fft.fftn(given, dim=(-2, -1)) * 0.5, dim=(-2, -1)).real),
        (VALUE,),
        dynamic_shapes={"inputs": ({2: Dim("height", min=2), 3: Dim("width", min=2)},)},
        strict=False,
    )
    graph_module = program.graph_module
    assert lower_complex(graph_module).changes > 0
    graph_module.graph.lint()
    graph_module.recompile()
    for size in ((6, 5), (7, 12)):
        given = random(2, 3, *size)
        (result,) = graph_module(given)
        assert difference(result, given / 2) < 1e-5


def test_as_exact_as_the_fast_transform() -> None:
    """At a size as in FreeU, compared with the result in 64 bits."""
    given = random(1, 4, 96, 96)
    graph_module, constants = lowered(filtered, (given,))
    (result,) = graph_module(*constants, given)
    exact = fft.fftshift(fft.fftn(given.double(), dim=(-2, -1)), dim=(-2, -1))
    exact[..., 47:49, 47:49] *= 0.2
    wanted = fft.ifftn(fft.ifftshift(exact, dim=(-2, -1)), dim=(-2, -1)).real
    assert difference(result.double(), wanted) < 2e-6
