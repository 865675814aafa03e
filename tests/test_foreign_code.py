"""Third-party code on and inside a denoiser acts as in the plain pipeline, or is refused by name."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    SlicedAttnProcessor,
)

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.hook_reference import hook_reference
from tests.refusing import refused
from tests.tiny_pipelines import TEXT_DIM, add_lora, image_embeds, load_ip_adapter, run, stable_diffusion
from tgate_compile import ConfigurationError, UnsupportedModelError

GATE = 3
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
#: Installs code on a UNet, and returns a function that removes it.
Put = Callable[[Any], Callable[[], Any]]


def small() -> Any:
    return stable_diffusion(layout="small")


def optimized(pipe: Any = None, **options: Any) -> Any:
    return tgate_compile.optimize(pipe or small(), **{"gate_step": GATE, "backend": "eager", **options})


def by_hooks(pipe: Any, **call: Any) -> torch.Tensor:
    with hook_reference(pipe, GATE):
        return run(pipe, **call)


@pytest.fixture(scope="module")
def sd() -> SimpleNamespace:
    """Return an optimized pipeline and a plain one with the same weights. Tests must not modify them."""
    gated, plain = optimized(), small()
    return SimpleNamespace(gated=gated, plain=plain, image=run(gated), compilations=compilations(gated))


def compilations(pipe: Any) -> int:
    return pipe._tgate_compile.hook.store.compilations


def check_parity(gated: Any, plain: Any, **call: Any) -> torch.Tensor:
    """Return the image of `gated`; check it against the hooks, and the ungated one bitwise against `plain`."""
    result = run(gated, **call)
    assert_same(result, by_hooks(plain, **call))
    assert torch.equal(run(gated, gate_step=1000, **call), run(plain, **call))
    return result


@contextmanager
def on(put: Put, *pipes: Any) -> Iterator[None]:
    """Install code on the UNets of `pipes` inside the context."""
    with ExitStack() as stack:
        for pipe in pipes:
            stack.callback(put(pipe.unet))
        yield


# Hooks on the denoiser itself run outside the graph.


def weaker(module: Any, args: Any, kwargs: Any) -> Any:
    return (args[0] * 0.9, *args[1:]), kwargs


def other_text(module: Any, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * 0.5}


def stronger(module: Any, args: Any, output: Any) -> Any:
    return (output[0] * 1.1,)


def stronger_with_kwargs(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    return (output[0] + kwargs["encoder_hidden_states"].mean(),)


def in_place(module: Any, args: Any, output: Any) -> None:
    output[0].mul_(1.1)


ON_THE_DENOISER: dict[str, Put] = {
    "pre-hook": lambda unet: unet.register_forward_pre_hook(weaker, with_kwargs=True).remove,
    "pre-hook that changes the text": lambda unet: unet.register_forward_pre_hook(other_text, with_kwargs=True).remove,
    "hook": lambda unet: unet.register_forward_hook(stronger).remove,
    "hook with kwargs": lambda unet: unet.register_forward_hook(stronger_with_kwargs, with_kwargs=True).remove,
    "hook that works in place": lambda unet: unet.register_forward_hook(in_place).remove,
}


@pytest.mark.parametrize("kind", ON_THE_DENOISER)
def test_hooks_on_the_denoiser_act_once(sd: SimpleNamespace, kind: str) -> None:
    with on(ON_THE_DENOISER[kind], sd.gated, sd.plain):
        assert_differ(check_parity(sd.gated, sd.plain), sd.image)
    assert torch.equal(run(sd.gated), sd.image)
    assert compilations(sd.gated) == sd.compilations


def test_hooks_on_the_denoiser_before_optimize() -> None:
    plain, ours = small(), small()
    for pipe in (plain, ours):
        ON_THE_DENOISER["pre-hook"](pipe.unet)
        ON_THE_DENOISER["hook"](pipe.unet)
    check_parity(optimized(ours), plain)


@pytest.mark.parametrize("gate", [GATE, 1000])
def test_what_hooks_on_the_denoiser_collect(sd: SimpleNamespace, gate: int) -> None:
    seen: list[Any] = []

    def collect(module: Any, args: Any, output: Any) -> None:
        seen.append((type(args[0]), args[0].shape, type(output[0]), output[0].shape))

    for pipe in (sd.gated, sd.plain):
        handle = pipe.unet.register_forward_hook(collect)
        run(pipe, gate_step=gate) if pipe is sd.gated else run(pipe)
        handle.remove()
    assert len(seen) == 12
    assert seen[:6] == seen[6:] == [(torch.Tensor, torch.Size([2, 4, 8, 8])) * 2] * 6


# Code inside the denoiser that a graph cannot repeat.


SEEN: list[Any] = []
STRENGTH = {"value": 0.5}
COUNT = 0


class Log:
    entries: ClassVar[list[Any]] = []
    number = 0


def hook(function: Callable[..., Any]) -> Put:
    return lambda unet: unet.mid_block.register_forward_hook(function).remove


def pre_hook(function: Callable[..., Any]) -> Put:
    return lambda unet: unet.mid_block.register_forward_pre_hook(function).remove


def forward(make: Callable[[Any], Callable[..., Any]]) -> Put:
    def put(unet: Any) -> Callable[[], Any]:
        unet.mid_block.forward = make(unet.mid_block.forward)
        return functools.partial(delattr, unet.mid_block, "forward")

    return put


def processor(make: Callable[[], Any]) -> Put:
    def put(unet: Any) -> Callable[[], Any]:
        before = unet.get_submodule(ATTENTION).processor
        unet.get_submodule(ATTENTION).set_processor(make())
        return functools.partial(unet.get_submodule(ATTENTION).set_processor, before)

    return put


def to_a_global_list(module: Any, args: Any, output: Any) -> None:
    SEEN.append(output)


def by_a_global_dict(module: Any, args: Any, output: Any) -> Any:
    return output * STRENGTH["value"]


def counts(module: Any, args: Any, output: Any) -> None:
    global COUNT
    COUNT += 1


def to_a_class(module: Any, args: Any, output: Any) -> None:
    Log.entries.append(output)


def counts_in_a_class(module: Any, args: Any, output: Any) -> None:
    Log.number += 1


def to_the_module(module: Any, args: Any, output: Any) -> None:
    module.last = output


def to_a_default(module: Any, args: Any, output: Any, seen: list[Any] = []) -> None:  # noqa: B006
    seen.append(output)


def imports(module: Any, args: Any, output: Any) -> Any:
    import random

    return output * random.random()


def prints(module: Any, args: Any, output: Any) -> None:
    print(output.mean())  # noqa: T201


def counting_closure() -> Callable[..., Any]:
    calls = 0

    def count(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return output * (0.2 if calls > 3 else 1.0)

    return count


class Collecting:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.seen.append(output)

    def method(self, module: Any, args: Any, output: Any) -> None:
        self.seen.append(output)


class CollectingModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def method(self, module: Any, args: Any, output: Any) -> None:
        self.seen.append(output)


class Counting(AttnProcessor2_0):
    calls = 0

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        self.calls += 1
        result = super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)
        return result * 0.2 if self.calls > 3 else result


class Storing(AttnProcessor):
    def __init__(self) -> None:
        self.maps: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.maps.append(super().__call__(*args, **kwargs))
        return self.maps[-1]


class ThroughAMethod(AttnProcessor):
    """Counts its calls in a helper method."""

    def note(self) -> None:
        self.calls = getattr(self, "calls", 0) + 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note()
        return super().__call__(*args, **kwargs)


class InTheBase(Counting):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Reading(AttnProcessor):
    """Depends on a setting that other code changes."""

    def __init__(self, controller: Any) -> None:
        self.controller = controller

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * self.controller.strength


def collecting(original: Any) -> Callable[..., Any]:
    seen: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    return forward


def counting(original: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return original(*args, **kwargs)

    return types.MethodType(forward, original.__self__)


IMPURE: dict[str, tuple[Put, tuple[str, ...]]] = {
    "hook, global list": (hook(to_a_global_list), ("forward hook to_a_global_list", "'SEEN', a list")),
    "hook, global dict": (hook(by_a_global_dict), ("forward hook by_a_global_dict", "'STRENGTH', a dict")),
    "hook, global number": (hook(counts), ("forward hook counts", "changes the global variable 'COUNT'")),
    "hook, list of a class": (hook(to_a_class), ("forward hook to_a_class", "'entries' of Log, a list")),
    "hook, number of a class": (hook(counts_in_a_class), ("changes the attribute 'number'",)),
    "hook, module": (hook(to_the_module), ("forward hook to_the_module", "changes the attribute 'last'")),
    "hook, default": (hook(to_a_default), ("forward hook to_a_default", "a default value, a list")),
    "hook, import": (hook(imports), ("forward hook imports", "uses the module 'random'")),
    "hook, print": (hook(prints), ("forward hook prints", "calls print()")),
    "hook, nonlocal": (hook(counting_closure()), ("counting_closure.<locals>.count", "changes the variable 'calls'")),
    "hook, closure": (hook(lambda m, i, o, seen=SEEN: seen.append(o)), ("forward hook <lambda>", "a list")),
    "hook, object": (hook(Collecting()), ("forward hook Collecting", "'seen', a list")),
    "hook, bound method": (hook(Collecting().method), ("forward hook Collecting.method", "'seen', a list")),
    "hook, method of a module": (hook(CollectingModule().method), ("CollectingModule.method", "not part of the denoi")),
    "hook, partial": (hook(functools.partial(lambda seen, m, i, o: seen.append(o), SEEN)), ("bound argument, a list",)),
    "hook, wrapped": (hook(torch.no_grad()(to_a_global_list)), ("to_a_global_list", "'SEEN', a list")),
    "hook, method of a list": (
        hook(functools.partial(lambda keep, m, i, o: keep(o), SEEN.append)),
        ("append()'s owner, a list",),
    ),
    "pre-hook": (pre_hook(lambda m, args: SEEN.append(args[0])), ("forward hook <lambda>", "'SEEN', a list")),
    "processor that counts": (processor(Counting), ("attention processor Counting", "'calls' in each call", ATTENTION)),
    "processor that stores": (processor(Storing), ("attention processor Storing", "'maps', a list", ATTENTION)),
    "processor that counts elsewhere": (processor(ThroughAMethod), ("ThroughAMethod", "'calls' in each call")),
    "processor whose base counts": (processor(InTheBase), ("InTheBase", "'calls' in each call")),
    "processor that reads": (processor(lambda: Reading(SimpleNamespace(strength=1))), ("Reading", "'controller', a S")),
    "forward, closure": (forward(collecting), ("collecting.<locals>.forward", "in place of the forward", "a list")),
    "forward, method": (forward(counting), ("counting.<locals>.forward", "in place of the forward", "'calls'")),
}
WHERE = {"hook": "'mid_block' (UNetMidBlock2DCrossAttn)", "forward": "'mid_block' (UNetMidBlock2DCrossAttn)"}


@pytest.mark.parametrize("kind", IMPURE)
def test_code_that_cannot_be_repeated(sd: SimpleNamespace, kind: str) -> None:
    put, parts = IMPURE[kind]
    parts = (*parts, "tgate_compile.pure(", "What works instead", WHERE.get(kind.partition(",")[0], ""))
    with on(put, sd.plain):
        refused(sd.plain, UnsupportedModelError, *parts)
    with on(put, sd.gated):
        for _ in range(2):
            with pytest.raises(UnsupportedModelError) as caught:
                run(sd.gated)
            assert all(part in str(caught.value) for part in parts)
    assert torch.equal(run(sd.gated), sd.image)
    assert SEEN == Log.entries == []
    assert COUNT == Log.number == 0


def test_put_on_in_the_middle_of_a_call(sd: SimpleNamespace) -> None:
    handles = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 1:
            handles.append(pipe.unet.mid_block.register_forward_hook(to_a_global_list))
        return tensors

    with pytest.raises(UnsupportedModelError, match="to_a_global_list"):
        run(sd.gated, callback_on_step_end=callback)
    handles[0].remove()
    assert SEEN == []
    assert torch.equal(run(sd.gated), sd.image)


def test_a_class_of_diffusers_that_was_patched(sd: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attention.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        SEEN.append(args[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Attention, "forward", patched)
    refused(sd.plain, UnsupportedModelError, "patched", "in place of the forward of", "'SEEN', a list")
    with pytest.raises(UnsupportedModelError, match="patched"):
        run(sd.gated)
    monkeypatch.undo()
    monkeypatch.setattr(AttnProcessor2_0, "__call__", Counting.__call__)
    refused(sd.plain, UnsupportedModelError, "attention processor Counting.__call__", "'calls' in each call")
    monkeypatch.undo()
    assert SEEN == []
    assert torch.equal(run(sd.gated), sd.image)


def test_code_whose_effects_show_only_when_it_runs(sd: SimpleNamespace) -> None:
    # The hook's own code does not show that it changes anything.
    def keep(module: Any, args: Any, output: Any) -> None:
        module.kept.append(output)
        module.number.add_(1)

    pipe = small()
    pipe.unet.mid_block.kept = []
    pipe.unet.mid_block.number = torch.zeros(())
    pipe.unet.mid_block.register_forward_hook(keep)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"keeps state.*changes mid_block\.kept, mid_block\.number"):
        run(pipe)
    assert pipe.unet.mid_block.kept == []
    assert pipe.unet.mid_block.number == 0


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules(sd: SimpleNamespace, register: str) -> None:
    handle = getattr(torch.nn.modules.module, register)(lambda *args: None)
    try:
        refused(sd.plain, UnsupportedModelError, "forward hooks for all modules", "What works instead")
        with pytest.raises(UnsupportedModelError, match="forward hooks for all modules"):
            run(sd.gated)
    finally:
        handle.remove()
    assert torch.equal(run(sd.gated), sd.image)


# Code that a graph can repeat, and the settings that it reads.


SCALE = 1.0


class Settings:
    scale = 1.0


class Scaling(AttnProcessor):
    factor = 1.0

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * self.strength() * self.factor

    def strength(self) -> float:
        return math.sqrt(self.scale)


class Hooked:
    scale = 1.0

    def method(self, module: Any, args: Any, output: Any) -> Any:
        return output * self.scale


def by_a_global(module: Any, args: Any, output: Any) -> Any:
    return output * SCALE


def by_a_class(module: Any, args: Any, output: Any) -> Any:
    return output * Settings.scale


def set_global(scale: float) -> None:
    global SCALE
    SCALE = scale


def by_a_closure() -> tuple[Callable[..., Any], Callable[[float], None]]:
    scale = 1.0

    def change(value: float) -> None:
        nonlocal scale
        scale = value

    return lambda module, args, output: output * scale, change


def by_an_attribute_of_itself(module: Any, args: Any, output: Any) -> Any:
    return output * by_an_attribute_of_itself.scale  # type: ignore[attr-defined]


by_an_attribute_of_itself.scale = 1.0  # type: ignore[attr-defined]


@tgate_compile.pure
def by_a_list(module: Any, args: Any, output: Any) -> Any:
    return output * SCALES[0]["mid"]


SCALES = [{"mid": 1.0}]
_closure, _set_closure = by_a_closure()
_shared, _hooked = Scaling(), Hooked()
_marked = Hooked()
#: Installs the code, and changes its setting.
PURE: dict[str, tuple[Put, Callable[[float], Any]]] = {
    "global number": (hook(by_a_global), set_global),
    "number of a class": (hook(by_a_class), functools.partial(setattr, Settings, "scale")),
    "number of a closure": (hook(_closure), _set_closure),
    "number of the function": (
        hook(by_an_attribute_of_itself),
        functools.partial(setattr, by_an_attribute_of_itself, "scale"),
    ),
    "bound method": (hook(_hooked.method), functools.partial(setattr, _hooked, "scale")),
    "processor": (processor(lambda: _shared), functools.partial(setattr, _shared, "scale")),
    "class of a processor": (processor(Scaling), functools.partial(setattr, Scaling, "factor")),
    "list, marked": (hook(by_a_list), functools.partial(SCALES[0].__setitem__, "mid")),
}


@pytest.mark.parametrize("kind", PURE)
def test_code_that_can_be_repeated_follows_its_settings(sd: SimpleNamespace, kind: str) -> None:
    put, change = PURE[kind]
    images = []
    with on(put, sd.gated, sd.plain):
        for scale in (1.0, 0.25, 1.0):
            change(scale)
            images.append(run(sd.gated, steps=2, gate_step=1000))
            assert torch.equal(images[-1], run(sd.plain, steps=2))
    assert_differ(images[1], images[0])
    assert torch.equal(images[2], images[0])
    assert torch.equal(run(sd.gated), sd.image)


@pytest.mark.parametrize("put", [hook, lambda by: forward(lambda inner: lambda *a, **k: by(None, a, inner(*a, **k)))])
def test_code_that_is_replaced_by_another(sd: SimpleNamespace, put: Callable[[Any], Put]) -> None:
    images = []
    for function in (lambda m, i, o: o * 2, lambda m, i, o: o * 3):
        with on(put(function), sd.gated, sd.plain):
            images.append(run(sd.gated, steps=2, gate_step=1000))
            assert torch.equal(images[-1], run(sd.plain, steps=2))
    assert_differ(*images)


# Code that its author marks as pure.


def marked_hook() -> Any:
    @tgate_compile.pure
    def double(module: Any, args: Any, output: Any) -> Any:
        return output * torch.as_tensor(FACTORS)[0]

    return double


FACTORS = [2.0]


@tgate_compile.pure
class MarkedProcessor(AttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * torch.as_tensor(FACTORS)[0]


class UnmarkedProcessor(MarkedProcessor):
    """Marking a class does not mark its subclasses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        FACTORS[0] = 2.0
        return super().__call__(*args, **kwargs)


class Doubling:
    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return output * torch.as_tensor(FACTORS)[0]

    def method(self, module: Any, args: Any, output: Any) -> Any:
        return self(module, args, output)


@pytest.mark.parametrize(
    "put",
    [
        hook(marked_hook()),
        hook(tgate_compile.pure(Doubling())),
        hook(tgate_compile.pure(Doubling().method)),
        processor(MarkedProcessor),
        processor(lambda: tgate_compile.pure(UnmarkedProcessor())),
    ],
    ids=["hook", "object", "bound method", "class", "processor"],
)
def test_pure(sd: SimpleNamespace, put: Put) -> None:
    with on(put, sd.gated, sd.plain):
        assert_differ(check_parity(sd.gated, sd.plain), sd.image)


def test_pure_is_not_inherited(sd: SimpleNamespace) -> None:
    with on(processor(UnmarkedProcessor), sd.plain):
        refused(sd.plain, UnsupportedModelError, "UnmarkedProcessor", "'FACTORS', a list")


@pytest.mark.parametrize("given", [3, "hook", None, [].append])
def test_invalid_arguments_of_pure(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="pure"):
        tgate_compile.pure(given)


# Code that is known to work.


def sliced(pipe: Any) -> None:
    pipe.unet.get_submodule(ATTENTION).set_processor(SlicedAttnProcessor(2))


def ip_adapter(pipe: Any) -> None:
    load_ip_adapter(pipe)


def custom_diffusion(pipe: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = CustomDiffusionAttnProcessor2_0(True, True, hidden_size=32, cross_attention_dim=TEXT_DIM)
    pipe.unet.get_submodule(ATTENTION).set_processor(made.requires_grad_(False))


def weight_norm(pipe: Any) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(pipe.unet.mid_block.resnets[0].conv1)


def spectral_norm(pipe: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.utils.spectral_norm(pipe.unet.mid_block.resnets[0].conv1)
    pipe.unet.eval()


@pytest.mark.filterwarnings("ignore:The tensor attribute.*conv1.weight was assigned during export")
@pytest.mark.parametrize(
    ("change", "visible"),
    [
        pytest.param(sliced, False, id="Sliced", marks=pytest.mark.heavy),
        pytest.param(custom_diffusion, True, id="CustomDiffusion"),
        pytest.param(ip_adapter, True, id="IP-Adapter"),
        pytest.param(weight_norm, False, id="weight_norm"),
        pytest.param(spectral_norm, True, id="spectral_norm", marks=pytest.mark.heavy),
    ],
)
def test_supported_changes(sd: SimpleNamespace, change: Callable[[Any], None], visible: bool) -> None:
    gated, plain = optimized(), small()
    for pipe in (gated, plain):
        change(pipe)
    call = {"ip_adapter_image_embeds": image_embeds(plain)} if change is ip_adapter else {}
    image = check_parity(gated, plain, **call)
    (assert_differ if visible else assert_same)(image, sd.image)


def test_other_weights_in_a_lora() -> None:
    gated, plain = optimized(), small()
    for pipe in (gated, plain):
        add_lora(pipe.unet)
    first = check_parity(gated, plain)
    made = compilations(gated)
    for pipe in (gated, plain):
        with torch.no_grad():  # as in hotswapping
            for name, parameter in pipe.unet.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(3)
    assert_differ(check_parity(gated, plain), first)
    assert compilations(gated) == made


def test_tomesd(sd: SimpleNamespace) -> None:
    tomesd = pytest.importorskip("tomesd")
    gated, plain = optimized(), small()
    for pipe in (gated, plain):
        tomesd.apply_patch(pipe, ratio=0.5, use_rand=False)
    assert_differ(check_parity(gated, plain), sd.image)
    tomesd.remove_patch(gated)
    assert_same(run(gated), sd.image)


# A custom denoiser.


class Own(torch.nn.Module):
    """A diffusers UNet with code around it."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.config, self.add_embedding = unet.config, None
        self.calls = 0
        self.last: Any = None
        self.table: Any = None

    dtype = property(lambda self: self.unet.dtype)
    device = property(lambda self: self.unet.device)

    def forward(self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        return self.unet(self.before(sample), timestep, encoder_hidden_states, return_dict=False)

    def before(self, sample: torch.Tensor) -> torch.Tensor:
        return sample


class CountsItsCalls(Own):
    def before(self, sample: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return sample * (1 if self.calls % 3 else 0.9)


class KeepsItsInput(Own):
    def before(self, sample: torch.Tensor) -> torch.Tensor:
        self.last, previous = sample, self.last
        return sample if previous is None else 0.9 * sample + 0.1 * previous


class CollectsGlobally(Own):
    def before(self, sample: torch.Tensor) -> torch.Tensor:
        SEEN.append(sample)
        return sample * (1 if len(SEEN) % 3 else 0.9)


class CountsGlobally(Own):
    def before(self, sample: torch.Tensor) -> torch.Tensor:
        global COUNT
        COUNT += 1
        return sample * (1 if COUNT % 3 else 0.9)


class CountsInABuffer(Own):
    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.register_buffer("number", torch.zeros(()))

    def before(self, sample: torch.Tensor) -> torch.Tensor:
        self.number += 1
        return sample * self.number.cos()


class MakesATable(Own):
    def before(self, sample: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.linspace(0.9, 1, 8)
        return sample * self.table


class ReadsSettings(Own):
    def before(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * STRENGTH["value"] * SCALE


@pytest.fixture
def clean() -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(SEEN.clear)
        stack.callback(counts.__globals__.update, COUNT=0, SCALE=1.0)
        stack.callback(STRENGTH.update, value=0.5)
        yield


def own(kind: type[Own]) -> Any:
    pipe = small()
    pipe.unet = kind(pipe.unet)
    return pipe


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (CountsItsCalls, "changes calls"),
        (KeepsItsInput, "changes last"),
        (CollectsGlobally, "global variable 'SEEN' of CollectsGlobally"),
        (CountsGlobally, "changes the global variable 'COUNT'"),
        (CountsInABuffer, "changes number"),
    ],
)
def test_a_denoiser_that_keeps_state(kind: type[Own], reason: str, clean: None) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} keeps state from call to call.*{reason}"):
        run(optimized(own(kind)))
    # The inspection has no side effects.
    assert SEEN == []
    assert COUNT == 0
    served = optimized(own(kind), on_unsupported="plain")
    images = [run(served), run(served)]
    SEEN.clear()
    counts.__globals__["COUNT"] = 0
    plain = own(kind)
    for image in images:
        assert torch.equal(image, run(plain))


def test_a_denoiser_that_makes_a_table_in_its_first_call() -> None:
    gated, plain = optimized(own(MakesATable)), own(MakesATable)
    result = run(gated)
    assert_same(result, by_hooks(plain))
    assert torch.equal(run(gated), result)
    assert torch.equal(run(gated, gate_step=1000), run(plain))


def test_settings_that_a_denoiser_reads(clean: None) -> None:
    gated, plain = optimized(own(ReadsSettings)), own(ReadsSettings)
    images = []
    for name, value in (("none", 0), ("value", 1.0), ("SCALE", 0.8)):
        (STRENGTH if name == "value" else counts.__globals__).update({name: value} if value else {})
        images.append(run(gated, steps=2, gate_step=1000))
        assert torch.equal(images[-1], run(plain, steps=2))
    assert_differ(images[1], images[0])
    assert_differ(images[2], images[1])
