"""The runtime in docs/reference/bundle.md, with only numpy and ONNX Runtime, makes the same latents as the library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

import tgate_compile
from tests.comparing import assert_differ, difference
from tests.exported import GATE, STEPS, exported, plain
from tests.tiny_pipelines import LATENT_SIZE, PROMPT, run
from tgate_compile.bundle.plan import graph_name
from tgate_compile.bundle.plan_rows import plans_of
from tgate_compile.methods.first_block_cache import FirstBlockCache
from tgate_compile.methods.method import BLOCKS, Part, Phase
from tgate_compile.methods.schedule import Schedule

TEXT = (Path(__file__).parents[1] / "docs" / "reference" / "bundle.md").read_text()


def test_the_runtime_of_the_document() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert "torch" not in code
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    denoiser = namespace["Denoiser"](exported())

    pipe = plain()
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    text = torch.cat([uncond, cond])
    pipe.scheduler.set_timesteps(STEPS)
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, LATENT_SIZE, LATENT_SIZE), generator=noise) * pipe.scheduler.init_noise_sigma
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        sample = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        arguments = {"sample": sample, "timestep": timestep, "encoder_hidden_states": text}
        predicted = torch.tensor(denoiser(step, {name: value.numpy() for name, value in arguments.items()}))
        first, second = predicted.chunk(2)
        latents = pipe.scheduler.step(first + 7.5 * (second - first), timestep, latents).prev_sample

    plain_latents = run(pipe, steps=STEPS)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    assert difference(latents, run(pipe, steps=STEPS)) < 1e-4
    assert_differ(latents, plain_latents)


def test_the_plans_of_the_document() -> None:
    example, decided = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", TEXT, flags=re.DOTALL))
    schedule = Schedule(4)
    graphs = {schedule.graph_phase(phase) for phase in schedule.plan(6, guided=True)}
    plans = plans_of(schedule, {phase: graph_name(phase) for phase in graphs})
    assert plans is not None
    whole = plans.model_dump()
    assert example["phases"] == whole["phases"][: len(example["phases"])]
    assert example["guided"] == whole["guided"][: len(example["guided"])]
    phase = Phase(True, decided=BLOCKS)
    names: tuple[Part, ...] = ("head", "tail", "finish")
    parts: dict[Phase, str] = {phase.of_part(name): name for name in names}
    plans = plans_of(Schedule.of(FirstBlockCache()), parts)
    assert plans is not None
    assert decided in plans.model_dump(mode="json")["phases"]
