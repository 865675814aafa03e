"""Text encoders and VAEs: calls of requests that wait at the same time are run together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tgate_compile
from tests.comparing import assert_same
from tests.serve.requesting import call_of, images, in_groups, seeded, tiny
from tests.tiny_pipelines import sdxl, stable_diffusion
from tgate_compile.serve import Engine
from tgate_compile.serve.components import Components

pytestmark = pytest.mark.usefixtures("no_deadlock")

TOGETHER = 3


def answers(engine: Engine, calls: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the images of calls whose texts are encoded together, and whose images are decoded together."""
    with in_groups(engine, len(calls)):
        tickets = [engine.submit({**call, "generator": seeded(call)}) for call in calls]
        return [images(ticket) for ticket in tickets]


def last_norm(module: torch.nn.Module) -> torch.nn.Module:
    """Return the last layer of a text encoder."""
    return [each for each in module.modules() if isinstance(each, torch.nn.LayerNorm)][-1]


def counted(module: torch.nn.Module) -> list[int]:
    """Return a list that gets the number of rows of each call of a layer."""
    rows: list[int] = []
    module.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    return rows


def add_text_lora(module: torch.nn.Module) -> None:
    """Add LoRA layers to a text encoder."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), module)


@pytest.mark.parametrize("make", [stable_diffusion, pytest.param(sdxl, marks=pytest.mark.heavy)])
def test_texts_and_images_of_several_requests(make: Any) -> None:
    pipe = make(layout="least") if make is stable_diffusion else make()
    encodings, decodings = counted(last_norm(pipe.text_encoder)), counted(pipe.vae.decoder.conv_out)
    tgate_compile.optimize(pipe, 2, backend="eager")
    # Without a negative prompt, SDXL encodes none.
    given = {"negative_prompt": "blue", "output_type": "np", "num_inference_steps": 3}
    calls = [call_of(number, **given) for number in range(TOGETHER)]
    expected = [pipe(**{**call, "generator": seeded(call)}).images for call in calls]
    assert len(encodings) == 2 * TOGETHER
    assert len(decodings) == TOGETHER
    with Engine(pipe, max_batch=TOGETHER) as engine:
        for turn in range(2):
            encodings.clear()
            decodings.clear()
            for result, target in zip(answers(engine, calls), expected, strict=True):
                np.testing.assert_allclose(result, target, atol=1e-5)
            if turn:  # the first time, batches were compared with single runs
                assert encodings == [TOGETHER] * 2  # the prompts, and the negative prompts
                assert decodings == [TOGETHER]
        components = engine.stats().components
        assert components["text_encoder"] == {TOGETHER: 4}
        assert components["vae"] == {TOGETHER: 2}
        assert not engine.stats().one_at_a_time
    assert "forward" not in vars(pipe.text_encoder)
    assert "forward" not in vars(pipe.vae.decoder)


def test_equal_bits_alone() -> None:
    pipe = tiny()
    expected = pipe(**call_of(output_type="np")).images
    with Engine(pipe, max_batch=1) as engine:
        assert np.array_equal(images(engine.submit(call_of(output_type="np"))), expected)


def test_rows_that_depend_on_each_other(caplog: pytest.LogCaptureFixture) -> None:
    pipe = stable_diffusion(layout="least")
    last_norm(pipe.text_encoder).register_forward_hook(
        lambda module, args, output: output + output.mean(0, keepdim=True)
    )
    tgate_compile.optimize(pipe, 2, backend="eager")
    calls = [call_of(number) for number in range(TOGETHER)]
    expected = [pipe(**{**call, "generator": seeded(call)}).images for call in calls]
    with Engine(pipe, max_batch=TOGETHER) as engine, caplog.at_level(logging.WARNING, "tgate_compile.serve"):
        for _ in range(2):
            for result, target in zip(answers(engine, calls), expected, strict=True):
                assert_same(result, target)
        (reason,) = engine.stats().one_at_a_time
    assert "relative difference" in reason
    (record,) = caplog.records
    assert "in the text_encoder of this pipeline" in record.getMessage()


def test_components_that_the_pipeline_changes_are_left_out() -> None:
    pipe = stable_diffusion(layout="least")
    given = Components(pipe, ("unet",))
    assert given.names == ("vae", "text_encoder")
    given.close()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.half()
    given = Components(pipe, ("unet",))
    assert given.names == ("text_encoder",)
    given.close()
    add_text_lora(pipe.text_encoder)
    assert Components(pipe, ("unet",)).names == ()


def test_what_a_thread_has_set() -> None:
    pipe = stable_diffusion(layout="least")
    pipe.text_encoder.requires_grad_(True)
    given = Components(pipe, ("unet",))
    seen: list[Any] = []

    def submit(work: Any) -> Any:
        seen.append(work)
        ((result,), problem) = given.run([work])
        assert problem is None
        return result

    ids = torch.ones(1, 4, dtype=torch.int64)
    with given.submitting(submit):
        result = pipe.text_encoder(ids)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = pipe.text_encoder(ids)
    assert result.last_hidden_state.requires_grad
    assert seen[0].key is None
    assert seen[1].key is not None
    assert rounded.last_hidden_state.dtype == torch.bfloat16 or not torch.equal(
        rounded.last_hidden_state, result.last_hidden_state
    )
    assert len(seen) == 2
    pipe.text_encoder(ids)  # outside of a request
    assert len(seen) == 2
    given.close()
