"""`analyze`: its numbers match independent measurements of the same generations; the pipeline is unchanged."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import HeunDiscreteScheduler

from tests import tiny_pipelines
from tests.denoiser_cases import CASES
from tests.joint_denoisers import DENOISERS
from tests.test_joint_attention import sd3, sd3_call
from tgate_compile import (
    Analysis,
    ConfigurationError,
    UnsupportedModelError,
    analyze,
    load_demo_pipeline,
    optimize,
    pure,
)
from tgate_compile.engine.call import Call
from tgate_compile.engine.families import family_of
from tgate_compile.study.analysis.measures import Curve, Tallies, without_text
from tgate_compile.study.analysis.run import suggested_gate

STEPS = 4
PROMPTS = ["red cat", "blue dog"]
GUIDANCE = {"guidance_scale": 5.0}


def latents(pipe: Any, prompt: str, seed: int = 0, **call: Any) -> torch.Tensor:
    return tiny_pipelines.run(pipe, prompt, seed=seed, **{"steps": STEPS, **GUIDANCE, **call})


def drift(x: torch.Tensor, plain: torch.Tensor) -> float:
    return ((x - plain).norm() / plain.norm()).item()


@pytest.fixture(scope="module")
def analyzed() -> tuple[Any, Analysis]:
    """Return a plain pipeline and its analysis."""
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    steps = (0, 1, 3, STEPS)
    return pipe, analyze(
        pipe, PROMPTS, num_inference_steps=STEPS, seeds=(0, 3), call=GUIDANCE, switch_steps=steps, pictures=True
    )


@pytest.mark.parametrize(("kind", "suffix"), [("cross", "attn2"), ("self", "attn1")])
def test_convergence_and_norms_are_those_of_the_outputs(analyzed: tuple[Any, Analysis], kind: str, suffix: str) -> None:
    pipe, analysis = analyzed
    attentions = analysis.kinds[kind]  # type: ignore[index]
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs[name].append(output.clone())

    sites = {f"unet.{name}": m for name, m in pipe.unet.named_modules() if name.endswith(suffix)}
    assert list(attentions.sites) == list(sites)
    per_image: list[list[float]] = []
    halves: dict[str, list[float]] = defaultdict(list)
    for prompt in PROMPTS:
        for seed in (0, 3):
            outputs.clear()
            handles = [module.register_forward_hook(keep(name)) for name, module in sites.items()]
            latents(pipe, prompt, seed)
            for handle in handles:
                handle.remove()
            of_image = []
            for step in range(1, STEPS):
                changes = [(o[step] - o[step - 1]).norm().item() for o in outputs.values()]
                of_image.append(sum(changes) / len(changes))
            per_image.append(of_image)
            uncond, cond = zip(*(values[2].chunk(2) for values in outputs.values()), strict=True)
            halves["uncond"].append(sum(x.norm().item() for x in uncond) / len(sites))
            halves["cond"].append(sum(x.norm().item() for x in cond) / len(sites))
            ratios = [drift(u, c) for u, c in zip(uncond, cond, strict=True)]
            halves["apart"].append(sum(ratios) / len(sites))
    found = torch.tensor(per_image, dtype=torch.float64)
    assert attentions.difference.steps == tuple(range(1, STEPS))
    assert attentions.difference.mean == pytest.approx(found.mean(0).tolist(), rel=1e-4)
    assert attentions.difference.spread == pytest.approx(found.std(0, correction=0).tolist(), rel=1e-2, abs=1e-5)
    mean = {name: sum(values) / len(values) for name, values in halves.items()}
    assert {half: curve.mean[2] for half, curve in attentions.norms.items()} == pytest.approx(
        {"uncond": mean["uncond"], "cond": mean["cond"]}, rel=1e-4
    )
    assert attentions.apart.mean[2] == pytest.approx(mean["apart"], rel=1e-4)
    assert attentions.relative_by_half["cond"].mean != attentions.relative_by_half["uncond"].mean
    one = next(iter(sites))
    last = [(values[3] - values[2]).norm() / values[3].norm() for name, values in outputs.items() if name == one]
    alone = analyze(pipe, PROMPTS[1:], num_inference_steps=STEPS, seeds=(3,), call=GUIDANCE, switch_steps=())
    assert alone.kinds[kind].sites[one].relative.mean[-1] == pytest.approx(last[0].item(), rel=1e-4)  # type: ignore[index]
    assert alone.kinds[kind].difference.spread == (0.0,) * (STEPS - 1)  # type: ignore[index]
    assert alone.trajectories is None


def test_trajectories_lose_their_text_at_the_switch_step(analyzed: tuple[Any, Analysis]) -> None:
    pipe, analysis = analyzed
    trajectories = analysis.trajectories
    assert trajectories is not None
    first, last = trajectories.text_first, trajectories.text_last
    assert first.steps == last.steps == (0, 1, 3, STEPS)
    assert (first.mean[-1], last.mean[0]) == (0.0, 0.0)  # S itself, to the bit
    assert first.mean[0] == last.mean[-1] > 1e-3  # no text at all
    assert first.mean[0] > first.mean[1] > first.mean[2] > 0.0
    empty = [drift(latents(pipe, "", s), latents(pipe, p, s)) for p in PROMPTS for s in (0, 3)]
    assert first.mean[0] == pytest.approx(sum(empty) / 4, rel=1e-4)

    # The same with the pipeline's own callback: from step 3 on the prompt is empty.
    texts = pipe.encode_prompt("", "cpu", 1, True, negative_prompt="")

    def forget(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.cat([texts[1], texts[0]])} if step == 2 else values

    expected = []
    for prompt in PROMPTS:
        for seed in (0, 3):
            x = latents(
                pipe, prompt, seed, callback_on_step_end=forget, callback_on_step_end_tensor_inputs=["prompt_embeds"]
            )
            expected.append(drift(x, latents(pipe, prompt, seed)))
    assert first.mean[2] == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_the_pipeline_is_as_it_was(analyzed: tuple[Any, Analysis]) -> None:
    pipe, analysis = analyzed
    fresh = tiny_pipelines.stable_diffusion(layout="small")
    assert torch.equal(latents(pipe, "red cat"), latents(fresh, "red cat"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert type(pipe) is type(fresh)
    assert (analysis.num_steps, analysis.prompts, analysis.seeds) == (STEPS, tuple(PROMPTS), (0, 3))
    assert analysis.call == {"guidance_scale": "5.0"}


def test_pictures_files_and_words(analyzed: tuple[Any, Analysis], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipe, analysis = analyzed
    assert list(analysis.pictures) == ["S", *(f"S^{way}_{m}" for way in "FL" for m in (0, 1, 3, STEPS))]
    generator = torch.Generator().manual_seed(0)
    plain = pipe("red cat", num_inference_steps=STEPS, generator=generator, **GUIDANCE).images[0]
    assert analysis.pictures["S"].tobytes() == analysis.pictures["S^L_0"].tobytes() == plain.tobytes()
    assert analysis.pictures["S^F_0"].tobytes() != plain.tobytes()
    for name in ("a.png", "a.svg"):
        analysis.plot(tmp_path / name)
        analysis.plot_pictures(tmp_path / f"pictures_{name}")
        assert (tmp_path / name).stat().st_size > 10_000
    svg = (tmp_path / "a.svg").read_text()
    for words in ("cross-attention", "self-attention", "text before step m only"):
        assert words in svg
    analysis.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["kinds"]["cross"]["difference"]["mean"] == list(analysis.kinds["cross"].difference.mean)
    assert data["gate"] == analysis.gate
    for words in ("4 steps of DDIMScheduler, 4 images", "S^F_m", "cross-attention, relative change at step 1:"):
        assert words in str(analysis)


def test_the_suggested_gate() -> None:
    def gate(*means: float, within: float = 0.1) -> int | None:
        return suggested_gate(Curve(tuple(range(1, 1 + len(means))), means, (0.0,) * len(means)), within)

    assert gate(10, 5, 2, 1, 1, 1) == 4
    assert gate(10, 5, 2, 1, 1, 1, within=0.2) == 3
    assert gate(10, 5, 1.5, 1, 1.8, 1) == 3
    assert gate(10, 5, 1.5, 1, 1, 4) is None  # at the end they change again
    assert gate(1, 2, 3) is None
    assert gate() is None


def test_tallies_are_means_and_deviations() -> None:
    tallies = Tallies()
    for value in (1.0, 2.0, 6.0):
        tallies.add("a", 3, value)
    curve = tallies.curve("a")
    assert curve == Curve((3,), (3.0,), (pytest.approx(math.sqrt(14 / 3)),))
    assert tallies.curve("b") == Curve((), (), ())


def test_rows_that_alternate_between_the_halves_are_swapped_too() -> None:
    latents = torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1)
    text, ids = torch.randn(4, 5, 8), torch.arange(4.0)[:, None]
    call = Call.of((latents, torch.tensor(3)), {"text": text, "added_cond_kwargs": {"time_ids": ids}})
    args, kwargs = without_text(call, latents, family_of(diffusers.StableDiffusionXLPipeline)).arguments
    assert torch.equal(args[0], latents)
    assert torch.equal(kwargs["text"], text[[0, 1, 0, 1]])
    assert kwargs["added_cond_kwargs"]["time_ids"].flatten().tolist() == [0, 0, 2, 2]


def test_a_step_of_several_calls_is_one_step() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    analysis = analyze(pipe, PROMPTS[:1], num_inference_steps=STEPS, call=GUIDANCE, switch_steps=(0, STEPS))
    assert analysis.num_steps == STEPS
    assert analysis.kinds["cross"].difference.steps == (1, 2, 3)
    assert analysis.trajectories is not None
    assert (analysis.trajectories.text_first.mean[1], analysis.trajectories.text_last.mean[0]) == (0.0, 0.0)


def test_without_guidance_there_is_no_null_text() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    analysis = analyze(pipe, PROMPTS[:1], num_inference_steps=STEPS, call={"guidance_scale": 1.0}, kinds=("cross",))
    assert analysis.trajectories is None
    assert "without guidance" in analysis.remarks[0]
    assert list(analysis.kinds) == ["cross"]
    assert list(analysis.kinds["cross"].norms) == ["all"]
    assert analysis.kinds["cross"].apart.mean == ()


@pytest.mark.parametrize(
    ("name", "kinds", "halves"),
    [
        ("WanPipeline", {"cross", "self"}, {"cond", "uncond"}),  # a separate call for each half
        ("WanPipeline, two transformers", {"cross", "self"}, {"cond", "uncond"}),
        ("LTXPipeline", {"cross", "self"}, {"cond", "uncond"}),  # its attentions do not declare their kind
        ("AnimateDiffPipeline", {"cross", "self"}, {"cond", "uncond"}),  # text for each frame
        ("LuminaPipeline", {"cross", "self"}, {"cond", "uncond"}),  # the cond half first
        ("StableVideoDiffusionPipeline", {"cross", "self"}, {"cond", "uncond"}),  # no text
    ],
)
def test_other_denoisers(name: str, kinds: set[str], halves: set[str]) -> None:
    case = CASES[name]
    call = {key: value for key, value in case.call(1).items() if key != "num_inference_steps"}
    analysis = analyze(case.build(), call=call, num_inference_steps=STEPS, switch_steps=(0, 2, STEPS))
    assert set(analysis.kinds) == kinds
    assert set(analysis.kinds["cross"].norms) == halves
    assert all(value > 0.0 for value in analysis.kinds["self"].difference.mean)
    if name == "StableVideoDiffusionPipeline":
        assert analysis.trajectories is None
        assert "not conditioned on text" in analysis.remarks[0]
        return
    assert analysis.trajectories is not None
    first, last = analysis.trajectories.text_first.mean, analysis.trajectories.text_last.mean
    assert (first[2], last[0]) == (0.0, 0.0)
    assert first[0] == last[2] > first[1] > 0.0
    assert last[1] > 0.0


def test_embedded_prompts() -> None:
    call = tiny_pipelines.pixart_prompt()
    analysis = analyze(tiny_pipelines.pixart(), call=call, num_inference_steps=STEPS, switch_steps=(0, STEPS))
    assert analysis.prompts == ()
    assert len(analysis.kinds["cross"].sites) == 2
    assert analysis.trajectories is not None
    assert analysis.trajectories.text_first.mean[0] > 1e-3


def test_keys_and_values_of_joint_attention() -> None:
    """In joint attention, it is the text's keys and values that may converge; the graph has them, and no module."""
    pipe = sd3(DENOISERS["sd3"].build())
    pipe.set_progress_bar_config(disable=True)
    keys: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if type(output) is torch.Tensor:  # not while the denoiser is captured
                keys[name].append(output)

        return pure(hook)  # its result depends on its arguments alone

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in pipe.transformer.named_modules()
        if name.endswith("attn.norm_added_k")
    ]
    analysis = analyze(pipe, call=sd3_call(1), num_inference_steps=STEPS, switch_steps=(0, STEPS))
    for handle in handles:
        handle.remove()
    cross = analysis.kinds["cross"]
    assert list(analysis.kinds) == ["cross"]
    attentions = [f"transformer.transformer_blocks.{i}.attn" for i in range(3)]
    assert sorted(cross.sites) == sorted(f"{name}.{part}" for name in attentions for part in ("key", "value"))
    for name in attentions:
        own = keys[f"{name.removeprefix('transformer.')}.norm_added_k"][:STEPS]
        expected = [(after - before).norm().item() for before, after in itertools.pairwise(own)]
        assert list(cross.sites[f"{name}.key"].difference.mean) == pytest.approx(expected, rel=1e-4)
    assert analysis.trajectories is not None
    assert analysis.trajectories.text_first.mean[0] > 1e-3


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"prompts": []}, "prompts must"),
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"seeds": ()}, "seeds"),
        ({"call": {"generator": None}}, r"analyze\(\) sets generator"),
        ({"kinds": ()}, "kinds"),
        ({"kinds": ("self",)}, "kinds"),
        ({"kinds": ("cross", "deep")}, "kinds"),
        ({"converged_within": 0.0}, "converged_within"),
        ({"converged_within": 2.0}, "converged_within"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments: dict[str, Any], shown: str) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    pipe.unet.forward = None
    with pytest.raises(ConfigurationError, match=shown):
        analyze(pipe, **{"prompts": PROMPTS, **arguments})


def test_steps_that_the_call_does_not_make_are_refused() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    with pytest.raises(ConfigurationError, match="between 0 and 4"):
        analyze(pipe, PROMPTS, num_inference_steps=STEPS, switch_steps=(5,))


def test_unsupported_pipelines_are_refused() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    optimize(pipe, 2, backend="eager")
    with pytest.raises(ConfigurationError, match="already optimized"):
        analyze(pipe, PROMPTS)
    three_way = tiny_pipelines.stable_diffusion("StableDiffusionInstructPix2PixPipeline", layout="small")
    with pytest.raises(UnsupportedModelError, match="three predictions"):
        analyze(three_way, PROMPTS)


def test_the_embedded_pipeline() -> None:
    pipe = load_demo_pipeline()
    prompt = ["a large red circle on a blue background"]
    analysis = analyze(pipe, prompt, num_inference_steps=8, call=GUIDANCE, switch_steps=(4,))
    change = analysis.kinds["cross"].difference.mean
    assert change[0] > 2 * change[-1]
    assert analysis.trajectories is not None
    # The paper's figure 3: the text matters in the first steps.
    assert analysis.trajectories.text_first.mean[0] < 0.5 * analysis.trajectories.text_last.mean[0]
