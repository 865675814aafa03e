"""Edit pipelines with frozen reference images, compared with plain hooks on PyTorch's attention function."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.joint_reference import TextReference, frozen_text
from tests.test_joint_guidance import run
from tests.tiny_joint import JOINT, SIDE
from tests.tiny_pipelines import stable_diffusion
from tests.tiny_transformers import TOKENS
from tgate_compile import (
    BundleError,
    ConfigurationError,
    FrozenReferences,
    FrozenText,
    TGate,
    UnsupportedModelError,
)
from tgate_compile.bundle.read import read_bundle
from tgate_compile.engine.call import Call
from tgate_compile.pipeline import two_halves
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.serve import Engine

STEPS = 3
IMAGE = 16  # tokens of the image, which come first, and of its reference


@dataclass(frozen=True)
class Edit:
    """An edit pipeline.

    Attributes:
        name: its class.
        guided: whether there is guidance, in two calls for each step.
        reference: the number of tokens of its reference image.
    """

    name: str
    guided: bool
    reference: int = IMAGE

    @property
    def tokens(self) -> int:
        return TOKENS + IMAGE + self.reference

    @property
    def place(self) -> slice:
        """The positions of the reference's tokens: after the text's and the image's."""
        return slice(TOKENS + IMAGE, self.tokens)

    def build(self) -> Any:
        pipe = JOINT[self.name].build()
        with torch.no_grad():
            for name, parameter in pipe.transformer.named_parameters():
                if "attn" in name and parameter.ndim > 1:
                    parameter.mul_(3)  # so that the reference has a visible effect
        return pipe

    def call(self) -> dict[str, Any]:
        """Return the arguments of a call whose two texts have the same number of tokens."""
        call = JOINT[self.name].call(1)
        for name in [name for name in call if name.startswith("negative_")]:
            like = call[name.removeprefix("negative_")]
            call[name] = torch.ones_like(like) if "mask" in name else -like
        return call


KONTEXT = Edit("FluxKontextPipeline", guided=True)
EDITS = (KONTEXT, Edit("Flux2KleinPipeline", guided=True), Edit("QwenImageEditPlusPipeline", guided=True))


def expected_of(edit: Edit, gate: int, **options: Any) -> torch.Tensor:
    pipe = edit.build()
    given = {"text": edit.place, "guided": edit.guided, "kept": 0, "drops_guidance": False, **options}
    reference = TextReference(pipe.transformer, gate, edit.tokens, **given)
    with frozen_text(reference):
        result = run(pipe, num_inference_steps=STEPS, **edit.call())
    assert reference.attended == set(range(STEPS))
    return result


def optimized(edit: Edit, schedule: Any) -> Any:
    return tgate_compile.optimize(edit.build(), schedule, backend="eager")


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Qwen-Image-Edit shrink its reference to the size of the image, instead of a megapixel."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SIDE**2)


@pytest.fixture(scope="module")
def frozen() -> Any:
    return optimized(KONTEXT, FrozenReferences(1))


@pytest.mark.parametrize(
    "edit",
    [KONTEXT, *(pytest.param(edit, marks=pytest.mark.sweep) for edit in EDITS[1:])],
    ids=[edit.name for edit in EDITS],
)
def test_frozen_references(edit: Edit, request: pytest.FixtureRequest) -> None:
    """The first call finds the reference's tokens after its first step; the second one knows them."""
    expected = expected_of(edit, 1)
    pipe = request.getfixturevalue("frozen") if edit is KONTEXT else optimized(edit, FrozenReferences(1))
    first = run(pipe, **edit.call())
    assert_same(first, expected)
    assert_same(run(pipe, **edit.call()), expected)
    assert_differ(expected, run(edit.build(), **edit.call()))
    description = tgate_compile.describe(pipe)
    assert description.strip == "FXX"
    full, reused = (next(v for v in description.variants if v.name == n) for n in ("full", "references-reused"))
    assert reused.macs < 0.75 * full.macs
    assert reused.parameters <= full.parameters  # of the text, less is needed in the last block


def test_described_beforehand() -> None:
    pipe = optimized(KONTEXT, FrozenReferences(1))
    foreseen = tgate_compile.describe(pipe, num_inference_steps=STEPS, output_type="latent", **KONTEXT.call())
    run(pipe, **KONTEXT.call())
    done = tgate_compile.describe(pipe)
    assert (foreseen.strip, foreseen.cache_bytes, foreseen.sites) == (done.strip, done.cache_bytes, done.sites)
    # Keys and values of four attentions and the rows of the prediction, in float32, for both halves.
    assert done.cache_bytes == 2 * IMAGE * (8 * 32 + 16) * 4


@pytest.mark.heavy
def test_from_a_later_step_and_computed_again() -> None:
    pipe = optimized(KONTEXT, FrozenReferences(2))
    assert_same(run(pipe, **KONTEXT.call()), expected_of(KONTEXT, 2))
    assert tgate_compile.describe(pipe).strip == "FFX"
    pipe = optimized(KONTEXT, FrozenReferences(1, interval=2))
    assert_same(run(pipe, **KONTEXT.call()), expected_of(KONTEXT, 1, refresh=2))
    assert tgate_compile.describe(pipe).strip == "FXF"


@pytest.mark.heavy
def test_with_a_gate() -> None:
    """Where guidance ends, the references are computed once more: both halves have been cached, and one goes on."""
    pipe = optimized(KONTEXT, FrozenReferences(1) + TGate(1))
    run(pipe, **KONTEXT.call())
    assert tgate_compile.describe(pipe).strip == "Fpa"


def test_with_frozen_text() -> None:
    both = [*range(TOKENS), *range(KONTEXT.place.start, KONTEXT.tokens)]
    pipe = optimized(KONTEXT, FrozenReferences(1) + FrozenText(1))
    assert_same(run(pipe, **KONTEXT.call()), expected_of(KONTEXT, 1, text=both))
    description = tgate_compile.describe(pipe)
    assert description.strip == "FAA"
    assert {name.rpartition(".")[2] for name in description.sites} == {"key", "value", "0"}


@pytest.mark.sweep
def test_another_split_of_as_many_tokens(frozen: Any) -> None:
    """What was learnt from a call with as many tokens of both kinds together is corrected."""
    run(frozen, **KONTEXT.call())
    rows = required_state_of(frozen).hook.store.image_rows
    assert list(rows.values()) == [(1, 0, IMAGE)] * len(rows)
    for key in rows:
        rows[key] = (1, 0, IMAGE - 4)
    assert_same(run(frozen, **KONTEXT.call()), expected_of(KONTEXT, 1))
    assert list(rows.values()) == [(1, 0, IMAGE)] * len(rows)


def test_without_a_reference_image(frozen: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is frozen, which is logged, and the result is the plain pipeline's."""
    call = {name: value for name, value in KONTEXT.call().items() if name != "image"}
    expected = run(KONTEXT.build(), **call)
    assert torch.equal(run(frozen, **call), expected)
    assert "no tokens of reference images" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_requests_to_an_engine(frozen: Any) -> None:
    """The first request finds the tokens of its reference, while the others wait for nothing."""
    calls = [KONTEXT.call() | {"num_inference_steps": steps, "output_type": "latent"} for steps in (STEPS, STEPS + 1)]
    expected = [run(frozen, **call) for call in calls]
    required_state_of(frozen).hook.store.image_rows.clear()
    with Engine(frozen, max_batch=2) as engine:
        tickets = [engine.submit({**call, "generator": torch.Generator().manual_seed(0)}) for call in calls]
        for ticket, target in zip(tickets, expected, strict=True):
            assert_same(ticket.result(60).images, target)
        assert not engine.stats().errors


@pytest.mark.heavy
def test_in_a_bundle(tmp_path: Path) -> None:
    pipe = optimized(KONTEXT, FrozenReferences(1))
    call = KONTEXT.call()
    expected = run(pipe, **call)
    example = {**call, "num_inference_steps": STEPS, "output_type": "latent"}
    without = {name: value for name, value in example.items() if name != "image"}
    with pytest.raises(ConfigurationError, match="has none"):
        tgate_compile.export(pipe, tmp_path / "bundle", call=without, dynamic=False)
    folder = tgate_compile.export(pipe, tmp_path / "bundle", call=example, dynamic=False)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe, **call), expected) < 1e-4
    assert tgate_compile.describe(pipe).strip == "FXX"
    manifest = read_bundle(folder).manifest
    assert (manifest.schema_version, manifest.denoiser.image_rows) == (4, (1, 0, IMAGE))
    assert set(manifest.graphs) >= {"full-unguided", "references-reused-unguided"}
    with pytest.raises(BundleError, match="supports hidden_states"):
        run(pipe, **{name: value for name, value in call.items() if name != "image"})
    # As many tokens, of which fewer belong to the image.
    store: Any = required_state_of(pipe).hook.store
    store.image_rows._rows = (1, 0, IMAGE - 4)
    with pytest.raises(BundleError, match="this call has other reference images"):
        run(pipe, **call)


def test_few_of_what_was_learnt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_halves, "MOST_KNOWN", 2)
    known: dict[Any, Any] = {}
    for tokens in (20, 24, 28):
        rows = two_halves.ReferenceRows(known, "a denoiser")
        latents = torch.arange(4.0 * tokens).reshape(1, tokens, 4)
        call = Call.of((latents,), {})
        rows.placed(call, latents)
        assert not rows.learn(latents[:, :IMAGE])
        assert known[call.key] == (1, 0, IMAGE)
    assert len(known) == 2


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="joint attention, which UNet2DConditionModel does not have"):
        tgate_compile.optimize(stable_diffusion(), FrozenReferences(1), backend="eager")
